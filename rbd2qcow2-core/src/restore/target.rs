//! The file that a point is restored to, while it is written aside.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;

use super::error::RestoreError;
use crate::chain::{ChainError, durable, image_directory_around};
use crate::error::Causes;
use crate::point::PointError;

/// Behind the name of a file that is being written.
const SUFFIX: &str = ".partial";

/// Hex digits that tell the files of runs apart.
const DIGITS: usize = 8;

/// A place for a file, and the file aside that is going to get it. Dropping this removes the file aside.
#[derive(Debug)]
pub(super) struct Target {
    /// As the caller named it.
    path: PathBuf,
    directory: PathBuf,
    /// `.<name>.<8 hex digits>.partial`, in the same directory: no two runs write to one file, so
    /// whichever is renamed is the one that its run wrote.
    partial: PathBuf,
    /// Whether the partial file is there and ours.
    created: bool,
    /// Locked, so that others see that the partial file is being written.
    lock: Option<File>,
}

impl Target {
    /// Checks that a file can be restored to `path`, which lies in no image's directory in `dest`.
    pub(super) fn new(path: &Path, dest: &Path) -> Result<Self, RestoreError> {
        let no_file = || RestoreError::NoFile { path: path.to_owned() };
        let name = path.file_name().ok_or_else(no_file)?;
        if path.as_os_str().as_bytes().ends_with(b"/") {
            return Err(no_file());
        }
        let directory = match path.parent() {
            Some(parent) if parent != Path::new("") => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let unusable = |cause| RestoreError::Directory { path: directory.clone(), cause };
        let real = directory.canonicalize().map_err(unusable)?;
        if let Some(directory) = image_directory_around(dest, &real).map_err(PointError::from)? {
            return Err(RestoreError::WithinChain { path: path.to_owned(), directory });
        }
        match fs::symlink_metadata(path) {
            Ok(_) => return Err(RestoreError::Exists { path: path.to_owned() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(unusable(error)),
        }
        let partial = directory.join(partial_name(name, draw().map_err(unusable)?));
        Ok(Self { path: path.to_owned(), directory, partial, created: false, lock: None })
    }

    /// Where the file is to be written. Nothing is there yet.
    pub(super) fn partial(&self) -> &Path {
        &self.partial
    }

    /// The file was created.
    pub(super) fn created(&mut self) {
        self.created = true;
        // Whoever takes the file for a left-over meanwhile, and removes it, makes the rename fail.
        match lock(&self.partial) {
            Ok(lock) => self.lock = lock,
            Err(error) => log::debug!("cannot lock {}: {error}", self.partial.display()),
        }
    }

    /// Removes what killed restores to the same path left behind: files that nobody holds locked.
    pub(super) fn remove_stale(&self) {
        let name = self.path.file_name().unwrap_or_default();
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| is_partial_of(&entry.file_name(), name)) {
            let path = entry.path();
            // Where there are no locks, nobody can tell whether the file is left over.
            let Ok(Some(_lock)) = lock(&path) else { continue };
            log::info!("removing {}, left behind by an interrupted restore", path.display());
            if let Err(error) = durable::remove(&path) {
                log::warn!("{}", Causes(&error));
            }
        }
    }

    /// Gives the finished and synced file its name.
    pub(super) fn commit(mut self) -> Result<(), RestoreError> {
        durable::rename_new(&self.partial, &self.path).map_err(|error| match error {
            ChainError::Io { cause, .. } if cause.kind() == io::ErrorKind::AlreadyExists => {
                RestoreError::Exists { path: self.path.clone() }
            }
            cause => RestoreError::Rename { path: self.path.clone(), cause },
        })?;
        self.created = false;
        durable::sync_directory(&self.directory)
            .map_err(|cause| RestoreError::Uncertain { path: self.path.clone(), cause })
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if !self.created {
            return;
        }
        if let Err(error) = durable::remove(&self.partial) {
            // The reason for the drop is reported by whoever dropped it.
            log::warn!("{}", Causes(&error));
        }
    }
}

/// Opens a file and locks it without waiting. `None` when somebody else has it locked, or it is no
/// regular file.
fn lock(path: &Path) -> io::Result<Option<File>> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    // For writing: locks on NFS ask for it.
    let file = File::options().read(true).write(true).custom_flags(flags.bits().cast_signed()).open(path)?;
    if !file.metadata()?.is_file() {
        return Ok(None);
    }
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn draw() -> io::Result<u32> {
    let mut bytes = [0; 4];
    // Requests of up to 256 bytes are never cut short.
    rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())?;
    Ok(u32::from_be_bytes(bytes))
}

fn partial_name(name: &OsStr, number: u32) -> OsString {
    let mut partial = OsString::from(".");
    partial.push(name);
    partial.push(format!(".{number:0DIGITS$x}{SUFFIX}"));
    partial
}

/// Whether `found` is what [`partial_name`] makes of `name`.
fn is_partial_of(found: &OsStr, name: &OsStr) -> bool {
    let digits = found.as_bytes().strip_prefix(b".").and_then(|rest| rest.strip_prefix(name.as_bytes()));
    let digits = digits.and_then(|rest| rest.strip_prefix(b".")?.strip_suffix(SUFFIX.as_bytes()));
    digits.is_some_and(|digits| {
        digits.len() == DIGITS && digits.iter().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn left_overs_are_told_by_their_names() {
        let name = OsStr::new("vm.raw");
        assert_eq!(partial_name(name, 0xc0ffee), OsStr::new(".vm.raw.00c0ffee.partial"));
        assert!(is_partial_of(&partial_name(name, u32::MAX), name));
        for other in [
            ".vm.raw.partial",
            ".vm.raw.00c0ffe.partial",
            ".vm.raw.00C0FFEE.partial",
            "vm.raw.00c0ffee.partial",
            ".vm.raw2.00c0ffee.partial",
            ".vm.raw.00c0ffee.part",
        ] {
            assert!(!is_partial_of(OsStr::new(other), name), "{other}");
        }
    }

    #[test]
    fn only_files_that_nobody_writes_are_left_over() {
        let directory = tempfile::tempdir().expect("a directory");
        let dest = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("vm.raw");
        let mut busy = Target::new(&path, dest.path()).expect("free");
        fs::write(busy.partial(), "begun").expect("written");
        busy.created();
        let stale = directory.path().join(".vm.raw.00c0ffee.partial");
        fs::write(&stale, "left").expect("written");
        let other = directory.path().join(".vm.raw2.00c0ffee.partial");
        fs::write(&other, "another's").expect("written");
        let link = directory.path().join(".vm.raw.00c0ffef.partial");
        std::os::unix::fs::symlink(&other, &link).expect("a link");
        let target = Target::new(&path, dest.path()).expect("free");
        target.remove_stale();
        assert!(!stale.exists() && other.exists() && link.is_symlink());
        assert!(busy.partial().exists());
        let partial = busy.partial().to_owned();
        drop(busy);
        assert!(!partial.exists());
    }

    #[test]
    fn a_name_that_was_taken_meanwhile_is_not_replaced() {
        let directory = tempfile::tempdir().expect("a directory");
        let dest = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("vm.raw");
        let mut target = Target::new(&path, dest.path()).expect("free");
        fs::write(target.partial(), "ours").expect("written");
        target.created();
        fs::write(&path, "theirs").expect("written");
        assert!(matches!(target.commit(), Err(RestoreError::Exists { .. })));
        assert_eq!(fs::read(&path).expect("there"), b"theirs");
        assert_eq!(fs::read_dir(directory.path()).expect("listed").count(), 1);
    }
}

//! Files of long chains: opened when they are read, and closed when others need their place.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::OFlags;

use super::file::ReadAt;
use super::open_regular_with;
use super::recent::Recent;
use crate::direct::{is_unsupported, whole_pages};
use crate::files::Shortage;

/// The file at a path is not the one that was opened there before.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the file was replaced, changed or removed meanwhile")]
pub(super) struct Replaced;

/// How a file is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Access {
    /// Through the page cache.
    Buffered,
    /// Past it.
    Direct,
}

/// The open files of a chain: those that were read last, as many as there is room for. What is being read stays
/// open as long as that takes, even where its place is another's.
#[derive(Debug)]
pub(super) struct OpenFiles(Mutex<Recent<(usize, Access), Arc<File>>>);

impl OpenFiles {
    /// Room for so many, at least one.
    pub(super) fn new(limit: usize) -> Self {
        Self(Mutex::new(Recent::new(limit.max(1))))
    }

    fn lock(&self) -> MutexGuard<'_, Recent<(usize, Access), Arc<File>>> {
        // Nothing in there panics half-way through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn insert(&self, key: (usize, Access), file: Arc<File>) {
        let gone = self.lock().insert(key, file, 1);
        // Closed without the lock.
        drop(gone);
    }

    fn close_all(&self) {
        let gone = self.lock().clear();
        drop(gone);
    }
}

/// What tells a file from another of its name. Nobody writes to a layer whose chain is locked by a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    length: u64,
    modified: (i64, i64),
}

impl Identity {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            length: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

/// A file that is open only while there is room for it. It is the same file at every read, or that read fails.
#[derive(Debug)]
pub(super) struct OnDemand {
    path: PathBuf,
    identity: Identity,
    /// Its number among the files that share the room.
    number: usize,
    /// Whether long reads go past the page cache, as far as the file system allows that.
    direct: bool,
    /// Set when it does not.
    refused: AtomicBool,
    files: Arc<OpenFiles>,
}

impl OnDemand {
    /// Takes the file `number` of those that share `files`. It was opened by the path `path`. `direct` asks for
    /// long reads to go past the page cache.
    pub(super) fn new(
        file: File,
        metadata: &Metadata,
        path: &Path,
        direct: bool,
        number: usize,
        files: Arc<OpenFiles>,
    ) -> Self {
        files.insert((number, Access::Buffered), Arc::new(file));
        let (path, identity) = (path.to_owned(), Identity::of(metadata));
        Self { path, identity, number, direct, refused: AtomicBool::new(false), files }
    }

    fn file(&self, access: Access) -> io::Result<Arc<File>> {
        let key = (self.number, access);
        if let Some(file) = self.files.lock().get(key) {
            return Ok(file);
        }
        let file = match self.open(access) {
            // Others have taken what was left when the room was measured.
            Err(error) if Shortage::of_io(&error).is_some() => {
                self.files.close_all();
                self.open(access)?
            }
            opened => opened?,
        };
        let file = Arc::new(file);
        self.files.insert(key, file.clone());
        Ok(file)
    }

    fn open(&self, access: Access) -> io::Result<File> {
        let flags = match access {
            Access::Buffered => OFlags::empty(),
            Access::Direct => OFlags::DIRECT,
        };
        match open_regular_with(&self.path, flags) {
            Ok(Some((file, metadata))) if Identity::of(&metadata) == self.identity => Ok(file),
            Ok(_) => Err(io::Error::other(Replaced)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(io::Error::other(Replaced)),
            Err(error) => Err(error),
        }
    }

    /// Reads the whole pages that fit `buf` from `offset` on, if possible, and returns their length.
    fn read_direct(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let Some(length) = whole_pages(buf, offset) else { return Ok(0) };
        if !self.direct || self.refused.load(Ordering::Relaxed) {
            return Ok(0);
        }
        let file = self.file(Access::Direct);
        match file.and_then(|file| ReadAt::read_at(&*file, &mut buf[..length], offset)) {
            Err(error) if is_unsupported(&error) => {
                self.refused.store(true, Ordering::Relaxed);
                Ok(0)
            }
            result => result,
        }
    }
}

impl ReadAt for OnDemand {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let filled = self.read_direct(buf, offset)?;
        if filled == buf.len() {
            return Ok(filled);
        }
        let file = self.file(Access::Buffered)?;
        Ok(filled + ReadAt::read_at(&*file, &mut buf[filled..], offset + filled as u64)?)
    }
}

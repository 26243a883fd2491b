//! Whose the files in the directory of an image are.
//!
//! Several users may work in one destination: root prunes or verifies, and another user backs up. Files are
//! readable for their owner only, so what root leaves there must be given to the owner of what is there
//! already, or that user's next backup could not read it. Where that is refused (CIFS and FUSE mounts, a user
//! who is not root), the files are as good as they were.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{MetadataExt, fchown};
use std::path::Path;

use super::names::{FileKind, ImageName, PointFile};

/// The bit of a mode that lets everybody write.
const ANYBODY_WRITES: u32 = 0o002;

/// A user and a group, by their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    uid: u32,
    gid: u32,
}

impl Owner {
    /// That of a file.
    pub(super) fn of(metadata: &Metadata) -> Self {
        Self { uid: metadata.uid(), gid: metadata.gid() }
    }

    /// That of all layers in the directory of an image.
    ///
    /// # Errors
    /// The directory cannot be listed or looked at.
    pub(super) fn of_layers_in(directory: &Path) -> io::Result<Self> {
        let is_layer = |file: PointFile| file.kind == FileKind::Layer;
        Self::of_all(directory, |name| PointFile::parse(name).is_some_and(is_layer))
    }

    /// That of all directories in a destination that may be those of images, but for the `new` one.
    ///
    /// # Errors
    /// The destination cannot be listed or looked at.
    pub(super) fn of_images_in(dest: &Path, new: &Path) -> io::Result<Self> {
        Self::of_all(dest, |name| {
            let path = dest.join(name);
            ImageName::decode(name).is_ok() && path != new && path.is_dir()
        })
    }

    /// That of all entries of a directory whose names are such. Where there are none, or they do not have the
    /// same, that of the directory: nobody is given what root writes because of one file that he put there.
    fn of_all(directory: &Path, is_such: impl Fn(&str) -> bool) -> io::Result<Self> {
        let metadata = fs::metadata(directory)?;
        let own = Self::of(&metadata);
        if metadata.mode() & ANYBODY_WRITES != 0 {
            return Ok(own);
        }
        let mut common = None;
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            // Of a link that is the link. One that has gone meanwhile says nothing.
            let such = entry.file_name().to_str().is_some_and(&is_such).then(|| entry.metadata().ok());
            let Some(found) = such.flatten().map(|metadata| Self::of(&metadata)) else { continue };
            if *common.get_or_insert(found) != found {
                return Ok(own);
            }
        }
        Ok(common.unwrap_or(own))
    }

    /// Gives a file to this owner, if it is not his already. Only what this process's user has made, and what
    /// has no second name: a link must lead nobody to a file of others.
    ///
    /// # Errors
    /// What the system says; the file has another owner then.
    pub(super) fn take(self, file: &File) -> io::Result<()> {
        let metadata = file.metadata()?;
        if Self::of(&metadata) == self {
            return Ok(());
        }
        let is_ours = metadata.uid() == rustix::process::geteuid().as_raw();
        if !is_ours || (metadata.is_file() && metadata.nlink() != 1) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        match fchown(file, Some(self.uid), Some(self.gid)) {
            // The group has no rights in files that nobody has changed.
            Err(error) if metadata.uid() == self.uid => {
                log::debug!("a file cannot be given to group {}: {error}", self.gid);
                Ok(())
            }
            other => other,
        }
    }
}

/// Gives a new file at `path` to the owner of the files beside it, where that is possible. Says so of a layer
/// where it is not: one word for each point will do.
pub(super) fn as_neighbours(file: &File, path: &Path) {
    let Some(directory) = path.parent() else { return };
    let Err(error) = Owner::of_layers_in(directory).and_then(|owner| owner.take(file)) else { return };
    let name = path.file_name().and_then(|name| name.to_str());
    let layer = name.and_then(PointFile::parse_partial).is_some_and(|file| file.kind == FileKind::Layer);
    tell(path, &error, layer);
}

/// Tells that a file could not be given to the owner of others; loudly, where it is what somebody waits for.
pub(super) fn tell(path: &Path, error: &io::Error, loudly: bool) {
    let level = if loudly { log::Level::Warn } else { log::Level::Debug };
    log::log!(
        level,
        "{} cannot be given to the owner of the files beside it, who may not be able to read it: {error}",
        path.display()
    );
}

#[cfg(test)]
mod tests;

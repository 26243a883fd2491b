//! A layer's file that is changed where it lies.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, Mode};
use rustix::io::Errno;

use super::{ChainError, create_aside, fault, remove};
use crate::chain::lease::Lease;
use crate::qcow2::absorb::Medium;
use crate::qcow2::open_regular;

/// File systems on which a [`Lease`] tells of every process that has a file open, by their magic numbers:
/// ext2 to ext4, XFS, Btrfs, F2FS, tmpfs. On others, somebody on another machine may.
const LOCAL: [u64; 5] = [0xef53, 0x5846_5342, 0x9123_683e, 0xf2f5_2010, 0x0102_1994];

/// A file that is changed in place: one that nobody else has open, or that readers see only through
/// another, or a copy.
#[derive(Debug)]
pub(crate) struct InPlace {
    file: File,
    path: PathBuf,
}

impl InPlace {
    /// Makes a copy at `to`, which must not exist, that shares all data with the file at `from`. `None`
    /// where the file system cannot do that: nothing is there then.
    ///
    /// # Errors
    /// [`ChainError::Io`]; nothing is there then.
    pub(crate) fn share(from: &Path, to: &Path) -> Result<Option<Self>, ChainError> {
        let (source, _) = regular(from)?;
        let file = create_aside(to)?;
        // What cannot be shared is just copied elsewhere, for whatever reason that is.
        match fault::step("share", to).and_then(|()| Ok(rustix::fs::ioctl_ficlone(&file, &source)?)) {
            Ok(()) => Ok(Some(Self { file, path: to.to_owned() })),
            Err(error) => {
                log::debug!("{} cannot share its data with a copy: {error}", from.display());
                remove(to).map(|_| None)
            }
        }
    }

    /// Opens the file at `path` itself. `None` where it must not be changed, because somebody else has it
    /// open, it has a second name, or nobody can tell.
    ///
    /// # Errors
    /// [`ChainError::Io`].
    pub(crate) fn exclusive(path: &Path) -> Result<Option<Self>, ChainError> {
        let (file, metadata) = regular(path)?;
        let found = rustix::fs::fstatfs(&file).map_err(ChainError::io("look at", path))?;
        #[allow(clippy::cast_sign_loss, reason = "a magic number")]
        if !LOCAL.contains(&(found.f_type as u64)) || metadata.nlink() != 1 {
            return Ok(None);
        }
        drop(file);
        let file = open_to_write(path, metadata.mode()).map_err(ChainError::io("open", path))?;
        let opened = Self { file, path: path.to_owned() };
        Ok(opened.lease().map(drop).map(|()| opened))
    }

    /// Keeps everybody else from opening the file, unless somebody has it open. Who tries waits.
    pub(crate) fn lease(&self) -> Option<Lease<'_>> {
        // What hinders that, others tell, or the next step.
        self.step("lease").ok().and_then(|()| Lease::take(&self.file))
    }

    /// Ends a lease, and tells whether nobody can have opened the file as long as it was held.
    pub(crate) fn end_lease(&self, lease: Lease<'_>) -> bool {
        self.step("end lease of").is_ok() && lease.has_held()
    }

    /// A second handle, for reading.
    pub(crate) fn handle(&self) -> Result<(File, u64), ChainError> {
        let failed = |cause| ChainError::io("look at", &self.path)(cause);
        let bytes = self.file.metadata().map_err(failed)?.len();
        Ok((self.file.try_clone().map_err(failed)?, bytes))
    }

    fn step(&self, operation: &str) -> io::Result<()> {
        fault::step(operation, &self.path)
    }
}

/// Layers are read-only, for their owner too.
fn open_to_write(path: &Path, mode: u32) -> io::Result<File> {
    let open = || File::options().read(true).write(true).open(path);
    match open() {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR)?;
            let opened = open();
            rustix::fs::chmod(path, Mode::from_raw_mode(mode & 0o7777))?;
            opened
        }
        opened => opened,
    }
}

pub(super) fn regular(path: &Path) -> Result<(File, fs::Metadata), ChainError> {
    let opened = open_regular(path).map_err(ChainError::io("open", path))?;
    opened.ok_or_else(|| ChainError::io("open", path)(io::Error::other("not a regular file")))
}

impl Medium for InPlace {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.step("write to")?;
        self.file.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.step("flush")?;
        self.file.sync_all()
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        self.step("discard of")?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, flags, range.start, range.end - range.start) {
            // Then it is used again the next time.
            Err(Errno::NOTSUP | Errno::NOSYS) => Ok(()),
            other => Ok(other?),
        }
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.step("set the length of")?;
        self.file.set_len(length)
    }
}

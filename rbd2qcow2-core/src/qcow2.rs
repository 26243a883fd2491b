//! The qcow2 file format, as described in QEMU's `docs/interop/qcow2.txt`.
//!
//! [`header`], [`table`] and [`refcount`] are the format as types, which exist only once their content
//! was checked. [`layer`] reads one file, [`chain`] a whole restore point; [`check`] looks at all of a
//! file's structure, also at what reading does not need.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use rustix::fs::OFlags;

pub mod absorb;
pub mod chain;
pub mod check;
pub mod compressed;
pub mod compressor;
pub mod error;
pub mod file;
pub mod header;
pub mod layer;
mod on_demand;
mod pages;
mod recent;
pub mod refcount;
pub mod table;
#[cfg(test)]
pub(crate) mod testing;
pub mod writer;

/// What qcow2 counts virtual sizes in, bytes. An image's size is rounded up to it.
pub const SECTOR: u64 = 512;

/// A layer that takes over another's content is kept from being opened for a moment: how often that is tried
/// again, and after how long.
const LEASE_TRIES: u32 = 100;
const LEASE_PAUSE: Duration = Duration::from_millis(10);

/// Opens a file of a chain for reading, and only a file: a symbolic link that was put in its place is
/// not followed, a pipe is not waited for. `None` for whatever is no regular file.
///
/// # Errors
/// What `open(2)` and `fstat(2)` say.
pub(crate) fn open_regular(path: &Path) -> io::Result<Option<(File, Metadata)>> {
    open_regular_with(path, OFlags::empty())
}

/// The same, with more flags.
fn open_regular_with(path: &Path, flags: OFlags) -> io::Result<Option<(File, Metadata)>> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let open = || File::options().read(true).custom_flags(flags.bits().cast_signed()).open(path);
    let mut opened = open();
    for _ in 0..LEASE_TRIES {
        match &opened {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(LEASE_PAUSE),
            _ => break,
        }
        opened = open();
    }
    match opened {
        Ok(file) => {
            let metadata = file.metadata()?;
            Ok(metadata.is_file().then_some((file, metadata)))
        }
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => Ok(None),
        Err(error) => Err(error),
    }
}

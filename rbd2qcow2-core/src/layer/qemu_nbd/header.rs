//! The one field of a qcow2 header that is changed behind QEMU's back.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::QemuNbdError;

/// First bytes of every qcow2 file.
const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Where the header has the virtual size: 8 bytes, big endian.
const SIZE_OFFSET: u64 = 24;

/// Replaces the virtual size `from` by `to`, in bytes. Does not sync.
///
/// Only the last cluster may become shorter, so no table changes: what QEMU does on `qemu-img resize
/// --shrink`, which would open all layers below for it.
///
/// # Errors
/// [`QemuNbdError::Header`], and [`QemuNbdError::UnexpectedHeader`] for a file that is not qcow2 or
/// does not have the size `from`.
pub(super) fn set_virtual_size(file: &File, from: u64, to: u64) -> Result<(), QemuNbdError> {
    let failed = |source: io::Error| QemuNbdError::Header(Arc::new(source));
    let (mut magic, mut size) = ([0; 4], [0; 8]);
    file.read_exact_at(&mut magic, 0).map_err(failed)?;
    file.read_exact_at(&mut size, SIZE_OFFSET).map_err(failed)?;
    if magic != MAGIC || u64::from_be_bytes(size) != from {
        return Err(QemuNbdError::UnexpectedHeader);
    }
    file.write_all_at(&to.to_be_bytes(), SIZE_OFFSET).map_err(failed)
}

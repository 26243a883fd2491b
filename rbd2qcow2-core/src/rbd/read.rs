//! Reading.

use std::ffi::c_int;

use rbd2qcow2_sys as sys;

use super::error::RbdError;
use super::image::Image;
use crate::buffer::Buffer;

/// `LIBRADOS_OP_FLAG_FADVISE_SEQUENTIAL | LIBRADOS_OP_FLAG_FADVISE_NOCACHE` (librados.h): a backup
/// reads everything once and must not push the virtual machines' blocks out of the OSDs' caches.
const READ_ONCE: c_int = 0x8 | 0x40;

impl Image {
    /// Fills `buffer` from `offset` on. Blocks, at most as long as the pool's patience. When the read
    /// is given up, the buffer is left empty: librbd keeps the bytes until it answers, but they no
    /// longer count in the buffer's pool once the buffer is dropped.
    ///
    /// # Errors
    /// [`RbdError::Failed`], [`RbdError::ShortRead`], [`RbdError::NoAnswer`], [`RbdError::Cancelled`].
    pub fn read(&self, offset: u64, buffer: &mut Buffer) -> Result<(), RbdError> {
        let length = buffer.len();
        let what = || format!("read {length} bytes at offset {offset} of {}", self.title());
        let (got, lent) = self.request(what, buffer.lend(), |raw, lent, completion| {
            let bytes = lent.as_mut_ptr().cast();
            // SAFETY: the image is open, and stays so or is abandoned; `bytes` are `length` bytes that
            // stay in place until the completion is called back.
            unsafe { sys::rbd_aio_read2(raw, offset, length, bytes, completion, READ_ONCE) }
        })?;
        buffer.take_back(lent);
        if got == length { Ok(()) } else { Err(RbdError::ShortRead { what: what(), got }) }
    }
}

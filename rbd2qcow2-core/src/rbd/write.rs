//! Writing.

use std::ops::Range;

use bytes::Bytes;
use rbd2qcow2_sys as sys;

use super::error::RbdError;
use super::image::Image;

/// How much is written at once where librbd cannot make zeroes itself, in bytes.
const ZEROES: usize = 1 << 20;

impl Image {
    /// Writes `data` from `offset` on. Blocks until they are written, at most as long as the pool's
    /// patience. They are on stable storage after a [`flush`](Self::flush).
    ///
    /// # Errors
    /// [`RbdError::Failed`], for an image that was opened for reading or a quota that is used up for
    /// instance. After [`RbdError::NoAnswer`] and [`RbdError::Cancelled`] the bytes may be written, or
    /// come to be.
    pub fn write(&self, offset: u64, data: Bytes) -> Result<(), RbdError> {
        let length = data.len();
        let what = || format!("write {length} bytes at offset {offset} of {}", self.title());
        self.request(what, data, |raw, data, completion| {
            let bytes = data.as_ptr().cast();
            // SAFETY: the image is open, and stays so or is abandoned; `bytes` are `length` bytes that
            // stay in place, and as they are, until the completion is called back.
            unsafe { sys::rbd_aio_write2(raw, offset, length, bytes, completion, 0) }
        })?;
        Ok(())
    }

    /// Whether [`write_zeroes`](Self::write_zeroes) frees what it zeroes.
    #[must_use]
    pub fn frees_zeroes() -> bool {
        sys::newer::rbd_aio_write_zeroes().is_some()
    }

    /// Makes `range`, in bytes, read as zeroes, and frees what it took in the cluster. Blocks like
    /// [`write`](Self::write).
    ///
    /// Not a discard: librbd rounds those to what is worthwhile, and leaves the rest as it was. A librbd
    /// before Pacific (16.2) gets zeroes written, which free nothing.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn write_zeroes(&self, range: Range<u64>) -> Result<(), RbdError> {
        let Some(write_zeroes) = sys::newer::rbd_aio_write_zeroes() else {
            return self.write_literal_zeroes(range);
        };
        let Range { start, end } = range;
        let what = || format!("zero bytes {start}..{end} of {}", self.title());
        let length = usize::try_from(end - start).expect("addresses have 64 bits");
        self.request(what, (), |raw, (), completion| {
            // SAFETY: the image is open, and stays so or is abandoned.
            unsafe { write_zeroes(raw, start, length, completion, 0, 0) }
        })?;
        Ok(())
    }

    fn write_literal_zeroes(&self, range: Range<u64>) -> Result<(), RbdError> {
        let zeroes = Bytes::from_static(&[0; ZEROES]);
        for start in range.clone().step_by(ZEROES) {
            let length = usize::try_from(range.end - start).map_or(ZEROES, |rest| rest.min(ZEROES));
            self.write(start, zeroes.slice(..length))?;
        }
        Ok(())
    }

    /// Brings everything that was written to stable storage. Blocks like [`write`](Self::write).
    ///
    /// # Errors
    /// [`RbdError::Failed`], [`RbdError::NoAnswer`], [`RbdError::Cancelled`]: what was written may be
    /// lost.
    pub fn flush(&self) -> Result<(), RbdError> {
        let what = || format!("flush {}", self.title());
        self.request(what, (), |raw, (), completion| {
            // SAFETY: the image is open, and stays so or is abandoned.
            unsafe { sys::rbd_aio_flush(raw, completion) }
        })?;
        Ok(())
    }
}

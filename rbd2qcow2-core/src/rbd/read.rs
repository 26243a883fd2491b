//! Reading through completions, so that a reader can give up on an answer that does not come.

use std::cell::UnsafeCell;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use rbd2qcow2_sys as sys;
use sys::rbd_completion_t;

use super::error::RbdError;
use super::image::Image;
use crate::buffer::{Buffer, Lent};
use crate::cancel::Cancel;

/// `LIBRADOS_OP_FLAG_FADVISE_SEQUENTIAL | LIBRADOS_OP_FLAG_FADVISE_NOCACHE` (librados.h): a backup
/// reads everything once and must not push the virtual machines' blocks out of the OSDs' caches.
const READ_ONCE: c_int = 0x8 | 0x40;

/// A read under way. The reader holds one reference, librbd's callback the other.
struct InFlight {
    /// librbd's until `result` is set, the reader's from then on.
    buffer: UnsafeCell<Lent>,
    /// The completion's return value.
    result: Mutex<Option<isize>>,
    done: Condvar,
}

// SAFETY: `buffer` has one user at a time: librbd before `result` is set under its lock, the reader
// after it saw it set under the same lock.
unsafe impl Sync for InFlight {}
// SAFETY: Lent is Send, and so is the rest.
unsafe impl Send for InFlight {}

/// What librbd calls when the read is done, in a thread of its own.
extern "C" fn finished(completion: rbd_completion_t, state: *mut c_void) {
    // SAFETY: `state` is the reference that `read` gave away; this is called once.
    let state = unsafe { Arc::from_raw(state.cast_const().cast::<InFlight>()) };
    // SAFETY: librbd calls back with a completion that is complete.
    let result = unsafe { sys::rbd_aio_get_return_value(completion) };
    // SAFETY: `read` does not use the completion once it has handed it over.
    unsafe { sys::rbd_aio_release(completion) };
    *state.result.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
    state.done.notify_one();
}

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
        let state = Arc::new(InFlight {
            buffer: UnsafeCell::new(buffer.lend()),
            result: Mutex::new(None),
            done: Condvar::new(),
        });
        self.submit(offset, length, &state).map_err(|code| RbdError::failed(what(), code))?;
        let got = self.wait(&state, what)?;
        // SAFETY: `result` is set, so librbd is done with the buffer.
        buffer.take_back(std::mem::take(unsafe { &mut *state.buffer.get() }));
        match usize::try_from(got) {
            Ok(got) if got == length => Ok(()),
            Ok(got) => Err(RbdError::ShortRead { what: what(), got }),
            Err(_) => Err(RbdError::failed(what(), c_int::try_from(got).unwrap_or(c_int::MIN + 1))),
        }
    }

    /// Hands the read to librbd, together with a reference to `state`.
    fn submit(&self, offset: u64, length: usize, state: &Arc<InFlight>) -> Result<(), c_int> {
        let given = Arc::into_raw(state.clone());
        let arg = given.cast_mut().cast::<c_void>();
        let mut completion: rbd_completion_t = ptr::null_mut();
        // SAFETY: `finished` has the type that librbd calls and takes `arg` back.
        let mut code = unsafe { sys::rbd_aio_create_completion(arg, Some(finished), &mut completion) };
        if code >= 0 {
            // SAFETY: nobody else uses the buffer before the read is under way.
            let bytes = unsafe { &mut *state.buffer.get() }.as_mut_ptr();
            // SAFETY: the image is open, and stays so or is abandoned; `bytes` are `length` bytes
            // that the reference given away keeps in place until `finished` was called.
            code = unsafe {
                sys::rbd_aio_read2(self.raw(), offset, length, bytes.cast(), completion, READ_ONCE)
            };
            if code < 0 {
                // SAFETY: a read that was refused never calls back.
                unsafe { sys::rbd_aio_release(completion) };
            }
        }
        if code < 0 {
            // SAFETY: nobody took the reference that was given away.
            drop(unsafe { Arc::from_raw(given) });
            return Err(code);
        }
        Ok(())
    }

    /// The read's return value, once it is there.
    fn wait(&self, state: &InFlight, what: impl Fn() -> String) -> Result<isize, RbdError> {
        let start = Instant::now();
        let mut result = state.result.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(got) = *result {
                return Ok(got);
            }
            self.patience().check(start, &what).inspect_err(|_| self.abandon())?;
            result = state.done.wait_timeout(result, Cancel::POLL).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

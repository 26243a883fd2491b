//! Requests under way: completions, so that whoever waits can give up on an answer that does not come.

use std::cell::UnsafeCell;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use rbd2qcow2_sys as sys;
use sys::{rbd_completion_t, rbd_image_t};

use super::error::RbdError;
use super::image::{Image, Requests};
use crate::cancel::Cancel;

/// A request. Whoever waits for it holds one reference, librbd's callback the other.
struct Request<T> {
    /// What librbd works on: librbd's until `result` is set, the waiter's from then on.
    payload: UnsafeCell<Option<T>>,
    /// The completion's return value.
    result: Mutex<Option<isize>>,
    done: Condvar,
    /// Where it is counted until librbd has called back.
    requests: Arc<Requests>,
}

// SAFETY: `payload` has one user at a time: librbd before `result` is set under its lock, the waiter
// after it saw it set under the same lock.
unsafe impl<T: Send> Sync for Request<T> {}
// SAFETY: `payload` is sent along, and so is the rest.
unsafe impl<T: Send> Send for Request<T> {}

/// What librbd calls when the request is done, in a thread of its own.
extern "C" fn finished<T>(completion: rbd_completion_t, state: *mut c_void) {
    // SAFETY: `state` is the reference that `submit` gave away; this is called once.
    let state = unsafe { Arc::from_raw(state.cast_const().cast::<Request<T>>()) };
    // SAFETY: librbd calls back with a completion that is complete.
    let result = unsafe { sys::rbd_aio_get_return_value(completion) };
    // SAFETY: `submit` does not use the completion once it has handed it over.
    unsafe { sys::rbd_aio_release(completion) };
    *state.result.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
    state.done.notify_one();
    state.requests.end();
}

impl Image {
    /// Has librbd work on `payload`, waits for that, at most as long as the pool's patience, and gives
    /// its answer, which is not negative, with the payload. When the wait is given up, the payload
    /// lives until librbd answers.
    ///
    /// `start` gets the raw image, the payload, which stays where it is, and a completion to start a
    /// request with; it returns what librbd says to that. A request that was refused is never called
    /// back.
    pub(super) fn request<T: Send + 'static>(
        &self,
        what: impl Fn() -> String,
        payload: T,
        start: impl FnOnce(rbd_image_t, &mut T, rbd_completion_t) -> c_int,
    ) -> Result<(usize, T), RbdError> {
        let state = Arc::new(Request {
            payload: UnsafeCell::new(Some(payload)),
            result: Mutex::new(None),
            done: Condvar::new(),
            requests: self.requests().clone(),
        });
        self.submit(&state, start).map_err(|code| RbdError::failed(what(), code))?;
        let got = self.wait(&state, &what)?;
        let got = usize::try_from(got)
            .map_err(|_| RbdError::failed(what(), c_int::try_from(got).unwrap_or(c_int::MIN + 1)))?;
        // SAFETY: `result` is set, so librbd is done with the payload.
        let payload = unsafe { &mut *state.payload.get() }.take();
        Ok((got, payload.expect("taken only here")))
    }

    /// Hands the request to librbd, together with a reference to `state`.
    fn submit<T: Send + 'static>(
        &self,
        state: &Arc<Request<T>>,
        start: impl FnOnce(rbd_image_t, &mut T, rbd_completion_t) -> c_int,
    ) -> Result<(), c_int> {
        let given = Arc::into_raw(state.clone());
        let arg = given.cast_mut().cast::<c_void>();
        let mut completion: rbd_completion_t = ptr::null_mut();
        // SAFETY: `finished` has the type that librbd calls and takes `arg` back.
        let mut code = unsafe { sys::rbd_aio_create_completion(arg, Some(finished::<T>), &mut completion) };
        if code >= 0 {
            // SAFETY: nobody else uses the payload before the request is under way.
            let payload = unsafe { &mut *state.payload.get() }.as_mut().expect("there from the start");
            state.requests.begin();
            code = start(self.raw(), payload, completion);
            if code < 0 {
                state.requests.end();
                // SAFETY: a request that was refused never calls back.
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

    /// The request's return value, once it is there.
    fn wait<T>(&self, state: &Request<T>, what: impl Fn() -> String) -> Result<isize, RbdError> {
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

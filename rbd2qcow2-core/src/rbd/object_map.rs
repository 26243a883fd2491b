//! Making an object map say what is there.

use std::ffi::{c_int, c_void};
use std::ptr;

use rbd2qcow2_sys as sys;

use super::error::{RbdError, check};
use super::image::Image;

/// librbd calls this even where nobody wants to know.
extern "C" fn no_progress(_done: u64, _total: u64, _data: *mut c_void) -> c_int {
    0
}

impl Image {
    /// Rebuilds the object map of an image that is open for writing, as `rbd object-map rebuild` does: every
    /// object is asked for. Blocks, for each of librbd's answers at most as long as the pool's patience.
    ///
    /// # Errors
    /// [`RbdError::Failed`], [`RbdError::NoAnswer`], [`RbdError::Cancelled`].
    pub fn rebuild_object_map(&self) -> Result<(), RbdError> {
        let what = || format!("rebuild the object map of {}", self.title());
        let code = self.call(what, |raw| {
            // SAFETY: the image is open; the callback uses none of its arguments.
            unsafe { sys::rbd_rebuild_object_map(raw, Some(no_progress), ptr::null_mut()) }
        })?;
        check(code, what).map(drop)
    }
}

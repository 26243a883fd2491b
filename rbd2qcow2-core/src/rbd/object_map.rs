//! Making an object map say what is there.

use std::ffi::{c_int, c_void};
use std::ptr;
use std::time::Duration;

use rbd2qcow2_sys as sys;

use super::error::{RbdError, check};
use super::image::Image;
use super::patience::Patience;

/// How long a rebuild may take: it is one call, and that of a huge image asks for millions of objects.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// librbd calls this even where nobody wants to know.
extern "C" fn no_progress(_done: u64, _total: u64, _data: *mut c_void) -> c_int {
    0
}

impl Image {
    /// Rebuilds the object map of an image that is open for writing, as `rbd object-map rebuild` does: every
    /// object is asked for, 30,000 a second. Blocks until that is done, or a day at most.
    ///
    /// # Errors
    /// [`RbdError::Failed`], [`RbdError::NoAnswer`], [`RbdError::Cancelled`].
    pub fn rebuild_object_map(&self) -> Result<(), RbdError> {
        let what = || format!("rebuild the object map of {}", self.title());
        let image = self.clone();
        let patience =
            Patience { limit: self.patience().limit.max(LONGEST), cancel: self.patience().cancel.clone() };
        let code = patience.call(what, move || {
            let raw = image.raw();
            // SAFETY: the image is open; the callback uses none of its arguments.
            unsafe { sys::rbd_rebuild_object_map(raw, Some(no_progress), ptr::null_mut()) }
        })?;
        check(code, what).map(drop)
    }
}

//! Who has an image open for writing.

use std::ffi::{CStr, c_int};
use std::ptr;

use rbd2qcow2_sys as sys;
use rustix::io::Errno;
use sys::newer::{ImageWatcher, Watchers};
use sys::rbd_image_t;

/// The addresses of the clients that watch the image, but for the one of the number `own`; or librbd's
/// error.
pub(super) fn read(raw: rbd_image_t, own: u64, calls: Watchers) -> Result<Vec<String>, c_int> {
    let mut room = 16;
    loop {
        let mut list: Vec<_> =
            (0..room).map(|_| ImageWatcher { addr: ptr::null_mut(), id: 0, cookie: 0 }).collect();
        let mut count = room;
        // SAFETY: the caller's image is open, the list has `count` places.
        let code = unsafe { (calls.list)(raw, list.as_mut_ptr(), &mut count) };
        if code == -Errno::RANGE.raw_os_error() {
            // The list may grow between two calls.
            room = count.max(room) * 2;
            continue;
        }
        if code < 0 {
            return Err(code);
        }
        let others = list.iter().take(count).filter(|watcher| watcher.id.cast_unsigned() != own);
        let addresses = others.map(|watcher| {
            // SAFETY: librbd filled this place with a NUL-terminated address.
            let address = unsafe { CStr::from_ptr(watcher.addr) };
            address.to_string_lossy().into_owned()
        });
        let addresses = addresses.collect();
        // SAFETY: librbd filled the first `count` places, and nothing refers to them any more.
        unsafe { (calls.free)(list.as_mut_ptr(), count) };
        return Ok(addresses);
    }
}

//! Functions that librbd got after Jewel (10.2), looked up in the running process.
//!
//! Each getter gives the function, or `None` where the loaded librbd lacks it. The signatures are
//! those of `rbd/librbd.h`.

use std::ffi::{CStr, c_char, c_int};
use std::sync::OnceLock;

use libloading::os::unix::Library;
use rados_sys::rados_ioctx_t;

use crate::rbd_image_t;

/// `rbd_get_id`: the image's id. Since Luminous (12.2).
pub type GetId = unsafe extern "C" fn(image: rbd_image_t, id: *mut c_char, id_len: usize) -> c_int;

/// `rbd_namespace_exists`: whether a pool has an RBD namespace. Since Nautilus (14.2): a librbd
/// without it knows no namespaces.
pub type NamespaceExists =
    unsafe extern "C" fn(io: rados_ioctx_t, name: *const c_char, exists: *mut bool) -> c_int;

fn look_up<F: Copy>(name: &CStr) -> Option<F> {
    // SAFETY: `this` gives a handle to the running process and runs no initialiser; every caller
    // asks for the type that librbd.h declares for the name.
    let symbol = unsafe { Library::this().get::<F>(name.to_bytes_with_nul()) };
    symbol.ok().map(|found| *found)
}

/// [`GetId`], where the loaded librbd has it.
pub fn rbd_get_id() -> Option<GetId> {
    static FOUND: OnceLock<Option<GetId>> = OnceLock::new();
    *FOUND.get_or_init(|| look_up(c"rbd_get_id"))
}

/// [`NamespaceExists`], where the loaded librbd has it.
pub fn rbd_namespace_exists() -> Option<NamespaceExists> {
    static FOUND: OnceLock<Option<NamespaceExists>> = OnceLock::new();
    *FOUND.get_or_init(|| look_up(c"rbd_namespace_exists"))
}

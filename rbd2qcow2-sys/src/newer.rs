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

/// `rbd_linked_image_spec_t`. Declared here because the headers before Nautilus lack it.
#[repr(C)]
#[derive(Debug)]
pub struct LinkedImageSpec {
    pub pool_id: i64,
    pub pool_name: *mut c_char,
    pub pool_namespace: *mut c_char,
    pub image_id: *mut c_char,
    pub image_name: *mut c_char,
    pub trash: bool,
}

/// `rbd_snap_spec_t`. Declared here because the headers before Nautilus lack it.
#[repr(C)]
#[derive(Debug)]
pub struct SnapSpec {
    pub id: u64,
    pub namespace_type: c_int,
    pub name: *mut c_char,
}

/// `rbd_get_parent` and what frees its answer. Since Nautilus (14.2).
#[derive(Clone, Copy, Debug)]
pub struct GetParent {
    /// `rbd_get_parent`: -ENOENT for an image without a parent.
    pub get: unsafe extern "C" fn(rbd_image_t, *mut LinkedImageSpec, *mut SnapSpec) -> c_int,
    /// `rbd_linked_image_spec_cleanup`
    pub free_image: unsafe extern "C" fn(*mut LinkedImageSpec),
    /// `rbd_snap_spec_cleanup`
    pub free_snap: unsafe extern "C" fn(*mut SnapSpec),
}

/// What finds and removes snapshots in the trash of their image. Since Nautilus (14.2): a librbd
/// without it knows no such trash.
#[derive(Clone, Copy, Debug)]
pub struct SnapTrash {
    /// `rbd_snap_get_namespace_type`: [`SNAP_NAMESPACE_TRASH`](Self::SNAP_NAMESPACE_TRASH) for a
    /// snapshot in the trash.
    pub namespace_type: unsafe extern "C" fn(rbd_image_t, u64, *mut c_int) -> c_int,
    /// `rbd_snap_get_trash_namespace`: the name that the snapshot had.
    pub original_name: unsafe extern "C" fn(rbd_image_t, u64, *mut c_char, usize) -> c_int,
    /// `rbd_snap_remove_by_id`
    pub remove: unsafe extern "C" fn(rbd_image_t, u64) -> c_int,
}

impl SnapTrash {
    /// `RBD_SNAP_NAMESPACE_TYPE_TRASH`
    pub const SNAP_NAMESPACE_TRASH: c_int = 2;
}

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

/// [`GetParent`], where the loaded librbd has it.
pub fn rbd_get_parent() -> Option<GetParent> {
    static FOUND: OnceLock<Option<GetParent>> = OnceLock::new();
    *FOUND.get_or_init(|| {
        Some(GetParent {
            get: look_up(c"rbd_get_parent")?,
            free_image: look_up(c"rbd_linked_image_spec_cleanup")?,
            free_snap: look_up(c"rbd_snap_spec_cleanup")?,
        })
    })
}

/// [`SnapTrash`], where the loaded librbd has it.
pub fn rbd_snap_trash() -> Option<SnapTrash> {
    static FOUND: OnceLock<Option<SnapTrash>> = OnceLock::new();
    *FOUND.get_or_init(|| {
        Some(SnapTrash {
            namespace_type: look_up(c"rbd_snap_get_namespace_type")?,
            original_name: look_up(c"rbd_snap_get_trash_namespace")?,
            remove: look_up(c"rbd_snap_remove_by_id")?,
        })
    })
}

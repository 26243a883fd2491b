//! Functions that librbd and librados got after Jewel (10.2), looked up in the running process.
//!
//! Each getter gives the function, or `None` where the loaded librbd lacks it. The signatures are
//! those of `rbd/librbd.h`.

use std::ffi::{CStr, c_char, c_int};
use std::sync::OnceLock;

use libloading::os::unix::Library;
use rados_sys::rados_ioctx_t;

use crate::{rbd_completion_t, rbd_image_t};

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

/// What opens an image of which only the id is known, at a snapshot of which only the id is known: a parent
/// may be in the trash, and its snapshot, too. Since Mimic (13.2).
#[derive(Clone, Copy, Debug)]
pub struct OpenById {
    /// `rbd_open_by_id_read_only`
    pub open: unsafe extern "C" fn(rados_ioctx_t, *const c_char, *mut rbd_image_t, *const c_char) -> c_int,
    /// `rbd_snap_set_by_id`
    pub snap_set: unsafe extern "C" fn(rbd_image_t, u64) -> c_int,
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

/// `rbd_aio_write_zeroes`. Since Pacific (16.2).
pub type AioWriteZeroes = unsafe extern "C" fn(
    image: rbd_image_t,
    off: u64,
    len: usize,
    c: rbd_completion_t,
    zero_flags: c_int,
    op_flags: c_int,
) -> c_int;

/// `rbd_lock_acquire`. Since Luminous (12.2).
pub type LockAcquire = unsafe extern "C" fn(image: rbd_image_t, lock_mode: c_int) -> c_int;

/// `RBD_LOCK_MODE_EXCLUSIVE`
pub const LOCK_MODE_EXCLUSIVE: c_int = 0;

/// `rbd_image_watcher_t`. Declared here because the headers before Mimic lack it.
#[repr(C)]
#[derive(Debug)]
pub struct ImageWatcher {
    pub addr: *mut c_char,
    pub id: i64,
    pub cookie: u64,
}

/// What lists the clients that watch an image. Since Mimic (13.2).
#[derive(Clone, Copy, Debug)]
pub struct Watchers {
    /// `rbd_watchers_list`: -ERANGE, and the number needed, where there are more than there is room for.
    pub list: unsafe extern "C" fn(rbd_image_t, *mut ImageWatcher, *mut usize) -> c_int,
    /// `rbd_watchers_list_cleanup`
    pub free: unsafe extern "C" fn(*mut ImageWatcher, usize),
}

/// `rados_set_pool_full_try`: writes to a full pool fail instead of waiting. Since Octopus (15.2).
pub type SetPoolFullTry = unsafe extern "C" fn(io: rados_ioctx_t);

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

/// [`OpenById`], where the loaded librbd has it.
pub fn rbd_open_by_id() -> Option<OpenById> {
    static FOUND: OnceLock<Option<OpenById>> = OnceLock::new();
    *FOUND.get_or_init(|| {
        Some(OpenById {
            open: look_up(c"rbd_open_by_id_read_only")?,
            snap_set: look_up(c"rbd_snap_set_by_id")?,
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

/// [`AioWriteZeroes`], where the loaded librbd has it.
pub fn rbd_aio_write_zeroes() -> Option<AioWriteZeroes> {
    static FOUND: OnceLock<Option<AioWriteZeroes>> = OnceLock::new();
    *FOUND.get_or_init(|| look_up(c"rbd_aio_write_zeroes"))
}

/// [`LockAcquire`], where the loaded librbd has it.
pub fn rbd_lock_acquire() -> Option<LockAcquire> {
    static FOUND: OnceLock<Option<LockAcquire>> = OnceLock::new();
    *FOUND.get_or_init(|| look_up(c"rbd_lock_acquire"))
}

/// [`Watchers`], where the loaded librbd has it.
pub fn rbd_watchers() -> Option<Watchers> {
    static FOUND: OnceLock<Option<Watchers>> = OnceLock::new();
    *FOUND.get_or_init(|| {
        Some(Watchers { list: look_up(c"rbd_watchers_list")?, free: look_up(c"rbd_watchers_list_cleanup")? })
    })
}

/// [`SetPoolFullTry`], where the loaded librados has it.
pub fn rados_set_pool_full_try() -> Option<SetPoolFullTry> {
    static FOUND: OnceLock<Option<SetPoolFullTry>> = OnceLock::new();
    *FOUND.get_or_init(|| look_up(c"rados_set_pool_full_try"))
}

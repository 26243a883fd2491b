//! Making an image, and changing what is not its data.

use std::ffi::c_int;
use std::ptr;

use rbd2qcow2_sys as sys;
use rustix::io::Errno;
use sys::rbd_image_options_t;

use super::cluster::{Pool, c_string};
use super::error::{RbdError, check};
use super::features::Features;
use super::image::Image;

/// What a new image is to be. What is `None` is as Ceph's configuration says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewImage {
    /// Size in bytes.
    pub size: u64,
    /// Size of the RADOS objects in bytes, a power of two from 4 KiB to 32 MiB.
    pub object_size: Option<u64>,
    /// Bytes in a row in one object, and objects over which rows are spread.
    pub striping: Option<(u64, u64)>,
    /// The features that the image is to have. The one for striping is chosen by librbd's rules: it must
    /// be there where `striping` is not one object after the other.
    pub features: Option<Features>,
    /// The pool for the image's data, where that is another one.
    pub data_pool: Option<String>,
}

/// librbd's list of options.
struct Options(rbd_image_options_t);

// SAFETY: the list is not bound to a thread, and has one user at a time.
unsafe impl Send for Options {}

impl Drop for Options {
    fn drop(&mut self) {
        // SAFETY: made by rbd_image_options_create, used no more.
        unsafe { sys::rbd_image_options_destroy(self.0) };
    }
}

impl Options {
    fn new(image: &NewImage, what: impl Fn() -> String) -> Result<Self, RbdError> {
        let mut raw: rbd_image_options_t = ptr::null_mut();
        // SAFETY: `raw` is where the list goes.
        unsafe { sys::rbd_image_options_create(&mut raw) };
        let options = Self(raw);
        let numbers = [
            (sys::RBD_IMAGE_OPTION_FORMAT, Some(2)),
            (sys::RBD_IMAGE_OPTION_FEATURES, image.features.map(|features| features.0)),
            (sys::RBD_IMAGE_OPTION_ORDER, image.object_size.map(|size| size.ilog2().into())),
            (sys::RBD_IMAGE_OPTION_STRIPE_UNIT, image.striping.map(|(unit, _)| unit)),
            (sys::RBD_IMAGE_OPTION_STRIPE_COUNT, image.striping.map(|(_, count)| count)),
        ];
        for (option, value) in numbers {
            let Some(value) = value else { continue };
            let option = c_int::try_from(option).expect("a small number");
            // SAFETY: the list is there.
            let code = unsafe { sys::rbd_image_options_set_uint64(raw, option, value) };
            check(code, &what)?;
        }
        if let Some(pool) = &image.data_pool {
            let pool = c_string(pool, &what)?;
            let option = c_int::try_from(sys::RBD_IMAGE_OPTION_DATA_POOL).expect("a small number");
            // SAFETY: the list is there; librbd copies the name.
            let code = unsafe { sys::rbd_image_options_set_string(raw, option, pool.as_ptr()) };
            check(code, &what)?;
        }
        Ok(options)
    }
}

impl Pool {
    /// Creates an image, all zeroes. Blocks.
    ///
    /// # Errors
    /// [`RbdError::Failed`]: there is one of that name, a combination that librbd does not accept
    /// (`EINVAL`), or a feature that it or the cluster does not know (`ENOSYS`). After
    /// [`RbdError::NoAnswer`] and [`RbdError::Cancelled`] the image may exist, or come to exist.
    pub fn create_image(&self, name: &str, image: &NewImage) -> Result<(), RbdError> {
        let what = || format!("create image {name:?}");
        let c_name = c_string(name, what)?;
        let options = Options::new(image, what)?;
        let (pool, size) = (self.clone(), image.size);
        let code = self.patience().call(what, move || {
            let options = options;
            // SAFETY: the pool is open, the name and the options live through the call.
            unsafe { sys::rbd_create4(pool.raw(), c_name.as_ptr(), size, options.0) }
        })?;
        check(code, what).map(drop)
    }

    /// Opens an image for writing. A client that holds its exclusive lock, and shares it, is asked for
    /// it at the first write. Blocks.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_for_writing(&self, image: &str) -> Result<Image, RbdError> {
        self.open_for_change(image)
    }

    /// Has writes to images that are opened from now on fail with `EDQUOT` or `ENOSPC` where the pool is
    /// full. Otherwise they wait until there is space. Does nothing before Octopus (15.2).
    pub fn fail_when_full(&self) {
        if let Some(set) = sys::newer::rados_set_pool_full_try() {
            // SAFETY: the I/O context is open.
            unsafe { set(self.raw()) };
        }
    }
}

impl Image {
    /// Changes the size, in bytes. What lies behind a smaller one is removed. Blocks.
    ///
    /// # Errors
    /// [`RbdError::Failed`], [`RbdError::NoAnswer`] and [`RbdError::Cancelled`]: the size may have been
    /// changed.
    pub fn resize(&self, size: u64) -> Result<(), RbdError> {
        let what = || format!("resize {} to {size} bytes", self.title());
        // SAFETY: the image is open.
        let code = self.call(what, move |raw| unsafe { sys::rbd_resize(raw, size) })?;
        check(code, what).map(drop)
    }

    /// Sets a metadata key. Blocks.
    ///
    /// # Errors
    /// [`RbdError::Failed`], [`RbdError::NulByte`], [`RbdError::NoAnswer`], [`RbdError::Cancelled`].
    pub fn set_metadata(&self, key: &[u8], value: &[u8]) -> Result<(), RbdError> {
        let what = || format!("set the metadata key {:?} of {}", String::from_utf8_lossy(key), self.title());
        let [key, value] = [bytes(key, what)?, bytes(value, what)?];
        let code = self.call(what, move |raw| {
            // SAFETY: the image is open, the strings live through the call.
            unsafe { sys::rbd_metadata_set(raw, key.as_ptr(), value.as_ptr()) }
        })?;
        check(code, what).map(drop)
    }

    /// Removes a metadata key; that there is none is a success. Blocks.
    ///
    /// # Errors
    /// As [`set_metadata`](Self::set_metadata).
    pub fn remove_metadata(&self, key: &[u8]) -> Result<(), RbdError> {
        let what =
            || format!("remove the metadata key {:?} of {}", String::from_utf8_lossy(key), self.title());
        let key = bytes(key, what)?;
        let code = self.call(what, move |raw| {
            // SAFETY: the image is open, the key lives through the call.
            unsafe { sys::rbd_metadata_remove(raw, key.as_ptr()) }
        })?;
        if code == -Errno::NOENT.raw_os_error() {
            return Ok(());
        }
        check(code, what).map(drop)
    }

    /// The addresses of the other clients that have the image open for writing; `None` where librbd
    /// cannot tell (before Mimic, 13.2). A client that died counts for up to 30 s. Blocks.
    ///
    /// # Errors
    /// [`RbdError::Failed`], [`RbdError::NoAnswer`], [`RbdError::Cancelled`].
    pub fn other_watchers(&self) -> Result<Option<Vec<String>>, RbdError> {
        let Some(calls) = sys::newer::rbd_watchers() else { return Ok(None) };
        let what = || format!("list the clients that use {}", self.title());
        let own = self.pool().cluster().instance_id();
        let found = self.call(what, move |raw| super::watchers::read(raw, own, calls))?;
        found.map(Some).map_err(|code| RbdError::failed(what(), code))
    }

    /// Takes the exclusive lock, for as long as the image is open: no other client can write meanwhile.
    /// The image must be open for writing, and have the feature. Never to be done to an image that a
    /// virtual machine may have open: its writes would fail. Does nothing before Luminous (12.2).
    /// Blocks; up to 30 s where the last holder died.
    ///
    /// # Errors
    /// [`RbdError::Failed`]: another client holds it (`EROFS` or `EBUSY`), [`RbdError::NoAnswer`],
    /// [`RbdError::Cancelled`].
    pub fn lock_exclusively(&self) -> Result<(), RbdError> {
        let Some(acquire) = sys::newer::rbd_lock_acquire() else { return Ok(()) };
        let what = || format!("take the exclusive lock of {}", self.title());
        // SAFETY: the image is open.
        let code = self.call(what, move |raw| unsafe { acquire(raw, sys::newer::LOCK_MODE_EXCLUSIVE) })?;
        check(code, what).map(drop)
    }
}

fn bytes(text: &[u8], what: impl FnOnce() -> String) -> Result<std::ffi::CString, RbdError> {
    std::ffi::CString::new(text).map_err(|_| RbdError::NulByte { what: what() })
}

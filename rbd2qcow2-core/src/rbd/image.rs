//! An open image, at its head or at one of its snapshots.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use rbd2qcow2_sys as sys;
use rustix::io::Errno;
use sys::newer::{GetParent, LinkedImageSpec, SnapSpec};
use sys::rbd_image_t;

use super::cluster::{Pool, bytes_of, c_string, split_nul, string_of, utf8};
use super::error::{RbdError, check};
use super::features::Features;
use super::patience::{Patience, teardown};

/// A snapshot of an image, as the image lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Never used twice in a pool: tells a snapshot from one made later under its name.
    pub id: u64,
    /// The image's size when it was made, in bytes.
    pub size: u64,
    /// Its name; bytes that are not UTF-8 are replaced.
    pub name: String,
}

/// What a clone shows where it holds nothing itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    /// The parent's pool.
    pub pool: String,
    /// Its namespace; empty for the default one.
    pub namespace: String,
    /// The parent image.
    pub image: String,
    /// The id of that image, where librbd tells.
    pub image_id: Option<String>,
    /// The parent's snapshot.
    pub snapshot: String,
    /// The id of that snapshot, where librbd tells.
    pub snapshot_id: Option<u64>,
}

/// The properties of an image at the handle's snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageInfo {
    /// The image's id: unlike its name never used again.
    pub id: String,
    /// Size in bytes.
    pub size: u64,
    /// Size of the RADOS objects in bytes, a power of two.
    pub object_size: u64,
    /// Bytes in a row in one object.
    pub stripe_unit: u64,
    /// Objects over which rows are spread; 1 without striping.
    pub stripe_count: u64,
    /// What it can do.
    pub features: Features,
    /// Bytes from the start that fall through to the parent where the image holds nothing.
    pub overlap: u64,
    /// Whether the object map may be asked which objects exist.
    pub object_map_valid: bool,
}

/// An image, open at its head or at a snapshot. Clones share the handle; the last one closes it.
///
/// Usable from several threads at once.
#[derive(Clone, Debug)]
pub struct Image(Arc<ImageHandle>);

#[derive(Debug)]
struct ImageHandle {
    raw: RawImage,
    /// Destroyed only after the image is closed; never, when that does not happen.
    pool: Pool,
    /// For messages: `image "vm" at snapshot "s"`.
    title: String,
    /// Whether this client watches the image, and so uses it until the handle is closed.
    access: Access,
    /// The requests that librbd has not answered: closing would wait for them.
    requests: Arc<Requests>,
    /// Set when a request was abandoned.
    abandoned: AtomicBool,
}

/// How many requests are under way.
#[derive(Debug, Default)]
pub(super) struct Requests {
    count: Mutex<usize>,
    answered: Condvar,
}

impl Requests {
    pub(super) fn begin(&self) {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
    }

    pub(super) fn end(&self) {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.answered.notify_all();
    }

    /// Waits until all are answered, and tells whether they are.
    pub(super) fn settle(&self, limit: Duration) -> bool {
        let count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.answered.wait_timeout_while(count, limit, |count| *count > 0);
        *waited.unwrap_or_else(PoisonError::into_inner).0 == 0
    }
}

/// How long requests that were given up are waited for where the image is open for writing. A handle
/// that is never closed keeps the image in use for another 30 s.
const SETTLE_LIMIT: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug)]
struct RawImage(rbd_image_t);

// SAFETY: librbd serialises access to an image by its own locks; QEMU and others use one handle from
// many threads. No handle is bound to a thread.
unsafe impl Send for RawImage {}
// SAFETY: as above.
unsafe impl Sync for RawImage {}

impl Drop for ImageHandle {
    fn drop(&mut self) {
        let limit = if self.access == Access::Write { SETTLE_LIMIT } else { Duration::ZERO };
        if self.abandoned.load(Ordering::Acquire) && !self.requests.settle(limit) {
            // The open image and its request use the connection: it must not be shut down either.
            std::mem::forget(self.pool.clone());
            return;
        }
        let (raw, pool) = (self.raw, self.pool.clone());
        teardown(&format!("close {}", self.title), move || {
            let RawImage(raw) = { raw };
            // SAFETY: the image is open, this was its last user, and no request is under way.
            let code = unsafe { sys::rbd_close(raw) };
            if code < 0 {
                log::warn!("closing an image failed: {}", std::io::Error::from_raw_os_error(-code));
            }
            drop(pool);
        });
    }
}

/// What an image is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    /// No watch, no lock: a running virtual machine does not notice.
    Read,
    /// For what changes the image's header. A lock that a client holds stays with it: librbd asks
    /// the holder to do the work.
    Write,
}

impl Pool {
    /// Opens an image for reading, at its head or at a snapshot.
    ///
    /// # Errors
    /// [`RbdError::Failed`] when there is no such image or snapshot, or it may not be read;
    /// [`RbdError::NoAnswer`], [`RbdError::Cancelled`].
    pub fn open(&self, image: &str, snapshot: Option<&str>) -> Result<Image, RbdError> {
        self.open_for(Access::Read, image, snapshot)
    }

    /// Opens an image for what changes its header.
    pub(super) fn open_for_change(&self, image: &str) -> Result<Image, RbdError> {
        self.open_for(Access::Write, image, None)
    }

    fn open_for(&self, access: Access, image: &str, snapshot: Option<&str>) -> Result<Image, RbdError> {
        let title = match snapshot {
            Some(snapshot) => format!("image {image:?} at snapshot {snapshot:?}"),
            None => format!("image {image:?}"),
        };
        let what = || format!("open {title}");
        let name = c_string(image, what)?;
        let at = snapshot.map(|snapshot| c_string(snapshot, what)).transpose()?;
        self.open_with(access, &title, move |pool, raw| {
            let at = at.as_ref().map_or(ptr::null(), |at| at.as_ptr());
            let open = match access {
                Access::Read => sys::rbd_open_read_only,
                Access::Write => sys::rbd_open,
            };
            // SAFETY: the pool is open; the strings live through the call.
            unsafe { open(pool.raw(), name.as_ptr(), raw, at) }
        })
    }

    /// Opens the image that a clone names as its parent, for reading, at the snapshot that it names. Blocks.
    ///
    /// By their ids where librbd can do that: both may be in the trash, and have other names there.
    ///
    /// # Errors
    /// Those of [`open`](Self::open).
    pub(super) fn open_parent(&self, parent: &Parent) -> Result<Image, RbdError> {
        let by_id = sys::newer::rbd_open_by_id().zip(parent.image_id.as_ref()).zip(parent.snapshot_id);
        let Some(((calls, id), snapshot_id)) = by_id else {
            return self.open(&parent.image, Some(&parent.snapshot));
        };
        let title = format!("parent image {:?} (id {id}) at snapshot {:?}", parent.image, parent.snapshot);
        let what = || format!("open {title}");
        let id = c_string(id, what)?;
        let image = self.open_with(Access::Read, &title, move |pool, raw| {
            // SAFETY: the pool is open; the string lives through the call; null stands for the head.
            unsafe { (calls.open)(pool.raw(), id.as_ptr(), raw, ptr::null()) }
        })?;
        // SAFETY: the image is open.
        let code = image.call(what, move |raw| unsafe { (calls.snap_set)(raw, snapshot_id) })?;
        check(code, what)?;
        Ok(image)
    }

    /// Has `open` put an open image into the place that it is given.
    fn open_with(
        &self,
        access: Access,
        title: &str,
        open: impl FnOnce(&Self, &mut rbd_image_t) -> i32 + Send + 'static,
    ) -> Result<Image, RbdError> {
        let what = || format!("open {title}");
        let (pool, title) = (self.clone(), title.to_owned());
        let opened = self.patience().call(what, move || {
            let mut raw: rbd_image_t = ptr::null_mut();
            let code = open(&pool, &mut raw);
            if code < 0 {
                return Err(code);
            }
            Ok(Image(Arc::new(ImageHandle {
                raw: RawImage(raw),
                pool,
                title,
                access,
                requests: Arc::default(),
                abandoned: AtomicBool::new(false),
            })))
        })?;
        opened.map_err(|code| RbdError::failed(what(), code))
    }

    /// Takes a snapshot of an image. Blocks until the cluster has it; a client that holds the
    /// image's exclusive lock is asked to take it, and goes on writing.
    ///
    /// # Errors
    /// [`RbdError::Failed`], also when there is a snapshot of that name. After
    /// [`RbdError::NoAnswer`] and [`RbdError::Cancelled`] the snapshot may exist, or come to exist.
    pub fn create_snapshot(&self, image: &str, snapshot: &str) -> Result<(), RbdError> {
        let what = || format!("create snapshot {snapshot:?} of image {image:?}");
        let handle = self.open_for_change(image)?;
        let name = c_string(snapshot, what)?;
        let code = handle.call(what, move |raw| {
            // SAFETY: the image is open, the name lives through the call.
            unsafe { sys::rbd_snap_create(raw, name.as_ptr()) }
        })?;
        check(code, what).map(drop)
    }

    /// Removes a snapshot; that there is none is a success.
    ///
    /// # Errors
    /// [`RbdError::Failed`], for a snapshot that is protected for instance. After
    /// [`RbdError::NoAnswer`] and [`RbdError::Cancelled`] it may be gone, or come to be.
    pub fn remove_snapshot(&self, image: &str, snapshot: &str) -> Result<(), RbdError> {
        let what = || format!("remove snapshot {snapshot:?} of image {image:?}");
        let handle = self.open_for_change(image)?;
        let name = c_string(snapshot, what)?;
        let code = handle.call(what, move |raw| {
            // SAFETY: the image is open, the name lives through the call.
            unsafe { sys::rbd_snap_remove(raw, name.as_ptr()) }
        })?;
        if code == -Errno::NOENT.raw_os_error() {
            return Ok(());
        }
        check(code, what).map(drop)
    }
}

impl Image {
    /// How messages name the image.
    pub(super) fn title(&self) -> &str {
        &self.0.title
    }

    /// The pool that the image is in.
    #[must_use]
    pub fn pool(&self) -> &Pool {
        &self.0.pool
    }

    /// How long calls on this image may take.
    pub(super) fn patience(&self) -> &Patience {
        self.0.pool.patience()
    }

    pub(super) fn raw(&self) -> rbd_image_t {
        self.0.raw.0
    }

    /// The requests under way on this handle.
    pub(super) fn requests(&self) -> &Arc<Requests> {
        &self.0.requests
    }

    /// Tells that nobody waits for a request any more: the handle is left open for good, unless all
    /// requests are answered soon after its last use.
    pub(super) fn abandon(&self) {
        self.0.abandoned.store(true, Ordering::Release);
    }

    /// Runs `call` on the raw handle, which stays open until it is done, however long that takes.
    pub(super) fn call<T: Send + 'static>(
        &self,
        what: impl Fn() -> String,
        call: impl FnOnce(rbd_image_t) -> T + Send + 'static,
    ) -> Result<T, RbdError> {
        let image = self.clone();
        self.patience().call(what, move || call(image.raw()))
    }

    /// The image's properties at this handle's snapshot. Blocks.
    ///
    /// # Errors
    /// [`RbdError::Failed`], [`RbdError::NotUtf8`], [`RbdError::NoAnswer`], [`RbdError::Cancelled`].
    pub fn info(&self) -> Result<ImageInfo, RbdError> {
        let what = || format!("ask for the properties of {}", self.title());
        let title = what();
        self.call(what, move |raw| read_info(raw, &title))?
    }

    /// The image's snapshots, in the order of their ids. Blocks.
    ///
    /// # Errors
    /// [`RbdError::Failed`], [`RbdError::NoAnswer`], [`RbdError::Cancelled`].
    pub fn snapshots(&self) -> Result<Vec<Snapshot>, RbdError> {
        let what = || format!("list the snapshots of {}", self.title());
        let title = what();
        let mut snapshots = self.call(what, move |raw| read_snapshots(raw, &title))??;
        snapshots.sort_by_key(|snapshot| snapshot.id);
        Ok(snapshots)
    }

    /// The image's metadata: pairs of bytes that its users chose. Blocks.
    ///
    /// # Errors
    /// [`RbdError::Failed`], [`RbdError::NoAnswer`], [`RbdError::Cancelled`].
    pub fn metadata(&self) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, RbdError> {
        let what = || format!("list the metadata of {}", self.title());
        let title = what();
        self.call(what, move |raw| read_metadata(raw, &title))?
    }

    /// The clone's parent; `None` for an image that is no clone. Blocks.
    ///
    /// # Errors
    /// [`RbdError::Failed`], [`RbdError::NotUtf8`], [`RbdError::NoAnswer`], [`RbdError::Cancelled`].
    pub fn parent(&self) -> Result<Option<Parent>, RbdError> {
        let what = || format!("ask for the parent of {}", self.title());
        let title = what();
        self.call(what, move |raw| read_parent(raw, &title))?
    }
}

/// One of librbd's getters of a number.
type GetNumber = unsafe extern "C" fn(rbd_image_t, *mut u64) -> i32;

fn number(raw: rbd_image_t, what: &str, get: GetNumber) -> Result<u64, RbdError> {
    let mut value = 0;
    // SAFETY: the caller's image is open.
    let code = unsafe { get(raw, &mut value) };
    check(code, || what.to_owned()).map(|_| value)
}

fn read_info(raw: rbd_image_t, what: &str) -> Result<ImageInfo, RbdError> {
    let mut stat = MaybeUninit::<sys::rbd_image_info_t>::zeroed();
    // SAFETY: the caller's image is open, `stat` has the size that is told.
    let code = unsafe { sys::rbd_stat(raw, stat.as_mut_ptr(), size_of::<sys::rbd_image_info_t>()) };
    check(code, || what.to_owned())?;
    // SAFETY: all-zero bytes are a value of this struct of integers.
    let stat = unsafe { stat.assume_init() };
    let features = number(raw, what, sys::rbd_get_features)?;
    let flags = number(raw, what, sys::rbd_get_flags)?;
    let invalid = u64::from(sys::RBD_FLAG_OBJECT_MAP_INVALID | sys::RBD_FLAG_FAST_DIFF_INVALID);
    let needed = u64::from(sys::RBD_FEATURE_OBJECT_MAP | sys::RBD_FEATURE_FAST_DIFF);
    Ok(ImageInfo {
        id: image_id(raw, &stat, what)?,
        size: stat.size,
        object_size: stat.obj_size,
        stripe_unit: number(raw, what, sys::rbd_get_stripe_unit)?,
        stripe_count: number(raw, what, sys::rbd_get_stripe_count)?,
        features: Features(features),
        overlap: number(raw, what, sys::rbd_get_overlap)?,
        object_map_valid: features & needed == needed && flags & invalid == 0,
    })
}

/// The image's id; before Luminous the part of its objects' names that is made of it.
fn image_id(raw: rbd_image_t, stat: &sys::rbd_image_info_t, what: &str) -> Result<String, RbdError> {
    if let Some(get_id) = sys::newer::rbd_get_id() {
        // SAFETY: the caller's image is open, the buffer has `length` bytes.
        return string_of(|| what.to_owned(), |buffer, length| unsafe { get_id(raw, buffer, length) });
    }
    let prefix: Vec<u8> =
        stat.block_name_prefix.iter().map(|c| c.cast_unsigned()).take_while(|c| *c != 0).collect();
    let prefix = utf8(&prefix, || what.to_owned())?;
    Ok(prefix.strip_prefix("rbd_data.").unwrap_or(&prefix).to_owned())
}

fn read_snapshots(raw: rbd_image_t, what: &str) -> Result<Vec<Snapshot>, RbdError> {
    let mut room = 64_i32;
    loop {
        let blank = sys::rbd_snap_info_t { id: 0, size: 0, name: ptr::null() };
        let mut list = vec![blank; usize::try_from(room).unwrap_or(0)];
        let mut count = room;
        // SAFETY: the caller's image is open, the list has `count` places.
        let code = unsafe { sys::rbd_snap_list(raw, list.as_mut_ptr(), &mut count) };
        if code == -Errno::RANGE.raw_os_error() {
            // The list may grow between two calls.
            room = count.max(room) * 2;
            continue;
        }
        let count = usize::try_from(check(code, || what.to_owned())?).unwrap_or(0);
        let snapshots = list.iter().take(count).map(|snapshot| {
            // SAFETY: librbd filled this place with a NUL-terminated name.
            let name = unsafe { CStr::from_ptr(snapshot.name) };
            // Only somebody else's name is not UTF-8: it is looked at, never used.
            let name = name.to_string_lossy().into_owned();
            Snapshot { id: snapshot.id, size: snapshot.size, name }
        });
        let snapshots = snapshots.collect();
        // SAFETY: the list came from rbd_snap_list, and its end is marked by a null name.
        unsafe { sys::rbd_snap_list_end(list.as_mut_ptr()) };
        return Ok(snapshots);
    }
}

fn read_metadata(raw: rbd_image_t, what: &str) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, RbdError> {
    let mut values = vec![0_u8; 64 << 10];
    let mut values_length = 0;
    let keys = bytes_of(
        || what.to_owned(),
        |keys, keys_length| {
            values_length = values.len();
            // SAFETY: the caller's image is open, the buffers have the lengths that are told; a
            // maximum of 0 means all.
            let code = unsafe {
                sys::rbd_metadata_list(
                    raw,
                    c"".as_ptr(),
                    0,
                    keys,
                    keys_length,
                    values.as_mut_ptr().cast::<c_char>(),
                    &mut values_length,
                )
            };
            if values_length > values.len() {
                // -ERANGE on behalf of the values: the next round has room for them.
                values.resize(values_length * 2, 0);
            }
            code
        },
    )?;
    let keys: Vec<_> = split_nul(&keys).map(<[u8]>::to_vec).collect();
    let mut values: Vec<_> = split_nul(&values[..values_length]).map(<[u8]>::to_vec).collect();
    if keys.len() != values.len() {
        log::warn!(
            "{what}: some hold NUL bytes, so that values and keys cannot be told apart; only keys are taken"
        );
        values = vec![Vec::new(); keys.len()];
    }
    Ok(keys.into_iter().zip(values).collect())
}

fn read_parent(raw: rbd_image_t, what: &str) -> Result<Option<Parent>, RbdError> {
    let found = match sys::newer::rbd_get_parent() {
        Some(calls) => read_parent_spec(raw, what, calls),
        None => read_parent_names(raw, what),
    };
    match found {
        Err(error) if error.is_not_found() => Ok(None),
        found => found.map(Some),
    }
}

fn read_parent_spec(raw: rbd_image_t, what: &str, calls: GetParent) -> Result<Parent, RbdError> {
    let mut image = LinkedImageSpec {
        pool_id: 0,
        pool_name: ptr::null_mut(),
        pool_namespace: ptr::null_mut(),
        image_id: ptr::null_mut(),
        image_name: ptr::null_mut(),
        trash: false,
    };
    let mut snap = SnapSpec { id: 0, namespace_type: 0, name: ptr::null_mut() };
    // SAFETY: the caller's image is open, both structs are librbd's.
    let code = unsafe { (calls.get)(raw, &mut image, &mut snap) };
    check(code, || what.to_owned())?;
    let text = |name: *mut c_char| {
        if name.is_null() {
            return Ok(String::new());
        }
        // SAFETY: librbd filled the field with a NUL-terminated string.
        let name = unsafe { CStr::from_ptr(name) };
        utf8(name.to_bytes(), || what.to_owned())
    };
    let parent = (|| {
        Ok(Parent {
            pool: text(image.pool_name)?,
            namespace: text(image.pool_namespace)?,
            image: text(image.image_name)?,
            image_id: Some(text(image.image_id)?),
            snapshot: text(snap.name)?,
            snapshot_id: Some(snap.id),
        })
    })();
    // SAFETY: librbd filled the struct, and nothing refers to it any more.
    unsafe { (calls.free_image)(&mut image) };
    // SAFETY: as above.
    unsafe { (calls.free_snap)(&mut snap) };
    parent
}

/// What librbd before Nautilus tells: no namespaces, no ids.
fn read_parent_names(raw: rbd_image_t, what: &str) -> Result<Parent, RbdError> {
    const ROOM: usize = 4096;
    let mut names = [[0_u8; ROOM]; 3];
    let [pool, image, snapshot] = &mut names;
    // SAFETY: the caller's image is open, each buffer has the length that is told.
    let code = unsafe {
        sys::rbd_get_parent_info(
            raw,
            pool.as_mut_ptr().cast(),
            ROOM,
            image.as_mut_ptr().cast(),
            ROOM,
            snapshot.as_mut_ptr().cast(),
            ROOM,
        )
    };
    check(code, || what.to_owned())?;
    let text = |buffer: &[u8]| {
        let end = buffer.iter().position(|byte| *byte == 0).unwrap_or(buffer.len());
        utf8(&buffer[..end], || what.to_owned())
    };
    Ok(Parent {
        pool: text(pool)?,
        namespace: String::new(),
        image: text(image)?,
        image_id: None,
        snapshot: text(snapshot)?,
        snapshot_id: None,
    })
}

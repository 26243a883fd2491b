//! Snapshots on their way out.
//!
//! librbd removes a snapshot in steps, of which the first moves it to its image's trash, under a name
//! that nobody chose. A client that dies after that step leaves it there for good. Where a clone
//! still needs a removed snapshot, librbd leaves it there on purpose, until the clone is gone.

use rbd2qcow2_sys as sys;
use rustix::io::Errno;
use sys::newer::SnapTrash;
use sys::rbd_image_t;

use super::cluster::{Pool, string_of};
use super::error::{RbdError, check};
use super::image::{Image, Snapshot};

impl Image {
    /// The snapshots in the image's trash, under the names that they had. Blocks.
    ///
    /// # Errors
    /// [`RbdError::Failed`], [`RbdError::NotUtf8`], [`RbdError::NoAnswer`], [`RbdError::Cancelled`].
    pub fn trashed_snapshots(&self) -> Result<Vec<Snapshot>, RbdError> {
        let Some(calls) = sys::newer::rbd_snap_trash() else { return Ok(Vec::new()) };
        let what = || format!("look into the trash of snapshots of {}", self.title());
        let title = what();
        let snapshots = self.snapshots()?;
        self.call(what, move |raw| {
            let found = snapshots.into_iter().map(|snapshot| trashed(raw, calls, snapshot, &title));
            found.filter_map(Result::transpose).collect()
        })?
    }
}

/// The snapshot under its old name, if it is in the trash.
fn trashed(
    raw: rbd_image_t,
    calls: SnapTrash,
    snapshot: Snapshot,
    what: &str,
) -> Result<Option<Snapshot>, RbdError> {
    let mut kind = 0;
    // SAFETY: the caller's image is open.
    let code = unsafe { (calls.namespace_type)(raw, snapshot.id, &mut kind) };
    if code == -Errno::NOENT.raw_os_error() {
        // Somebody else has removed it since it was listed.
        return Ok(None);
    }
    check(code, || what.to_owned())?;
    if kind != SnapTrash::SNAP_NAMESPACE_TRASH {
        return Ok(None);
    }
    let name = string_of(
        || what.to_owned(),
        // SAFETY: the caller's image is open, the buffer has `length` bytes.
        |buffer, length| unsafe { (calls.original_name)(raw, snapshot.id, buffer, length) },
    );
    match name {
        Ok(name) => Ok(Some(Snapshot { name, ..snapshot })),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

impl Pool {
    /// Removes a snapshot that is in the trash of its image; that it is gone is a success.
    ///
    /// # Errors
    /// [`RbdError::Failed`], when a clone still needs it for instance; [`RbdError::TooOld`],
    /// [`RbdError::NoAnswer`], [`RbdError::Cancelled`].
    pub fn remove_trashed_snapshot(&self, image: &str, snapshot: &Snapshot) -> Result<(), RbdError> {
        let what = || format!("remove snapshot {:?} from the trash of image {image:?}", snapshot.name);
        let calls = sys::newer::rbd_snap_trash()
            .ok_or_else(|| RbdError::TooOld { what: what(), since: "Nautilus (14.2)" })?;
        let handle = self.open_for_change(image)?;
        let id = snapshot.id;
        // SAFETY: the image is open.
        let code = handle.call(what, move |raw| unsafe { (calls.remove)(raw, id) })?;
        if code == -Errno::NOENT.raw_os_error() {
            return Ok(());
        }
        check(code, what).map(drop)
    }
}

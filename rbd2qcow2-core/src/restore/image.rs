//! Restoring into an RBD image.
//!
//! A new image is made as the old one was, and filled. Of an image that exists only what differs is
//! written: see [`block`](super::block).
//!
//! From before the first change until the last write is flushed the image carries a mark in its
//! metadata, [`INCOMPLETE_KEY`]. An image with that mark is never backed up, and restoring the same point
//! again finishes it.

use std::fmt;
use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;

use super::block::BlockTarget;
use super::{Restore, RestoreError, RestoreReport, Run};
use crate::cancel::Cancel;
use crate::layer::block::BlockImage;
use crate::point::OpenPoint;
use crate::progress::Observer;
use crate::rbd::{Cluster, ClusterOptions, Features, Image, Patience, Pool, RbdError};
use crate::source::librbd::{Distrust, LibrbdSource};
use crate::source::{BoxError, RbdDiffSource, SourceError};

mod error;
mod layout;
mod marker;
mod open;

pub use error::ImageError;
pub use layout::Overrides;
pub use marker::{INCOMPLETE_KEY, describe_incomplete};
use open::Opened;

/// The RBD image that a point is restored to.
#[derive(Clone, Debug)]
pub struct ImageTarget {
    /// How to reach the cluster.
    pub cluster: ClusterOptions,
    /// The pool.
    pub pool: String,
    /// The namespace within the pool; empty for the default one.
    pub namespace: String,
    /// The image's name.
    pub image: String,
    /// Whether an image that exists is made what the point is.
    pub overwrite: bool,
    /// How a new image differs from the one that was backed up.
    pub overrides: Overrides,
    /// The longest that one answer of the cluster is waited for.
    pub patience: Duration,
}

/// `POOL[/NAMESPACE]/IMAGE`.
impl fmt::Display for ImageTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pool, namespace, image, .. } = self;
        if namespace.is_empty() {
            write!(f, "{pool}/{image}")
        } else {
            write!(f, "{pool}/{namespace}/{image}")
        }
    }
}

impl BlockImage for Image {
    fn write(&self, offset: u64, data: Bytes) -> Result<(), BoxError> {
        Ok(self.write(offset, data)?)
    }

    fn write_zeroes(&self, range: Range<u64>) -> Result<(), BoxError> {
        Ok(self.write_zeroes(range)?)
    }

    fn flush(&self) -> Result<(), BoxError> {
        Ok(self.flush()?)
    }
}

impl Restore {
    /// Restores the point to an RBD image. Blocks until everything is on stable storage in the cluster.
    ///
    /// A new image gets the size, object size, striping, features and metadata that the backed up one
    /// had, but for `target`'s overrides; features that the cluster does not know are left out with a
    /// warning, and a clone becomes an image that stands alone. Without a manifest (points of the Python
    /// tool) all but the size is as Ceph's configuration says.
    ///
    /// An image that exists is only changed with [`ImageTarget::overwrite`], or where it was made by the
    /// unfinished restore of the same point, or has no size and no snapshots; and never while a client has it open for writing. It keeps
    /// its snapshots, features, metadata (but for those in `target`) and, where that is not too small and
    /// none is given, its size: what lies behind the point's end is made zeroes.
    ///
    /// # Errors
    /// [`RestoreError::Image`], [`RestoreError::Point`]; [`RestoreError::Cancelled`] where nothing was
    /// changed yet.
    pub fn to_image(
        &self,
        target: &ImageTarget,
        observer: &dyn Observer,
        cancel: &Cancel,
    ) -> Result<RestoreReport, RestoreError> {
        let run = self.begin(observer, cancel);
        let point = run.open()?;
        if !point.check_tables(cancel)? {
            return Err(RestoreError::Cancelled);
        }
        // Whatever fails first ends the waits for everything else.
        let stop = cancel.part();
        let pool = connect(target, &stop)?;
        let opened = match open::open(target, &pool, &point, cancel) {
            Err(ImageError::Rbd { cause: RbdError::Cancelled, .. }) => return Err(RestoreError::Cancelled),
            opened => opened?,
        };
        let report = complete(&run, &point, target, &opened, &stop).map_err(|cause| match cause {
            _ if cancel.is_set() => ImageError::Interrupted { image: target.to_string() },
            cause => ImageError::Incomplete { image: target.to_string(), cause },
        })?;
        Ok(report)
    }
}

fn connect(target: &ImageTarget, stop: &Cancel) -> Result<Pool, RestoreError> {
    let patience = Patience { limit: target.patience, cancel: stop.clone() };
    let connect = || {
        let pool = Cluster::connect(&target.cluster, patience)?.pool(&target.pool, &target.namespace)?;
        // Whoever restores wants to know, not to wait.
        pool.fail_when_full();
        Ok(pool)
    };
    connect().map_err(|cause| match cause {
        RbdError::Cancelled => RestoreError::Cancelled,
        cause => ImageError::Rbd { image: target.to_string(), cause }.into(),
    })
}

/// What an image holds that is not empty.
fn contents(target: &ImageTarget, opened: &Opened) -> Result<LibrbdSource, BoxError> {
    let open = || LibrbdSource::contents(opened.image.clone(), &target.image, opened.ancestry.clone());
    let contents = open()?;
    match contents.check_denied() {
        Ok(()) => Ok(contents),
        // What an object held that the map denies would come back with the first write into it.
        Err(SourceError::Unreliable { cause }) if cause.is::<Distrust>() => {
            log::warn!("{target}: {cause}; the map is rebuilt now, the restore goes on");
            opened.image.rebuild_object_map()?;
            let contents = open()?;
            contents.check_denied()?;
            Ok(contents)
        }
        Err(error) => Err(error.into()),
    }
}

/// Makes the marked image what the point is, and takes the mark away when all is certain.
fn complete(
    run: &Run<'_>,
    point: &OpenPoint,
    target: &ImageTarget,
    opened: &Opened,
    stop: &Cancel,
) -> Result<RestoreReport, BoxError> {
    let Opened { image, info, empty, created, .. } = opened;
    let contents = if *empty { None } else { Some(contents(target, opened)?) };
    let block = BlockTarget {
        image,
        title: &target.to_string(),
        size: info.size,
        // Objects that share stripes are no stretches of the image.
        object_size: (info.stripe_count == 1 && Image::frees_zeroes()).then_some(info.object_size),
        contents: contents.as_ref().map(|contents| contents as &dyn RbdDiffSource),
    };
    let report = run.to_block(point, &block, stop)?;
    for (key, value) in layout::metadata(target, *created, point.record()) {
        image.set_metadata(&key, &value)?;
    }
    if run.cancel.is_set() {
        return Err(RbdError::Cancelled.into());
    }
    if !info.features.has(Features::EXCLUSIVE_LOCK) {
        // There was no lock that would have kept anybody away.
        match open::check_unused(target, image, Duration::ZERO, run.cancel) {
            Err(ImageError::UsersUnknown { .. }) => {}
            checked => checked?,
        }
    }
    image.remove_metadata(INCOMPLETE_KEY)?;
    Ok(report)
}

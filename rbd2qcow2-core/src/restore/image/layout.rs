//! What a restored image is to be, apart from its content.

use std::collections::BTreeMap;

use super::ImageTarget;
use crate::chain::manifest::Record;
use crate::rbd::{Features, NewImage, Pool, RbdError};

/// How a new image differs from the one that was backed up. `Default` is not at all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// Size in bytes, at least the point's. An image that exists gets it, too.
    pub size: Option<u64>,
    /// Size of the RADOS objects in bytes, a power of two from 4 KiB to 32 MiB.
    pub object_size: Option<u64>,
    /// Bytes in a row in one object.
    pub stripe_unit: Option<u64>,
    /// Objects over which rows are spread.
    pub stripe_count: Option<u64>,
    /// All features that it has.
    pub features: Option<Features>,
    /// The pool for the data. Its name is in no backup.
    pub data_pool: Option<String>,
    /// Whether the backed up metadata are left out.
    pub no_metadata: bool,
    /// Metadata that it gets besides, or instead of those with the same keys. An image that exists gets
    /// them, too.
    pub metadata: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// The image to be made, for a point with or without a manifest.
pub(super) fn new_image(target: &ImageTarget, record: Option<&Record>, size: u64) -> NewImage {
    let wanted = &target.overrides;
    // Striping goes with its object size: another one makes the old stripes meaningless.
    let object_size = wanted.object_size.or(record.map(|record| record.object_size));
    let same_objects = wanted.object_size.is_none();
    let (unit, count) = match record.filter(|_| same_objects) {
        Some(record) => (Some(record.stripe_unit), Some(record.stripe_count)),
        None => (None, None),
    };
    let unit = wanted.stripe_unit.or(unit);
    let count = wanted.stripe_count.or(count);
    let striping = match (unit, count) {
        (Some(unit), Some(count)) if count != 1 || Some(unit) != object_size => Some((unit, count)),
        _ => None,
    };
    let features = match (wanted.features, record) {
        (Some(features), _) => Some(features),
        (None, Some(record)) => Some(Features(record.features.bits).without(Features(!Features::SETTABLE.0))),
        (None, None) => None,
    };
    let features = features.map(|features| match striping {
        Some(_) => features.with(Features::STRIPING),
        None => features.without(Features::STRIPING),
    });
    // librbd sets this one by the option.
    let features = features.map(|features| features.without(Features::DATA_POOL));
    NewImage { size, object_size, striping, features, data_pool: wanted.data_pool.clone() }
}

/// Tells which of a backed up image's features a new one does without.
fn tell_what_is_left_out(target: &ImageTarget, record: Option<&Record>) {
    let Some(record) = record.filter(|_| target.overrides.features.is_none()) else { return };
    let features = Features(record.features.bits);
    if features.has(Features::DATA_POOL) && target.overrides.data_pool.is_none() {
        log::warn!(
            "{target}: the image that was backed up had its data in another pool, whose name is not known; they go \
             to the image's own pool (--data-pool names another)"
        );
    }
    let unknown = features.without(Features::NAMED);
    if !unknown.is_empty() {
        log::warn!("{target}: nobody here knows the feature {unknown}; the image does without it");
    }
}

/// Creates the image, without those features that librbd or the cluster does not know.
///
/// It has no size at first: so it cannot be taken for a good one before it is marked.
pub(super) fn create(
    target: &ImageTarget,
    pool: &Pool,
    image: &NewImage,
    record: Option<&Record>,
) -> Result<(), RbdError> {
    tell_what_is_left_out(target, record);
    let mut image = NewImage { size: 0, ..image.clone() };
    loop {
        match pool.create_image(&target.image, &image) {
            Err(error) if error.is_unknown_feature() => {
                let features = image.features.unwrap_or_default();
                // The others are what the data lie by.
                let last = features.without(Features::STRIPING).last();
                if last.is_empty() {
                    return Err(error);
                }
                log::warn!(
                    "{target}: the cluster does not know the feature {last}; the image does without it"
                );
                image.features = Some(features.without(last));
            }
            result => return result,
        }
    }
}

/// The metadata that an image gets: all of them, if it is `new`, or just those that were asked for.
pub(super) fn metadata(
    target: &ImageTarget,
    new: bool,
    record: Option<&Record>,
) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let recorded = record.filter(|_| new && !target.overrides.no_metadata);
    let mut metadata = recorded.map(|record| record.metadata.clone()).unwrap_or_default();
    metadata.extend(target.overrides.metadata.clone());
    metadata.remove(super::INCOMPLETE_KEY);
    metadata
}

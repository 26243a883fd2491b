//! Removing points that no other builds upon.

use super::error::PruneError;
use crate::cancel::Cancel;
use crate::chain::names::FileKind;
use crate::chain::{ChainWriter, PointName, durable};

/// Removes the files of `points`, in this order: none may be below a later one, or below one that stays.
///
/// A point is its layer, so that goes first: manifest and digests without one are left-overs, which the
/// next run removes, while a layer without them would be a damaged point. The directory is synced in
/// between, or a power failure could bring back a layer, but not its manifest, or not the layer below.
pub(super) fn remove_points(
    writer: &ChainWriter,
    points: &[PointName],
    cancel: &Cancel,
) -> Result<(), PruneError> {
    let catalogue = writer.catalogue();
    for &point in points {
        if cancel.is_set() {
            return Err(PruneError::Cancelled);
        }
        log::debug!("{}: removing point {point}", catalogue.image());
        durable::remove(&catalogue.path_of(point, FileKind::Layer))?;
        durable::sync_directory(writer.directory())?;
        for kind in [FileKind::Manifest, FileKind::Digests] {
            durable::remove(&catalogue.path_of(point, kind))?;
        }
    }
    if points.is_empty() { Ok(()) } else { Ok(durable::sync_directory(writer.directory())?) }
}

//! Removing points that no other builds upon, and what must be known of them later.

use std::collections::BTreeSet;

use super::error::PruneError;
use super::plan::{Action, Plan};
use crate::cancel::Cancel;
use crate::chain::{ChainWriter, PointName, durable};

/// Notes the chains of which `plan` leaves no point: their snapshots may still be in the cluster, and the
/// next backup removes only those of chains that it knows. To be done before anything is removed.
pub(super) fn retire_chains(writer: &ChainWriter, plan: &Plan) -> Result<(), PruneError> {
    let catalogue = writer.catalogue();
    let chain_of = |name| Some(catalogue.point(name)?.manifest.as_ref()?.record.chain);
    let stay = plan.decisions.iter().filter(|decision| decision.action == Action::Keep);
    let kept: BTreeSet<_> = stay.filter_map(|decision| chain_of(decision.point)).collect();
    let retired: Vec<_> = catalogue.chain_ids().into_iter().filter(|chain| !kept.contains(chain)).collect();
    Ok(writer.retire(&retired)?)
}

/// Removes the files of `points`, in this order: none may be below a later one, or below one that stays.
pub(super) fn remove_points(
    writer: &ChainWriter,
    points: &[PointName],
    cancel: &Cancel,
) -> Result<(), PruneError> {
    if !points.is_empty() {
        // A merge that has made way for this may have got no further than to its name.
        durable::sync_directory(writer.directory())?;
    }
    for &point in points {
        if cancel.is_set() {
            return Err(PruneError::Cancelled);
        }
        log::debug!("{}: removing point {point}", writer.catalogue().image());
        writer.remove_point(point)?;
    }
    if points.is_empty() { Ok(()) } else { Ok(durable::sync_directory(writer.directory())?) }
}

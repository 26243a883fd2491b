//! Forgetting points that others build upon.

use std::sync::Arc;

use super::PruneImage;
use super::error::PruneError;
use super::plan::{Action, Plan};
use crate::chain::{ChainWriter, PointName};
use crate::error::Causes;
use crate::layer::native::Compressors;
use crate::merge::{Merge, MergeProgress, Turn};

/// Has the points that stay take over what they need, and then removes those that go.
///
/// What goes is noted before: a run that dies behind the last merge has the next one remove it.
pub(super) fn merge_and_forget(
    writer: &mut ChainWriter,
    plan: &Plan,
    run: &PruneImage<'_>,
) -> Result<(), PruneError> {
    if plan.merges.is_empty() {
        return Ok(());
    }
    let gone = plan.decisions.iter().filter(|decision| decision.action != Action::Keep);
    let gone: Vec<_> = gone.map(|decision| decision.point).collect();
    writer.note_forgetting(&gone)?;
    let merges: Vec<_> = plan.merges.iter().map(|merge| (merge.child, merge.parent)).collect();
    if let Err(error) = merge(writer, &merges, run) {
        // Whoever asks again plans anew, by the rules that are true then.
        if let Err(cause) = writer.withdraw_forgetting() {
            log::warn!("{}: {}", writer.catalogue().image(), Causes(&cause));
        }
        return Err(error);
    }
    writer.forget()?;
    complete(writer, run)
}

/// Has layers that outlived their points take the place of those above them, as far as such are there: a
/// merge may have come no further, in this run or in an earlier one.
pub(super) fn complete(writer: &mut ChainWriter, run: &PruneImage<'_>) -> Result<(), PruneError> {
    let waiting: Vec<_> = writer.catalogue().half_merged().map(|point| (point.name, point.parent)).collect();
    merge(writer, &waiting, run)
}

/// Has each of these points take over what is below it, down to what it builds upon then.
fn merge(
    writer: &mut ChainWriter,
    merges: &[(PointName, Option<PointName>)],
    run: &PruneImage<'_>,
) -> Result<(), PruneError> {
    let PruneImage { options, observer, cancel, .. } = *run;
    let compressors = &Compressors::default();
    for (number, &(child, parent)) in (1..).zip(merges) {
        if cancel.is_set() {
            return Err(PruneError::Cancelled);
        }
        let turn = Turn { child, number, of: merges.len() };
        log::debug!("{}: merging into point {child} ({number} of {})", writer.catalogue().image(), turn.of);
        let progress = Arc::<MergeProgress>::default();
        observer.started(turn, &progress);
        let merge =
            Merge { writer, child, parent, options, compressors, progress: &progress, observer, cancel };
        let way = merge.run()?;
        observer.finished(way);
        writer.refresh()?;
    }
    Ok(())
}

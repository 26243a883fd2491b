//! Forgetting points that others build upon.

use super::error::PruneError;
use super::plan::{Action, Plan};
use crate::cancel::Cancel;
use crate::chain::{ChainWriter, Point};
use crate::error::Causes;
use crate::layer::native::Compressors;
use crate::merge::{Merge, MergeOptions};
use crate::progress::Progress;

/// Has the points that stay take over what they need, and then removes those that go.
///
/// What goes is noted before: a run that dies behind the last merge has the next one remove it.
pub(super) fn merge_and_forget(
    writer: &mut ChainWriter,
    plan: &Plan,
    cancel: &Cancel,
) -> Result<(), PruneError> {
    if plan.merges.is_empty() {
        return Ok(());
    }
    let gone = plan.decisions.iter().filter(|decision| decision.action != Action::Keep);
    let gone: Vec<_> = gone.map(|decision| decision.point).collect();
    writer.note_forgetting(&gone)?;
    if let Err(error) = merge(writer, plan, cancel) {
        // Whoever asks again plans anew, by the rules that are true then.
        if let Err(cause) = writer.withdraw_forgetting() {
            log::warn!("{}: {}", writer.catalogue().image(), Causes(&cause));
        }
        return Err(error);
    }
    writer.forget()?;
    complete(writer, cancel)
}

/// Has layers that outlived their points take the place of those above them, as far as such are there: a
/// merge may have come no further, in this run or in an earlier one.
pub(super) fn complete(writer: &mut ChainWriter, cancel: &Cancel) -> Result<(), PruneError> {
    let (options, compressors) = (MergeOptions::default(), Compressors::default());
    let points = || writer.catalogue().points();
    // Where the point is still there, it is not to go any more, and its layer stays as it is.
    let gone = |point: &&Point| point.base.is_some_and(|base| writer.catalogue().point(base).is_none());
    let waiting: Vec<_> = points().iter().filter(gone).map(|point| (point.name, point.parent)).collect();
    for (child, parent) in waiting {
        log::info!("{}: point {child} takes over the layer that it builds upon", writer.catalogue().image());
        let progress = &Progress::default();
        let merge =
            Merge { writer, child, parent, options: &options, compressors: &compressors, progress, cancel };
        merge.run()?;
        writer.refresh()?;
    }
    Ok(())
}

fn merge(writer: &mut ChainWriter, plan: &Plan, cancel: &Cancel) -> Result<(), PruneError> {
    let (options, compressors) = (MergeOptions::default(), Compressors::default());
    for (number, merge) in (1..).zip(&plan.merges) {
        if cancel.is_set() {
            return Err(PruneError::Cancelled);
        }
        log::info!(
            "{}: point {} takes over what {} below it hold ({number} of {})",
            writer.catalogue().image(),
            merge.child,
            merge.removed.len(),
            plan.merges.len()
        );
        let merge = Merge {
            writer,
            child: merge.child,
            parent: merge.parent,
            options: &options,
            compressors: &compressors,
            progress: &Progress::default(),
            cancel,
        };
        merge.run()?;
        writer.refresh()?;
    }
    Ok(())
}

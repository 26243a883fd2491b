//! What the bar of an image that is pruned shows of a merge.

use std::sync::Arc;

use indicatif::ProgressBar;
use rbd2qcow2_core::merge::{MergeProgress, Turn};
use rbd2qcow2_core::progress::Stage;

use super::{advance, tick_amount, tick_copy};

/// A merge under way.
#[derive(Debug)]
pub struct MergeTicks {
    /// Which one it is.
    turn: Turn,
    /// Its counters.
    progress: Arc<MergeProgress>,
    /// Never drawn: keeps the rate of its reads.
    reads: ProgressBar,
}

impl MergeTicks {
    /// A merge that has begun.
    pub fn new(turn: Turn, progress: &Arc<MergeProgress>) -> Self {
        Self { turn, progress: Arc::clone(progress), reads: ProgressBar::hidden() }
    }

    /// Brings the bar up to date.
    pub fn tick(&self, bar: &ProgressBar, stage: Stage) {
        let Turn { child, number, of, .. } = self.turn;
        let merging = format!("merging into {child} ({number} of {of})");
        match stage {
            Stage::Verify => tick_amount(bar, "verifying", &self.progress.verify),
            Stage::Copy => tick_copy(bar, &self.reads, &merging, &self.progress.copy),
            Stage::TakeOver => tick_amount(bar, "taking over in place", &self.progress.take_over),
            _ => {
                if self.progress.copy.size.get() > 0 {
                    advance(bar, &self.reads, &self.progress.copy);
                }
                bar.set_message(merging);
                bar.tick();
            }
        }
    }
}

//! Forgetting points without breaking the chains.
//!
//! In three parts: [`policy`] tells which points rules keep, by their times alone; [`plan`] what that
//! means for the points of an image, which build upon each other; and [`PruneImage`] does it.

use std::path::Path;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::cancel::Cancel;
use crate::chain::{Catalogue, ChainWriter, ImageName, image_directory};
use crate::error::Causes;
use crate::merge::{MergeObserver, MergeOptions};

mod error;
pub mod plan;
pub mod policy;
mod reason;
mod remove;
mod take_over;

pub use error::PruneError;
pub use plan::{Action, Decision, Merge, Plan, PlanError, Wanted};
pub use policy::{Limit, Policy, Within, WithinError};
pub use reason::{Reason, Rule};

#[cfg(test)]
mod merged_tests;
#[cfg(test)]
mod tests;

/// Points of one image that are to go.
#[derive(Clone, Copy)]
pub struct PruneImage<'a> {
    /// The directory that holds a directory for each image.
    pub dest: &'a Path,
    /// The image.
    pub image: &'a ImageName,
    /// Which points.
    pub wanted: &'a Wanted,
    /// Whose days, weeks and so on the rules mean.
    pub zone: &'a TimeZone,
    /// The time: what lies after it is a mistake of some clock.
    pub now: Timestamp,
    /// How layers are put into one.
    pub options: &'a MergeOptions,
    /// Is told how the merges go; `&()` looks away.
    pub observer: &'a dyn MergeObserver,
    /// Asks for a stop.
    pub cancel: &'a Cancel,
}

impl PruneImage<'_> {
    /// What [`run`](Self::run) would do now. Changes nothing, and takes no lock: where a backup ends
    /// meanwhile, this may be what was true before.
    ///
    /// # Errors
    /// [`PruneError::Plan`], [`PruneError::Chain`].
    pub fn plan(&self) -> Result<Plan, PruneError> {
        self.plan_for(&self.catalogue()?)
    }

    /// Removes the points, after those that stay have taken over what they need, and tells what was done,
    /// and how much that has freed.
    /// What is taken over is verified before. Blocks, and holds the chain's lock where there is
    /// something to do: who reads the chain or writes it keeps this from beginning, and the other way round.
    ///
    /// Whenever the process dies, all points that are to stay are whole, and each of the others is there
    /// or not. The next run that writes finishes or undoes what was begun.
    ///
    /// # Errors
    /// All of [`PruneError`].
    pub fn run(&self) -> Result<Plan, PruneError> {
        // Nobody needs to be kept out, or to be waited for, where nothing is to go. Whatever else there is
        // to say is said of what the lock keeps as it is.
        if let Ok(catalogue) = self.catalogue()
            && !catalogue.is_unfinished()
            && let Ok(plan) = self.plan_for(&catalogue)
            && plan.is_empty()
        {
            return Ok(plan);
        }
        // This completes what a run that was cut short has left.
        let mut writer = ChainWriter::open_existing(self.dest, self.image)?;
        let before = layer_bytes(writer.catalogue());
        let completed = take_over::complete(&mut writer, self);
        let mut plan = self.plan_for(writer.catalogue())?;
        remove::retire_chains(&writer, &plan)?;
        remove::remove_points(&writer, &plan.removals, self.cancel)?;
        writer.refresh()?;
        take_over::merge_and_forget(&mut writer, &plan, self)?;
        // What hindered that may be gone with some points: a full disk, for instance.
        completed.or_else(|_| take_over::complete(&mut writer, self))?;
        writer.refresh()?;
        if let Err(error) = writer.settle_suspicions() {
            // It concerns no point, so nobody is misled meanwhile.
            log::warn!("{}: {}; the next run tries again", self.image, Causes(&error));
        }
        let freed = before.saturating_sub(layer_bytes(writer.catalogue()));
        (plan.freed_at_least, plan.freed_at_most) = (freed, freed);
        Ok(plan)
    }

    fn catalogue(&self) -> Result<Catalogue, PruneError> {
        Ok(Catalogue::read(&image_directory(self.dest, self.image), self.image)?)
    }

    fn plan_for(&self, catalogue: &Catalogue) -> Result<Plan, PruneError> {
        Ok(Plan::new(catalogue, self.wanted, self.zone, self.now)?)
    }
}

/// What all layers take on disk, in bytes.
fn layer_bytes(catalogue: &Catalogue) -> u64 {
    catalogue.points().iter().fold(0, |sum, point| sum.saturating_add(point.layer_bytes))
}

//! What a merge tells while it goes on.

use std::sync::Arc;

use crate::chain::PointName;
use crate::progress::{Amount, Progress, Stage};
use crate::verify::VerifyProgress;

/// Counters of one merge. All are bytes of the image's data, or what [`Progress`] says, and only ever grow.
///
/// Which of them count at all depends on how the merge is done: see [`Way`].
#[derive(Debug, Default)]
pub struct MergeProgress {
    /// The verification of what goes into the new layer.
    pub verify: VerifyProgress,
    /// The copy into the new layer. Nothing of it is read from a cluster.
    pub copy: Progress,
    /// What a layer takes over in place of the one above it. The total is known when that begins.
    pub take_over: Amount,
}

impl MergeProgress {
    /// Bytes of data that were written so far. Packed ones count as what they are unpacked.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.copy.data.get().saturating_add(self.take_over.done.get())
    }
}

/// A merge among those of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Turn {
    /// The point that takes over what is below it.
    pub child: PointName,
    /// Which one it is, from 1 to `of`.
    pub number: usize,
    /// How many there are one after the other.
    pub of: usize,
}

/// How a merge was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Way {
    /// All layers were copied into a new one.
    Copied,
    /// The oldest layer, which is large, was left as it is, and the others were copied into one above it.
    /// Another merge, one of the two below, ends that when the point of the large layer is gone.
    UponBase,
    /// The large layer has taken over in place what the layer above it held.
    InPlace,
    /// A copy of the large layer that shares its data with it has taken over what the layer above it held.
    Shared,
}

/// Is told how the merges of an image go, one after the other. Called from the thread that merges; must not
/// block for long.
pub trait MergeObserver: Sync {
    /// A merge has begun; `progress` will be counted up from now on.
    fn started(&self, _turn: Turn, _progress: &Arc<MergeProgress>) {}

    /// It has reached a stage: [`Stage::Prepare`], [`Stage::Verify`], [`Stage::Copy`], [`Stage::TakeOver`]
    /// or [`Stage::Commit`], as the way asks for.
    fn stage(&self, _stage: Stage) {}

    /// It is done. Of one that fails only the error tells.
    fn finished(&self, _way: Way) {}
}

/// An observer that looks away.
impl MergeObserver for () {}

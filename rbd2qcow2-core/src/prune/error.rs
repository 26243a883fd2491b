//! Why points could not be removed.

use super::plan::PlanError;
use crate::chain::{ChainError, PointName};

/// Why an image was not pruned, or not to the end. All points that were to stay are there and whole; what
/// was begun, the next run finishes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PruneError {
    /// The directory of the image failed, or somebody else uses it ([`ChainError::Locked`]).
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// It is not clear what is to be removed, or it must not be.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// Layers would have to be merged.
    #[error("point {point} builds upon points that are to go, and layers cannot be merged yet")]
    MergeMissing {
        /// The first such point.
        point: PointName,
    },
    /// The run was asked to stop.
    #[error("interrupted")]
    Cancelled,
}

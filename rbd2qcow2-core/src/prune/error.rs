//! Why points could not be removed.

use super::plan::PlanError;
use crate::chain::ChainError;
use crate::merge::MergeError;

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
    /// A point that stays could not take over what the points below it hold, so those stay, too.
    #[error(transparent)]
    Merge(Box<MergeError>),
    /// The run was asked to stop.
    #[error("interrupted")]
    Cancelled,
}

impl From<MergeError> for PruneError {
    fn from(error: MergeError) -> Self {
        match error {
            MergeError::Cancelled => Self::Cancelled,
            MergeError::Chain(cause) => Self::Chain(cause),
            cause => Self::Merge(cause.into()),
        }
    }
}

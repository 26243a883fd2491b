//! Why layers were not put into one.

use std::io;
use std::path::PathBuf;

use crate::chain::{ChainError, PointName};
use crate::copy::CopyError;
use crate::layer::LayerError;
use crate::qcow2::absorb::AbsorbError;
use crate::qcow2::error::ReadError;
use crate::verify::{Finding, VerifyError};

/// Why layers were not put into one. The chain is as it was, unless a variant says otherwise.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// The chain could not be read or changed; see there for what it means for the chain.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// A layer is damaged.
    #[error("cannot read the chain of point {point}")]
    Read {
        /// The point that was to take over.
        point: PointName,
        /// What is wrong, with which file.
        #[source]
        cause: ReadError,
    },
    /// The new layer may need more room than there is.
    #[error(
        "merging into point {point} may take {needed} bytes in {}, and {free} are free; nothing was changed",
        path.display()
    )]
    NoSpace {
        /// The point that was to take over.
        point: PointName,
        /// The directory of the image.
        path: PathBuf,
        /// What it may take, in bytes, and some room to spare.
        needed: u64,
        /// What is free, in bytes.
        free: u64,
    },
    /// How much is free could not be found out.
    #[error("cannot find out how much space is free in {}", path.display())]
    Free {
        /// The directory of the image.
        path: PathBuf,
        /// What the system says.
        #[source]
        cause: io::Error,
    },
    /// The new layer could not be written.
    #[error("cannot write what point {point} takes over")]
    Layer {
        /// The point.
        point: PointName,
        /// Why.
        #[source]
        cause: LayerError,
    },
    /// The copy failed.
    #[error("cannot copy what point {point} takes over")]
    Copy {
        /// The point.
        point: PointName,
        /// Why.
        #[source]
        cause: CopyError,
    },
    /// A layer that would go into the new one is damaged. The new one's digests would hide that.
    #[error(
        "point {from} is damaged, so point {point} does not take over what it holds; nothing was changed"
    )]
    Damaged {
        /// The point that was to take over.
        point: PointName,
        /// The point whose layer is damaged.
        from: PointName,
        /// The first thing that is wrong.
        #[source]
        cause: Finding,
    },
    /// A layer that would go into the new one has lost its digests, or the manifest that tells what they are
    /// worth. The new one's digests would say of its data that they are what was backed up.
    #[error(
        "point {from} has no digests that tell whether it is as it was, so point {point}, which has some, does \
         not take over what it holds; nothing was changed"
    )]
    NoDigests {
        /// The point that was to take over.
        point: PointName,
        /// The point that has lost them.
        from: PointName,
    },
    /// A base could not take over what is above it. All points read as before, and the next run that prunes
    /// tries again.
    #[error("cannot put what point {point} holds into the layer that it builds upon")]
    Absorb {
        /// The point.
        point: PointName,
        /// Why.
        #[source]
        cause: AbsorbError,
    },
    /// The layers could not be verified.
    #[error("cannot verify what point {point} is to take over")]
    Verify {
        /// The point.
        point: PointName,
        /// Why.
        #[source]
        cause: VerifyError,
    },
    /// A stop was asked for. Nothing of this merge was kept.
    #[error("interrupted")]
    Cancelled,
}

//! What can be wrong with a point.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use crate::chain::digests::DigestsError;
use crate::chain::{PointName, Problem};
use crate::qcow2::check;
use crate::qcow2::error::ReadError;

/// Something that is not as it was when the point was made. Ranges are bytes of the image.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Finding {
    /// The files do not fit together.
    #[error(transparent)]
    Files(#[from] Problem),
    /// The structure of the layer is damaged.
    #[error("the structure of the layer {} is damaged", path.display())]
    Structure {
        /// The layer.
        path: PathBuf,
        /// What was found.
        #[source]
        cause: check::Finding,
    },
    /// The layer could not be read.
    #[error("bytes {}..{} of the image cannot be read", range.start, range.end)]
    Read {
        /// What was read, at least.
        range: Range<u64>,
        /// What the reader said.
        #[source]
        cause: Arc<ReadError>,
    },
    /// The digests are unusable.
    #[error("the digests {} cannot be used, so the layer cannot be verified", path.display())]
    Digests {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        cause: Arc<DigestsError>,
    },
    /// The layer holds other bytes than were backed up.
    #[error("bytes {}..{} of the image are not what was backed up, in {}", range.start, range.end, path.display())]
    Content {
        /// The layer.
        path: PathBuf,
        /// The range that was compared.
        range: Range<u64>,
    },
    /// The layer does not hold what was backed up.
    #[error("bytes {}..{} of the image were backed up, but are missing in {}", range.start, range.end, path.display())]
    Missing {
        /// The layer.
        path: PathBuf,
        /// What is missing.
        range: Range<u64>,
    },
    /// The layer holds something that was not backed up, and hides what is below.
    #[error("bytes {}..{} of the image were not backed up, but {} holds something there", range.start, range.end, path.display())]
    Extra {
        /// The layer.
        path: PathBuf,
        /// Where it holds something.
        range: Range<u64>,
    },
    /// The point is not what its snapshot is.
    #[error("bytes {}..{} of the image differ from its snapshot {snapshot}", range.start, range.end)]
    Source {
        /// The snapshot's name.
        snapshot: String,
        /// Where they differ.
        range: Range<u64>,
    },
    /// What a layer below holds is damaged, and shows through.
    #[error("bytes {}..{} of the image come from point {from}, whose layer is damaged there", range.start, range.end)]
    Inherited {
        /// The damaged point.
        from: PointName,
        /// What shows through.
        range: Range<u64>,
    },
}

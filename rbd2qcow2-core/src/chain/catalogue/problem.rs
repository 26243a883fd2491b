//! What can be wrong with the files of an image.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::chain::manifest::ManifestError;
use crate::chain::names::PointName;
use crate::qcow2::header::HeaderError;

/// Something wrong in the directory of an image.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// A file that no part of the program makes. It is left alone.
    #[error("{} does not belong to the chain (it is left alone)", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// A symbolic link in the place of a file. It is not followed.
    #[error("{} is a symbolic link, which is not followed", path.display())]
    Symlink {
        /// The link.
        path: PathBuf,
    },
    /// A directory, pipe or device in the place of a file.
    #[error("{} is not a regular file", path.display())]
    NotARegularFile {
        /// What is there.
        path: PathBuf,
    },
    /// Not even the properties of a file can be read.
    #[error("{} cannot be looked at", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        cause: Arc<io::Error>,
    },
    /// A layer's header is unreadable or says that the layer must not be used. A layer whose tables
    /// lie behind the end of its file is found here too.
    #[error("the layer {} cannot be used", path.display())]
    Header {
        /// The layer.
        path: PathBuf,
        /// What is wrong.
        #[source]
        cause: Arc<HeaderError>,
    },
    /// A layer is shorter than it was when it was committed.
    #[error("the layer {} is cut off: it has {found} bytes of {expected}", path.display())]
    Truncated {
        /// The layer.
        path: PathBuf,
        /// Its length in bytes.
        found: u64,
        /// The length that the manifest records.
        expected: u64,
    },
    /// A layer's backing file is not an older point of the same image.
    #[error("the layer {} builds upon {backing:?}, which is no older point of the image", path.display())]
    ForeignBacking {
        /// The layer.
        path: PathBuf,
        /// The name of the backing file in its header.
        backing: String,
    },
    /// The point that a layer builds upon is not there.
    #[error("the layer {} builds upon point {parent}, which is missing", path.display())]
    ParentMissing {
        /// The layer.
        path: PathBuf,
        /// The missing point.
        parent: PointName,
    },
    /// A layer is gone, while its manifest is there.
    #[error(
        "point {point} is lost: its layer {} is missing{}; bring that file back, or, if that cannot be done, move \
         the point's other files away",
        path.display(), NeededBy(needed_by)
    )]
    LayerMissing {
        /// The layer.
        path: PathBuf,
        /// Its point.
        point: PointName,
        /// The points that cannot be read without it, the oldest first.
        needed_by: Vec<PointName>,
    },
    /// A layer and its manifest contradict each other, so one of them was changed or exchanged.
    #[error("the layer {} has the {what} {layer}, its manifest says {manifest}", path.display())]
    Disagreement {
        /// The layer.
        path: PathBuf,
        /// Which property.
        what: &'static str,
        /// Its value by the layer.
        layer: String,
        /// Its value by the manifest.
        manifest: String,
    },
    /// A point's manifest is missing or damaged. The layer can be read, but not be built upon.
    #[error("the manifest {} cannot be used (the layer can still be restored)", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong.
        #[source]
        cause: Arc<ManifestError>,
    },
    /// A point's digests are missing. The layer can be read, but not be verified.
    #[error("the digests {} are missing, so the layer cannot be verified", path.display())]
    DigestsMissing {
        /// The file.
        path: PathBuf,
    },
    /// A point's digests have another length than its manifest records.
    #[error("the digests {} have {found} bytes instead of {expected}, so the layer cannot be verified", path.display())]
    DigestsLength {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        found: u64,
        /// The length that the manifest records.
        expected: u64,
    },
    /// A point that was asked for does not exist.
    #[error("there is no point {point}: {} does not exist", path.display())]
    NoSuchPoint {
        /// Where its layer would be.
        path: PathBuf,
        /// The point.
        point: PointName,
    },
}

impl Problem {
    /// Whether nothing is known to be wrong, but that this user may not read a file.
    #[must_use]
    pub fn is_denied(&self) -> bool {
        let cause = match self {
            Self::Unreadable { cause, .. } => cause,
            Self::Header { cause, .. } => match &**cause {
                HeaderError::Read(cause) => cause,
                _ => return false,
            },
            Self::Manifest { cause, .. } => match &**cause {
                ManifestError::Read(cause) => cause,
                _ => return false,
            },
            _ => return false,
        };
        cause.kind() == io::ErrorKind::PermissionDenied
    }

    /// The file that the problem is about.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Foreign { path }
            | Self::Symlink { path }
            | Self::NotARegularFile { path }
            | Self::Unreadable { path, .. }
            | Self::Header { path, .. }
            | Self::Truncated { path, .. }
            | Self::ForeignBacking { path, .. }
            | Self::ParentMissing { path, .. }
            | Self::LayerMissing { path, .. }
            | Self::Disagreement { path, .. }
            | Self::Manifest { path, .. }
            | Self::DigestsMissing { path }
            | Self::DigestsLength { path, .. }
            | Self::NoSuchPoint { path, .. } => path,
        }
    }
}

/// Points that are named in a message, at most.
const NAMED: usize = 5;

/// Tells which points need something.
struct NeededBy<'a>(&'a [PointName]);

impl fmt::Display for NeededBy<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named: Vec<_> = self.0.iter().take(NAMED).map(ToString::to_string).collect();
        match self.0.len() {
            0 => Ok(()),
            1 => write!(f, "; point {} needs it", named[0]),
            more if more <= NAMED => write!(f, "; points {} need it", named.join(", ")),
            more => write!(f, "; points {} and {} newer need it", named.join(", "), more - NAMED),
        }
    }
}

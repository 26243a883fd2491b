//! What can go wrong with the directory of an image.

use std::io;
use std::path::{Path, PathBuf};

use super::catalogue::Problem;
use super::digests::DigestsError;
use super::lock::Holder;
use super::manifest::ManifestError;
use super::names::{ImageName, NameError, PointName};
use crate::files::Shortage;
use crate::qcow2::header::HeaderError;

/// Why a chain could not be read or extended.
///
/// Unless a variant says otherwise the points that existed before are untouched, and what a failed
/// run left behind is removed by the next one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChainError {
    /// The destination does not exist. It is never created, since it may be a mount point whose
    /// file system is not mounted.
    #[error(
        "the destination {} does not exist; create it, or mount the file system that should be there",
        path.display()
    )]
    DestinationMissing {
        /// The destination.
        path: PathBuf,
    },
    /// The destination, or the directory of the image in it, is something else than a directory.
    #[error("{} is not a directory (symbolic links are not followed inside a destination)", path.display())]
    NotADirectory {
        /// What should be a directory.
        path: PathBuf,
    },
    /// What was named as the destination is the directory of one image in it.
    #[error(
        "{} holds the points of image {:?}, and is no destination: that is {}",
        path.display(), image.as_str(), dest.display()
    )]
    ImageDirectory {
        /// What was named.
        path: PathBuf,
        /// The destination that it lies in.
        dest: PathBuf,
        /// The image.
        image: ImageName,
    },
    /// Nothing can be created in the destination.
    #[error("the destination {} cannot be written to (mounted read-only, or owned by another user?)", path.display())]
    DestinationNotWritable {
        /// The destination.
        path: PathBuf,
        /// What the system said.
        #[source]
        cause: io::Error,
    },
    /// The destination holds no backups of the image.
    #[error("there are no backups of the image in {}", path.display())]
    NoSuchImage {
        /// Where they would be.
        path: PathBuf,
    },
    /// Somebody else holds the chain's lock.
    #[error("{holder} ({}); wait for it to end and try again", path.display())]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// Who holds it.
        holder: Holder,
    },
    /// The files of a chain could not be looked at, since no more files can be open. Nothing is known to be wrong
    /// with them.
    #[error("cannot read {}", path.display())]
    TooManyFiles {
        /// The first file that was not read.
        path: PathBuf,
        /// How many may be open.
        #[source]
        cause: Shortage,
    },
    /// An operation on a file or directory failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        cause: io::Error,
    },
    /// This user may not open a file, or list a directory. Nothing is known to be wrong with it.
    #[error(
        "this user may not read {}: run as its owner, or have its owner or mode changed (chown, \
         chmod, setfacl)",
        path.display()
    )]
    NotAllowed {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        cause: io::Error,
    },
    /// A name cannot be made.
    #[error("cannot name the point's files in {}", path.display())]
    Name {
        /// The directory of the image.
        path: PathBuf,
        /// Why not.
        #[source]
        cause: NameError,
    },
    /// The point is not newer than all others of the chain.
    #[error("point {point} is not newer than {newest}, the newest in {}", path.display())]
    NotNewest {
        /// The directory of the image.
        path: PathBuf,
        /// The point that was to be made.
        point: PointName,
        /// The newest name in use.
        newest: PointName,
    },
    /// The point to build upon, or one that it builds upon itself, is damaged.
    #[error("cannot build upon point {point} in {}; a full backup can be made", path.display())]
    ParentUnsound {
        /// The directory of the image.
        path: PathBuf,
        /// The point that was to be the parent.
        point: PointName,
        /// What is wrong with the chain.
        #[source]
        cause: Box<Problem>,
    },
    /// The written layer is not what was planned. It is removed; the backup failed.
    #[error(
        "the layer {} is not as planned: its {what} is {found} and should be {planned}; it is discarded",
        path.display()
    )]
    LayerNotAsPlanned {
        /// The layer.
        path: PathBuf,
        /// Which property.
        what: &'static str,
        /// What the layer's header says.
        found: String,
        /// What it should say.
        planned: String,
    },
    /// The written layer has no usable header. It is removed; the backup failed.
    #[error("the layer {} was not written properly; it is discarded", path.display())]
    LayerUnusable {
        /// The layer.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        cause: HeaderError,
    },
    /// The digests of the layer could not be written. The layer is removed; the backup failed.
    #[error("cannot write the digests {}", path.display())]
    Digests {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        cause: DigestsError,
    },
    /// What is to be recorded about the point is not valid. The layer is removed; the backup failed.
    #[error("cannot record the point in {}", path.display())]
    Manifest {
        /// The manifest that was to be written.
        path: PathBuf,
        /// What is wrong.
        #[source]
        cause: ManifestError,
    },
    /// The layer has its final name, but the directory could not be synced, so it is not known
    /// whether the point survives a power failure. It must not be taken for a success: no older
    /// snapshot may be removed. The point is complete if it is there; the next run finds out.
    #[error(
        "point {} is complete, but it is not certain to survive a power failure; keep the snapshot of the \
         point before, check the disk, and run again",
        path.display()
    )]
    CommitUncertain {
        /// The layer.
        path: PathBuf,
        /// What the system said.
        #[source]
        cause: Box<ChainError>,
    },
    /// The manifest of a point that is to take over what others hold is missing or damaged. Only points
    /// of the Python tool have none.
    #[error("the point of the manifest {} can take over nothing while that cannot be used; nothing was changed", path.display())]
    ManifestUnusable {
        /// The manifest.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        cause: ManifestError,
    },
    /// A point builds already upon what it is to build upon.
    #[error("point {point} in {} has nothing to take over", path.display())]
    NothingToMerge {
        /// The directory of the image.
        path: PathBuf,
        /// The point.
        point: PointName,
    },
    /// Nobody can tell whether a merge that was cut short has come about. Nothing of it is touched, since
    /// that would be what it takes to find out.
    #[error(
        "{} is left of an interrupted merge, and it is not clear whether the point's layer is its result: \
         {reason}; bring the layer and its manifest back, or move all files of that point away",
        path.display()
    )]
    MergeUnclear {
        /// The file that waits to replace another.
        path: PathBuf,
        /// Why it is not clear.
        reason: &'static str,
    },
    /// The note about a snapshot of a killed run cannot be understood.
    #[error(
        "the note {} about the snapshot of an interrupted first backup is damaged; look for snapshots named \
         rbd2qcow2-* of this image that belong to no point, then delete the note",
        path.display()
    )]
    AnnouncementDamaged {
        /// The note.
        path: PathBuf,
    },
}

impl ChainError {
    /// For `map_err`: an [`ChainError::Io`] about `path`.
    pub(crate) fn io<E: Into<io::Error>>(action: &'static str, path: &Path) -> impl FnOnce(E) -> Self {
        move |cause| Self::Io { action, path: path.to_owned(), cause: cause.into() }
    }
}

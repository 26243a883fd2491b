//! Why a point could not be restored.

use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::chain::names::{ImageName, NameError, PointName};
use crate::chain::{ChainError, Problem};
use crate::copy::CopyError;
use crate::layer::LayerError;
use crate::qcow2::error::ReadError;

/// Points that are named in a message, at most. The newest are.
const NAMED: usize = 5;

/// Why a point was not restored. No chain was changed, and no file is left of what was begun, unless
/// a variant says otherwise.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// No image has such a name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The directory of the image failed, or somebody writes to it.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// The destination holds no points of the image.
    #[error("{} holds no backups of image {:?}", dest.display(), image.as_str())]
    UnknownImage {
        /// The directory of all images.
        dest: PathBuf,
        /// The image.
        image: ImageName,
    },
    /// The image has no such point.
    #[error("image {:?} has no point {point}", image.as_str())]
    UnknownPoint {
        /// The image.
        image: ImageName,
        /// The point that was asked for.
        point: PointName,
        /// The points that it has, the oldest first.
        known: Vec<PointName>,
    },
    /// A file that the point needs is missing, cut off, or not what it should be.
    #[error("point {point} of image {:?} is broken; {}", image.as_str(), Whole(whole))]
    Broken {
        /// The image.
        image: ImageName,
        /// The point.
        point: PointName,
        /// The points whose files are all there, the oldest first.
        whole: Vec<PointName>,
        /// What is wrong, and with which file.
        #[source]
        cause: Box<Problem>,
    },
    /// A layer that the point needs is damaged, or cannot be read for another reason.
    #[error("point {point} of image {:?} cannot be read whole; {}", image.as_str(), Whole(whole))]
    Damaged {
        /// The image.
        image: ImageName,
        /// The point.
        point: PointName,
        /// The points that do not need that layer, the oldest first.
        whole: Vec<PointName>,
        /// What is wrong, with which file ([`ReadError::path`]), and where.
        #[source]
        cause: Box<ReadError>,
    },
    /// The path is none of a file: it is empty, or ends with `..` or a slash.
    #[error("{} is not the path of a file", path.display())]
    NoFile {
        /// The path.
        path: PathBuf,
    },
    /// Something has the name already. Nothing is ever replaced.
    #[error("{} exists; nothing is overwritten: remove it, or choose another name", path.display())]
    Exists {
        /// The path.
        path: PathBuf,
    },
    /// The path lies where points are.
    #[error(
        "{} would lie within {}, which holds backups: choose another directory",
        path.display(), directory.display()
    )]
    WithinChain {
        /// The path.
        path: PathBuf,
        /// The directory of an image.
        directory: PathBuf,
    },
    /// The directory of the file cannot be used.
    #[error("cannot restore into the directory {}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system says.
        #[source]
        cause: io::Error,
    },
    /// The file could not be written.
    #[error("cannot restore to {}", path.display())]
    Write {
        /// Where the file was going to be.
        path: PathBuf,
        /// What the writer says. It names the file as it was called while it was written.
        #[source]
        cause: LayerError,
    },
    /// The file was written, and could not be given its name.
    #[error("cannot restore to {}", path.display())]
    Rename {
        /// Where the file was going to be.
        path: PathBuf,
        /// What the system says.
        #[source]
        cause: ChainError,
    },
    /// The file is complete and has its name, but the name may not survive a power failure.
    #[error("{} is complete, but not certain to survive a power failure", path.display())]
    Uncertain {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        cause: ChainError,
    },
    /// The stream took no more.
    #[error("cannot write the image to the stream, at offset {offset} of {size} bytes")]
    Stream {
        /// Where the failed write began, in bytes of the image; the size when flushing failed.
        offset: u64,
        /// The image's size in bytes.
        size: u64,
        /// What the system says.
        #[source]
        cause: io::Error,
    },
    /// The copy failed, neither in the chain nor in the file.
    #[error("cannot restore")]
    Copy(#[source] CopyError),
    /// A stop was asked for.
    #[error("interrupted; nothing of the restored file was kept")]
    Cancelled,
}

/// Tells which points are still whole.
struct Whole<'a>(&'a [PointName]);

impl fmt::Display for Whole<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let newest: Vec<_> = self.0.iter().rev().take(NAMED).map(ToString::to_string).collect();
        match self.0.len() {
            0 => f.write_str("no point of the image is known to be whole"),
            1 => write!(f, "not affected: {}", newest[0]),
            more if more <= NAMED => write!(f, "not affected: {}", newest.join(", ")),
            more => write!(f, "not affected: {} and {} older", newest.join(", "), more - NAMED),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_whole_points_are_named() {
        let points: Vec<_> =
            (0..7).map(|second| PointName::parse(&format!("1700000{second:03}")).expect("a point")).collect();
        assert_eq!(Whole(&[]).to_string(), "no point of the image is known to be whole");
        assert_eq!(Whole(&points[..1]).to_string(), "not affected: 1700000000");
        assert_eq!(Whole(&points[..2]).to_string(), "not affected: 1700000001, 1700000000");
        assert_eq!(
            Whole(&points).to_string(),
            "not affected: 1700000006, 1700000005, 1700000004, 1700000003, 1700000002 and 2 older"
        );
    }
}

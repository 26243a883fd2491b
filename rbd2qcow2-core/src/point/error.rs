//! Why a point could not be opened.

use std::fmt;
use std::path::PathBuf;

use crate::chain::names::{ImageName, NameError, PointName};
use crate::chain::{ChainError, Problem};
use crate::qcow2::error::ReadError;

/// Points that are named in a message, at most. The newest are.
const NAMED: usize = 5;

/// Why a point cannot be read. Nothing was changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PointError {
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
    /// Not all layers that the point needs could be read, since no more files can be open. Nothing is known to be
    /// wrong with the point.
    #[error("point {point} of image {:?} was not read: no more files can be opened", image.as_str())]
    TooManyFiles {
        /// The image.
        image: ImageName,
        /// The point.
        point: PointName,
        /// Which file ([`ReadError::path`]), and what the system says.
        #[source]
        cause: Box<ReadError>,
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

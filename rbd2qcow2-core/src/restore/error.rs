//! Why a point could not be restored.

use std::io;
use std::path::PathBuf;

#[cfg(feature = "rbd")]
use super::image::ImageError;
use crate::chain::ChainError;
use crate::copy::CopyError;
use crate::layer::LayerError;
use crate::point::{OpenPoint, PointError};
use crate::source::{BoxError, SourceError};

/// Why a point was not restored. No chain was changed, and no file is left of what was begun, unless
/// a variant says otherwise.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The point could not be opened, or not be read whole.
    #[error(transparent)]
    Point(#[from] PointError),
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
    /// The point does not fit into the block image, which was not changed.
    #[error("{title} has {size} bytes, and the point needs {needed}")]
    BlockTooSmall {
        /// The image.
        title: String,
        /// Its size in bytes.
        size: u64,
        /// The point's size in bytes.
        needed: u64,
    },
    /// The block image could not be made what the point is. What it holds is no image of anything.
    #[error("cannot restore to {title}, which is left incomplete")]
    Block {
        /// The image.
        title: String,
        /// Why.
        #[source]
        cause: BoxError,
    },
    /// The point could not be restored into an RBD image.
    #[cfg(feature = "rbd")]
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The copy failed, neither in the chain nor in the file.
    #[error("cannot restore")]
    Copy(#[source] CopyError),
    /// A stop was asked for.
    #[error("interrupted; nothing of the restored file was kept")]
    Cancelled,
}

impl RestoreError {
    /// What an error of the copy from `point` means.
    pub(super) fn of_source(point: &OpenPoint, error: SourceError) -> Self {
        match point.explain(error) {
            Ok(error) => error.into(),
            Err(error) => Self::Copy(error.into()),
        }
    }
}

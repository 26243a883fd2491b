//! Why a layer could not be written by this program itself.

use std::io;

use crate::extent::Extent;
use crate::qcow2::writer::WriteError;

/// Why a layer could not be written. Its path is told by the [`LayerError`](crate::layer::LayerError).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NativeError {
    /// A cluster size that qcow2 does not have.
    #[error("{size} is no cluster size of qcow2: it must be a power of two from 512 to 2097152")]
    ClusterSize {
        /// The size in bytes.
        size: u32,
    },
    /// The file could not be written.
    #[error(transparent)]
    File(#[from] WriteError),
    /// A cluster could not be packed.
    #[error("cannot compress")]
    Compress(#[source] io::Error),
    /// A piece that is no whole grains, does not ascend, or lies behind the end: a defect of the
    /// caller's.
    #[error(
        "internal error: bytes {}..{} of the image are not what a layer with a grain of {grain} bytes and a \
         virtual size of {virtual_size} takes now",
        piece.offset, piece.offset.saturating_add(piece.length)
    )]
    BadPiece {
        /// The piece.
        piece: Extent,
        /// The layer's grain in bytes.
        grain: u64,
        /// The layer's virtual size in bytes.
        virtual_size: u64,
    },
}

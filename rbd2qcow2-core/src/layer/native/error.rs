//! Why a layer could not be written by this program itself.

use std::io;
use std::path::PathBuf;

use crate::extent::Extent;
use crate::qcow2::compressed::UnpackError;
use crate::qcow2::error::ReadError;
use crate::qcow2::table::GuestOffset;
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
    /// A cluster that lies packed in another layer could not be read there.
    #[error("cannot read packed data to copy them")]
    ReadPacked(#[source] ReadError),
    /// A cluster that lies packed in another layer cannot be unpacked, though it was read from there just
    /// before.
    #[error("packed data of the layer {} cannot be copied (guest offset {guest})", layer.display())]
    PackedDamaged {
        /// The other layer.
        layer: PathBuf,
        /// First byte of the cluster, as the guest sees it.
        guest: GuestOffset,
        /// What is wrong with the packed data.
        #[source]
        cause: UnpackError,
    },
    /// A cluster that lies packed in another layer holds something else than what was read.
    #[error(
        "packed data of the layer {} are not copied: they hold something else than what was read of the image \
         (guest offset {guest})",
        layer.display()
    )]
    PackedDiffers {
        /// The other layer.
        layer: PathBuf,
        /// First byte of the cluster, as the guest sees it.
        guest: GuestOffset,
    },
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

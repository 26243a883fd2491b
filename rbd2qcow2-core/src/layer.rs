//! One file of a chain being written.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use bytes::Bytes;

use crate::extent::Extent;
use crate::qcow2::header::EXTENDED_L2_MIN_BITS;
use crate::source::BoxError;

pub mod block;
pub mod native;
pub mod qemu_nbd;
pub mod raw;

pub use crate::qcow2::SECTOR;

/// The smallest cluster that can have subclusters, in bytes.
const SMALLEST_EXTENDED: u32 = 1 << EXTENDED_L2_MIN_BITS;

/// Why a layer could not be written. The layer's file is then unusable and must be removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// The empty layer could not be made.
    #[error("cannot create the layer {}", path.display())]
    Create {
        /// The file.
        path: PathBuf,
        /// What the writer said.
        #[source]
        cause: BoxError,
    },
    /// Data or zeroes could not be written. May be reported by a later call than the one that
    /// handed them over.
    #[error("cannot write the layer {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the writer said.
        #[source]
        cause: BoxError,
    },
    /// The written layer could not be brought to stable storage.
    #[error("cannot flush the layer {} to stable storage", path.display())]
    Finish {
        /// The file.
        path: PathBuf,
        /// What the writer said.
        #[source]
        cause: BoxError,
    },
}

/// How the clusters of a layer are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Compression {
    /// As they are.
    #[default]
    None,
    /// Deflate, readable by every QEMU.
    Zlib,
    /// Zstandard, readable by QEMU 5.1 and later.
    Zstd {
        /// 1 (fast) to 22 (small); `None` is the writer's default.
        level: Option<u8>,
    },
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Zlib => f.write_str("zlib"),
            Self::Zstd { level: None } => f.write_str("zstd"),
            Self::Zstd { level: Some(level) } => write!(f, "zstd:{level}"),
        }
    }
}

impl FromStr for Compression {
    type Err = UnknownCompression;

    /// Reads what [`Display`](fmt::Display) writes.
    fn from_str(text: &str) -> Result<Self, UnknownCompression> {
        match text.split_once(':') {
            None if text == "none" => Ok(Self::None),
            None if text == "zlib" => Ok(Self::Zlib),
            None if text == "zstd" => Ok(Self::Zstd { level: None }),
            Some(("zstd", level)) => match level.parse() {
                Ok(level @ 1..=22) => Ok(Self::Zstd { level: Some(level) }),
                _ => Err(UnknownCompression),
            },
            _ => Err(UnknownCompression),
        }
    }
}

/// The text names no compression.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a compression: none, zlib, zstd, or zstd: and a level from 1 to 22")]
pub struct UnknownCompression;

/// What a new layer is to be.
#[derive(Clone, Debug)]
pub struct LayerSpec {
    /// The file to make. It must not exist.
    pub path: PathBuf,
    /// Size that a guest sees, in bytes: a multiple of 512.
    pub virtual_size: u64,
    /// File name (no directory) of the qcow2 file below, in the same directory; `None` for a root.
    pub backing: Option<String>,
    /// Cluster size in bytes, a power of two from 512 to 2 MiB.
    pub cluster_size: u32,
    /// How clusters are stored.
    pub compression: Compression,
    /// Whether clusters have subclusters.
    pub extended_l2: ExtendedL2,
}

impl LayerSpec {
    /// The usual cluster size, in bytes. A scattered change costs a subcluster of 1/32 of it, a page
    /// of most guests' file systems, while tables are half as large as with QEMU's default of 64 KiB.
    pub const DEFAULT_CLUSTER_SIZE: u32 = 128 << 10;
}

/// Whether layers get extended L2 entries, which make the grain 32 times finer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExtendedL2 {
    /// Wherever the format, and the writer, allow it.
    #[default]
    Auto,
    /// Never. The layer then opens with QEMU older than 5.2, too.
    Off,
}

/// A stretch of the image, and what changed in it.
#[derive(Clone, Debug)]
pub struct Patch {
    /// Where `data` begin, in bytes of the image. Means nothing when they are empty.
    pub offset: u64,
    /// What the snapshot holds from `offset` on: at least all that `pieces` call data, with zeroes
    /// behind the end of the image up to the virtual size. Between pieces it may hold anything.
    pub data: Bytes,
    /// What changed: ascending, disjoint, whole grains; never data of zeroes.
    pub pieces: Vec<Extent>,
}

impl Patch {
    /// The bytes of `piece`.
    ///
    /// # Panics
    /// When `piece` does not lie within the data.
    #[must_use]
    pub fn bytes(&self, piece: &Extent) -> Bytes {
        let index = |offset: u64| usize::try_from(offset - self.offset).expect("within a buffer");
        self.data.slice(index(piece.offset)..index(piece.end()))
    }
}

/// Takes what a layer holds, in any order and from several threads, and writes it once.
///
/// All offsets and lengths are multiples of [`grain`](Self::grain); only the end of the virtual
/// size may be ragged. Pieces that touch the same [`unit`](Self::unit) come in one call, so no unit
/// is touched by two. Dropping a writer without [`finish`](Self::finish) abandons the layer:
/// everything that was started on its behalf is gone when drop returns, the file is left for the
/// caller to remove.
pub trait LayerWriter: Sync {
    /// The smallest piece that this layer can hold without a copy of older data, in bytes: a power
    /// of two, at least 512.
    fn grain(&self) -> u64;

    /// What the layer stores in one go, in bytes: a power of two, at least the grain.
    fn unit(&self) -> u64;

    /// Whether a patch must hold the whole content of each unit of which it holds data, as
    /// compression needs it. Only the end of the virtual size cuts a unit short then.
    fn wants_whole_units(&self) -> bool;

    /// Takes a patch over, and returns what the layer will hold of it: its pieces, and whatever the
    /// layer chose to hold of the data besides; ascending and disjoint. May return before it is
    /// written, but blocks while too much is under way, and drops the data as soon as they are
    /// written.
    ///
    /// # Errors
    /// [`LayerError::Write`], also for what an earlier call handed over.
    fn write(&self, patch: Patch) -> Result<Vec<Extent>, LayerError>;

    /// Makes blocked and future calls of [`write`](Self::write) fail soon. Called when the run fails
    /// elsewhere.
    fn abort(&self);

    /// Waits until everything handed over is written, flushed and on stable storage, and lets go of
    /// the file. Called once, when no other call is under way.
    ///
    /// # Errors
    /// [`LayerError::Write`] for what could not be written, [`LayerError::Finish`] for a flush or
    /// sync that failed. Unless this returns `Ok`, the layer is not a restore point.
    fn finish(&self) -> Result<(), LayerError>;
}

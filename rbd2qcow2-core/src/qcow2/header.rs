//! The header of a qcow2 file: what it says, parsed from bytes that nobody vouches for, and written.
//!
//! Source of the format: `docs/interop/qcow2.txt` of QEMU. Where that text leaves a limit open, the
//! limit is the one that QEMU's own reader enforces, so that what is accepted here opens there.

use std::io::Read;
use std::path::Path;

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::open_regular;

mod encode;
mod error;
mod parse;

pub use error::HeaderError;

/// The first four bytes of every qcow2 file.
pub const MAGIC: u32 = 0x5146_49fb;

/// Longest backing file name, in bytes.
pub const BACKING_NAME_MAX: u32 = 1023;

/// Longest name of the backing file's format that QEMU opens, in bytes.
const BACKING_FORMAT_MAX: u32 = 15;

/// Length of the header extension that tells of bitmaps, in bytes.
const BITMAPS_LENGTH: u32 = 24;

/// The number of encryption by LUKS.
const LUKS: u32 = 2;

/// Largest L1 table that QEMU opens, in bytes.
pub const L1_TABLE_MAX: u64 = 32 << 20;

/// Largest refcount table that QEMU opens, in bytes.
pub const REFCOUNT_TABLE_MAX: u64 = 8 << 20;

/// Clusters must be this large to have subclusters: 32 of 512 bytes.
pub(crate) const EXTENDED_L2_MIN_BITS: u32 = 14;

/// Length of the version 2 header, in bytes.
const V2_LENGTH: usize = 72;

/// Length of the shortest version 3 header, in bytes.
const V3_LENGTH: usize = 104;

/// Where the compression type stands in a version 3 header that is long enough, in bytes.
const COMPRESSION_TYPE_OFFSET: usize = 104;

/// Bits of the incompatible features.
mod incompatible {
    pub const DIRTY: u64 = 1 << 0;
    pub const CORRUPT: u64 = 1 << 1;
    pub const EXTERNAL_DATA: u64 = 1 << 2;
    pub const COMPRESSION_TYPE: u64 = 1 << 3;
    pub const EXTENDED_L2: u64 = 1 << 4;
    pub const KNOWN: u64 = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION_TYPE | EXTENDED_L2;
}

/// Bit of the autoclear features: the external data file can be read without its header.
const AUTOCLEAR_RAW_DATA: u64 = 1 << 1;

/// Types of header extensions.
mod extension {
    pub const END: u32 = 0;
    pub const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub const BITMAPS: u32 = 0x2385_2875;
    pub const ENCRYPTION: u32 = 0x0537_be77;
}

/// The fields of version 2, which begin every version, as they stand in the file.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawV2 {
    magic: U32,
    version: U32,
    backing_file_offset: U64,
    backing_file_size: U32,
    cluster_bits: U32,
    size: U64,
    crypt_method: U32,
    l1_size: U32,
    l1_table_offset: U64,
    refcount_table_offset: U64,
    refcount_table_clusters: U32,
    nb_snapshots: U32,
    snapshots_offset: U64,
}

/// The fields that version 3 adds behind those of version 2.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawV3 {
    incompatible_features: U64,
    compatible_features: U64,
    autoclear_features: U64,
    refcount_order: U32,
    header_length: U32,
}

const _: () = assert!(size_of::<RawV2>() == V2_LENGTH);
const _: () = assert!(size_of::<RawV2>() + size_of::<RawV3>() == V3_LENGTH);

/// The version of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// `compat=0.10`.
    V2,
    /// `compat=1.1`.
    V3,
}

/// Base-2 logarithm of the cluster size: 9 to 21.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClusterBits(u32);

impl ClusterBits {
    /// Takes the logarithm; `None` outside 9 to 21.
    #[must_use]
    pub fn new(bits: u32) -> Option<Self> {
        (9..=21).contains(&bits).then_some(Self(bits))
    }

    /// Takes the size in bytes; `None` unless it is a power of two from 512 to 2 MiB.
    #[must_use]
    pub fn from_size(bytes: u64) -> Option<Self> {
        if bytes.is_power_of_two() { Self::new(bytes.ilog2()) } else { None }
    }

    /// The logarithm.
    #[must_use]
    pub fn bits(self) -> u32 {
        self.0
    }

    /// The cluster size in bytes.
    #[must_use]
    pub fn size(self) -> u64 {
        1 << self.0
    }
}

/// How compressed clusters of a file are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompressionType {
    /// Raw deflate.
    Zlib,
    /// Zstandard.
    Zstd,
}

/// How the clusters of a file are encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// Not at all.
    None,
    /// The method of old, insecure.
    Aes,
    /// LUKS.
    Luks,
}

/// The file below.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The name as it stands in the header: anything, up to a whole JSON description.
    pub name: String,
    /// The name of its format, if the header tells.
    pub format: Option<String>,
}

/// A table in a file: its place and length are known to lie within the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table {
    /// First byte, counted from the file's start: a multiple of the cluster size. 0 for no table.
    pub offset: u64,
    /// Number of entries of 8 bytes.
    pub entries: u64,
}

/// What a qcow2 header says, with every number within the limits of the format and every table
/// within the file.
///
/// Says nothing of the tables' contents. A file that must not be used as a restore point parses too:
/// see [`check_restore_point`](Self::check_restore_point).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Header {
    /// The version of the format.
    pub version: Version,
    /// The size of a cluster.
    pub cluster_bits: ClusterBits,
    /// What a guest sees, in bytes.
    pub virtual_size: u64,
    /// The file below; `None` for a file that stands alone.
    pub backing: Option<Backing>,
    /// Whether clusters are encrypted.
    pub encryption: Encryption,
    /// The L1 table: enough entries for the virtual size.
    pub l1_table: Table,
    /// The refcount table.
    pub refcount_table: Table,
    /// Base-2 logarithm of a refcount's width in bits: 0 to 6.
    pub refcount_order: u32,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// Refcounts may be wrong: a writer that postpones them was killed.
    pub dirty: bool,
    /// QEMU found the file damaged.
    pub corrupt: bool,
    /// Guest data lie in another file.
    pub external_data: bool,
    /// How compressed clusters are packed.
    pub compression_type: CompressionType,
    /// L2 entries take 16 bytes and clusters have 32 subclusters.
    pub extended_l2: bool,
    /// All compatible feature bits, which a reader may ignore.
    pub compatible_features: u64,
    /// All autoclear feature bits, which a writer that does not know them must clear.
    pub autoclear_features: u64,
    /// Length of the header without extensions, in bytes.
    pub header_length: u32,
}

impl Header {
    /// Reads the header of the file at `path`, and at most the first cluster of it. Blocks for that
    /// read only: a pipe or device at `path` is an error, and so is a symbolic link.
    ///
    /// # Errors
    /// [`HeaderError::Read`], [`HeaderError::NotARegularFile`], and those of
    /// [`parse`](Self::parse).
    pub fn read(path: &Path) -> Result<Self, HeaderError> {
        let (file, metadata) =
            open_regular(path).map_err(HeaderError::Read)?.ok_or(HeaderError::NotARegularFile)?;
        Self::read_from(&file, metadata.len())
    }

    /// Reads the header from the start of `file`, whose length is `file_bytes`. Reads at most one
    /// cluster.
    ///
    /// # Errors
    /// [`HeaderError::Read`], and those of [`parse`](Self::parse).
    pub fn read_from(mut file: impl Read, file_bytes: u64) -> Result<Self, HeaderError> {
        let mut prefix = Vec::new();
        file.by_ref().take(V3_LENGTH as u64).read_to_end(&mut prefix).map_err(HeaderError::Read)?;
        // All that the header names by offset lies in the first cluster; its size is known now.
        if let Ok((raw, _)) = RawV2::read_from_prefix(&prefix)
            && raw.magic == MAGIC
            && let Some(bits) = ClusterBits::new(raw.cluster_bits.get())
        {
            let rest = bits.size().saturating_sub(V3_LENGTH as u64);
            file.take(rest).read_to_end(&mut prefix).map_err(HeaderError::Read)?;
        }
        Self::parse(&prefix, file_bytes)
    }

    /// Checks that nothing in the header speaks against the file as a restore point.
    ///
    /// # Errors
    /// [`HeaderError::Unfit`] for a file that is marked dirty or corrupt, is encrypted, or keeps its
    /// data in another file.
    pub fn check_restore_point(&self) -> Result<(), HeaderError> {
        let reason = if self.corrupt {
            "QEMU marked it as corrupt"
        } else if self.dirty {
            "it is marked dirty, so a writer was killed or still writes"
        } else if self.external_data {
            "its data lie in another file"
        } else if self.encryption != Encryption::None {
            "it is encrypted"
        } else {
            return Ok(());
        };
        Err(HeaderError::Unfit { reason })
    }

    /// The backing file's name, known to name a qcow2 file in the same directory; `None` for a file
    /// that stands alone.
    ///
    /// # Errors
    /// [`HeaderError::ForeignBacking`] for a path, a protocol (`nbd:…`) or a description
    /// (`json:…`), [`HeaderError::BackingFormat`] where QEMU would not open it as qcow2.
    pub fn chain_backing(&self) -> Result<Option<&str>, HeaderError> {
        let Some(backing) = &self.backing else {
            return Ok(None);
        };
        let name = backing.name.as_str();
        // QEMU takes a ':' before the first '/' for a protocol; without '/', any ':' is.
        if name.contains(['/', ':']) || name == "." || name == ".." {
            return Err(HeaderError::ForeignBacking { name: name.to_owned() });
        }
        if backing.format.as_deref() != Some("qcow2") {
            return Err(HeaderError::BackingFormat { format: backing.format.clone() });
        }
        Ok(Some(name))
    }
}

#[cfg(test)]
mod tests;

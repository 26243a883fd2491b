//! The header of a qcow2 file, parsed from bytes that nobody vouches for.
//!
//! Source of the format: `docs/interop/qcow2.txt` of QEMU. Where that text leaves a limit open, the
//! limit is the one that QEMU's own reader enforces, so that what is accepted here opens there.

use std::io::Read;
use std::path::Path;

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::open_regular;

mod error;

pub use error::HeaderError;

/// The first four bytes of every qcow2 file.
pub const MAGIC: u32 = 0x5146_49fb;

/// Longest backing file name, in bytes.
pub const BACKING_NAME_MAX: u32 = 1023;

/// Largest L1 table that QEMU opens, in bytes.
pub const L1_TABLE_MAX: u64 = 32 << 20;

/// Largest refcount table that QEMU opens, in bytes.
pub const REFCOUNT_TABLE_MAX: u64 = 8 << 20;

/// Clusters must be this large to have subclusters: 32 of 512 bytes.
const EXTENDED_L2_MIN_BITS: u32 = 14;

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

/// Types of header extensions.
mod extension {
    pub const END: u32 = 0;
    pub const BACKING_FORMAT: u32 = 0xe279_2aca;
}

/// The fields of version 2, which begin every version, as they stand in the file.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
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
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
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

    /// Parses the header from `prefix`, the first bytes of a file of `file_bytes` bytes: the whole
    /// first cluster, or the whole file where that is shorter.
    ///
    /// # Errors
    /// Every [`HeaderError`] that is not about reading files or about the use as a restore point.
    pub fn parse(prefix: &[u8], file_bytes: u64) -> Result<Self, HeaderError> {
        let truncated = |needed| HeaderError::Truncated { what: "the header", needed, file_bytes };
        let (raw, _) = RawV2::read_from_prefix(prefix).map_err(|_| {
            if prefix.starts_with(&MAGIC.to_be_bytes()) {
                truncated(V2_LENGTH as u64)
            } else {
                HeaderError::NotQcow2
            }
        })?;
        if raw.magic != MAGIC {
            return Err(HeaderError::NotQcow2);
        }
        let version = match raw.version.get() {
            2 => Version::V2,
            3 => Version::V3,
            other => return Err(HeaderError::Version(other)),
        };
        let bits = raw.cluster_bits.get();
        let cluster_bits =
            ClusterBits::new(bits).ok_or(field("cluster_bits", bits, "9 to 21 (512 bytes to 2 MiB)"))?;
        let more = match version {
            Version::V2 => Features::of_v2(),
            Version::V3 => {
                let (raw, _) =
                    RawV3::read_from_prefix(&prefix[V2_LENGTH..]).map_err(|_| truncated(V3_LENGTH as u64))?;
                Features::validate(&raw, prefix, cluster_bits)?
            }
        };
        let first_cluster =
            &prefix[..prefix.len().min(usize::try_from(cluster_bits.size()).unwrap_or(usize::MAX))];
        Ok(Self {
            version,
            cluster_bits,
            virtual_size: raw.size.get(),
            backing: backing(&raw, first_cluster, more.header_length, file_bytes)?,
            encryption: encryption(raw.crypt_method.get())?,
            l1_table: l1_table(&raw, cluster_bits, more.has(incompatible::EXTENDED_L2), file_bytes)?,
            refcount_table: refcount_table(&raw, cluster_bits, file_bytes)?,
            refcount_order: more.refcount_order,
            snapshots: raw.nb_snapshots.get(),
            dirty: more.has(incompatible::DIRTY),
            corrupt: more.has(incompatible::CORRUPT),
            external_data: more.has(incompatible::EXTERNAL_DATA),
            compression_type: more.compression_type,
            extended_l2: more.has(incompatible::EXTENDED_L2),
            compatible_features: more.compatible,
            autoclear_features: more.autoclear,
            header_length: more.header_length,
        })
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

fn field(field: &'static str, value: impl Into<u64>, rule: &'static str) -> HeaderError {
    HeaderError::Field { field, value: value.into(), rule }
}

/// What version 3 adds, or what its absence means.
struct Features {
    incompatible: u64,
    compatible: u64,
    autoclear: u64,
    refcount_order: u32,
    header_length: u32,
    compression_type: CompressionType,
}

impl Features {
    fn of_v2() -> Self {
        Self {
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            refcount_order: 4,
            header_length: 72,
            compression_type: CompressionType::Zlib,
        }
    }

    fn validate(raw: &RawV3, prefix: &[u8], cluster_bits: ClusterBits) -> Result<Self, HeaderError> {
        let incompatible = raw.incompatible_features.get();
        let unknown = incompatible & !incompatible::KNOWN;
        if unknown != 0 {
            return Err(HeaderError::UnknownFeatures { bits: unknown });
        }
        if incompatible & incompatible::EXTENDED_L2 != 0 && cluster_bits.bits() < EXTENDED_L2_MIN_BITS {
            let rule = "subclusters need clusters of 16 KiB or more";
            return Err(field("cluster_bits", cluster_bits.bits(), rule));
        }
        let refcount_order = raw.refcount_order.get();
        if refcount_order > 6 {
            return Err(field("refcount_order", refcount_order, "at most 6"));
        }
        let header_length = raw.header_length.get();
        let length_fits = (V3_LENGTH as u64..=cluster_bits.size()).contains(&header_length.into());
        if !length_fits || !header_length.is_multiple_of(8) {
            return Err(field("header_length", header_length, "a multiple of 8, 104 to the cluster size"));
        }
        let stated = if header_length as usize > COMPRESSION_TYPE_OFFSET {
            *prefix.get(COMPRESSION_TYPE_OFFSET).ok_or(HeaderError::Truncated {
                what: "the header",
                needed: header_length.into(),
                file_bytes: prefix.len() as u64,
            })?
        } else {
            0
        };
        let compression_type = match (stated, incompatible & incompatible::COMPRESSION_TYPE != 0) {
            (0, false) => CompressionType::Zlib,
            (1, true) => CompressionType::Zstd,
            (0 | 1, _) => {
                return Err(field("compression_type", stated, "not 0 exactly when the feature bit is set"));
            }
            _ => return Err(field("compression_type", stated, "0 (zlib) or 1 (zstd)")),
        };
        Ok(Self {
            incompatible,
            compatible: raw.compatible_features.get(),
            autoclear: raw.autoclear_features.get(),
            refcount_order,
            header_length,
            compression_type,
        })
    }

    fn has(&self, bit: u64) -> bool {
        self.incompatible & bit != 0
    }
}

fn encryption(method: u32) -> Result<Encryption, HeaderError> {
    match method {
        0 => Ok(Encryption::None),
        1 => Ok(Encryption::Aes),
        2 => Ok(Encryption::Luks),
        other => Err(field("crypt_method", other, "0 (none), 1 (AES) or 2 (LUKS)")),
    }
}

fn l1_table(
    raw: &RawV2,
    cluster_bits: ClusterBits,
    extended_l2: bool,
    file_bytes: u64,
) -> Result<Table, HeaderError> {
    let entries = u64::from(raw.l1_size.get());
    if entries * 8 > L1_TABLE_MAX {
        return Err(field("l1_size", entries, "at most 32 MiB of entries"));
    }
    let l2_entries = cluster_bits.size() / if extended_l2 { 16 } else { 8 };
    // Cannot overflow: the largest cluster times the most entries is 2^39.
    let covered_by_one = cluster_bits.size() * l2_entries;
    if raw.size.get().div_ceil(covered_by_one) > entries {
        return Err(field("size", raw.size.get(), "no more than the L1 table covers"));
    }
    let table = Table { offset: raw.l1_table_offset.get(), entries };
    check_table("the L1 table", "l1_table_offset", table, cluster_bits, file_bytes)?;
    Ok(table)
}

fn refcount_table(raw: &RawV2, cluster_bits: ClusterBits, file_bytes: u64) -> Result<Table, HeaderError> {
    let clusters = u64::from(raw.refcount_table_clusters.get());
    let bytes = clusters * cluster_bits.size();
    if clusters == 0 || bytes > REFCOUNT_TABLE_MAX {
        return Err(field("refcount_table_clusters", clusters, "at least 1 cluster, at most 8 MiB"));
    }
    let table = Table { offset: raw.refcount_table_offset.get(), entries: bytes / 8 };
    check_table("the refcount table", "refcount_table_offset", table, cluster_bits, file_bytes)?;
    Ok(table)
}

/// Checks that `table` lies behind the header, at a cluster's start, and within the file.
fn check_table(
    what: &'static str,
    offset_field: &'static str,
    table: Table,
    cluster_bits: ClusterBits,
    file_bytes: u64,
) -> Result<(), HeaderError> {
    if table.entries == 0 {
        return Ok(());
    }
    if table.offset == 0 || !table.offset.is_multiple_of(cluster_bits.size()) {
        return Err(field(offset_field, table.offset, "a multiple of the cluster size, not 0"));
    }
    // Entries were limited before, so only the offset can be out of all bounds.
    let needed = table.offset.saturating_add(table.entries * 8);
    if needed > file_bytes {
        return Err(HeaderError::Truncated { what, needed, file_bytes });
    }
    Ok(())
}

/// Reads the backing file's name and, from the extensions, its format.
fn backing(
    raw: &RawV2,
    first_cluster: &[u8],
    header_length: u32,
    file_bytes: u64,
) -> Result<Option<Backing>, HeaderError> {
    let offset = raw.backing_file_offset.get();
    let length = raw.backing_file_size.get();
    // As in QEMU: without an offset or a length there is no backing file.
    let named = offset != 0 && length != 0;
    let mut extensions_end = first_cluster.len();
    let mut name = None;
    if named {
        if length > BACKING_NAME_MAX {
            return Err(field("backing_file_size", length, "at most 1023"));
        }
        if offset < u64::from(header_length) || offset > 1 << raw.cluster_bits.get() {
            return Err(field("backing_file_offset", offset, "behind the header, in the first cluster"));
        }
        let end = offset + u64::from(length);
        if end > 1 << raw.cluster_bits.get() {
            return Err(field("backing_file_size", length, "short enough for the first cluster"));
        }
        let what = "the backing file's name";
        // Both fit in usize: they lie in the first cluster.
        let (start, stop) = (usize::try_from(offset).unwrap_or(0), usize::try_from(end).unwrap_or(0));
        let bytes = first_cluster.get(start..stop);
        let bytes = bytes.ok_or(HeaderError::Truncated { what, needed: end, file_bytes })?;
        name = Some(text(bytes, "backing file name")?);
        extensions_end = start;
    }
    let extensions = first_cluster.get(header_length as usize..extensions_end).unwrap_or_default();
    let format = backing_format(extensions)?;
    Ok(name.map(|name| Backing { name, format }))
}

/// Walks the header extensions and returns what the one for the backing format says.
fn backing_format(mut rest: &[u8]) -> Result<Option<String>, HeaderError> {
    let mut format = None;
    while let Ok((kind, after)) = U32::read_from_prefix(rest) {
        if kind == extension::END {
            break;
        }
        let cut_off = |length: u64| field("extension length", length, "short enough for the first cluster");
        let (length, after) = U32::read_from_prefix(after).map_err(|_| cut_off(0))?;
        let data = after.get(..length.get() as usize).ok_or_else(|| cut_off(length.get().into()))?;
        // All others may be ignored, says the format. (That there is an external data file is told by
        // an incompatible feature, too.)
        if kind == extension::BACKING_FORMAT {
            format = Some(text(data, "backing format")?);
        }
        // Data are padded to 8 bytes; the padding of the last one may be missing.
        rest = after.get(data.len().next_multiple_of(8)..).unwrap_or_default();
    }
    Ok(format)
}

fn text(bytes: &[u8], what: &'static str) -> Result<String, HeaderError> {
    let text = std::str::from_utf8(bytes).map_err(|_| HeaderError::NotText(what))?;
    if text.contains('\0') { Err(HeaderError::NotText(what)) } else { Ok(text.to_owned()) }
}

#[cfg(test)]
mod tests;

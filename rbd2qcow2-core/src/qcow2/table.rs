//! The entries of the L1 and L2 tables, taken from numbers that nobody vouches for.
//!
//! Source of the format: `docs/interop/qcow2` of QEMU, "Cluster mapping" and "Extended L2 Entries".
//! Every constructor checks all that can be told from the entry, the header and the file's length.

use std::fmt;
use std::ops::Range;

use super::header::{CompressionType, Header, Version};

/// Subclusters of a cluster, where L2 entries are extended.
pub const SUBCLUSTERS: u64 = 32;

/// What the size of compressed data is counted in, bytes.
const COMPRESSED_SECTOR: u64 = 512;

/// Bits 9 to 55: an offset in the file.
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// Bit 63: the refcount is one. For writers only.
pub(super) const COPIED: u64 = 1 << 63;

/// Bit 62 of an L2 entry: the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;

/// Bit 0 of an L2 entry of version 3: the cluster reads as zeroes.
const ZERO: u64 = 1;

/// A place in the image as the guest sees it, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct GuestOffset(pub u64);

/// A place in the qcow2 file, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostOffset(pub u64);

impl fmt::Display for GuestOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for HostOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// What is wrong with an entry of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EntryFault {
    /// Bits that the format reserves are set.
    #[error("reserved bits {0:#x} are set")]
    Reserved(u64),
    /// The offset is none of a cluster.
    #[error("it points to {0} of the file, which is not the start of a cluster")]
    Misaligned(HostOffset),
    /// The offset, or what must be there, lies behind the file's end.
    #[error("it points to {host} of the file, which ends at {file_bytes:#x}")]
    OutsideFile {
        /// The offset.
        host: HostOffset,
        /// Length of the file.
        file_bytes: u64,
    },
    /// What it points to overlaps a table that the header names, or the header.
    #[error("it points to {0} of the file, where the header or one of its tables lies")]
    Overlap(HostOffset),
    /// Version 2 has no zero clusters.
    #[error("it is a zero cluster, which version 2 does not have")]
    ZeroInV2,
    /// With extended entries, the bitmap says what is zero.
    #[error("it has the zero bit of a standard entry, but entries are extended")]
    ZeroInExtended,
    /// Subclusters are said to be allocated and zero at once.
    #[error("subclusters are both allocated and zero (bitmap {0:#018x})")]
    AllocatedAndZero(u64),
    /// Subclusters are said to be allocated, but nowhere.
    #[error("subclusters are allocated, but the cluster has no offset (bitmap {0:#018x})")]
    AllocatedNowhere(u64),
    /// Compressed clusters have no subclusters.
    #[error("the cluster is compressed, but has subclusters (bitmap {0:#018x})")]
    CompressedSubclusters(u64),
}

/// The numbers of a file that give its entries their meaning.
#[derive(Clone, Debug)]
pub struct Geometry {
    /// The version of the format.
    pub version: Version,
    /// Base-2 logarithm of the cluster size: 9 to 21.
    pub cluster_bits: u32,
    /// Whether L2 entries take 16 bytes.
    pub extended_l2: bool,
    /// How compressed clusters are packed.
    pub compression_type: CompressionType,
    /// Length of the file, in bytes.
    pub file_bytes: u64,
    /// Where the header and the tables that it names lie: nothing else may.
    occupied: [Range<u64>; 3],
}

impl Geometry {
    /// Takes the numbers from `header`, of a file of `file_bytes` bytes.
    #[must_use]
    pub fn new(header: &Header, file_bytes: u64) -> Self {
        // The header was checked to keep all of these within the file.
        let range = |table: &super::header::Table| table.offset..table.offset + table.entries * 8;
        Self {
            version: header.version,
            cluster_bits: header.cluster_bits.bits(),
            extended_l2: header.extended_l2,
            compression_type: header.compression_type,
            file_bytes,
            occupied: [0..header.cluster_bits.size(), range(&header.l1_table), range(&header.refcount_table)],
        }
    }

    /// The size of a cluster, in bytes.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The size of an L2 entry, in bytes: 8 or 16.
    #[must_use]
    pub fn l2_entry_bytes(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// How much of the guest's image one L2 table, so one L1 entry, describes, in bytes: at most
    /// 2^39.
    #[must_use]
    pub fn l2_coverage(&self) -> u64 {
        self.cluster_size() / self.l2_entry_bytes() * self.cluster_size()
    }

    /// Checks the place of a table (`whole`: it must end in the file, too) or of a data cluster. The
    /// file may end within the last of the latter.
    fn check_place(&self, host: HostOffset, whole: bool) -> Result<(), EntryFault> {
        if !host.0.is_multiple_of(self.cluster_size()) {
            return Err(EntryFault::Misaligned(host));
        }
        // Cannot overflow: entries hold offsets of 56 bits.
        let end = host.0 + self.cluster_size();
        if host.0 >= self.file_bytes || (whole && end > self.file_bytes) {
            return Err(EntryFault::OutsideFile { host, file_bytes: self.file_bytes });
        }
        self.check_free(host, end)
    }

    fn check_free(&self, host: HostOffset, end: u64) -> Result<(), EntryFault> {
        if self.occupied.iter().any(|range| host.0 < range.end && range.start < end) {
            return Err(EntryFault::Overlap(host));
        }
        Ok(())
    }
}

/// An entry of the L1 table: where an L2 table lies, wholly within the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L1Entry {
    /// The L2 table; `None` where the layer holds nothing.
    pub table: Option<HostOffset>,
}

impl L1Entry {
    /// Checks the entry `raw`.
    ///
    /// # Errors
    /// [`EntryFault::Reserved`], and those about the table's place.
    pub fn new(raw: u64, geometry: &Geometry) -> Result<Self, EntryFault> {
        let reserved = raw & !(OFFSET_MASK | COPIED);
        if reserved != 0 {
            return Err(EntryFault::Reserved(reserved));
        }
        let host = HostOffset(raw & OFFSET_MASK);
        if host.0 == 0 {
            return Ok(Self { table: None });
        }
        geometry.check_place(host, true)?;
        Ok(Self { table: Some(host) })
    }

    /// The entry as it stands in a file where nothing is shared.
    #[must_use]
    pub fn encode(self) -> u64 {
        self.table.map_or(0, |host| host.0 | COPIED)
    }
}

/// Where compressed data lie. They need not be aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompressedCluster {
    /// First byte: within the file.
    pub host: HostOffset,
    /// Most bytes that the data take, from 1 to two clusters. The size is known in sectors only, so
    /// what follows the data may be anything. Ends within the file.
    pub bytes: u64,
}

impl CompressedCluster {
    /// Takes apart the lower 62 bits of a descriptor: the offset in the lower ones, above them the
    /// number of sectors of 512 bytes behind the one in which the data begin.
    fn new(raw: u64, geometry: &Geometry) -> Result<Self, EntryFault> {
        let offset_bits = 62 - (geometry.cluster_bits - 8);
        let host = HostOffset(raw & ((1 << offset_bits) - 1));
        let sectors = ((raw & (COMPRESSED - 1)) >> offset_bits) + 1;
        if host.0 >> 56 != 0 {
            return Err(EntryFault::Reserved(host.0 >> 56 << 56));
        }
        if host.0 >= geometry.file_bytes {
            return Err(EntryFault::OutsideFile { host, file_bytes: geometry.file_bytes });
        }
        let end = host.0 - host.0 % COMPRESSED_SECTOR + sectors * COMPRESSED_SECTOR;
        // QEMU does not fill up the last sector of the file. Nor is it a fault if slack that was
        // never used reaches into something else, so only the first byte is compared.
        geometry.check_free(host, host.0 + 1)?;
        Ok(Self { host, bytes: end.min(geometry.file_bytes) - host.0 })
    }

    fn encode(self, cluster_bits: u32) -> u64 {
        let offset_bits = 62 - (cluster_bits - 8);
        let last = self.host.0 + self.bytes - 1;
        let sectors = last / COMPRESSED_SECTOR - self.host.0 / COMPRESSED_SECTOR;
        COMPRESSED | sectors << offset_bits | self.host.0
    }
}

/// Which subclusters of a cluster are allocated, and which are zero: never both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Subclusters {
    allocated: u32,
    zero: u32,
}

/// What a subcluster, or a whole cluster, is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubclusterKind {
    /// Data of the cluster in the file.
    Data,
    /// Zeroes.
    Zero,
    /// Left to the layers below.
    Absent,
}

impl Subclusters {
    /// The subclusters whose bits are set in `allocated` and in `zero`, the first in the lowest bit.
    /// `None` where a subcluster is in both.
    #[must_use]
    pub fn from_bits(allocated: u32, zero: u32) -> Option<Self> {
        (allocated & zero == 0).then_some(Self { allocated, zero })
    }

    /// Makes the subcluster `index`, below 32, what is said.
    pub fn set(&mut self, index: u64, kind: SubclusterKind) {
        let bit = 1_u32 << (index % SUBCLUSTERS);
        (self.allocated, self.zero) = (self.allocated & !bit, self.zero & !bit);
        match kind {
            SubclusterKind::Data => self.allocated |= bit,
            SubclusterKind::Zero => self.zero |= bit,
            SubclusterKind::Absent => {}
        }
    }

    /// How many subclusters are data.
    #[must_use]
    pub fn data_count(self) -> u64 {
        self.allocated.count_ones().into()
    }

    /// The runs of subclusters that are alike, ascending, by their numbers.
    pub fn runs(self) -> impl Iterator<Item = (Range<u64>, SubclusterKind)> {
        let mut next = 0;
        std::iter::from_fn(move || {
            let (start, kind) = (next, self.kind(next));
            next = (start..SUBCLUSTERS).find(|&index| self.kind(index) != kind).unwrap_or(SUBCLUSTERS);
            (start < SUBCLUSTERS).then_some((start..next, kind))
        })
    }

    /// The bitmap as it stands in an extended entry.
    fn bitmap(self) -> u64 {
        u64::from(self.zero) << 32 | u64::from(self.allocated)
    }

    /// Takes apart a subcluster bitmap; `has_offset` tells whether the cluster has a place.
    fn new(bitmap: u64, has_offset: bool) -> Result<Self, EntryFault> {
        #[allow(clippy::cast_possible_truncation, reason = "each half is what is asked for")]
        let (allocated, zero) = (bitmap as u32, (bitmap >> 32) as u32);
        if allocated & zero != 0 {
            return Err(EntryFault::AllocatedAndZero(bitmap));
        }
        if allocated != 0 && !has_offset {
            return Err(EntryFault::AllocatedNowhere(bitmap));
        }
        Ok(Self { allocated, zero })
    }

    /// What the subcluster `index`, below 32, is.
    #[must_use]
    pub fn kind(self, index: u64) -> SubclusterKind {
        let bit = 1_u32 << (index % SUBCLUSTERS);
        if self.allocated & bit != 0 {
            SubclusterKind::Data
        } else if self.zero & bit != 0 {
            SubclusterKind::Zero
        } else {
            SubclusterKind::Absent
        }
    }
}

/// An entry of an L2 table: what a cluster of the guest's image is. Places begin within the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L2Entry {
    /// Left to the layers below.
    Absent,
    /// Zeroes, whatever the layers below hold.
    Zero,
    /// Data. Where the file ends within the cluster, zeroes follow.
    Data(HostOffset),
    /// Of each subcluster its own. The offset is that of the whole cluster, 0 if none is data.
    Subclusters(HostOffset, Subclusters),
    /// Compressed data.
    Compressed(CompressedCluster),
}

impl L2Entry {
    /// Checks the entry `raw`, whose second half, of an extended entry, is `bitmap`.
    ///
    /// # Errors
    /// Every [`EntryFault`].
    pub fn new(raw: u64, bitmap: u64, geometry: &Geometry) -> Result<Self, EntryFault> {
        if raw & COMPRESSED != 0 {
            if geometry.extended_l2 && bitmap != 0 {
                return Err(EntryFault::CompressedSubclusters(bitmap));
            }
            return Ok(Self::Compressed(CompressedCluster::new(raw, geometry)?));
        }
        let reserved = raw & !(OFFSET_MASK | COPIED | ZERO);
        if reserved != 0 {
            return Err(EntryFault::Reserved(reserved));
        }
        let zero = raw & ZERO != 0;
        if zero && geometry.version == Version::V2 {
            return Err(EntryFault::ZeroInV2);
        }
        if zero && geometry.extended_l2 {
            return Err(EntryFault::ZeroInExtended);
        }
        let host = HostOffset(raw & OFFSET_MASK);
        if host.0 != 0 {
            // Also of a zero cluster, which may keep its place for later.
            geometry.check_place(host, false)?;
        }
        Ok(match (geometry.extended_l2, zero, host.0) {
            (true, ..) => Self::Subclusters(host, Subclusters::new(bitmap, host.0 != 0)?),
            (false, true, _) => Self::Zero,
            (false, false, 0) => Self::Absent,
            (false, false, _) => Self::Data(host),
        })
    }

    /// The entry and, for an extended one, its bitmap, as they stand in a file of clusters of
    /// 2^`cluster_bits` bytes where nothing but compressed data share a cluster. The inverse of
    /// [`new`](Self::new), but for the sizes of compressed data, which are counted in sectors.
    ///
    /// # Panics
    /// For subclusters in a file without extended entries.
    #[must_use]
    pub fn encode(self, cluster_bits: u32, extended_l2: bool) -> (u64, u64) {
        const ALL: u64 = u32::MAX as u64;
        match self {
            Self::Absent => (0, 0),
            Self::Zero if extended_l2 => (0, ALL << 32),
            Self::Zero => (ZERO, 0),
            Self::Data(host) => (host.0 | COPIED, if extended_l2 { ALL } else { 0 }),
            Self::Subclusters(host, subclusters) => {
                assert!(extended_l2, "only extended entries have subclusters");
                (if host.0 == 0 { 0 } else { host.0 | COPIED }, subclusters.bitmap())
            }
            Self::Compressed(cluster) => (cluster.encode(cluster_bits), 0),
        }
    }
}

#[cfg(test)]
mod tests;

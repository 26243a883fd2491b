//! The entries of the refcount table and the refcount blocks, taken from bytes that nobody vouches for.
//!
//! Source of the format: `docs/interop/qcow2` of QEMU, "Host cluster management". The refcount table
//! lies in one piece and names refcount blocks of one cluster each, and these hold a number of
//! `refcount_bits` for every cluster of the file, in order.

use super::header::Header;
use super::table::{EntryFault, Geometry, HostOffset, L1Entry};

/// The size of an entry of the refcount table, in bytes.
pub const TABLE_ENTRY_BYTES: u64 = 8;

/// Where the offsets of table entries end that can be checked as those of the L1 table are, in bits.
/// Behind it no file reaches.
const OFFSET_BITS: u32 = 56;

/// How many bits a refcount takes: 1, 2, 4, 8, 16, 32 or 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefcountWidth {
    /// Base-2 logarithm of the number of bits: 0 to 6.
    order: u32,
}

impl RefcountWidth {
    /// Takes the base-2 logarithm of the number of bits, which is what headers state; `None` above 6.
    #[must_use]
    pub fn new(order: u32) -> Option<Self> {
        (order <= 6).then_some(Self { order })
    }

    /// The width that `header` states.
    #[must_use]
    pub fn of(header: &Header) -> Self {
        // Headers come to exist only with an order up to 6.
        Self { order: header.refcount_order.min(6) }
    }

    /// The width in bits: 1 to 64.
    #[must_use]
    pub fn bits(self) -> u32 {
        1 << self.order
    }

    /// The largest refcount.
    #[must_use]
    pub fn max(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    /// How many clusters a refcount block of `cluster_size` bytes describes, so one entry of the
    /// refcount table: 64 to 2^24.
    #[must_use]
    pub fn per_block(self, cluster_size: u64) -> u64 {
        (cluster_size * 8) >> self.order
    }
}

/// An entry of the refcount table: where a refcount block lies, wholly within the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefcountEntry {
    /// The refcount block; `None` where the refcounts of all clusters that it would describe are 0.
    pub block: Option<HostOffset>,
}

impl RefcountEntry {
    /// Checks the entry `raw`: bits 0 to 8 are reserved, the others are the offset.
    ///
    /// # Errors
    /// [`EntryFault::Reserved`], [`EntryFault::Misaligned`], [`EntryFault::OutsideFile`] also for a
    /// block that the file's end cuts off, [`EntryFault::Overlap`] for a block on the header, the L1
    /// table or the refcount table.
    pub fn new(raw: u64, geometry: &Geometry) -> Result<Self, EntryFault> {
        if raw >> OFFSET_BITS != 0 {
            let host = HostOffset(raw & !0x1ff);
            return Err(EntryFault::OutsideFile { host, file_bytes: geometry.file_bytes });
        }
        // What is left must be the place of a table, with the same bits reserved below it.
        Ok(Self { block: L1Entry::new(raw, geometry)?.table })
    }

    /// The number that stands for the entry in a file.
    #[must_use]
    pub fn to_raw(self) -> u64 {
        self.block.map_or(0, |block| block.0)
    }
}

/// The bytes of a refcount block, or of a part of one that begins at a byte. Every content is valid.
#[derive(Clone, Copy, Debug)]
pub struct Refcounts<'a> {
    width: RefcountWidth,
    bytes: &'a [u8],
}

impl<'a> Refcounts<'a> {
    /// Takes `bytes` for refcounts of the given width. A rest that is too short for one is left out.
    #[must_use]
    pub fn new(width: RefcountWidth, bytes: &'a [u8]) -> Self {
        Self { width, bytes }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        match self.width.order {
            order @ 0..3 => self.bytes.len() << (3 - order),
            order => self.bytes.len() >> (order - 3),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The refcount `index`, counted from the first byte on; `None` behind the last one. Those of less
    /// than a byte are packed from the lowest bit of a byte on, the others are big-endian.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<u64> {
        let order = self.width.order;
        if order < 3 {
            let (at, shift) = within_byte(index, order);
            return Some(u64::from(*self.bytes.get(at)? >> shift) & self.width.max());
        }
        let length = 1 << (order - 3);
        let start = index.checked_mul(length)?;
        let bytes = self.bytes.get(start..start.checked_add(length)?)?;
        Some(bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        (0..self.len()).map_while(|index| self.get(index))
    }
}

/// Sets the refcount `index` within `bytes`, which are those of a refcount block: see
/// [`Refcounts::get`]. Returns whether `bytes` reach there and `refcount` fits; else nothing is
/// changed.
#[must_use]
pub fn put(bytes: &mut [u8], width: RefcountWidth, index: usize, refcount: u64) -> bool {
    if refcount > width.max() || Refcounts::new(width, bytes).get(index).is_none() {
        return false;
    }
    let order = width.order;
    let big_endian = refcount.to_be_bytes();
    if order < 3 {
        let (at, shift) = within_byte(index, order);
        let mask = width.max().to_be_bytes()[7] << shift;
        bytes[at] = bytes[at] & !mask | big_endian[7] << shift;
    } else {
        let length = 1 << (order - 3);
        bytes[index * length..][..length].copy_from_slice(&big_endian[8 - length..]);
    }
    true
}

/// The byte in which the refcount `index` of less than 8 bits stands, and how far it is shifted there.
fn within_byte(index: usize, order: u32) -> (usize, usize) {
    let per_byte_order = 3 - order;
    (index >> per_byte_order, (index & ((1 << per_byte_order) - 1)) << order)
}

#[cfg(test)]
mod tests;

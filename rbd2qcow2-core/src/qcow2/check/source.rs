//! Reading tables and refcounts from one end to the other.

use std::ops::Range;

use super::CheckError;
use crate::cancel::Cancel;
use crate::qcow2::layer::LayerReader;
use crate::qcow2::refcount::{RefcountEntry, RefcountWidth, Refcounts, TABLE_ENTRY_BYTES};
use crate::qcow2::table::HostOffset;

/// What is read at once, in bytes. A multiple of the size of every kind of entry.
const CHUNK_BYTES: u64 = 64 << 10;

/// What the file says of the refcounts of a row of clusters.
#[derive(Clone, Copy, Debug)]
pub(super) enum Stored<'a> {
    /// All are 0: there is no block for them.
    Zero,
    /// The entry that should lead to their block is invalid.
    Unknown,
    /// One for each cluster.
    Counts(Refcounts<'a>),
}

/// Where everything is read from.
#[derive(Clone, Copy, Debug)]
pub(in crate::qcow2) struct Source<'a> {
    pub(in crate::qcow2) layer: &'a LayerReader,
    pub(in crate::qcow2) cancel: &'a Cancel,
}

impl Source<'_> {
    /// Reads `bytes` bytes, which lie within the file, from `host` on, and hands them over piece by
    /// piece, each with its place counted from `host`.
    pub(in crate::qcow2) fn pieces(
        self,
        host: u64,
        bytes: u64,
        mut take: impl FnMut(u64, &[u8]) -> Result<(), CheckError>,
    ) -> Result<(), CheckError> {
        let in_memory = |bytes: u64| usize::try_from(bytes).expect("at most a chunk");
        let mut buf = vec![0; in_memory(bytes.min(CHUNK_BYTES))];
        let mut done = 0;
        while done < bytes {
            if self.cancel.is_set() {
                return Err(CheckError::Cancelled);
            }
            let piece = &mut buf[..in_memory((bytes - done).min(CHUNK_BYTES))];
            self.layer.read_exact(HostOffset(host + done), piece)?;
            take(done, piece)?;
            done += piece.len() as u64;
        }
        Ok(())
    }

    /// Hands over `count` numbers of 8 bytes from `host` on, each with its index.
    pub(in crate::qcow2) fn numbers(
        self,
        host: u64,
        count: u64,
        mut take: impl FnMut(u64, u64) -> Result<(), CheckError>,
    ) -> Result<(), CheckError> {
        self.pieces(host, count * 8, |done, bytes| {
            let (numbers, _) = bytes.as_chunks();
            (done / 8..).zip(numbers).try_for_each(|(index, number)| take(index, u64::from_be_bytes(*number)))
        })
    }

    /// The width of the file's refcounts.
    pub(super) fn width(self) -> RefcountWidth {
        RefcountWidth::of(self.layer.header())
    }

    /// How many clusters one entry of the refcount table describes.
    pub(super) fn per_block(self) -> u64 {
        self.width().per_block(self.layer.geometry().cluster_size())
    }

    /// Hands over what the file says of the refcounts of `range`, which begins at a multiple of 8:
    /// ascending and without a gap. Reads no more of the refcount blocks than describes `range`, so
    /// how much is read depends on the range and not on what the tables claim.
    pub(super) fn stored(
        self,
        range: Range<u64>,
        mut take: impl FnMut(Range<u64>, Stored<'_>),
    ) -> Result<(), CheckError> {
        let (per_block, width) = (self.per_block(), self.width());
        let bits = u64::from(width.bits());
        let table = self.layer.header().refcount_table;
        let first = range.start / per_block;
        let behind = range.end.div_ceil(per_block).min(table.entries);
        let mut told = range.start;
        let host = table.offset + first * TABLE_ENTRY_BYTES;
        self.numbers(host, behind.saturating_sub(first), |index, raw| {
            let described = (first + index) * per_block;
            let clusters = described.max(range.start)..(described + per_block).min(range.end);
            told = clusters.end;
            let block = match RefcountEntry::new(raw, self.layer.geometry()) {
                Ok(RefcountEntry { block: Some(block) }) => block,
                Ok(RefcountEntry { block: None }) => {
                    take(clusters, Stored::Zero);
                    return Ok(());
                }
                Err(_) => {
                    take(clusters, Stored::Unknown);
                    return Ok(());
                }
            };
            let skipped = (clusters.start - described) * bits / 8;
            let length = ((clusters.end - clusters.start) * bits).div_ceil(8);
            self.pieces(block.0 + skipped, length, |done, bytes| {
                let counts = Refcounts::new(width, bytes);
                let start = clusters.start + done * 8 / bits;
                take(start..(start + counts.len() as u64).min(clusters.end), Stored::Counts(counts));
                Ok(())
            })
        })?;
        if told < range.end {
            take(told..range.end, Stored::Zero);
        }
        Ok(())
    }
}

//! How often each cluster of the file is used.
//!
//! Once, but for those that hold compressed data, and for the rest of a run of clusters that were
//! taken for such data and not used up. A refcount block is written when nothing more can be packed
//! into the clusters that it counts; those without any compressed data come in the end, all alike.

use std::collections::BTreeMap;
use std::ops::Range;

use super::{Qcow2Writer, WriteError, index};
use crate::qcow2::header::{ClusterBits, Table};
use crate::qcow2::table::HostOffset;

/// Base-2 logarithm of a refcount's bits: QEMU's default, which every reader knows.
pub(super) const ORDER: u32 = 4;

/// Most pieces of packed data that share a cluster: what [`check`](crate::qcow2::check) counts to.
/// Only clusters of 2 MiB could hold more, and only in theory.
const MOST_PACKED: u16 = 0x7ffe;

/// Clusters that a refcount block counts.
pub(super) fn per_block(cluster_bits: ClusterBits) -> u64 {
    (cluster_bits.size() * 8) >> ORDER
}

#[derive(Debug)]
pub(super) struct Refcounts {
    cluster_bits: ClusterBits,
    /// Blocks that cannot be written yet, by number: the refcount of each cluster.
    open: BTreeMap<u64, Vec<u16>>,
    /// Where blocks lie that were written.
    written: BTreeMap<u64, HostOffset>,
}

impl Refcounts {
    pub(super) fn new(cluster_bits: ClusterBits) -> Self {
        Self { cluster_bits, open: BTreeMap::new(), written: BTreeMap::new() }
    }

    fn count(&mut self, cluster: u64) -> &mut u16 {
        let entries = per_block(self.cluster_bits);
        let block = self.open.entry(cluster / entries).or_insert_with(|| vec![1; index(entries)]);
        &mut block[index(cluster % entries)]
    }

    /// The clusters in these bytes of the file are for packed data, and hold none yet.
    pub(super) fn begin_packed(&mut self, bytes: Range<u64>) {
        self.fill(bytes, 0);
    }

    /// The clusters in these bytes of the file, which hold no packed data, will not.
    pub(super) fn end_packed(&mut self, bytes: Range<u64>) {
        self.fill(bytes, 1);
    }

    fn fill(&mut self, bytes: Range<u64>, count: u16) {
        for cluster in bytes.start >> self.cluster_bits.bits()..bytes.end >> self.cluster_bits.bits() {
            *self.count(cluster) = count;
        }
    }

    /// Whether one more piece of packed data can be counted for these bytes, which are not empty.
    pub(super) fn can_add(&mut self, bytes: &Range<u64>) -> bool {
        self.clusters(bytes).all(|cluster| *self.count(cluster) < MOST_PACKED)
    }

    /// Counts a piece of packed data in these bytes, which are not empty.
    pub(super) fn add_packed(&mut self, bytes: &Range<u64>) {
        for cluster in self.clusters(bytes) {
            *self.count(cluster) += 1;
        }
    }

    fn clusters(&self, bytes: &Range<u64>) -> std::ops::RangeInclusive<u64> {
        let bits = self.cluster_bits.bits();
        bytes.start >> bits..=(bytes.end - 1) >> bits
    }

    /// Writes the blocks of all clusters before `host`: nothing more is packed there, and all of them
    /// are taken.
    pub(super) fn write_before(&mut self, host: HostOffset, file: &Qcow2Writer) -> Result<(), WriteError> {
        let block = (host.0 >> self.cluster_bits.bits()) / per_block(self.cluster_bits);
        while let Some(entry) = self.open.first_entry()
            && *entry.key() < block
        {
            let (number, counts) = entry.remove_entry();
            let host = file.space.take(1)?;
            write_block(host, &counts, file)?;
            self.written.insert(number, host);
        }
        Ok(())
    }

    /// Writes all blocks that are left, and the table. Nothing else may be taken from the file's space
    /// meanwhile, or later.
    pub(super) fn finish(&mut self, file: &Qcow2Writer) -> Result<Table, WriteError> {
        let (entries, cluster_size) = (per_block(self.cluster_bits), self.cluster_bits.size());
        let used = file.space.clusters();
        let (mut blocks, mut table_clusters) = (0, 0);
        // Blocks and table are counted themselves.
        let total = loop {
            let total = used + (blocks - self.written.len().min(index(blocks)) as u64) + table_clusters;
            let needed = (total.div_ceil(entries), (total.div_ceil(entries) * 8).div_ceil(cluster_size));
            if needed == (blocks, table_clusters) {
                break total;
            }
            (blocks, table_clusters) = needed;
        };
        for number in 0..blocks {
            if self.written.contains_key(&number) {
                continue;
            }
            let mut counts = self.open.remove(&number).unwrap_or_else(|| vec![1; index(entries)]);
            let taken = total.saturating_sub(number * entries).min(entries);
            counts[index(taken)..].fill(0);
            let host = file.space.take(1)?;
            write_block(host, &counts, file)?;
            self.written.insert(number, host);
        }
        let host = file.space.take(table_clusters)?;
        debug_assert_eq!(file.space.clusters(), total, "all clusters are counted");
        let table: Vec<u64> = self.written.values().map(|host| host.0).collect();
        file.write_table(host, &table)?;
        Ok(Table { offset: host.0, entries: table_clusters * cluster_size / 8 })
    }
}

fn write_block(host: HostOffset, counts: &[u16], file: &Qcow2Writer) -> Result<(), WriteError> {
    let mut bytes = file.scratch(counts.len() * 2)?;
    for (bytes, count) in bytes.as_chunks_mut().0.iter_mut().zip(counts) {
        *bytes = count.to_be_bytes();
    }
    file.write_sparse(host, &bytes)
}

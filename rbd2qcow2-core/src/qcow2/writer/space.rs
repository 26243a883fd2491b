//! Room in the file, handed out by counting up.

use std::sync::atomic::{AtomicU64, Ordering};

use super::WriteError;
use super::refcounts;
use crate::qcow2::header::{ClusterBits, REFCOUNT_TABLE_MAX};
use crate::qcow2::table::HostOffset;

/// Offsets in entries have 56 bits.
const LARGEST_OFFSET: u64 = 1 << 56;

/// Where the next cluster goes.
#[derive(Debug)]
pub(super) struct Space {
    cluster_bits: ClusterBits,
    /// Clusters so far.
    next: AtomicU64,
    /// Most clusters.
    limit: u64,
}

impl Space {
    pub(super) fn new(cluster_bits: ClusterBits) -> Self {
        let bits = cluster_bits.bits();
        // The refcount table must stay within what QEMU opens, with room to spare for itself; and
        // compressed clusters have fewer bits for their offset than others.
        let counted = (REFCOUNT_TABLE_MAX / 8) * refcounts::per_block(cluster_bits);
        let compressed = 1_u64 << (62 - (bits - 8));
        let limit = counted.min(LARGEST_OFFSET.min(compressed) >> bits);
        Self { cluster_bits, next: AtomicU64::new(0), limit }
    }

    /// Takes `count` clusters that lie one behind the other.
    pub(super) fn take(&self, count: u64) -> Result<HostOffset, WriteError> {
        let first = self.next.fetch_add(count, Ordering::Relaxed);
        if first + count > self.limit {
            return Err(self.too_large());
        }
        Ok(HostOffset(first << self.cluster_bits.bits()))
    }

    /// Takes `count` clusters behind `end`, unless that is taken.
    pub(super) fn extend(&self, end: HostOffset, count: u64) -> Result<bool, WriteError> {
        let first = end.0 >> self.cluster_bits.bits();
        if first + count > self.limit {
            return Err(self.too_large());
        }
        let taken = self.next.compare_exchange(first, first + count, Ordering::Relaxed, Ordering::Relaxed);
        Ok(taken.is_ok())
    }

    /// Takes back what lies from `start` to `end`, unless what is behind it is taken.
    pub(super) fn give_back(&self, start: HostOffset, end: HostOffset) -> bool {
        let bits = self.cluster_bits.bits();
        let (start, end) = (start.0 >> bits, end.0 >> bits);
        self.next.compare_exchange(end, start, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// Clusters that were taken.
    pub(super) fn clusters(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    /// Where the last of them ends, in bytes.
    pub(super) fn end(&self) -> u64 {
        self.clusters() << self.cluster_bits.bits()
    }

    fn too_large(&self) -> WriteError {
        WriteError::FileTooLarge { limit: self.limit << self.cluster_bits.bits() }
    }
}

//! Which clusters of a file are in use.

use std::ops::Range;

use super::AbsorbError;
use crate::cancel::Cancel;
use crate::qcow2::check::CheckError;
use crate::qcow2::check::source::Source;
use crate::qcow2::error::ReadError;
use crate::qcow2::layer::LayerReader;
use crate::qcow2::refcount::RefcountEntry;
use crate::qcow2::table::{GuestOffset, HostOffset, L1Entry, L2Entry, OFFSET_MASK};

/// A bit for each cluster of a file.
#[derive(Debug, Default)]
struct Bits(Vec<u64>);

impl Bits {
    /// Sets a bit, and tells whether it was set.
    fn set(&mut self, cluster: u64) -> bool {
        let (word, bit) = (super::index(cluster / 64), 1 << (cluster % 64));
        if word >= self.0.len() {
            self.0.resize(word + 1, 0);
        }
        let before = self.0[word] & bit != 0;
        self.0[word] |= bit;
        before
    }

    fn has(&self, cluster: u64) -> bool {
        self.0.get(super::index(cluster / 64)).is_some_and(|word| word >> (cluster % 64) & 1 != 0)
    }
}

/// Which clusters of a file are in use, by its tables: refcounts are not believed.
#[derive(Debug, Default)]
pub(super) struct Usage {
    used: Bits,
    /// First cluster behind all that are used.
    end: u64,
    /// Where to look for a free one next.
    next: u64,
}

impl Usage {
    /// Reads all tables.
    ///
    /// # Errors
    /// [`AbsorbError::UsedTwice`], [`AbsorbError::Read`], [`AbsorbError::Cancelled`].
    pub(super) fn of(layer: &LayerReader, cancel: &Cancel) -> Result<Self, AbsorbError> {
        let mut usage = Self::default();
        // Clusters that hold packed data, which may be shared by such.
        let mut packed = Bits::default();
        let mut twice = None;
        visit(layer, cancel, |clusters, is_packed| {
            for cluster in clusters {
                let taken = usage.used.set(cluster);
                let shared = is_packed && packed.set(cluster);
                if taken && !shared {
                    twice.get_or_insert(cluster);
                }
                usage.end = usage.end.max(cluster + 1);
            }
        })?;
        match twice {
            Some(cluster) => Err(AbsorbError::UsedTwice {
                path: layer.path().to_owned(),
                host: HostOffset(cluster * layer.geometry().cluster_size()),
            }),
            None => Ok(usage),
        }
    }

    /// First cluster behind all that are used.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Takes `count` free clusters, at least one, that lie one behind the other.
    pub(super) fn take(&mut self, count: u64) -> u64 {
        let mut start = self.next;
        while start < self.end {
            match (start..start + count).rev().find(|cluster| self.used.has(*cluster)) {
                Some(used) => start = used + 1,
                None => break,
            }
        }
        for cluster in start..start + count {
            self.used.set(cluster);
        }
        self.next = start + count;
        self.end = self.end.max(start + count);
        start
    }

    /// The runs of clusters before `end` that are free, ascending.
    pub(super) fn free_runs(&self, end: u64) -> impl Iterator<Item = Range<u64>> {
        let mut next = 0;
        std::iter::from_fn(move || {
            let start = (next..end).find(|cluster| !self.used.has(*cluster))?;
            next = (start..end).find(|cluster| self.used.has(*cluster)).unwrap_or(end);
            Some(start..next)
        })
    }
}

/// Hands over all uses of clusters that the file's header and tables tell of, and whether each is by packed
/// data.
///
/// # Errors
/// [`CheckError`]; also for an entry that is not valid.
pub(super) fn visit(
    layer: &LayerReader,
    cancel: &Cancel,
    mut see: impl FnMut(Range<u64>, bool),
) -> Result<(), CheckError> {
    let (header, geometry) = (layer.header(), layer.geometry());
    let source = Source { layer, cancel };
    let size = geometry.cluster_size();
    let clusters = |start: u64, bytes: u64| start / size..(start + bytes).div_ceil(size);
    see(0..1, false);
    for table in [header.l1_table, header.refcount_table] {
        see(clusters(table.offset, table.entries * 8), false);
    }
    source.numbers(header.refcount_table.offset, header.refcount_table.entries, |_, raw| {
        // Invalid ones lead nowhere; who needs the table finds them.
        if let Ok(RefcountEntry { block: Some(block) }) = RefcountEntry::new(raw, geometry) {
            see(clusters(block.0, size), false);
        }
        Ok(())
    })?;
    source.numbers(header.l1_table.offset, header.l1_table.entries, |index, raw| {
        let entry = L1Entry::new(raw, geometry).map_err(|fault| super::l1_fault(layer, index, fault))?;
        let Some(table) = entry.table else { return Ok(()) };
        see(clusters(table.0, size), false);
        let step = if geometry.extended_l2 { 2 } else { 1 };
        source.pieces(table.0, size, |done, bytes| {
            let numbers = bytes.as_chunks().0.iter().map(|number| u64::from_be_bytes(*number));
            let numbers: Vec<_> = numbers.collect();
            for (number, entry) in (done / 8 / step..).zip(numbers.chunks_exact(super::index(step))) {
                let bitmap = entry.get(1).copied().unwrap_or(0);
                if entry[0] == 0 && bitmap == 0 {
                    continue;
                }
                let checked =
                    L2Entry::new(entry[0], bitmap, geometry).map_err(|fault| ReadError::L2Entry {
                        path: layer.path().to_owned(),
                        table,
                        index: number,
                        guest: GuestOffset(index * geometry.l2_coverage() + number * size),
                        fault,
                    })?;
                match checked {
                    L2Entry::Compressed(packed) => see(clusters(packed.host.0, packed.bytes), true),
                    // Zero clusters may keep a place, too.
                    _ if entry[0] & OFFSET_MASK != 0 => see(clusters(entry[0] & OFFSET_MASK, size), false),
                    _ => {}
                }
            }
            Ok(())
        })
    })
}

//! The passes through a file's tables.

use std::ops::Range;

use super::source::{Source, Stored};
use super::window::{MOST_USES, Use, Window};
use super::{CheckError, Finding, HostOffset, Limits, Place, Progress, Structure, WINDOWS_FOR_ONE};
use crate::cancel::Cancel;
use crate::qcow2::layer::LayerReader;
use crate::qcow2::refcount::RefcountEntry;
use crate::qcow2::table::{COPIED, EntryFault, Geometry, GuestOffset, L1Entry, L2Entry, OFFSET_MASK};

/// Bits of a compressed cluster's descriptor, without the two flags.
const DESCRIPTOR_BITS: u32 = 62;

/// Bit 0 of the autoclear features: there are bitmaps.
const AUTOCLEAR_BITMAPS: u64 = 1;

/// Set in what is kept of an L2 table that this pass has seen: offsets have the bit to spare.
const SEEN: u64 = 1;

/// A check under way.
pub(super) struct Walk<'a> {
    source: Source<'a>,
    geometry: &'a Geometry,
    progress: &'a mut dyn FnMut(Progress),
    limits: Limits,
    /// How many clusters the file has; it may end within the last.
    clusters: u64,
    window: Window,
    /// What does not depend on the window is told in the first pass only.
    first_pass: bool,
    /// How many clusters are used by entries that were read: those used twice count twice.
    used: u64,
    /// The first cluster behind the window of which there is anything to tell.
    next: Option<u64>,
    /// The offsets of all L2 tables, ascending; an offset that several entries name is there as often.
    tables: Vec<u64>,
    done: u64,
    found: Structure,
}

impl<'a> Walk<'a> {
    pub(super) fn new(
        layer: &'a LayerReader,
        cancel: &'a Cancel,
        progress: &'a mut dyn FnMut(Progress),
        limits: Limits,
    ) -> Self {
        let geometry = layer.geometry();
        Self {
            source: Source { layer, cancel },
            geometry,
            progress,
            limits,
            clusters: geometry.file_bytes.div_ceil(geometry.cluster_size()),
            window: Window::default(),
            first_pass: true,
            used: 0,
            next: Some(0),
            tables: Vec::new(),
            done: 0,
            found: Structure::default(),
        }
    }

    pub(super) fn run(mut self) -> Result<Structure, CheckError> {
        if self.source.layer.header().autoclear_features & AUTOCLEAR_BITMAPS != 0 {
            self.found.add(Finding::Bitmaps);
        }
        self.list_tables()?;
        for pass in 0.. {
            let Some(next) = self.next.take() else { break };
            let worth = self.used / self.limits.window_clusters * WINDOWS_FOR_ONE;
            if pass == self.limits.passes.saturating_add(worth) {
                let host = HostOffset(next * self.geometry.cluster_size());
                self.found.add(Finding::Scattered { host });
                break;
            }
            // A byte of refcounts may describe eight clusters.
            let start = next & !7;
            self.window.reset(start..(start + self.limits.window_clusters).min(self.clusters));
            self.load()?;
            self.count_tables()?;
            self.count_data()?;
            self.compare()?;
            self.first_pass = false;
        }
        Ok(self.found)
    }

    fn list_tables(&mut self) -> Result<(), CheckError> {
        let table = self.source.layer.header().l1_table;
        self.source.numbers(table.offset, table.entries, |_, raw| {
            if let Ok(L1Entry { table: Some(host) }) = L1Entry::new(raw, self.geometry) {
                self.tables.push(host.0);
            }
            Ok(())
        })?;
        self.tables.sort_unstable();
        Ok(())
    }

    /// Learns of the refcounts in the file what entries have to agree with.
    fn load(&mut self) -> Result<(), CheckError> {
        self.source.stored(self.window.range(), |clusters, stored| match stored {
            Stored::Zero => {}
            Stored::Unknown => clusters.for_each(|cluster| self.window.set_unknown(cluster)),
            Stored::Counts(counts) => {
                for (cluster, _) in clusters.zip(counts.iter()).filter(|(_, count)| *count == 1) {
                    self.window.set_single(cluster);
                }
            }
        })
    }

    /// Counts what the header and tables use. They come before data, so that where both claim a
    /// cluster, it is the data's entry that is named.
    fn count_tables(&mut self) -> Result<(), CheckError> {
        let header = self.source.layer.header();
        self.table(0..header.cluster_bits.size(), Place::Header);
        for (table, place) in
            [(header.l1_table, Place::L1Table), (header.refcount_table, Place::RefcountTable)]
        {
            self.table(table.offset..table.offset + table.entries * 8, place);
        }
        let (source, per_block) = (self.source, self.source.per_block());
        source.numbers(header.refcount_table.offset, header.refcount_table.entries, |index, raw| {
            let described = index * per_block;
            // A table may claim more than there are numbers for.
            let first = HostOffset(described.saturating_mul(self.geometry.cluster_size()));
            let place = Place::RefcountEntry { index, first };
            match RefcountEntry::new(raw, self.geometry) {
                Ok(RefcountEntry { block: Some(block) }) => {
                    self.table(self.cluster_at(block), place);
                    // There are refcounts to compare, whether anything is used there or not.
                    self.look_behind_window(described..(described + per_block).min(self.clusters));
                }
                Ok(RefcountEntry { block: None }) => {}
                Err(fault) => self.fault(place, fault),
            }
            Ok(())
        })?;
        source.numbers(header.l1_table.offset, header.l1_table.entries, |index, raw| {
            let place = self.l1_place(index);
            match L1Entry::new(raw, self.geometry) {
                Ok(L1Entry { table: Some(table) }) => {
                    self.table(self.cluster_at(table), place);
                    self.check_copied(raw, table, place);
                }
                Ok(L1Entry { table: None }) => self.check_astray(raw, place),
                Err(fault) => self.fault(place, fault),
            }
            Ok(())
        })
    }

    /// Counts what the entries of the L2 tables use.
    fn count_data(&mut self) -> Result<(), CheckError> {
        for table in &mut self.tables {
            *table &= !SEEN;
        }
        let source = self.source;
        let header = source.layer.header();
        let passes = (self.clusters - self.window.range().start).div_ceil(self.limits.window_clusters);
        let total = self.done + passes * self.tables.len() as u64;
        source.numbers(header.l1_table.offset, header.l1_table.entries, |index, raw| {
            // The others have been told.
            let Ok(L1Entry { table: Some(host) }) = L1Entry::new(raw, self.geometry) else {
                return Ok(());
            };
            // The file may change while it is read, so the table may be none of those in the list.
            let first = self.tables.partition_point(|table| table & !SEEN < host.0);
            if self.tables.get(first) == Some(&host.0) {
                // Read once, however often it is named, or a small file would make endless work. What it
                // names counts as if it had been read each time.
                let times = self.tables[first..].iter().take_while(|table| **table == host.0).count();
                self.tables[first] |= SEEN;
                self.l2_table(index, host, times as u64)?;
            }
            self.done += 1;
            (self.progress)(Progress { done: self.done, total: total.max(self.done) });
            Ok(())
        })
    }

    fn l2_table(&mut self, l1_index: u64, table: HostOffset, times: u64) -> Result<(), CheckError> {
        let (source, geometry) = (self.source, self.geometry);
        let (entry_bytes, cluster_size) = (geometry.l2_entry_bytes(), geometry.cluster_size());
        let guest = l1_index * geometry.l2_coverage();
        source.pieces(table.0, cluster_size, |done, bytes| {
            let (numbers, _) = bytes.as_chunks();
            let entries = numbers.chunks_exact(if geometry.extended_l2 { 2 } else { 1 });
            for (index, entry) in (done / entry_bytes..).zip(entries) {
                let raw = u64::from_be_bytes(entry[0]);
                let bitmap = entry.get(1).map_or(0, |bitmap| u64::from_be_bytes(*bitmap));
                if raw != 0 || bitmap != 0 {
                    let guest = GuestOffset(guest + index * cluster_size);
                    self.l2_entry(raw, bitmap, times, Place::L2Entry { table, index, guest });
                }
            }
            Ok(())
        })
    }

    fn l2_entry(&mut self, raw: u64, bitmap: u64, times: u64, place: Place) {
        let entry = match L2Entry::new(raw, bitmap, self.geometry) {
            Ok(entry) => entry,
            Err(fault) => return self.fault(place, fault),
        };
        // Zero clusters may have a place, too, which the checked types do not tell.
        let host = HostOffset(raw & OFFSET_MASK);
        let figures = &mut self.found.figures;
        let (figure, times_told) = match entry {
            L2Entry::Compressed(_) => (&mut figures.compressed, times),
            _ if host.0 != 0 => (&mut figures.data, times),
            L2Entry::Zero => (&mut figures.zero, times),
            // Without a place, all that a bitmap can say is zero.
            _ => (&mut figures.zero, if bitmap == 0 { 0 } else { times }),
        };
        if self.first_pass {
            *figure += times_told;
        }
        match entry {
            L2Entry::Compressed(packed) => {
                self.check_astray(raw, place);
                self.compressed(raw, packed.host, times, place);
            }
            _ if host.0 != 0 => {
                self.count(&self.cluster_at(host), Use::Alone, times, place);
                self.check_copied(raw, host, place);
            }
            _ => self.check_astray(raw, place),
        }
    }

    /// Counts the clusters that the sectors of compressed data lie in.
    fn compressed(&mut self, raw: u64, host: HostOffset, times: u64, place: Place) {
        let sectors_shift = DESCRIPTOR_BITS - (self.geometry.cluster_bits - 8);
        let sectors = ((raw & ((1 << DESCRIPTOR_BITS) - 1)) >> sectors_shift) + 1;
        let end = host.0 - host.0 % 512 + sectors * 512;
        if end.div_ceil(self.geometry.cluster_size()) > self.clusters && self.first_pass {
            let file_bytes = self.geometry.file_bytes;
            self.found.add(Finding::BehindEnd { place, end: HostOffset(end), file_bytes });
        }
        self.count(&(host.0..end), Use::Compressed, times, place);
    }

    /// Counts the clusters that the bytes `range` of the file lie in, each for one use of a table.
    fn table(&mut self, range: Range<u64>, place: Place) {
        if self.first_pass {
            let clusters = self.clusters_of(&range);
            self.found.figures.tables += clusters.end - clusters.start;
        }
        self.count(&range, Use::Alone, 1, place);
    }

    /// Counts `times` uses of the clusters that the bytes `range` of the file lie in.
    fn count(&mut self, range: &Range<u64>, how: Use, times: u64, place: Place) {
        let (clusters, window) = (self.clusters_of(range), self.window.range());
        if self.first_pass {
            self.used += clusters.end.saturating_sub(clusters.start);
        }
        for cluster in clusters.start.max(window.start)..clusters.end.min(window.end) {
            if self.window.add(cluster, how, times) {
                let host = HostOffset(cluster * self.geometry.cluster_size());
                self.found.add(Finding::Shared { place, host });
            }
        }
        self.look_behind_window(clusters);
    }

    /// Remembers that there is something to tell of `clusters`, as far as they lie behind the window.
    fn look_behind_window(&mut self, clusters: Range<u64>) {
        let behind = clusters.start.max(self.window.range().end);
        if behind < clusters.end {
            self.next = Some(self.next.map_or(behind, |next| next.min(behind)));
        }
    }

    /// Compares bit 63 of an entry with the refcount, in the pass for the cluster at `host`.
    fn check_copied(&mut self, raw: u64, host: HostOffset, place: Place) {
        let cluster = host.0 / self.geometry.cluster_size();
        if !self.window.range().contains(&cluster) {
            return;
        }
        match (raw & COPIED != 0, self.window.is_single(cluster)) {
            (true, Some(false)) => self.found.add(Finding::CopiedSet { place, host }),
            (false, Some(true)) => self.found.add(Finding::CopiedClear { place, host }),
            _ => {}
        }
    }

    /// Checks that bit 63 of an entry that has no cluster to itself is not set.
    fn check_astray(&mut self, raw: u64, place: Place) {
        if raw & COPIED != 0 && self.first_pass {
            self.found.add(Finding::CopiedAstray { place });
        }
    }

    fn fault(&mut self, place: Place, fault: EntryFault) {
        if self.first_pass {
            self.found.add(Finding::Entry { place, fault });
        }
    }

    /// Compares the uses that were counted with the refcounts in the file.
    fn compare(&mut self) -> Result<(), CheckError> {
        let (window, found, cluster_size) = (&self.window, &mut self.found, self.geometry.cluster_size());
        self.source.stored(window.range(), |mut clusters, stored| match stored {
            Stored::Zero => clusters.for_each(|cluster| compare_one(window, found, cluster_size, cluster, 0)),
            Stored::Counts(counts) => clusters
                .zip(counts.iter())
                .for_each(|(cluster, count)| compare_one(window, found, cluster_size, cluster, count)),
            Stored::Unknown => {
                if let Some(last) = clusters.rfind(|cluster| window.uses(*cluster) != 0) {
                    found.figures.end = (last + 1) * cluster_size;
                }
            }
        })
    }

    fn l1_place(&self, index: u64) -> Place {
        Place::L1Entry { index, guest: GuestOffset(index * self.geometry.l2_coverage()) }
    }

    /// The bytes of the cluster at `host`.
    fn cluster_at(&self, host: HostOffset) -> Range<u64> {
        host.0..host.0 + self.geometry.cluster_size()
    }

    /// The clusters of the file that the bytes `range` lie in.
    fn clusters_of(&self, range: &Range<u64>) -> Range<u64> {
        // Of an L1 table without entries not even the place means anything.
        if range.is_empty() {
            return 0..0;
        }
        let cluster_size = self.geometry.cluster_size();
        range.start / cluster_size..range.end.div_ceil(cluster_size).min(self.clusters)
    }
}

/// Compares what was counted for `cluster` with its refcount in the file, `stored`. Called with
/// ascending clusters.
fn compare_one(window: &Window, found: &mut Structure, cluster_size: u64, cluster: u64, stored: u64) {
    let uses = window.uses(cluster);
    let counted = u64::from(uses);
    if stored == 0 && counted == 0 {
        return;
    }
    found.figures.end = (cluster + 1) * cluster_size;
    let host = HostOffset(cluster * cluster_size);
    if uses == MOST_USES {
        found.add(Finding::TooManyUses { host });
    } else if stored < counted {
        found.add(Finding::RefcountTooSmall { host, stored, counted });
    } else if stored > counted {
        found.add(Finding::Leak { host, stored, counted });
    }
}

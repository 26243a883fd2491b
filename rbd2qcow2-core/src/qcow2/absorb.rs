//! Putting what one layer holds into the file of the layer below, in place, so that the one below need not
//! be copied.
//!
//! Both have the same form. All the while the file is read through the layer above only, which hides
//! whatever is overwritten: data that it holds itself. Nothing else that the file's tables lead to is
//! touched, and new clusters and tables go where nothing was. So whoever reads through the layer above, and
//! whoever dies in the midst of it, sees no difference; and it can be begun again from the start. Only the
//! last step makes the file's own tables lead elsewhere: entries of the L1 table, of 8 bytes each, are
//! replaced. After that the file reads as both did together, with or without the layer above.
//!
//! Refcounts are of no use to readers, so they are not kept up, but counted anew at the end.

use std::io;
use std::ops::Range;
use std::path::PathBuf;

use super::check::CheckError;
use super::check::source::Source;
use super::compressed::unpack_stream;
use super::error::ReadError;
use super::header::{Header, Version};
use super::layer::{LayerReader, Piece};
use super::refcount::RefcountWidth;
use super::table::{
    CompressedCluster, GuestOffset, HostOffset, L1Entry, L2Entry, SubclusterKind, Subclusters,
};
use crate::cancel::Cancel;
use crate::progress::Amount;

mod refcounts;
mod usage;

use usage::Usage;

/// Data that are copied at once, in bytes.
const COPY_BYTES: u64 = 2 << 20;

/// Room for packed data that is taken at once, in bytes; but 2 clusters at least, and 64 at most.
const RUN_BYTES: u64 = 4 << 20;

/// Most pieces of packed data in such a room: what [`check`](super::check) counts to for one cluster.
const RUN_PIECES: u16 = 0x7ffe;

/// Most clusters of a file: of each two bits are kept in memory.
const CLUSTERS_MAX: u64 = 1 << 28;

/// Refcounts that are counted at once: 16 MiB of them.
const WINDOW_CLUSTERS: u64 = if cfg!(test) { 1 } else { 8 << 20 };

/// Base-2 logarithm of the bits of the refcounts that are counted: QEMU's default, and the writer's.
const REFCOUNT_ORDER: u32 = 4;

/// Why a layer was not put into the one below. That can still be read through the layer above, as before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AbsorbError {
    /// One of the layers could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The file could not be changed.
    #[error("cannot {operation} the layer {}", path.display())]
    Change {
        /// What was to be done.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        cause: io::Error,
    },
    /// Two entries of the file's tables lead to one cluster: nothing can be overwritten.
    #[error("the layer {} is damaged: its cluster at {host} is used twice", path.display())]
    UsedTwice {
        /// The file.
        path: PathBuf,
        /// The cluster.
        host: HostOffset,
    },
    /// The file is not of a kind that is changed in place.
    #[error("the layer {} cannot be changed in place: {reason}", path.display())]
    Unfit {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: &'static str,
    },
    /// A stop was asked for.
    #[error("interrupted")]
    Cancelled,
}

impl From<CheckError> for AbsorbError {
    fn from(error: CheckError) -> Self {
        match error {
            CheckError::Read(cause) => Self::Read(cause),
            CheckError::Cancelled => Self::Cancelled,
        }
    }
}

/// A file that is changed in place.
pub(crate) trait Medium {
    /// Writes all of `bytes` from `offset` on, in bytes.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Brings all that was written to stable storage.
    fn sync(&self) -> io::Result<()>;
    /// Gives room in the file back, where that is possible.
    fn discard(&self, range: Range<u64>) -> io::Result<()>;
    /// Makes the file so many bytes long.
    fn set_length(&self, length: u64) -> io::Result<()>;
}

/// Says why a layer of this header cannot take over one of the header `above`; `None` where it can, as
/// far as headers tell.
pub(crate) fn unfit(below: &Header, above: &Header) -> Option<&'static str> {
    let form = |header: &Header| {
        (header.cluster_bits.bits(), header.extended_l2, header.compression_type, header.virtual_size)
    };
    let checks = [
        (below.version != Version::V3, "it has an old version of the format"),
        (form(below) != form(above), "the layer above has another form or size"),
        (below.refcount_order != REFCOUNT_ORDER, "its refcounts are not of 16 bits"),
        (below.snapshots != 0, "it has internal snapshots"),
        (below.autoclear_features != 0, "it has features that go when it is changed"),
    ];
    checks.into_iter().find_map(|(is_so, reason)| is_so.then_some(reason))
}

/// A layer's file that takes over what the layer above it holds: see the [module](self).
pub(crate) struct Absorb<'a> {
    medium: &'a dyn Medium,
    below: &'a LayerReader,
    above: &'a LayerReader,
    progress: &'a Amount,
    cancel: &'a Cancel,
    usage: Usage,
    /// The L2 tables that are to replace others, by their index in the L1 table.
    tables: Vec<(u64, HostOffset)>,
    /// What is left of the room for packed data, and how many more pieces may be put there.
    run: (Range<u64>, u16),
    /// Data that are to be copied: from this place of the image, to that of the file, so many bytes.
    pending: (u64, u64, u64),
    buffer: Vec<u8>,
}

impl<'a> Absorb<'a> {
    /// Begins. `below` reads what `medium` changes. Reads all tables of `below`, and takes 64 MiB of memory
    /// at the most for it. In `progress` bytes of data are counted that the layer above holds.
    ///
    /// # Errors
    /// [`AbsorbError::Unfit`], [`AbsorbError::UsedTwice`], [`AbsorbError::Read`], [`AbsorbError::Cancelled`].
    pub(crate) fn new(
        medium: &'a dyn Medium,
        below: &'a LayerReader,
        above: &'a LayerReader,
        progress: &'a Amount,
        cancel: &'a Cancel,
    ) -> Result<Self, AbsorbError> {
        let refuse = |reason| AbsorbError::Unfit { path: below.path().to_owned(), reason };
        if let Some(reason) = unfit(below.header(), above.header()) {
            return Err(refuse(reason));
        }
        let size = below.geometry().cluster_size();
        let clusters = |layer: &LayerReader| layer.geometry().file_bytes.div_ceil(size);
        // All that may be added, some of it twice: runs for packed data may be left half empty.
        let most = clusters(below) + 2 * clusters(above) + 3 * run_clusters(size);
        let counted = below.header().refcount_table.entries * per_block(below);
        if most > counted.min(CLUSTERS_MAX) {
            return Err(refuse("it has too many clusters"));
        }
        Ok(Self {
            medium,
            below,
            above,
            progress,
            cancel,
            usage: Usage::of(below, cancel)?,
            tables: Vec::new(),
            run: (0..0, 0),
            pending: (0, 0, 0),
            buffer: Vec::new(),
        })
    }

    /// Copies everything that the layer above holds, with the tables that lead to it, and brings it to
    /// stable storage. Nobody who reads the file through the layer above sees a difference.
    ///
    /// # Errors
    /// [`AbsorbError`].
    pub(crate) fn copy(&mut self) -> Result<(), AbsorbError> {
        self.settle_table()?;
        self.count_data()?;
        let table = self.above.header().l1_table;
        let mut tables = Vec::new();
        self.source().numbers(table.offset, table.entries, |index, raw| {
            let entry = L1Entry::new(raw, self.above.geometry());
            let entry = entry.map_err(|fault| l1_fault(self.above, index, fault))?;
            tables.extend(entry.table.map(|host| (index, host)));
            Ok(())
        })?;
        for (index, host) in tables {
            self.copy_table(index, host)?;
        }
        self.sync()
    }

    /// Counts what there is to be copied, by the tables of the layer above.
    fn count_data(&self) -> Result<(), AbsorbError> {
        for piece in self.above.map(0..self.above.virtual_size())? {
            if self.cancel.is_set() {
                return Err(AbsorbError::Cancelled);
            }
            if let (range, Piece::Data | Piece::Compressed) = piece? {
                self.progress.total.add(range.end - range.start);
            }
        }
        Ok(())
    }

    /// Brings the file's L1 table to stable storage as it was read. An attempt that was cut short, or whose
    /// flush failed, may have left another there: one that leads to what counts as free here.
    fn settle_table(&self) -> Result<(), AbsorbError> {
        let table = self.below.header().l1_table;
        let source = Source { layer: self.below, cancel: self.cancel };
        let mut result = Ok(());
        source.pieces(table.offset, table.entries * 8, |done, bytes| {
            if result.is_ok() {
                result = self.write(HostOffset(table.offset + done), bytes);
            }
            Ok(())
        })?;
        result?;
        self.sync()
    }

    /// Gives up: what was added to the file, and nothing leads to, is cut off, if possible. To be called
    /// before the [`switch`](Self::switch), if at all.
    pub(crate) fn abandon(&self) {
        if let Err(error) = self.medium.set_length(self.below.geometry().file_bytes) {
            log::debug!(
                "{}: {error}; what was added stays for the next attempt",
                self.below.path().display()
            );
        }
    }

    fn source(&self) -> Source<'a> {
        Source { layer: self.above, cancel: self.cancel }
    }

    fn copy_table(&mut self, index: u64, host: HostOffset) -> Result<(), AbsorbError> {
        let (above, below) = (self.above, self.below);
        let geometry = below.geometry();
        let (bits, extended) = (geometry.cluster_bits, geometry.extended_l2);
        let news = self.table(above, host)?;
        let mut numbers = match self.below_table(index)? {
            Some(host) => self.table(below, host)?,
            None => vec![0; news.len()],
        };
        let step = if extended { 2 } else { 1 };
        let mut changed = false;
        let pairs = news.chunks_exact(step).zip(numbers.chunks_exact_mut(step));
        for (number, (new, old)) in (0..).zip(pairs) {
            if self.cancel.is_set() {
                return Err(AbsorbError::Cancelled);
            }
            let start = index * geometry.l2_coverage() + number * geometry.cluster_size();
            // What lies behind the image's end is never read.
            if new.iter().all(|number| *number == 0) || start >= below.virtual_size() {
                continue;
            }
            let entry = |layer: &LayerReader, table: HostOffset, numbers: &[u64]| {
                let bitmap = numbers.get(1).copied().unwrap_or(0);
                L2Entry::new(numbers[0], bitmap, layer.geometry()).map_err(|fault| ReadError::L2Entry {
                    path: layer.path().to_owned(),
                    table,
                    index: number,
                    guest: GuestOffset(start),
                    fault,
                })
            };
            let new = entry(above, host, new)?;
            let merged = self.copy_cluster(start, entry(below, host, old)?, new)?;
            let (raw, bitmap) = merged.encode(bits, extended);
            old.copy_from_slice(&[raw, bitmap][..step]);
            self.progress.done.add(self.data_of(start, new));
            changed = true;
        }
        self.flush()?;
        if !changed {
            return Ok(());
        }
        let host = self.take(1);
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_be_bytes()).collect();
        self.write(host, &bytes)?;
        self.tables.push((index, host));
        Ok(())
    }

    /// Copies what the layer above holds of the cluster that begins at `start`, and tells what the
    /// cluster is then.
    fn copy_cluster(&mut self, start: u64, old: L2Entry, new: L2Entry) -> Result<L2Entry, AbsorbError> {
        let size = self.below.geometry().cluster_size();
        Ok(match (new, old) {
            (L2Entry::Absent, old) => old,
            (L2Entry::Subclusters(_, parts), old) if parts == Subclusters::default() => old,
            (L2Entry::Zero, _) => L2Entry::Zero,
            (L2Entry::Compressed(packed), _) => L2Entry::Compressed(self.copy_packed(start, packed)?),
            (L2Entry::Data(_), old) => {
                let host = match old {
                    L2Entry::Data(host) => host,
                    _ => self.take(1),
                };
                self.copy_data(start..start + size, host)?;
                L2Entry::Data(host)
            }
            (L2Entry::Subclusters(_, parts), L2Entry::Compressed(_)) if !is_whole(parts) => {
                self.unpack(start, parts)?
            }
            (L2Entry::Subclusters(_, parts), old) => {
                let (host, mut merged) = match old {
                    L2Entry::Subclusters(host, merged) => (host, merged),
                    _ => (HostOffset(0), Subclusters::default()),
                };
                for (run, kind) in parts.runs().filter(|(_, kind)| *kind != SubclusterKind::Absent) {
                    run.for_each(|index| merged.set(index, kind));
                }
                let host = match merged.data_count() {
                    0 => HostOffset(0),
                    _ if host.0 == 0 => self.take(1),
                    _ => host,
                };
                self.copy_parts(start, parts, host)?;
                L2Entry::Subclusters(host, merged)
            }
        })
    }

    /// Bytes of the image that an entry for the cluster that begins at `start` holds as data.
    fn data_of(&self, start: u64, entry: L2Entry) -> u64 {
        let size = self.above.geometry().cluster_size();
        let part = size / super::table::SUBCLUSTERS;
        let in_image = |range: Range<u64>| {
            let end = self.above.virtual_size();
            (start + range.end).min(end).saturating_sub(start + range.start)
        };
        match entry {
            L2Entry::Absent | L2Entry::Zero => 0,
            L2Entry::Data(_) | L2Entry::Compressed(_) => in_image(0..size),
            L2Entry::Subclusters(_, parts) => {
                let data = parts.runs().filter(|(_, kind)| *kind == SubclusterKind::Data);
                data.map(|(run, _)| in_image(run.start * part..run.end * part)).sum()
            }
        }
    }

    fn copy_parts(&mut self, start: u64, parts: Subclusters, host: HostOffset) -> Result<(), AbsorbError> {
        let size = self.below.geometry().cluster_size() / super::table::SUBCLUSTERS;
        for (run, _) in parts.runs().filter(|(_, kind)| *kind == SubclusterKind::Data) {
            let to = HostOffset(host.0 + run.start * size);
            self.copy_data(start + run.start * size..start + run.end * size, to)?;
        }
        Ok(())
    }

    /// Copies data of the layer above, sooner or later.
    fn copy_data(&mut self, range: Range<u64>, to: HostOffset) -> Result<(), AbsorbError> {
        let length = range.end.min(self.above.virtual_size()) - range.start;
        let (from, host, pending) = self.pending;
        if pending > 0
            && (from + pending, host + pending) == (range.start, to.0)
            && pending + length <= COPY_BYTES
        {
            self.pending.2 += length;
            return Ok(());
        }
        self.flush()?;
        self.pending = (range.start, to.0, length);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), AbsorbError> {
        let (from, host, length) = std::mem::take(&mut self.pending);
        if length == 0 {
            return Ok(());
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(index(length), 0);
        // The tables said that it holds all of this.
        self.above.read_at(from, &mut buffer)?;
        self.write(HostOffset(host), &buffer)?;
        self.buffer = buffer;
        Ok(())
    }

    /// A packed cluster of which parts are replaced becomes a plain one, elsewhere: what it holds besides
    /// is still asked for.
    fn unpack(&mut self, start: u64, parts: Subclusters) -> Result<L2Entry, AbsorbError> {
        let end = (start + self.below.geometry().cluster_size()).min(self.below.virtual_size());
        let mut content = vec![0; index(end - start)];
        self.below.read_at(start, &mut content)?;
        self.above.read_at(start, &mut content)?;
        let host = self.take(1);
        self.write(host, &content)?;
        let mut merged = Subclusters::default();
        for (run, kind) in parts.runs() {
            let kind = if kind == SubclusterKind::Zero { kind } else { SubclusterKind::Data };
            run.for_each(|index| merged.set(index, kind));
        }
        Ok(L2Entry::Subclusters(host, merged))
    }

    fn copy_packed(
        &mut self,
        start: u64,
        packed: CompressedCluster,
    ) -> Result<CompressedCluster, AbsorbError> {
        let geometry = self.above.geometry();
        let size = geometry.cluster_size();
        let mut bytes = vec![0; index(packed.bytes)];
        self.above.read_exact(packed.host, &mut bytes)?;
        // What follows the stream would be taken along, and more of it each time.
        let mut content = vec![0; index(size)];
        let length = unpack_stream(geometry.compression_type, &bytes, &mut content).map_err(|cause| {
            let (path, guest) = (self.above.path().to_owned(), GuestOffset(start));
            ReadError::Compressed { path, guest, host: packed.host, cause }
        })?;
        bytes.truncate(length);
        let length = length as u64;
        let (run, left) = &self.run;
        if run.end - run.start < length || *left == 0 {
            let clusters = run_clusters(size);
            let start = self.take(clusters).0;
            self.run = (start..start + clusters * size, RUN_PIECES);
        }
        let (run, left) = &mut self.run;
        let host = HostOffset(run.start);
        run.start += length;
        *left -= 1;
        self.write(host, &bytes)?;
        Ok(CompressedCluster { host, bytes: length })
    }

    /// Where the L2 table of this index lies in the file.
    fn below_table(&self, index: u64) -> Result<Option<HostOffset>, AbsorbError> {
        let mut raw = [0; 8];
        self.below.read_exact(HostOffset(self.below.header().l1_table.offset + index * 8), &mut raw)?;
        let entry = L1Entry::new(u64::from_be_bytes(raw), self.below.geometry());
        Ok(entry.map_err(|fault| l1_fault(self.below, index, fault))?.table)
    }

    fn table(&self, layer: &LayerReader, host: HostOffset) -> Result<Vec<u64>, AbsorbError> {
        let count = layer.geometry().cluster_size() / 8;
        let mut numbers = Vec::with_capacity(index(count));
        let source = Source { layer, cancel: self.cancel };
        source.numbers(host.0, count, |_, number| {
            numbers.push(number);
            Ok(())
        })?;
        Ok(numbers)
    }

    fn take(&mut self, clusters: u64) -> HostOffset {
        HostOffset(self.usage.take(clusters) << self.below.geometry().cluster_bits)
    }

    fn write(&self, host: HostOffset, bytes: &[u8]) -> Result<(), AbsorbError> {
        self.changed("write to", self.medium.write_at(host.0, bytes))
    }

    fn sync(&self) -> Result<(), AbsorbError> {
        self.changed("flush", self.medium.sync())
    }

    fn changed(&self, operation: &'static str, result: io::Result<()>) -> Result<(), AbsorbError> {
        let path = || self.below.path().to_owned();
        result.map_err(|cause| AbsorbError::Change { operation, path: path(), cause })
    }

    /// Has the file's L1 table lead to the new tables, without waiting for stable storage. Nobody else may
    /// have the file open.
    ///
    /// # Errors
    /// [`AbsorbError::Change`].
    pub(crate) fn switch(&self) -> Result<(), AbsorbError> {
        let table = self.below.header().l1_table.offset;
        for (index, host) in &self.tables {
            let entry = L1Entry { table: Some(*host) }.encode();
            self.write(HostOffset(table + index * 8), &entry.to_be_bytes())?;
        }
        Ok(())
    }
}

/// Clusters that a refcount block of the layer counts.
fn per_block(layer: &LayerReader) -> u64 {
    RefcountWidth::of(layer.header()).per_block(layer.geometry().cluster_size())
}

/// Room for packed data, in clusters.
fn run_clusters(cluster_size: u64) -> u64 {
    (RUN_BYTES / cluster_size).clamp(2, 64)
}

/// Whether no part is left to the layer below.
fn is_whole(parts: Subclusters) -> bool {
    parts.runs().all(|(_, kind)| kind != SubclusterKind::Absent)
}

fn l1_fault(layer: &LayerReader, index: u64, fault: super::table::EntryFault) -> ReadError {
    let guest = GuestOffset(index * layer.geometry().l2_coverage());
    ReadError::L1Entry { path: layer.path().to_owned(), index, guest, fault }
}

/// Sizes of tables and buffers, which are in memory.
fn index(number: u64) -> usize {
    usize::try_from(number).expect("in memory")
}

#[cfg(test)]
mod tests;

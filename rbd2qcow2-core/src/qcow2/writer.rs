//! Writing one qcow2 file, from many threads, front to back.
//!
//! A layer of a backup is simple to write: every cluster of the guest is written once, nothing is
//! overwritten, and nothing is freed. So space in the file is handed out by counting up
//! (`space`), data go to it without a lock, and what describes them is small:
//!
//! - `mapping`: the L2 tables that were touched last, and the L1 table;
//! - `packing`: the compressed data that do not fill a write yet;
//! - `refcounts`: a refcount is one, but where compressed data share a cluster. Those are counted
//!   while they are packed, the others need not be remembered at all.
//!
//! What is complete is written as the copy passes, so memory does not grow with the file. The header
//! comes last: until then the file is no qcow2.

use std::ops::Range;
use std::path::{Path, PathBuf};

use super::SECTOR;
use super::header::{
    BACKING_NAME_MAX, Backing, ClusterBits, CompressionType, EXTENDED_L2_MIN_BITS, Encryption, Header,
    L1_TABLE_MAX, Table, Version,
};
use super::table::{CompressedCluster, HostOffset, L2Entry, SUBCLUSTERS, SubclusterKind, Subclusters};
use crate::buffer::{ALIGNMENT, Buffer, BufferPool};
use crate::cancel::Cancel;
use crate::extent::{ExtentKind, runs};
use crate::output::Output;

mod error;
mod mapping;
mod packing;
mod refcounts;
mod space;

pub use error::WriteError;
use mapping::Mapping;
use packing::Packing;
use space::Space;

/// Memory for what is put together before it is written: packed data and tables. In bytes. Whoever
/// has the lock of [`packing`] asks for more while it holds up to 4 MiB (a run's buffer, and what a
/// cluster of 2 MiB fills); nobody else asks while holding any, so no two wait for each other.
const SCRATCH_BYTES: usize = 16 << 20;

/// What of a table is put together at once, in bytes: whole pages, and no more than fits the scratch
/// memory, which the L1 table of a huge image does not.
const TABLE_PIECE_BYTES: usize = if cfg!(test) { 64 << 10 } else { 2 << 20 };

/// Zero clusters that are entered at once, so that an abort is noticed in between.
const ZEROES_AT_ONCE: usize = 1 << 16;

/// What a new file is to be.
#[derive(Clone, Debug)]
pub struct FileSpec {
    /// The file to make. It must not exist.
    pub path: PathBuf,
    /// Size that a guest sees, in bytes: a multiple of 512.
    pub virtual_size: u64,
    /// File name (no directory) of the qcow2 file below, in the same directory.
    pub backing: Option<String>,
    /// Cluster size.
    pub cluster_bits: ClusterBits,
    /// Whether clusters have subclusters. Needs clusters of 16 KiB or more.
    pub extended_l2: bool,
    /// How compressed clusters are packed, if there are any.
    pub compression_type: CompressionType,
}

/// What the guest sees from an offset on, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct SubclusterData<'a> {
    /// Where the bytes begin in the guest's image.
    pub offset: u64,
    /// The bytes.
    pub bytes: &'a [u8],
}

impl<'a> SubclusterData<'a> {
    fn bytes(&self, range: Range<u64>) -> &'a [u8] {
        &self.bytes[index(range.start - self.offset)..index(range.end - self.offset)]
    }
}

/// A qcow2 file that is being written: version 3, refcounts of 16 bits, nothing shared.
///
/// Clusters are numbered by their place in the guest's image. Each may be written once, whichever
/// way; all methods but [`finish`](Self::finish) may be called from many threads, and block for what
/// they write. After an error the file is of no use. Dropping this leaves the file where it is.
///
/// Takes some 32 MiB, and some 24 bytes for each L2 table and each refcount block.
#[derive(Debug)]
pub struct Qcow2Writer {
    spec: FileSpec,
    l1_table: Table,
    output: Output,
    space: Space,
    mapping: Mapping,
    packing: Packing,
    scratch: BufferPool,
    aborted: Cancel,
    /// Whether a write has failed.
    failed: Cancel,
}

impl Qcow2Writer {
    /// Creates the file, empty and of mode 0600. The backing file is not opened and need not exist.
    ///
    /// # Errors
    /// [`WriteError::Create`] where the file exists or cannot be made, [`WriteError::VirtualSize`],
    /// [`WriteError::Subclusters`], [`WriteError::BackingName`], [`WriteError::Header`] for what the
    /// format does not allow. Nothing was created then.
    pub fn create(spec: FileSpec) -> Result<Self, WriteError> {
        let cluster_size = spec.cluster_bits.size();
        let l1_entries = check(&spec)?;
        let space = Space::new(spec.cluster_bits);
        // The header's cluster, and the L1 table right behind it.
        space.take(1)?;
        let l1_host = space.take((l1_entries * 8).div_ceil(cluster_size))?;
        let l1_table = Table { offset: l1_host.0, entries: l1_entries };
        let writer = Self {
            l1_table,
            output: Output::create(&spec.path, cluster_size).map_err(WriteError::Create)?,
            space,
            mapping: Mapping::new(&spec, l1_entries),
            packing: Packing::new(spec.cluster_bits),
            scratch: BufferPool::new(SCRATCH_BYTES),
            aborted: Cancel::new(),
            failed: Cancel::new(),
            spec,
        };
        Ok(writer)
    }

    /// Writes the clusters from number `first` on. `data` end at the end of a cluster or of the
    /// image.
    ///
    /// # Errors
    /// [`WriteError::Io`], [`WriteError::FileTooLarge`], [`WriteError::Twice`],
    /// [`WriteError::Aborted`].
    pub fn write_clusters(&self, first: u64, data: &[u8]) -> Result<(), WriteError> {
        self.run(|| {
            let cluster_size = self.spec.cluster_bits.size();
            let count = (data.len() as u64).div_ceil(cluster_size);
            let host = self.space.take(count)?;
            self.write(host, data)?;
            let entries = (0..count).map(|index| L2Entry::Data(HostOffset(host.0 + index * cluster_size)));
            self.map(first, entries)
        })
    }

    /// Writes parts of the cluster number `cluster`.
    ///
    /// # Errors
    /// As [`write_clusters`](Self::write_clusters).
    ///
    /// # Panics
    /// When `data` do not reach over all subclusters that are said to be data, but for the end of the
    /// image.
    pub fn write_subclusters(
        &self,
        cluster: u64,
        subclusters: Subclusters,
        data: SubclusterData<'_>,
    ) -> Result<(), WriteError> {
        self.run(|| {
            let cluster_size = self.spec.cluster_bits.size();
            let (start, size) = (cluster * cluster_size, cluster_size / SUBCLUSTERS);
            let host = if subclusters.data_count() == 0 { HostOffset(0) } else { self.space.take(1)? };
            for (run, kind) in subclusters.runs() {
                if kind == SubclusterKind::Data {
                    let end = (start + run.end * size).min(self.spec.virtual_size);
                    let bytes = data.bytes(start + run.start * size..end);
                    self.write(HostOffset(host.0 + run.start * size), bytes)?;
                }
            }
            self.map(cluster, [L2Entry::Subclusters(host, subclusters)])
        })
    }

    /// Writes the cluster number `cluster` as `packed`: what a [`Compressor`] made of all of it, here or
    /// for another file, of this file's compression type and no more than a cluster.
    ///
    /// # Errors
    /// As [`write_clusters`](Self::write_clusters).
    ///
    /// [`Compressor`]: super::compressor::Compressor
    pub fn write_compressed(&self, cluster: u64, packed: &[u8]) -> Result<(), WriteError> {
        self.run(|| {
            let (host, full) = self.packing.put(packed, self)?;
            // Whoever fills a buffer writes it, while the others go on.
            for (host, buffer) in full {
                self.write(host, &buffer)?;
            }
            let packed = CompressedCluster { host, bytes: packed.len() as u64 };
            self.map(cluster, [L2Entry::Compressed(packed)])
        })
    }

    /// Makes whole clusters read as zeroes, whatever the layers below hold.
    ///
    /// # Errors
    /// As [`write_clusters`](Self::write_clusters).
    pub fn write_zeroes(&self, clusters: Range<u64>) -> Result<(), WriteError> {
        for start in clusters.clone().step_by(ZEROES_AT_ONCE) {
            let end = clusters.end.min(start + ZEROES_AT_ONCE as u64);
            self.run(|| self.map(start, (start..end).map(|_| L2Entry::Zero)))?;
        }
        Ok(())
    }

    /// Makes calls that go on in other threads, and all later ones, fail soon.
    pub fn abort(&self) {
        self.aborted.set();
    }

    /// Has [`finish`](Self::finish) fail: what was to be written could not be made. Other calls go on, so that
    /// none of them tells of an abort before the error is told.
    pub(crate) fn give_up(&self) {
        self.failed.set();
    }

    /// Whether [`abort`](Self::abort) was called, or the file is finished.
    #[must_use]
    pub fn is_aborted(&self) -> bool {
        self.aborted.is_set()
    }

    /// Writes what is still in memory, and the header, and brings the file to stable storage. Called
    /// once, when no other call is under way.
    ///
    /// # Errors
    /// As [`write_clusters`](Self::write_clusters), and [`WriteError::Sync`]; [`WriteError::Aborted`] also
    /// when a write had failed.
    pub fn finish(&self) -> Result<(), WriteError> {
        self.check_aborted()?;
        if self.failed.is_set() {
            return Err(WriteError::Aborted);
        }
        self.packing.finish(self)?;
        self.mapping.finish(self)?;
        let refcount_table = self.packing.write_refcounts(self)?;
        let header = header(&self.spec, self.l1_table, refcount_table);
        let bytes = header.to_bytes().ok_or(WriteError::Header)?;
        self.write(HostOffset(0), &bytes)?;
        self.check_aborted()?;
        self.output.finish(self.space.end()).map_err(WriteError::Sync)?;
        // Whatever comes now comes too late.
        self.aborted.set();
        Ok(())
    }

    /// The path that the file was created at.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.spec.path
    }

    /// Writes something, unless the file was given up. After an error there must be no way to finish
    /// the file. (No abort: other threads would then tell of that, perhaps before the error is told.)
    fn run(&self, write: impl FnOnce() -> Result<(), WriteError>) -> Result<(), WriteError> {
        self.check_aborted()?;
        write().inspect_err(|_| self.failed.set())
    }

    fn check_aborted(&self) -> Result<(), WriteError> {
        if self.is_aborted() { Err(WriteError::Aborted) } else { Ok(()) }
    }

    fn write(&self, host: HostOffset, data: &[u8]) -> Result<(), WriteError> {
        self.output.write_at(host.0, data).map_err(|cause| WriteError::Io { host, cause })
    }

    fn map(&self, first: u64, entries: impl IntoIterator<Item = L2Entry>) -> Result<(), WriteError> {
        self.mapping.set(first, entries, self)
    }

    /// Writes numbers of 8 bytes from `host` on: a table, or a part of one.
    fn write_table(&self, host: HostOffset, numbers: &[u64]) -> Result<(), WriteError> {
        let starts = (host.0..).step_by(TABLE_PIECE_BYTES);
        for (start, numbers) in starts.zip(numbers.chunks(TABLE_PIECE_BYTES / 8)) {
            let mut bytes = self.scratch(numbers.len() * 8)?;
            for (bytes, number) in bytes.as_chunks_mut().0.iter_mut().zip(numbers) {
                *bytes = number.to_be_bytes();
            }
            self.write_sparse(HostOffset(start), &bytes)?;
        }
        Ok(())
    }

    /// Reads back what [`write_table`](Self::write_table) wrote.
    fn read_table(&self, host: HostOffset, numbers: &mut [u64]) -> Result<(), WriteError> {
        let mut bytes = self.scratch(numbers.len() * 8)?;
        self.output.read_at(host.0, &mut bytes).map_err(|cause| WriteError::Io { host, cause })?;
        for (bytes, number) in bytes.as_chunks().0.iter().zip(numbers) {
            *number = u64::from_be_bytes(*bytes);
        }
        Ok(())
    }

    /// Writes all pages that are not empty. The file reads as zeroes where nothing was written, and
    /// takes no space there.
    fn write_sparse(&self, host: HostOffset, bytes: &[u8]) -> Result<(), WriteError> {
        // Also where it ends with empty pages: it may be read back.
        self.output.grow(host.0 + bytes.len() as u64);
        for (range, kind) in runs(bytes, ALIGNMENT) {
            if kind == ExtentKind::Data {
                self.write(HostOffset(host.0 + range.start as u64), &bytes[range])?;
            }
        }
        Ok(())
    }

    /// Memory to put something together in, of unspecified content.
    fn scratch(&self, length: usize) -> Result<Buffer, WriteError> {
        self.scratch.get(length, &self.aborted).ok_or(WriteError::Aborted)
    }
}

/// What the header says in the end.
fn header(spec: &FileSpec, l1_table: Table, refcount_table: Table) -> Header {
    let format = || Some("qcow2".to_owned());
    Header {
        version: Version::V3,
        cluster_bits: spec.cluster_bits,
        virtual_size: spec.virtual_size,
        backing: spec.backing.clone().map(|name| Backing { name, format: format() }),
        encryption: Encryption::None,
        l1_table,
        refcount_table,
        refcount_order: refcounts::ORDER,
        snapshots: 0,
        dirty: false,
        corrupt: false,
        external_data: false,
        compression_type: spec.compression_type,
        extended_l2: spec.extended_l2,
        compatible_features: 0,
        autoclear_features: 0,
        header_length: 0,
    }
}

/// Refuses what the format does not allow, and returns the number of entries of the L1 table.
fn check(spec: &FileSpec) -> Result<u64, WriteError> {
    if spec.extended_l2 && spec.cluster_bits.bits() < EXTENDED_L2_MIN_BITS {
        return Err(WriteError::Subclusters { cluster_size: spec.cluster_bits.size() });
    }
    if let Some(name) = &spec.backing
        && (name.is_empty() || name.contains(['/', ':', '\0']) || name.len() > BACKING_NAME_MAX as usize)
    {
        // A colon would make QEMU see a protocol.
        return Err(WriteError::BackingName { name: name.clone() });
    }
    // QEMU wants a table, even for an image of no bytes.
    let l1_entries = spec.virtual_size.div_ceil(l2_coverage(spec)).max(1);
    if !spec.virtual_size.is_multiple_of(SECTOR) || l1_entries * 8 > L1_TABLE_MAX {
        let (size, cluster_size) = (spec.virtual_size, spec.cluster_bits.size());
        return Err(WriteError::VirtualSize { size, cluster_size });
    }
    let table = Table { offset: 0, entries: l1_entries };
    header(spec, table, table).to_bytes().ok_or(WriteError::Header)?;
    Ok(l1_entries)
}

/// Numbers of 8 bytes in an L2 entry.
fn l2_entry_numbers(spec: &FileSpec) -> u64 {
    if spec.extended_l2 { 2 } else { 1 }
}

/// What an L2 table describes, in bytes of the guest's image.
fn l2_coverage(spec: &FileSpec) -> u64 {
    spec.cluster_bits.size() / 8 / l2_entry_numbers(spec) * spec.cluster_bits.size()
}

/// Sizes of tables and buffers, which are in memory.
fn index(number: u64) -> usize {
    usize::try_from(number).expect("within a table or buffer")
}

#[cfg(test)]
mod tests;

//! The digests of a layer: a BLAKE3 hash of every piece of data that it provides, so that damage is
//! found, and placed, without the cluster it came from.
//!
//! # On disk
//! All numbers are big-endian.
//!
//! | part | bytes |
//! |---|---|
//! | header | magic `rbd2qdig`, version u32 = 1, chunk size u32 |
//! | records | offset u64, length u32, kind u32 (1 data, 2 zero), 32 bytes: BLAKE3 of the data, or zeroes |
//! | footer | number of records u64, 32 bytes: BLAKE3 of everything before them |
//!
//! Offsets and lengths are bytes of the image as the guest sees it. Records ascend and are disjoint.
//! A data record lies within one chunk (a multiple of the chunk size and what follows), so that
//! reading one chunk suffices to check it; a zero record may span many. What no record covers, the
//! layer leaves to the layers below.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::durable;
use super::error::ChainError;

pub(crate) mod combine;
mod index;
mod reader;

pub(crate) use index::DigestIndex;
pub use reader::DigestReader;

/// The first eight bytes of every file of digests.
const MAGIC: [u8; 8] = *b"rbd2qdig";

/// The version that is written, and the only one that is read.
const VERSION: u32 = 1;

/// The smallest chunk, in bytes. Hashes of smaller pieces would take more room than they are worth.
pub const CHUNK_MIN: u32 = 64 << 10;

/// The largest chunk, in bytes: the largest cluster.
pub const CHUNK_MAX: u32 = 2 << 20;

/// Longest zero record, in bytes: a round number below 2^32, of which 16 TiB take 8192.
const ZERO_RECORD_MAX: u64 = 1 << 31;

/// How many records of finished segments are held, at most, while an older segment is still under
/// way, before the next segment must wait: 12 MiB of them. Reached only when a read hangs while the
/// others go on.
const HELD_RECORDS_MAX: usize = 256 << 10;

const KIND_DATA: u32 = 1;
const KIND_ZERO: u32 = 2;

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    chunk_size: U32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRecord {
    offset: U64,
    length: U32,
    kind: U32,
    blake3: [u8; 32],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawFooter {
    records: U64,
    blake3: [u8; 32],
}

/// Why digests could not be written or are not accepted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DigestsError {
    /// The file could not be written: a full disk, for instance.
    #[error("writing failed")]
    Write(#[source] io::Error),
    /// The file could not be read.
    #[error("reading failed")]
    Read(#[source] io::Error),
    /// The path leads to something else than a file.
    #[error("not a regular file")]
    NotARegularFile,
    /// The file is no file of digests, or of another version.
    #[error("not a file of digests that this program reads: {0}")]
    Header(&'static str),
    /// The file's length fits no number of records.
    #[error("{bytes} bytes are no whole number of records: the file is cut off or damaged")]
    Length {
        /// The file's length.
        bytes: u64,
    },
    /// A record that cannot be, or not there.
    #[error("record {index} is damaged: {reason}")]
    Record {
        /// Its number, from 0.
        index: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The records are not those that were written.
    #[error("the file is damaged: {0}")]
    Footer(&'static str),
    /// The file is not the one that the manifest names.
    #[error("the file is not the one that the manifest names")]
    OtherFile,
    /// Segments were handed over in a way that cannot be right. The copy is at fault; the layer must
    /// not be committed.
    #[error("the copy handed over segment {segment} wrongly: {reason}")]
    Segment {
        /// The segment's number.
        segment: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
}

/// Identifies a file of digests: nothing in it can change without changing this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DigestsInfo {
    /// The file's length.
    pub bytes: u64,
    /// The hash of the whole file.
    pub blake3: blake3::Hash,
}

impl DigestsInfo {
    /// Checks that the file at `path` is the one that this describes. Reads all of it.
    ///
    /// # Errors
    /// [`DigestsError::OtherFile`], [`DigestsError::Read`], [`DigestsError::NotARegularFile`].
    pub fn check_file(&self, path: &Path) -> Result<(), DigestsError> {
        let opened = crate::qcow2::open_regular(path).map_err(DigestsError::Read)?;
        let (file, metadata) = opened.ok_or(DigestsError::NotARegularFile)?;
        if metadata.len() != self.bytes {
            return Err(DigestsError::OtherFile);
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(file).map_err(DigestsError::Read)?;
        if hasher.finalize() == self.blake3 { Ok(()) } else { Err(DigestsError::OtherFile) }
    }
}

/// What a layer provides in a range of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Data of this hash.
    Data(blake3::Hash),
    /// Zeroes.
    Zero,
}

/// A range of the image that a layer provides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DigestRecord {
    /// First byte, counted from the image's start.
    pub offset: u64,
    /// Number of bytes, not 0.
    pub length: u64,
    /// What they are.
    pub content: Content,
}

impl DigestRecord {
    /// First byte behind the range.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset + self.length
    }
}

/// Writes a file of digests while a layer is being copied, by many threads.
///
/// The copy numbers its segments 0, 1, 2… in ascending order of their place in the image, and asks
/// for a handle of each with [`segment`](Self::segment). Whoever processes a piece of a segment adds
/// what it found to a clone of the handle; when the last clone is dropped, the segment is complete.
/// Complete segments are written in order. What is held in memory is bounded by the segments under
/// way, and by a fixed amount for those that overtook another.
///
/// A file that was not [`finish`](Self::finish)ed has no footer and is believed by nobody.
#[derive(Debug)]
pub struct DigestWriter(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    /// In bytes, a power of two.
    chunk_size: u32,
    state: Mutex<State>,
    /// Signalled when a segment has been written.
    written: Condvar,
}

#[derive(Debug)]
struct State {
    file: BufWriter<File>,
    /// Of all bytes written so far.
    hasher: blake3::Hasher,
    /// Length of the file so far, in bytes.
    bytes: u64,
    /// Records written so far.
    records: u64,
    /// The segment to write next.
    next: u64,
    /// Segments with a handle.
    open: usize,
    /// Complete segments that wait for an older one.
    waiting: BTreeMap<u64, Vec<DigestRecord>>,
    /// Records in `waiting`.
    held: usize,
    /// A run of zeroes that may go on in the next record. Longer than a record may be.
    zeroes: Option<Range<u64>>,
    /// First byte behind everything so far.
    end: u64,
    /// The first error. Nothing is written behind it.
    failure: Option<DigestsError>,
}

impl DigestWriter {
    /// Creates the file at `path`, which must not exist, for a layer of `cluster_size` bytes a
    /// cluster.
    ///
    /// # Errors
    /// [`ChainError::Io`], [`ChainError::Digests`].
    pub fn create(path: &Path, cluster_size: u32) -> Result<Self, ChainError> {
        let file = durable::create_aside(path)?;
        Ok(Self::on(file, path, cluster_size))
    }

    fn on(file: File, path: &Path, cluster_size: u32) -> Self {
        let chunk_size = cluster_size.next_power_of_two().clamp(CHUNK_MIN, CHUNK_MAX);
        let mut state = State {
            file: BufWriter::new(file),
            hasher: blake3::Hasher::new(),
            bytes: 0,
            records: 0,
            next: 0,
            open: 0,
            waiting: BTreeMap::new(),
            held: 0,
            zeroes: None,
            end: 0,
            failure: None,
        };
        let header = RawHeader { magic: MAGIC, version: VERSION.into(), chunk_size: chunk_size.into() };
        state.keep_failure(|state| state.write(header.as_bytes()));
        Self(Arc::new(Shared {
            path: path.to_owned(),
            chunk_size,
            state: Mutex::new(state),
            written: Condvar::new(),
        }))
    }

    /// The chunk size in bytes, a power of two: the cluster size, but at least [`CHUNK_MIN`].
    /// Pieces handed to [`SegmentDigests::add`] should begin and end at multiples of it, where the
    /// data do not begin or end anyway: hashes of parts of a chunk cannot be joined later.
    #[must_use]
    pub fn chunk_size(&self) -> u32 {
        self.0.chunk_size
    }

    /// A handle for segment `number`, each of which is asked for once.
    ///
    /// Blocks while very many records of newer segments wait for an older one to be complete. The
    /// calling thread must not hold the handle of an older segment then, or it waits for itself;
    /// threads that hold one and never call this are safe.
    #[must_use]
    pub fn segment(&self, number: u64) -> SegmentDigests {
        let mut state = self.0.lock();
        while number > state.next && state.held > HELD_RECORDS_MAX && state.failure.is_none() {
            state = self.0.written.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.open += 1;
        drop(state);
        SegmentDigests(Arc::new(Segment { number, records: Mutex::default(), shared: Arc::clone(&self.0) }))
    }

    /// Adds a record behind all others, without a segment; `false` where that, or anything before, has
    /// failed, which [`finish`](Self::finish) tells.
    pub(crate) fn push(&self, record: DigestRecord) -> bool {
        let mut state = self.0.lock();
        state.keep_failure(|state| state.append(record));
        state.failure.is_none()
    }

    /// Writes the footer, makes the file read-only and brings it to stable storage. All handles must
    /// be gone by then.
    ///
    /// # Errors
    /// [`ChainError::Digests`] with the first error of all that happened since the file was created,
    /// or when segments are missing; [`ChainError::Io`]. The layer must then not be committed.
    pub fn finish(self) -> Result<DigestsInfo, ChainError> {
        let mut state = self.0.lock();
        let finished = state.finish();
        let info = finished.map_err(|cause| ChainError::Digests { path: self.0.path.clone(), cause })?;
        durable::seal(state.file.get_ref(), &self.0.path)?;
        Ok(info)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the records of a segment whose last handle is gone, and writes all that are next.
    fn complete(&self, number: u64, mut records: Vec<DigestRecord>) {
        records.sort_unstable_by_key(|record| record.offset);
        let mut state = self.lock();
        state.open -= 1;
        if number < state.next || state.waiting.contains_key(&number) {
            let reason = "its number was given twice";
            state.failure.get_or_insert(DigestsError::Segment { segment: number, reason });
        }
        if state.failure.is_none() {
            state.held += records.len();
            state.waiting.insert(number, records);
            state.keep_failure(State::write_waiting);
        }
        self.written.notify_all();
    }
}

impl State {
    /// Runs a step unless one failed before, and keeps its error for [`DigestWriter::finish`].
    fn keep_failure(&mut self, step: impl FnOnce(&mut Self) -> Result<(), DigestsError>) {
        if self.failure.is_none()
            && let Err(error) = step(self)
        {
            self.failure = Some(error);
            // Nobody will ever read them.
            self.waiting.clear();
            self.held = 0;
        }
    }

    fn write_waiting(&mut self) -> Result<(), DigestsError> {
        while let Some(records) = self.waiting.remove(&self.next) {
            self.held -= records.len();
            for record in records {
                self.append(record)?;
            }
            self.next += 1;
        }
        Ok(())
    }

    /// Writes a record, except that zeroes wait for what follows them.
    fn append(&mut self, record: DigestRecord) -> Result<(), DigestsError> {
        if record.offset < self.end {
            let reason = "it overlaps what was handed over before";
            return Err(DigestsError::Segment { segment: self.next, reason });
        }
        self.end = record.end();
        match (record.content, &mut self.zeroes) {
            (Content::Zero, Some(zeroes)) if zeroes.end == record.offset => zeroes.end = record.end(),
            (Content::Zero, _) => {
                self.flush_zeroes()?;
                self.zeroes = Some(record.offset..record.end());
            }
            (Content::Data(hash), _) => {
                self.flush_zeroes()?;
                self.write_record(record.offset, record.length, KIND_DATA, *hash.as_bytes())?;
            }
        }
        Ok(())
    }

    fn flush_zeroes(&mut self) -> Result<(), DigestsError> {
        let Some(mut zeroes) = self.zeroes.take() else { return Ok(()) };
        while !zeroes.is_empty() {
            let length = (zeroes.end - zeroes.start).min(ZERO_RECORD_MAX);
            self.write_record(zeroes.start, length, KIND_ZERO, [0; 32])?;
            zeroes.start += length;
        }
        Ok(())
    }

    fn write_record(
        &mut self,
        offset: u64,
        length: u64,
        kind: u32,
        blake3: [u8; 32],
    ) -> Result<(), DigestsError> {
        let reason = "a record is longer than a chunk";
        let length =
            u32::try_from(length).map_err(|_| DigestsError::Segment { segment: self.next, reason })?;
        let raw = RawRecord { offset: offset.into(), length: length.into(), kind: kind.into(), blake3 };
        self.write(raw.as_bytes())?;
        self.records += 1;
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), DigestsError> {
        self.file.write_all(bytes).map_err(DigestsError::Write)?;
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    fn finish(&mut self) -> Result<DigestsInfo, DigestsError> {
        if let Some(failure) = self.failure.take() {
            return Err(failure);
        }
        if self.open != 0 || !self.waiting.is_empty() {
            let reason = "it is not complete, or was never handed over";
            return Err(DigestsError::Segment { segment: self.next, reason });
        }
        self.flush_zeroes()?;
        let records = U64::new(self.records);
        self.write(records.as_bytes())?;
        let hash = self.hasher.finalize();
        self.write(hash.as_bytes())?;
        self.file.flush().map_err(DigestsError::Write)?;
        Ok(DigestsInfo { bytes: self.bytes, blake3: self.hasher.finalize() })
    }
}

/// Takes what one segment of the image provides. Clones stand for the same segment; when the last
/// one is dropped, the segment is complete.
#[derive(Clone, Debug)]
pub struct SegmentDigests(Arc<Segment>);

#[derive(Debug)]
struct Segment {
    number: u64,
    records: Mutex<Vec<DigestRecord>>,
    shared: Arc<Shared>,
}

impl SegmentDigests {
    /// Adds data that the layer provides at `offset`, up to where anything else begins. Hashes in
    /// the calling thread.
    ///
    /// # Panics
    /// When the data would end behind the last offset there is.
    pub fn add(&self, offset: u64, data: &[u8]) {
        let chunk_size = u64::from(self.0.shared.chunk_size);
        let mut records = Vec::new();
        let (mut offset, mut rest) = (offset, data);
        while !rest.is_empty() {
            let room = chunk_size - offset % chunk_size;
            // `room` is at most CHUNK_MAX.
            let (piece, after) = rest.split_at(rest.len().min(usize::try_from(room).unwrap_or(usize::MAX)));
            let length = piece.len() as u64;
            records.push(DigestRecord { offset, length, content: Content::Data(blake3::hash(piece)) });
            offset = offset.checked_add(length).expect("an image ends before 2^64");
            rest = after;
        }
        self.0.lock().append(&mut records);
    }

    /// Adds zeroes that the layer provides, whatever lies below. Any length.
    pub fn add_zero(&self, range: Range<u64>) {
        if !range.is_empty() {
            let length = range.end - range.start;
            self.0.lock().push(DigestRecord { offset: range.start, length, content: Content::Zero });
        }
    }
}

impl Segment {
    fn lock(&self) -> MutexGuard<'_, Vec<DigestRecord>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        let records = std::mem::take(&mut *self.lock());
        self.shared.complete(self.number, records);
    }
}

#[cfg(test)]
mod tests;

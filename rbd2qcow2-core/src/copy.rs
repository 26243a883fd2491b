//! The pipeline: compare, read, zero-detect, write.
//!
//! One thread asks the source for segments; a few compare segments and cut what changed into
//! blocks; `parallel` threads take a block each, read it and hand it to the layer. The channels
//! between them are short, and all data lies in buffers of one [`BufferPool`], so memory does not
//! grow with the image, and a slow stage holds the ones before it back.
//!
//! The first error wins: it sets the stop flag and makes the layer refuse work, which ends every
//! thread; all are joined before [`Copy::run`] returns.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::Scope;
use std::time::{Duration, Instant};

use bytes::Bytes;
use crossbeam::channel::{self, Receiver, RecvTimeoutError, Sender};

use crate::buffer::BufferPool;
use crate::cancel::Cancel;
use crate::chain::digests::{DigestWriter, SegmentDigests};
use crate::extent::{Extent, ExtentKind, align, align_down, align_up, bundles, runs};
use crate::layer::{LayerError, LayerWriter, Patch, SECTOR};
use crate::progress::Progress;
use crate::rate::RateLimit;
use crate::source::{RbdDiffSource, SourceError};

mod finish;

pub use finish::finish;

/// Threads that compare segments. Eight keep OSDs busy that answer one request per object.
const DIFF_THREADS: usize = 8;

/// The longest read: half an object of the usual size. Whole ones are no faster, and librbd holds
/// about three times what is under way.
const BLOCK: u64 = 2 << 20;

/// Why a copy ended before all was copied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CopyError {
    /// The source failed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The layer failed.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// The source broke the promises of [`RbdDiffSource`]. What it says cannot be relied on.
    #[error("the source is defective: {what}, at bytes {}..{} of the image", range.start, range.end)]
    Defective {
        /// What it did.
        what: &'static str,
        /// Where.
        range: Range<u64>,
    },
    /// Something was neither copied nor found unchanged, and nobody reported an error. The code is
    /// wrong.
    #[error("internal error: {scanned} of {size} bytes were compared and {read} of {to_read} were read")]
    Incomplete {
        /// Bytes that were dealt with.
        scanned: u64,
        /// Bytes of the snapshot.
        size: u64,
        /// Bytes that were read.
        read: u64,
        /// Bytes that had to be read.
        to_read: u64,
    },
    /// No buffer can hold a unit of the layer.
    #[error("{largest} bytes of memory are too little for a layer that is written {unit} bytes at a time")]
    Memory {
        /// The layer's unit in bytes.
        unit: u64,
        /// The largest buffer in bytes.
        largest: u64,
    },
    /// A thread could not be started.
    #[error("cannot start a thread for the copy")]
    Thread(#[source] std::io::Error),
    /// A stop was asked for.
    #[error("interrupted")]
    Cancelled,
}

/// One image's copy: everything that takes part in it.
#[derive(Clone, Copy)]
pub struct Copy<'a> {
    /// What is read.
    pub source: &'a dyn RbdDiffSource,
    /// What is written.
    pub layer: &'a dyn LayerWriter,
    /// Whether nothing lies below the layer, so that zeroes need not be written.
    pub root: bool,
    /// Where the digests of what is written go.
    pub digests: Option<&'a DigestWriter>,
    /// Where the memory comes from.
    pub buffers: &'a BufferPool,
    /// Limits the reads.
    pub rate_limit: Option<&'a RateLimit>,
    /// Reads in flight, at least 1.
    pub parallel: usize,
    /// Is counted up, from 0.
    pub progress: &'a Progress,
    /// Asks for a stop.
    pub cancel: &'a Cancel,
    /// A part of `cancel` that the copy sets when it fails. A source that can wait long should look
    /// at it.
    pub stop: &'a Cancel,
}

/// A part of the image to be compared.
struct Segment {
    range: Range<u64>,
    digests: Option<SegmentDigests>,
}

/// What changed in some units of the layer, wholly: see [`bundles`].
struct Block {
    pieces: Vec<Extent>,
    /// What is to be read for it, no more than a buffer holds. Empty where nothing is data.
    read: Range<u64>,
    digests: Option<SegmentDigests>,
}

/// Whether an extent, which may be nonsense, is a part of `range`.
fn lies_in(extent: &Extent, range: &Range<u64>) -> bool {
    let end = extent.offset.checked_add(extent.length);
    extent.length > 0 && extent.offset >= range.start && end.is_some_and(|end| end <= range.end)
}

/// What the threads of one run share.
struct Run<'a> {
    copy: Copy<'a>,
    /// Length of the longest block in bytes.
    block: u64,
    start: Instant,
    /// Nanoseconds from `start` until the last segment so far was compared.
    diff_nanos: AtomicU64,
    /// The first error.
    failure: Mutex<Option<CopyError>>,
}

impl Copy<'_> {
    /// Copies everything, and gives the time from the start until nothing was left to compare.
    ///
    /// Returns when all is handed to the layer, which may still be writing it: see
    /// [`LayerWriter::finish`]. Blocks; no longer than the source's and the layer's calls take after
    /// an error or a cancel.
    ///
    /// # Errors
    /// The first [`CopyError`], or [`CopyError::Cancelled`]. The layer is then unusable.
    pub fn run(&self) -> Result<Duration, CopyError> {
        let size = self.source.size();
        self.progress.size.add(size);
        let largest = self.buffers.largest() as u64;
        let unit = self.layer.unit();
        if unit > largest {
            return Err(CopyError::Memory { unit, largest });
        }
        let run = Run {
            copy: *self,
            // A unit is never split.
            block: BLOCK.min(largest).max(unit),
            start: Instant::now(),
            diff_nanos: AtomicU64::new(0),
            failure: Mutex::new(None),
        };
        let started = std::thread::scope(|scope| run.spawn_all(scope).map(|done| run.watch(&done)));
        if self.cancel.is_set() {
            return Err(CopyError::Cancelled);
        }
        if let Some(error) = run.failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        started?;
        if self.stop.is_set() {
            // Set by the caller: threads went home early, and had no error to tell.
            return Err(CopyError::Cancelled);
        }
        self.check_complete(size)?;
        Ok(Duration::from_nanos(run.diff_nanos.into_inner()))
    }
}

impl Copy<'_> {
    /// The books must balance. A backup that lacks a block without anybody knowing is the worst that
    /// can happen, so what cannot happen is checked all the same.
    fn check_complete(&self, size: u64) -> Result<(), CopyError> {
        let Progress { scanned, read, to_read, .. } = self.progress;
        let (scanned, read, to_read) = (scanned.get(), read.get(), to_read.get());
        if scanned == size && read == to_read {
            return Ok(());
        }
        Err(CopyError::Incomplete { scanned, size, read, to_read })
    }
}

/// Ends the run when its thread panics, so that the others do not wait for it forever.
struct StopOnPanic<'a>(&'a Cancel);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.set();
        }
    }
}

impl Run<'_> {
    /// Starts all threads. The receiver is disconnected when the last has ended.
    fn spawn_all<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) -> Result<Receiver<()>, CopyError> {
        let parallel = self.copy.parallel.max(1);
        let (segments_in, segments) = channel::bounded::<Segment>(DIFF_THREADS);
        let (blocks_in, blocks) = channel::bounded::<Block>(parallel);
        let (done_in, done) = channel::bounded::<()>(0);
        self.spawn(scope, "segments", &done_in, move || self.find_segments(&segments_in))?;
        for _ in 0..DIFF_THREADS {
            let (segments, blocks_in) = (segments.clone(), blocks_in.clone());
            self.spawn(scope, "diff", &done_in, move || self.compare_segments(&segments, &blocks_in))?;
        }
        for _ in 0..parallel {
            let blocks = blocks.clone();
            self.spawn(scope, "copy", &done_in, move || self.copy_blocks(&blocks))?;
        }
        Ok(done)
    }

    fn spawn<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        name: &str,
        done: &Sender<()>,
        work: impl FnOnce() -> Result<(), CopyError> + Send + 'scope,
    ) -> Result<(), CopyError> {
        let done = done.clone();
        let thread = move || {
            let _guard = StopOnPanic(self.copy.stop);
            if let Err(error) = work() {
                self.fail(error);
            }
            drop(done);
        };
        match std::thread::Builder::new().name(name.into()).spawn_scoped(scope, thread) {
            Ok(_) => Ok(()),
            Err(error) => {
                // The threads that did start must not wait for the ones that did not.
                self.copy.stop.set();
                self.copy.layer.abort();
                Err(CopyError::Thread(error))
            }
        }
    }

    /// Keeps the first error and stops everyone.
    fn fail(&self, error: CopyError) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.copy.stop.set();
    }

    /// Waits for all threads, and frees those that the layer holds when the run is to stop.
    fn watch(&self, done: &Receiver<()>) {
        while done.recv_timeout(Cancel::POLL) == Err(RecvTimeoutError::Timeout) {
            if self.copy.stop.is_set() {
                self.copy.layer.abort();
            }
        }
    }

    fn find_segments(&self, segments: &Sender<Segment>) -> Result<(), CopyError> {
        let progress = self.copy.progress;
        let mut end = 0;
        for (sequence, range) in (0..).zip(self.copy.source.segments(self.copy.layer.unit())) {
            let range = range?;
            self.check_segment(&range, end)?;
            progress.scanned.add(range.start - end);
            end = range.end;
            let digests = self.copy.digests.map(|digests| digests.segment(sequence));
            if self.send(segments, Segment { range, digests }).is_err() {
                return Ok(());
            }
        }
        progress.scanned.add(self.copy.source.size() - end);
        Ok(())
    }

    /// A segment out of place would have grains written twice, or not at all.
    fn check_segment(&self, range: &Range<u64>, end: u64) -> Result<(), CopyError> {
        let (unit, size) = (self.copy.layer.unit(), self.copy.source.size());
        let what = match range {
            range if range.start < end || range.is_empty() => "a segment that does not ascend",
            range if range.end > size => "a segment that ends behind the image",
            range if !range.start.is_multiple_of(unit) => "a segment that does not start as it was asked to",
            range if !range.end.is_multiple_of(unit) && range.end != size => {
                "a segment that does not end as it was asked to"
            }
            _ => return Ok(()),
        };
        Err(CopyError::Defective { what, range: range.clone() })
    }

    fn compare_segments(
        &self,
        segments: &Receiver<Segment>,
        blocks: &Sender<Block>,
    ) -> Result<(), CopyError> {
        let Copy { source, layer, progress, .. } = self.copy;
        for Segment { range, digests } in segments {
            if self.copy.stop.is_set() {
                return Ok(());
            }
            let length = range.end - range.start;
            let mut found = Vec::new();
            let asked = Instant::now();
            source.diff(range.clone(), &mut found)?;
            progress.diff_nanos.add_time(asked.elapsed());
            if let Some(extent) = found.iter().find(|found| !lies_in(found, &range)) {
                let what = "an extent outside of the segment that was asked about";
                return Err(CopyError::Defective { what, range: extent.offset..extent.offset });
            }
            self.count(&found);
            let aligned = align(found, layer.grain(), source.size());
            for pieces in bundles(aligned, layer.unit(), self.block) {
                let read = self.to_read(&pieces);
                progress.to_read.add(read.end - read.start);
                if self.send(blocks, Block { pieces, read, digests: digests.clone() }).is_err() {
                    return Ok(());
                }
            }
            progress.scanned.add(length);
            let nanos = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.diff_nanos.fetch_max(nanos, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Hands something to the next stage. Fails when that stage is gone, whose error is then the one
    /// to report.
    fn send<T>(&self, next: &Sender<T>, mut item: T) -> Result<(), ()> {
        loop {
            match next.send_timeout(item, Cancel::POLL) {
                Ok(()) => return Ok(()),
                Err(channel::SendTimeoutError::Timeout(back)) if !self.copy.stop.is_set() => item = back,
                Err(_) => return Err(()),
            }
        }
    }

    fn count(&self, found: &[Extent]) {
        for extent in found {
            match extent.kind {
                ExtentKind::Data => self.copy.progress.data_extents.add(1),
                ExtentKind::Zero => self.copy.progress.zero_extents.add(1),
            }
        }
    }

    /// What must be read of the snapshot for a bundle of pieces. One read, even where there are gaps:
    /// they are shorter than a unit, and less to the cluster than another request.
    fn to_read(&self, pieces: &[Extent]) -> Range<u64> {
        let mut data = pieces.iter().filter(|piece| piece.kind == ExtentKind::Data);
        let Some(first) = data.next() else { return 0..0 };
        let (start, end) = (first.offset, data.next_back().unwrap_or(first).end());
        if !self.copy.layer.wants_whole_units() {
            return start..end;
        }
        let unit = self.copy.layer.unit();
        align_down(start, unit)..align_up(end, unit).min(self.copy.source.size())
    }

    fn copy_blocks(&self, blocks: &Receiver<Block>) -> Result<(), CopyError> {
        for block in blocks {
            if self.copy.stop.is_set() {
                return Ok(());
            }
            let Some(data) = self.read(&block.read)? else { return Ok(()) };
            let patch = self.patch(block.pieces, block.read.start, data);
            if !patch.pieces.is_empty() {
                self.hand_over(patch, block.digests.as_ref())?;
            }
        }
        Ok(())
    }

    /// End of a range in the layer, whose size is the image's rounded up to sectors.
    fn padded(&self, end: u64) -> u64 {
        if end == self.copy.source.size() { align_up(end, SECTOR) } else { end }
    }

    /// Reads a range, with zeroes behind the image's end. `None` when the run is to stop.
    fn read(&self, range: &Range<u64>) -> Result<Option<Bytes>, CopyError> {
        let Copy { source, buffers, progress, stop, .. } = self.copy;
        if range.is_empty() {
            return Ok(Some(Bytes::new()));
        }
        let length = range.end - range.start;
        let padded = index(self.padded(range.end) - range.start);
        if let Some(limit) = self.copy.rate_limit {
            limit.take(length, stop);
        }
        let Some(mut buffer) = buffers.get(padded, stop) else { return Ok(None) };
        buffer.resize(index(length));
        let asked = Instant::now();
        source.read(range.start, &mut buffer)?;
        progress.read_nanos.add_time(asked.elapsed());
        progress.read.add(length);
        buffer.resize(padded);
        Ok(Some(buffer.freeze()))
    }

    /// Finds out what of the data are zeroes. A root has no use for them.
    fn patch(&self, changed: Vec<Extent>, offset: u64, data: Bytes) -> Patch {
        let grain = index(self.copy.layer.grain());
        let mut pieces = Vec::with_capacity(changed.len());
        for mut piece in changed {
            piece.length = self.padded(piece.end()) - piece.offset;
            if piece.kind == ExtentKind::Zero {
                pieces.push(piece);
                continue;
            }
            let from = index(piece.offset - offset);
            let found = runs(&data[from..from + index(piece.length)], grain);
            pieces.extend(found.map(|(range, kind)| Extent {
                offset: piece.offset + range.start as u64,
                length: range.len() as u64,
                kind,
            }));
        }
        pieces.retain(|piece| piece.kind == ExtentKind::Data || !self.copy.root);
        Patch { offset, data, pieces }
    }

    /// Hands a patch to the layer, and takes the digests of what that holds of it.
    fn hand_over(&self, patch: Patch, digests: Option<&SegmentDigests>) -> Result<(), CopyError> {
        let progress = self.copy.progress;
        let asked = Instant::now();
        let held = self.copy.layer.write(patch.clone())?;
        progress.write_nanos.add_time(asked.elapsed());
        for extent in held {
            match extent.kind {
                ExtentKind::Data => {
                    progress.data.add(extent.length);
                    if let Some(digests) = digests {
                        digests.add(extent.offset, &patch.bytes(&extent));
                    }
                }
                ExtentKind::Zero => {
                    progress.zero.add(extent.length);
                    if let Some(digests) = digests {
                        digests.add_zero(extent.range());
                    }
                }
            }
        }
        Ok(())
    }
}

/// Lengths of what fits a buffer, and grains: in memory.
fn index(length: u64) -> usize {
    usize::try_from(length).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests;

//! The proof of an increment: that what was not reported as changed has not changed.
//!
//! What changed is what somebody says, be it a cluster or an embedder's source. A change that is not told is
//! lost for good: the next comparison begins where this one ends. So while an increment is copied some pages
//! are chosen of all that was *not* reported, others every time (`Watched`), and in the end they are read and
//! held against what the chain below holds (`Watched::prove`). 64 pages find
//! every second time that a hundredth of an image is lost, and as the loss stays, within a week nearly for sure.
//!
//! # Which pages
//! Where a source compares only what exists (`Weigh::Nothing`), every page of that is as good as any other.
//! A source that is asked about the whole image (`Weigh::Unreported`) also passes by what never was, which
//! may be nearly all of it. There pages are chosen by what the chain holds: most of them among its data, some
//! where the chain has nothing beside data in the same object (data that were lost from the beginning), and a
//! few anywhere. The tables of the chain are read for that, of `WEIGHED` bytes of the image at most: of larger
//! ones a random part of each segment is looked at.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::buffer::{Buffer, BufferPool};
use crate::cancel::Cancel;
use crate::extent::{Extent, align_down, align_up};
use crate::qcow2::chain::ChainReader;
use crate::qcow2::error::ReadError;
use crate::qcow2::layer::Piece;
use crate::ranges::{intersection, remainder, widened};
use crate::source::{RbdDiffSource, SourceError};

mod sampler;

use sampler::{PAGE, PAGE_BYTES, Random, Sampler, gaps};

/// Bytes of an image of which the chain's tables are looked at.
const WEIGHED: u64 = 64 << 30;

/// Bytes of the image that are looked at together where the source was not asked.
const STEP: u64 = 512 << 20;

/// Reads in flight.
const THREADS: usize = 16;

/// Why it is not known whether changes were lost.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProveError {
    /// The source could not be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The chain could not be read.
    #[error("cannot read what the chain holds already, so nothing can be built upon it")]
    Chain(#[from] ReadError),
    /// A thread could not be started.
    #[error("cannot start a thread")]
    Thread(#[source] std::io::Error),
    /// A stop was asked for.
    #[error("interrupted")]
    Cancelled,
}

/// Which pages are better than others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Weigh {
    /// None: segments hold what exists.
    Nothing,
    /// Those where the chain has data, or an object of so many bytes that has some. Segments hold all of the
    /// image, or else what lies between them is chosen from, too.
    Unreported {
        /// Bytes of an object.
        object: u64,
    },
}

/// A source that is watched while it tells what changed.
pub(crate) struct Watched<'a> {
    source: &'a dyn RbdDiffSource,
    /// What the changes are to be put upon.
    chain: &'a ChainReader,
    /// The layer's, in bytes.
    grain: u64,
    weigh: Weigh,
    /// How many pages are kept.
    count: usize,
    state: Mutex<State>,
}

struct State {
    /// Pages where the chain holds data.
    held: Sampler,
    /// Others, in objects that exist.
    near: Sampler,
    /// The rest.
    far: Sampler,
    random: Random,
    /// Why the chain's tables are no longer looked at.
    failure: Option<ReadError>,
}

/// What was proved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Proof {
    /// Bytes that were read.
    pub(crate) bytes: u64,
    /// Pages that were read.
    pub(crate) looked_at: u64,
    /// Pages that are not what the chain holds, by their offset: ascending.
    pub(crate) differing: Vec<u64>,
}

impl<'a> Watched<'a> {
    /// Watches `source` while its changes are written to a layer of the given grain upon `chain`, and keeps
    /// `count` pages. Another `seed` keeps others.
    pub(crate) fn new(
        source: &'a dyn RbdDiffSource,
        chain: &'a ChainReader,
        grain: u64,
        weigh: Weigh,
        count: usize,
        seed: u64,
    ) -> Self {
        let mut random = Random(seed);
        let mut sampler = || Sampler::new(count, random.below(u64::MAX));
        let (held, near, far) = (sampler(), sampler(), sampler());
        let state = Mutex::new(State { held, near, far, random, failure: None });
        Self { source, chain, grain, weigh, count, state }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of what was not reported of `range`. `reported` is ascending and disjoint.
    fn pass(&self, range: &Range<u64>, reported: &[Extent]) {
        let size = self.source.size();
        let unreported = gaps(range, reported.iter().map(Extent::range), self.grain, size);
        if unreported.is_empty() {
            return;
        }
        let Weigh::Unreported { object } = self.weigh else { return self.state().near.offer(&unreported) };
        let window = {
            let mut state = self.state();
            if state.failure.is_some() {
                return;
            }
            window(range, object, size, &mut state.random)
        };
        let unreported = intersection(&unreported, std::slice::from_ref(&window));
        let data = match self.held(&window) {
            Ok(data) => data,
            Err(error) => {
                self.state().failure.get_or_insert(error);
                return;
            }
        };
        let held = intersection(&unreported, &widened(data.iter().cloned(), PAGE));
        let others = remainder(&unreported, &held);
        let mut there: Vec<_> = data.into_iter().chain(reported.iter().map(Extent::range)).collect();
        there.sort_unstable_by_key(|range| range.start);
        let objects = widened(there.into_iter(), object);
        let (near, far) = (intersection(&others, &objects), remainder(&others, &objects));
        let mut state = self.state();
        state.held.offer(&held);
        state.near.offer(&near);
        state.far.offer(&far);
    }

    /// Where the chain holds data, in a part of the image.
    fn held(&self, range: &Range<u64>) -> Result<Vec<Range<u64>>, ReadError> {
        let end = self.chain.virtual_size();
        let mut held = Vec::new();
        for piece in self.chain.map(range.start.min(end)..range.end.min(end))? {
            let piece = piece?;
            if matches!(piece.piece, Piece::Data | Piece::Compressed) {
                held.push(piece.range);
            }
        }
        Ok(held)
    }

    /// The pages that are to be read: ascending, each once.
    fn chosen(&self) -> Result<Vec<u64>, ReadError> {
        let mut state = self.state();
        if let Some(failure) = state.failure.take() {
            return Err(failure);
        }
        let kinds = [&state.held, &state.near, &state.far].map(Sampler::places);
        // Five eighths, two, and one; what one kind does not have is for the next.
        let shares = [self.count - self.count / 4 - self.count / 8, self.count / 4, self.count / 8];
        let mut chosen = Vec::with_capacity(self.count);
        for (places, share) in kinds.iter().zip(shares) {
            chosen.extend(places.iter().take(share));
        }
        for (places, share) in kinds.iter().zip(shares) {
            let missing = self.count - chosen.len();
            chosen.extend(places.iter().skip(share).take(missing));
        }
        chosen.sort_unstable();
        chosen.dedup();
        Ok(chosen)
    }

    /// Reads the pages that were chosen, and compares. To be called when the copy has ended well. Blocks;
    /// takes 1 MiB.
    ///
    /// # Errors
    /// [`ProveError`]. Nothing is known then.
    pub(crate) fn prove(&self, stop: &Cancel) -> Result<Proof, ProveError> {
        let chosen = self.chosen()?;
        let threads = THREADS.min(chosen.len());
        let buffers = BufferPool::new(THREADS << 16);
        let next = AtomicUsize::new(0);
        let outcome: Mutex<Result<Proof, ProveError>> = Mutex::new(Ok(Proof::default()));
        let work = || {
            while let Some(offset) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
                let result = self.compare(*offset, &buffers, stop);
                let mut outcome = outcome.lock().unwrap_or_else(PoisonError::into_inner);
                let Ok(proof) = &mut *outcome else { return };
                match result {
                    Ok((length, same)) => {
                        proof.bytes += length;
                        proof.looked_at += 1;
                        proof.differing.extend((!same).then_some(*offset));
                    }
                    Err(error) => return *outcome = Err(error),
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..threads {
                std::thread::Builder::new().name("prove".into()).spawn_scoped(scope, work)?;
            }
            Ok(())
        })
        .map_err(ProveError::Thread)?;
        let mut proof = outcome.into_inner().unwrap_or_else(PoisonError::into_inner)?;
        proof.differing.sort_unstable();
        Ok(proof)
    }

    /// Compares one page. Gives its length, and whether it is the same.
    fn compare(&self, offset: u64, buffers: &BufferPool, stop: &Cancel) -> Result<(u64, bool), ProveError> {
        let length = PAGE.min(self.source.size() - offset);
        let index = |length: u64| usize::try_from(length).expect("a page");
        let mut now = buffers.get(index(length), stop).ok_or(ProveError::Cancelled)?;
        self.source.read(offset, &mut now)?;
        let mut then = [0; PAGE_BYTES];
        // What lies behind the chain's end is zeroes.
        let inside = length.min(self.chain.virtual_size().saturating_sub(offset));
        if inside > 0 {
            self.chain.read_at(offset, &mut then[..index(inside)])?;
        }
        Ok((length, now[..] == then[..index(length)]))
    }
}

/// A part of `range` that begins at an object, at random: as much of it as fits into [`WEIGHED`] bytes of the
/// whole image.
fn window(range: &Range<u64>, object: u64, size: u64, random: &mut Random) -> Range<u64> {
    if size <= WEIGHED {
        return range.clone();
    }
    let length = range.end - range.start;
    // Less than the length, as the size is more.
    let share = u64::try_from(u128::from(length) * u128::from(WEIGHED) / u128::from(size)).unwrap_or(length);
    let share = align_up(share, PAGE).max(object);
    let places = length.div_ceil(share);
    let start = range.start + random.below(places) * share;
    start..(start + share).min(range.end)
}

/// Has what lies between segments looked at, too.
struct Between<'a> {
    watched: &'a Watched<'a>,
    segments: Box<dyn Iterator<Item = Result<Range<u64>, SourceError>> + Send + 'a>,
    end: u64,
}

impl Between<'_> {
    fn pass(&mut self, to: u64) {
        let mut start = self.end;
        while start < to {
            let end = (align_down(start, STEP) + STEP).min(to);
            self.watched.pass(&(start..end), &[]);
            start = end;
        }
    }
}

impl Iterator for Between<'_> {
    type Item = Result<Range<u64>, SourceError>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.segments.next();
        match &next {
            Some(Ok(segment)) => {
                self.pass(segment.start);
                self.end = segment.end;
            }
            Some(Err(_)) => {}
            None => {
                self.pass(self.watched.source.size());
                self.end = self.watched.source.size();
            }
        }
        next
    }
}

impl RbdDiffSource for Watched<'_> {
    fn size(&self) -> u64 {
        self.source.size()
    }

    fn segments(&self, align: u64) -> Box<dyn Iterator<Item = Result<Range<u64>, SourceError>> + Send + '_> {
        let segments = self.source.segments(align);
        match self.weigh {
            Weigh::Nothing => segments,
            Weigh::Unreported { .. } => Box::new(Between { watched: self, segments, end: 0 }),
        }
    }

    fn diff(&self, segment: Range<u64>, found: &mut Vec<Extent>) -> Result<(), SourceError> {
        let before = found.len();
        self.source.diff(segment.clone(), found)?;
        let reported = &mut found[before..];
        reported.sort_unstable_by_key(|extent| extent.offset);
        self.pass(&segment, reported);
        Ok(())
    }

    fn read(&self, offset: u64, buffer: &mut Buffer) -> Result<(), SourceError> {
        self.source.read(offset, buffer)
    }

    fn confirm(&self) -> Result<(), SourceError> {
        self.source.confirm()
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "lists of one range")]
mod tests;

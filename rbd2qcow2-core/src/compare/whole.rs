//! All that an image and a chain hold, as a source: what there is to compare.

use std::collections::BTreeSet;
use std::iter::Peekable;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::buffer::Buffer;
use crate::extent::{Extent, ExtentKind, align_down};
use crate::qcow2::chain::{ChainPieces, ChainReader};
use crate::qcow2::error::ReadError;
use crate::qcow2::layer::Piece;
use crate::ranges::remainder;
use crate::source::{RbdDiffSource, SourceError};

/// Bytes of the image that are looked at together where it holds nothing, as with chains as sources.
const STEP: u64 = 64 << 20;

/// An image, with everything that the image or the chain holds reported as changed: data where the image
/// has data, zeroes where only the chain does. What neither of them holds is the same in both, and costs
/// nothing.
pub(crate) struct Whole<'a> {
    /// Compared with nothing.
    image: &'a dyn RbdDiffSource,
    chain: &'a ChainReader,
    /// Where segments begin of which the image holds nothing, until they are asked about. As many as are
    /// under way.
    holes: Mutex<BTreeSet<u64>>,
}

impl<'a> Whole<'a> {
    /// What there is to compare of `image`, a source that is compared with nothing, and `chain`.
    pub(crate) fn new(image: &'a dyn RbdDiffSource, chain: &'a ChainReader) -> Self {
        Self { image, chain, holes: Mutex::default() }
    }

    /// The part of a range that the chain can be asked about.
    fn inside(&self, range: &Range<u64>) -> Range<u64> {
        let end = self.chain.virtual_size();
        range.start.min(end)..range.end.min(end)
    }

    /// Where the chain holds data, in a part of the image.
    fn held(&self, range: &Range<u64>) -> Result<Vec<Range<u64>>, ReadError> {
        let mut held = Vec::new();
        for piece in self.chain.map(self.inside(range))? {
            let piece = piece?;
            if is_data(piece.piece) {
                held.push(piece.range);
            }
        }
        Ok(held)
    }
}

fn is_data(piece: Piece) -> bool {
    matches!(piece, Piece::Data | Piece::Compressed)
}

impl RbdDiffSource for Whole<'_> {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn segments(&self, align: u64) -> Box<dyn Iterator<Item = Result<Range<u64>, SourceError>> + Send + '_> {
        let segments = self.image.segments(align).peekable();
        Box::new(Segments { whole: self, segments, step: STEP.max(align), end: 0, hole: None, failed: false })
    }

    fn diff(&self, segment: Range<u64>, found: &mut Vec<Extent>) -> Result<(), SourceError> {
        let mut data = Vec::new();
        let hole = self.holes.lock().unwrap_or_else(PoisonError::into_inner).remove(&segment.start);
        if !hole {
            self.image.diff(segment.clone(), &mut data)?;
        }
        data.retain(|extent| extent.kind == ExtentKind::Data);
        data.sort_unstable_by_key(|extent| extent.offset);
        let held = self
            .held(&segment)
            .map_err(|cause| SourceError::Diff { range: segment, cause: Box::new(cause) })?;
        let ranges: Vec<_> = data.iter().map(Extent::range).collect();
        let zeroes = remainder(&held, &ranges);
        found.extend(zeroes.into_iter().filter_map(|range| Extent::new(range, ExtentKind::Zero)));
        found.append(&mut data);
        Ok(())
    }

    fn read(&self, offset: u64, buffer: &mut Buffer) -> Result<(), SourceError> {
        self.image.read(offset, buffer)
    }

    fn confirm(&self) -> Result<(), SourceError> {
        self.image.confirm()
    }
}

/// The image's segments, and between them those where only the chain holds something.
struct Segments<'a> {
    whole: &'a Whole<'a>,
    segments: Peekable<Box<dyn Iterator<Item = Result<Range<u64>, SourceError>> + Send + 'a>>,
    step: u64,
    /// Where the segment before ended.
    end: u64,
    /// The chain's tables up to the next segment of the image, if it is looked at.
    hole: Option<Hole<'a>>,
    failed: bool,
}

struct Hole<'a> {
    pieces: ChainPieces<'a>,
    /// The data that are next.
    next: Range<u64>,
    end: u64,
}

impl Segments<'_> {
    /// The next segment before the image's next one.
    fn in_hole(&mut self) -> Result<Option<Range<u64>>, ReadError> {
        let Some(hole) = &mut self.hole else { return Ok(None) };
        while hole.next.end <= self.end {
            match hole.pieces.next().transpose()? {
                Some(piece) if is_data(piece.piece) => hole.next = piece.range,
                Some(_) => {}
                None => return Ok(None),
            }
        }
        // All that is in the step, at once: pieces may be very small.
        let first = hole.next.start.max(self.end);
        let start = align_down(first, self.step).max(self.end);
        Ok(Some(start..align_down(first, self.step).saturating_add(self.step).min(hole.end)))
    }

    fn fail(&mut self, range: Range<u64>, cause: ReadError) -> Option<Result<Range<u64>, SourceError>> {
        self.failed = true;
        Some(Err(SourceError::Segments { range, cause: Box::new(cause) }))
    }
}

impl<'a> Iterator for Segments<'a> {
    type Item = Result<Range<u64>, SourceError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let whole: &'a Whole<'a> = self.whole;
        let next = match self.segments.peek() {
            Some(Ok(segment)) => segment.start,
            Some(Err(_)) => {
                self.failed = true;
                return self.segments.next();
            }
            None => whole.size(),
        };
        if self.hole.is_none() && self.end < next {
            match whole.chain.map(whole.inside(&(self.end..next))) {
                Ok(pieces) => self.hole = Some(Hole { pieces, next: 0..0, end: next }),
                Err(cause) => return self.fail(self.end..next, cause),
            }
        }
        match self.in_hole() {
            Ok(Some(segment)) => {
                self.end = segment.end;
                whole.holes.lock().unwrap_or_else(PoisonError::into_inner).insert(segment.start);
                return Some(Ok(segment));
            }
            Ok(None) => self.hole = None,
            Err(cause) => return self.fail(self.end..next, cause),
        }
        let segment = self.segments.next();
        match &segment {
            Some(Ok(segment)) => self.end = segment.end,
            _ => self.end = next,
        }
        segment
    }
}

#[cfg(test)]
mod tests;

//! What an image holds, compared with what it should.

use std::ops::Range;

use crate::buffer::BufferPool;
use crate::cancel::Cancel;
use crate::extent::{Extent, ExtentKind, is_zero};
use crate::layer::Patch;
use crate::source::{RbdDiffSource, SourceError};

mod changed;
mod whole;

#[cfg(feature = "rbd")]
pub(crate) use changed::OnlyChanged;
#[cfg(feature = "rbd")]
pub(crate) use whole::Whole;

/// How finely is compared where nothing speaks for another grain, in bytes: a page of most guests' file
/// systems.
pub(crate) const GRAIN: usize = 4096;

/// Compares patches with an image.
#[derive(Clone, Copy)]
pub(crate) struct Comparison<'a> {
    /// The image.
    pub(crate) image: &'a dyn RbdDiffSource,
    /// Where the memory for what it holds comes from. Not the pool of the patches: whoever has a
    /// buffer of a pool must not ask it for another.
    pub(crate) buffers: &'a BufferPool,
    /// Ends the wait for memory.
    pub(crate) stop: &'a Cancel,
    /// How finely is compared, in bytes.
    pub(crate) grain: usize,
}

impl Comparison<'_> {
    /// The parts of the patch's pieces that the image does not hold, with the kind of their piece:
    /// ascending, disjoint, in whole grains from the start of their piece on. What lies behind the
    /// image's end is not compared. `None` when the run is to stop.
    ///
    /// # Errors
    /// [`SourceError::Read`].
    pub(crate) fn differences(&self, patch: &Patch) -> Result<Option<Vec<Extent>>, SourceError> {
        let pieces: Vec<_> = patch.pieces.iter().filter_map(|piece| self.within(piece)).collect();
        let (Some(first), Some(last)) = (pieces.first(), pieces.last()) else { return Ok(Some(Vec::new())) };
        let start = first.offset;
        let Some(mut held) = self.buffers.get(index(last.end() - start), self.stop) else { return Ok(None) };
        self.image.read(start, &mut held)?;
        let mut found = Vec::new();
        for piece in pieces {
            let held = &held[index(piece.offset - start)..index(piece.end() - start)];
            let wanted = (piece.kind == ExtentKind::Data).then(|| patch.bytes(&piece));
            let differs = |grain: &Range<usize>| match &wanted {
                Some(wanted) => held[grain.clone()] != wanted[grain.clone()],
                None => !is_zero(&held[grain.clone()]),
            };
            let grains = (0..held.len()).step_by(self.grain).map(|at| at..held.len().min(at + self.grain));
            for grain in grains.filter(differs) {
                let (offset, length) = (piece.offset + grain.start as u64, grain.len() as u64);
                match found.last_mut() {
                    Some(Extent { offset: from, length: so_far, kind })
                        if *from + *so_far == offset && *kind == piece.kind =>
                    {
                        *so_far += length;
                    }
                    _ => found.push(Extent { offset, length, kind: piece.kind }),
                }
            }
        }
        Ok(Some(found))
    }

    /// The part of a piece that lies in the image.
    fn within(&self, piece: &Extent) -> Option<Extent> {
        Extent::new(piece.offset..piece.end().min(self.image.size()), piece.kind)
    }
}

/// Patches are in memory.
fn index(length: u64) -> usize {
    usize::try_from(length).expect("within a buffer")
}

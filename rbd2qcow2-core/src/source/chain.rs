//! A restore point as a source: what its chain of layers holds, to be copied elsewhere.

use std::ops::Range;

use super::{RbdDiffSource, SourceError};
use crate::buffer::Buffer;
use crate::extent::{Extent, ExtentKind};
use crate::qcow2::chain::ChainReader;
use crate::qcow2::layer::Piece;

/// Bytes of the image that are looked at together: as many as yield some hundred thousand extents at
/// the worst, where every other sector holds data.
const SEGMENT: u64 = 64 << 20;

/// The content of a point, compared with nothing: its data are reported, and whatever reads as zeroes is
/// not. Can be shared by threads, which read in parallel.
///
/// Its errors' causes are [`ReadError`](crate::qcow2::error::ReadError), which names the layer.
#[derive(Debug)]
pub struct ChainSource<'a> {
    chain: &'a ChainReader,
    size: u64,
}

impl<'a> ChainSource<'a> {
    /// The first `size` bytes of what `chain` holds: an image's exact size, where the layers' is
    /// rounded up. A size beyond the chain's counts as the chain's.
    #[must_use]
    pub fn new(chain: &'a ChainReader, size: u64) -> Self {
        Self { chain, size: size.min(chain.virtual_size()) }
    }

    /// The first `size` bytes of what a larger layer upon `chain` shows where it holds nothing: zeroes behind
    /// the chain's end.
    #[must_use]
    pub fn below(chain: &'a ChainReader, size: u64) -> Self {
        Self { chain, size }
    }
}

impl RbdDiffSource for ChainSource<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn segments(&self, align: u64) -> Box<dyn Iterator<Item = Result<Range<u64>, SourceError>> + Send + '_> {
        // Both are powers of two.
        let step = align.max(SEGMENT);
        let starts = (0..self.size.div_ceil(step)).map(move |number| number * step);
        Box::new(starts.map(move |start| Ok(start..start.saturating_add(step).min(self.size))))
    }

    fn diff(&self, segment: Range<u64>, found: &mut Vec<Extent>) -> Result<(), SourceError> {
        let failed = |cause| SourceError::Diff { range: segment.clone(), cause: Box::new(cause) };
        let end = self.chain.virtual_size();
        for piece in self.chain.map(segment.start.min(end)..segment.end.min(end)).map_err(failed)? {
            let piece = piece.map_err(failed)?;
            match piece.piece {
                Piece::Data | Piece::Compressed => found.extend(Extent::new(piece.range, ExtentKind::Data)),
                Piece::Zero | Piece::Absent => {}
            }
        }
        Ok(())
    }

    fn read(&self, offset: u64, buffer: &mut Buffer) -> Result<(), SourceError> {
        let length = buffer.len();
        let end = offset.saturating_add(length as u64).min(self.chain.virtual_size());
        let inside = usize::try_from(end.saturating_sub(offset)).expect("within a buffer");
        buffer[inside..].fill(0);
        if inside == 0 {
            return Ok(());
        }
        self.chain.read_at(offset, &mut buffer[..inside]).map_err(|cause| SourceError::Read {
            offset,
            length,
            cause: Box::new(cause),
        })
    }
}

#[cfg(test)]
mod tests;

//! What an image holds where a point has nothing.

use std::ops::Range;

use super::{RbdDiffSource, SourceError};
use crate::buffer::Buffer;
use crate::extent::{Extent, ExtentKind, align_up};
use crate::layer::SECTOR;
use crate::qcow2::chain::ChainReader;
use crate::qcow2::layer::Piece;

/// The parts of an image that the layers of a point hold no data for: all of them should be zeroes, if
/// the image is to be what the point is. The image's data there are reported; what the chain holds is
/// another's business.
pub(crate) struct Beyond<'a> {
    /// The image, compared with nothing.
    pub(crate) image: &'a dyn RbdDiffSource,
    /// The layers.
    pub(crate) chain: &'a ChainReader,
    /// The point's size in bytes. What the image holds behind it is beyond the point, too.
    pub(crate) size: u64,
}

impl Beyond<'_> {
    /// The parts of `range` that the chain holds data for, ascending. They end at multiples of
    /// [`SECTOR`]: what pads the point's last one is the chain's.
    fn held(&self, range: &Range<u64>) -> Result<Vec<Range<u64>>, SourceError> {
        let failed = |cause| SourceError::Diff { range: range.clone(), cause: Box::new(cause) };
        let inside = range.start.min(self.size)..range.end.min(self.size);
        let mut held = Vec::new();
        for piece in self.chain.map(inside).map_err(failed)? {
            let piece = piece.map_err(failed)?;
            if matches!(piece.piece, Piece::Data | Piece::Compressed) {
                held.push(piece.range.start..align_up(piece.range.end, SECTOR));
            }
        }
        Ok(held)
    }

    /// Whether the chain holds no data for anything of `range`.
    ///
    /// # Errors
    /// [`SourceError::Diff`].
    pub(crate) fn is_empty(&self, range: &Range<u64>) -> Result<bool, SourceError> {
        Ok(self.held(range)?.is_empty())
    }
}

impl RbdDiffSource for Beyond<'_> {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn segments(&self, align: u64) -> Box<dyn Iterator<Item = Result<Range<u64>, SourceError>> + Send + '_> {
        self.image.segments(align)
    }

    fn diff(&self, segment: Range<u64>, found: &mut Vec<Extent>) -> Result<(), SourceError> {
        let mut there = Vec::new();
        self.image.diff(segment.clone(), &mut there)?;
        there.retain(|extent| extent.kind == ExtentKind::Data);
        if there.is_empty() {
            return Ok(());
        }
        there.sort_unstable_by_key(|extent| extent.offset);
        let held = self.held(&segment)?;
        let mut held = held.iter().peekable();
        for extent in there {
            let mut start = extent.offset;
            while held.next_if(|part| part.end <= start).is_some() {}
            // The last part may reach into the next extent, too.
            while let Some(part) = held.peek().filter(|part| part.start < extent.end()) {
                found.extend(Extent::new(start..part.start.max(start), ExtentKind::Data));
                start = part.end.max(start);
                if part.end > extent.end() {
                    break;
                }
                held.next();
            }
            found.extend(Extent::new(start..extent.end().max(start), ExtentKind::Data));
        }
        Ok(())
    }

    fn read(&self, offset: u64, buffer: &mut Buffer) -> Result<(), SourceError> {
        self.image.read(offset, buffer)
    }

    fn confirm(&self) -> Result<(), SourceError> {
        self.image.confirm()
    }
}

#[cfg(test)]
mod tests;

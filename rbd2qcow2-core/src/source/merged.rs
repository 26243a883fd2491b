//! What several layers of a chain hold together, to be put into one.

use std::ops::Range;

use super::chain::ChainSource;
use super::{RbdDiffSource, SourceError};
use crate::buffer::Buffer;
use crate::extent::{Extent, ExtentKind};
use crate::qcow2::chain::ChainReader;
use crate::qcow2::layer::Piece;

/// The newest layers of a chain as one: what they hold is the difference to the layers below.
///
/// What is read is what the whole chain shows, so that the edges of what is rounded to a layer's grain
/// are right, whatever the forms of the layers.
#[derive(Debug)]
pub(crate) struct MergedSource<'a> {
    chain: &'a ChainReader,
    /// What all of them show.
    shown: ChainSource<'a>,
    /// How many layers are put into one.
    merged: usize,
    /// Whatever none of them holds from here on was cut off by one of them, and reads as zeroes.
    hidden_from: u64,
}

impl<'a> MergedSource<'a> {
    /// The `merged` newest layers of a chain, at least one.
    pub(crate) fn new(chain: &'a ChainReader, merged: usize) -> Self {
        // The newest hides nothing: the image ends with it.
        let below = chain.layers()[..merged].iter().skip(1);
        let hidden_from = below.map(|layer| layer.virtual_size()).min().unwrap_or(u64::MAX);
        Self { chain, shown: ChainSource::new(chain, chain.virtual_size()), merged, hidden_from }
    }
}

impl RbdDiffSource for MergedSource<'_> {
    fn size(&self) -> u64 {
        self.shown.size()
    }

    fn segments(&self, align: u64) -> Box<dyn Iterator<Item = Result<Range<u64>, SourceError>> + Send + '_> {
        self.shown.segments(align)
    }

    fn diff(&self, segment: Range<u64>, found: &mut Vec<Extent>) -> Result<(), SourceError> {
        let failed = |cause| SourceError::Diff { range: segment.clone(), cause: Box::new(cause) };
        for piece in self.chain.map(segment.clone()).map_err(failed)? {
            let piece = piece.map_err(failed)?;
            found.extend(match piece.layer {
                Some(layer) if layer >= self.merged => None,
                Some(_) => match piece.piece {
                    Piece::Data | Piece::Compressed => Extent::new(piece.range, ExtentKind::Data),
                    Piece::Zero => Extent::new(piece.range, ExtentKind::Zero),
                    Piece::Absent => None,
                },
                None => {
                    Extent::new(piece.range.start.max(self.hidden_from)..piece.range.end, ExtentKind::Zero)
                }
            });
        }
        Ok(())
    }

    fn read(&self, offset: u64, buffer: &mut Buffer) -> Result<(), SourceError> {
        self.shown.read(offset, buffer)
    }
}

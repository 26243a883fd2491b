//! A snapshot of any size that is made up while it is read. For measurements.

use std::ops::Range;

use super::{RbdDiffSource, SourceError};
use crate::buffer::Buffer;
use crate::extent::{Extent, ExtentKind};

/// Bytes of noise, which is repeated. No compressor looks so far back.
const NOISE: usize = 4 << 20;

/// A snapshot in which the same has changed in each of its segments.
#[derive(Clone, Debug)]
pub struct PatternSource {
    size: u64,
    /// Length of a segment, in bytes.
    segment: u64,
    /// What has changed in each, counted from its start.
    changed: Vec<Extent>,
    noise: Vec<u8>,
}

impl PatternSource {
    /// A snapshot of `size` bytes. In each part of `segment` bytes (a power of two) the extents
    /// `changed`, which are counted from its start, have changed. Of each 16 bytes of data `random`
    /// are random, and the others are not: 16 does not compress, 4 compresses well.
    #[must_use]
    pub fn new(size: u64, segment: u64, changed: Vec<Extent>, random: usize) -> Self {
        // xorshift64.
        let mut state = 0x9E37_79B9_7F4A_7C15_u64;
        let mut noise = Vec::with_capacity(NOISE);
        for index in 0..NOISE {
            if index % 8 == 0 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
            }
            noise.push(if index % 16 < random { state.to_le_bytes()[index % 8] } else { 0x55 });
        }
        Self { size, segment, changed, noise }
    }

    /// A snapshot of `size` bytes that is full of data.
    #[must_use]
    pub fn full(size: u64, random: usize) -> Self {
        const SEGMENT: u64 = 128 << 20;
        let all = Extent { offset: 0, length: SEGMENT, kind: ExtentKind::Data };
        Self::new(size, SEGMENT, vec![all], random)
    }
}

impl RbdDiffSource for PatternSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn segments(&self, align: u64) -> Box<dyn Iterator<Item = Result<Range<u64>, SourceError>> + Send + '_> {
        // Both are powers of two.
        let step = align.max(self.segment);
        let starts = (0..self.size.div_ceil(step)).map(move |number| number * step);
        Box::new(starts.map(move |start| Ok(start..(start + step).min(self.size))))
    }

    fn diff(&self, segment: Range<u64>, found: &mut Vec<Extent>) -> Result<(), SourceError> {
        let mut start = segment.start;
        while start < segment.end {
            for extent in &self.changed {
                let range = start + extent.offset..start + extent.end();
                found.extend(Extent::new(range.start..range.end.min(segment.end), extent.kind));
            }
            start += self.segment;
        }
        Ok(())
    }

    fn read(&self, offset: u64, buffer: &mut Buffer) -> Result<(), SourceError> {
        let mut at = usize::try_from(offset % NOISE as u64).unwrap_or(0);
        let mut rest = &mut buffer[..];
        while !rest.is_empty() {
            let count = rest.len().min(NOISE - at);
            rest[..count].copy_from_slice(&self.noise[at..at + count]);
            (rest, at) = (&mut rest[count..], 0);
        }
        Ok(())
    }
}

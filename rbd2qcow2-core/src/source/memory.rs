//! A snapshot in memory, with faults on demand. For tests of whatever takes a source.

use std::io;
use std::ops::Range;

use super::{RbdDiffSource, SourceError};
use crate::buffer::Buffer;
use crate::extent::{Extent, ExtentKind, is_zero};
use crate::layer::SECTOR;

/// Contents of a snapshot and of its base, compared byte by byte when asked.
#[derive(Clone, Debug, Default)]
pub struct MemorySource {
    /// What the snapshot holds.
    pub content: Vec<u8>,
    /// What the base holds; without one, everything that is not zero counts as changed.
    pub base: Option<Vec<u8>>,
    /// Bytes that are compared and reported together, as an object store would; 0 counts as 1.
    pub block: usize,
    /// A read that touches this byte fails.
    pub fail_read: Option<u64>,
    /// A comparison that touches this byte fails.
    pub fail_diff: Option<u64>,
    /// The search for segments fails when it reaches this byte.
    pub fail_segments: Option<u64>,
}

/// The fault that was asked for.
fn fault() -> super::BoxError {
    io::Error::other("a fault on demand").into()
}

impl MemorySource {
    /// Offsets of memory always fit.
    fn slice(bytes: &[u8], range: &Range<u64>) -> Vec<u8> {
        let index = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        bytes[index(range.start)..index(range.end)].to_vec()
    }

    fn changed(&self, range: &Range<u64>) -> bool {
        let base_size = self.base.as_ref().map_or(0, Vec::len) as u64;
        if range.end == self.size() && !range.end.is_multiple_of(SECTOR) && base_size > range.end {
            return true;
        }
        let new = Self::slice(&self.content, range);
        let mut old = self.base.as_ref().map_or(Vec::new(), |base| Self::slice(base, range));
        old.resize(new.len(), 0);
        new != old
    }
}

impl RbdDiffSource for MemorySource {
    fn size(&self) -> u64 {
        self.content.len() as u64
    }

    fn segments(&self, align: u64) -> Box<dyn Iterator<Item = Result<Range<u64>, SourceError>> + Send + '_> {
        const SEGMENT: u64 = 64 << 10;
        let step = SEGMENT.max(align);
        let mut start = 0;
        Box::new(std::iter::from_fn(move || {
            if start >= self.size() {
                return None;
            }
            let range = start..(start + step).min(self.size());
            start = range.end;
            if self.fail_segments.is_some_and(|at| range.contains(&at)) {
                start = self.size();
                return Some(Err(SourceError::Segments { range, cause: fault() }));
            }
            Some(Ok(range))
        }))
    }

    fn diff(&self, segment: Range<u64>, found: &mut Vec<Extent>) -> Result<(), SourceError> {
        if self.fail_diff.is_some_and(|at| segment.contains(&at)) {
            return Err(SourceError::Diff { range: segment, cause: fault() });
        }
        let mut start = segment.start;
        while start < segment.end {
            let range = start..(start + self.block.max(1) as u64).min(segment.end);
            start = range.end;
            if self.changed(&range) {
                let zero = is_zero(&Self::slice(&self.content, &range));
                let kind = if zero { ExtentKind::Zero } else { ExtentKind::Data };
                found.extend(Extent::new(range, kind));
            }
        }
        Ok(())
    }

    fn read(&self, offset: u64, buffer: &mut Buffer) -> Result<(), SourceError> {
        let length = buffer.len();
        let range = offset..offset + length as u64;
        let fail = |cause| SourceError::Read { offset, length, cause };
        if self.fail_read.is_some_and(|at| range.contains(&at)) {
            return Err(fail(fault()));
        }
        let bytes = Self::slice(&self.content, &range);
        if bytes.len() < length {
            return Err(fail(io::Error::from(io::ErrorKind::UnexpectedEof).into()));
        }
        buffer.copy_from_slice(&bytes);
        Ok(())
    }
}

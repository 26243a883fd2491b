#![allow(clippy::cast_possible_truncation, reason = "offsets in test data are small")]

use super::*;
use crate::restore::LEAST_MEMORY;
use crate::source::memory::MemorySource;

/// A snapshot in which no two blocks are alike.
fn source(size: usize) -> MemorySource {
    let content = (0..size).map(|index| (index >> 20) as u8 ^ index as u8).collect();
    MemorySource { content, ..MemorySource::default() }
}

/// Takes so many bytes, and then no more.
struct Limited {
    taken: Vec<u8>,
    limit: usize,
    flushed: bool,
}

impl Limited {
    fn new(limit: usize) -> Self {
        Self { taken: Vec::new(), limit, flushed: false }
    }
}

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // In pieces, as a pipe would.
        let count = bytes.len().min(self.limit - self.taken.len()).min(100_000);
        if count == 0 && !bytes.is_empty() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.taken.extend(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.flushed = true;
        Ok(())
    }
}

#[test]
fn blocks_come_in_order_whoever_reads_them() {
    for size in [0, 1, 511, (2 << 20) - 1, 2 << 20, (9 << 20) + 7, 40 << 20] {
        for parallel in [0, 1, 3, 64] {
            let (source, progress) = (source(size), Progress::default());
            let mut stream = Limited::new(usize::MAX);
            copy(&source, &mut stream, parallel, LEAST_MEMORY, &progress, &Cancel::new()).expect("copied");
            assert!(stream.taken == source.content, "{size} bytes by {parallel}");
            assert!(stream.flushed);
            let counted = [&progress.size, &progress.scanned, &progress.to_read, &progress.read];
            assert_eq!(counted.map(crate::progress::Counter::get), [size as u64; 4]);
        }
    }
}

#[test]
fn a_stream_that_takes_no_more_is_told_with_its_place() {
    let source = source(20 << 20);
    let mut stream = Limited::new(5 << 20);
    let error = copy(&source, &mut stream, 4, LEAST_MEMORY, &Progress::default(), &Cancel::new());
    assert!(matches!(error, Err(StreamError::Write { offset, .. }) if offset == 4 << 20), "{error:?}");
    assert!(!stream.flushed);
}

#[test]
fn nothing_behind_what_cannot_be_read_is_written() {
    let source = MemorySource { fail_read: Some(7 << 20), ..source(20 << 20) };
    let mut stream = Limited::new(usize::MAX);
    let error = copy(&source, &mut stream, 4, LEAST_MEMORY, &Progress::default(), &Cancel::new());
    let expected = 6 << 20;
    assert!(
        matches!(error, Err(StreamError::Source(SourceError::Read { offset, .. })) if offset == expected),
        "{error:?}"
    );
    assert!(stream.taken == source.content[..6 << 20]);
    assert!(!stream.flushed);
}

/// A stream whose reader asks for a stop after the first bytes.
struct Stopping<'a>(&'a Cancel);

impl Write for Stopping<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.set();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        panic!("not everything was written")
    }
}

#[test]
fn a_stop_is_noticed_between_blocks() {
    let (source, cancel) = (source(20 << 20), Cancel::new());
    let error = copy(&source, &mut Stopping(&cancel), 4, LEAST_MEMORY, &Progress::default(), &cancel);
    assert!(matches!(error, Err(StreamError::Cancelled)), "{error:?}");
}

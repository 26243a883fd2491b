//! A point as a stream: read ahead by several threads, written in order by the caller's.

use std::io::{self, Write};
use std::ops::Range;

use crossbeam::channel::{self, Receiver, RecvTimeoutError, SendTimeoutError, Sender};

use super::error::RestoreError;
use crate::buffer::{Buffer, BufferPool};
use crate::cancel::Cancel;
use crate::copy::CopyError;
use crate::point::OpenPoint;
use crate::progress::Progress;
use crate::source::{RbdDiffSource, SourceError};

/// What is read, and written, in one go, in bytes: the largest cluster, so none is unpacked twice.
const BLOCK: u64 = 2 << 20;

/// Why a stream ended early.
#[derive(Debug)]
pub(super) enum StreamError {
    Source(SourceError),
    Write { offset: u64, cause: io::Error },
    Thread(io::Error),
    Cancelled,
}

impl StreamError {
    pub(super) fn explain(self, point: &OpenPoint) -> RestoreError {
        match self {
            Self::Source(cause) => RestoreError::of_source(point, cause),
            Self::Write { offset, cause } => RestoreError::Stream { offset, size: point.size(), cause },
            Self::Thread(cause) => RestoreError::Copy(CopyError::Thread(cause)),
            Self::Cancelled => RestoreError::Cancelled,
        }
    }
}

/// A block, or why it could not be read.
type Read = Result<Buffer, SourceError>;

/// Writes all of `source` to `stream`, and flushes that. `progress` is counted up.
pub(super) fn copy(
    source: &dyn RbdDiffSource,
    stream: &mut dyn Write,
    parallel: usize,
    memory: usize,
    progress: &Progress,
    cancel: &Cancel,
) -> Result<(), StreamError> {
    let size = source.size();
    progress.size.add(size);
    progress.to_read.add(size);
    let pool = BufferPool::new(memory);
    // Each thread holds one block until it is its turn, and the caller's another: no thread that is
    // waited for may have to wait for memory.
    let most = memory / index(BLOCK) - 1;
    let blocks = size.div_ceil(BLOCK);
    let threads = (parallel.clamp(1, most.max(1)) as u64).min(blocks);
    let stop = cancel.part();
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        let mut readers = Vec::new();
        for first in 0..threads {
            let (sender, receiver) = channel::bounded(0);
            let (pool, stop) = (&pool, &stop);
            let read = move || read(source, (first..blocks).step_by(index(threads)), pool, stop, &sender);
            let thread = std::thread::Builder::new().name("read".into()).spawn_scoped(scope, read);
            thread.map_err(StreamError::Thread)?;
            readers.push(receiver);
        }
        // Block number n is the next one of thread number n modulo their number.
        for (number, reader) in (0..blocks).zip(readers.iter().cycle()) {
            let offset = number * BLOCK;
            let block = take(reader, &stop)?.map_err(StreamError::Source)?;
            progress.read.add(block.len() as u64);
            stream.write_all(&block).map_err(|cause| StreamError::Write { offset, cause })?;
            progress.scanned.add(block.len() as u64);
        }
        stream.flush().map_err(|cause| StreamError::Write { offset: size, cause })
    })
}

/// Ends the readers, however their caller ends.
struct StopOnDrop<'a>(&'a Cancel);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.set();
    }
}

/// Reads blocks of the given numbers and hands each over. The first error is the last that is handed
/// over.
fn read(
    source: &dyn RbdDiffSource,
    numbers: impl Iterator<Item = u64>,
    pool: &BufferPool,
    stop: &Cancel,
    sender: &Sender<Read>,
) {
    for number in numbers {
        let range = number * BLOCK..((number + 1) * BLOCK).min(source.size());
        let Some(block) = read_block(source, &range, pool, stop) else { return };
        let failed = block.is_err();
        let mut item = block;
        loop {
            match sender.send_timeout(item, Cancel::POLL) {
                Ok(()) => break,
                Err(SendTimeoutError::Timeout(back)) if !stop.is_set() => item = back,
                Err(_) => return,
            }
        }
        if failed {
            return;
        }
    }
}

fn read_block(
    source: &dyn RbdDiffSource,
    range: &Range<u64>,
    pool: &BufferPool,
    stop: &Cancel,
) -> Option<Read> {
    let mut buffer = pool.get(index(range.end - range.start), stop)?;
    Some(source.read(range.start, &mut buffer).map(|()| buffer))
}

fn take(reader: &Receiver<Read>, stop: &Cancel) -> Result<Read, StreamError> {
    loop {
        if stop.is_set() {
            return Err(StreamError::Cancelled);
        }
        match reader.recv_timeout(Cancel::POLL) {
            Ok(block) => return Ok(block),
            Err(RecvTimeoutError::Timeout) => {}
            // Only a stop, or a panic, makes a reader leave before its last block.
            Err(RecvTimeoutError::Disconnected) => return Err(StreamError::Cancelled),
        }
    }
}

/// Lengths of what fits a buffer.
fn index(length: u64) -> usize {
    usize::try_from(length).expect("in memory")
}

#[cfg(test)]
mod tests;

//! A file that is written in pieces from many threads, past the page cache where that is possible.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::fs::OFlags;

use crate::buffer::ALIGNMENT;
use crate::direct::Direct;

/// The file is made longer ahead of what is written, by so many bytes at most: a write that makes it
/// longer excludes all others.
const GROWTH: u64 = 256 << 20;

/// A file that is written in pieces, each place once.
#[derive(Debug)]
pub(crate) struct Output {
    /// For whole pages.
    direct: Direct,
    buffered: File,
    /// The file's length.
    length: AtomicU64,
    growing: Mutex<()>,
}

impl Output {
    /// Creates the file, which must not exist, of mode 0600. It will be written in pieces that begin at
    /// multiples of `grain` bytes.
    pub(crate) fn create(path: &Path, grain: u64) -> io::Result<Self> {
        let mut open = OpenOptions::new();
        let buffered = open.read(true).write(true).create_new(true).mode(0o600).open(path)?;
        let mut open = OpenOptions::new();
        open.write(true).custom_flags(OFlags::DIRECT.bits().cast_signed());
        // Pieces that small are never whole pages.
        let opened = if grain < ALIGNMENT as u64 { Ok(None) } else { open.open(path).map(Some) };
        let direct = Direct::new(opened).inspect_err(|_| {
            // The error to report is the one at hand.
            let _ = std::fs::remove_file(path);
        })?;
        Ok(Self { direct, buffered, length: AtomicU64::new(0), growing: Mutex::default() })
    }

    #[cfg(test)]
    pub(crate) fn set_direct(&mut self, file: File) {
        self.direct = Direct::new(Ok(Some(file))).expect("it is open");
    }

    #[cfg(test)]
    pub(crate) fn direct_is_refused(&self) -> bool {
        self.direct.is_refused()
    }

    /// Makes the file `length` bytes long, without data, and no longer ahead of what is written.
    pub(crate) fn set_length(&self, length: u64) -> io::Result<()> {
        self.buffered.set_len(length)?;
        self.length.fetch_max(length, Ordering::Relaxed);
        Ok(())
    }

    /// Writes all of `bytes`: whole pages from aligned memory past the page cache, the rest through
    /// it. The two never meet in one page.
    pub(crate) fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.grow(offset + bytes.len() as u64);
        let direct = self.write_direct(offset, bytes)?;
        let rest = &bytes[direct..];
        if rest.is_empty() { Ok(()) } else { self.buffered.write_all_at(rest, offset + direct as u64) }
    }

    /// Writes the whole pages that `bytes` begin with, if possible, and returns their length.
    fn write_direct(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        let Some((file, length)) = self.direct.pages(bytes, offset) else { return Ok(0) };
        self.direct.done(file.write_all_at(&bytes[..length], offset).map(|()| length))
    }

    /// Reads back what was written.
    pub(crate) fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.buffered.read_exact_at(bytes, offset)
    }

    /// Makes the file at least `end` bytes long, if possible: whole pages, since the system fills up
    /// a part of one through the page cache when the file becomes longer.
    pub(crate) fn grow(&self, end: u64) {
        if end <= self.length.load(Ordering::Relaxed) {
            return;
        }
        let _growing = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        let length = self.length.load(Ordering::Relaxed);
        if end > length {
            let length = (end + (end / 4).min(GROWTH)).next_multiple_of(ALIGNMENT as u64);
            // Where that fails, for a limit on the file's size perhaps, the write may still be within
            // the limit, or says what is wrong.
            let _ = self.buffered.set_len(length);
            self.length.store(length, Ordering::Relaxed);
        }
    }

    /// Makes the file `length` bytes long and brings it to stable storage.
    pub(crate) fn finish(&self, length: u64) -> io::Result<()> {
        self.buffered.set_len(length)?;
        self.buffered.sync_all()
    }
}

//! Reading at an offset, from many threads.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::OFlags;

use super::open_regular_with;
use crate::direct::Direct;

/// Something that can be read from at any place, from many threads at once.
pub trait ReadAt: Send + Sync {
    /// Fills `buf` from `offset` on, in bytes, as far as there is anything. Returns how much of it
    /// was filled: less than its length only at the end. May block.
    ///
    /// # Errors
    /// What the storage says.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
}

impl ReadAt for File {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buf.len() {
            match FileExt::read_at(self, &mut buf[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }
}

/// A file whose data are read once: long reads into aligned memory go past the page cache. Reading what it
/// does not hold through it costs three times the processor's time, and pushes out what others need.
#[derive(Debug)]
pub(super) struct ReadOnce {
    buffered: File,
    /// The same file.
    direct: Direct,
}

impl ReadOnce {
    /// `buffered` was opened by the path `path`.
    pub(super) fn new(buffered: File, path: &Path) -> io::Result<Self> {
        let known = buffered.metadata()?;
        let same = |other: &Metadata| (other.dev(), other.ino()) == (known.dev(), known.ino());
        let opened = open_regular_with(path, OFlags::DIRECT);
        let direct = opened.map(|opened| opened.filter(|(_, other)| same(other)).map(|(file, _)| file));
        Ok(Self { buffered, direct: Direct::new(direct)? })
    }

    /// Reads the whole pages that fit `buf` from `offset` on, if possible, and returns their length.
    fn read_direct(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let Some((file, length)) = self.direct.pages(buf, offset) else { return Ok(0) };
        self.direct.done(ReadAt::read_at(file, &mut buf[..length], offset))
    }
}

impl ReadAt for ReadOnce {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let filled = self.read_direct(buf, offset)?;
        if filled == buf.len() {
            return Ok(filled);
        }
        Ok(filled + ReadAt::read_at(&self.buffered, &mut buf[filled..], offset + filled as u64)?)
    }
}

impl ReadAt for Vec<u8> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(self.len());
        let count = buf.len().min(self.len() - start);
        buf[..count].copy_from_slice(&self[start..start + count]);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_past_the_page_cache_are_the_same_reads() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("file");
        let content: Vec<u8> = (0..300_001_u32).map(|n| n.to_le_bytes()[n as usize % 3]).collect();
        std::fs::write(&path, &content).expect("written");
        let file = ReadOnce::new(File::open(&path).expect("open"), &path).expect("opened twice");
        let pool = crate::buffer::BufferPool::new(1 << 20);
        for (offset, length) in [
            (0, 65_536),
            (4096, 200_000),
            (1, 100_000),
            (0, 10),
            (200_000, 1 << 19),
            (262_144, 98_304),
            (1 << 20, 65_536),
        ] {
            let mut buffer = pool.get(length, &crate::cancel::Cancel::new()).expect("not cancelled");
            buffer.fill(0xEE);
            let count = file.read_at(&mut buffer, offset).expect("readable");
            let start = content.len().min(usize::try_from(offset).expect("small"));
            assert_eq!(&buffer[..count], &content[start..content.len().min(start + length)]);
        }
        let mut buffer = pool.get(65_536, &crate::cancel::Cancel::new()).expect("not cancelled");
        if file.direct.pages(&buffer, 4096).is_some() {
            let direct = file.read_direct(&mut buffer, 4096).expect("readable");
            assert!(direct == 65_536 || file.direct.is_refused());
        }
    }

    #[test]
    fn a_file_that_takes_no_direct_reads_is_read_all_the_same() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("file");
        std::fs::write(&path, vec![7; 1 << 17]).expect("written");
        // Opened for writing alone, it answers reads with an error that is none of support.
        let direct = Direct::new(File::options().write(true).open(&path).map(Some)).expect("open");
        let file = ReadOnce { buffered: File::open(&path).expect("open"), direct };
        let pool = crate::buffer::BufferPool::new(1 << 20);
        let mut buffer = pool.get(1 << 17, &crate::cancel::Cancel::new()).expect("not cancelled");
        assert!(file.read_at(&mut buffer, 0).is_err(), "an error was hidden");
        let refusal = Err(rustix::io::Errno::INVAL.into());
        assert_eq!(file.direct.done(refusal).expect("no error"), 0);
        assert_eq!(file.read_at(&mut buffer, 0).expect("readable"), 1 << 17);
        assert!(buffer.iter().all(|byte| *byte == 7));
    }
}

//! Reading at an offset, from many threads, and what of the tables is kept.

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::OFlags;

use super::open_regular_with;
use super::table::HostOffset;
use crate::direct::Direct;

/// What tables may take in memory, per layer, in bytes: with the default clusters of 128 KiB they
/// describe 32 GiB of an image.
const CACHE_BYTES: usize = 4 << 20;

/// What is read and kept of a table at once, in bytes, unless the cluster is smaller: of a table of
/// 2 MiB only what is used. No smaller, since it costs a read.
const PAGE_BYTES: u64 = 16 << 10;

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

/// A piece of the file that holds entries of a table.
#[derive(Clone, Debug)]
pub(super) struct Page {
    start: u64,
    bytes: Arc<[u8]>,
}

impl Page {
    /// The number of 8 bytes at `host`; `None` when the page does not reach there.
    pub(super) fn number(&self, host: HostOffset) -> Option<u64> {
        let start = usize::try_from(host.0.checked_sub(self.start)?).ok()?;
        let bytes = self.bytes.get(start..)?.first_chunk()?;
        Some(u64::from_be_bytes(*bytes))
    }
}

/// The pages of a file's tables that were used last: [`CACHE_BYTES`] of them.
#[derive(Debug)]
pub(super) struct PageCache {
    page_bytes: u64,
    limit: usize,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    /// By the page's offset, with the time of its last use.
    pages: HashMap<u64, (u64, Page)>,
    /// Offsets by the time of the last use: the first goes first.
    uses: BTreeMap<u64, u64>,
    now: u64,
}

impl PageCache {
    /// An empty cache for a file of the given cluster size, at whose multiples tables begin.
    pub(super) fn new(cluster_size: u64) -> Self {
        let page_bytes = PAGE_BYTES.min(cluster_size);
        let limit = CACHE_BYTES / usize::try_from(page_bytes).unwrap_or(CACHE_BYTES);
        Self { page_bytes, limit, kept: Mutex::default() }
    }

    /// The page around `host`. The file ends within it, or before it, if it ends there.
    ///
    /// Reads without holding the lock: two threads may then read the same page, but none waits for
    /// the reading of another.
    pub(super) fn page(&self, file: &dyn ReadAt, host: HostOffset) -> io::Result<Page> {
        let start = host.0 - host.0 % self.page_bytes;
        if let Some(page) = self.kept().get(start) {
            return Ok(page);
        }
        let mut bytes = vec![0; usize::try_from(self.page_bytes).unwrap_or(0)];
        let count = file.read_at(&mut bytes, start)?;
        bytes.truncate(count);
        let page = Page { start, bytes: bytes.into() };
        self.kept().insert(page.clone(), self.limit);
        Ok(page)
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // Nothing in here panics half-way through a change.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn get(&mut self, start: u64) -> Option<Page> {
        let (used, page) = self.pages.get_mut(&start)?;
        self.now += 1;
        self.uses.remove(used);
        self.uses.insert(self.now, start);
        *used = self.now;
        Some(page.clone())
    }

    fn insert(&mut self, page: Page, limit: usize) {
        self.now += 1;
        self.uses.insert(self.now, page.start);
        if let Some((used, _)) = self.pages.insert(page.start, (self.now, page)) {
            self.uses.remove(&used);
        }
        while self.pages.len() > limit
            && let Some((_, oldest)) = self.uses.pop_first()
        {
            self.pages.remove(&oldest);
        }
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

    #[test]
    fn the_pages_used_last_are_kept() {
        let file: Vec<u8> = (0..100_u64).flat_map(u64::to_be_bytes).collect();
        let cache = PageCache { page_bytes: 8, limit: 3, kept: Mutex::default() };
        for number in [0, 1, 2, 0, 3, 0, 4, 99] {
            let host = HostOffset(number * 8);
            let page = cache.page(&file, host).expect("readable");
            assert_eq!(page.number(host), Some(number));
            assert_eq!(page.number(HostOffset(host.0 + 8)), None);
        }
        let kept = cache.kept();
        let mut starts: Vec<u64> = kept.pages.keys().copied().collect();
        starts.sort_unstable();
        assert_eq!(starts, [0, 32, 792]);
        assert_eq!(kept.uses.len(), 3);
    }

    #[test]
    fn a_page_behind_the_end_holds_nothing() {
        let cache = PageCache::new(512);
        let page = cache.page(&vec![1; 515], HostOffset(512)).expect("readable");
        assert_eq!(page.number(HostOffset(512)), None);
        let page = cache.page(&vec![1; 515], HostOffset(4096)).expect("readable");
        assert_eq!(page.number(HostOffset(4096)), None);
    }
}

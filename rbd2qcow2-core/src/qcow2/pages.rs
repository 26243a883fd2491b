//! What of the tables is kept in memory.

use std::hash::{BuildHasherDefault, Hash, Hasher};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::file::ReadAt;
use super::recent::Recent;
use super::table::HostOffset;

/// What the tables of a layer may take in memory, in bytes: with the default clusters of 128 KiB they describe
/// 32 GiB of an image.
pub(super) const LAYER_BYTES: usize = 4 << 20;

/// What those of all layers of a chain may take together, in bytes.
pub(super) const CHAIN_BYTES: usize = 32 << 20;

/// What is read of a table at once, in bytes, unless the cluster is smaller: of a table of 2 MiB only what is
/// used. No smaller, since it costs a read.
const PAGE_BYTES: usize = 16 << 10;

/// What a page takes besides its bytes, in bytes.
const OVERHEAD: usize = 256;

/// The cache is in so many parts, each with a lock and a share of the limit: threads seldom wait for each other.
const PARTS: usize = 16;

// Each part has room for some pages, whatever comes together there.
const _: () = assert!(LAYER_BYTES / PARTS >= 8 * (PAGE_BYTES + OVERHEAD));

/// A piece of the file that holds entries of a table.
#[derive(Clone, Debug)]
pub(super) struct Page {
    /// Where it begins in the file.
    start: u64,
    /// How much of it the file has, in bytes.
    length: usize,
    /// What comes before, and behind, is zeroes: most of a table of a few scattered changes.
    skipped: usize,
    bytes: Arc<[u8]>,
}

impl Page {
    fn new(start: u64, bytes: &[u8]) -> Self {
        let (numbers, _) = bytes.as_chunks::<8>();
        let is_set = |number: &[u8; 8]| *number != [0; 8];
        let first = numbers.iter().position(is_set).unwrap_or(0);
        let end = numbers.iter().rposition(is_set).map_or(first, |last| last + 1);
        let bytes_kept = bytes[8 * first..8 * end].into();
        Self { start, length: bytes.len(), skipped: 8 * first, bytes: bytes_kept }
    }

    /// The number of 8 bytes at `host`, a multiple of 8; `None` when the page does not reach there.
    pub(super) fn number(&self, host: HostOffset) -> Option<u64> {
        // What lies before the page, or before what is kept, wraps and is too large then.
        let at = usize::try_from(host.0.wrapping_sub(self.start)).ok()?;
        if let Some(rest) = self.bytes.get(at.wrapping_sub(self.skipped)..)
            && let Some(bytes) = rest.first_chunk()
        {
            return Some(u64::from_be_bytes(*bytes));
        }
        (self.length.checked_sub(at)? >= 8).then_some(0)
    }
}

/// The pages that were used last of the tables of one layer, or of several: with one limit for all.
#[derive(Debug)]
pub(super) struct PageCache {
    parts: Box<[Mutex<Pages>]>,
}

/// By whose it is, and where it begins.
type Pages = Recent<Key, Page, BuildHasherDefault<Spread>>;
type Key = (usize, u64);

/// Spreads the few numbers of a part: what hashes of text are for would take longer than what is looked for.
#[derive(Debug, Default)]
struct Spread(u64);

impl Hasher for Spread {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64((*byte).into()));
    }

    fn write_u64(&mut self, number: u64) {
        // Fibonacci hashing.
        self.0 = (self.0.rotate_left(26) ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn write_usize(&mut self, number: usize) {
        self.write_u64(number as u64);
    }

    fn finish(&self) -> u64 {
        // The lower bits are those of multiples of a page.
        self.0 ^ self.0 >> 32
    }
}

impl PageCache {
    /// An empty one. What is kept takes `limit` bytes.
    pub(super) fn new(limit: usize) -> Self {
        Self::in_parts(limit, PARTS)
    }

    fn in_parts(limit: usize, parts: usize) -> Self {
        Self { parts: (0..parts).map(|_| Mutex::new(Recent::new(limit / parts))).collect() }
    }

    fn part(&self, key: Key) -> MutexGuard<'_, Pages> {
        let mut spread = Spread::default();
        key.hash(&mut spread);
        // Other bits than those that tell the places within a part.
        let part = usize::try_from(spread.finish() >> 24 & 0xffff).unwrap_or(0) % self.parts.len();
        // Nothing in there panics half-way through a change.
        self.parts[part].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The pages of one layer's tables.
#[derive(Debug)]
pub(super) struct LayerPages {
    page_bytes: usize,
    /// Which layer, among those that share the cache.
    layer: usize,
    cache: Arc<PageCache>,
}

impl LayerPages {
    /// Pages of a file of the given cluster size, at whose multiples tables begin. They share `cache` with
    /// those of other numbers.
    pub(super) fn new(cluster_size: u64, layer: usize, cache: Arc<PageCache>) -> Self {
        let page_bytes = usize::try_from(cluster_size).map_or(PAGE_BYTES, |size| size.min(PAGE_BYTES));
        Self { page_bytes, layer, cache }
    }

    /// The same file's pages, in a cache that others use, too.
    pub(super) fn share(&mut self, layer: usize, cache: Arc<PageCache>) {
        (self.layer, self.cache) = (layer, cache);
    }

    /// Whether both have one cache, and different numbers in it.
    #[cfg(test)]
    pub(super) fn shares_with(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.cache, &other.cache) && self.layer != other.layer
    }

    /// The page around `host`. The file ends within it, or before it, if it ends there.
    ///
    /// Reads without holding a lock: two threads may then read the same page, but none waits for the reading
    /// of another.
    pub(super) fn page(&self, file: &dyn ReadAt, host: HostOffset) -> io::Result<Page> {
        let start = host.0 - host.0 % self.page_bytes as u64;
        let key = (self.layer, start);
        if let Some(page) = self.cache.part(key).get(key) {
            return Ok(page);
        }
        let mut bytes = [0; PAGE_BYTES];
        let bytes = &mut bytes[..self.page_bytes];
        let count = file.read_at(bytes, start)?;
        let page = Page::new(start, &bytes[..count]);
        let gone = self.cache.part(key).insert(key, page.clone(), page.bytes.len() + OVERHEAD);
        drop(gone);
        Ok(page)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Counts its reads.
    struct Counted(Vec<u8>, AtomicUsize);

    impl ReadAt for Counted {
        fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
            self.1.fetch_add(1, Ordering::Relaxed);
            self.0.read_at(buf, offset)
        }
    }

    fn numbers(count: u64) -> Counted {
        Counted((1..=count).flat_map(u64::to_be_bytes).collect(), AtomicUsize::new(0))
    }

    #[test]
    fn the_pages_used_last_are_kept_of_all_layers_together() {
        let file = numbers(64 * 100);
        let cache = Arc::new(PageCache::in_parts(3 * (512 + OVERHEAD), 1));
        let layers = [0, 1].map(|layer| LayerPages::new(512, layer, cache.clone()));
        let read = |layer: usize, page: u64| {
            let before = file.1.load(Ordering::Relaxed);
            let host = HostOffset(page * 512 + 8);
            let found = layers[layer].page(&file, host).expect("readable");
            assert_eq!(found.number(host), Some(page * 64 + 2));
            assert_eq!(found.number(HostOffset((page + 1) * 512)), None);
            file.1.load(Ordering::Relaxed) > before
        };
        let steps = [(0, 0), (1, 0), (0, 2), (0, 0), (1, 3), (0, 0), (0, 2), (1, 0), (0, 0), (1, 3)];
        let found = steps.map(|(layer, page)| read(layer, page));
        assert_eq!(found, [true, true, true, false, true, false, false, true, false, true]);
    }

    #[test]
    fn zeroes_at_both_ends_of_a_page_take_no_memory() {
        let mut bytes = vec![0; PAGE_BYTES];
        bytes[801] = 7;
        bytes[8000..8008].copy_from_slice(&9_u64.to_be_bytes());
        let page = Page::new(1 << 20, &bytes);
        assert_eq!((page.skipped, page.bytes.len()), (800, 7208));
        for at in (0..PAGE_BYTES).step_by(8) {
            let expected = u64::from_be_bytes(*bytes[at..].first_chunk().expect("8 bytes"));
            assert_eq!(page.number(HostOffset((1 << 20) + at as u64)), Some(expected), "{at}");
        }
        assert_eq!(page.number(HostOffset((1 << 20) + PAGE_BYTES as u64)), None);
        assert_eq!(page.number(HostOffset((1 << 20) - 8)), None);
        assert!(Page::new(0, &[0; 4096]).bytes.is_empty());
    }

    #[test]
    fn a_page_behind_the_end_holds_nothing() {
        let pages = LayerPages::new(512, 0, Arc::new(PageCache::new(LAYER_BYTES)));
        for content in [0, 1] {
            let file = vec![content; 515];
            let page = pages.page(&file, HostOffset(512)).expect("readable");
            assert_eq!(page.number(HostOffset(512)), None);
            let page = pages.page(&file, HostOffset(4096)).expect("readable");
            assert_eq!(page.number(HostOffset(4096)), None);
        }
    }
}

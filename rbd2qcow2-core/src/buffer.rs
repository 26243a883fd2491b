//! Page-aligned buffers out of a budget of bytes.
//!
//! What a run reads of images lies in [`Buffer`]s of one [`BufferPool`], so the pool's limit bounds it,
//! whatever the images' size and however many are under way. A layer has a small pool of its own for
//! what it puts together: tables and packed data. Buffers are reused: a fresh 4 MiB allocation costs a
//! thousand page faults. Large ones ask for huge pages: data are copied there once, hashed, and handed to
//! the disk, and each of that goes through the page tables.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use memmap2::{Advice, MmapMut};

use crate::cancel::Cancel;

/// Alignment of a buffer's first byte: what O_DIRECT asks for on every disk in use.
pub const ALIGNMENT: usize = 4096;

/// The smallest allocation; shorter requests share this size so that they can reuse each other's.
const SMALLEST_CLASS: usize = 64 << 10;

/// A huge page of most machines. Buffers of this size or more begin at a multiple of it.
const HUGE_PAGE: usize = 2 << 20;

/// Hands out buffers until a number of bytes is in use, then blocks.
#[derive(Clone, Debug)]
pub struct BufferPool(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Bytes that may be allocated at any time.
    limit: usize,
    state: Mutex<State>,
    /// Signalled whenever a buffer comes back.
    returned: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Bytes of all allocations, those in `idle` included.
    allocated: usize,
    /// Allocations waiting for reuse, any class.
    idle: Vec<Allocation>,
}

/// Zero-initialised bytes of which `size` from an aligned start on are used.
#[derive(Debug, Default)]
struct Allocation {
    memory: Memory,
    start: usize,
    size: usize,
}

#[derive(Debug)]
enum Memory {
    Heap(Vec<u8>),
    /// On huge pages where the kernel has some. What lies around the used part is never touched, and
    /// takes addresses only.
    Mapped(MmapMut),
}

impl Default for Memory {
    fn default() -> Self {
        Self::Heap(Vec::new())
    }
}

impl Allocation {
    fn new(size: usize) -> Self {
        if size >= HUGE_PAGE
            && let Ok(map) = MmapMut::map_anon(size + HUGE_PAGE)
        {
            let start = map.as_ptr().align_offset(HUGE_PAGE);
            // A kernel without huge pages refuses: the memory is as good, only slower.
            let _ = map.advise_range(Advice::HugePage, start, size);
            return Self { memory: Memory::Mapped(map), start, size };
        }
        let bytes = vec![0; size + ALIGNMENT];
        let start = bytes.as_ptr().align_offset(ALIGNMENT);
        Self { memory: Memory::Heap(bytes), start, size }
    }

    fn bytes(&self, length: usize) -> &[u8] {
        let all = match &self.memory {
            Memory::Heap(bytes) => &bytes[..],
            Memory::Mapped(map) => &map[..],
        };
        &all[self.start..self.start + length]
    }

    fn bytes_mut(&mut self, length: usize) -> &mut [u8] {
        let all = match &mut self.memory {
            Memory::Heap(bytes) => &mut bytes[..],
            Memory::Mapped(map) => &mut map[..],
        };
        &mut all[self.start..self.start + length]
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is consistent between any two statements, so a panic elsewhere is no reason to
        // make everyone else panic too.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BufferPool {
    /// A pool of at most `limit` bytes (at least one smallest buffer of 64 KiB).
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self(Arc::new(Shared {
            limit: limit.max(SMALLEST_CLASS),
            state: Mutex::default(),
            returned: Condvar::new(),
        }))
    }

    /// The largest buffer that this pool can hand out, in bytes.
    #[must_use]
    pub fn largest(&self) -> usize {
        // Classes are powers of two.
        1 << self.0.limit.ilog2()
    }

    /// A buffer of `length` bytes of unspecified content. Blocks while the budget is used up.
    ///
    /// Returns `None` when `cancel` was set meanwhile. A thread that holds a buffer of this pool must
    /// not ask for another, or all threads may wait for each other; unless it is the only one that does
    /// so, and what it holds leaves room for what it asks for.
    ///
    /// # Panics
    /// When `length` is 0 or more than [`largest`](Self::largest).
    #[must_use]
    pub fn get(&self, length: usize, cancel: &Cancel) -> Option<Buffer> {
        assert!(length > 0 && length <= self.largest(), "{length} bytes are not in 1..={}", self.largest());
        let size = length.next_power_of_two().max(SMALLEST_CLASS);
        let mut state = self.0.lock();
        loop {
            if cancel.is_set() {
                return None;
            }
            if let Some(found) = state.idle.iter().rposition(|idle| idle.size == size) {
                let allocation = state.idle.swap_remove(found);
                return Some(self.buffer(allocation, length));
            }
            if state.allocated + size <= self.0.limit {
                state.allocated += size;
                drop(state);
                return Some(self.buffer(Allocation::new(size), length));
            }
            // Idle buffers of other classes make room before anybody waits.
            if let Some(other) = state.idle.pop() {
                state.allocated -= other.size;
                continue;
            }
            state =
                self.0.returned.wait_timeout(state, Cancel::POLL).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn buffer(&self, allocation: Allocation, length: usize) -> Buffer {
        Buffer { allocation: Some(allocation), lent: 0, length, pool: self.clone() }
    }
}

/// Bytes out of a [`BufferPool`], to which they return on drop.
#[derive(Debug)]
pub struct Buffer {
    /// `None` while the bytes are lent out.
    allocation: Option<Allocation>,
    /// Bytes of the lent allocation, which count in the pool until this is dropped.
    lent: usize,
    length: usize,
    pool: BufferPool,
}

/// The bytes of a [`Buffer`] in the hands of somebody who may never give them back.
///
/// They do not count in the pool once the buffer is dropped, and are freed, not reused, when these
/// are: what others wait for must not depend on an answer that may not come.
#[derive(Debug, Default)]
pub struct Lent {
    allocation: Allocation,
    length: usize,
}

impl Deref for Lent {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.allocation.bytes(self.length)
    }
}

impl DerefMut for Lent {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.allocation.bytes_mut(self.length)
    }
}

impl Buffer {
    /// Hands the bytes out, and keeps their place in the pool. The buffer is empty until they are
    /// [given back](Self::take_back).
    #[must_use]
    pub fn lend(&mut self) -> Lent {
        let length = std::mem::take(&mut self.length);
        let allocation = self.allocation.take().unwrap_or_default();
        self.lent = allocation.size;
        Lent { allocation, length }
    }

    /// Ends what [`lend`](Self::lend) began, with the same bytes.
    pub fn take_back(&mut self, lent: Lent) {
        debug_assert_eq!(lent.allocation.size, self.lent, "not the bytes that this buffer lent");
        (self.lent, self.length) = (0, lent.length);
        self.allocation = Some(lent.allocation);
    }

    /// Makes the buffer `length` bytes long. Bytes that it did not have before are zero.
    ///
    /// # Panics
    /// When `length` is more than the length that the buffer was asked for with, rounded up to a
    /// power of two.
    pub fn resize(&mut self, length: usize) {
        let old = self.length;
        self.length = length;
        if length > old {
            self[old..].fill(0);
        }
    }

    /// Turns the buffer into shared immutable bytes. It returns to the pool when the last of them is
    /// dropped.
    #[must_use]
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.allocation.as_ref().map_or(&[], |allocation| allocation.bytes(self.length))
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.allocation.as_mut().map_or(&mut [], |allocation| allocation.bytes_mut(self.length))
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut state = self.pool.0.lock();
        match self.allocation.take() {
            Some(allocation) => state.idle.push(allocation),
            None if self.lent > 0 => state.allocated -= self.lent,
            None => return,
        }
        drop(state);
        self.pool.0.returned.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_as_long_as_asked() {
        let pool = BufferPool::new(1 << 20);
        for length in [1, 4096, 65_537, 1 << 20] {
            let buffer = pool.get(length, &Cancel::new()).expect("not cancelled");
            assert_eq!(buffer.len(), length);
            assert_eq!(buffer.as_ptr().addr() % ALIGNMENT, 0);
        }
    }

    /// Whether the kernel was asked for huge pages at an address of this process: proc_pid_smaps(5), `hg`.
    fn asked_for_huge_pages(address: usize) -> bool {
        let smaps = std::fs::read_to_string("/proc/self/smaps").expect("Linux");
        let mut within = false;
        for line in smaps.lines() {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            let bounds = range.map(|(start, end)| [start, end].map(|hex| usize::from_str_radix(hex, 16)));
            if let Some([Ok(start), Ok(end)]) = bounds {
                within = (start..end).contains(&address);
            } else if within && let Some(flags) = line.strip_prefix("VmFlags:") {
                return flags.split(' ').any(|flag| flag == "hg");
            }
        }
        panic!("{address:#x} is not mapped");
    }

    #[test]
    fn large_buffers_ask_for_huge_pages_where_there_are_any() {
        let pool = BufferPool::new(16 << 20);
        let there_are = std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists();
        let buffer = pool.get(4 << 20, &Cancel::new()).expect("not cancelled");
        for place in [0, HUGE_PAGE, buffer.len() - 1] {
            assert_eq!(asked_for_huge_pages(buffer[place..].as_ptr().addr()), there_are, "at {place}");
        }
        let small = pool.get(64 << 10, &Cancel::new()).expect("not cancelled");
        assert!(!asked_for_huge_pages(small.as_ptr().addr()));
    }

    #[test]
    fn large_buffers_begin_with_a_huge_page_and_are_zeroes() {
        let pool = BufferPool::new(16 << 20);
        for length in [HUGE_PAGE - 1, HUGE_PAGE, HUGE_PAGE + 1, 8 << 20] {
            let mut buffer = pool.get(length, &Cancel::new()).expect("not cancelled");
            assert_eq!(buffer.as_ptr().addr() % HUGE_PAGE, 0);
            assert!(buffer.len() == length && buffer.iter().all(|byte| *byte == 0));
            // To the last byte.
            buffer.fill(7);
            let mut lent = buffer.lend();
            assert!(lent.iter().all(|byte| *byte == 7));
            lent.fill(0);
            buffer.take_back(lent);
        }
    }

    #[test]
    fn the_limit_holds_and_a_returned_buffer_wakes_the_waiter() {
        let pool = BufferPool::new(256 << 10);
        let cancel = Cancel::new();
        let mut held: Vec<_> = (0..4).map(|_| pool.get(1, &cancel).expect("within the limit")).collect();
        assert_eq!(pool.0.lock().allocated, 256 << 10);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| pool.get(1, &cancel).expect("not cancelled").len());
            std::thread::sleep(Cancel::POLL / 5);
            assert!(!waiter.is_finished(), "a fifth buffer was handed out");
            held.pop();
            assert_eq!(waiter.join().expect("no panic"), 1);
        });
        assert_eq!(pool.0.lock().allocated, 256 << 10);
    }

    #[test]
    fn idle_buffers_of_another_size_make_room() {
        let pool = BufferPool::new(256 << 10);
        let cancel = Cancel::new();
        drop((0..4).map(|_| pool.get(1, &cancel)).collect::<Vec<_>>());
        assert_eq!(pool.get(200 << 10, &cancel).expect("not cancelled").len(), 200 << 10);
        assert_eq!(pool.0.lock().allocated, 256 << 10);
    }

    #[test]
    fn cancel_ends_the_wait() {
        let pool = BufferPool::new(64 << 10);
        let cancel = Cancel::new();
        let _held = pool.get(1, &cancel);
        cancel.set();
        assert!(pool.get(1, &cancel).is_none());
    }

    #[test]
    fn lent_bytes_come_back() {
        let pool = BufferPool::new(64 << 10);
        let mut buffer = pool.get(8, &Cancel::new()).expect("not cancelled");
        let mut lent = buffer.lend();
        assert_eq!((buffer.len(), lent.len()), (0, 8));
        assert_eq!(pool.0.lock().allocated, 64 << 10, "lent bytes count");
        lent.copy_from_slice(b"01234567");
        buffer.take_back(lent);
        assert_eq!(&buffer[..], b"01234567");
        drop(buffer);
        assert_eq!(pool.0.lock().idle.len(), 1);
        assert_eq!(pool.0.lock().allocated, 64 << 10);
    }

    /// Reads that were given up once kept their share of the pool, and with it every other image,
    /// waiting for as long as the cluster gave no answer.
    #[test]
    fn bytes_that_are_never_given_back_hold_nobody_up() {
        let pool = BufferPool::new(64 << 10);
        let mut buffer = pool.get(8, &Cancel::new()).expect("not cancelled");
        let lent = buffer.lend();
        drop(buffer);
        drop(pool.get(64 << 10, &Cancel::new()).expect("not cancelled"));
        drop(lent);
        assert_eq!(pool.0.lock().idle.len(), 1);
        assert_eq!(pool.0.lock().allocated, 64 << 10);
    }

    #[test]
    fn slices_of_frozen_bytes_hold_the_buffer() {
        let pool = BufferPool::new(64 << 10);
        let mut buffer = pool.get(8, &Cancel::new()).expect("not cancelled");
        buffer.copy_from_slice(b"01234567");
        let bytes = buffer.freeze();
        let slice = bytes.slice(2..4);
        drop(bytes);
        assert_eq!(pool.0.lock().idle.len(), 0);
        assert_eq!(&slice[..], b"23");
        drop(slice);
        assert_eq!(pool.0.lock().idle.len(), 1);
    }
}

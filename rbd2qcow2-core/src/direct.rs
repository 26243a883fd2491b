//! What of a file is read or written past the page cache (`O_DIRECT`), as far as its file system takes that.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;

use crate::buffer::ALIGNMENT;

/// The shortest piece that goes past the page cache, in bytes. Scattered pages would wait for the disk one by
/// one, and tables are read in shorter pieces, and more than once.
const SHORTEST: usize = 64 << 10;

/// A file opened with `O_DIRECT`, or the knowledge that this is of no use.
#[derive(Debug)]
pub(crate) struct Direct {
    /// `None` where the file system, or the file's use, does without.
    file: Option<File>,
    /// Set when the file system refuses what it seemed to take.
    refused: AtomicBool,
}

impl Direct {
    /// Takes what opening the file gave. A file system that does not know the flag is no error.
    pub(crate) fn new(opened: io::Result<Option<File>>) -> io::Result<Self> {
        let file = match opened {
            Err(error) if is_unsupported(&error) => None,
            opened => opened?,
        };
        Ok(Self { file, refused: AtomicBool::new(false) })
    }

    /// The file, and how many of the bytes in `memory` can go past the page cache from or to `offset`: the
    /// whole pages that they begin with.
    pub(crate) fn pages(&self, memory: &[u8], offset: u64) -> Option<(&File, usize)> {
        let file = self.file.as_ref().filter(|_| !self.is_refused())?;
        whole_pages(memory, offset).map(|length| (file, length))
    }

    /// Takes the result of reading or writing those pages, and gives how many bytes of them are done: none
    /// where the file system refuses, which is remembered.
    pub(crate) fn done(&self, result: io::Result<usize>) -> io::Result<usize> {
        match result {
            Err(error) if is_unsupported(&error) => {
                self.refused.store(true, Ordering::Relaxed);
                Ok(0)
            }
            result => result,
        }
    }

    pub(crate) fn is_refused(&self) -> bool {
        self.refused.load(Ordering::Relaxed)
    }
}

/// How many of the bytes in `memory` can go past the page cache from or to `offset`: the whole pages that they
/// begin with. `None` where that is none, or not worth it.
pub(crate) fn whole_pages(memory: &[u8], offset: u64) -> Option<usize> {
    let length = memory.len() - memory.len() % ALIGNMENT;
    let usable = length >= SHORTEST
        && offset.is_multiple_of(ALIGNMENT as u64)
        && memory.as_ptr().align_offset(ALIGNMENT) == 0;
    usable.then_some(length)
}

/// Whether a file system says with this that it does not do direct I/O, or not such.
pub(crate) fn is_unsupported(error: &io::Error) -> bool {
    [Errno::INVAL, Errno::NOTSUP, Errno::OPNOTSUPP]
        .map(Errno::raw_os_error)
        .map(Some)
        .contains(&error.raw_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::BufferPool;
    use crate::cancel::Cancel;

    #[test]
    fn whole_pages_in_place_and_what_is_refused_once_is_not_tried_again() {
        let pool = BufferPool::new(1 << 20);
        let memory = pool.get(SHORTEST + ALIGNMENT + 5, &Cancel::new()).expect("not cancelled");
        let direct = Direct::new(File::open("/dev/null").map(Some)).expect("open");
        let pages = |memory: &[u8], offset| direct.pages(memory, offset).map(|(_, length)| length);
        assert_eq!(pages(&memory, 8192), Some(SHORTEST + ALIGNMENT));
        assert_eq!(pages(&memory[..SHORTEST], 0), Some(SHORTEST));
        assert_eq!(pages(&memory[..SHORTEST - 1], 0), None);
        assert_eq!(pages(&memory, 512), None);
        assert_eq!(pages(&memory[1..], 0), None);

        assert!(direct.done(Err(Errno::IO.into())).is_err());
        assert_eq!(direct.done(Ok(SHORTEST)).expect("done"), SHORTEST);
        assert!(pages(&memory, 0).is_some());
        assert_eq!(direct.done(Err(Errno::INVAL.into())).expect("no error"), 0);
        assert_eq!(pages(&memory, 0), None);
    }

    #[test]
    fn a_file_system_without_it_is_no_error() {
        let pool = BufferPool::new(1 << 20);
        let memory = pool.get(SHORTEST, &Cancel::new()).expect("not cancelled");
        for opened in [Ok(None), Err(Errno::INVAL.into())] {
            assert!(Direct::new(opened).expect("no error").pages(&memory, 0).is_none());
        }
        assert!(Direct::new(Err(Errno::ACCESS.into())).is_err());
    }
}

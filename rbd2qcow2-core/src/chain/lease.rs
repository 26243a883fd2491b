//! Telling that nobody else has a file open.
#![allow(unsafe_code, reason = "no library that is well kept has a call for leases")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// How long others may have the file open that are about to close it.
const WAIT: Duration = Duration::from_millis(500);

/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(5);

/// Chooses the signal that a broken lease sends: `asm-generic/fcntl.h`, which the library lacks.
const F_SETSIG: libc::c_int = 10;

/// A write lease on a file, of `fcntl(2)`: nobody else, on this machine, has the file open. Whoever opens
/// it meanwhile waits until this is dropped (or the system takes it away, which is after
/// `/proc/sys/fs/lease-break-time` seconds, 45 if nobody has changed that); who will not wait is refused.
#[derive(Debug)]
pub(crate) struct Lease<'a> {
    file: &'a File,
    taken: Instant,
}

impl<'a> Lease<'a> {
    /// Takes it. `file` must be open for writing, and have no other handle than duplicates of this one.
    /// `None` where somebody else has the file open, or where the file system, or the system's settings,
    /// know no leases.
    ///
    /// Blocks for half a second at most: who has the file open may just be looking at it, as whoever lists
    /// backups does, or be a child of this process that has yet to execute its program.
    pub(crate) fn take(file: &'a File) -> Option<Self> {
        // Whoever opens the file has the kernel tell us, by default with a signal that ends the process.
        // This one is ignored unless somebody wants it.
        control(file, F_SETSIG, libc::SIGURG).ok()?;
        let start = Instant::now();
        loop {
            let taken = Instant::now();
            match control(file, libc::F_SETLEASE, libc::F_WRLCK) {
                Ok(()) => return Some(Self { file, taken }),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && start.elapsed() < WAIT => {
                    std::thread::sleep(PAUSE);
                }
                Err(_) => return None,
            }
        }
    }

    /// Whether nobody can have opened the file since. Where this process was stopped, or its disk hung, somebody
    /// may have waited for so long that the system has let him in.
    pub(crate) fn has_held(&self) -> bool {
        has_held(self.taken.elapsed(), break_time())
    }
}

/// Whether a lease that is so old was not taken away for somebody who came when it was new.
fn has_held(age: Duration, break_time: Option<Duration>) -> bool {
    // The system's clock may go somewhat faster.
    break_time.is_none_or(|limit| age < limit.mul_f32(0.9))
}

/// How long the system has others wait; `None` for ever.
fn break_time() -> Option<Duration> {
    let told = std::fs::read_to_string("/proc/sys/fs/lease-break-time").ok();
    // The shortest that there is, where nobody tells.
    let seconds = told.and_then(|text| text.trim().parse().ok()).unwrap_or(1);
    (seconds > 0).then(|| Duration::from_secs(seconds))
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        // It goes with the file's last handle in any case.
        let _ = control(self.file, libc::F_SETLEASE, libc::F_UNLCK);
    }
}

/// An operation of `fcntl(2)` that takes an integer.
fn control(file: &File, operation: libc::c_int, argument: libc::c_int) -> io::Result<()> {
    // SAFETY: both operations take an integer and touch no memory of the process (fcntl(2)); the
    // descriptor is open as long as `file` lives.
    match unsafe { libc::fcntl(file.as_raw_fd(), operation, argument) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(path: &std::path::Path) -> File {
        File::options().read(true).write(true).open(path).expect("opened")
    }

    #[test]
    fn a_lease_is_had_only_where_nobody_else_has_the_file_open() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("file");
        std::fs::write(&path, "content").expect("written");
        let file = opened(&path);
        let second = file.try_clone().expect("cloned");
        assert!(Lease::take(&file).is_some(), "duplicates do not count");
        drop(second);
        for writable in [false, true] {
            let other = File::options().read(true).write(writable).open(&path).expect("opened");
            assert!(Lease::take(&file).is_none());
            drop(other);
            assert!(Lease::take(&file).is_some());
        }
    }

    #[test]
    fn a_lease_holds_until_others_have_waited_for_too_long() {
        let seconds = Duration::from_secs;
        assert!(has_held(seconds(40), Some(seconds(45))));
        assert!(!has_held(seconds(45), Some(seconds(45))));
        assert!(!has_held(seconds(100), Some(seconds(45))));
        assert!(has_held(seconds(100), None));
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("file");
        std::fs::write(&path, "content").expect("written");
        let file = opened(&path);
        assert!(Lease::take(&file).expect("nobody else has it open").has_held());
    }

    #[test]
    fn who_opens_the_file_meanwhile_waits() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("file");
        std::fs::write(&path, "content").expect("written");
        let file = opened(&path);
        let lease = Lease::take(&file).expect("nobody else has it open");
        let start = Instant::now();
        std::thread::scope(|scope| {
            let opener = scope.spawn(|| {
                let _ = std::fs::read(&path).expect("read");
                start.elapsed()
            });
            std::thread::sleep(Duration::from_millis(200));
            assert!(!opener.is_finished());
            drop(lease);
            assert!(opener.join().expect("joined") >= Duration::from_millis(200));
        });
    }
}

//! The lock on the directory of an image.
//!
//! `flock` on the file `.lock`: the kernel lets go of it when the process ends, however it ends, so
//! a killed run never blocks the next one. The file is never removed, since a run that waits at the
//! opened old file and one that makes a new file would both hold "the" lock.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::error::ChainError;
use super::owner;

/// Name of the lock file.
pub const LOCK_FILE: &str = ".lock";

/// How often whoever wants to write tries again while somebody reads, and how long it waits before.
/// Those who only [look](ChainLock::writer) at the lock hold it for a moment, as readers do.
const TRIES: u32 = 5;
const MOMENT: Duration = Duration::from_millis(10);

/// How long the cluster may take a client that died for alive (`osd_client_watch_timeout`, 30 s), and more, in
/// seconds.
const CLIENT_LIFE: u64 = 300;

/// A client of the cluster, by its number, and when it was noted, in seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Client {
    number: u64,
    noted: u64,
}

/// Who keeps others out of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// A run that writes.
    Writer {
        /// Its process, when it could be read; one of another machine on a network file system.
        pid: Option<u32>,
    },
    /// Runs that read and need the chain to stay as it is.
    Readers,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Writer { pid: Some(pid) } => write!(f, "another run is writing this chain: process {pid}"),
            Self::Writer { pid: None } => f.write_str("another run is writing this chain"),
            Self::Readers => {
                f.write_str("another run is reading this chain (a restore, a verification or a server)")
            }
        }
    }
}

/// A lock that is held until this is dropped or the process ends.
#[derive(Debug)]
#[must_use]
pub struct ChainLock {
    file: File,
    /// Whether the file says whose it is, which must end with the lock.
    exclusive: bool,
    /// Those of the runs that held the lock lately, and of this one.
    clients: Mutex<Vec<Client>>,
}

impl ChainLock {
    /// Locks the chain in `directory` for writing. Waits for a moment at most.
    ///
    /// # Errors
    /// [`ChainError::Locked`] when anybody else holds the lock, [`ChainError::Io`] also where the
    /// file system has no locks.
    pub fn exclusive(directory: &Path) -> Result<Self, ChainError> {
        let path = directory.join(LOCK_FILE);
        let mut file = open_or_create(&path).map_err(|cause| not_opened(&path, cause))?;
        let mut tries = TRIES;
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) => {}
                other => break other.map_err(ChainError::io("lock", &path))?,
            }
            let holder = holder(&mut file);
            tries -= 1;
            if tries == 0 || holder != Holder::Readers {
                return Err(ChainError::Locked { path, holder });
            }
            thread::sleep(MOMENT);
        }
        let clients = read_clients(&mut file);
        let lock = Self { file, exclusive: true, clients: Mutex::new(clients) };
        // Only for the message to others.
        if let Err(error) = lock.write(Some(std::process::id())) {
            log::debug!("cannot write the process id into {}: {error}", path.display());
        }
        Ok(lock)
    }

    /// The clients of the cluster that earlier runs noted in the last five minutes. None of them does
    /// anything with the chain any more, though the cluster may take one for alive that was killed.
    pub(super) fn earlier_clients(&self) -> Vec<u64> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner).iter().map(|one| one.number).collect()
    }

    /// Notes this run's client of the cluster, for the runs to come. Best effort: without it, one that follows
    /// a killed one may have to wait.
    pub(super) fn note_client(&self, number: u64) {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner).push(Client { number, noted: now() });
        if let Err(error) = self.write(Some(std::process::id())) {
            log::debug!("cannot note the cluster's client {number} in a lock file: {error}");
        }
    }

    /// Writes what the file says: whose it is, and the clients.
    fn write(&self, pid: Option<u32>) -> io::Result<()> {
        let clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = pid.map_or_else(String::new, |pid| pid.to_string());
        if pid.is_some() || !clients.is_empty() {
            text.push('\n');
        }
        for Client { number, noted } in clients.iter() {
            text += &format!("client.{number} {noted}\n");
        }
        let mut file = &self.file;
        file.set_len(0)?;
        file.rewind()?;
        file.write_all(text.as_bytes())
    }

    /// Locks the chain in `directory` against changes, together with other readers. Does not wait.
    /// `None` where no lock file exists and none can be made: on a read-only file system nobody
    /// writes either.
    ///
    /// # Errors
    /// [`ChainError::Locked`] when somebody writes, [`ChainError::Io`] also where the file system
    /// has no locks.
    pub fn shared(directory: &Path) -> Result<Option<Self>, ChainError> {
        let path = directory.join(LOCK_FILE);
        let mut file = match open(&path, false) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => match open_or_create(&path) {
                Err(error) if is_read_only(&error) => return Ok(None),
                other => other.map_err(|cause| not_opened(&path, cause))?,
            },
            other => {
                let file = other.map_err(|cause| not_opened(&path, cause))?;
                owner::as_neighbours(&file, &path);
                file
            }
        };
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) {
            Err(Errno::WOULDBLOCK) => {
                let holder = Holder::Writer { pid: read_pid(&mut file) };
                Err(ChainError::Locked { path, holder })
            }
            other => {
                other.map_err(ChainError::io("lock", &path))?;
                Ok(Some(Self { file, exclusive: false, clients: Mutex::default() }))
            }
        }
    }

    /// The run that writes the chain in `directory` at this moment, if any. Changes nothing, keeps
    /// nobody out and does not wait: it may be over when this returns.
    ///
    /// # Errors
    /// [`ChainError::Io`] when the lock file cannot be opened (it is its owner's alone), or the file
    /// system has no locks.
    pub fn writer(directory: &Path) -> Result<Option<Holder>, ChainError> {
        let path = directory.join(LOCK_FILE);
        let mut file = match open(&path, false) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|cause| not_opened(&path, cause))?,
        };
        match look(&file) {
            Err(Errno::WOULDBLOCK) => Ok(Some(Holder::Writer { pid: read_pid(&mut file) })),
            other => other.map(|()| None).map_err(ChainError::io("look at the lock", &path)),
        }
    }
}

impl Drop for ChainLock {
    fn drop(&mut self) {
        if self.exclusive {
            // Best effort, as the writing was.
            _ = self.write(None);
        }
        // Closing the file would not suffice: a child process that another thread is just starting
        // holds a copy of it until its exec. Should this fail, closing is what remains.
        _ = rustix::fs::flock(&self.file, FlockOperation::NonBlockingUnlock);
    }
}

fn open(path: &Path, write: bool) -> io::Result<File> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let mut options = File::options();
    options.read(true).write(write).custom_flags(flags.bits().cast_signed()).open(path)
}

/// Opens the file to write to it, after creating it where there is none. It belongs to the owner of the files
/// beside it then, as far as that is possible: whoever runs first must not keep out everybody else for good.
fn open_or_create(path: &Path) -> io::Result<File> {
    let file = match open(path, true) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            match File::options().read(true).write(true).create_new(true).mode(0o600).open(path) {
                // Somebody was faster.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => open(path, true)?,
                other => other?,
            }
        }
        other => other?,
    };
    // What is there already, too: older versions have left it to root.
    owner::as_neighbours(&file, path);
    Ok(file)
}

fn not_opened(path: &Path, cause: io::Error) -> ChainError {
    match cause.kind() {
        io::ErrorKind::PermissionDenied => ChainError::NotAllowed { path: path.to_owned(), cause },
        _ => ChainError::io("open the lock file", path)(cause),
    }
}

fn is_read_only(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied)
}

/// Finds out who holds the lock that was just refused.
fn holder(file: &mut File) -> Holder {
    match look(file) {
        Ok(()) => Holder::Readers,
        Err(_) => Holder::Writer { pid: read_pid(file) },
    }
}

/// Whether a reader would be let in, which only a writer hinders.
fn look(file: &File) -> Result<(), Errno> {
    rustix::fs::flock(file, FlockOperation::NonBlockingLockShared)?;
    // Not left to closing, as when a lock is dropped.
    rustix::fs::flock(file, FlockOperation::NonBlockingUnlock)
}

fn read_pid(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.take(16).read_to_string(&mut text).ok()?;
    text.lines().next()?.trim().parse().ok()
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The clients that the file names and that were noted lately, or claim to be of the future.
fn read_clients(file: &mut File) -> Vec<Client> {
    let mut text = String::new();
    if file.rewind().and_then(|()| file.take(1 << 16).read_to_string(&mut text)).is_err() {
        return Vec::new();
    }
    let oldest = now().saturating_sub(CLIENT_LIFE);
    let parse = |line: &str| {
        let (number, noted) = line.strip_prefix("client.")?.split_once(' ')?;
        Some(Client { number: number.parse().ok()?, noted: noted.parse().ok()? })
    };
    text.lines().filter_map(parse).filter(|client| client.noted >= oldest).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn locked(result: Result<impl fmt::Debug, ChainError>) -> Holder {
        match result {
            Err(ChainError::Locked { holder, .. }) => holder,
            other => panic!("not locked: {other:?}"),
        }
    }

    #[test]
    fn a_writer_keeps_everyone_out_and_is_named() {
        let directory = tempfile::tempdir().expect("a directory");
        let lock = ChainLock::exclusive(directory.path()).expect("free");
        let writer = Holder::Writer { pid: Some(std::process::id()) };
        assert_eq!(locked(ChainLock::exclusive(directory.path())), writer);
        assert_eq!(locked(ChainLock::shared(directory.path())), writer);
        let error = ChainLock::exclusive(directory.path()).expect_err("locked").to_string();
        assert!(error.starts_with("another run is writing this chain: process "), "{error}");
        assert!(error.contains(LOCK_FILE), "{error}");
        drop(lock);
        _ = ChainLock::exclusive(directory.path()).expect("free again");
    }

    #[test]
    fn clients_of_earlier_runs_are_known_for_a_while() {
        let directory = tempfile::tempdir().expect("a directory");
        let lock = ChainLock::exclusive(directory.path()).expect("free");
        assert!(lock.earlier_clients().is_empty());
        lock.note_client(4123);
        assert_eq!(
            locked(ChainLock::exclusive(directory.path())),
            Holder::Writer { pid: Some(std::process::id()) }
        );
        drop(lock);
        assert_eq!(ChainLock::writer(directory.path()).expect("readable"), None);
        let lock = ChainLock::exclusive(directory.path()).expect("free");
        assert_eq!(lock.earlier_clients(), [4123]);
        // As a killed run leaves it, and one of long ago.
        let text = format!("77\nclient.5 {}\nclient.6 {}\nclient.x 1\n", now(), now() - CLIENT_LIFE - 10);
        drop(lock);
        std::fs::write(directory.path().join(LOCK_FILE), text).expect("written");
        let lock = ChainLock::exclusive(directory.path()).expect("free");
        assert_eq!(lock.earlier_clients(), [5]);
    }

    #[test]
    fn readers_share_and_keep_writers_out() {
        let directory = tempfile::tempdir().expect("a directory");
        let one = ChainLock::shared(directory.path()).expect("free");
        let two = ChainLock::shared(directory.path()).expect("shared");
        assert!(one.is_some() && two.is_some());
        assert_eq!(locked(ChainLock::exclusive(directory.path())), Holder::Readers);
        drop(one);
        assert_eq!(locked(ChainLock::exclusive(directory.path())), Holder::Readers);
        drop(two);
        _ = ChainLock::exclusive(directory.path()).expect("free again");
    }

    #[test]
    fn who_looks_finds_a_writer_and_keeps_nobody_out() {
        let directory = tempfile::tempdir().expect("a directory");
        assert_eq!(ChainLock::writer(directory.path()).expect("no file"), None);
        assert!(!directory.path().join(LOCK_FILE).exists());
        let reader = ChainLock::shared(directory.path()).expect("free");
        assert_eq!(ChainLock::writer(directory.path()).expect("readable"), None);
        drop(reader);
        let writer = ChainLock::exclusive(directory.path()).expect("free");
        let holder = Holder::Writer { pid: Some(std::process::id()) };
        assert_eq!(ChainLock::writer(directory.path()).expect("readable"), Some(holder));
        drop(writer);
        assert_eq!(ChainLock::writer(directory.path()).expect("readable"), None);

        let done = std::sync::atomic::AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    ChainLock::writer(directory.path()).expect("readable");
                    // Others sleep longer than this, and so find the lock free in between.
                    thread::sleep(Duration::from_millis(1));
                }
            });
            let locked = (0..50).try_for_each(|_| ChainLock::exclusive(directory.path()).map(drop));
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            locked.expect("whoever looks is no reader");
        });
    }

    #[test]
    fn a_link_is_not_followed() {
        let directory = tempfile::tempdir().expect("a directory");
        let target = directory.path().join("precious");
        std::os::unix::fs::symlink(&target, directory.path().join(LOCK_FILE)).expect("a link");
        assert!(matches!(ChainLock::exclusive(directory.path()), Err(ChainError::Io { .. })));
        assert!(!target.exists());
    }
}

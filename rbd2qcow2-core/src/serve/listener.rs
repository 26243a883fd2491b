//! The socket that a point is served on.

use std::fmt::Write;
use std::fs::{self, File, Metadata};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::probe::Connection;
use super::{Listen, ServeError};
use crate::chain::image_directory_around;
use crate::point::{OpenPoint, PointError};

/// Bytes that the path of a socket may have: the system's 108, with a zero at the end.
const LONGEST_PATH: usize = 107;

/// Bytes of the image's name that a socket's name has, at most.
const IMAGE_IN_NAME: usize = 32;

/// Servers of one point, or of images with like names, whose sockets get a name by themselves.
const NAMES: usize = 100;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// How long is waited for another server that clears the same directory of a left-over. It takes twice
/// [`START_PAUSE`] at most.
const LOCK_LIMIT: Duration = Duration::from_secs(2);

/// How often it is tried.
const LOCK_POLL: Duration = Duration::from_millis(5);

/// Longer than it takes from a socket's name to its first call of `listen`.
const START_PAUSE: Duration = Duration::from_millis(100);

/// Bytes of a path that QEMU takes for something else in a URI, because it decodes twice (9.1 and later).
const DECODED_TWICE: [u8; 3] = [b'%', b'&', b';'];

/// Where a point is served. Dropping this removes the socket's name, if it is still ours.
#[derive(Debug)]
pub(super) enum Listener {
    Unix(SocketFile),
    Tcp(SocketAddr),
}

/// The name of a socket that was made here.
#[derive(Debug)]
pub(super) struct SocketFile {
    /// Absolute.
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl Listener {
    /// Makes the socket, which then listens, and gives it besides.
    pub(super) fn bind(
        listen: &Listen,
        dest: &Path,
        point: &OpenPoint,
    ) -> Result<(Self, OwnedFd), ServeError> {
        match listen {
            Listen::Tcp(address) => bind_tcp(*address),
            Listen::Socket(path) => {
                let path = std::path::absolute(path)
                    .map_err(|cause| ServeError::Socket { path: path.clone(), cause })?;
                bind_unix(&path, dest)
            }
            Listen::AnySocket => bind_any(&runtime_directory(), dest, point),
        }
    }

    /// Connects as any client would.
    pub(super) fn connect(&self) -> io::Result<Connection> {
        Ok(match self {
            Self::Unix(file) => Connection::Unix(UnixStream::connect(&file.path)?),
            Self::Tcp(address) => Connection::Tcp(TcpStream::connect(reachable(*address))?),
        })
    }

    /// What clients call it.
    pub(super) fn uri(&self) -> String {
        match self {
            Self::Unix(file) => format!("nbd+unix:///?socket={}", encoded(file.path.as_os_str().as_bytes())),
            Self::Tcp(address) => format!("nbd://{address}"),
        }
    }

    /// Logs what whoever chose the address may not have thought of.
    pub(super) fn warn(&self) {
        match self {
            Self::Tcp(address) if !address.ip().is_loopback() => log::warn!(
                "whoever reaches {address} can use the disk: NBD asks nobody for a password, and encrypts \
                 nothing"
            ),
            Self::Unix(file)
                if file.path.as_os_str().as_bytes().iter().any(|b| DECODED_TWICE.contains(b)) =>
            {
                log::warn!(
                    "QEMU 9.1 and later do not understand the URI of a socket whose path has a %, & or ;: {}",
                    file.path.display()
                );
            }
            _ => {}
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Somebody may have removed it, and another server may have the name now.
        if fs::symlink_metadata(&self.path).is_ok_and(|found| identity(&found) == self.identity)
            && let Err(error) = fs::remove_file(&self.path)
        {
            log::warn!("cannot remove the socket {}: {error}", self.path.display());
        }
    }
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

fn bind_tcp(address: SocketAddr) -> Result<(Listener, OwnedFd), ServeError> {
    let bound = TcpListener::bind(address).and_then(|socket| Ok((socket.local_addr()?, socket)));
    let (address, socket) = bound.map_err(|cause| match cause.kind() {
        io::ErrorKind::AddrInUse => ServeError::PortInUse { address },
        _ => ServeError::Address { address, cause },
    })?;
    Ok((Listener::Tcp(address), socket.into()))
}

/// An address that leads to a server on `address`, from this machine.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    let mut reachable = address;
    reachable.set_ip(ip);
    reachable
}

/// A socket with the first name that nobody has.
pub(super) fn bind_any(
    directory: &Path,
    dest: &Path,
    point: &OpenPoint,
) -> Result<(Listener, OwnedFd), ServeError> {
    let (image, point) = (point.image().as_str(), point.name().to_string());
    let mut number = 1;
    loop {
        match bind_unix(&socket_name(directory, image, &point, number), dest) {
            Err(
                ServeError::SocketInUse { .. }
                | ServeError::SocketExists { .. }
                | ServeError::SocketLeft { .. },
            ) if number < NAMES => number += 1,
            result => return result,
        }
    }
}

fn bind_unix(path: &Path, dest: &Path) -> Result<(Listener, OwnedFd), ServeError> {
    let failed = |cause| ServeError::Socket { path: path.to_owned(), cause };
    if path.as_os_str().len() > LONGEST_PATH {
        return Err(ServeError::SocketTooLong { path: path.to_owned(), limit: LONGEST_PATH });
    }
    let directory = path.parent().unwrap_or(path).canonicalize().map_err(failed)?;
    if let Some(directory) = image_directory_around(dest, &directory).map_err(PointError::from)? {
        return Err(ServeError::WithinChain { path: path.to_owned(), directory });
    }
    let address = SocketAddrUnix::new(path).map_err(|error| failed(error.into()))?;
    let _lock = lock(&directory);
    let socket = match bind_new(&address) {
        Err(Errno::ADDRINUSE) => {
            remove_left(path, &address)?;
            // Somebody else may have been quicker.
            bind_new(&address).map_err(|error| match error {
                Errno::ADDRINUSE => ServeError::SocketInUse { path: path.to_owned() },
                error => failed(error.into()),
            })?
        }
        result => result.map_err(|error| failed(error.into()))?,
    };
    let file = fs::symlink_metadata(path).map_err(failed)?;
    let file = SocketFile { path: path.to_owned(), identity: identity(&file) };
    rustix::net::listen(&socket, BACKLOG).map_err(|error| failed(error.into()))?;
    Ok((Listener::Unix(file), socket))
}

/// Keeps other servers away from a directory until this is dropped: nobody clears it of a left-over while
/// another server replaces that, and the name that is looked at is the one that was bound.
///
/// Goes on without a lock where the directory has none to give, or somebody keeps it: then
/// [`probe`](super::probe) sees a name that was taken away.
fn lock(directory: &Path) -> Option<File> {
    let file = File::open(directory).ok()?;
    let deadline = Instant::now() + LOCK_LIMIT;
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Some(file),
            Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < deadline => thread::sleep(LOCK_POLL),
            Err(error) => {
                log::debug!("{} is not locked: {error}", directory.display());
                return None;
            }
        }
    }
}

/// A socket with a name that did not exist. Nobody can connect before it listens.
fn bind_new(address: &SocketAddrUnix) -> Result<OwnedFd, Errno> {
    let socket = new_socket(SocketFlags::empty())?;
    // The file gets the mode of the socket, less what the umask takes.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, address)?;
    Ok(socket)
}

fn new_socket(flags: SocketFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | SocketFlags::CLOEXEC;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Removes a socket that nobody listens on. That somebody who takes no [`lock`] makes a new one at the very
/// moment is left to [`probe`](super::probe) to see.
fn remove_left(path: &Path, address: &SocketAddrUnix) -> Result<(), ServeError> {
    let failed = |cause| ServeError::Socket { path: path.to_owned(), cause };
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {}
        Ok(_) => return Err(ServeError::SocketExists { path: path.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    }
    // Twice, as a server that just starts, and could not lock, has its name before it listens.
    for pause in [START_PAUSE, Duration::ZERO] {
        // Whether a full queue lets nobody in is not waited for.
        let socket = new_socket(SocketFlags::NONBLOCK).map_err(|error| failed(error.into()))?;
        match rustix::net::connect(&socket, address) {
            Err(Errno::CONNREFUSED) => thread::sleep(pause),
            Err(Errno::NOENT) => return Ok(()),
            _ => return Err(ServeError::SocketInUse { path: path.to_owned() }),
        }
    }
    log::info!("removing the socket {}, which a killed server has left", path.display());
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(ServeError::SocketLeft { path: path.to_owned(), cause: error })
        }
        _ => Ok(()),
    }
}

/// Where this user's sockets are.
fn runtime_directory() -> PathBuf {
    let named = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let directory = named.filter(|directory| directory.is_absolute() && directory.is_dir());
    directory.unwrap_or_else(|| std::path::absolute(std::env::temp_dir()).unwrap_or_else(|_| "/tmp".into()))
}

/// `rbd2qcow2-<image>-<point>.sock`, with so much of the image's name as fits, and a number from the
/// second on.
fn socket_name(directory: &Path, image: &str, point: &str, number: usize) -> PathBuf {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let end = if number == 1 { format!("-{point}.sock") } else { format!("-{point}-{number}.sock") };
    let start = "rbd2qcow2-";
    let taken = directory.as_os_str().len() + 1 + start.len() + end.len();
    let room = LONGEST_PATH.saturating_sub(taken).clamp(1, IMAGE_IN_NAME);
    let image: String = image.chars().map(plain).take(room).collect();
    directory.join(format!("{start}{image}{end}"))
}

/// A path within a URI's query.
fn encoded(path: &[u8]) -> String {
    let mut encoded = String::new();
    for &byte in path {
        if byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte) {
            encoded.push(byte.into());
        } else {
            write!(encoded, "%{byte:02X}").expect("strings take everything");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_names_tell_image_and_point_and_fit() {
        let name = |directory: &str, image: &str, number| {
            let path = socket_name(Path::new(directory), image, "20261122T173312Z", number);
            path.to_str().expect("UTF-8").to_owned()
        };
        assert_eq!(name("/tmp", "web/1", 1), "/tmp/rbd2qcow2-web_1-20261122T173312Z.sock");
        assert_eq!(name("/tmp", "a:b,c=d%/é", 2), "/tmp/rbd2qcow2-a_b_c_d___-20261122T173312Z-2.sock");
        assert!(name("/run/user/1000", &"x".repeat(200), 100).len() <= LONGEST_PATH);
        let long = format!("/{}", "d".repeat(60));
        assert_eq!(name(&long, &"x".repeat(200), 7).len(), LONGEST_PATH);
        // Too long for any: the error shows a path that is one.
        assert!(name(&long.repeat(2), "vm", 1).ends_with("/rbd2qcow2-v-20261122T173312Z.sock"));
    }

    #[test]
    fn uris_hold_any_path() {
        assert_eq!(encoded(b"/tmp/a-b_c.sock~"), "/tmp/a-b_c.sock~");
        assert_eq!(encoded("/t %,é?#\u{1}".as_bytes()), "/t%20%25%2C%C3%A9%3F%23%01");
    }

    #[test]
    fn tcp_uris_are_bracketed_where_they_must_be() {
        let uri = |text: &str| Listener::Tcp(text.parse().expect("an address")).uri();
        assert_eq!(uri("127.0.0.1:10809"), "nbd://127.0.0.1:10809");
        assert_eq!(uri("[::1]:1"), "nbd://[::1]:1");
        let reachable = |text: &str| reachable(text.parse().expect("an address")).to_string();
        assert_eq!(reachable("0.0.0.0:7"), "127.0.0.1:7");
        assert_eq!(reachable("[::]:7"), "[::1]:7");
        assert_eq!(reachable("192.0.2.1:7"), "192.0.2.1:7");
    }
}

//! Why a point could not be served.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use crate::layer::LayerError;
use crate::nbd::NbdError;
use crate::nbd::server_process::{ServerExit, StartError};
use crate::point::PointError;

/// Why a point is not served. Nothing of the server is left, and no chain was changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The point could not be opened.
    #[error(transparent)]
    Point(#[from] PointError),
    /// The newest layer has no absolute path.
    #[error("cannot tell where {} is", path.display())]
    Layer {
        /// The layer.
        path: PathBuf,
        /// What the system says.
        #[source]
        cause: io::Error,
    },
    /// A socket or an overlay would lie where points are.
    #[error(
        "{} would lie within {}, which holds backups: choose another directory",
        path.display(), directory.display()
    )]
    WithinChain {
        /// The socket, or the directory for the overlay.
        path: PathBuf,
        /// The directory of an image.
        directory: PathBuf,
    },
    /// The directory for the overlay cannot be used.
    #[error("cannot use the directory {} for what clients write", path.display())]
    OverlayDirectory {
        /// The directory.
        path: PathBuf,
        /// What the system says.
        #[source]
        cause: io::Error,
    },
    /// The overlay could not be written.
    #[error("cannot make a file for what clients write in {}", directory.display())]
    Overlay {
        /// Where it was going to be.
        directory: PathBuf,
        /// What the writer says.
        #[source]
        cause: LayerError,
    },
    /// The path of the socket does not fit into an address.
    #[error(
        "the path of the socket {} has {} bytes, and may have {limit}: choose a shorter one",
        path.display(), path.as_os_str().len()
    )]
    SocketTooLong {
        /// The path.
        path: PathBuf,
        /// Bytes that a path may have.
        limit: usize,
    },
    /// Something that is no socket has the name. Nothing is ever replaced.
    #[error("{} exists and is no socket: choose another path", path.display())]
    SocketExists {
        /// The path.
        path: PathBuf,
    },
    /// Somebody listens on the socket.
    #[error("another server listens on {}: choose another path", path.display())]
    SocketInUse {
        /// The path.
        path: PathBuf,
    },
    /// Nobody listens on the socket, and it cannot be removed.
    #[error("cannot remove the socket {}, which a killed server has left: choose another path", path.display())]
    SocketLeft {
        /// The path.
        path: PathBuf,
        /// What the system says.
        #[source]
        cause: io::Error,
    },
    /// The socket could not be made.
    #[error("cannot make the socket {}", path.display())]
    Socket {
        /// The path.
        path: PathBuf,
        /// What the system says.
        #[source]
        cause: io::Error,
    },
    /// Somebody listens on the port.
    #[error("port {} of {} is in use: choose another, or 0 for any that is free", address.port(), address.ip())]
    PortInUse {
        /// Address and port.
        address: SocketAddr,
    },
    /// The port cannot be listened on.
    #[error("cannot listen on port {} of {}", address.port(), address.ip())]
    Address {
        /// Address and port.
        address: SocketAddr,
        /// What the system says.
        #[source]
        cause: io::Error,
    },
    /// The shell above the server could not be started.
    #[error("cannot start the server")]
    Start(#[from] StartError),
    /// The program is missing, or a library of it.
    #[error(
        "{} {exit}; install QEMU's disk tools, 5.2 or later (package qemu-utils on Debian and Ubuntu, qemu-img \
         on Fedora, RHEL and SUSE)",
        program.display()
    )]
    NotFound {
        /// The program.
        program: PathBuf,
        /// What was said.
        exit: ServerExit,
    },
    /// The server ended before it showed the disk.
    #[error("{} cannot serve the point: it {exit}", program.display())]
    Failed {
        /// The program.
        program: PathBuf,
        /// How it ended, with what it said.
        exit: ServerExit,
    },
    /// The server's socket cannot be reached.
    #[error("cannot connect to {uri}, where the point was going to be")]
    Connect {
        /// Where.
        uri: String,
        /// What the system says.
        #[source]
        cause: io::Error,
    },
    /// The socket's path leads to a server of somebody else.
    #[error("{uri} was taken by another server meanwhile: choose another path")]
    Replaced {
        /// Where.
        uri: String,
    },
    /// The server did not show the disk, or not in time.
    #[error("{} does not serve the point", program.display())]
    Nbd {
        /// The program.
        program: PathBuf,
        /// What is wrong.
        #[source]
        cause: NbdError,
    },
    /// The disk has another size than the point.
    #[error("the server shows a disk of {found} bytes, not of {expected}: the point was not served")]
    WrongSize {
        /// The chain's size in bytes.
        expected: u64,
        /// The disk's size in bytes.
        found: u64,
    },
    /// The disk is writable and should not be, or the other way round.
    #[error(
        "the server shows a {} disk, which was not asked for: the point was not served",
        if *read_only { "read-only" } else { "writable" }
    )]
    WrongAccess {
        /// Whether the disk is read-only.
        read_only: bool,
    },
    /// The server ended though nobody had told it to.
    #[error("{} {exit}; the point is not served any more", program.display())]
    Died {
        /// The program.
        program: PathBuf,
        /// How it ended, with what it said.
        exit: ServerExit,
    },
    /// A stop was asked for before the point was served.
    #[error("interrupted")]
    Cancelled,
}

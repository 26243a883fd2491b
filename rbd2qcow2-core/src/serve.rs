//! A point as a disk, at once: an NBD export by stock qemu-nbd.
//!
//! qemu-nbd opens the newest layer and follows the chain below it by itself. Before it does, the chain
//! was opened by our own reader ([`OpenPoint`]), which has looked at every name and format in the
//! headers, and which keeps the chain as it is until the end. The server gets a socket that this room
//! has made ([`ServerProcess::listen`]), and is only spoken of when it has shown, on that socket, a disk
//! of the right size.

use std::ffi::{OsStr, OsString};
use std::net::SocketAddr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cancel::Cancel;
use crate::chain::names::{ImageName, PointName};
use crate::nbd::handshake::Export;
use crate::nbd::server_process::{ServerCommand, ServerExit, ServerProcess};
use crate::nbd::wire::TransmissionFlags;
use crate::point::OpenPoint;

mod error;
mod listener;
mod overlay;
mod probe;

pub use error::ServeError;
use listener::Listener;
use overlay::Overlay;
use probe::ProbeError;

/// How much later than the server we may be told to stop, where a service manager tells all processes of
/// a service. A server that ends then has not died.
const STOP_LIMIT: Duration = Duration::from_secs(1);

/// Which point is served, and how.
#[derive(Clone, Debug)]
pub struct Serve {
    /// The directory that holds a directory for each image.
    pub dest: PathBuf,
    /// The image's name, as Ceph knows it.
    pub image: String,
    /// The point; `None` for the newest.
    pub point: Option<PointName>,
    /// How it is served.
    pub options: ServeOptions,
}

/// How a point is served. `Default` is what the program does without options.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ServeOptions {
    /// Where.
    pub listen: Listen,
    /// Whether clients may write.
    pub access: Access,
    /// Connections at once, at least 1; more of them wait.
    pub connections: usize,
    /// The program `qemu-nbd`, a path or a name to be found in `PATH`. Of 5.2 or later.
    pub qemu_nbd: PathBuf,
    /// How long the server may take until it shows the disk.
    pub start_limit: Duration,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            listen: Listen::default(),
            access: Access::default(),
            connections: 16,
            qemu_nbd: "qemu-nbd".into(),
            start_limit: Duration::from_secs(60),
        }
    }
}

/// Where a point is served.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Listen {
    /// A Unix socket whose name tells image and point, and that no other server has: in the directory
    /// that `XDG_RUNTIME_DIR` names, or else in the one for temporary files.
    #[default]
    AnySocket,
    /// A Unix socket at this path, of 107 bytes at most when it is absolute. Nothing may be there, but
    /// for a socket that a killed server has left.
    Socket(PathBuf),
    /// A TCP port; 0 for any that is free. NBD asks for no password: whoever reaches the address can use
    /// the disk.
    Tcp(SocketAddr),
}

/// What clients may do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// Read.
    #[default]
    ReadOnly,
    /// Write, too: to an overlay that is gone when the server ends. The chain is never written to.
    Writable {
        /// The existing directory for the overlay, which grows with what is written. `None` for the one
        /// for temporary files. No directory of an image in the destination.
        overlay_directory: Option<PathBuf>,
    },
}

/// A point that is served. Dropping this ends the server and all its connections, removes the socket,
/// and lets go of the chain. The server ends, too, when this process does, however that happens.
#[derive(Debug)]
pub struct Served {
    // Dropped in this order: as long as anybody reads the chain, it is held.
    server: ServerProcess,
    listener: Listener,
    point: OpenPoint,
    program: PathBuf,
    export: Export,
}

impl Serve {
    /// Starts to serve the point. Blocks until a client can read it.
    ///
    /// A [warning](log::warn) is logged where the network can reach the disk.
    ///
    /// # Errors
    /// [`ServeError`]. Nothing is left then.
    pub fn start(&self, cancel: &Cancel) -> Result<Served, ServeError> {
        let options = &self.options;
        let image = ImageName::new(&self.image).map_err(|error| ServeError::Point(error.into()))?;
        let point = OpenPoint::open(&self.dest, &image, self.point)?;
        let layer = point.chain().layers()[0].path();
        let layer = std::path::absolute(layer)
            .map_err(|cause| ServeError::Layer { path: layer.to_owned(), cause })?;
        let overlay = match &options.access {
            Access::ReadOnly => None,
            Access::Writable { overlay_directory } => {
                Some(Overlay::create(overlay_directory.as_deref(), &self.dest, &point)?)
            }
        };
        let (listener, socket) = Listener::bind(&options.listen, &self.dest, &point)?;
        let command = ServerCommand {
            program: options.qemu_nbd.clone(),
            arguments: arguments(&point, &layer, overlay.as_ref().map(Overlay::path)),
            directory: "/".into(),
            connections: options.connections,
        };
        let server = ServerProcess::listen(&command, socket)?;
        let export = probe::probe(&listener, &server, options.start_limit, cancel).map_err(|error| {
            let program = options.qemu_nbd.clone();
            match error {
                ProbeError::Cancelled => ServeError::Cancelled,
                ProbeError::Died(exit) => ServeError::of_start(program, exit),
                ProbeError::Connect(cause) => ServeError::Connect { uri: listener.uri(), cause },
                ProbeError::Nbd(cause) => ServeError::Nbd { program, cause },
                ProbeError::Replaced => ServeError::Replaced { uri: listener.uri() },
            }
        })?;
        check(&export, &point, &options.access)?;
        // The server has it open: so not even a SIGKILL leaves it behind.
        drop(overlay);
        listener.warn();
        Ok(Served { server, listener, point, program: options.qemu_nbd.clone(), export })
    }
}

impl Served {
    /// Where clients find the disk, as QEMU and libnbd take it: `nbd+unix:///?socket=PATH` or
    /// `nbd://ADDRESS:PORT`. The export has no name.
    #[must_use]
    pub fn uri(&self) -> String {
        self.listener.uri()
    }

    /// The image.
    #[must_use]
    pub fn image(&self) -> &ImageName {
        self.point.image()
    }

    /// The point's name.
    #[must_use]
    pub fn point(&self) -> PointName {
        self.point.name()
    }

    /// The size of the disk in bytes: the image's, rounded up to 512.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.export.size
    }

    /// Whether clients can write.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        !self.export.flags.contains(TransmissionFlags::READ_ONLY)
    }

    /// Blocks until a stop is asked for. The server goes on until this is dropped.
    ///
    /// # Errors
    /// [`ServeError::Died`].
    pub fn wait(&self, cancel: &Cancel) -> Result<(), ServeError> {
        while !cancel.is_set() {
            if let Some(exit) = self.server.exit_within(Cancel::POLL) {
                cancel.sleep(STOP_LIMIT);
                if !cancel.is_set() {
                    return Err(ServeError::Died { program: self.program.clone(), exit });
                }
            }
        }
        Ok(())
    }
}

impl ServeError {
    /// What it means that a server ended before it was ready.
    fn of_start(program: PathBuf, exit: ServerExit) -> Self {
        /// With this the shell says that it found no such program, or the system that it found no library.
        const NOT_FOUND: i32 = 127;
        match exit.code {
            Some(NOT_FOUND) => Self::NotFound { program, exit },
            _ => Self::Failed { program, exit },
        }
    }
}

/// Whether what the server shows is what it should.
fn check(export: &Export, point: &OpenPoint, access: &Access) -> Result<(), ServeError> {
    let expected = point.chain().virtual_size();
    if export.size != expected {
        return Err(ServeError::WrongSize { expected, found: export.size });
    }
    let read_only = export.flags.contains(TransmissionFlags::READ_ONLY);
    if read_only != (*access == Access::ReadOnly) {
        return Err(ServeError::WrongAccess { read_only });
    }
    Ok(())
}

/// What qemu-nbd is told. The export gets no name, and a description that tells image and point.
fn arguments(point: &OpenPoint, layer: &Path, overlay: Option<&Path>) -> Vec<OsString> {
    let description = format!("--description={}@{}", point.image().as_str(), point.name());
    let mut arguments: Vec<OsString> = vec![description.into(), "--cache=writeback".into()];
    let image = match overlay {
        None => {
            arguments.push("--read-only".into());
            layer_options("", layer)
        }
        Some(overlay) => {
            // Blocks that a guest trims, or fills with zeroes, take no place in the overlay.
            arguments.extend(["--discard=unmap", "--detect-zeroes=unmap"].map(OsString::from));
            let mut image = layer_options("", overlay);
            image.push(",");
            image.push(layer_options("backing.", layer));
            image.push(",backing.read-only=on");
            image
        }
    };
    arguments.extend(["--image-opts".into(), image]);
    arguments
}

/// A qcow2 file as QEMU's options, whose format is not guessed and whose path may hold any byte.
fn layer_options(prefix: &str, path: &Path) -> OsString {
    let options = format!("{prefix}driver=qcow2,{prefix}file.driver=file,{prefix}file.filename=");
    OsString::from_vec([options.into_bytes(), doubled_commas(path.as_os_str())].concat())
}

/// QEMU takes two commas for one that is no separator.
fn doubled_commas(text: &OsStr) -> Vec<u8> {
    let doubled =
        text.as_bytes().iter().flat_map(|byte| std::iter::repeat_n(*byte, 1 + usize::from(*byte == b',')));
    doubled.collect()
}

#[cfg(test)]
mod tests;

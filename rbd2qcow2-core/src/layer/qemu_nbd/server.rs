//! The server that writes a layer.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use serde_json::json;

use super::{QemuNbdError, QemuNbdLayer, QemuTools};
use crate::cancel::Cancel;
use crate::nbd::NbdError;
use crate::nbd::client::{Client, ClientOptions};
use crate::nbd::server_process::{ServerCommand, ServerProcess};

/// Memory of the server for L2 tables, in bytes: QEMU's own default, said explicitly because it is
/// what bounds the server's memory. It never takes more than the image has tables.
const L2_CACHE: u64 = 32 << 20;

/// How long a server whose connection broke may take to be seen dead. When it still runs then, the
/// broken connection is all there is to say.
const DEATH_LIMIT: Duration = Duration::from_secs(2);

/// How QEMU has the kernel do I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aio {
    /// io_uring; containers often forbid it.
    IoUring,
    /// Linux AIO; asynchronous only with O_DIRECT.
    Native,
    /// A pool of threads.
    Threads,
}

/// How the server writes the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoMode {
    /// Around the page cache where the file system allows it, by io_uring or else by threads, which
    /// were the fastest. Through the page cache where nothing else works, and for compressed layers,
    /// whose writes are small and unaligned.
    #[default]
    Auto,
    /// Around the page cache (O_DIRECT), this way and no other.
    Direct(Aio),
    /// Through the page cache.
    PageCache,
}

impl IoMode {
    fn arguments(self) -> [String; 2] {
        let (cache, aio) = match self {
            Self::Direct(Aio::IoUring) => ("none", "io_uring"),
            Self::Direct(Aio::Native) => ("none", "native"),
            Self::Direct(Aio::Threads) => ("none", "threads"),
            Self::Auto | Self::PageCache => ("writeback", "threads"),
        };
        [format!("--cache={cache}"), format!("--aio={aio}")]
    }
}

/// A server with a client connected to it.
#[derive(Debug)]
pub(super) struct Running {
    // Dropped first, so that its threads do not see the server die.
    pub(super) client: Client,
    server: ServerProcess,
}

impl Running {
    /// Starts a server for the layer, in the best mode that works.
    pub(super) fn start(layer: &QemuNbdLayer) -> Result<Self, QemuNbdError> {
        let tools = &layer.options.tools;
        let mut modes = modes(layer).into_iter().peekable();
        loop {
            let mode = modes.next().unwrap_or(IoMode::PageCache);
            match Self::start_in(layer, mode) {
                Ok(running) => {
                    if let IoMode::Direct(aio) = mode {
                        tools.remember_direct_aio(aio);
                    }
                    let connections = running.client.connections();
                    log::debug!(
                        "{} is written through {mode:?} and {connections} connections",
                        layer.path.display()
                    );
                    return Ok(running);
                }
                // Only a server that does not come up can be helped by another mode.
                Err(error @ QemuNbdError::ServerDied { .. }) if modes.peek().is_some() => {
                    log::debug!("{mode:?} does not work for {}: {error}", layer.path.display());
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn start_in(layer: &QemuNbdLayer, mode: IoMode) -> Result<Self, QemuNbdError> {
        let options = &layer.options;
        let program = options.tools.qemu_nbd();
        let (directory, image) = image(layer)?;
        let mut arguments: Vec<_> = mode.arguments().into();
        // Zeroes come as such, and nothing is written that would have to be discarded.
        arguments.extend(["--detect-zeroes=off", "--discard=ignore", "--", &image].map(str::to_owned));
        let command = ServerCommand {
            program: program.to_owned(),
            arguments: arguments.into_iter().map(Into::into).collect(),
            directory: directory.to_owned(),
            connections: options.connections,
        };
        let (server, streams) = ServerProcess::start(&command)
            .map_err(|e| QemuNbdError::Start { program: program.to_owned(), source: Arc::new(e) })?;
        layer.stop.watch(&streams)?;
        let client = ClientOptions {
            handshake_limit: options.start_limit,
            disconnect_limit: options.exit_limit,
            ..ClientOptions::default()
        };
        match Client::connect(streams, &client) {
            Ok(client) => {
                layer.stop.keep(client.connections());
                Ok(Self { client, server })
            }
            Err(error) => {
                layer.stop.check()?;
                Err(explain(&server, &options.tools, error))
            }
        }
    }

    /// Finds out whether an error of the client comes from the server's death.
    pub(super) fn explain(&self, tools: &QemuTools, error: NbdError) -> QemuNbdError {
        explain(&self.server, tools, error)
    }

    /// Disconnects, and sees the server leave in peace. Everything must be flushed.
    pub(super) fn leave(self, layer: &QemuNbdLayer) -> Result<(), QemuNbdError> {
        let Self { client, server } = self;
        let tools = &layer.options.tools;
        let program = || tools.qemu_nbd().to_owned();
        let disconnected = client.disconnect();
        layer.stop.check()?;
        disconnected.map_err(|e| explain(&server, tools, e))?;
        layer.stop.keep(0);
        let (start, limit) = (Instant::now(), layer.options.exit_limit);
        loop {
            match server.exit_within(Cancel::POLL) {
                Some(exit) if exit.success() => return Ok(()),
                Some(exit) => return Err(QemuNbdError::BadExit { program: program(), exit }),
                None if start.elapsed() >= limit => {
                    return Err(QemuNbdError::Stuck { program: program(), limit });
                }
                None => layer.stop.check()?,
            }
        }
    }

    /// Number of the shell above the server, for tests that kill it.
    #[cfg(test)]
    pub(super) fn supervisor(&self) -> u32 {
        self.server.supervisor()
    }
}

fn explain(server: &ServerProcess, tools: &QemuTools, error: NbdError) -> QemuNbdError {
    if error.is_disconnect()
        && let Some(exit) = server.exit_within(DEATH_LIMIT)
    {
        return QemuNbdError::ServerDied { program: tools.qemu_nbd().to_owned(), exit, source: error };
    }
    QemuNbdError::Nbd(error)
}

/// The modes to try, best first; never empty.
fn modes(layer: &QemuNbdLayer) -> Vec<IoMode> {
    match layer.options.io {
        IoMode::Auto if layer.compressed || !can_write_directly(&layer.path) => vec![IoMode::PageCache],
        IoMode::Auto => {
            let known = layer.options.tools.direct_aio().map(|aio| vec![aio]);
            let aios = known.unwrap_or_else(|| vec![Aio::IoUring, Aio::Threads]);
            let direct = aios.into_iter().map(IoMode::Direct);
            direct.chain([IoMode::PageCache]).collect()
        }
        fixed => vec![fixed],
    }
}

fn can_write_directly(path: &Path) -> bool {
    let flags = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).is_ok()
}

/// The directory that the server starts in, and the layer as a QEMU file name relative to it.
///
/// JSON and a bare name: directories may then hold any byte, and names colons and commas.
fn image(layer: &QemuNbdLayer) -> Result<(&Path, String), QemuNbdError> {
    let (Some(directory), Some(name)) =
        (layer.path.parent(), layer.path.file_name().and_then(|name| name.to_str()))
    else {
        return Err(QemuNbdError::BadName);
    };
    let mut image = json!({
        "driver": "qcow2",
        // Not even opened: see the module's documentation.
        "backing": null,
        "l2-cache-size": L2_CACHE,
        "file": { "driver": "file", "filename": format!("./{name}") },
    });
    if layer.compressed {
        image = json!({ "driver": "compress", "file": image });
    }
    Ok((directory, format!("json:{image}")))
}

/// What makes blocked calls return, whatever the layer is doing.
#[derive(Debug, Default)]
pub(super) struct Stop(Mutex<StopState>);

#[derive(Debug, Default)]
struct StopState {
    stopped: bool,
    /// Further handles to the client's connections.
    streams: Vec<UnixStream>,
}

impl Stop {
    fn lock(&self) -> MutexGuard<'_, StopState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on, [`stop`](Self::stop) shuts these connections down.
    fn watch(&self, streams: &[UnixStream]) -> Result<(), QemuNbdError> {
        let mut state = self.lock();
        let clones: std::io::Result<Vec<_>> = streams.iter().map(UnixStream::try_clone).collect();
        state.streams = clones.map_err(|e| QemuNbdError::Nbd(NbdError::io("preparing the connection", e)))?;
        if state.stopped { Err(QemuNbdError::Aborted) } else { Ok(()) }
    }

    /// Lets go of all but the first `connections`. What the client does not use must be closed for
    /// good: qemu-nbd leaves when its last client does, but not if that one never negotiated.
    fn keep(&self, connections: usize) {
        self.lock().streams.truncate(connections);
    }

    /// Stops everything, now and later.
    pub(super) fn stop(&self) {
        let mut state = self.lock();
        state.stopped = true;
        for stream in state.streams.drain(..) {
            // Fails only when the peer is gone already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Whether everything was stopped.
    pub(super) fn check(&self) -> Result<(), QemuNbdError> {
        if self.lock().stopped { Err(QemuNbdError::Aborted) } else { Ok(()) }
    }
}

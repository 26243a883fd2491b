//! Looks at the server as a client would, before anybody is told of it.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::sockopt::socket_peercred;
use rustix::process::getpid;
use zerocopy::IntoBytes;

use super::listener::Listener;
use crate::cancel::Cancel;
use crate::nbd::NbdError;
use crate::nbd::handshake::{Export, Wanted, negotiate};
use crate::nbd::server_process::{ServerExit, ServerProcess};
use crate::nbd::wire::{Command, Request};

/// How long a server whose connection broke may take to be seen dead. When it still runs then, the
/// broken connection is all there is to say.
const DEATH_LIMIT: Duration = Duration::from_secs(2);

/// Why the server showed no disk.
#[derive(Debug)]
pub(super) enum ProbeError {
    /// A stop was asked for.
    Cancelled,
    /// The server has ended.
    Died(ServerExit),
    /// Its socket cannot be reached.
    Connect(io::Error),
    /// Its socket's path leads to another process's socket.
    Replaced,
    /// It runs and does not do what it should.
    Nbd(NbdError),
}

/// Waits until the server shows its disk to a client, for `limit` at most.
pub(super) fn probe(
    listener: &Listener,
    server: &ServerProcess,
    limit: Duration,
    cancel: &Cancel,
) -> Result<Export, ProbeError> {
    let connection = match listener.connect() {
        Ok(connection) => connection,
        Err(error) => {
            return Err(explain(server, |exit| exit.map_or(ProbeError::Connect(error), ProbeError::Died)));
        }
    };
    if !connection.leads_to_us().map_err(ProbeError::Connect)? {
        return Err(ProbeError::Replaced);
    }
    let mut patient = Patient { connection, deadline: Instant::now() + limit, late: false, cancel };
    patient.connection.set_timeout(Cancel::POLL).map_err(ProbeError::Connect)?;
    match negotiate(&mut patient, &Wanted::default()) {
        Ok(export) => {
            let leave = Request::new(Command::Disconnect, 0, 0, 0, 0);
            // Should this fail, the connection ends less politely, and that is all.
            let _ = patient.write_all(leave.as_bytes());
            Ok(export)
        }
        Err(_) if cancel.is_set() => Err(ProbeError::Cancelled),
        Err(_) if patient.late => {
            Err(ProbeError::Nbd(NbdError::TimedOut { doing: "opening the chain and negotiating", limit }))
        }
        Err(error) if error.is_disconnect() => {
            Err(explain(server, |exit| exit.map_or(ProbeError::Nbd(error), ProbeError::Died)))
        }
        Err(error) => Err(ProbeError::Nbd(error)),
    }
}

fn explain(server: &ServerProcess, error: impl FnOnce(Option<ServerExit>) -> ProbeError) -> ProbeError {
    error(server.exit_within(DEATH_LIMIT))
}

/// A connection to the server.
#[derive(Debug)]
pub(super) enum Connection {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Connection {
    /// Whether the socket at the other end is one that this process has made to listen: somebody else may
    /// have taken a path for that of a killed server at the very moment that it got ours.
    fn leads_to_us(&self) -> io::Result<bool> {
        match self {
            Self::Unix(stream) => Ok(socket_peercred(stream)?.pid == getpid()),
            Self::Tcp(_) => Ok(true),
        }
    }

    fn set_timeout(&self, limit: Duration) -> io::Result<()> {
        let limit = Some(limit);
        match self {
            Self::Unix(stream) => {
                stream.set_read_timeout(limit).and_then(|()| stream.set_write_timeout(limit))
            }
            Self::Tcp(stream) => {
                stream.set_read_timeout(limit).and_then(|()| stream.set_write_timeout(limit))
            }
        }
    }
}

/// A connection that waits as long as it may.
struct Patient<'a> {
    /// Has a timeout, which is how often the others are looked at.
    connection: Connection,
    deadline: Instant,
    /// The deadline came.
    late: bool,
    cancel: &'a Cancel,
}

impl Patient<'_> {
    fn wait(&mut self, mut attempt: impl FnMut(&mut Connection) -> io::Result<usize>) -> io::Result<usize> {
        loop {
            match attempt(&mut self.connection) {
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    self.late = Instant::now() >= self.deadline;
                    if self.late || self.cancel.is_set() {
                        return Err(ErrorKind::TimedOut.into());
                    }
                }
                result => return result,
            }
        }
    }
}

impl Read for Patient<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.wait(|connection| match connection {
            Connection::Unix(stream) => stream.read(buffer),
            Connection::Tcp(stream) => stream.read(buffer),
        })
    }
}

impl Write for Patient<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.wait(|connection| match connection {
            Connection::Unix(stream) => stream.write(bytes),
            Connection::Tcp(stream) => stream.write(bytes),
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

//! Starts a `qemu-nbd` that cannot outlive this process.
//!
//! Socket activation: the server gets a socket that listens already. So nothing has to be waited for,
//! and addresses, names and modes of sockets are ours to choose. There are two kinds of server:
//!
//! - One for this process alone ([`ServerProcess::start`]). The socket lies in a private directory, all
//!   connections are made while it is there, and its name is gone before the server starts: nobody else
//!   can connect, and nothing is left in the file system. The server leaves with its last client.
//! - One for everybody who can reach a socket of the caller's ([`ServerProcess::listen`]). It stays.
//!
//! qemu-nbd leaves with its last client only if one got through the negotiation: a server whose clients
//! die before it would stay forever, as one for everybody would. Therefore a shell stands between, which
//! reads from a pipe, the *lifeline*, whose other end only this process holds, and which kills its
//! process group when the pipe ends. That covers a SIGKILL of this process at any moment. Where the shell
//! itself is killed, it is for this process to kill the group: a server without a shell counts as dead.

use std::ffi::OsString;
use std::fmt;
use std::io::{self, PipeWriter, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};

use self::stderr::StderrTail;

mod stderr;

/// What the shell does. Its standard input is the listening socket and its standard output the
/// reading end of the lifeline, because [`Command`] hands over no more than three files.
///
/// The inner shell is there for `$$`, which must be the server's own number. A word on the lifeline
/// says that the server has gone by itself and that its status is wanted, or that it runs and is to
/// be killed. Without a word nobody knows whether it runs, and its number may be another process's
/// by now: `kill -9 0` is for the group, whose number cannot be reused while the shell lives.
const SUPERVISOR: &str = r#"
exec 3<&0 0<&1 1>&2
sh -c 'export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@"' sh "$@" 3<&3 0</dev/null &
exec 3<&- 1>/dev/null 2>&1
read -r word
case "$word" in
    wait) ;;
    kill) kill -9 $! ;;
    *) kill -9 0 ;;
esac
wait $!
"#;

/// How long a killed server may take until it is gone. More is a hanging disk.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// How often a process is looked at that should end any moment.
const POLL: Duration = Duration::from_millis(5);

/// Why a server could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// No private directory for the socket.
    #[error("cannot make a private directory for a socket in {}", path.display())]
    Directory {
        /// The directory for temporary files.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The socket could not be made or connected to.
    #[error("cannot set up the socket {} (is the path too long? TMPDIR chooses another)", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The supervising shell could not be started.
    #[error("cannot start {} through sh", program.display())]
    Spawn {
        /// The server's program.
        program: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// How a server ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerExit {
    /// Its status as the shell reports it: 128 plus the signal's number for a signal. `None` when
    /// it had to be killed, or the status could not be had.
    pub code: Option<i32>,
    /// The last part of what it wrote to standard error, trimmed.
    pub stderr: String,
}

impl ServerExit {
    /// Whether it ended by itself, without an error.
    #[must_use]
    pub fn success(&self) -> bool {
        self.code == Some(0)
    }
}

impl fmt::Display for ServerExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.code {
            None => f.write_str("had to be killed")?,
            Some(126) => f.write_str("could not be executed")?,
            Some(127) => f.write_str("was not found, or lacks a library")?,
            Some(code) if code > 128 => write!(f, "was killed by signal {}", code - 128)?,
            Some(code) => write!(f, "ended with exit status {code}")?,
        }
        match self.stderr.as_str() {
            "" => f.write_str(" and wrote nothing to its standard error"),
            text => write!(f, ", and wrote: {text}"),
        }
    }
}

/// How to start a server.
#[derive(Clone, Debug)]
pub struct ServerCommand {
    /// `qemu-nbd`, a path (relative to this process's directory) or a name to be found in `PATH`.
    pub program: PathBuf,
    /// Its arguments but for `--shared` and `--persistent`.
    pub arguments: Vec<OsString>,
    /// Directory that it starts in.
    pub directory: PathBuf,
    /// Connections to make, or to serve at once; at least 1.
    pub connections: usize,
}

/// A running server. Dropping it kills it and waits for its end.
#[derive(Debug)]
pub struct ServerProcess {
    inner: Mutex<Inner>,
    stderr: Arc<StderrTail>,
    /// Collects standard error; ends with the server.
    collector: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Inner {
    /// The supervising shell, leader of its process group.
    supervisor: Child,
    lifeline: Option<PipeWriter>,
    /// Known once the server has ended, which is when the shell is reaped.
    exit: Option<ServerExit>,
}

impl Inner {
    /// Tells the shell what to do. Only the first word counts.
    fn say(&mut self, word: &str) {
        if let Some(mut lifeline) = self.lifeline.take() {
            // Fails only when the shell is gone, which is the next thing to be seen.
            let _ = writeln!(lifeline, "{word}");
        }
    }

    /// Whether the shell has ended. It is not reaped: its group's number stays its own.
    fn has_ended(&self) -> io::Result<bool> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
        Ok(waitid(WaitId::Pid(Pid::from_child(&self.supervisor)), options)?.is_some())
    }
}

impl ServerProcess {
    /// Starts a server, and returns it with the connections to it. Does not wait until the server
    /// is ready: what is sent before waits in the sockets. Whether the program exists and likes its
    /// arguments is seen when it ends, see [`exit_within`](Self::exit_within).
    ///
    /// # Errors
    /// [`StartError`], about sockets and the shell.
    pub fn start(command: &ServerCommand) -> Result<(Self, Vec<UnixStream>), StartError> {
        let (listener, streams) = connect(command.connections.max(1))?;
        Ok((Self::spawn(command, listener.into(), false)?, streams))
    }

    /// Starts a server for whoever connects to `listener`, a stream socket that listens. It stays until
    /// it is killed; connections beyond [`ServerCommand::connections`] wait. Whether the server is ready
    /// is told by its greeting: as in [`start`](Self::start), nothing is waited for. Where it dies, the
    /// listener goes with it, so connections that it has not taken end.
    ///
    /// # Errors
    /// [`StartError::Spawn`].
    pub fn listen(command: &ServerCommand, listener: OwnedFd) -> Result<Self, StartError> {
        Self::spawn(command, listener, true)
    }

    fn spawn(command: &ServerCommand, listener: OwnedFd, persistent: bool) -> Result<Self, StartError> {
        let spawn_error = |source| StartError::Spawn { program: command.program.clone(), source };
        let program = executable(&command.program).map_err(spawn_error)?;
        let (lifeline_end, lifeline) = io::pipe().map_err(spawn_error)?;
        let mut supervisor = Command::new("sh")
            .args(["-c", SUPERVISOR, "sh"])
            .arg(program)
            .arg(format!("--shared={}", command.connections.max(1)))
            .args(persistent.then_some("--persistent"))
            .args(&command.arguments)
            .current_dir(&command.directory)
            // Messages are for people who search for them.
            .env("LC_ALL", "C")
            // What the terminal sends on Ctrl-C is for us to handle. The supervisor relies on it too.
            .process_group(0)
            .stdin(Stdio::from(listener))
            .stdout(Stdio::from(lifeline_end))
            .stderr(Stdio::piped())
            // The command is dropped with this statement, and our copy of the listener with it: the
            // last copy going away with the server is what makes a connection to a dead one fail.
            .spawn()
            .map_err(spawn_error)?;
        let stderr = Arc::new(StderrTail::default());
        let pipe = supervisor.stderr.take();
        let inner = Mutex::new(Inner { supervisor, lifeline: Some(lifeline), exit: None });
        let mut server = Self { inner, stderr: Arc::clone(&stderr), collector: None };
        if let Some(pipe) = pipe {
            let collector = thread::Builder::new().name("nbd-stderr".into());
            server.collector = Some(collector.spawn(move || stderr.collect(pipe)).map_err(spawn_error)?);
        }
        Ok(server)
    }

    /// Waits for the server to end by itself, and tells how it did; `None` when it still runs after
    /// `limit`. A server whose shell was killed is killed too, and has ended as the shell did.
    pub fn exit_within(&self, limit: Duration) -> Option<ServerExit> {
        let deadline = Instant::now() + limit;
        // The server holds the last copy of its standard error: the supervisor has closed its own.
        let ended = self.stderr.ended_within(limit);
        let mut inner = self.lock();
        if ended {
            inner.say("wait");
        }
        self.await_supervisor(&mut inner, deadline)
    }

    /// Kills the server if it still runs, waits for its end, and tells how it ended.
    pub fn kill(&self) -> ServerExit {
        let runs = !self.stderr.ended_within(Duration::ZERO);
        let mut inner = self.lock();
        inner.say(if runs { "kill" } else { "wait" });
        if let Some(mut exit) = self.await_supervisor(&mut inner, Instant::now() + KILL_LIMIT) {
            if runs {
                exit.code = None;
            }
            return exit;
        }
        let _ = self.reap(&mut inner);
        let exit = self.exit(None);
        inner.exit = Some(exit.clone());
        exit
    }

    /// Waits for the shell, which waits for the server; `None` when they still run at `deadline`.
    fn await_supervisor(&self, inner: &mut Inner, deadline: Instant) -> Option<ServerExit> {
        while inner.exit.is_none() {
            match inner.has_ended() {
                Ok(false) if Instant::now() < deadline => thread::sleep(POLL),
                Ok(false) => return None,
                Ok(true) => {
                    let status = self.reap(inner).ok();
                    inner.exit = Some(self.exit(status));
                }
                Err(_) => inner.exit = Some(self.exit(None)),
            }
        }
        inner.exit.clone()
    }

    /// Ends whatever is left of the shell's group, and the shell.
    fn reap(&self, inner: &mut Inner) -> io::Result<ExitStatus> {
        // Before the shell is waited for: until then its group's number is its own. A shell that was
        // killed has left the server behind.
        let _ = kill_process_group(Pid::from_child(&inner.supervisor), Signal::KILL);
        let status = inner.supervisor.wait();
        // Such a server is no child of ours, but it holds its standard error as long as it lives.
        self.stderr.ended_within(KILL_LIMIT);
        status
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn exit(&self, status: Option<ExitStatus>) -> ServerExit {
        // A signal to the shell itself comes from outside: report it in the shell's way.
        let code = status.and_then(|s| s.code().or_else(|| s.signal().map(|signal| 128 + signal)));
        ServerExit { code, stderr: self.stderr.text() }
    }

    /// Number of the supervising shell's process, for tests that look for left-overs.
    #[cfg(test)]
    pub(crate) fn supervisor(&self) -> u32 {
        self.lock().supervisor.id()
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        self.kill();
        if let Some(collector) = self.collector.take()
            && self.stderr.ended_within(Duration::ZERO)
        {
            let _ = collector.join();
        }
    }
}

/// What the shell is to execute, whatever directory it starts in.
fn executable(program: &Path) -> io::Result<PathBuf> {
    if program.as_os_str().as_bytes().contains(&b'/') {
        return std::path::absolute(program);
    }
    Ok(program.to_owned())
}

/// A listening socket without a name, and connections to it.
fn connect(connections: usize) -> Result<(UnixListener, Vec<UnixStream>), StartError> {
    let directory = tempfile::Builder::new()
        .prefix("rbd2qcow2-")
        .tempdir()
        .map_err(|source| StartError::Directory { path: std::env::temp_dir(), source })?;
    let path = directory.path().join("nbd");
    let socket_error = |source| StartError::Socket { path: path.clone(), source };
    let listener = UnixListener::bind(&path).map_err(socket_error)?;
    // The backlog takes them; it is 128 or more.
    let streams: io::Result<Vec<_>> = (0..connections).map(|_| UnixStream::connect(&path)).collect();
    let streams = streams.map_err(socket_error)?;
    // Dropping the directory removes the name of the socket.
    Ok((listener, streams))
}

#[cfg(test)]
mod tests;

//! The two threads of a connection, and the socket with a deadline of its handshake.

use std::io::{self, BufReader, ErrorKind, IoSlice, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bytes::Bytes;
use zerocopy::IntoBytes;

use super::state::Shared;
use crate::nbd::NbdError;
use crate::nbd::reply::{Progress, ReplyReader};
use crate::nbd::wire::{Command, Request};

/// How long a sender whose server went away leaves the receiver to find out why: a server that
/// answers with an error and leaves is a better explanation than a broken pipe.
const ROOT_CAUSE_LIMIT: Duration = Duration::from_millis(500);

/// Starts the sending and the receiving thread of a connection.
pub(super) fn start(
    shared: &Arc<Shared>,
    connection: usize,
    threads: &mut Vec<JoinHandle<()>>,
) -> Result<(), NbdError> {
    for (name, body) in [("nbd-send", send as fn(&Shared, usize) -> _), ("nbd-receive", receive)] {
        let shared = Arc::clone(shared);
        let thread = thread::Builder::new()
            .name(format!("{name}-{connection}"))
            .spawn(move || {
                // Should the body panic, nobody may wait for it forever.
                let guard = FailOnPanic(&shared);
                if let Err(error) = body(&shared, connection) {
                    shared.fail(error);
                }
                std::mem::forget(guard);
            })
            .map_err(|e| NbdError::Thread(Arc::new(e)))?;
        threads.push(thread);
    }
    Ok(())
}

struct FailOnPanic<'a>(&'a Shared);

impl Drop for FailOnPanic<'_> {
    fn drop(&mut self) {
        self.0.fail(NbdError::Panicked);
    }
}

fn send(shared: &Shared, connection: usize) -> Result<(), NbdError> {
    let mut stream = &shared.streams[connection];
    let doing = "sending a request";
    loop {
        let (request, payload) = match shared.next(connection)? {
            Some(next) => next,
            None => (Request::new(Command::Disconnect, 0, 0, 0, 0), Bytes::new()),
        };
        if let Err(error) = write_request(&mut stream, &request, &payload) {
            shared.await_failure(ROOT_CAUSE_LIMIT);
            return Err(NbdError::io(doing, error));
        }
        if request.command.get() == Command::Disconnect as u16 {
            return Ok(());
        }
    }
}

/// Writes a header and its payload with as few system calls as the socket allows.
fn write_request(stream: &mut impl Write, request: &Request, payload: &[u8]) -> io::Result<()> {
    let mut slices = [IoSlice::new(request.as_bytes()), IoSlice::new(payload)];
    let mut slices = &mut slices[..];
    while !slices.is_empty() {
        match stream.write_vectored(slices) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut slices, written),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        // advance_slices leaves an empty payload behind.
        while slices.first().is_some_and(|slice| slice.is_empty()) {
            slices = &mut slices[1..];
        }
    }
    Ok(())
}

fn receive(shared: &Shared, connection: usize) -> Result<(), NbdError> {
    let reader = BufReader::new(&shared.streams[connection]);
    let mut replies = ReplyReader::new(reader, shared.export.structured);
    while let Some(header) = replies.header()? {
        let cookie = header.cookie();
        let mut request = shared.take(connection, cookie)?;
        match replies.content(&header, &mut request.pending)? {
            Progress::More => shared.put_back(connection, cookie, request),
            Progress::Done(result) => shared.finish(connection, request, result)?,
        }
    }
    shared.connection_ended(connection)
}

/// A socket whose reads and writes must all be done at a certain time.
pub(super) struct Limited<'a> {
    stream: &'a UnixStream,
    deadline: Instant,
    /// A read or write came to the deadline.
    late: bool,
}

impl<'a> Limited<'a> {
    pub(super) fn new(stream: &'a UnixStream, deadline: Instant) -> Self {
        Self { stream, deadline, late: false }
    }

    /// Lets the socket block without limit again.
    pub(super) fn lift(&self) -> Result<(), NbdError> {
        let lifted = self.stream.set_read_timeout(None).and_then(|()| self.stream.set_write_timeout(None));
        lifted.map_err(|e| NbdError::io("preparing the connection", e))
    }

    /// Replaces an error that is but the deadline.
    pub(super) fn explain(&self, error: NbdError, limit: Duration) -> NbdError {
        if self.late { NbdError::TimedOut { doing: "negotiating", limit } } else { error }
    }

    /// What is left of the time; the smallest timeout a socket can have when nothing is.
    fn left(&self) -> Option<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        Some(left.max(Duration::from_micros(1)))
    }

    fn judge(&mut self, result: io::Result<usize>) -> io::Result<usize> {
        let timed_out = |e: &io::Error| matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
        if result.as_ref().is_err_and(timed_out) {
            self.late = true;
            return Err(ErrorKind::TimedOut.into());
        }
        result
    }
}

impl Read for Limited<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left())?;
        let result = self.stream.read(buffer);
        self.judge(result)
    }
}

impl Write for Limited<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left())?;
        let result = self.stream.write(bytes);
        self.judge(result)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

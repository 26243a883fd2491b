//! What the callers and the threads of a client share.

use std::collections::{HashMap, VecDeque};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use crossbeam::channel::Sender;

use crate::nbd::handshake::Export;
use crate::nbd::reply::{Failure, PendingReply, Yield};
use crate::nbd::wire::{self, Command, Errno, Request};
use crate::nbd::{NbdError, Violation};

/// Requests in flight on one connection: qemu-nbd takes no more at a time.
const MAX_IN_FLIGHT: usize = 16;

/// Payload in flight on one connection, in bytes, unless one request alone has more. The server
/// holds it in memory, outside of the budget of this process's buffers.
const MAX_IN_FLIGHT_BYTES: u64 = 32 << 20;

/// Requests that wait for a connection with room. A few, so that a sender never finds the queue
/// empty while callers are at work; each holds a buffer.
const MAX_QUEUED: usize = 8;

/// A request that no connection took yet.
#[derive(Debug)]
pub(super) struct Queued {
    command: Command,
    flags: u16,
    offset: u64,
    length: u32,
    payload: Bytes,
    /// Gets the result; without it, only an error matters.
    waiter: Option<Sender<Yield>>,
}

impl Queued {
    pub(super) fn new(command: Command, offset: u64, length: u32) -> Self {
        Self { command, flags: 0, offset, length, payload: Bytes::new(), waiter: None }
    }

    pub(super) fn with_flags(self, flags: u16) -> Self {
        Self { flags, ..self }
    }

    pub(super) fn with_payload(self, payload: Bytes) -> Self {
        Self { payload, ..self }
    }

    pub(super) fn with_waiter(self, waiter: Sender<Yield>) -> Self {
        Self { waiter: Some(waiter), ..self }
    }

    /// Bytes that travel with the request or its reply.
    fn weight(&self) -> u64 {
        match self.command {
            Command::Read | Command::Write => self.length.into(),
            _ => 0,
        }
    }
}

/// A request that was sent, or is being sent.
#[derive(Debug)]
pub(super) struct InFlight {
    pub(super) pending: PendingReply,
    /// As sent.
    flags: u16,
    weight: u64,
    waiter: Option<Sender<Yield>>,
}

/// One connection's part of the state.
#[derive(Debug, Default)]
struct Connection {
    /// By cookie. A request whose reply is just being read is not in here.
    in_flight: HashMap<u64, InFlight>,
    /// Requests without a complete reply.
    requests: usize,
    /// Their weight.
    bytes: u64,
}

#[derive(Debug)]
struct State {
    queue: VecDeque<Queued>,
    connections: Vec<Connection>,
    /// Requests queued or in flight.
    unfinished: usize,
    next_cookie: u64,
    /// The first error. Nothing is sent or accepted after it.
    failure: Option<NbdError>,
    /// No more requests will come; connections are to be ended.
    closing: bool,
    /// Receiving threads that have not seen the end of their connection.
    receiving: usize,
}

/// Everything that callers and threads share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) streams: Vec<UnixStream>,
    pub(super) export: Export,
    state: Mutex<State>,
    /// A connection may find something to send. All are woken, as not each of them has room.
    work: Condvar,
    /// The queue got shorter.
    room: Condvar,
    /// Nothing is unfinished, or a receiving thread ended.
    idle: Condvar,
}

impl Shared {
    pub(super) fn new(streams: Vec<UnixStream>, export: Export) -> Self {
        let connections = streams.iter().map(|_| Connection::default()).collect::<Vec<_>>();
        let state = State {
            queue: VecDeque::with_capacity(MAX_QUEUED),
            receiving: connections.len(),
            connections,
            unfinished: 0,
            next_cookie: 1,
            failure: None,
            closing: false,
        };
        Self {
            streams,
            export,
            state: Mutex::new(state),
            work: Condvar::new(),
            room: Condvar::new(),
            idle: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No statement under the lock leaves the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a request; blocks while the queue is full.
    pub(super) fn enqueue(&self, request: Queued) -> Result<(), NbdError> {
        let mut state = self.lock();
        while state.failure.is_none() && state.queue.len() >= MAX_QUEUED {
            state = wait(&self.room, state);
        }
        state.check()?;
        state.queue.push_back(request);
        state.unfinished += 1;
        self.work.notify_all();
        Ok(())
    }

    /// Waits until nothing is unfinished.
    pub(super) fn drain(&self) -> Result<(), NbdError> {
        self.wait_idle(None, |state| state.unfinished == 0)
    }

    /// Tells all connections to end, and waits until the server has ended them too.
    pub(super) fn close(&self, limit: Duration) -> Result<(), NbdError> {
        self.lock().closing = true;
        self.work.notify_all();
        let result = self.wait_idle(Some(limit), |state| state.receiving == 0);
        if let Err(error) = &result {
            self.fail(error.clone());
        }
        result
    }

    fn wait_idle(&self, limit: Option<Duration>, ready: impl Fn(&State) -> bool) -> Result<(), NbdError> {
        let deadline = limit.map(|limit| (Instant::now() + limit, limit));
        let mut state = self.lock();
        loop {
            state.check()?;
            if ready(&state) {
                return Ok(());
            }
            state = match deadline {
                None => wait(&self.idle, state),
                Some((deadline, limit)) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(NbdError::TimedOut { doing: "ending the connection", limit });
                    }
                    self.idle.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// The first error, if there was one.
    pub(super) fn first_error(&self) -> Result<(), NbdError> {
        self.lock().check()
    }

    /// Keeps `error` if it is the first, and stops everything.
    pub(super) fn fail(&self, error: NbdError) {
        let mut state = self.lock();
        if state.failure.is_some() {
            return;
        }
        state.failure = Some(error);
        // Drops payloads, and the waiters' channels, which wakes those who wait for a result.
        state.queue.clear();
        for connection in &mut state.connections {
            connection.in_flight.clear();
        }
        self.work.notify_all();
        self.room.notify_all();
        self.idle.notify_all();
        drop(state);
        for stream in &self.streams {
            // Fails only when the peer is gone already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Blocks for `limit`, or until somebody has failed.
    pub(super) fn await_failure(&self, limit: Duration) {
        let state = self.lock();
        let waiting = |state: &mut State| state.failure.is_none();
        let _ = self.idle.wait_timeout_while(state, limit, waiting);
    }

    /// The next request for a connection to send, with its payload; blocks until there is one and
    /// the connection has room. `None` when the connection is to be ended.
    pub(super) fn next(&self, connection: usize) -> Result<Option<(Request, Bytes)>, NbdError> {
        let mut state = self.lock();
        loop {
            state.check()?;
            if state.queue.front().is_some_and(|request| state.connections[connection].has_room(request))
                && let Some(request) = state.queue.pop_front()
            {
                self.room.notify_one();
                return Ok(Some(state.send(connection, request, &self.export)));
            }
            if state.closing && state.queue.is_empty() {
                return Ok(None);
            }
            state = wait(&self.work, state);
        }
    }

    /// Takes the request that a reply on this connection is for; it must come back by
    /// [`put_back`](Self::put_back) or [`finish`](Self::finish).
    pub(super) fn take(&self, connection: usize, cookie: u64) -> Result<InFlight, NbdError> {
        let mut state = self.lock();
        state.check()?;
        let found = state.connections[connection].in_flight.remove(&cookie);
        found.ok_or_else(|| Violation::UnknownCookie { cookie }.into())
    }

    /// Returns a request whose reply is not complete.
    pub(super) fn put_back(&self, connection: usize, cookie: u64, request: InFlight) {
        let mut state = self.lock();
        if state.failure.is_none() {
            state.connections[connection].in_flight.insert(cookie, request);
        }
    }

    /// Ends a request.
    pub(super) fn finish(
        &self,
        connection: usize,
        request: InFlight,
        result: Result<Yield, Failure>,
    ) -> Result<(), NbdError> {
        let operation = request.pending.operation();
        let mut state = self.lock();
        state.connections[connection].requests -= 1;
        state.connections[connection].bytes -= request.weight;
        match result {
            Ok(result) => {
                state.unfinished -= 1;
                if let Some(waiter) = request.waiter {
                    // The caller may have given up.
                    let _ = waiter.send(result);
                }
            }
            Err(failure) if failure.errno == Errno::ENOTSUP && request.flags & wire::CMD_FAST_ZERO != 0 => {
                let length = u32::try_from(operation.length).expect("lengths of requests have 32 bits");
                let again = Queued::new(operation.command, operation.offset, length)
                    .with_flags(request.flags & !wire::CMD_FAST_ZERO);
                state.queue.push_front(again);
            }
            Err(Failure { errno, message }) => {
                return Err(NbdError::Refused { operation, errno, message });
            }
        }
        if state.unfinished == 0 {
            self.idle.notify_all();
        }
        if !state.queue.is_empty() {
            self.work.notify_all();
        }
        Ok(())
    }

    /// The server closed a connection between two replies.
    pub(super) fn connection_ended(&self, connection: usize) -> Result<(), NbdError> {
        let mut state = self.lock();
        if !state.closing || state.connections[connection].requests > 0 {
            let idle = state.unfinished == 0;
            let doing = if idle { "no request was under way" } else { "requests were under way" };
            return Err(NbdError::Closed { doing });
        }
        state.receiving -= 1;
        self.idle.notify_all();
        Ok(())
    }
}

impl State {
    fn check(&self) -> Result<(), NbdError> {
        self.failure.clone().map_or(Ok(()), Err)
    }

    /// Moves a request from the queue's hands into the table.
    fn send(&mut self, connection: usize, request: Queued, export: &Export) -> (Request, Bytes) {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let weight = request.weight();
        let Queued { command, flags, offset, length, payload, waiter } = request;
        let pending = PendingReply::new(command, offset, length, export.allocation.unwrap_or_default());
        let connection = &mut self.connections[connection];
        connection.requests += 1;
        connection.bytes += weight;
        connection.in_flight.insert(cookie, InFlight { pending, flags, weight, waiter });
        (Request::new(command, flags, cookie, offset, length), payload)
    }
}

impl Connection {
    fn has_room(&self, request: &Queued) -> bool {
        let bytes = self.bytes + request.weight();
        self.requests == 0 || (self.requests < MAX_IN_FLIGHT && bytes <= MAX_IN_FLIGHT_BYTES)
    }
}

fn wait<'a>(condition: &Condvar, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
    condition.wait(state).unwrap_or_else(PoisonError::into_inner)
}

//! Keeps many requests under way over one or several connections to one NBD export.
//!
//! A queue of bounded length takes requests; whichever connection has room takes the next. Each
//! connection has a thread that sends and one that receives, so that neither side ever waits for
//! the other with its buffers full. The queue, the requests in flight and the first error live
//! under one lock (`state`): waiting for room, for idleness or for the end are conditions over
//! the same numbers, and at the sizes of requests of a backup the lock is never the bottleneck.
//!
//! The first error ends everything: it is kept, all threads stop, the sockets are shut down, and
//! every later call returns it.

mod connection;
mod state;

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use crossbeam::channel::{Receiver, bounded};

use self::connection::Limited;
use self::state::{Queued, Shared};
use super::handshake::{Export, Wanted, negotiate};
use super::reply::{StatusExtent, Yield};
use super::wire::{self, Command, TransmissionFlags};
use super::{NbdError, Operation};

/// The longest range of one write-zeroes request, in bytes: fits the protocol's 32 bits, is aligned
/// to any block size, and takes no server long.
const ZEROES_PIECE: u64 = 1 << 30;

/// The longest range of one block-status request, in bytes.
const STATUS_PIECE: u64 = 1 << 30;

/// Payload of the writes that stand in for write-zeroes where the server lacks it, in bytes.
const ZERO_PAYLOAD: u32 = 1 << 20;

/// Reads that one call of [`Client::read`] keeps under way: hides a server's latency while the copy
/// of what is read stays small.
const READ_AHEAD: usize = 4;

/// How to connect.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// Name of the export; qemu-nbd's default is the empty one.
    pub export: String,
    /// Whether [`Client::block_status`] will be used.
    pub allocation: bool,
    /// How long the negotiation of all connections together may take.
    pub handshake_limit: Duration,
    /// How long the server may take to close the connections after it was told to.
    pub disconnect_limit: Duration,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            export: String::new(),
            allocation: false,
            handshake_limit: Duration::from_secs(30),
            disconnect_limit: Duration::from_secs(60),
        }
    }
}

/// How zeroes may be made. The default lets the server choose, and leaves holes where it can.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroOptions {
    /// Allocate the range, make no hole of it.
    pub no_hole: bool,
    /// Ask the server to try only what is faster than a write. Where it has no such way, the
    /// request is repeated without this wish: the zeroes are made in any case.
    pub fast: bool,
}

/// A connected client. All methods may be called from several threads at once.
///
/// Dropping it aborts what is under way and joins all threads.
#[derive(Debug)]
pub struct Client {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    export: Export,
    disconnect_limit: Duration,
}

impl Client {
    /// Negotiates over `streams`, which all lead to the same server, and starts the threads.
    ///
    /// Uses all streams when the export allows several connections, otherwise the first only, and
    /// drops the others. Blocks for at most [`ClientOptions::handshake_limit`].
    ///
    /// # Errors
    /// What [`negotiate`] returns; [`NbdError::ExportsDiffer`] when the connections do not show the
    /// same export; [`NbdError::TimedOut`]; [`NbdError::NoConnection`]; [`NbdError::Thread`].
    pub fn connect(mut streams: Vec<UnixStream>, options: &ClientOptions) -> Result<Self, NbdError> {
        let wanted = Wanted { export: options.export.clone(), allocation: options.allocation };
        let deadline = Instant::now() + options.handshake_limit;
        let mut export = None;
        let mut used = 0;
        for (connection, stream) in streams.iter().enumerate() {
            let mut limited = Limited::new(stream, deadline);
            let found =
                negotiate(&mut limited, &wanted).map_err(|e| limited.explain(e, options.handshake_limit))?;
            limited.lift()?;
            used += 1;
            match export {
                None => export = Some(found),
                Some(first) if first != found => {
                    let (expected, other) = (Box::new(first), Box::new(found));
                    return Err(NbdError::ExportsDiffer { connection, expected, other });
                }
                Some(_) => {}
            }
            if !found.flags.contains(TransmissionFlags::CAN_MULTI_CONN) {
                break;
            }
        }
        let export = export.ok_or(NbdError::NoConnection)?;
        streams.truncate(used);
        let shared = Arc::new(Shared::new(streams, export));
        let mut client =
            Self { shared, threads: Vec::new(), export, disconnect_limit: options.disconnect_limit };
        // From here on, Drop joins the threads that were started before one could not be.
        for connection in 0..used {
            connection::start(&client.shared, connection, &mut client.threads)?;
        }
        Ok(client)
    }

    /// What was negotiated.
    #[must_use]
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// Connections in use.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.streams.len()
    }

    /// Queues a write. Blocks only while the queue is full; `data` is dropped as soon as it is in
    /// the socket.
    ///
    /// # Errors
    /// The client's first error, of whatever request; [`NbdError::ReadOnly`],
    /// [`NbdError::OutOfBounds`] and [`NbdError::Misaligned`], which leave the client intact.
    pub fn write(&self, offset: u64, mut data: Bytes) -> Result<(), NbdError> {
        self.check(Command::Write, offset, data.len() as u64)?;
        let mut offset = offset;
        while !data.is_empty() {
            let piece = data.split_to(data.len().min(self.export.blocks.maximum as usize));
            let length = u32::try_from(piece.len()).expect("at most a payload");
            self.shared.enqueue(Queued::new(Command::Write, offset, length).with_payload(piece))?;
            offset += u64::from(length);
        }
        Ok(())
    }

    /// Queues the zeroing of a range of any length. Blocks only while the queue is full.
    ///
    /// Where the server has no write-zeroes command, zeroes are written.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn write_zeroes(&self, offset: u64, length: u64, options: ZeroOptions) -> Result<(), NbdError> {
        self.check(Command::WriteZeroes, offset, length)?;
        let flags = self.export.flags;
        if !flags.contains(TransmissionFlags::SEND_WRITE_ZEROES) {
            return self.write_zero_payloads(offset, length);
        }
        let mut command_flags = if options.no_hole { wire::CMD_NO_HOLE } else { 0 };
        if options.fast && flags.contains(TransmissionFlags::SEND_FAST_ZERO) {
            command_flags |= wire::CMD_FAST_ZERO;
        }
        for (offset, length) in pieces(offset, length, ZEROES_PIECE) {
            let request = Queued::new(Command::WriteZeroes, offset, length).with_flags(command_flags);
            self.shared.enqueue(request)?;
        }
        Ok(())
    }

    fn write_zero_payloads(&self, offset: u64, length: u64) -> Result<(), NbdError> {
        let blocks = self.export.blocks;
        let largest = ZERO_PAYLOAD.max(blocks.minimum).min(blocks.maximum);
        // A maximum need not be a power of two, but is a multiple of the minimum.
        let zeroes = Bytes::from(vec![0; largest as usize]);
        for (offset, length) in pieces(offset, length, largest.into()) {
            let payload = zeroes.slice(..length as usize);
            self.shared.enqueue(Queued::new(Command::Write, offset, length).with_payload(payload))?;
        }
        Ok(())
    }

    /// Fills `buffer` from `offset` on. Blocks until all of it is there.
    ///
    /// Does not wait for queued writes: call [`drain`](Self::drain) before to read them.
    ///
    /// # Errors
    /// As [`write`](Self::write). The buffer's content is then meaningless.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), NbdError> {
        self.check(Command::Read, offset, buffer.len() as u64)?;
        let mut under_way = VecDeque::with_capacity(READ_AHEAD);
        let mut offset = offset;
        for piece in buffer.chunks_mut(self.export.blocks.maximum as usize) {
            if under_way.len() == READ_AHEAD {
                self.receive_data(under_way.pop_front())?;
            }
            let length = u32::try_from(piece.len()).expect("at most a payload");
            let (waiter, answer) = bounded(1);
            self.shared.enqueue(Queued::new(Command::Read, offset, length).with_waiter(waiter))?;
            under_way.push_back((piece, answer));
            offset += u64::from(length);
        }
        while let Some(next) = under_way.pop_front() {
            self.receive_data(Some(next))?;
        }
        Ok(())
    }

    fn receive_data(&self, next: Option<(&mut [u8], Receiver<Yield>)>) -> Result<(), NbdError> {
        if let Some((piece, answer)) = next
            && let Yield::Data(bytes) = self.wait(&answer)?
        {
            piece.copy_from_slice(&bytes);
        }
        Ok(())
    }

    /// Which parts of a range are holes or zeroes: adjacent extents that cover exactly the range.
    /// Blocks until the server has told. Equal neighbours are joined.
    ///
    /// # Errors
    /// As [`write`](Self::write); [`NbdError::Unsupported`] unless [`ClientOptions::allocation`] was
    /// set and the server has `base:allocation`.
    pub fn block_status(&self, offset: u64, length: u64) -> Result<Vec<StatusExtent>, NbdError> {
        if self.export.allocation.is_none() {
            return Err(NbdError::Unsupported { command: Command::BlockStatus });
        }
        self.check(Command::BlockStatus, offset, length)?;
        let end = offset + length;
        let mut all: Vec<StatusExtent> = Vec::new();
        let mut at = offset;
        while at < end {
            let piece = u32::try_from((end - at).min(STATUS_PIECE)).expect("at most 1 GiB");
            let (waiter, answer) = bounded(1);
            self.shared.enqueue(Queued::new(Command::BlockStatus, at, piece).with_waiter(waiter))?;
            let Yield::Extents(found) = self.wait(&answer)? else { continue };
            for mut extent in found {
                extent.length = extent.length.min(end - extent.offset.min(end));
                if extent.length == 0 {
                    break;
                }
                at = extent.offset + extent.length;
                match all.last_mut() {
                    Some(last) if (last.hole, last.zero) == (extent.hole, extent.zero) => {
                        last.length += extent.length;
                    }
                    _ => all.push(extent),
                }
            }
        }
        Ok(all)
    }

    /// Waits until every request queued so far has got a good reply.
    ///
    /// # Errors
    /// The client's first error.
    pub fn drain(&self) -> Result<(), NbdError> {
        self.shared.drain()
    }

    /// Brings everything written so far to stable storage: waits for the good replies to all earlier
    /// requests, then has the server flush, and waits for that.
    ///
    /// # Errors
    /// The client's first error; [`NbdError::Unsupported`] when the server cannot flush.
    pub fn flush(&self) -> Result<(), NbdError> {
        if !self.export.flags.contains(TransmissionFlags::SEND_FLUSH) {
            return Err(NbdError::Unsupported { command: Command::Flush });
        }
        self.drain()?;
        let (waiter, answer) = bounded(1);
        self.shared.enqueue(Queued::new(Command::Flush, 0, 0).with_waiter(waiter))?;
        self.wait(&answer).map(|_| ())
    }

    /// Ends the connections in the orderly way and joins all threads. Waits for requests that are
    /// under way, but does not flush.
    ///
    /// # Errors
    /// The client's first error; [`NbdError::TimedOut`] when the server does not close its side;
    /// [`NbdError::Protocol`] when it sends something instead.
    pub fn disconnect(mut self) -> Result<(), NbdError> {
        self.shared.drain()?;
        self.shared.close(self.disconnect_limit)?;
        self.join();
        self.shared.first_error()
    }

    /// Makes all calls that block, and all later ones, fail soon with [`NbdError::Aborted`] (or with
    /// an error that came before). Does not block.
    pub fn abort(&self) {
        self.shared.fail(NbdError::Aborted);
    }

    /// The range must lie in the export, fit its blocks, and the command its flags.
    fn check(&self, command: Command, offset: u64, length: u64) -> Result<(), NbdError> {
        let operation = Operation { command, offset, length };
        let Export { size, flags, blocks, .. } = self.export;
        let writes = matches!(command, Command::Write | Command::WriteZeroes);
        if writes && flags.contains(TransmissionFlags::READ_ONLY) {
            return Err(NbdError::ReadOnly);
        }
        let Some(end) = offset.checked_add(length).filter(|end| *end <= size) else {
            return Err(NbdError::OutOfBounds { operation, size });
        };
        let minimum = blocks.minimum;
        if !offset.is_multiple_of(minimum.into()) || !(end.is_multiple_of(minimum.into()) || end == size) {
            return Err(NbdError::Misaligned { operation, minimum });
        }
        Ok(())
    }

    /// Waits for the answer to one request. Its sender goes away without one only after an error.
    fn wait(&self, answer: &Receiver<Yield>) -> Result<Yield, NbdError> {
        match answer.recv() {
            Ok(result) => Ok(result),
            Err(_) => Err(self.shared.first_error().err().unwrap_or(NbdError::Aborted)),
        }
    }

    fn join(&mut self) {
        for thread in self.threads.drain(..) {
            // A panic there is a bug; the threads' guard has turned it into the client's error.
            let _ = thread.join();
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if !self.threads.is_empty() {
            self.abort();
            self.join();
        }
    }
}

/// Cuts a range at most every `largest` bytes.
fn pieces(offset: u64, length: u64, largest: u64) -> impl Iterator<Item = (u64, u32)> {
    let end = offset + length;
    let mut at = offset;
    std::iter::from_fn(move || {
        let piece = u32::try_from((end - at).min(largest)).expect("callers' pieces are below 4 GiB");
        let start = at;
        at += u64::from(piece);
        (piece > 0).then_some((start, piece))
    })
}

#[cfg(test)]
mod tests;

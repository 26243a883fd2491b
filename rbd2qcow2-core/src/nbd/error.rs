//! What can go wrong between an NBD client and its server.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::handshake::Export;
use super::wire::{Command, Errno, HandshakeOption, option_error_name};

/// A request, for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// What was asked for.
    pub command: Command,
    /// First byte of the export that was meant.
    pub offset: u64,
    /// Bytes that were meant.
    pub length: u64,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.command {
            Command::Flush | Command::Disconnect => write!(f, "{}", self.command),
            _ => write!(f, "{} of {} bytes at offset {}", self.command, self.length, self.offset),
        }
    }
}

/// Why an NBD client gave up, or refused a call.
///
/// Cloneable, because the first error of a client is the answer to every later call.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NbdError {
    /// A socket failed.
    #[error("the connection to the NBD server failed while {doing}")]
    Io {
        /// What was going on.
        doing: &'static str,
        /// What the system said.
        #[source]
        source: Arc<io::Error>,
    },
    /// The server went away.
    #[error("the NBD server closed the connection while {doing}")]
    Closed {
        /// What was going on.
        doing: &'static str,
    },
    /// The server is silent.
    #[error("the NBD server did not answer within {} s while {doing}", limit.as_secs_f64())]
    TimedOut {
        /// What was going on.
        doing: &'static str,
        /// How long it had.
        limit: Duration,
    },
    /// The peer's first bytes are not those of an NBD server.
    #[error("the peer is not an NBD server: it begins with {magic:#018x}")]
    NotNbd {
        /// Its first 8 bytes.
        magic: u64,
    },
    /// The server speaks the negotiation of before 2011.
    #[error("the NBD server speaks only oldstyle negotiation; a server with fixed newstyle is needed")]
    Oldstyle,
    /// The server speaks a newstyle that lacks answers to options.
    #[error("the NBD server speaks newstyle negotiation, but not its fixed form, which is needed")]
    NotFixedNewstyle,
    /// The server refused an option that cannot be done without.
    #[error("the NBD server refused {option}: {}{}", option_error_name(*reply), after_colon(message))]
    OptionRefused {
        /// The option.
        option: HandshakeOption,
        /// Kind of the reply.
        reply: u32,
        /// The server's explanation, maybe empty.
        message: String,
    },
    /// The server did what the protocol forbids.
    #[error("the NBD server broke the protocol")]
    Protocol(
        /// What it did.
        #[source]
        Violation,
    ),
    /// Two connections to one export do not look alike, so requests cannot be spread over them.
    #[error(
        "NBD connection {connection} shows another export than the first one: {other:?}, not {expected:?}"
    )]
    ExportsDiffer {
        /// Number of the connection, counted from 0.
        connection: usize,
        /// What the first connection shows.
        expected: Box<Export>,
        /// What this connection shows.
        other: Box<Export>,
    },
    /// No connection was given to the client.
    #[error("an NBD client needs at least one connection")]
    NoConnection,
    /// The export cannot do what was asked.
    #[error("the NBD export does not support {command}")]
    Unsupported {
        /// What was asked.
        command: Command,
    },
    /// The export refuses writes.
    #[error("the NBD export is read-only")]
    ReadOnly,
    /// The request leaves the export.
    #[error("{operation} leaves the NBD export of {size} bytes")]
    OutOfBounds {
        /// The request.
        operation: Operation,
        /// Bytes of the export.
        size: u64,
    },
    /// The request does not fit the export's smallest block.
    #[error("{operation} is not aligned to the NBD export's blocks of {minimum} bytes")]
    Misaligned {
        /// The request.
        operation: Operation,
        /// The export's smallest block, in bytes.
        minimum: u32,
    },
    /// The server could not do it.
    #[error("the NBD server failed a {operation}: {errno}{}", after_colon(message))]
    Refused {
        /// The request.
        operation: Operation,
        /// The server's error number.
        errno: Errno,
        /// The server's explanation, maybe empty.
        message: String,
    },
    /// [`abort`](super::client::Client::abort) was called.
    #[error("the transfer to the NBD server was aborted")]
    Aborted,
    /// A thread of the client panicked.
    #[error("a thread of the NBD client panicked; this is a bug")]
    Panicked,
    /// The system refused a thread.
    #[error("cannot start a thread for an NBD connection")]
    Thread(
        /// What the system said.
        #[source]
        Arc<io::Error>,
    ),
}

/// What a server did that the protocol forbids.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// Some magic number is wrong.
    #[error("{what} begins with {found:#x}")]
    BadMagic {
        /// What was expected here.
        what: &'static str,
        /// The number found.
        found: u64,
    },
    /// An option reply answers another option.
    #[error("a reply to option {found} came after {asked}")]
    WrongOption {
        /// What was asked.
        asked: HandshakeOption,
        /// The option's number in the reply.
        found: u32,
    },
    /// An option reply of a kind that makes no sense.
    #[error("{option} was answered with a reply of kind {kind:#x}")]
    WrongOptionReply {
        /// The option.
        option: HandshakeOption,
        /// Kind of the reply.
        kind: u32,
    },
    /// Something has a length that it cannot have.
    #[error("{what} has an impossible length of {length} bytes")]
    BadLength {
        /// What it is.
        what: &'static str,
        /// Its length, as the server said it.
        length: u64,
    },
    /// The server never comes to an end of its information.
    #[error("more than {limit} replies to {option}")]
    TooManyOptionReplies {
        /// The option.
        option: HandshakeOption,
        /// How many are bearable.
        limit: usize,
    },
    /// The export was chosen, but not described.
    #[error("the export was acknowledged without its size and flags")]
    NoExportInfo,
    /// The flags do not say that they are flags.
    #[error("the export's flags {flags:#06x} lack NBD_FLAG_HAS_FLAGS")]
    BadTransmissionFlags {
        /// The flags.
        flags: u16,
    },
    /// The sizes of blocks contradict each other or the protocol.
    #[error("impossible block sizes: minimum {minimum}, preferred {preferred}, maximum {maximum}")]
    BadBlockSizes {
        /// Smallest block, in bytes.
        minimum: u32,
        /// Preferred block, in bytes.
        preferred: u32,
        /// Largest payload, in bytes.
        maximum: u32,
    },
    /// A metadata context that was not asked for, or one too many.
    #[error("an unexpected metadata context {name:?}")]
    UnexpectedContext {
        /// The context's name, cut to a bearable length.
        name: String,
    },
    /// A reply to nothing: never asked, already answered, or asked over another connection.
    #[error("a reply with cookie {cookie:#x}, which no request in flight on this connection has")]
    UnknownCookie {
        /// The reply's cookie.
        cookie: u64,
    },
    /// Structured replies were not agreed upon.
    #[error("a structured reply, though none were agreed upon")]
    UnexpectedChunk,
    /// Structured replies were agreed upon, and then a read must have one.
    #[error("a simple reply to a {operation}, which calls for a structured one")]
    UnexpectedSimpleReply {
        /// The request.
        operation: Operation,
    },
    /// A chunk of a kind that the request cannot have, or of an unknown kind.
    #[error("a chunk of type {kind:#06x} in the reply to a {operation}")]
    WrongChunk {
        /// The request.
        operation: Operation,
        /// Type of the chunk.
        kind: u16,
    },
    /// A chunk whose length does not fit its type.
    #[error("a chunk of type {kind:#06x} and {length} bytes in the reply to a {operation}")]
    WrongChunkLength {
        /// The request.
        operation: Operation,
        /// Type of the chunk.
        kind: u16,
        /// Length of the chunk's content, in bytes.
        length: u32,
    },
    /// A chunk without content that is not the last.
    #[error("an empty chunk that does not end the reply to a {operation}")]
    EmptyChunk {
        /// The request.
        operation: Operation,
    },
    /// An error that says success.
    #[error("an error chunk with error number 0 in the reply to a {operation}")]
    ErrorWithoutNumber {
        /// The request.
        operation: Operation,
    },
    /// A piece of a reply lies outside of what was asked.
    #[error("{length} bytes at offset {offset} in the reply to a {operation}")]
    OutsideRequest {
        /// The request.
        operation: Operation,
        /// First byte of the piece.
        offset: u64,
        /// Bytes of the piece.
        length: u64,
    },
    /// A piece of a reply came twice.
    #[error("{length} bytes at offset {offset} came twice in the reply to a {operation}")]
    Overlap {
        /// The request.
        operation: Operation,
        /// First byte of the piece.
        offset: u64,
        /// Bytes of the piece.
        length: u64,
    },
    /// The reply ended, but bytes are missing.
    #[error("{missing} bytes are missing in the reply to a {operation}")]
    Missing {
        /// The request.
        operation: Operation,
        /// How many bytes.
        missing: u64,
    },
    /// The reply is cut into more pieces than makes sense.
    #[error("more than {limit} pieces in the reply to a {operation}")]
    TooManyPieces {
        /// The request.
        operation: Operation,
        /// How many are bearable.
        limit: usize,
    },
    /// Block status about a context that was not chosen.
    #[error("block status about context {found}, not {expected}")]
    WrongContext {
        /// The context chosen.
        expected: u32,
        /// The context in the reply.
        found: u32,
    },
    /// The reply to a block status tells nothing.
    #[error("no block status in the reply to a {operation}")]
    NoBlockStatus {
        /// The request.
        operation: Operation,
    },
}

impl From<Violation> for NbdError {
    fn from(violation: Violation) -> Self {
        Self::Protocol(violation)
    }
}

impl NbdError {
    /// An I/O error while `doing` something, with the cases told apart that deserve it.
    pub(crate) fn io(doing: &'static str, source: io::Error) -> Self {
        match source.kind() {
            // A Unix socket says "reset" when its peer went without having read everything.
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionAborted => Self::Closed { doing },
            _ => Self::Io { doing, source: Arc::new(source) },
        }
    }

    /// Whether the cause may be that the server's process ended.
    #[must_use]
    pub fn is_disconnect(&self) -> bool {
        matches!(self, Self::Closed { .. } | Self::Io { .. })
    }
}

fn after_colon(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(": {message}") }
}

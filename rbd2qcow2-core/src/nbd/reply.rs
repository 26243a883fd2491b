//! Reads what a server answers in the transmission phase, and believes none of it unchecked.
//!
//! No threads and no state of a connection here: the caller reads a header, finds the request that
//! it answers by the cookie, and has the header's content read into that request's
//! [`PendingReply`].

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read};

use zerocopy::network_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::handshake::text;
use super::wire::{self, BlockDescriptor, Chunk, Command, Errno, ErrorDetail, Hole, SimpleReply};
use super::{NbdError, Operation, Violation};

/// The longest block status that is accepted, in bytes: what qemu-nbd sends at most.
const MAX_STATUS_CHUNK: u32 = (1 << 20) + 4;

/// The header of a reply, or of a chunk of one.
#[derive(Clone, Copy, Debug)]
pub struct ReplyHeader {
    cookie: u64,
    form: Form,
}

#[derive(Clone, Copy, Debug)]
enum Form {
    Simple { error: u32 },
    Chunk { done: bool, kind: u16, length: u32 },
}

impl ReplyHeader {
    /// The cookie of the request that is answered, as the server says.
    #[must_use]
    pub fn cookie(&self) -> u64 {
        self.cookie
    }
}

/// An extent as block status reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtent {
    /// First byte, counted from the export's start.
    pub offset: u64,
    /// Bytes, not 0.
    pub length: u64,
    /// Whether nothing is allocated there.
    pub hole: bool,
    /// Whether it is known to read as zeroes.
    pub zero: bool,
}

/// What a successful request yields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Yield {
    /// Nothing.
    Nothing,
    /// All bytes of a read.
    Data(Vec<u8>),
    /// Extents from the request's offset on, adjacent; they may end before or behind its end.
    Extents(Vec<StatusExtent>),
}

/// Why a request failed, in the server's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The error number, not 0.
    pub errno: Errno,
    /// The explanation, maybe empty.
    pub message: String,
}

/// How far a reply has come.
#[derive(Debug)]
pub enum Progress {
    /// More chunks follow.
    More,
    /// The request is answered.
    Done(Result<Yield, Failure>),
}

/// A request that waits for its reply, and what came of it so far.
#[derive(Debug)]
pub struct PendingReply {
    operation: Operation,
    content: Content,
    /// The first error chunk; decides the outcome when the last chunk is there.
    failure: Option<Failure>,
}

#[derive(Debug)]
enum Content {
    None,
    Data {
        /// As long as the read once the first bytes come; zeroes where nothing came yet.
        bytes: Vec<u8>,
        filled: Coverage,
    },
    Extents {
        context: u32,
        found: Vec<StatusExtent>,
    },
}

impl PendingReply {
    /// The state before the first reply. `context` is the number of `base:allocation`, for block
    /// status.
    #[must_use]
    pub fn new(command: Command, offset: u64, length: u32, context: u32) -> Self {
        let content = match command {
            Command::Read => Content::Data { bytes: Vec::new(), filled: Coverage::default() },
            Command::BlockStatus => Content::Extents { context, found: Vec::new() },
            _ => Content::None,
        };
        Self { operation: Operation { command, offset, length: length.into() }, content, failure: None }
    }

    /// The request.
    #[must_use]
    pub fn operation(&self) -> Operation {
        self.operation
    }

    /// The request's last chunk is there: did all of it come?
    fn finish(&mut self) -> Result<Progress, Violation> {
        if let Some(failure) = self.failure.take() {
            return Ok(Progress::Done(Err(failure)));
        }
        let operation = self.operation;
        let result = match &mut self.content {
            Content::None => Yield::Nothing,
            Content::Data { bytes, filled } => {
                let missing = operation.length - filled.total;
                if missing > 0 {
                    return Err(Violation::Missing { operation, missing });
                }
                Yield::Data(std::mem::take(bytes))
            }
            Content::Extents { found, .. } if found.is_empty() => {
                return Err(Violation::NoBlockStatus { operation });
            }
            Content::Extents { found, .. } => Yield::Extents(std::mem::take(found)),
        };
        Ok(Progress::Done(Ok(result)))
    }

    /// Notes that `length` bytes at `offset` come now, and returns where to put them.
    fn fill(&mut self, offset: u64, length: u64) -> Result<&mut [u8], Violation> {
        let operation = self.operation;
        let Content::Data { bytes, filled } = &mut self.content else {
            unreachable!("only called for reads");
        };
        let outside = Violation::OutsideRequest { operation, offset, length };
        let Some(start) = offset.checked_sub(operation.offset) else { return Err(outside) };
        match start.checked_add(length) {
            Some(end) if end <= operation.length => {}
            _ => return Err(outside),
        }
        // QEMU cuts at sectors at the finest, and nobody needs memory for more.
        let limit = usize::try_from(operation.length / 512).unwrap_or(usize::MAX).saturating_add(4);
        if filled.ranges.len() >= limit {
            return Err(Violation::TooManyPieces { operation, limit });
        }
        if !filled.add(start, length) {
            return Err(Violation::Overlap { operation, offset, length });
        }
        // Both lie within the request's length, which is a u32 and at most a payload.
        let (start, length) = (to_usize(start), to_usize(length));
        if bytes.is_empty() {
            bytes.resize(to_usize(operation.length), 0);
        }
        Ok(&mut bytes[start..start + length])
    }
}

/// Which parts of a read have come.
#[derive(Debug, Default)]
struct Coverage {
    /// Start and length of each piece, disjoint.
    ranges: BTreeMap<u64, u64>,
    total: u64,
}

impl Coverage {
    /// Adds a piece; `false` when a part of it was there already.
    fn add(&mut self, start: u64, length: u64) -> bool {
        let before = self.ranges.range(..=start).next_back();
        if before.is_some_and(|(s, l)| s + l > start) {
            return false;
        }
        if self.ranges.range(start..start + length).next().is_some() {
            return false;
        }
        self.ranges.insert(start, length);
        self.total += length;
        true
    }
}

/// Reads replies from a connection whose handshake is done.
#[derive(Debug)]
pub struct ReplyReader<R> {
    reader: R,
    /// Whether structured replies were agreed upon.
    structured: bool,
}

impl<R: Read> ReplyReader<R> {
    /// `reader` should be buffered: headers are short.
    pub fn new(reader: R, structured: bool) -> Self {
        Self { reader, structured }
    }

    /// The next header, or `None` when the server closed the connection between two replies. Blocks
    /// until one of the two happens.
    ///
    /// # Errors
    /// When the connection fails or ends in the middle, or no header comes.
    pub fn header(&mut self) -> Result<Option<ReplyHeader>, NbdError> {
        let Some(magic) = self.magic()? else { return Ok(None) };
        match magic {
            wire::SIMPLE_REPLY_MAGIC => {
                let reply: SimpleReply = self.receive()?;
                let form = Form::Simple { error: reply.error.get() };
                Ok(Some(ReplyHeader { cookie: reply.cookie.get(), form }))
            }
            wire::CHUNK_MAGIC if self.structured => {
                let chunk: Chunk = self.receive()?;
                let done = chunk.flags.get() & wire::CHUNK_DONE != 0;
                let form = Form::Chunk { done, kind: chunk.kind.get(), length: chunk.length.get() };
                Ok(Some(ReplyHeader { cookie: chunk.cookie.get(), form }))
            }
            wire::CHUNK_MAGIC => Err(Violation::UnexpectedChunk.into()),
            found => Err(Violation::BadMagic { what: "a reply", found: found.into() }.into()),
        }
    }

    /// Reads what follows `header` into `pending`, the request with its cookie.
    ///
    /// # Errors
    /// When the connection fails, or the content does not fit the request.
    pub fn content(
        &mut self,
        header: &ReplyHeader,
        pending: &mut PendingReply,
    ) -> Result<Progress, NbdError> {
        match header.form {
            Form::Simple { error } => self.simple(error, pending),
            Form::Chunk { done, kind, length } => {
                self.chunk(done, kind, length, pending)?;
                if done { Ok(pending.finish()?) } else { Ok(Progress::More) }
            }
        }
    }

    fn simple(&mut self, error: u32, pending: &mut PendingReply) -> Result<Progress, NbdError> {
        let operation = pending.operation;
        let only_structured = match operation.command {
            Command::Read => self.structured,
            Command::BlockStatus => true,
            _ => false,
        };
        // A server may fail before it knows how to do better, so errors pass in this form.
        if error != 0 {
            pending.failure.get_or_insert(Failure { errno: Errno(error), message: String::new() });
        } else if only_structured {
            return Err(Violation::UnexpectedSimpleReply { operation }.into());
        } else if operation.command == Command::Read {
            let Self { reader, .. } = self;
            let bytes = pending.fill(operation.offset, operation.length)?;
            read_exact(reader, bytes)?;
        }
        Ok(pending.finish()?)
    }

    fn chunk(
        &mut self,
        done: bool,
        kind: u16,
        length: u32,
        pending: &mut PendingReply,
    ) -> Result<(), NbdError> {
        let operation = pending.operation;
        let wrong_length = Violation::WrongChunkLength { operation, kind, length };
        match (kind, operation.command) {
            (wire::CHUNK_NONE, _) => match (length, done) {
                (0, true) => Ok(()),
                (0, false) => Err(Violation::EmptyChunk { operation }.into()),
                _ => Err(wrong_length.into()),
            },
            (wire::CHUNK_OFFSET_DATA, Command::Read) => {
                let Some(data) = length.checked_sub(8).filter(|data| *data > 0) else {
                    return Err(wrong_length.into());
                };
                let offset: U64 = self.receive()?;
                let Self { reader, .. } = self;
                read_exact(reader, pending.fill(offset.get(), data.into())?)
            }
            (wire::CHUNK_OFFSET_HOLE, Command::Read) => {
                if to_usize(length.into()) != size_of::<Hole>() {
                    return Err(wrong_length.into());
                }
                let hole: Hole = self.receive()?;
                if hole.length.get() == 0 {
                    return Err(wrong_length.into());
                }
                pending.fill(hole.offset.get(), hole.length.get().into())?.fill(0);
                Ok(())
            }
            (wire::CHUNK_BLOCK_STATUS, Command::BlockStatus) => self.block_status(length, pending),
            (kind, _) if kind & wire::CHUNK_ERROR_BIT != 0 => self.error_chunk(kind, length, pending),
            (kind, _) => Err(Violation::WrongChunk { operation, kind }.into()),
        }
    }

    fn error_chunk(&mut self, kind: u16, length: u32, pending: &mut PendingReply) -> Result<(), NbdError> {
        let operation = pending.operation;
        let wrong_length = Violation::WrongChunkLength { operation, kind, length };
        let fixed = size_of::<ErrorDetail>();
        let length = to_usize(length.into());
        if !(fixed..=fixed + wire::MAX_STRING + 8).contains(&length) {
            return Err(wrong_length.into());
        }
        let detail: ErrorDetail = self.receive()?;
        let mut rest = vec![0; length - fixed];
        read_exact(&mut self.reader, &mut rest)?;
        let message_length = usize::from(detail.message_length.get());
        let Some((message, after)) = rest.split_at_checked(message_length) else {
            return Err(wrong_length.into());
        };
        if detail.error.get() == 0 {
            return Err(Violation::ErrorWithoutNumber { operation }.into());
        }
        match kind {
            wire::CHUNK_ERROR if !after.is_empty() => return Err(wrong_length.into()),
            wire::CHUNK_ERROR_OFFSET => {
                let offset = U64::read_from_bytes(after).map_err(|_| wrong_length)?.get();
                if !(operation.offset..operation.offset + operation.length).contains(&offset) {
                    return Err(Violation::OutsideRequest { operation, offset, length: 0 }.into());
                }
            }
            // Of future errors only the beginning is known.
            _ => {}
        }
        let failure = Failure { errno: Errno(detail.error.get()), message: text(message) };
        pending.failure.get_or_insert(failure);
        Ok(())
    }

    fn block_status(&mut self, length: u32, pending: &mut PendingReply) -> Result<(), NbdError> {
        let operation = pending.operation;
        let kind = wire::CHUNK_BLOCK_STATUS;
        let Content::Extents { context, found } = &mut pending.content else {
            unreachable!("only called for block status");
        };
        if !(12..=MAX_STATUS_CHUNK).contains(&length) || length % 8 != 4 {
            return Err(Violation::WrongChunkLength { operation, kind, length }.into());
        }
        if !found.is_empty() {
            // One chunk a context, and there is but one context.
            return Err(Violation::WrongChunk { operation, kind }.into());
        }
        let id: U32 = self.receive()?;
        if id.get() != *context {
            return Err(Violation::WrongContext { expected: *context, found: id.get() }.into());
        }
        let end = operation.offset + operation.length;
        let mut offset = operation.offset;
        for _ in 0..length / 8 {
            let descriptor: BlockDescriptor = self.receive()?;
            let length = u64::from(descriptor.length.get());
            // The last extent may reach beyond the request, but none may begin there.
            if length == 0 || offset >= end {
                return Err(Violation::OutsideRequest { operation, offset, length }.into());
            }
            let flags = descriptor.flags.get();
            found.push(StatusExtent { offset, length, hole: flags & 1 != 0, zero: flags & 2 != 0 });
            offset += length;
        }
        Ok(())
    }

    /// The first bytes of a reply; `None` at a clean end.
    fn magic(&mut self) -> Result<Option<u32>, NbdError> {
        let mut magic = [0; 4];
        let mut got = 0;
        while got < magic.len() {
            match self.reader.read(&mut magic[got..]) {
                Ok(0) if got == 0 => return Ok(None),
                Ok(0) => return Err(NbdError::Closed { doing: "sending a reply" }),
                Ok(n) => got += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(NbdError::io("waiting for a reply", e)),
            }
        }
        Ok(Some(u32::from_be_bytes(magic)))
    }

    fn receive<T: FromBytes + IntoBytes + Immutable + KnownLayout>(&mut self) -> Result<T, NbdError> {
        let mut value = T::new_zeroed();
        read_exact(&mut self.reader, value.as_mut_bytes())?;
        Ok(value)
    }
}

fn read_exact(reader: &mut impl Read, bytes: &mut [u8]) -> Result<(), NbdError> {
    reader.read_exact(bytes).map_err(|e: io::Error| NbdError::io("sending a reply", e))
}

/// For lengths known to be at most a u32.
fn to_usize(length: u64) -> usize {
    usize::try_from(length).expect("a length of 32 bits")
}

#[cfg(test)]
mod tests;

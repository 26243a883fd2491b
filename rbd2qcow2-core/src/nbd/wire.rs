//! What is on the wire: constants and big-endian structures, no I/O.
//!
//! A structure made from bytes is only parsed. [`handshake`](super::handshake) and
//! [`reply`](super::reply) decide whether its values make sense.

use std::fmt;

use zerocopy::network_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First 8 bytes that every server sends: `NBDMAGIC`.
pub const SERVER_MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
/// Next 8 bytes of a newstyle server, and the first of every option request: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
/// Next 8 bytes of an oldstyle server.
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// First 8 bytes of every option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First 4 bytes of every request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First 4 bytes of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First 4 bytes of a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Handshake flag of both sides: unknown options get an answer instead of a closed connection.
pub const FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag of both sides: the answer to `NBD_OPT_EXPORT_NAME` is not padded.
pub const NO_ZEROES: u16 = 1 << 1;

/// The largest payload that may be sent without having asked, and the largest one sent at all.
pub const MAX_PAYLOAD: u32 = 32 << 20;
/// The longest string in the protocol, in bytes: export names, messages.
pub const MAX_STRING: usize = 4096;

/// An option that a client may haggle about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum HandshakeOption {
    /// Ends the negotiation and chooses an export, without a way to learn why it was refused.
    ExportName = 1,
    /// Ends the negotiation and chooses an export.
    Go = 7,
    /// Allows structured replies.
    StructuredReply = 8,
    /// Chooses what block status reports.
    SetMetaContext = 10,
}

impl HandshakeOption {
    /// The number in the protocol.
    #[must_use]
    pub fn code(self) -> u32 {
        self as u32
    }
}

impl fmt::Display for HandshakeOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ExportName => "NBD_OPT_EXPORT_NAME",
            Self::Go => "NBD_OPT_GO",
            Self::StructuredReply => "NBD_OPT_STRUCTURED_REPLY",
            Self::SetMetaContext => "NBD_OPT_SET_META_CONTEXT",
        })
    }
}

/// Option reply: done.
pub const REP_ACK: u32 = 1;
/// Option reply: a piece of information about an export.
pub const REP_INFO: u32 = 3;
/// Option reply: a metadata context was chosen.
pub const REP_META_CONTEXT: u32 = 4;
/// This bit marks an option reply as an error.
pub const REP_ERROR_BIT: u32 = 1 << 31;
/// Option reply: the server does not know the option.
pub const REP_ERR_UNSUP: u32 = REP_ERROR_BIT | 1;

/// Name of an error among option replies.
#[must_use]
pub fn option_error_name(kind: u32) -> &'static str {
    match kind & !REP_ERROR_BIT {
        1 => "NBD_REP_ERR_UNSUP (option not supported)",
        2 => "NBD_REP_ERR_POLICY (forbidden by the server's policy)",
        3 => "NBD_REP_ERR_INVALID (malformed request)",
        4 => "NBD_REP_ERR_PLATFORM (not supported on the server's platform)",
        5 => "NBD_REP_ERR_TLS_REQD (the server insists on TLS)",
        6 => "NBD_REP_ERR_UNKNOWN (no such export)",
        7 => "NBD_REP_ERR_SHUTDOWN (the server is shutting down)",
        8 => "NBD_REP_ERR_BLOCK_SIZE_REQD (the server insists on its block sizes)",
        9 => "NBD_REP_ERR_TOO_BIG (request too large)",
        10 => "NBD_REP_ERR_EXT_HEADER_REQD (the server insists on extended headers)",
        _ => "an error of unknown kind",
    }
}

/// Information type: size and flags of the export.
pub const INFO_EXPORT: u16 = 0;
/// Information type: block sizes of the export.
pub const INFO_BLOCK_SIZE: u16 = 3;

/// The metadata context that tells data from holes and zeroes.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// What a server says of an export, as bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TransmissionFlags(pub u16);

impl TransmissionFlags {
    /// The other flags mean something.
    pub const HAS_FLAGS: Self = Self(1 << 0);
    /// Writes are refused.
    pub const READ_ONLY: Self = Self(1 << 1);
    /// The flush command exists.
    pub const SEND_FLUSH: Self = Self(1 << 2);
    /// The write-zeroes command exists.
    pub const SEND_WRITE_ZEROES: Self = Self(1 << 6);
    /// A flush over one connection covers what was written over all of them.
    pub const CAN_MULTI_CONN: Self = Self(1 << 8);
    /// Write-zeroes may be asked to fail rather than be slow.
    pub const SEND_FAST_ZERO: Self = Self(1 << 11);

    /// Whether all of `flags` are set.
    #[must_use]
    pub fn contains(self, flags: Self) -> bool {
        self.0 & flags.0 == flags.0
    }
}

/// A command that a client may send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    /// Reads bytes.
    Read = 0,
    /// Writes bytes.
    Write = 1,
    /// Ends the connection; has no reply.
    Disconnect = 2,
    /// Brings what was written to stable storage.
    Flush = 3,
    /// Makes a range read as zeroes.
    WriteZeroes = 6,
    /// Tells which parts of a range are allocated.
    BlockStatus = 7,
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Disconnect => "disconnect",
            Self::Flush => "flush",
            Self::WriteZeroes => "write-zeroes",
            Self::BlockStatus => "block-status",
        })
    }
}

/// Command flag of write-zeroes: allocate, make no hole.
pub const CMD_NO_HOLE: u16 = 1 << 1;
/// Command flag of write-zeroes: fail with `ENOTSUP` rather than be slower than a write.
pub const CMD_FAST_ZERO: u16 = 1 << 4;

/// Error number of a reply, from the protocol's own small set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub u32);

impl Errno {
    /// No space left.
    pub const ENOSPC: Self = Self(28);
    /// Not supported.
    pub const ENOTSUP: Self = Self(95);
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            1 => "EPERM, operation not permitted",
            5 => "EIO, input/output error",
            12 => "ENOMEM, cannot allocate memory",
            22 => "EINVAL, invalid argument",
            28 => "ENOSPC, No space left on device",
            75 => "EOVERFLOW, value too large",
            95 => "ENOTSUP, operation not supported",
            108 => "ESHUTDOWN, the server is shutting down",
            other => return write!(f, "error number {other}"),
        })
    }
}

/// Chunk flag: the last chunk of its reply.
pub const CHUNK_DONE: u16 = 1 << 0;
/// Chunk without content.
pub const CHUNK_NONE: u16 = 0;
/// Chunk with an offset and data.
pub const CHUNK_OFFSET_DATA: u16 = 1;
/// Chunk that says that a range reads as zeroes.
pub const CHUNK_OFFSET_HOLE: u16 = 2;
/// Chunk with a context's extents.
pub const CHUNK_BLOCK_STATUS: u16 = 5;
/// This bit marks a chunk as an error.
pub const CHUNK_ERROR_BIT: u16 = 1 << 15;
/// Chunk that says that the request failed.
pub const CHUNK_ERROR: u16 = CHUNK_ERROR_BIT | 1;
/// Chunk that says at which offset the request failed.
pub const CHUNK_ERROR_OFFSET: u16 = CHUNK_ERROR_BIT | 2;

/// First bytes from a newstyle server.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Greeting {
    /// [`SERVER_MAGIC`].
    pub magic: U64,
    /// [`OPTION_MAGIC`] or [`OLDSTYLE_MAGIC`].
    pub style: U64,
}

/// Begins an option request; `length` bytes follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OptionHeader {
    /// [`OPTION_MAGIC`].
    pub magic: U64,
    /// A [`HandshakeOption`].
    pub option: U32,
    /// Bytes that follow.
    pub length: U32,
}

/// Begins an option reply; `length` bytes follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OptionReplyHeader {
    /// [`OPTION_REPLY_MAGIC`].
    pub magic: U64,
    /// The option that was asked for.
    pub option: U32,
    /// `REP_…`.
    pub kind: U32,
    /// Bytes that follow.
    pub length: U32,
}

/// Size and flags of an export: the whole answer to `NBD_OPT_EXPORT_NAME`, and the content of
/// `NBD_INFO_EXPORT` behind its type.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExportInfo {
    /// Bytes of the export.
    pub size: U64,
    /// [`TransmissionFlags`].
    pub flags: U16,
}

/// The content of `NBD_INFO_BLOCK_SIZE` behind its type. All in bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct BlockSizeInfo {
    /// Requests must be aligned to it.
    pub minimum: U32,
    /// Requests should be aligned to it.
    pub preferred: U32,
    /// Payloads must not be longer.
    pub maximum: U32,
}

/// A request; a write's payload follows.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Request {
    /// [`REQUEST_MAGIC`].
    pub magic: U32,
    /// `CMD_…`.
    pub flags: U16,
    /// A [`Command`].
    pub command: U16,
    /// Comes back in the reply.
    pub cookie: U64,
    /// First byte of the export that is meant.
    pub offset: U64,
    /// Bytes of the export that are meant.
    pub length: U32,
}

impl Request {
    /// A request ready to be sent.
    #[must_use]
    pub fn new(command: Command, flags: u16, cookie: u64, offset: u64, length: u32) -> Self {
        Self {
            magic: REQUEST_MAGIC.into(),
            flags: flags.into(),
            command: (command as u16).into(),
            cookie: cookie.into(),
            offset: offset.into(),
            length: length.into(),
        }
    }
}

/// What follows the magic of a simple reply. The bytes of a successful read follow it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SimpleReply {
    /// 0 or an [`Errno`].
    pub error: U32,
    /// The request's.
    pub cookie: U64,
}

/// What follows the magic of a chunk; `length` bytes follow it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Chunk {
    /// [`CHUNK_DONE`] or nothing.
    pub flags: U16,
    /// `CHUNK_…`.
    pub kind: U16,
    /// The request's.
    pub cookie: U64,
    /// Bytes that follow.
    pub length: U32,
}

/// Content of [`CHUNK_OFFSET_HOLE`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Hole {
    /// First byte, counted from the export's start.
    pub offset: U64,
    /// Bytes that read as zeroes.
    pub length: U32,
}

/// Begins the content of an error chunk; `message_length` bytes of text follow, then, in
/// [`CHUNK_ERROR_OFFSET`], the 8 bytes of an offset.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ErrorDetail {
    /// An [`Errno`], not 0.
    pub error: U32,
    /// Bytes of text.
    pub message_length: U16,
}

/// One extent in a [`CHUNK_BLOCK_STATUS`], after the 4 bytes of the context's number.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct BlockDescriptor {
    /// Bytes, not 0.
    pub length: U32,
    /// For `base:allocation`: bit 0 is a hole, bit 1 reads as zeroes.
    pub flags: U32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_the_bytes_of_the_specification() {
        let request = Request::new(Command::WriteZeroes, CMD_NO_HOLE, 0x0102_0304_0506_0708, 0x1000, 0x200);
        assert_eq!(
            request.as_bytes(),
            [
                0x25, 0x60, 0x95, 0x13, 0, 2, 0, 6, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0,
                2, 0
            ]
        );
        let parsed = Request::read_from_bytes(request.as_bytes()).expect("28 bytes");
        assert_eq!((parsed.cookie.get(), parsed.length.get()), (0x0102_0304_0506_0708, 0x200));
    }

    #[test]
    fn structures_have_no_padding() {
        assert_eq!(size_of::<OptionReplyHeader>(), 20);
        assert_eq!(size_of::<ExportInfo>(), 10);
        assert_eq!(size_of::<SimpleReply>() + 4, 16);
        assert_eq!(size_of::<Chunk>() + 4, 20);
        assert_eq!(size_of::<ErrorDetail>(), 6);
    }

    #[test]
    fn flags_are_told_apart() {
        let flags = TransmissionFlags(0x0105);
        assert!(flags.contains(TransmissionFlags::CAN_MULTI_CONN));
        assert!(flags.contains(TransmissionFlags::SEND_FLUSH));
        assert!(!flags.contains(TransmissionFlags::READ_ONLY));
        assert!(!flags.contains(TransmissionFlags(TransmissionFlags::SEND_FLUSH.0 | 2)));
    }

    #[test]
    fn error_numbers_are_named_as_people_search_for_them() {
        assert_eq!(Errno::ENOSPC.to_string(), "ENOSPC, No space left on device");
        assert_eq!(Errno(38).to_string(), "error number 38");
    }
}

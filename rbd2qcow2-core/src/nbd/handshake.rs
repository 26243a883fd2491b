//! Agrees with a server on an export: fixed newstyle negotiation.

use std::io::{self, Read, Write};

use zerocopy::network_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::wire::{
    self, BlockSizeInfo, ExportInfo, Greeting, HandshakeOption, OptionHeader, OptionReplyHeader,
    TransmissionFlags,
};
use super::{NbdError, Violation};

/// The longest option reply whose content is looked at. The longest sensible one is a string with
/// a few numbers around it.
const MAX_OPTION_REPLY: u32 = 8 << 10;

/// The longest option reply that is skipped rather than taken for nonsense.
const MAX_SKIPPED_REPLY: u32 = 64 << 10;

/// More replies than this to one option are a server that never ends. There are five types of
/// information today.
const MAX_OPTION_REPLIES: usize = 64;

/// Smallest block of an export that does not tell: what the protocol's document advises clients.
const DEFAULT_MINIMUM_BLOCK: u32 = 512;

/// What to negotiate.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Name of the export; qemu-nbd's default is the empty one. At most 4096 bytes.
    pub export: String,
    /// Whether `base:allocation` is wanted, which block status needs.
    pub allocation: bool,
}

/// Sizes of blocks, in bytes. `minimum` is a power of two, `maximum` a multiple of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Requests must be aligned to it.
    pub minimum: u32,
    /// Requests should be aligned to it.
    pub preferred: u32,
    /// No payload may be longer; at most 32 MiB.
    pub maximum: u32,
}

/// An export as it was agreed upon, validated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Export {
    /// Bytes.
    pub size: u64,
    /// What it can do.
    pub flags: TransmissionFlags,
    /// Its block sizes, or defaults.
    pub blocks: BlockSizes,
    /// Whether replies are structured.
    pub structured: bool,
    /// Number of the `base:allocation` context, when it was wanted and the server has it.
    pub allocation: Option<u32>,
}

/// Negotiates until the server is ready for requests. Blocks as `stream` does.
///
/// Structured replies are used when the server has them. A server without `NBD_OPT_GO` is asked by
/// `NBD_OPT_EXPORT_NAME`, which cannot say why it refuses: it just closes the connection.
///
/// # Errors
/// Any [`NbdError`] about a server that is none, is too old, refuses the export, breaks the
/// protocol or goes away. The stream is then useless.
pub fn negotiate<S: Read + Write>(stream: &mut S, wanted: &Wanted) -> Result<Export, NbdError> {
    if wanted.export.len() > wire::MAX_STRING {
        return Err(NbdError::OptionRefused {
            option: HandshakeOption::Go,
            reply: wire::REP_ERROR_BIT | 9,
            message: format!("the name has {} bytes, more than {}", wanted.export.len(), wire::MAX_STRING),
        });
    }
    let no_zeroes = greet(stream)?;
    let structured = ask_structured(stream)?;
    let allocation = if wanted.allocation && structured { ask_allocation(stream, wanted)? } else { None };
    let (info, blocks) = match go(stream, wanted)? {
        Some(found) => found,
        None => (export_name(stream, wanted, no_zeroes)?, None),
    };
    let flags = TransmissionFlags(info.flags.get());
    if !flags.contains(TransmissionFlags::HAS_FLAGS) {
        return Err(Violation::BadTransmissionFlags { flags: flags.0 }.into());
    }
    let size = info.size.get();
    // Offsets are signed on every system; with this, no sum of an offset and a length overflows.
    if i64::try_from(size).is_err() {
        return Err(Violation::BadLength { what: "the export", length: size }.into());
    }
    Ok(Export { size, flags, blocks: block_sizes(blocks)?, structured, allocation })
}

/// Exchanges the first flags. Returns whether the server omits the padding of old answers.
fn greet<S: Read + Write>(stream: &mut S) -> Result<bool, NbdError> {
    let greeting: Greeting = receive(stream, "waiting for its greeting")?;
    if greeting.magic.get() != wire::SERVER_MAGIC {
        return Err(NbdError::NotNbd { magic: greeting.magic.get() });
    }
    match greeting.style.get() {
        wire::OPTION_MAGIC => {}
        wire::OLDSTYLE_MAGIC => return Err(NbdError::Oldstyle),
        found => return Err(Violation::BadMagic { what: "the greeting's second half", found }.into()),
    }
    let flags: U16 = receive(stream, "waiting for its greeting")?;
    if flags.get() & wire::FIXED_NEWSTYLE == 0 {
        return Err(NbdError::NotFixedNewstyle);
    }
    // The client's flags have the same values as the server's, and must not exceed them.
    let common = flags.get() & (wire::FIXED_NEWSTYLE | wire::NO_ZEROES);
    send(stream, U32::new(common.into()).as_bytes())?;
    Ok(common & wire::NO_ZEROES != 0)
}

fn ask_structured<S: Read + Write>(stream: &mut S) -> Result<bool, NbdError> {
    let option = HandshakeOption::StructuredReply;
    request_option(stream, option, &[])?;
    match option_reply(stream, option)? {
        Answer::Ack => Ok(true),
        Answer::Error { .. } => Ok(false),
        Answer::Other { kind, .. } => Err(Violation::WrongOptionReply { option, kind }.into()),
    }
}

fn ask_allocation<S: Read + Write>(stream: &mut S, wanted: &Wanted) -> Result<Option<u32>, NbdError> {
    let option = HandshakeOption::SetMetaContext;
    let mut content = Vec::new();
    push_string(&mut content, &wanted.export);
    content.extend_from_slice(U32::new(1).as_bytes());
    push_string(&mut content, wire::BASE_ALLOCATION);
    request_option(stream, option, &content)?;
    let mut context = None;
    for _ in 0..MAX_OPTION_REPLIES {
        match option_reply(stream, option)? {
            Answer::Ack => return Ok(context),
            // An unknown export is better told by the answer to NBD_OPT_GO.
            Answer::Error { .. } => return Ok(None),
            Answer::Other { kind: wire::REP_META_CONTEXT, content } => {
                let Ok((id, name)) = U32::read_from_prefix(&content) else {
                    return Err(bad_length("NBD_REP_META_CONTEXT", content.len()));
                };
                if name != wire::BASE_ALLOCATION.as_bytes() || context.is_some() {
                    return Err(Violation::UnexpectedContext { name: text(name) }.into());
                }
                context = Some(id.get());
            }
            Answer::Other { kind, .. } => return Err(Violation::WrongOptionReply { option, kind }.into()),
        }
    }
    Err(Violation::TooManyOptionReplies { option, limit: MAX_OPTION_REPLIES }.into())
}

/// What `NBD_OPT_GO` tells, or `None` when the server does not know the option.
type GoAnswer = Option<(ExportInfo, Option<BlockSizeInfo>)>;

fn go<S: Read + Write>(stream: &mut S, wanted: &Wanted) -> Result<GoAnswer, NbdError> {
    let option = HandshakeOption::Go;
    let mut content = Vec::new();
    push_string(&mut content, &wanted.export);
    content.extend_from_slice(U16::new(1).as_bytes());
    content.extend_from_slice(U16::new(wire::INFO_BLOCK_SIZE).as_bytes());
    request_option(stream, option, &content)?;
    let (mut export, mut blocks) = (None, None);
    for _ in 0..MAX_OPTION_REPLIES {
        match option_reply(stream, option)? {
            Answer::Ack => {
                let export = export.ok_or(Violation::NoExportInfo)?;
                return Ok(Some((export, blocks)));
            }
            Answer::Error { reply: wire::REP_ERR_UNSUP, .. } => return Ok(None),
            Answer::Error { reply, message } => {
                return Err(NbdError::OptionRefused { option, reply, message });
            }
            Answer::Other { kind: wire::REP_INFO, content } => {
                let Ok((kind, info)) = U16::read_from_prefix(&content) else {
                    return Err(bad_length("NBD_REP_INFO", content.len()));
                };
                match kind.get() {
                    wire::INFO_EXPORT => export = Some(exactly(info, "NBD_INFO_EXPORT")?),
                    wire::INFO_BLOCK_SIZE => blocks = Some(exactly(info, "NBD_INFO_BLOCK_SIZE")?),
                    // Servers may tell more than they were asked.
                    _ => {}
                }
            }
            Answer::Other { kind, .. } => return Err(Violation::WrongOptionReply { option, kind }.into()),
        }
    }
    Err(Violation::TooManyOptionReplies { option, limit: MAX_OPTION_REPLIES }.into())
}

fn export_name<S: Read + Write>(
    stream: &mut S,
    wanted: &Wanted,
    no_zeroes: bool,
) -> Result<ExportInfo, NbdError> {
    request_option(stream, HandshakeOption::ExportName, wanted.export.as_bytes())?;
    let doing = "waiting for the export (a server that does not know its name just closes)";
    let info = receive(stream, doing)?;
    if !no_zeroes {
        let _padding: [u8; 124] = receive(stream, doing)?;
    }
    Ok(info)
}

/// Validates what the server said of blocks.
fn block_sizes(info: Option<BlockSizeInfo>) -> Result<BlockSizes, Violation> {
    let Some(info) = info else {
        return Ok(BlockSizes {
            minimum: DEFAULT_MINIMUM_BLOCK,
            preferred: 4096,
            maximum: wire::MAX_PAYLOAD,
        });
    };
    let (minimum, preferred, maximum) = (info.minimum.get(), info.preferred.get(), info.maximum.get());
    // The protocol allows minima up to 64 KiB only, but qemu-nbd's compress filter reports the
    // cluster size, up to 2 MiB.
    let sane = minimum.is_power_of_two()
        && preferred.is_power_of_two()
        && (minimum..=maximum).contains(&preferred)
        && minimum <= wire::MAX_PAYLOAD
        // All ones means "no limit".
        && (maximum == u32::MAX || maximum.is_multiple_of(minimum));
    if !sane {
        return Err(Violation::BadBlockSizes { minimum, preferred, maximum });
    }
    Ok(BlockSizes { minimum, preferred, maximum: maximum.min(wire::MAX_PAYLOAD) })
}

/// A reply to an option.
enum Answer {
    Ack,
    Error { reply: u32, message: String },
    Other { kind: u32, content: Vec<u8> },
}

fn option_reply<S: Read>(stream: &mut S, asked: HandshakeOption) -> Result<Answer, NbdError> {
    let header: OptionReplyHeader = receive(stream, "waiting for the reply to an option")?;
    if header.magic.get() != wire::OPTION_REPLY_MAGIC {
        return Err(Violation::BadMagic { what: "an option reply", found: header.magic.get() }.into());
    }
    if header.option.get() != asked.code() {
        return Err(Violation::WrongOption { asked, found: header.option.get() }.into());
    }
    let (kind, length) = (header.kind.get(), header.length.get());
    if length > MAX_OPTION_REPLY {
        // Nothing that is understood is that long, but an explanation of an error may be.
        if kind & wire::REP_ERROR_BIT == 0 || length > MAX_SKIPPED_REPLY {
            return Err(Violation::BadLength { what: "an option reply", length: length.into() }.into());
        }
        skip(stream, length)?;
        return Ok(Answer::Error { reply: kind, message: String::new() });
    }
    let mut content = vec![0; length as usize];
    receive_into(stream, &mut content, "reading the reply to an option")?;
    match kind {
        wire::REP_ACK if content.is_empty() => Ok(Answer::Ack),
        wire::REP_ACK => Err(bad_length("NBD_REP_ACK", content.len())),
        reply if reply & wire::REP_ERROR_BIT != 0 => Ok(Answer::Error { reply, message: text(&content) }),
        kind => Ok(Answer::Other { kind, content }),
    }
}

fn request_option<S: Write>(stream: &mut S, option: HandshakeOption, content: &[u8]) -> Result<(), NbdError> {
    let length = u32::try_from(content.len()).expect("two strings of at most 4096 bytes");
    let header = OptionHeader {
        magic: wire::OPTION_MAGIC.into(),
        option: option.code().into(),
        length: length.into(),
    };
    send(stream, &[header.as_bytes(), content].concat())
}

fn push_string(to: &mut Vec<u8>, string: &str) {
    let length = u32::try_from(string.len()).expect("checked to be at most 4096 bytes");
    to.extend_from_slice(U32::new(length).as_bytes());
    to.extend_from_slice(string.as_bytes());
}

fn exactly<T: FromBytes>(bytes: &[u8], what: &'static str) -> Result<T, NbdError> {
    T::read_from_bytes(bytes).map_err(|_| bad_length(what, bytes.len()))
}

fn bad_length(what: &'static str, length: usize) -> NbdError {
    Violation::BadLength { what, length: length as u64 }.into()
}

/// What a server says, made fit to be printed.
pub(super) fn text(bytes: &[u8]) -> String {
    let cut = &bytes[..bytes.len().min(wire::MAX_STRING)];
    String::from_utf8_lossy(cut).chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn send<S: Write>(stream: &mut S, bytes: &[u8]) -> Result<(), NbdError> {
    stream.write_all(bytes).and_then(|()| stream.flush()).map_err(|e| NbdError::io("negotiating", e))
}

fn receive<S: Read, T: FromBytes + IntoBytes + Immutable + KnownLayout>(
    stream: &mut S,
    doing: &'static str,
) -> Result<T, NbdError> {
    let mut value = T::new_zeroed();
    receive_into(stream, value.as_mut_bytes(), doing)?;
    Ok(value)
}

fn receive_into<S: Read>(stream: &mut S, bytes: &mut [u8], doing: &'static str) -> Result<(), NbdError> {
    stream.read_exact(bytes).map_err(|e| NbdError::io(doing, e))
}

fn skip<S: Read>(stream: &mut S, length: u32) -> Result<(), NbdError> {
    let skipped = io::copy(&mut stream.take(length.into()), &mut io::sink())
        .map_err(|e| NbdError::io("skipping an option reply", e))?;
    if skipped < length.into() {
        return Err(NbdError::Closed { doing: "skipping an option reply" });
    }
    Ok(())
}

#[cfg(test)]
mod tests;

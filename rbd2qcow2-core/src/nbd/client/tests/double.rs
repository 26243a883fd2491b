//! A server that does whatever a test wants of it.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use rustix::net::RecvFlags;
use zerocopy::{FromBytes, IntoBytes};

use crate::nbd::wire::{self, Chunk, Command, Request, SimpleReply};

/// HAS_FLAGS, SEND_FLUSH, SEND_WRITE_ZEROES.
pub(super) const PLAIN: u16 = 0b100_0101;
/// [`PLAIN`] and CAN_MULTI_CONN.
pub(super) const MULTI: u16 = PLAIN | 1 << 8;

/// What the double shows of its export.
#[derive(Clone, Copy)]
pub(super) struct Shown {
    pub(super) size: u64,
    pub(super) flags: u16,
    pub(super) structured: bool,
    /// Minimum, preferred and maximum block, in bytes.
    pub(super) blocks: [u32; 3],
}

impl Default for Shown {
    fn default() -> Self {
        Self { size: 1 << 30, flags: PLAIN, structured: true, blocks: [512, 4096, 1 << 20] }
    }
}

/// The server's end of a connection.
pub(super) struct Double(pub(super) UnixStream);

impl Double {
    /// Negotiates in the way of a modern server.
    pub(super) fn negotiate(&mut self, shown: Shown) -> io::Result<()> {
        self.0.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
        self.0.read_exact(&mut [0; 4])?;
        loop {
            let mut header = [0; 16];
            self.0.read_exact(&mut header)?;
            let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("4 bytes"));
            let option = word(8);
            let mut content = vec![0; word(12) as usize];
            self.0.read_exact(&mut content)?;
            match option {
                8 if shown.structured => self.option_reply(8, wire::REP_ACK, &[])?,
                10 => {
                    self.option_reply(10, wire::REP_META_CONTEXT, b"\0\0\0\x05base:allocation")?;
                    self.option_reply(10, wire::REP_ACK, &[])?;
                }
                7 => {
                    let export =
                        [&[0, 0], &shown.size.to_be_bytes()[..], &shown.flags.to_be_bytes()].concat();
                    self.option_reply(7, wire::REP_INFO, &export)?;
                    let blocks = shown.blocks.map(u32::to_be_bytes).concat();
                    self.option_reply(7, wire::REP_INFO, &[&[0, 3], &blocks[..]].concat())?;
                    return self.option_reply(7, wire::REP_ACK, &[]);
                }
                other => self.option_reply(other, wire::REP_ERR_UNSUP, &[])?,
            }
        }
    }

    fn option_reply(&mut self, option: u32, kind: u32, content: &[u8]) -> io::Result<()> {
        let length = u32::try_from(content.len()).expect("short");
        let numbers = [option, kind, length].map(u32::to_be_bytes).concat();
        self.0.write_all(&[&wire::OPTION_REPLY_MAGIC.to_be_bytes(), &numbers[..], content].concat())
    }

    /// Whether a request has begun to arrive.
    pub(super) fn has_request(&self) -> bool {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        matches!(rustix::net::recv(&self.0, &mut [0; 1], flags), Ok((1, _)))
    }

    /// The next request, with its payload.
    pub(super) fn request(&mut self) -> io::Result<(Request, Vec<u8>)> {
        let mut bytes = [0; size_of::<Request>()];
        self.0.read_exact(&mut bytes)?;
        let request = Request::read_from_bytes(&bytes).expect("the same length");
        assert_eq!(request.magic.get(), wire::REQUEST_MAGIC);
        let writes = request.command.get() == Command::Write as u16;
        let mut payload = vec![0; if writes { request.length.get() as usize } else { 0 }];
        self.0.read_exact(&mut payload)?;
        Ok((request, payload))
    }

    pub(super) fn simple(&mut self, cookie: u64, error: u32) -> io::Result<()> {
        let reply = SimpleReply { error: error.into(), cookie: cookie.into() };
        self.0.write_all(&[&wire::SIMPLE_REPLY_MAGIC.to_be_bytes(), reply.as_bytes()].concat())
    }

    pub(super) fn chunk(&mut self, cookie: u64, flags: u16, kind: u16, content: &[u8]) -> io::Result<()> {
        let length = u32::try_from(content.len()).expect("short");
        let chunk =
            Chunk { flags: flags.into(), kind: kind.into(), cookie: cookie.into(), length: length.into() };
        self.0.write_all(&[&wire::CHUNK_MAGIC.to_be_bytes(), chunk.as_bytes(), content].concat())
    }

    /// Answers every request with success, but for reads, until the client disconnects.
    pub(super) fn agree(&mut self) -> io::Result<()> {
        loop {
            let (request, _) = self.request()?;
            if request.command.get() == Command::Disconnect as u16 {
                return Ok(());
            }
            self.simple(request.cookie.get(), 0)?;
        }
    }
}

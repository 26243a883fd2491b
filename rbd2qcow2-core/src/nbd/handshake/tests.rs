use std::io::Cursor;

use super::*;

/// Plays a server that has said everything beforehand.
struct Script {
    says: Cursor<Vec<u8>>,
    heard: Vec<u8>,
}

impl Read for Script {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.says.read(buffer)
    }
}

impl Write for Script {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.heard.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

const GO: u32 = 7;
const STRUCTURED: u32 = 8;
const CONTEXT: u32 = 10;
const UNSUP: u32 = wire::REP_ERR_UNSUP;

/// Flags of the exports here: HAS_FLAGS, SEND_FLUSH.
const FLAGS: u16 = 0b101;

fn greeting(flags: u16) -> Vec<u8> {
    [&b"NBDMAGICIHAVEOPT"[..], &flags.to_be_bytes()].concat()
}

fn reply(option: u32, kind: u32, content: &[u8]) -> Vec<u8> {
    let length = u32::try_from(content.len()).expect("short");
    let header = OptionReplyHeader {
        magic: wire::OPTION_REPLY_MAGIC.into(),
        option: option.into(),
        kind: kind.into(),
        length: length.into(),
    };
    [header.as_bytes(), content].concat()
}

fn ack(option: u32) -> Vec<u8> {
    reply(option, wire::REP_ACK, &[])
}

fn info_export(size: u64, flags: u16) -> Vec<u8> {
    reply(GO, wire::REP_INFO, &[&[0, 0], &size.to_be_bytes()[..], &flags.to_be_bytes()].concat())
}

fn info_blocks(minimum: u32, preferred: u32, maximum: u32) -> Vec<u8> {
    let sizes = [minimum, preferred, maximum].map(u32::to_be_bytes).concat();
    reply(GO, wire::REP_INFO, &[&[0, 3], &sizes[..]].concat())
}

fn context(id: u32, name: &str) -> Vec<u8> {
    reply(CONTEXT, wire::REP_META_CONTEXT, &[&id.to_be_bytes(), name.as_bytes()].concat())
}

fn negotiate_with(parts: &[Vec<u8>]) -> (Result<Export, NbdError>, Script) {
    let mut script = Script { says: Cursor::new(parts.concat()), heard: Vec::new() };
    let wanted = Wanted { export: "disk".into(), allocation: true };
    let result = negotiate(&mut script, &wanted);
    (result, script)
}

#[test]
fn a_modern_server_gives_everything() {
    let (result, script) = negotiate_with(&[
        greeting(3),
        ack(STRUCTURED),
        context(7, "base:allocation"),
        ack(CONTEXT),
        info_export(1 << 40, FLAGS),
        reply(GO, wire::REP_INFO, &[0, 1, b'd']),
        info_blocks(1, 4096, 32 << 20),
        ack(GO),
        vec![0x67],
    ]);
    let blocks = BlockSizes { minimum: 1, preferred: 4096, maximum: 32 << 20 };
    let flags = TransmissionFlags(FLAGS);
    let expected = Export { size: 1 << 40, flags, blocks, structured: true, allocation: Some(7) };
    assert_eq!(result.expect("negotiated"), expected);
    assert_eq!(script.heard[..4], [0, 0, 0, 3]);
    let left = script.says.get_ref().len() as u64 - script.says.position();
    assert_eq!(left, 1, "bytes of the first reply were eaten");
}

#[test]
fn a_server_without_go_is_asked_by_name() {
    let info = [&1024_u64.to_be_bytes()[..], &FLAGS.to_be_bytes()].concat();
    let old = [reply(STRUCTURED, UNSUP, b"what?"), reply(GO, UNSUP, &[]), info].concat();
    let defaults = BlockSizes { minimum: 512, preferred: 4096, maximum: 32 << 20 };
    for (flags, padding) in [(3, 0), (1, 124)] {
        let (result, script) = negotiate_with(&[greeting(flags), old.clone(), vec![0; padding]]);
        let export = result.expect("negotiated");
        assert_eq!((export.size, export.blocks), (1024, defaults));
        assert_eq!((export.structured, export.allocation), (false, None));
        assert!(script.heard.ends_with(b"IHAVEOPT\0\0\0\x01\0\0\0\x04disk"));
    }
}

#[test]
fn no_limit_becomes_the_largest_payload() {
    let parts = [greeting(3), ack(STRUCTURED), ack(CONTEXT), info_export(0, FLAGS)];
    let (result, _) = negotiate_with(&[parts.concat(), info_blocks(65_536, 65_536, u32::MAX), ack(GO)]);
    assert_eq!(result.expect("negotiated").blocks.maximum, wire::MAX_PAYLOAD);
}

/// What a server says after the greeting, and a word of the error that it deserves.
#[test]
fn each_misbehaviour_has_its_error() {
    let structured = || ack(STRUCTURED);
    let with_context = || [structured(), ack(CONTEXT)].concat();
    let exported = || [with_context(), info_export(512, FLAGS)].concat();
    let raw = |bytes: &[u8]| bytes.to_vec();
    let magic_broken = || [&[0; 8], &structured()[8..]].concat();
    let too_long = |kind: u32, length: u32| {
        let mut bytes = reply(STRUCTURED, kind, &[]);
        bytes[16..20].copy_from_slice(&length.to_be_bytes());
        bytes
    };
    let refused = |kind| [with_context(), reply(GO, UNSUP - 1 + kind, b"no\nway")].concat();
    let blocks = |a, b, c| [exported(), info_blocks(a, b, c), ack(GO)].concat();
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (raw(b""), "Closed"),
        (magic_broken(), "BadMagic"),
        (ack(GO), "WrongOption {"),
        (reply(STRUCTURED, 2, &[]), "WrongOptionReply"),
        (reply(STRUCTURED, wire::REP_ACK, b"x"), "BadLength"),
        (too_long(wire::REP_INFO, 9000), "BadLength"),
        (too_long(wire::REP_ACK, u32::MAX), "BadLength"),
        (too_long(UNSUP, u32::MAX), "BadLength"),
        (too_long(UNSUP, 9000), "Closed"),
        (structured()[..19].to_vec(), "Closed"),
        ([structured(), reply(CONTEXT, wire::REP_META_CONTEXT, b"abc")].concat(), "BadLength"),
        ([structured(), context(1, "base:other")].concat(), "UnexpectedContext"),
        (
            [structured(), context(1, "base:allocation"), context(2, "base:allocation")].concat(),
            "UnexpectedContext",
        ),
        ([structured(), reply(CONTEXT, wire::REP_INFO, &[])].concat(), "WrongOptionReply"),
        ([with_context(), ack(GO)].concat(), "NoExportInfo"),
        ([with_context(), reply(GO, wire::REP_META_CONTEXT, &[])].concat(), "WrongOptionReply"),
        ([with_context(), reply(GO, wire::REP_INFO, &[0])].concat(), "BadLength"),
        ([with_context(), reply(GO, wire::REP_INFO, &[0, 0, 1])].concat(), "BadLength"),
        ([exported(), reply(GO, wire::REP_INFO, &[0, 3, 1])].concat(), "BadLength"),
        (
            [with_context(), info_export(512, FLAGS).repeat(MAX_OPTION_REPLIES)].concat(),
            "TooManyOptionReplies",
        ),
        ([with_context(), info_export(512, 4), ack(GO)].concat(), "BadTransmissionFlags"),
        ([with_context(), info_export(1 << 63, FLAGS), ack(GO)].concat(), "BadLength"),
        (blocks(0, 4096, 8192), "BadBlockSizes"),
        (blocks(3, 4096, 8192), "BadBlockSizes"),
        (blocks(512, 4095, 8192), "BadBlockSizes"),
        (blocks(4096, 512, 8192), "BadBlockSizes"),
        (blocks(512, 4096, 2048), "BadBlockSizes"),
        (blocks(512, 4096, 8191), "BadBlockSizes"),
        (blocks(1 << 30, 1 << 30, u32::MAX), "BadBlockSizes"),
        (refused(5), "TLS"),
        (refused(6), "no such export): no way"),
        (refused(99), "unknown kind"),
        ([with_context(), reply(GO, UNSUP, &[]), raw(b"short")].concat(), "Closed"),
    ];
    for (says, expected) in cases {
        let (result, _) = negotiate_with(&[greeting(3), says.clone()]);
        let error = result.expect_err(expected);
        let found = format!("{error:?} {error}");
        assert!(found.contains(expected), "{says:02x?}: {found} is not {expected}");
    }
}

#[test]
fn servers_of_other_times_are_refused_by_name() {
    let error = |says: Vec<u8>| negotiate_with(&[says]).0.expect_err("refused");
    let oldstyle = [b"NBDMAGIC", &wire::OLDSTYLE_MAGIC.to_be_bytes()[..], &[0; 136]].concat();
    assert!(matches!(error(oldstyle), NbdError::Oldstyle));
    assert!(matches!(error(greeting(0)), NbdError::NotFixedNewstyle));
    assert!(matches!(error(b"HTTP/1.1 400 Bad".to_vec()), NbdError::NotNbd { .. }));
    let neither = [b"NBDMAGIC", &[0; 10][..]].concat();
    assert!(matches!(error(neither), NbdError::Protocol(Violation::BadMagic { .. })));
}

#[test]
fn a_name_that_no_server_can_have_is_refused_at_once() {
    let mut script = Script { says: Cursor::default(), heard: Vec::new() };
    let wanted = Wanted { export: "x".repeat(wire::MAX_STRING + 1), allocation: false };
    let error = negotiate(&mut script, &wanted).expect_err("too long");
    assert!(matches!(error, NbdError::OptionRefused { .. }), "{error}");
    assert!(script.heard.is_empty());
}

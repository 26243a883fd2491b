use super::*;

const COOKIE: u64 = 0x1122_3344_5566_7788;

fn simple(error: u32, content: &[u8]) -> Vec<u8> {
    let header = [&wire::SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &error.to_be_bytes(), &COOKIE.to_be_bytes()];
    [&header.concat(), content].concat()
}

fn chunk(flags: u16, kind: u16, content: &[u8]) -> Vec<u8> {
    let length = u32::try_from(content.len()).expect("short");
    let header =
        Chunk { flags: flags.into(), kind: kind.into(), cookie: COOKIE.into(), length: length.into() };
    [&wire::CHUNK_MAGIC.to_be_bytes(), header.as_bytes(), content].concat()
}

fn data(flags: u16, offset: u64, bytes: &[u8]) -> Vec<u8> {
    chunk(flags, wire::CHUNK_OFFSET_DATA, &[&offset.to_be_bytes(), bytes].concat())
}

fn hole(flags: u16, offset: u64, length: u32) -> Vec<u8> {
    chunk(flags, wire::CHUNK_OFFSET_HOLE, &[&offset.to_be_bytes()[..], &length.to_be_bytes()].concat())
}

fn status(context: u32, extents: &[(u32, u32)]) -> Vec<u8> {
    let mut content = context.to_be_bytes().to_vec();
    for (length, flags) in extents {
        content.extend(length.to_be_bytes());
        content.extend(flags.to_be_bytes());
    }
    chunk(1, wire::CHUNK_BLOCK_STATUS, &content)
}

fn failed(kind: u16, error: u32, message: &str, rest: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).expect("short").to_be_bytes();
    chunk(1, kind, &[&error.to_be_bytes()[..], &length, message.as_bytes(), rest].concat())
}

/// Answers a request for 8 bytes at offset 4096 (block status: 1 KiB) by `says`.
fn answer(command: Command, structured: bool, says: &[u8]) -> Result<Result<Yield, Failure>, NbdError> {
    let length = if command == Command::BlockStatus { 1024 } else { 8 };
    let mut pending = PendingReply::new(command, 4096, length, 5);
    let mut replies = ReplyReader::new(says, structured);
    loop {
        let header = replies.header()?.ok_or(NbdError::Closed { doing: "test" })?;
        assert_eq!(header.cookie(), COOKIE);
        if let Progress::Done(result) = replies.content(&header, &mut pending)? {
            assert!(replies.header().expect("no error").is_none(), "something is left");
            return Ok(result);
        }
    }
}

fn good(command: Command, structured: bool, says: &[u8]) -> Yield {
    answer(command, structured, says).expect("obeys the protocol").expect("success")
}

#[test]
fn simple_replies() {
    assert_eq!(good(Command::Write, false, &simple(0, &[])), Yield::Nothing);
    assert_eq!(good(Command::Flush, true, &simple(0, &[])), Yield::Nothing);
    assert_eq!(good(Command::Read, false, &simple(0, b"01234567")), Yield::Data(b"01234567".to_vec()));
    let failure = answer(Command::Read, true, &simple(28, &[])).expect("obeys").expect_err("failure");
    assert_eq!(failure, Failure { errno: Errno::ENOSPC, message: String::new() });
}

#[test]
fn a_read_may_come_in_pieces_of_any_order() {
    let pieces = [data(0, 4102, b"67"), hole(0, 4098, 2), data(0, 4096, b"01"), data(1, 4100, b"45")];
    assert_eq!(good(Command::Read, true, &pieces.concat()), Yield::Data(b"01\0\x004567".to_vec()));
    let with_end = [data(0, 4096, b"01234567"), chunk(1, wire::CHUNK_NONE, &[])];
    assert_eq!(good(Command::Read, true, &with_end.concat()), Yield::Data(b"01234567".to_vec()));
}

#[test]
fn errors_come_with_their_message() {
    let says =
        [data(0, 4096, b"0"), failed(wire::CHUNK_ERROR_OFFSET, 5, "bad\nsector", &4097_u64.to_be_bytes())];
    let failure = answer(Command::Read, true, &says.concat()).expect("obeys").expect_err("failure");
    assert_eq!(failure, Failure { errno: Errno(5), message: "bad sector".into() });
    // The kind of error may be one of the future.
    let says = failed(wire::CHUNK_ERROR_BIT | 9, 95, "", b"whatever");
    assert_eq!(
        answer(Command::Write, true, &says).expect("obeys").expect_err("failure").errno,
        Errno::ENOTSUP
    );
}

#[test]
fn block_status_is_placed() {
    let extent = |offset, length, hole, zero| StatusExtent { offset, length, hole, zero };
    let found = good(Command::BlockStatus, true, &status(5, &[(512, 0), (4096, 3)]));
    assert_eq!(found, Yield::Extents(vec![extent(4096, 512, false, false), extent(4608, 4096, true, true)]));
}

#[test]
fn each_misbehaviour_has_its_error() {
    use Command::{BlockStatus, Flush, Read, Write};
    let none = |flags| chunk(flags, wire::CHUNK_NONE, &[]);
    let long = |kind, length: u32| {
        let mut bytes = chunk(1, kind, &[0; 16]);
        bytes[16..20].copy_from_slice(&length.to_be_bytes());
        bytes
    };
    let error_at = |offset: u64| failed(wire::CHUNK_ERROR_OFFSET, 5, "", &offset.to_be_bytes());
    let cases: Vec<(Command, bool, Vec<u8>, &str)> = vec![
        (Write, true, b"junk".to_vec(), "BadMagic"),
        (Write, true, b"jun".to_vec(), "Closed"),
        (Write, false, none(1), "UnexpectedChunk"),
        (Write, true, simple(0, &[])[..15].to_vec(), "Closed"),
        (Read, true, simple(0, b"01234567"), "UnexpectedSimpleReply"),
        (BlockStatus, true, simple(0, &[]), "UnexpectedSimpleReply"),
        (Read, false, simple(0, b"0123456"), "Closed"),
        (Write, true, none(0), "EmptyChunk"),
        (Write, true, chunk(1, wire::CHUNK_NONE, b"x"), "WrongChunkLength"),
        (Write, true, data(1, 4096, b"x"), "WrongChunk {"),
        (Write, true, hole(1, 4096, 1), "WrongChunk {"),
        (Flush, true, status(5, &[(1024, 0)]), "WrongChunk {"),
        (Read, true, status(5, &[(8, 0)]), "WrongChunk {"),
        (BlockStatus, true, data(1, 4096, b"x"), "WrongChunk {"),
        (Write, true, chunk(1, 77, &[]), "WrongChunk {"),
        (Read, true, data(1, 4096, b""), "WrongChunkLength"),
        (Read, true, chunk(1, wire::CHUNK_OFFSET_DATA, b"short"), "WrongChunkLength"),
        (Read, true, chunk(1, wire::CHUNK_OFFSET_HOLE, b"short"), "WrongChunkLength"),
        (Read, true, hole(1, 4096, 0), "WrongChunkLength"),
        (Read, true, data(1, 4095, b"x"), "OutsideRequest"),
        (Read, true, data(1, 4096, b"012345678"), "OutsideRequest"),
        (Read, true, long(wire::CHUNK_OFFSET_DATA, u32::MAX), "OutsideRequest"),
        (Read, true, data(1, u64::MAX, b"x"), "OutsideRequest"),
        (Read, true, hole(1, 4100, u32::MAX), "OutsideRequest"),
        (Read, true, [data(0, 4096, b"012"), data(1, 4098, b"x")].concat(), "Overlap"),
        (Read, true, [data(0, 4100, b"012"), hole(1, 4097, 4)].concat(), "Overlap"),
        (Read, true, [data(0, 4100, b"0"), data(1, 4100, b"0")].concat(), "Overlap"),
        (Read, true, (4096..4101).flat_map(|at| data(0, at, b"x")).collect(), "TooManyPieces"),
        (Read, true, data(1, 4096, b"0123456"), "missing: 1"),
        (Read, true, none(1), "missing: 8"),
        (Read, true, data(1, 4096, b"01234567")[..30].to_vec(), "Closed"),
        (Write, true, failed(wire::CHUNK_ERROR, 0, "fine", &[]), "ErrorWithoutNumber"),
        (Write, true, failed(wire::CHUNK_ERROR, 5, "", b"x"), "WrongChunkLength"),
        (Write, true, chunk(1, wire::CHUNK_ERROR, b"short"), "WrongChunkLength"),
        (Write, true, chunk(1, wire::CHUNK_ERROR, &[0, 0, 0, 5, 0, 9]), "WrongChunkLength"),
        (Write, true, long(wire::CHUNK_ERROR, u32::MAX), "WrongChunkLength"),
        (Read, true, failed(wire::CHUNK_ERROR_OFFSET, 5, "", b"short"), "WrongChunkLength"),
        (Read, true, error_at(4104), "OutsideRequest"),
        (Read, true, error_at(0), "OutsideRequest"),
        (BlockStatus, true, none(1), "NoBlockStatus"),
        (BlockStatus, true, status(5, &[]), "WrongChunkLength"),
        (BlockStatus, true, chunk(1, wire::CHUNK_BLOCK_STATUS, &[0; 13]), "WrongChunkLength"),
        (BlockStatus, true, long(wire::CHUNK_BLOCK_STATUS, 0xffff_fffc), "WrongChunkLength"),
        (BlockStatus, true, status(6, &[(1024, 0)]), "WrongContext"),
        (BlockStatus, true, status(5, &[(0, 0)]), "OutsideRequest"),
        (BlockStatus, true, status(5, &[(1024, 0), (1, 0)]), "OutsideRequest"),
    ];
    for (command, structured, says, expected) in cases {
        let error = answer(command, structured, &says).expect_err(expected);
        let found = format!("{error:?}");
        assert!(found.contains(expected), "{command} {says:02x?}: {found} is not {expected}");
    }
}

#[test]
fn only_one_status_chunk_is_taken() {
    let mut first = status(5, &[(512, 0)]);
    first[5] = 0; // not the last chunk
    let error = answer(Command::BlockStatus, true, &[first, status(5, &[(512, 0)])].concat());
    assert!(matches!(error, Err(NbdError::Protocol(Violation::WrongChunk { .. }))), "{error:?}");
}

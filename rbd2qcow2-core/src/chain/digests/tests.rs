use proptest::prelude::*;

use super::*;

struct Scratch {
    directory: tempfile::TempDir,
}

impl Scratch {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().expect("a directory") }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("digests")
    }

    fn writer(&self) -> DigestWriter {
        DigestWriter::create(&self.path(), 65536).expect("created")
    }

    fn records(&self) -> Result<Vec<DigestRecord>, DigestsError> {
        DigestReader::open(&self.path())?.collect()
    }
}

fn data(offset: u64, bytes: &[u8]) -> DigestRecord {
    DigestRecord { offset, length: bytes.len() as u64, content: Content::Data(blake3::hash(bytes)) }
}

fn zero(offset: u64, length: u64) -> DigestRecord {
    DigestRecord { offset, length, content: Content::Zero }
}

#[test]
fn segments_are_written_in_order_whatever_order_they_complete_in() {
    let scratch = Scratch::new();
    let writer = scratch.writer();
    let (first, second, third) = (writer.segment(0), writer.segment(1), writer.segment(2));
    third.add_zero(400_000..500_000);
    drop(third);
    second.add_zero(300_000..400_000);
    second.add(262_144, &[2; 100]);
    let clone = first.clone();
    std::thread::scope(|scope| {
        scope.spawn(|| clone.add(65_000, &[1; 70_000]));
        scope.spawn(|| first.add_zero(0..65_000));
    });
    drop((first, second));
    drop(clone);
    let info = writer.finish().expect("finished");
    let expected = [
        zero(0, 65_000),
        data(65_000, &[1; 536]),
        data(65_536, &[1; 65_536]),
        data(131_072, &[1; 3928]),
        data(262_144, &[2; 100]),
        // One run, over the border of two segments.
        zero(300_000, 200_000),
    ];
    assert_eq!(scratch.records().expect("valid"), expected);
    info.check_file(&scratch.path()).expect("the same file");
    assert_eq!(info.bytes, 56 + 48 * 6);
}

#[test]
fn long_runs_of_zeroes_are_split() {
    let scratch = Scratch::new();
    let writer = scratch.writer();
    writer.segment(0).add_zero(512..(16 << 40));
    writer.finish().expect("finished");
    let records = scratch.records().expect("valid");
    assert_eq!(records.len(), 8192);
    assert_eq!(records[1], zero(512 + ZERO_RECORD_MAX, ZERO_RECORD_MAX));
    assert_eq!(records[8191].end(), 16 << 40);
}

#[test]
fn a_layer_without_content_has_digests_too() {
    let scratch = Scratch::new();
    let info = scratch.writer().finish().expect("finished");
    assert_eq!((info.bytes, scratch.records().expect("valid")), (56, vec![]));
}

#[test]
fn chunks_follow_the_cluster_size() {
    for (cluster_size, chunk_size) in [(512, 65536), (65536, 65536), (131_072, 131_072), (2 << 20, 2 << 20)] {
        let scratch = Scratch::new();
        let writer = DigestWriter::create(&scratch.path(), cluster_size).expect("created");
        assert_eq!(writer.chunk_size(), chunk_size);
        writer.finish().expect("finished");
        assert_eq!(DigestReader::open(&scratch.path()).expect("opened").chunk_size(), chunk_size);
    }
}

#[test]
fn an_unfinished_file_is_not_believed() {
    let scratch = Scratch::new();
    let writer = scratch.writer();
    writer.segment(0).add(0, &[1; 100]);
    drop(writer);
    assert!(scratch.records().is_err());
}

fn reason(result: Result<DigestsInfo, ChainError>) -> String {
    match result {
        Err(ChainError::Digests { cause, .. }) => cause.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn segments_handed_over_wrongly_fail_the_layer() {
    let scratch = || Scratch::new().writer();
    let writer = scratch();
    let held = writer.segment(0);
    assert!(reason(writer.finish()).contains("segment 0 wrongly: it is not complete"));
    drop(held);
    let writer = scratch();
    drop(writer.segment(1));
    assert!(reason(writer.finish()).contains("segment 0 wrongly: it is not complete"));
    let writer = scratch();
    drop(writer.segment(0));
    drop(writer.segment(0));
    assert!(reason(writer.finish()).contains("segment 0 wrongly: its number was given twice"));
    let writer = scratch();
    writer.segment(0).add(0, &[1; 100]);
    writer.segment(1).add(99, &[1; 100]);
    assert!(reason(writer.finish()).contains("segment 1 wrongly: it overlaps"));
}

#[test]
fn a_full_disk_is_reported_at_the_end() {
    let full = File::options().write(true).open("/dev/full").expect("every Linux has it");
    let writer = DigestWriter::on(full, Path::new("/dev/full"), 65536);
    for number in 0..1000 {
        writer.segment(number).add(number * 65536, &[1; 512]);
    }
    assert_eq!(reason(writer.finish()), "writing failed");
}

#[test]
fn newer_segments_wait_while_too_much_is_held() {
    let scratch = Scratch::new();
    let writer = scratch.writer();
    let oldest = writer.segment(0);
    let newer = writer.segment(1);
    for index in 0..=HELD_RECORDS_MAX as u64 {
        newer.add_zero(1000 + index * 2..1001 + index * 2);
    }
    drop(newer);
    let last = 1001 + HELD_RECORDS_MAX as u64 * 2;
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| writer.segment(2).add_zero(last + 1..last + 2));
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!waiter.is_finished(), "nothing bounds what is held");
        drop(oldest);
        waiter.join().expect("it goes on");
    });
    writer.finish().expect("finished");
    assert_eq!(scratch.records().expect("valid").len(), HELD_RECORDS_MAX + 2);
}

/// A file that holds data, zeroes and two records in one chunk.
fn sample() -> (Vec<u8>, DigestsInfo) {
    let scratch = Scratch::new();
    let writer = scratch.writer();
    let segment = writer.segment(0);
    segment.add(512, &[1; 100]);
    segment.add(1024, &[2; 100]);
    segment.add_zero(65_536..200_000);
    drop(segment);
    let info = writer.finish().expect("finished");
    (std::fs::read(scratch.path()).expect("readable"), info)
}

fn read(bytes: &[u8]) -> Result<Vec<DigestRecord>, DigestsError> {
    DigestReader::new(bytes, bytes.len() as u64)?.collect()
}

#[test]
fn every_flipped_bit_is_noticed() {
    let (bytes, info) = sample();
    assert_eq!(read(&bytes).expect("valid").len(), 3);
    assert_eq!(info.blake3, blake3::hash(&bytes));
    for index in 0..bytes.len() {
        for bit in 0..8 {
            let mut damaged = bytes.clone();
            damaged[index] ^= 1 << bit;
            assert!(read(&damaged).is_err(), "bit {bit} of byte {index} makes no difference");
        }
    }
    for length in 0..bytes.len() {
        assert!(read(&bytes[..length]).is_err(), "cut off at {length}");
    }
}

#[test]
fn impossible_records_are_rejected_whatever_the_checksum_says() {
    let raw = |offset: u64, length: u32, kind: u32, blake3: [u8; 32]| RawRecord {
        offset: offset.into(),
        length: length.into(),
        kind: kind.into(),
        blake3,
    };
    let cases = [
        (raw(0, 0, KIND_ZERO, [0; 32]), "it covers nothing"),
        (raw(u64::MAX, 2, KIND_ZERO, [0; 32]), "it ends behind 2^64"),
        (raw(99, 100, KIND_ZERO, [0; 32]), "it does not follow the one before"),
        (raw(65_000, 1000, KIND_DATA, [1; 32]), "its data do not lie in one chunk"),
        (raw(100, 100, KIND_ZERO, [1; 32]), "it has a hash, but stands for zeroes"),
        (raw(100, 100, 3, [0; 32]), "its kind is unknown"),
    ];
    for (record, expected) in cases {
        let header = RawHeader { magic: MAGIC, version: VERSION.into(), chunk_size: 65536.into() };
        let before = raw(0, 100, KIND_ZERO, [0; 32]);
        let mut bytes = [header.as_bytes(), before.as_bytes(), record.as_bytes()].concat();
        bytes.extend(2u64.to_be_bytes());
        let hash = blake3::hash(&bytes);
        bytes.extend(hash.as_bytes());
        match read(&bytes) {
            Err(DigestsError::Record { index: 1, reason }) => assert_eq!(reason, expected),
            other => panic!("{expected}: {other:?}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Against the naive model: one pass over all pieces in order.
    #[test]
    fn records_are_those_of_one_thread(pieces in prop::collection::vec((0..3u8, 1..100_000usize), 0..30), shuffle in any::<u64>()) {
        let mut expected: Vec<DigestRecord> = Vec::new();
        let mut handed = Vec::new();
        let mut offset = 0u64;
        for (number, (kind, length)) in pieces.iter().enumerate() {
            let end = offset + *length as u64;
            let content = vec![u8::try_from(number).expect("few") + 1; *length];
            handed.push((number as u64 / 4, *kind, offset, content.clone()));
            match kind {
                0 => {}
                1 => match expected.last_mut() {
                    Some(last) if last.content == Content::Zero && last.end() == offset => last.length += *length as u64,
                    _ => expected.push(zero(offset, *length as u64)),
                },
                _ => {
                    let mut at = offset;
                    while at < end {
                        let stop = end.min((at / 65536 + 1) * 65536);
                        expected.push(data(at, &vec![content[0]; usize::try_from(stop - at).expect("small")]));
                        at = stop;
                    }
                }
            }
            offset = end;
        }
        let scratch = Scratch::new();
        let writer = scratch.writer();
        let segments: Vec<_> = (0..handed.len().div_ceil(4) as u64).map(|number| writer.segment(number)).collect();
        // Any order will do.
        handed.sort_by_key(|(_, _, offset, _)| blake3::hash(&[offset.to_be_bytes(), shuffle.to_be_bytes()].concat()).as_bytes()[0]);
        for (number, kind, offset, content) in &handed {
            let segment = &segments[usize::try_from(*number).expect("small")];
            match kind {
                0 => {}
                1 => segment.add_zero(*offset..offset + content.len() as u64),
                _ => segment.add(*offset, content),
            }
        }
        let mut segments = segments;
        while !segments.is_empty() {
            segments.swap_remove(usize::try_from(shuffle % segments.len() as u64).expect("small"));
        }
        writer.finish().expect("finished");
        prop_assert_eq!(scratch.records().expect("valid"), expected);
    }

    #[test]
    fn the_reader_survives_anything(bytes in prop::collection::vec(any::<u8>(), 0..400), frame in any::<bool>()) {
        let (mut sample, _) = sample();
        if frame {
            sample.splice(16..16, bytes);
            prop_assert!(sample.len() == 56 + 48 * 3 || read(&sample).is_err());
        } else {
            prop_assert!(read(&bytes).is_err());
        }
    }
}

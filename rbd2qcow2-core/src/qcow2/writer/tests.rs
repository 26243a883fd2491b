use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::buffer::BufferPool;
use crate::qcow2::chain::ChainReader;
use crate::qcow2::check::check;
use crate::qcow2::layer::{LayerReader, Piece};

const CLUSTER: u64 = 64 << 10;

fn spec(directory: &Path) -> FileSpec {
    FileSpec {
        path: directory.join("layer"),
        virtual_size: 16 * CLUSTER,
        backing: None,
        cluster_bits: ClusterBits::new(16).expect("in range"),
        extended_l2: true,
        compression_type: CompressionType::Zstd,
    }
}

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

fn create(spec: &FileSpec) -> Qcow2Writer {
    Qcow2Writer::create(spec.clone()).expect("created")
}

#[test]
fn what_the_format_does_not_allow_is_refused_and_leaves_no_file() {
    let directory = directory();
    let good = spec(directory.path());
    let small = |bits| ClusterBits::new(bits).expect("in range");
    let named = |name: &str| FileSpec { backing: Some(name.to_owned()), ..good.clone() };
    let cases = [
        (FileSpec { virtual_size: 1000, ..good.clone() }, "a virtual size of 1000 bytes"),
        (FileSpec { virtual_size: 1 << 62, ..good.clone() }, "larger clusters allow larger images"),
        (
            FileSpec { cluster_bits: small(9), extended_l2: false, virtual_size: 129 << 30, ..good.clone() },
            "clusters of 512 bytes",
        ),
        (FileSpec { cluster_bits: small(13), ..good.clone() }, "cannot have subclusters"),
        (named(""), "cannot be the name"),
        (named("a/b"), "cannot be the name"),
        (named("nbd:x"), "cannot be the name"),
        (named(&"x".repeat(1024)), "cannot be the name"),
        (FileSpec { cluster_bits: small(9), extended_l2: false, ..named(&"x".repeat(500)) }, "does not fit"),
    ];
    for (spec, words) in cases {
        let error = Qcow2Writer::create(spec).expect_err(words).to_string();
        assert!(error.contains(words), "{error}");
        assert_eq!(std::fs::read_dir(directory.path()).expect("a directory").count(), 0);
    }
    create(&good);
    let error = Qcow2Writer::create(good.clone()).expect_err("it exists");
    assert!(matches!(error, WriteError::Create(_)), "{error}");
    let mode = std::fs::metadata(&good.path).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn a_cluster_is_written_once() {
    let directory = directory();
    let data = vec![7; 2 * 65536];
    let all = Subclusters::from_bits(1, 2).expect("disjoint");
    type Write<'a> = &'a dyn Fn(&Qcow2Writer) -> Result<(), WriteError>;
    let write: [Write<'_>; 4] = [
        &|file| file.write_clusters(3, &data),
        &|file| file.write_zeroes(4..5),
        &|file| file.write_compressed(4, &[1, 2, 3]),
        &|file| file.write_subclusters(4, all, SubclusterData { offset: 4 * CLUSTER, bytes: &data }),
    ];
    for first in write {
        for second in write {
            let file = create(&spec(directory.path()));
            first(&file).expect("written");
            let error = second(&file).expect_err("twice");
            assert!(matches!(error, WriteError::Twice { .. }), "{error}");
            assert!(matches!(file.finish(), Err(WriteError::Aborted)), "what has failed cannot be finished");
            std::fs::remove_file(file.path()).expect("removed");
        }
    }
    let file = create(&spec(directory.path()));
    let error = file.write_zeroes(15..17).expect_err("behind the end").to_string();
    assert!(error.contains("0x100000"), "{error}");
}

#[test]
fn nothing_is_written_after_an_abort_or_the_end() {
    let directory = directory();
    let refuses = |file: &Qcow2Writer| {
        assert!(matches!(file.write_clusters(0, &[7; 65536]), Err(WriteError::Aborted)));
        assert!(matches!(file.write_zeroes(1..2), Err(WriteError::Aborted)));
        assert!(matches!(file.write_compressed(2, &[1]), Err(WriteError::Aborted)));
        assert!(matches!(file.finish(), Err(WriteError::Aborted)));
    };
    let file = create(&spec(directory.path()));
    file.abort();
    refuses(&file);
    std::fs::remove_file(file.path()).expect("removed");
    let file = create(&spec(directory.path()));
    file.finish().expect("finished");
    refuses(&file);
    assert!(LayerReader::open(file.path()).is_ok());
}

/// Before the header is there, nobody takes the file for an image.
#[test]
fn the_header_comes_last() {
    let directory = directory();
    let file = create(&spec(directory.path()));
    file.write_clusters(0, &[7; 65536]).expect("written");
    assert!(Header::read(file.path()).is_err());
    file.finish().expect("finished");
    let header = Header::read(file.path()).expect("a header");
    assert_eq!((header.virtual_size, header.extended_l2), (16 * CLUSTER, true));
    // Ends with the refcount table, which is the last of all that takes space.
    let length = std::fs::metadata(file.path()).expect("there").len();
    assert_eq!(length, header.refcount_table.offset + header.refcount_table.entries * 8);
}

/// Pieces that share a cluster of the file must be counted.
#[test]
fn a_cluster_of_the_file_takes_as_many_pieces_as_can_be_counted() {
    let directory = directory();
    let spec = FileSpec {
        cluster_bits: ClusterBits::new(21).expect("in range"),
        virtual_size: 70_000 << 21,
        ..spec(directory.path())
    };
    let file = create(&spec);
    for cluster in 0..70_000 {
        file.write_compressed(cluster, &[0x55]).expect("written");
    }
    file.finish().expect("finished");
    let bytes = std::fs::read(file.path()).expect("readable");
    let number = |offset: u64| u64::from_be_bytes(*bytes[index(offset)..].first_chunk().expect("there"));
    let header = Header::read(file.path()).expect("a header");
    let block = number(header.refcount_table.offset);
    let counts: Vec<u16> =
        bytes[index(block)..][..40].as_chunks().0.iter().map(|c| u16::from_be_bytes(*c)).collect();
    let packed: Vec<u16> = counts.iter().copied().filter(|count| *count > 1).collect();
    assert_eq!(packed, [0x7ffe, 0x7ffe, 4468], "{counts:?}");
}

#[test]
fn zeroes_take_tables_only() {
    // 256 L2 tables, of which 128 are kept in memory.
    const SIZE: u64 = 1 << 36;
    let directory = directory();
    let spec = FileSpec { virtual_size: SIZE, ..spec(directory.path()) };
    let file = create(&spec);
    file.write_zeroes(1..SIZE / CLUSTER - 1).expect("written");
    file.finish().expect("finished");
    let layer = LayerReader::open(file.path()).expect("a layer");
    let pieces: Vec<_> = layer.map(0..SIZE).expect("in range").map(Result::unwrap).collect();
    let end = SIZE - CLUSTER;
    let expected = [(0..CLUSTER, Piece::Absent), (CLUSTER..end, Piece::Zero), (end..SIZE, Piece::Absent)];
    assert_eq!(pieces, expected);
    // Header, L1 table, L2 tables, a refcount block and the refcount table.
    let length = std::fs::metadata(file.path()).expect("there").len();
    assert_eq!(length, (256 + 4) * CLUSTER);
}

/// A table at the very end of the file was not all there yet when its last pages are empty.
#[test]
fn tables_are_read_back_from_the_end_of_the_file() {
    let directory = directory();
    let per_table = CLUSTER / 16;
    let spec = FileSpec { virtual_size: 2 * per_table * CLUSTER, ..spec(directory.path()) };
    let file = create(&spec);
    for round in 0..3 {
        for cluster in [round, per_table + round] {
            file.write_zeroes(cluster..cluster + 1).expect("written");
        }
    }
    file.finish().expect("finished");
    let layer = LayerReader::open(file.path()).expect("a layer");
    let zeroes = layer.map(0..spec.virtual_size).expect("in range").map(Result::unwrap);
    let zeroes: Vec<_> = zeroes.filter(|(_, piece)| *piece == Piece::Zero).map(|(range, _)| range).collect();
    let second = per_table * CLUSTER;
    assert_eq!(zeroes, [0..3 * CLUSTER, second..second + 3 * CLUSTER]);
}

/// The L1 table of a huge image is larger than the memory that tables are put together in.
#[test]
fn the_largest_l1_table_is_written() {
    let directory = directory();
    for size in [(64 << 30) + CLUSTER, 128 << 30] {
        let spec = FileSpec {
            cluster_bits: ClusterBits::new(9).expect("in range"),
            virtual_size: size,
            extended_l2: false,
            ..spec(directory.path())
        };
        let file = create(&spec);
        let last = size / 512 - 1;
        file.write_clusters(0, &[1; 512]).expect("written");
        file.write_clusters(last / 2, &[2; 512]).expect("written");
        file.write_clusters(last, &[3; 512]).expect("written");
        file.finish().expect("finished");
        let layer = LayerReader::open(file.path()).expect("a layer");
        let structure = check(&layer, &Cancel::new(), &mut |_| {}).expect("checked");
        assert!(structure.is_clean(), "{structure:?}");
        let chain = ChainReader::open(&[file.path().to_owned()]).expect("a chain");
        for (cluster, byte) in [(0, 1), (1, 0), (last / 2, 2), (last, 3)] {
            let mut found = [9; 512];
            chain.read_at(cluster * 512, &mut found).expect("readable");
            assert_eq!(found, [byte; 512], "cluster {cluster}");
        }
        std::fs::remove_file(file.path()).expect("removed");
    }
}

/// A file system may take the flag for direct writes, and then refuse the writes.
#[test]
fn direct_writes_that_are_refused_go_through_the_page_cache() {
    let directory = directory();
    let path = directory.path().join("file");
    let mut output = Output::create(&path, CLUSTER).expect("created");
    // Something that answers EINVAL to whatever is no number.
    let refusing = std::fs::OpenOptions::new().write(true).open("/proc/self/oom_score_adj");
    output.set_direct(refusing.expect("on Linux"));
    let pool = BufferPool::new(1 << 20);
    // Shorter ones are not tried.
    let mut buffer = pool.get(131_072, &Cancel::new()).expect("not cancelled");
    buffer.fill(b'x');
    output.write_at(4096, &buffer).expect("written");
    assert!(output.direct_is_refused(), "it was not asked");
    assert_eq!(std::fs::metadata(&path).expect("there").len() % ALIGNMENT as u64, 0, "grown by whole pages");
    output.write_at(100, b"tail").expect("written");
    output.finish(150_000).expect("finished");
    let bytes = std::fs::read(&path).expect("readable");
    assert_eq!(bytes.len(), 150_000);
    assert!(bytes[4096..135_168].iter().all(|byte| *byte == b'x'));
    assert_eq!(&bytes[100..104], b"tail");
    assert_eq!(bytes.iter().filter(|byte| **byte != 0).count(), 131_076);
}

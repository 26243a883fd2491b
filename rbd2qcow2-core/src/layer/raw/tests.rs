#![allow(clippy::cast_possible_truncation, reason = "offsets in test data are small")]

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use bytes::Bytes;

use super::*;
use crate::buffer::BufferPool;

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().expect("a directory")
}

fn data(offset: u64, length: u64) -> Extent {
    Extent { offset, length, kind: ExtentKind::Data }
}

/// A patch of data that are all `byte`.
fn patch(offset: u64, length: usize, byte: u8) -> Patch {
    Patch { offset, data: Bytes::from(vec![byte; length]), pieces: vec![data(offset, length as u64)] }
}

#[test]
fn data_go_to_their_places_and_the_rest_is_a_hole() {
    let directory = directory();
    let path = directory.path().join("raw");
    let size = (64 << 20) + 5;
    let file = RawFile::create(&path, size).expect("created");
    assert_eq!(std::fs::metadata(&path).expect("there").len(), size);
    // From many threads, and two pieces with anything between them in one call.
    std::thread::scope(|scope| {
        for number in 0..8_u8 {
            let file = &file;
            scope.spawn(move || file.write(patch(u64::from(number) * (8 << 20), 4096, number + 1)));
        }
    });
    let gap = Bytes::from([[9; 4096], [0xee; 4096], [9; 4096]].concat());
    let zero = Extent { offset: 1 << 20, length: 1 << 20, kind: ExtentKind::Zero };
    let pieces = vec![data(4096, 4096), data(12288, 4096), zero];
    let held = file.write(Patch { offset: 4096, data: gap, pieces: pieces.clone() }).expect("written");
    assert_eq!(held, pieces);
    file.finish().expect("finished");
    let mut expected = vec![0; size as usize];
    for number in 0..8 {
        expected[number * (8 << 20)..][..4096].fill(number as u8 + 1);
    }
    expected[4096..8192].fill(9);
    expected[12288..16384].fill(9);
    assert!(std::fs::read(&path).expect("readable") == expected);
    let metadata = std::fs::metadata(&path).expect("there");
    assert!(metadata.blocks() * 512 < 1 << 20, "{} bytes taken", metadata.blocks() * 512);
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o600);
}

/// The copy pads the last sector; from aligned memory the file's whole pages go past the page cache.
#[test]
fn the_end_is_the_image_s() {
    let directory = directory();
    for size in [1, 511, 512, 4095, 4096, 4097, 9000] {
        let path = directory.path().join(format!("raw{size}"));
        let file = RawFile::create(&path, size).expect("created");
        let padded = size.next_multiple_of(512) as usize;
        let mut buffer = BufferPool::new(1 << 20).get(padded, &Cancel::new()).expect("not cancelled");
        buffer.fill(7);
        let pieces = vec![data(0, padded as u64)];
        file.write(Patch { offset: 0, data: buffer.freeze(), pieces }).expect("written");
        file.finish().expect("finished");
        assert!(std::fs::read(&path).expect("readable") == vec![7; size as usize], "{size}");
    }
}

#[test]
fn an_image_of_no_bytes_is_an_empty_file() {
    let directory = directory();
    let path = directory.path().join("raw");
    RawFile::create(&path, 0).expect("created").finish().expect("finished");
    assert_eq!(std::fs::metadata(&path).expect("there").len(), 0);
}

#[test]
fn nothing_is_overwritten() {
    let directory = directory();
    let path = directory.path().join("raw");
    std::fs::write(&path, "precious").expect("written");
    let error = RawFile::create(&path, 5).expect_err("it exists");
    assert!(matches!(error, LayerError::Create { .. }), "{error:?}");
    assert_eq!(std::fs::read(&path).expect("readable"), b"precious");
}

/// No file has an offset of this size.
#[test]
fn a_file_that_cannot_be_so_long_is_not_begun() {
    let directory = directory();
    let path = directory.path().join("raw");
    let error = RawFile::create(&path, 1 << 63).expect_err("too long");
    assert!(crate::error::Causes(&error).to_string().contains("9223372036854775808"), "{error:?}");
    assert!(!path.exists());
}

#[test]
fn an_aborted_file_takes_nothing_more() {
    let directory = directory();
    let file = RawFile::create(&directory.path().join("raw"), 1 << 20).expect("created");
    file.abort();
    assert!(matches!(file.write(patch(0, 4096, 1)), Err(LayerError::Write { .. })));
    assert!(matches!(file.finish(), Err(LayerError::Finish { .. })));
}

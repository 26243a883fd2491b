#![allow(clippy::cast_possible_truncation, reason = "offsets in test data are small")]

use proptest::prelude::*;

use super::*;
use crate::buffer::BufferPool;
use crate::cancel::Cancel;
use crate::layer::native::testing::{cases, form, image, write_chain};

proptest! {
    #![proptest_config(cases(32))]
    #[test]
    fn what_is_not_reported_is_zero_and_all_reads_as_it_is(
        steps in prop::collection::vec((form(), image()), 1..4), align in 0_u32..28
    ) {
        let directory = tempfile::tempdir().unwrap();
        let points = write_chain(directory.path(), &steps);
        let paths: Vec<_> = points.iter().map(|(path, _)| path).collect();
        let chain = ChainReader::open(&paths).unwrap();
        let content = &points[0].1;
        let source = ChainSource::new(&chain, content.len() as u64);
        prop_assert_eq!(source.size(), content.len() as u64);
        let mut found = Vec::new();
        let mut end = 0;
        for segment in source.segments(1 << align) {
            let segment = segment.unwrap();
            prop_assert_eq!(segment.start, end);
            prop_assert!(segment.end > end && segment.start.is_multiple_of(1 << align));
            end = segment.end;
            source.diff(segment, &mut found).unwrap();
        }
        prop_assert_eq!(end, source.size());
        let mut zeroed = content.clone();
        let pool = BufferPool::new(4 << 20);
        for extent in &found {
            prop_assert_eq!(extent.kind, ExtentKind::Data);
            let range = extent.offset as usize..extent.end() as usize;
            zeroed[range.clone()].fill(0);
            let mut buffer = pool.get(range.len(), &Cancel::new()).unwrap();
            source.read(extent.offset, &mut buffer).unwrap();
            prop_assert!(buffer[..] == content[range]);
        }
        prop_assert!(zeroed.iter().all(|byte| *byte == 0));
    }
}

/// Sizes are halves of sectors at will, and many segments long.
#[test]
fn segments_are_those_of_the_size() {
    let directory = tempfile::tempdir().expect("a directory");
    let step = crate::layer::native::testing::empty(directory.path(), 3 * SEGMENT + 1024);
    let chain = ChainReader::open(&[step]).expect("a chain");
    let source = ChainSource::new(&chain, 3 * SEGMENT + 700);
    let segments: Vec<_> = source.segments(4096).map(Result::unwrap).collect();
    assert_eq!(segments.len(), 4);
    assert_eq!(segments[3], 3 * SEGMENT..3 * SEGMENT + 700);
    assert_eq!(ChainSource::new(&chain, u64::MAX).size(), 3 * SEGMENT + 1024);
}

#[test]
fn an_error_names_the_layer() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = crate::layer::native::testing::empty(directory.path(), 1 << 20);
    let chain = ChainReader::open(&[&path]).expect("a chain");
    // The L1 table, in the second cluster, leads behind the end of the file.
    let file = std::fs::File::options().write(true).open(&path).expect("writable");
    std::os::unix::fs::FileExt::write_all_at(&file, &(1_u64 << 63 | 1 << 40).to_be_bytes(), 128 << 10)
        .expect("written");
    let source = ChainSource::new(&chain, 1 << 20);
    let error = source.diff(0..1 << 20, &mut Vec::new()).expect_err("damaged");
    let text = crate::error::Causes(&error).to_string();
    assert!(text.contains(path.to_str().expect("UTF-8")) && text.contains("L1 table"), "{text}");
}

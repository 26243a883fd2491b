//! A whole layer: its header, tables, compressed clusters and refcounts.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use rbd2qcow2_core::cancel::Cancel;
use rbd2qcow2_core::qcow2::check::check;
use rbd2qcow2_core::qcow2::layer::{LayerReader, Piece};

/// How much of an image is mapped, whatever its size.
const MAPPED: u64 = 64 << 20;

/// How much is read of each of the first pieces.
const READ: u64 = 8 << 10;

fuzz_target!(|bytes: &[u8]| {
    let Ok(layer) = LayerReader::from_source(Path::new("input"), bytes.to_vec(), bytes.len() as u64) else {
        return;
    };
    // Damage is a finding; a layer without any, and one that cannot be read, are results too.
    let _ = check(&layer, &Cancel::new(), &mut |_| {});
    let size = layer.virtual_size().min(MAPPED);
    let mut end = 0;
    let mut last = None;
    for (index, piece) in layer.map(0..size).expect("in range").enumerate() {
        let Ok((range, piece)) = piece else {
            return;
        };
        assert!(range.start == end && range.end > end && range.end <= size);
        assert_ne!(last, Some(piece), "neighbours differ");
        (end, last) = (range.end, Some(piece));
        if index >= 16 {
            continue;
        }
        let mut buf = vec![0xee; usize::try_from((range.end - range.start).min(READ)).expect("small")];
        let read = range.start..range.start + buf.len() as u64;
        let Ok(absent) = layer.read_at(read.start, &mut buf) else {
            continue;
        };
        match piece {
            Piece::Absent => assert_eq!(absent, [read]),
            Piece::Zero => assert!(absent.is_empty() && buf.iter().all(|byte| *byte == 0)),
            Piece::Data | Piece::Compressed => assert!(absent.is_empty()),
        }
    }
    assert_eq!(end, size);
});

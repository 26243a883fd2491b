//! A layer, read by the library and by a naive reader that was written from the specification.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use rbd2qcow2_fuzz::compare;
use rbd2qcow2_fuzz::image::{Image, Input, build};

fuzz_target!(|bytes: &[u8]| {
    // Either the file itself, or how to build one.
    let image =
        if bytes.starts_with(b"QFI\xfb") { Image::whole(bytes) } else { build(&mut Input(bytes), None) };
    let probe = bytes.last_chunk().map_or(0, |last| u64::from_be_bytes(*last));
    if let Some((reader, naive)) = compare::open(Path::new("input"), image) {
        compare::layer(&reader, naive, &[probe, probe >> 16, probe >> 40]);
    }
});

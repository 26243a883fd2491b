//! A file of digests that nobody vouches for.

#![no_main]

use libfuzzer_sys::fuzz_target;
use rbd2qcow2_core::chain::digests::{Content, DigestReader};

fuzz_target!(|bytes: &[u8]| {
    check(bytes);
    // The checksum stops nearly every input, so a second attempt gets one that fits.
    if let Some(end) = bytes.len().checked_sub(32) {
        let hash = blake3::hash(&bytes[..end]);
        check(&[&bytes[..end], hash.as_bytes()].concat());
    }
});

fn check(bytes: &[u8]) {
    let Ok(reader) = DigestReader::new(bytes, bytes.len() as u64) else {
        return;
    };
    let chunk = u64::from(reader.chunk_size());
    let mut end = 0;
    for record in reader.map_while(Result::ok) {
        assert!(record.offset >= end && record.length > 0);
        end = record.end();
        assert!(record.content == Content::Zero || record.offset / chunk == (end - 1) / chunk);
    }
}

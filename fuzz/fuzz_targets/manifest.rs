//! A manifest is read from whatever lies in the directory of an image.

#![no_main]

use libfuzzer_sys::fuzz_target;
use rbd2qcow2_core::chain::{ImageName, Manifest, PointName};
use serde_json::Value;

fuzz_target!(|bytes: &[u8]| {
    let (Ok(image), Ok(point)) = (ImageName::new("vm/1"), PointName::parse("20261123T173307Z")) else {
        unreachable!("both are names");
    };
    check(bytes, &image, point);
    // The checksum stops nearly every input, so a second attempt gets one that fits.
    if let Some(sealed) = seal(bytes) {
        check(&sealed, &image, point);
    }
});

/// What is accepted must be written as it was read, but for keys of newer versions.
fn check(bytes: &[u8], image: &ImageName, point: PointName) {
    if let Ok(manifest) = Manifest::parse(bytes, image, point) {
        let written = manifest.to_bytes().expect("an accepted manifest can be written");
        let again = Manifest::parse(&written, image, point).expect("and be read again");
        assert_eq!(again, manifest);
    }
}

/// Spells a JSON object as a manifest is spelled, with its checksum.
fn seal(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut value: Value = serde_json::from_slice(bytes).ok()?;
    value.as_object_mut()?.remove("checksum");
    let mut text = serde_json::to_vec_pretty(&value).ok()?;
    text.push(b'\n');
    value["checksum"] = blake3::hash(&text).to_hex().to_string().into();
    let mut sealed = serde_json::to_vec_pretty(&value).ok()?;
    sealed.push(b'\n');
    Some(sealed)
}

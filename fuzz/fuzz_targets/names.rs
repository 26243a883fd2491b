//! Names come from the cluster, from directories and from headers. Each has one spelling, and no
//! image's leads out of its directory.

#![no_main]

use libfuzzer_sys::fuzz_target;
use rbd2qcow2_core::chain::names::PointFile;
use rbd2qcow2_core::chain::{ChainId, ImageName, PointName, SnapshotName};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(image) = ImageName::from_bytes(bytes) {
        let encoded = image.encoded();
        assert!(!encoded.is_empty() && !encoded.starts_with('.') && !encoded.contains(['/', '\0', '@', ':']));
        assert_eq!(ImageName::decode(&encoded), Ok(image));
    }
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Ok(image) = ImageName::decode(text) {
        assert_eq!(image.encoded(), text);
    }
    if let Ok(point) = PointName::parse(text) {
        assert_eq!(point.to_string(), text);
        if let Ok((next, _)) = PointName::next_after(Some(point), point.timestamp()) {
            assert!(next > point);
        }
    }
    if let Ok(id) = ChainId::parse(text) {
        assert_eq!(id.to_string(), text);
    }
    if let Ok(snapshot) = SnapshotName::parse(text) {
        assert_eq!(snapshot.to_string(), text);
    }
    if let Some(file) = PointFile::parse(text) {
        assert_eq!(file.file_name(), text);
        assert!(file.partial_name().len() <= 255);
    }
    if let Some(file) = PointFile::parse_partial(text) {
        assert_eq!(file.partial_name(), text);
    }
});

//! The mark of an image that is not yet what it is to be.

use serde::{Deserialize, Serialize};

use crate::chain::names::PointName;

/// The metadata key of an image that is being restored, or whose restore was cut short. Its content is
/// no image of anything.
pub const INCOMPLETE_KEY: &[u8] = b"rbd2qcow2-incomplete";

/// What the key's value tells: a JSON object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Marker {
    /// The image whose backup is restored.
    pub(super) image: String,
    /// Its point.
    pub(super) point: String,
    /// Whether the restore created the image, and so has to give it its metadata in the end.
    pub(super) created: bool,
}

impl Marker {
    pub(super) fn new(image: &str, point: PointName, created: bool) -> Self {
        Self { image: image.to_owned(), point: point.to_string(), created }
    }

    /// The value of the metadata key.
    pub(super) fn value(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("strings and a flag")
    }

    /// What a value tells; `None` for what this program does not write.
    pub(super) fn parse(value: &[u8]) -> Option<Self> {
        serde_json::from_slice(value).ok()
    }

    /// Whether this is of the same restore.
    pub(super) fn continues(&self, other: &Self) -> bool {
        self.image == other.image && self.point == other.point
    }
}

/// What a half restored image was going to be, from the value of [`INCOMPLETE_KEY`], for messages.
#[must_use]
pub fn describe_incomplete(value: &[u8]) -> String {
    match Marker::parse(value) {
        Some(marker) => format!("{}@{}", marker.image, marker.point),
        None => format!("{:?}", String::from_utf8_lossy(value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_read_as_it_was_written() {
        let point = PointName::parse("20261122T173312Z").expect("a point");
        let marker = Marker::new("vm \"1\"", point, true);
        let value = marker.value();
        assert_eq!(
            String::from_utf8_lossy(&value),
            r#"{"image":"vm \"1\"","point":"20261122T173312Z","created":true}"#
        );
        assert_eq!(Marker::parse(&value), Some(marker.clone()));
        assert!(marker.continues(&Marker { created: false, ..marker.clone() }));
        assert!(!marker.continues(&Marker { image: "vm".into(), ..marker.clone() }));
        assert_eq!(describe_incomplete(&value), r#"vm "1"@20261122T173312Z"#);
        assert_eq!(describe_incomplete(b"yes"), r#""yes""#);
    }
}

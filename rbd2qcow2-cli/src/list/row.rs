//! One point in a listing for programs.

use jiff::Timestamp;
use rbd2qcow2_core::chain::{Catalogue, Point, PointKind};
use serde::{Serialize, Serializer};

/// A point, with `None` for what is not known of it.
///
/// Serialized it is the object of `list --json`: the keys and their order are a contract with other
/// programs.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The image's name.
    image: String,
    /// The point's name.
    point: String,
    /// `full` or `incremental`.
    kind: Option<&'static str>,
    /// The point below; `None` for a full backup.
    parent: Option<String>,
    /// When the backup was made.
    #[serde(serialize_with = "rfc3339")]
    created: Timestamp,
    /// Size that a guest sees, in bytes.
    virtual_size: Option<u64>,
    /// Bytes that the file occupies on disk.
    layer_bytes: u64,
    /// The qcow2 file.
    file: String,
    /// The RBD snapshot that the point was taken from.
    snapshot: Option<String>,
    /// The chain id.
    chain: Option<String>,
    /// The image's pool.
    pool: Option<String>,
    /// The namespace within the pool; empty for the default one.
    namespace: Option<String>,
    /// Whether it may lack changes.
    suspect: bool,
}

/// Spells a time as RFC 3339 does.
fn rfc3339<S: Serializer>(time: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(time)
}

impl Row {
    /// What is known of a point.
    pub fn new(catalogue: &Catalogue, point: &Point) -> Self {
        let record = point.manifest.as_ref().map(|manifest| &manifest.record);
        Self {
            image: catalogue.image().as_str().to_owned(),
            point: point.name.to_string(),
            kind: point.kind.map(|kind| match kind {
                PointKind::Full => "full",
                PointKind::Incremental => "incremental",
            }),
            parent: point.parent.map(|parent| parent.to_string()),
            created: created(point),
            virtual_size: point.virtual_size(),
            layer_bytes: point.layer_bytes,
            file: point.path.to_string_lossy().into_owned(),
            snapshot: point.snapshot(),
            chain: record.map(|record| record.chain.to_string()),
            pool: record.map(|record| record.pool.clone()),
            namespace: record.map(|record| record.namespace.clone()),
            suspect: catalogue.suspicion(point).is_some(),
        }
    }
}

/// When a point was made.
pub fn created(point: &Point) -> Timestamp {
    // Its name tells that too, and is all there is without a manifest.
    point.manifest.as_ref().map_or_else(|| point.name.timestamp(), |manifest| manifest.record.created)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A point of which everything is known.
    fn known() -> Row {
        Row {
            image: "vm 1".into(),
            point: "20261122T173312Z".into(),
            kind: Some("incremental"),
            parent: Some("20261121T173312Z".into()),
            created: "2026-11-22T17:33:12Z".parse().unwrap(),
            virtual_size: Some(8 << 30),
            layer_bytes: 1 << 20,
            file: "/b/vm%201/vm%201@20261122T173312Z.qcow2".into(),
            snapshot: Some("rbd2qcow2-0123abcd-20261122T173312Z".into()),
            chain: Some("0123abcd".into()),
            pool: Some("rbd".into()),
            namespace: Some(String::new()),
            suspect: false,
        }
    }

    /// A point of which nothing but its file is known.
    fn unknown() -> Row {
        Row {
            kind: None,
            point: "1700000000".into(),
            parent: None,
            virtual_size: None,
            snapshot: None,
            chain: None,
            pool: None,
            namespace: None,
            ..known()
        }
    }

    #[test]
    fn the_keys_of_json_keep_their_order() {
        assert_eq!(
            serde_json::to_string(&known()).unwrap(),
            concat!(
                r#"{"image":"vm 1","point":"20261122T173312Z","kind":"incremental","#,
                r#""parent":"20261121T173312Z","created":"2026-11-22T17:33:12Z","#,
                r#""virtual_size":8589934592,"layer_bytes":1048576,"#,
                r#""file":"/b/vm%201/vm%201@20261122T173312Z.qcow2","#,
                r#""snapshot":"rbd2qcow2-0123abcd-20261122T173312Z","chain":"0123abcd","#,
                r#""pool":"rbd","namespace":"","suspect":false}"#
            )
        );
        let unknown = serde_json::to_string(&unknown()).unwrap();
        assert!(unknown.contains(r#""kind":null,"parent":null,"created":"2026-11-22T17:33:12Z""#));
        assert!(unknown.contains(r#""virtual_size":null,"layer_bytes":1048576"#));
        assert!(
            unknown
                .ends_with(r#""snapshot":null,"chain":null,"pool":null,"namespace":null,"suspect":false}"#)
        );
    }
}

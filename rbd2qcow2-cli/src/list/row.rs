//! One point in a listing: as an object for programs and as cells for people.

use std::io::{self, Write};
use std::time::Duration;

use console::Alignment;
use indicatif::{HumanBytes, HumanDuration};
use jiff::Timestamp;
use rbd2qcow2_core::chain::{ImageName, Point, PointKind};
use serde::{Serialize, Serializer};

use crate::human;
use crate::table::{self, Column};

/// What the table tells of a point.
const COLUMNS: [Column; 8] = [
    ("IMAGE", Alignment::Left),
    ("POINT", Alignment::Left),
    ("KIND", Alignment::Left),
    ("CREATED (UTC)", Alignment::Left),
    ("AGE", Alignment::Right),
    ("SIZE", Alignment::Right),
    ("FILE SIZE", Alignment::Right),
    ("PARENT", Alignment::Left),
];

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
    /// Whether the point can be read. Not for programs: `verify` is what tells them.
    #[serde(skip)]
    sound: bool,
}

/// Spells a time as RFC 3339 does.
fn rfc3339<S: Serializer>(time: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(time)
}

impl Row {
    /// What is known of a point of `image`.
    pub fn new(image: &ImageName, point: &Point) -> Self {
        let record = point.manifest.as_ref().map(|manifest| &manifest.record);
        Self {
            image: image.as_str().to_owned(),
            point: point.name.to_string(),
            kind: point.kind.map(|kind| match kind {
                PointKind::Full => "full",
                PointKind::Incremental => "incremental",
            }),
            parent: point.parent.map(|parent| parent.to_string()),
            // A point's name tells its time too, and is all there is without a manifest.
            created: record.map_or_else(|| point.name.timestamp(), |record| record.created),
            virtual_size: point.virtual_size(),
            layer_bytes: point.layer_bytes,
            file: point.path.to_string_lossy().into_owned(),
            snapshot: point.snapshot(),
            chain: record.map(|record| record.chain.to_string()),
            pool: record.map(|record| record.pool.clone()),
            namespace: record.map(|record| record.namespace.clone()),
            sound: point.sound,
        }
    }

    /// The row's cells, with ages as of `now`.
    fn cells(&self, now: Timestamp) -> [String; COLUMNS.len()] {
        let broken = if self.sound { "" } else { ", broken" };
        [
            human::name(&self.image),
            self.point.clone(),
            format!("{}{broken}", self.kind.unwrap_or("?")),
            self.created.strftime("%F %T").to_string(),
            age(self.created, now),
            self.virtual_size.map_or_else(|| "?".to_owned(), |bytes| HumanBytes(bytes).to_string()),
            HumanBytes(self.layer_bytes).to_string(),
            self.parent.clone().unwrap_or_default(),
        ]
    }
}

/// The time since `created`, roughly. Nothing for a time to come, which a wrong clock wrote.
fn age(created: Timestamp, now: Timestamp) -> String {
    let age = Duration::try_from(now.duration_since(created));
    age.map_or_else(|_| String::new(), |age| format!("{:#}", HumanDuration(age)))
}

/// Writes the rows as a table, with totals below.
///
/// # Errors
/// What writing met.
pub fn write_table(output: &mut impl Write, rows: &[Row], now: Timestamp) -> io::Result<()> {
    if !rows.is_empty() {
        let cells: Vec<_> = rows.iter().map(|row| row.cells(now)).collect();
        table::write(output, &COLUMNS, &cells)?;
    }
    let mut images: Vec<_> = rows.iter().map(|row| &row.image).collect();
    images.dedup();
    let count = |number: usize, word| format!("{number} {word}{}", if number == 1 { "" } else { "s" });
    let bytes: u64 = rows.iter().map(|row| row.layer_bytes).sum();
    let (images, points) = (count(images.len(), "image"), count(rows.len(), "point"));
    writeln!(output, "{images}, {points}, files of {}", HumanBytes(bytes))
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
            sound: true,
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
            sound: false,
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
                r#""pool":"rbd","namespace":""}"#
            )
        );
        let unknown = serde_json::to_string(&unknown()).unwrap();
        assert!(unknown.contains(r#""kind":null,"parent":null,"created":"2026-11-22T17:33:12Z""#));
        assert!(unknown.contains(r#""virtual_size":null,"layer_bytes":1048576"#));
        assert!(unknown.ends_with(r#""snapshot":null,"chain":null,"pool":null,"namespace":null}"#));
    }

    #[test]
    fn the_table_has_totals() {
        let now = "2026-11-25T18:00:00Z".parse().unwrap();
        let mut text = Vec::new();
        write_table(&mut text, &[unknown(), known()], now).unwrap();
        let text = String::from_utf8(text).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text}");
        let words = |line: usize| lines[line].split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(words(0), "IMAGE POINT KIND CREATED (UTC) AGE SIZE FILE SIZE PARENT");
        assert_eq!(words(1), "vm 1 1700000000 ?, broken 2026-11-22 17:33:12 3d ? 1.00 MiB");
        assert_eq!(
            words(2),
            "vm 1 20261122T173312Z incremental 2026-11-22 17:33:12 3d 8.00 GiB 1.00 MiB 20261121T173312Z"
        );
        assert_eq!(lines[3], "1 image, 2 points, files of 2.00 MiB");
    }

    #[test]
    fn nothing_is_said_to_be_nothing() {
        let mut text = Vec::new();
        write_table(&mut text, &[], Timestamp::UNIX_EPOCH).unwrap();
        assert_eq!(String::from_utf8(text).unwrap(), "0 images, 0 points, files of 0 B\n");
    }

    #[test]
    fn a_point_from_the_future_has_no_age() {
        let now: Timestamp = "2026-11-22T17:33:12Z".parse().unwrap();
        assert_eq!(age(now + Duration::from_secs(5), now), "");
        assert_eq!(age(now - Duration::from_secs(50), now), "50s");
    }
}

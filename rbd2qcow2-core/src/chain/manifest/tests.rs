use proptest::prelude::*;

use super::text::{HEX_PREFIX, from_text};
use super::*;

/// A record of an image of `virtual_size` bytes in which every optional thing is set.
pub(crate) fn record(virtual_size: u64, point: PointName) -> Record {
    let chain = ChainId::parse("00c0ffee").expect("an id");
    let text = |key: &[u8], value: &[u8]| (key.to_vec(), value.to_vec());
    Record {
        chain,
        created: point.timestamp(),
        fsid: "6a2b6f0e-8c7e-4f55-9a3f-0d6f7d0f6a11".to_owned(),
        pool: "rbd".to_owned(),
        namespace: String::new(),
        image_id: "10226b8b4567".to_owned(),
        snapshot: SnapshotName { chain, point }.to_string(),
        snapshot_id: 4,
        virtual_size,
        object_size: 4 << 20,
        stripe_unit: 4 << 20,
        stripe_count: 1,
        features: Features { bits: 61, names: vec!["layering".to_owned(), "exclusive-lock".to_owned()] },
        metadata: BTreeMap::from([text(b"note", b"a\nb"), text(b"hex:\xff", b"\0\xfe")]),
        clone_parent: Some(CloneParent {
            pool: "images".to_owned(),
            namespace: "ns".to_owned(),
            image: "debian".to_owned(),
            image_id: None,
            snapshot: "base".to_owned(),
            overlap: 1 << 20,
        }),
        diff_mode: "exact".to_owned(),
        object_map: Some("ab".repeat(32)),
        objects: Some("cd".repeat(9)),
        data_extents: 1,
        data_bytes: 65536,
        zero_extents: 2,
        zero_bytes: 4096,
        writer: "native".to_owned(),
        compression: "none".to_owned(),
        cluster_size: 65536,
        extended_l2: false,
    }
}

fn point(text: &str) -> PointName {
    PointName::parse(text).expect("a point")
}

fn sample() -> Manifest {
    let name = point("20261123T173307Z");
    Manifest {
        tool: Manifest::this_tool(),
        image: ImageName::new("vm/1").expect("a name"),
        point: name,
        parent: Some(point("20261122T173312Z")),
        base: None,
        record: record(1_000_001, name),
        file_bytes: 393_216,
        layer_bytes: 200_704,
        digests: DigestsInfo { bytes: 152, blake3: blake3::hash(b"digests") },
        hold: None,
        unverified: BTreeSet::new(),
    }
}

fn parse(bytes: &[u8]) -> Result<Manifest, ManifestError> {
    let sample = sample();
    Manifest::parse(bytes, &sample.image, sample.point)
}

/// The sample after `edit`, with a checksum that fits.
fn edited(edit: impl FnOnce(&mut Value)) -> Vec<u8> {
    let mut value: Value = serde_json::from_slice(&sample().to_bytes().expect("valid")).expect("JSON");
    value.as_object_mut().expect("an object").remove("checksum");
    edit(&mut value);
    let checksum = checksum(&value);
    value["checksum"] = checksum.into();
    spell(&value)
}

#[test]
fn a_manifest_survives() {
    let bytes = sample().to_bytes().expect("valid");
    assert_eq!(parse(&bytes).expect("valid"), sample());
    let text = String::from_utf8(bytes).expect("text");
    for part in [
        "\"format\": 1",
        "\"image\": \"vm/1\"",
        "\"hex:6865783aff\": \"hex:00fe\"",
        "\"virtual_size\": 1000001",
    ] {
        assert!(text.contains(part), "{part} is missing in {text}");
    }
}

#[test]
fn every_flipped_bit_is_noticed() {
    let bytes = sample().to_bytes().expect("valid");
    for index in 0..bytes.len() {
        for bit in 0..8 {
            let mut damaged = bytes.clone();
            damaged[index] ^= 1 << bit;
            assert!(parse(&damaged).is_err(), "bit {bit} of byte {index} makes no difference");
        }
    }
}

#[test]
fn cut_off_or_extended_manifests_are_noticed() {
    let bytes = sample().to_bytes().expect("valid");
    for length in 0..bytes.len() {
        assert!(parse(&bytes[..length]).is_err(), "cut off at {length}");
    }
    assert!(parse(&[&bytes[..], b"\n"].concat()).is_err());
    let doubled = String::from_utf8(bytes).expect("text").replacen('{', "{\n  \"pool\": \"other\",", 1);
    assert!(matches!(parse(doubled.as_bytes()), Err(ManifestError::Checksum)));
}

#[test]
fn keys_of_a_newer_version_are_tolerated_and_covered_by_the_checksum() {
    let newer =
        edited(|value| value["compression_dictionary"] = serde_json::json!({"b": [1, 2.5], "a": null}));
    assert_eq!(parse(&newer).expect("tolerated"), sample());
    let changed = String::from_utf8(newer).expect("text").replace("2.5", "2.6");
    assert!(matches!(parse(changed.as_bytes()), Err(ManifestError::Checksum)));
}

#[test]
fn a_hold_comes_and_goes_and_leaves_the_rest_as_it_was() {
    let newer = edited(|value| value["dictionary"] = serde_json::json!({"b": [1, 2.5], "a": null}));
    let since: jiff::Timestamp = "2026-11-23T18:00:00Z".parse().expect("a time");
    let hold = Hold { reason: "before the \u{1b}[1mupgrade\u{1b}[0m\n".to_owned(), since };
    for bytes in [newer, sample().to_bytes().expect("valid")] {
        let held = with_hold(&bytes, &sample().image, sample().point, Some(&hold)).expect("held");
        let expected = Manifest { hold: Some(hold.clone()), ..sample() };
        assert_eq!(parse(&held).expect("valid"), expected);
        let again = Hold { reason: "another".to_owned(), ..hold.clone() };
        let again = with_hold(&held, &sample().image, sample().point, Some(&again)).expect("held");
        assert_eq!(with_hold(&again, &sample().image, sample().point, None).expect("released"), bytes);
    }
    let held = Manifest { hold: Some(hold), ..sample() };
    assert_eq!(parse(&held.to_bytes().expect("valid")).expect("valid"), held);
}

#[test]
fn what_nobody_verified_is_remembered_and_left_out_where_there_is_nothing() {
    let whole = sample().to_bytes().expect("valid");
    assert!(!String::from_utf8(whole).expect("text").contains("unverified"));
    let taken = BTreeSet::from([point("1795368792"), point("1795368999"), point("20261122T173312Z")]);
    let manifest = Manifest { unverified: taken, ..sample() };
    let bytes = manifest.to_bytes().expect("valid");
    assert_eq!(parse(&bytes).expect("valid"), manifest);
    let names = "[\n    \"1795368792\",\n    \"20261122T173312Z\",\n    \"1795368999\"\n  ]";
    let text = String::from_utf8(bytes.clone()).expect("text");
    assert!(text.contains(&format!("\"unverified\": {names}")), "{text}");
    // A hold leaves it as it is, and so does its end.
    let hold = Hold { reason: "the audit".to_owned(), since: jiff::Timestamp::UNIX_EPOCH };
    let held = with_hold(&bytes, &sample().image, sample().point, Some(&hold)).expect("held");
    assert_eq!(parse(&held).expect("valid"), Manifest { hold: Some(hold), ..manifest });
    assert_eq!(with_hold(&held, &sample().image, sample().point, None).expect("released"), bytes);
}

#[test]
fn another_format_is_named() {
    for format in [serde_json::json!(2), serde_json::json!("1"), Value::Null, serde_json::json!(1.0)] {
        let error = parse(&edited(|value| value["format"] = format)).expect_err("another format");
        assert!(matches!(error, ManifestError::Format { .. }), "{error}");
        assert!(error.to_string().contains("reads only format 1"), "{error}");
    }
    assert!(matches!(parse(b"[1]"), Err(ManifestError::Format { .. })));
}

#[test]
fn impossible_values_are_rejected() {
    type Edit = fn(&mut Value);
    let edits: [(&str, Edit); 20] = [
        ("chain", |value| value["chain"] = "C0FFEE00".into()),
        ("point", |value| value["point"] = "yesterday".into()),
        ("parent", |value| value["parent"] = "20261123T173307Z".into()),
        ("parent", |value| value["parent"] = "20271123T173307Z".into()),
        ("snapshot", |value| value["snapshot"] = "rbd2qcow2-00c0ffef-20261123T173307Z".into()),
        ("snapshot", |value| value["snapshot"] = "rbd2qcow2-00c0ffee-20261123T173306Z".into()),
        ("image", |value| value["image"] = "".into()),
        ("created", |value| value["created"] = "2026-11-23".into()),
        ("virtual_size", |value| value["virtual_size"] = i64::MAX.into()),
        ("object_size", |value| value["object_size"] = 0.into()),
        ("stripe_unit", |value| value["stripe_unit"] = (8 << 20).into()),
        ("stripe_count", |value| value["stripe_count"] = 0.into()),
        ("cluster_size", |value| value["cluster_size"] = (4 << 20).into()),
        ("digests.blake3", |value| value["digests"]["blake3"] = "00".into()),
        ("hold.since", |value| value["hold"] = serde_json::json!({"reason": "", "since": "today"})),
        ("unverified", |value| value["unverified"] = serde_json::json!(["yesterday"])),
        ("unverified", |value| value["unverified"] = serde_json::json!(["20261123T173307Z"])),
        ("unverified", |value| value["unverified"] = serde_json::json!(["1795368999", "1795368792"])),
        ("unverified", |value| value["unverified"] = serde_json::json!(["1795368999", "1795368999"])),
        ("metadata", |value| value["metadata"]["note"] = "hex:61".into()),
    ];
    for (expected, edit) in edits {
        match parse(&edited(edit)) {
            Err(ManifestError::Value { key, .. }) => assert_eq!(key, expected),
            other => panic!("{expected}: {other:?}"),
        }
    }
    let lacking = edited(|value| _ = value.as_object_mut().expect("an object").remove("fsid"));
    assert!(matches!(parse(&lacking), Err(ManifestError::Shape(_))));
}

#[test]
fn a_manifest_under_another_name_is_rejected() {
    let (sample, bytes) = (sample(), sample().to_bytes().expect("valid"));
    let other = ImageName::new("vm/2").expect("a name");
    for result in [
        Manifest::parse(&bytes, &other, sample.point),
        Manifest::parse(&bytes, &sample.image, point("20261123T173308Z")),
    ] {
        assert!(matches!(result, Err(ManifestError::Misplaced { .. })), "{result:?}");
    }
}

#[test]
fn no_invalid_manifest_is_written() {
    let mut manifest = sample();
    manifest.record.object_size = 3;
    assert!(matches!(manifest.to_bytes(), Err(ManifestError::Value { key: "object_size", .. })));
}

#[test]
fn files_are_read_within_bounds() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("manifest");
    let read = || Manifest::read(&path, &sample().image, sample().point);
    assert!(matches!(read(), Err(ManifestError::Missing)));
    std::fs::write(&path, sample().to_bytes().expect("valid")).expect("written");
    assert_eq!(read().expect("valid"), sample());
    std::fs::write(&path, vec![b' '; usize::try_from(MANIFEST_MAX).expect("small") + 1]).expect("written");
    assert!(matches!(read(), Err(ManifestError::TooLong)));
    std::fs::remove_file(&path).expect("removed");
    std::os::unix::fs::symlink("/dev/zero", &path).expect("a link");
    assert!(matches!(read(), Err(ManifestError::NotARegularFile)));
    std::fs::remove_file(&path).expect("removed");
    std::fs::create_dir(&path).expect("a directory");
    assert!(matches!(read(), Err(ManifestError::NotARegularFile)));
}

proptest! {
    #[test]
    fn metadata_survives(bytes in prop::collection::vec(any::<u8>(), 0..20), prefixed in any::<bool>()) {
        let bytes = if prefixed { [HEX_PREFIX.as_bytes(), &bytes].concat() } else { bytes };
        prop_assert_eq!(from_text(&to_text(&bytes)), Some(bytes));
    }

    #[test]
    fn metadata_has_one_spelling(text in "(hex:)?[0-9a-fA-F+ü]{0,8}") {
        if let Some(bytes) = from_text(&text) {
            prop_assert_eq!(to_text(&bytes), text);
        }
    }
}

use proptest::prelude::*;

use super::*;

fn image(name: &str) -> ImageName {
    ImageName::new(name).expect("a usable name")
}

#[test]
fn image_names_are_encoded_as_documented() {
    for (name, encoded) in [
        ("vm-1.disk_0", "vm-1.disk_0"),
        ("..", "%2E."),
        (".", "%2E"),
        (".hidden", "%2Ehidden"),
        ("a/b", "a%2Fb"),
        ("a@b", "a%40b"),
        ("100%", "100%25"),
        ("a:b", "a%3Ab"),
        ("ü", "%C3%BC"),
        ("a b\n", "a%20b%0A"),
        ("-f", "-f"),
    ] {
        assert_eq!(image(name).encoded(), encoded);
        assert_eq!(ImageName::decode(encoded), Ok(image(name)));
    }
}

#[test]
fn other_spellings_of_an_image_are_rejected() {
    for text in
        ["", "%41", "%2e.", ".", "..", ".a", "a/b", "a b", "%", "%2", "%zz", "%+1", "ü", "%FF", "%00", "a%00"]
    {
        assert!(matches!(ImageName::decode(text), Err(NameError::NotAnImage { .. })), "{text:?}");
    }
}

#[test]
fn unusable_images_are_told_apart() {
    assert_eq!(ImageName::new(""), Err(NameError::EmptyImage));
    assert!(matches!(ImageName::new("a\0"), Err(NameError::NulInImage { .. })));
    assert!(matches!(ImageName::from_bytes(b"a\xff"), Err(NameError::NotUtf8 { .. })));
    let longest = image(&"x".repeat(ENCODED_MAX));
    assert!(ImageName::new("x".repeat(ENCODED_MAX + 1)).is_err());
    let error = ImageName::new("ü".repeat(40)).expect_err("240 bytes");
    assert!(error.to_string().contains("240 bytes"), "{error}");
    // The longest names fit in a directory, for every point and kind of file.
    for point in ["20261122T173312Z", "253402207200"].map(PointName::parse) {
        for kind in FileKind::ALL {
            let file = PointFile { image: longest.clone(), point: point.clone().expect("a point"), kind };
            assert!(file.partial_name().len() <= FILE_NAME_MAX);
        }
    }
}

#[test]
fn points_have_one_spelling_each() {
    let ours = PointName::parse("20261122T173312Z").expect("a point");
    assert_eq!(ours.timestamp().to_string(), "2026-11-22T17:33:12Z");
    assert!(!ours.is_python());
    let python = PointName::parse("1795368792").expect("a point of the Python tool");
    assert_eq!(python.timestamp(), ours.timestamp());
    assert!(python.is_python() && python < ours);
    for text in [
        "",
        "Z",
        "01",
        "+1",
        "-1",
        "1.5",
        "20261122T173312",
        "20261122t173312Z",
        "20261322T173312Z",
        "20260229T000000Z",
        "20261122T240000Z",
        "20261122T173360Z",
        "2026112+T173312Z",
        "20261122 173312Z",
        "020261122T173312Z",
        "19691231T235959Z",
        "253402207201",
        "99999999999999999999999",
        "2026-11-22T17:33:12Z",
        "2026112\u{fc}173312Z",
    ] {
        assert!(matches!(PointName::parse(text), Err(NameError::NotAPoint { .. })), "{text:?}");
    }
    assert_eq!(jiff::Timestamp::MAX.as_second(), PointName::LAST_SECOND);
}

#[test]
fn a_clock_that_went_back_yields_the_last_time_plus_one_second() {
    let time = |text: &str| text.parse::<jiff::Timestamp>().expect("a time");
    let point = |text: &str| PointName::parse(text).expect("a point");
    let now = time("2026-11-22T17:33:12.9Z");
    assert_eq!(PointName::next_after(None, now), Ok((point("20261122T173312Z"), false)));
    let before = Some(point("20261122T173311Z"));
    assert_eq!(PointName::next_after(before, now), Ok((point("20261122T173312Z"), false)));
    let same = Some(point("20261122T173312Z"));
    assert_eq!(PointName::next_after(same, now), Ok((point("20261122T173313Z"), true)));
    let python = Some(point("1795368792"));
    assert_eq!(PointName::next_after(python, now), Ok((point("20261122T173313Z"), true)));
    let later = Some(point("20271231T235959Z"));
    assert_eq!(PointName::next_after(later, now), Ok((point("20280101T000000Z"), true)));
    let last = PointName::at(jiff::Timestamp::MAX).ok();
    assert!(matches!(PointName::next_after(last, now), Err(NameError::TimeOutOfRange { .. })));
    assert!(PointName::next_after(None, time("1969-12-31T23:59:59Z")).is_err());
}

#[test]
fn snapshots_of_others_are_not_ours() {
    let name = SnapshotName::parse("rbd2qcow2-00c0ffee-20261122T173312Z").expect("ours");
    assert_eq!(name.chain, ChainId::parse("00c0ffee").expect("an id"));
    assert_eq!(name.to_string(), "rbd2qcow2-00c0ffee-20261122T173312Z");
    for text in [
        "1795368792",
        "rbd2qcow2-00c0ffee-1795368792",
        "rbd2qcow2-00C0FFEE-20261122T173312Z",
        "rbd2qcow2-c0ffee-20261122T173312Z",
        "rbd2qcow2-+0c0ffee-20261122T173312Z",
        "rbd2qcow2-00c0ffee-20261122T173312Z-copy",
        "rbd2qcow2-00c0ffee-",
        "rbd2qcow2-",
        "backup-00c0ffee-20261122T173312Z",
        " rbd2qcow2-00c0ffee-20261122T173312Z",
    ] {
        assert!(matches!(SnapshotName::parse(text), Err(NameError::NotASnapshot { .. })), "{text:?}");
    }
}

#[test]
fn chain_ids_differ() {
    let drawn: std::collections::BTreeSet<_> = (0..8).map(|_| ChainId::draw().expect("random")).collect();
    assert!(drawn.len() > 4, "{drawn:?}");
}

#[test]
fn file_names_are_parsed_back() {
    let file = PointFile {
        image: image("a@b/c"),
        point: PointName::parse("20261122T173312Z").expect("a point"),
        kind: FileKind::Digests,
    };
    assert_eq!(file.file_name(), "a%40b%2Fc@20261122T173312Z.digests");
    assert_eq!(file.partial_name(), ".a%40b%2Fc@20261122T173312Z.digests.partial");
    assert_eq!(PointFile::parse_partial(&file.partial_name()), Some(file.clone()));
    assert_eq!(PointFile::parse(&file.file_name()), Some(file));
    for name in ["empty.qcow2", "a@b@20261122T173312Z.qcow2", "a@20261122T173312Z", "@1.qcow2", ".a@1.qcow2"]
    {
        assert_eq!(PointFile::parse(name), None, "{name}");
    }
    assert_eq!(PointFile::parse_partial(".a@1.qcow2"), None);
}

proptest! {
    #[test]
    fn any_image_name_survives_and_stays_in_its_directory(name in "\\PC{1,40}|[a%./@]{1,9}|[\\x01-\\x7f]{1,60}") {
        if let Ok(image) = ImageName::new(name.clone()) {
            let encoded = image.encoded();
            prop_assert!(!encoded.starts_with('.') && !encoded.contains(['/', '\0', '@', ':']));
            prop_assert_eq!(ImageName::decode(&encoded), Ok(image));
        } else {
            prop_assert!(name.len() * 3 > ENCODED_MAX);
        }
    }

    #[test]
    fn no_two_file_names_mean_one_image(a in "[aA.%2Ee/]{1,6}", b in "[aA.%2Ee/]{1,6}") {
        if let (Ok(x), Ok(y)) = (ImageName::decode(&a), ImageName::decode(&b)) {
            prop_assert_eq!(a == b, x == y);
        }
        prop_assert_eq!(a == b, image(&a).encoded() == image(&b).encoded());
    }

    #[test]
    fn points_survive_and_sort_by_time(a in 0..=PointName::LAST_SECOND, b in 0..=PointName::LAST_SECOND) {
        for spelling in [Spelling::Unix, Spelling::Utc] {
            let x = PointName::from_unix(a, spelling).expect("in range");
            let y = PointName::from_unix(b, Spelling::Utc).expect("in range");
            prop_assert_eq!(PointName::parse(&x.to_string()), Ok(x));
            prop_assert!(a == b || (x < y) == (a < b));
            let (next, _) = PointName::next_after(Some(x), y.timestamp()).unwrap_or((y, false));
            prop_assert!(next > x || a == PointName::LAST_SECOND);
        }
    }

    #[test]
    fn parsers_survive_anything(text in "\\PC{0,40}|[0-9TZ]{0,20}|rbd2qcow2-[0-9a-f]{0,9}-[0-9TZ]{0,17}") {
        if let Ok(point) = PointName::parse(&text) {
            prop_assert_eq!(point.to_string(), &text[..]);
        }
        if let Ok(snapshot) = SnapshotName::parse(&text) {
            prop_assert_eq!(snapshot.to_string(), &text[..]);
        }
        if let Some(file) = PointFile::parse(&text) {
            prop_assert_eq!(file.file_name(), &text[..]);
        }
    }
}

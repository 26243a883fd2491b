//! Kinds of images.

use std::ffi::OsString;

use rbd2qcow2_core::options::{DiffMode, Writer};
use rbd2qcow2_core::progress::Status;

use super::{MIB, small_objects};
use crate::cluster::{POOL, unique};
use crate::cluster_or_skip;
use crate::driver::{FULL_FEATURES, Layout, NO_OBJECT_MAP, Spec};
use crate::store::{Store, encoded};

/// Data here and there, a backup, changes of every kind, a backup by the other writer.
fn back_up_twice(store: &mut Store, spec: &Spec, size: u64) {
    let write = |store: &Store, at: u64, length: u64, seed| {
        let offset = at.min(size);
        store.driver.write(spec, offset, length.min(size - offset), seed).expect("a write");
    };
    write(store, 0, size / 2, 1);
    write(store, size - size / 8, size, 2);
    let first = store.back_up(spec);
    first.assert_full(None);
    write(store, size / 3, 10_000, 3);
    write(store, size - size.min(1), 1, 4);
    store.driver.discard(spec, size / 8, size / 8).expect("a discard");
    let writer = store.options.writer;
    store.options.writer = if writer == Writer::Native { Writer::QemuNbd } else { Writer::Native };
    store.back_up(spec).assert_upon(&first);
    store.options.writer = writer;
    store.check_again();
}

#[test]
fn striped_images() {
    let cluster = cluster_or_skip!("striped_images");
    for mut store in Store::of_each_writer(&cluster) {
        for (order, unit, count) in [(16, 4096, 3), (18, 65_536, 5), (14, 16_384, 2), (22, 1 << 20, 4)] {
            let layout = Layout::new(order, FULL_FEATURES).striped(unit, count);
            let size = 3 * MIB + 77_777;
            let spec = store.image("striped", size, &layout);
            back_up_twice(&mut store, &spec, size);
            assert_eq!(store.points().last().expect("a point").number("stripe_count"), count);
            store.purge(&spec);
        }
    }
}

#[test]
fn objects_of_every_size() {
    let cluster = cluster_or_skip!("objects_of_every_size");
    let mut store = Store::new(&cluster);
    for order in [12, 13, 14, 15, 16, 20, 25] {
        let size = if order < 14 { MIB } else { 4 * MIB };
        let spec = store.image("objects", size, &Layout::new(order, FULL_FEATURES));
        back_up_twice(&mut store, &spec, size);
        assert_eq!(store.points().last().expect("a point").number("object_size"), 1 << order);
        store.purge(&spec);
    }
}

#[test]
fn sizes_that_are_no_multiple_of_anything() {
    let cluster = cluster_or_skip!("sizes_that_are_no_multiple_of_anything");
    for mut store in Store::of_each_writer(&cluster) {
        for size in [1, 511, 512, 513, 4095, 4097, 65_537, 131_072 + 512, MIB + 1, 2 * MIB - 1] {
            let spec = store.image("odd-size", size, &small_objects());
            back_up_twice(&mut store, &spec, size);
            store.purge(&spec);
        }
    }
}

#[test]
fn an_image_of_size_zero() {
    let cluster = cluster_or_skip!("an_image_of_size_zero");
    for mut store in Store::of_each_writer(&cluster) {
        let spec = store.image("empty", 0, &small_objects());
        let mut last = store.back_up(&spec);
        last.assert_full(None);
        for size in [0, MIB, 0, 0, 3] {
            store.driver.resize(&spec, size).expect("a resize");
            store.driver.write(&spec, 0, size, 7).expect("a write");
            let made = store.back_up(&spec);
            made.assert_upon(&last);
            assert_eq!(made.number("virtual_size"), size);
            last = made;
        }
        store.check_again();
        store.purge(&spec);
    }
}

#[test]
fn without_object_maps_everything_is_compared() {
    let cluster = cluster_or_skip!("without_object_maps_everything_is_compared");
    let mut store = Store::new(&cluster);
    let spec = store.image("no-map", 4 * MIB, &Layout::new(16, NO_OBJECT_MAP));
    back_up_twice(&mut store, &spec, 4 * MIB);
    assert!(store.points().iter().all(|made| made.manifest["diff_mode"] == "scan"));
    store.purge(&spec);
}

#[test]
fn every_way_to_find_changes_is_recorded() {
    let cluster = cluster_or_skip!("every_way_to_find_changes_is_recorded");
    let mut store = Store::new(&cluster);
    for (mode, name) in [(DiffMode::Exact, "exact"), (DiffMode::Scan, "scan"), (DiffMode::Fast, "fast")] {
        store.options.diff = mode;
        let spec = store.image(name, 4 * MIB, &small_objects());
        back_up_twice(&mut store, &spec, 4 * MIB);
        assert_eq!(store.points().last().expect("a point").manifest["diff_mode"], name);
        store.purge(&spec);
    }
}

#[test]
fn invalid_object_maps_are_not_believed() {
    let cluster = cluster_or_skip!("invalid_object_maps_are_not_believed");
    let mut store = Store::new(&cluster);
    let spec = store.image("invalid-map", 4 * MIB, &small_objects());
    store.driver.write(&spec, 0, MIB, 1).expect("a write");
    let first = store.back_up(&spec);
    assert_eq!(first.manifest["diff_mode"], "exact");
    // What is written now is in no map that could be believed.
    store.driver.update_features(&spec, &["object-map", "fast-diff"], false).expect("features");
    store.driver.write(&spec, 2 * MIB, MIB, 2).expect("a write");
    store.driver.update_features(&spec, &["object-map", "fast-diff"], true).expect("features");
    assert!(store.driver.info(&spec, None).expect("the image").fast_diff_invalid);
    let second = store.back_up(&spec);
    second.assert_upon(&first);
    assert_eq!(second.manifest["diff_mode"], "scan");
    // Valid again, but the base's is not.
    store.driver.rebuild_object_map(&spec, None).expect("a rebuild");
    store.driver.write(&spec, 100, 1000, 3).expect("a write");
    let third = store.back_up(&spec);
    third.assert_upon(&second);
    assert_eq!(third.manifest["diff_mode"], "scan");
    // librbd merges the map of a snapshot that is removed into the next one's, which is then invalid
    // again: the base's must be rebuilt, too.
    let base = third.manifest["snapshot"].as_str().expect("a name");
    store.driver.rebuild_object_map(&spec, Some(base)).expect("a rebuild");
    for _ in 0..2 {
        assert_eq!(store.back_up(&spec).manifest["diff_mode"], "exact");
    }
    store.check_again();
    store.purge(&spec);
}

#[test]
fn an_image_in_a_namespace() {
    let cluster = cluster_or_skip!("an_image_in_a_namespace");
    let mut store = Store::new(&cluster);
    let namespace = unique("ns");
    store.driver.namespace_create(POOL, &namespace).expect("a namespace");
    let spec = Spec::in_namespace(POOL, &namespace, &unique("in-namespace"));
    store.driver.create(&spec, 2 * MIB, &small_objects()).expect("an image");
    back_up_twice(&mut store, &spec, 2 * MIB);
    // Its name in the default namespace is another image's.
    let twin = Spec::new(POOL, &spec.image);
    store.driver.create(&twin, MIB, &small_objects()).expect("an image");
    store.back_up(&twin).assert_full(Some("namespace"));
    // What was taken from the twin must not have cost the first one its snapshots.
    let kept = store.snapshot_names(&spec);
    assert_eq!(kept.len(), 1, "{kept:?}");
    store.check_again();
    store.purge(&spec);
    store.purge(&twin);
}

#[test]
fn names_of_odd_characters() {
    let cluster = cluster_or_skip!("names_of_odd_characters");
    let mut store = Store::new(&cluster);
    let pool = unique("odd-names");
    store.driver.pool_create(&pool).expect("a pool");
    let long = "x".repeat(150);
    let names = [
        " two  spaces ",
        "100%",
        "%41",
        "nbd:unix:/tmp/x",
        "a,file.driver=raw",
        ".hidden",
        "..",
        ".",
        "../../escaped",
        "/absolute",
        "at@20260101T000000Z",
        "Überraschung 日本",
        "-rf",
        "json:{}",
        "new\nline\t\"'\\",
        "#$&*?[!]",
        &long,
    ];
    for name in names {
        let spec = Spec::new(&pool, name);
        store.driver.create(&spec, MIB, &small_objects()).unwrap_or_else(|error| panic!("{name:?}: {error}"));
        back_up_twice(&mut store, &spec, MIB);
        store.purge(&spec);
    }
    // Every directory is directly below the destination, under a name of its own.
    let found = std::fs::read_dir(store.dest()).expect("the destination");
    let mut found: Vec<_> = found.map(|entry| entry.expect("an entry").file_name()).collect();
    let mut expected: Vec<OsString> = names.map(|name| encoded(&Spec::new(&pool, name)).into()).into();
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
    store.driver.pool_remove(&pool).expect("the pool can be removed");
}

#[test]
fn images_that_ask_for_it_are_skipped() {
    let cluster = cluster_or_skip!("images_that_ask_for_it_are_skipped");
    let mut store = Store::new(&cluster);
    let spec = store.image("skipped", MIB, &small_objects());
    store.driver.metadata_set(&spec, "backup-skip", "scratch space").expect("metadata");
    let report = store.run(&spec);
    assert_eq!((report.status, &report.point), (Status::Skipped, &None));
    assert!(report.reason.as_deref().is_some_and(|reason| reason.contains("scratch space")), "{report:?}");
    assert!(store.snapshot_names(&spec).is_empty() && !store.directory(&spec).exists());
    store.driver.metadata_remove(&spec, "backup-skip").expect("metadata");
    store.driver.metadata_set(&spec, "owner", "Zoë").expect("metadata");
    let made = store.back_up(&spec);
    made.assert_full(None);
    assert_eq!(made.manifest["metadata"]["owner"], "Zoë");
    store.purge(&spec);
}

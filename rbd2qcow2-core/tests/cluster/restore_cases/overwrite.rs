//! Of an image that exists only what differs is written, and all else stays.

use std::collections::BTreeSet;

use super::{MIB, OBJECT, elsewhere, small_objects};
use crate::cluster::{say, unique_image};
use crate::cluster_or_skip;
use crate::driver::{FULL_FEATURES, Info, Layout, NO_OBJECT_MAP, Spec};
use crate::random::Random;
use crate::store::Store;

const SIZE: u64 = 2 * MIB;

/// The RADOS objects that a range of an image lies in.
fn objects(info: &Info, offset: u64, length: u64) -> BTreeSet<u64> {
    let object_of = |offset: u64| {
        let row = offset / info.stripe_unit;
        let set = row / info.stripe_count / (info.object_size / info.stripe_unit);
        set * info.stripe_count + row % info.stripe_count
    };
    // Stripe units, and so objects, begin at multiples of this.
    let pages = offset / 4096..(offset + length).div_ceil(4096);
    pages.map(|page| object_of(page * 4096)).collect()
}

/// Writes, zeroes and discards at random, and a write that changes nothing. Gives the objects that hold
/// something else now, or may.
fn damage(store: &Store, spec: &Spec, random: &mut Random) -> BTreeSet<u64> {
    let info = store.driver.info(spec, None).expect("there is an image");
    let mut damaged = BTreeSet::new();
    for step in 0..6 {
        let offset = random.below(info.size - 1);
        let length = 1 + random.below(200_000.min(info.size - offset));
        match step % 3 {
            0 => store.driver.write(spec, offset, length, random.next()),
            1 => store.driver.discard(spec, offset, length),
            _ => store.driver.write_zeroes(spec, offset, length),
        }
        .expect("damaged");
        damaged.extend(objects(&info, offset, length));
    }
    let now = store.driver.read(spec, None).expect("the image");
    let at = random.below(SIZE / OBJECT) * OBJECT;
    let same = &now[at as usize..][..5000];
    store.driver.write_bytes(spec, at, same).expect("a write");
    damaged
}

#[test]
fn damage_is_mended_and_nothing_else_is_written() {
    let cluster = cluster_or_skip!("damage_is_mended_and_nothing_else_is_written");
    let mut store = Store::new(&cluster);
    let seed = std::env::var("RBD2QCOW2_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    say(&format!("damage_is_mended_and_nothing_else_is_written: RBD2QCOW2_SEED={seed}"));
    let mut random = Random::new(seed);
    let parent = store.image("parent", SIZE, &small_objects());
    store.driver.write(&parent, 0, SIZE / 2, 1).expect("a write");
    store.driver.snap_create(&parent, "base").expect("a snapshot");
    let layouts = [
        (small_objects(), false),
        (small_objects(), true),
        (Layout::new(16, NO_OBJECT_MAP), false),
        (Layout::new(16, FULL_FEATURES).striped(8192, 3), false),
        (Layout::new(13, &["layering"]), true),
    ];
    for (layout, is_clone) in layouts {
        let spec = unique_image("mended");
        if is_clone {
            store.driver.clone(&parent, "base", &spec, &layout).expect("a clone");
        } else {
            store.driver.create(&spec, SIZE, &layout).expect("created");
            store.driver.write(&spec, 0, SIZE / 2, 2).expect("a write");
        }
        store.driver.snap_create(&spec, "mine").expect("a snapshot");
        store.driver.metadata_set(&spec, "owner", "me").expect("metadata");
        let first = store.back_up(&spec);
        store.driver.write(&spec, SIZE / 4, SIZE / 2, 3).expect("a write");
        let second = store.back_up(&spec);
        let damaged = damage(&store, &spec, &mut random);
        store.driver.metadata_set(&spec, "owner", "you").expect("metadata");
        store.driver.snap_create(&spec, "damaged").expect("a snapshot");
        store.driver.close(&spec).expect("closed");
        let state = |store: &Store| {
            let info = store.driver.info(&spec, None).expect("there is an image");
            (
                info,
                store.driver.snaps(&spec).expect("snapshots"),
                store.driver.metadata(&spec).expect("metadata"),
            )
        };
        let before = state(&store);

        let report = store.restore_to(&second, &store.overwriting(&spec));
        assert_eq!(state(&store), before);
        let changed = store.driver.changes(&spec, "damaged").expect("a diff");
        let written: BTreeSet<_> =
            changed.iter().flat_map(|(offset, length)| objects(&before.0, *offset, *length)).collect();
        assert!(written.is_subset(&damaged), "{layout:?}: {written:?} of {damaged:?}, {report:?}");
        assert!(!written.is_empty() && report.unchanged_bytes < Some(SIZE), "{layout:?}: {report:?}");

        // Once more: there is nothing to do.
        store.driver.snap_create(&spec, "mended").expect("a snapshot");
        store.driver.close(&spec).expect("closed");
        let report = store.restore_to(&second, &store.overwriting(&spec));
        assert_eq!((report.bytes_written, report.zero_bytes), (0, 0), "{layout:?}: {report:?}");
        assert_eq!(store.driver.changes(&spec, "mended").expect("a diff"), []);

        // The chain goes on, from what was restored and from an older point.
        let third = store.back_up(&spec);
        third.assert_upon(&second);
        store.driver.close(&spec).expect("closed");
        store.restore_to(&first, &store.overwriting(&spec));
        store.back_up(&spec).assert_upon(&third);
        store.purge(&spec);
    }
    store.purge(&parent);
}

#[test]
fn an_image_of_another_size_and_layout() {
    let cluster = cluster_or_skip!("an_image_of_another_size_and_layout");
    let mut store = Store::new(&cluster);
    let spec = store.image("sized", 2 * MIB + 700, &small_objects());
    store.driver.write(&spec, 0, 100_000, 1).expect("a write");
    store.driver.write(&spec, 2 * MIB, 700, 2).expect("a write");
    store.driver.metadata_set(&spec, "owner", "me").expect("metadata");
    let made = store.back_up(&spec);
    store.driver.close(&spec).expect("closed");
    let layouts = [
        Layout::default(),
        Layout::new(12, FULL_FEATURES),
        Layout::new(16, NO_OBJECT_MAP).striped(16_384, 4),
        Layout::new(24, &["layering"]),
        Layout::new(20, &["layering", "exclusive-lock", "journaling"]),
    ];
    for layout in &layouts {
        let target = elsewhere();
        store.driver.create(&target, 5 * MIB + 1, layout).expect("created");
        store.driver.metadata_set(&target, "owner", "you").expect("metadata");
        store.driver.write(&target, 0, 5 * MIB + 1, 3).expect("a write");
        store.driver.snap_create(&target, "kept").expect("a snapshot");
        let kept = store.driver.read(&target, Some("kept")).expect("the snapshot");
        store.driver.close(&target).expect("closed");
        // It keeps its size, and is zeroes behind the point's end.
        store.restore_to(&made, &store.overwriting(&target));
        let info = store.driver.info(&target, None).expect("there is an image");
        assert_eq!(info.size, 5 * MIB + 1, "{layout:?}");
        // Or is cut off, or made longer.
        for size in [2 * MIB + 700, 3 * MIB] {
            let mut wanted = store.overwriting(&target);
            wanted.overrides.size = Some(size);
            wanted.overrides.metadata = [(b"ticket".to_vec(), b"17".to_vec())].into();
            store.restore_to(&made, &wanted);
            let now = store.driver.info(&target, None).expect("there is an image");
            assert_eq!(now, Info { size, ..info.clone() }, "{layout:?}");
        }
        assert!(store.driver.read(&target, Some("kept")).expect("the snapshot") == kept, "{layout:?}");
        // What was asked for is there, and what the backup tells is not.
        let metadata: Vec<_> = store.driver.metadata(&target).expect("metadata").into_iter().collect();
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        assert_eq!(metadata, [pair("owner", "you"), pair("ticket", "17")], "{layout:?}");
        store.purge(&target);
    }
    store.purge(&spec);
}

/// An image shrunk to nothing may have a past: it is not one that a restore has just made.
#[test]
fn an_image_of_no_size() {
    let cluster = cluster_or_skip!("an_image_of_no_size");
    let mut store = Store::new(&cluster);
    let (spec, made) = super::image_with_point(&mut store, "sizeless");
    let target = elsewhere();
    store.driver.create(&target, 0, &Layout::default()).expect("created");
    store.driver.close(&target).expect("closed");
    store.restore_to(&made, &store.target(&target));
    store.driver.snap_create(&target, "past").expect("a snapshot");
    store.driver.resize(&target, 0).expect("a resize");
    store.driver.close(&target).expect("closed");
    let error = store.restore(&made, &store.target(&target)).expect_err("it has a snapshot").to_string();
    assert!(error.contains("exists; --overwrite"), "{error}");
    let mut wanted = store.overwriting(&target);
    wanted.overrides.size = Some(made.size());
    store.restore_to(&made, &wanted);
    assert_eq!(store.driver.snaps(&target).expect("snapshots").len(), 1);
    store.purge(&target);
    store.purge(&spec);
}

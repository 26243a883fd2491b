//! Object maps that deny objects which exist, and are flagged valid. A point must be what clients see once
//! the maps are repaired, or the run must say what is wrong.

use rbd2qcow2_core::options::DiffMode;

use super::{MIB, small_objects};
use crate::cluster_or_skip;
use crate::driver::{FULL_FEATURES, Layout, Spec};
use crate::held::{Night, night};
use crate::random::Random;
use crate::store::{Store, told};

const OBJECT: u64 = 64 << 10;

/// What a refusal must name.
const REMEDY: &[&str] = &["rbd object-map rebuild"];

const MODES: [DiffMode; 2] = [DiffMode::Exact, DiffMode::Scan];

/// An image of 4 MiB, 2 of them data, with a head whose map denies all of them. A snapshot from before the
/// map was switched on has a map that denies everything, too, and is flagged; a rollback copies the map
/// and not the flag.
fn lying(store: &Store, name: &str) -> Spec {
    let spec = store.image(name, 4 * MIB, &Layout::new(16, &["layering", "exclusive-lock", "deep-flatten"]));
    store.driver.write(&spec, 0, 2 * MIB, 1).expect("a write");
    store.driver.snap_create(&spec, "early").expect("a snapshot");
    store.driver.update_features(&spec, &["object-map", "fast-diff"], true).expect("switched on");
    store.driver.rebuild_object_map(&spec, None).expect("rebuilt");
    store.driver.rollback(&spec, "early").expect("a rollback");
    store.driver.close(&spec).expect("closed");
    let info = store.driver.info(&spec, None).expect("the image");
    assert!(!info.object_map_invalid, "the flag came with the map: {info:?}");
    spec
}

fn repair(store: &Store, spec: &Spec) {
    store.driver.rebuild_object_map(spec, None).expect("rebuilt");
    for snap in store.driver.snaps(spec).expect("snapshots") {
        store.driver.rebuild_object_map(spec, Some(&snap.name)).expect("rebuilt");
    }
    store.driver.close(spec).expect("closed");
}

#[test]
fn a_rollback_to_a_snapshot_with_an_invalid_map() {
    let cluster = cluster_or_skip!("a_rollback_to_a_snapshot_with_an_invalid_map");
    for diff in MODES {
        // What is rebuilt after the first night: nothing, the head, the base snapshot, or all.
        for rebuilt in 0..4 {
            let mut store = Store::new(&cluster);
            store.options.diff = diff;
            let spec = lying(&store, "lying");
            let what = format!("{diff:?}, repaired {rebuilt}");
            let first = night(&store, &spec, &format!("{what}, the first night"));
            first.assert_right_or_because(&what, REMEDY);
            match rebuilt {
                0 => {}
                1 => store.driver.rebuild_object_map(&spec, None).expect("rebuilt"),
                2 => {
                    for snap in store.driver.snaps(&spec).expect("snapshots") {
                        store.driver.rebuild_object_map(&spec, Some(&snap.name)).expect("rebuilt");
                    }
                }
                _ => repair(&store, &spec),
            }
            // A denied object is written to, and so in the map from now on.
            store.driver.write(&spec, 5 * OBJECT + 1000, 10, 2).expect("a write");
            store.driver.close(&spec).expect("closed");
            night(&store, &spec, &format!("{what}, the second night")).assert_right_or_because(&what, REMEDY);
            repair(&store, &spec);
            night(&store, &spec, &format!("{what}, the last night")).assert_right(&what);
            store.purge(&spec);
        }
    }
}

/// The same image, whole before it lies: the base is right.
#[test]
fn a_head_begins_to_lie_between_two_nights() {
    let cluster = cluster_or_skip!("a_head_begins_to_lie_between_two_nights");
    for diff in MODES {
        let mut store = Store::new(&cluster);
        store.options.diff = diff;
        let spec = store.image("late-liar", 4 * MIB, &small_objects());
        let what = format!("{diff:?}");
        store.driver.write(&spec, 0, 2 * MIB, 1).expect("a write");
        store.driver.snap_create(&spec, "early").expect("a snapshot");
        store.driver.write(&spec, 0, MIB, 2).expect("a write");
        night(&store, &spec, &what).assert_right(&what);
        store.driver.invalidate_object_maps(&spec).expect("new maps");
        store.driver.rebuild_object_map(&spec, None).expect("rebuilt");
        night(&store, &spec, &format!("{what}, with invalid maps")).assert_right(&what);
        store.driver.rollback(&spec, "early").expect("a rollback");
        store.driver.close(&spec).expect("closed");
        night(&store, &spec, &format!("{what}, with a lying map")).assert_right_or_because(&what, REMEDY);
        store.driver.write(&spec, 3 * OBJECT, 100, 3).expect("a write");
        store.driver.close(&spec).expect("closed");
        night(&store, &spec, &format!("{what}, and a write")).assert_right_or_because(&what, REMEDY);
        repair(&store, &spec);
        night(&store, &spec, &format!("{what}, repaired")).assert_right(&what);
        store.purge(&spec);
    }
}

/// What the base has is all written again, so that no object is in one map only; and an object that came
/// between the two is in none.
#[test]
fn a_lying_head_lists_all_that_the_base_listed() {
    let cluster = cluster_or_skip!("a_lying_head_lists_all_that_the_base_listed");
    for diff in MODES {
        for first in [0, OBJECT] {
            let mut store = Store::new(&cluster);
            store.options.diff = diff;
            let spec = store.image("two-objects", 2 * MIB, &small_objects());
            let what = format!("{diff:?}, {first} bytes in the base");
            if first > 0 {
                store.driver.write(&spec, 0, first, 1).expect("a write");
            }
            night(&store, &spec, &what).assert_right(&what);
            store.driver.write(&spec, 8 * OBJECT, OBJECT, 2).expect("a write");
            store.driver.update_features(&spec, &["object-map", "fast-diff"], false).expect("switched off");
            store.driver.snap_create(&spec, "early").expect("a snapshot");
            store.driver.update_features(&spec, &["object-map", "fast-diff"], true).expect("switched on");
            store.driver.rebuild_object_map(&spec, None).expect("rebuilt");
            // Of the base only, whose map was not wrong before.
            for snap in store.driver.snaps(&spec).expect("snapshots") {
                if snap.name != "early" {
                    store.driver.rebuild_object_map(&spec, Some(&snap.name)).expect("rebuilt");
                }
            }
            store.driver.rollback(&spec, "early").expect("a rollback");
            if first > 0 {
                store.driver.write(&spec, 0, first, 3).expect("a write");
            }
            store.driver.close(&spec).expect("closed");
            night(&store, &spec, &format!("{what}, lying")).assert_right_or_because(&what, REMEDY);
            repair(&store, &spec);
            night(&store, &spec, &format!("{what}, repaired")).assert_right(&what);
            store.purge(&spec);
        }
    }
}

/// A write that was under way when the snapshot was taken makes an object that the snapshot has, and its
/// map does not (Ceph tracker 61472, 61616).
#[test]
fn an_object_that_is_made_at_the_instant_of_the_snapshot() {
    let cluster = cluster_or_skip!("an_object_that_is_made_at_the_instant_of_the_snapshot");
    for diff in MODES {
        for repaired in [false, true] {
            let mut store = Store::new(&cluster);
            store.options.diff = diff;
            let spec = store.image("instant", 2 * MIB, &small_objects());
            let what = format!("{diff:?}, repaired {repaired}");
            store.driver.write(&spec, 0, 4096, 1).expect("a write");
            night(&store, &spec, &what).assert_right(&what);
            store.driver.stale_write(&spec, 5, 0, OBJECT, 2, 0, &[]).expect("a stale write");
            // It gets into the head's map.
            store.driver.write(&spec, 5 * OBJECT + 32_768, 4096, 3).expect("a write");
            if repaired {
                store.driver.rebuild_object_map(&spec, None).expect("rebuilt");
            }
            store.driver.close(&spec).expect("closed");
            night(&store, &spec, &format!("{what}, the second night")).assert_right_or_because(&what, REMEDY);
            store.driver.write(&spec, MIB, 4096, 4).expect("a write");
            store.driver.close(&spec).expect("closed");
            night(&store, &spec, &format!("{what}, the third night")).assert_right_or_because(&what, REMEDY);
            store.purge(&spec);
        }
    }
}

/// The same in clones, plain and striped, where what the object hides is the parent's; also once all maps are
/// repaired, the base's too.
#[test]
fn an_object_of_a_clone_that_is_made_at_the_instant_of_the_snapshot() {
    let cluster = cluster_or_skip!("an_object_of_a_clone_that_is_made_at_the_instant_of_the_snapshot");
    let layouts =
        [small_objects(), small_objects().striped(OBJECT / 2, 2), small_objects().striped(OBJECT, 3)];
    for repaired in [false, true] {
        for layout in &layouts {
            let mut store = Store::new(&cluster);
            let parent = store.image("instant-parent", 2 * MIB, &small_objects());
            store.driver.write(&parent, 0, 2 * MIB, 1).expect("a write");
            store.driver.snap_create(&parent, "base").expect("a snapshot");
            let spec = crate::cluster::unique_image("instant-clone");
            store.driver.clone(&parent, "base", &spec, layout).expect("a clone");
            let what = format!("{layout:?}, repaired {repaired}");
            night(&store, &spec, &what).assert_right(&what);
            store.driver.stale_write(&spec, 5, 0, OBJECT, 2, 0, &[]).expect("a stale write");
            store.driver.write_object(&spec, 5, 1024, 512, 3).expect("a write");
            store.options.prove = 0;
            if repaired {
                repair(&store, &spec);
            }
            store.driver.close(&spec).expect("closed");
            night(&store, &spec, &format!("{what}, the second night")).assert_right_or_because(&what, REMEDY);
            store.purge(&spec);
            store.purge(&parent);
        }
    }
}

/// The head's map denies the object, too: nobody but the OSDs knows of it.
#[test]
fn an_object_that_no_map_has() {
    let cluster = cluster_or_skip!("an_object_that_no_map_has");
    for diff in MODES {
        for nights in 0..2 {
            let mut store = Store::new(&cluster);
            store.options.diff = diff;
            let spec = store.image("denied", 2 * MIB, &small_objects());
            let what = format!("{diff:?}, after {nights} nights");
            store.driver.write(&spec, 0, 4096, 1).expect("a write");
            for _ in 0..nights {
                night(&store, &spec, &what).assert_right(&what);
            }
            let seen = store.driver.snap_numbers(&spec).expect("snapshots");
            let newest = seen.first().copied().unwrap_or(0);
            store.driver.stale_write(&spec, 5, 0, OBJECT, 2, newest, &seen).expect("a stale write");
            night(&store, &spec, &format!("{what}, denied")).assert_right_or_because(&what, REMEDY);
            repair(&store, &spec);
            night(&store, &spec, &format!("{what}, repaired")).assert_right_or_because(&what, REMEDY);
            store.purge(&spec);
        }
    }
}

/// Repairing maps, as the documents advise, changes nothing of what a point holds.
#[test]
fn maps_of_snapshots_are_rebuilt_between_two_nights() {
    let cluster = cluster_or_skip!("maps_of_snapshots_are_rebuilt_between_two_nights");
    for diff in MODES {
        let mut store = Store::new(&cluster);
        store.options.diff = diff;
        let spec = store.image("rebuilt", 4 * MIB, &small_objects());
        let what = format!("{diff:?}");
        store.driver.write(&spec, 0, 2 * MIB, 1).expect("a write");
        store.driver.invalidate_object_maps(&spec).expect("new maps");
        night(&store, &spec, &what).assert_right(&what);
        store.driver.write(&spec, MIB, MIB / 2, 2).expect("a write");
        repair(&store, &spec);
        night(&store, &spec, &format!("{what}, all rebuilt")).assert_right(&what);
        store.driver.discard(&spec, MIB, OBJECT).expect("a discard");
        store.driver.invalidate_object_maps(&spec).expect("new maps");
        store.driver.rebuild_object_map(&spec, None).expect("rebuilt");
        store.driver.close(&spec).expect("closed");
        night(&store, &spec, &format!("{what}, the head rebuilt")).assert_right(&what);
        store.purge(&spec);
    }
}

/// Old bytes of an object that the target's map denies must not come back with the first write to it.
#[test]
fn a_restore_over_an_image_whose_map_lies() {
    let cluster = cluster_or_skip!("a_restore_over_an_image_whose_map_lies");
    let mut store = Store::new(&cluster);
    let source = store.image("source", 4 * MIB, &small_objects());
    // Zeroes, data and a part of an object where the target has old bytes.
    store.driver.write(&source, 3 * OBJECT + 5000, 1000, 5).expect("a write");
    store.driver.write(&source, MIB, MIB / 2, 6).expect("a write");
    let made = store.back_up(&source);
    for first_touched in [false, true] {
        let target = lying(&store, "lying-target");
        if first_touched {
            store.driver.write(&target, 7 * OBJECT, 10, 7).expect("a write");
            store.driver.close(&target).expect("closed");
        }
        match store.restore(&made, &store.overwriting(&target)) {
            Err(error) => {
                let why = told(&error);
                assert!(REMEDY.iter().all(|word| why.contains(word)), "{why}");
            }
            Ok(_) => {
                store.assert_image(&made, &target);
                let held = store.driver.read(&source, None).expect("the source");
                let objects = store.driver.read_objects(&target, None).expect("the target");
                let differs = (0..held.len()).filter(|index| held[*index] != objects[*index]).count();
                assert_eq!(differs, 0, "old bytes lie in objects that the map denies");
                store.driver.rebuild_object_map(&target, None).expect("rebuilt");
                store.assert_image(&made, &target);
            }
        }
        store.purge(&target);
    }
    store.purge(&source);
}

/// An image, its object size and what holds for it.
struct Subject {
    spec: Spec,
    random: Random,
    snapshots: usize,
}

const BIG: u64 = 1 << 20;

impl Subject {
    /// Objects that are cut short, lengthened and punched (Ceph tracker 63770 and its like).
    fn step(&mut self, store: &Store, number: usize) -> &'static str {
        let (driver, spec) = (&store.driver, &self.spec);
        let mut write =
            |offset, length| driver.write(spec, offset, length, self.random.next()).expect("a write");
        let discard = |offset, length| driver.discard(spec, offset, length).expect("a discard");
        match number {
            0 => (write(0, 3 * BIG), "full objects").1,
            1 => (discard(3 * BIG / 4, BIG / 4), "a tail discarded").1,
            2 => (discard(BIG / 4, BIG / 4), "a middle discarded").1,
            3 => (discard(BIG / 2 + 4096, BIG / 8), "a discard beyond the middle").1,
            4 => (write(3 * BIG / 4 + BIG / 8, 65_536), "written again behind").1,
            5 => (write(3 * BIG + 4096, 8192), "a short object").1,
            6 => (write(3 * BIG + BIG / 2, 8192), "a longer object").1,
            7 => (discard(3 * BIG + 65_536, BIG - 65_536), "cut to between").1,
            8 => (discard(BIG, BIG), "a whole object gone").1,
            9 => (write(BIG + 4096, 4096), "and back, in part").1,
            10 => {
                driver.resize(spec, 2 * BIG + 12_288).expect("a resize");
                driver.resize(spec, 4 * BIG).expect("a resize");
                "shrunk and grown"
            }
            11 => (driver.fill(spec, 65_536, 65_536, 0).expect("a write"), "zeroes written").1,
            12 => (discard(BIG / 2 + 1536, BIG / 2 - 1536), "an unaligned tail discarded").1,
            _ => {
                let snaps = driver.snaps(spec).expect("snapshots");
                let user: Vec<_> = snaps.iter().filter(|snap| snap.name.starts_with("user")).collect();
                driver.rollback(spec, &user[user.len() - 2].name).expect("a rollback");
                "rolled back"
            }
        }
    }
}

#[test]
fn objects_are_cut_short_lengthened_and_punched() {
    let cluster = cluster_or_skip!("objects_are_cut_short_lengthened_and_punched");
    for (kind, features) in [("all", FULL_FEATURES), ("plain", &["layering"]), ("clone", FULL_FEATURES)] {
        // One image, backed up to three destinations: every time, every second and every third time.
        let stores = [1, 2, 3].map(|lag| (lag, Store::new(&cluster)));
        let store = &stores[0].1;
        let parent = store.image("parent", 4 * BIG, &Layout::new(20, features));
        let spec = if kind == "clone" {
            store.driver.write(&parent, 0, 5 * BIG / 2, 1).expect("a write");
            store.driver.snap_create(&parent, "base").expect("a snapshot");
            let clone = crate::cluster::unique_image("punched");
            store.driver.clone(&parent, "base", &clone, &Layout::new(20, features)).expect("a clone");
            clone
        } else {
            store.image("punched", 4 * BIG, &Layout::new(20, features))
        };
        let mut subject = Subject { spec: spec.clone(), random: Random::new(4), snapshots: 0 };
        for number in 0..14 {
            let step = subject.step(store, number);
            if number % 4 == 3 {
                store.driver.snap_create(&spec, &format!("user{}", subject.snapshots)).expect("a snapshot");
                subject.snapshots += 1;
            }
            store.driver.close(&spec).expect("closed");
            for (_, store) in stores.iter().filter(|(lag, _)| number % lag == 0) {
                let what = format!("{kind}, {step}");
                assert_eq!(night(store, &spec, &what), Night::Right, "{what}");
            }
        }
        store.purge(&spec);
        store.purge(&parent);
    }
}

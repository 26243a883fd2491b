//! What happens to an image between two backups.

use super::{GRAIN, MIB, small_objects};
use crate::cluster::unique_image;
use crate::cluster_or_skip;
use crate::driver::{FULL_FEATURES, Layout, Spec};
use crate::store::{Made, Store};

/// An image of 4 MiB with data in its first half, and its first backup.
fn begun(store: &mut Store, name: &str) -> (Spec, Made) {
    let spec = store.image(name, 4 * MIB, &small_objects());
    store.driver.write(&spec, 0, 2 * MIB, 1).expect("a write");
    let first = store.back_up(&spec);
    first.assert_full(None);
    (spec, first)
}

#[test]
fn the_first_backup_is_full_and_holds_no_zeroes() {
    let cluster = cluster_or_skip!("the_first_backup_is_full_and_holds_no_zeroes");
    for mut store in Store::of_each_writer(&cluster) {
        let spec = store.image("first", 8 * MIB, &Layout::default());
        store.driver.write(&spec, MIB, GRAIN, 1).expect("a write");
        // Zeroes that were written are no data either.
        store.driver.fill(&spec, 2 * MIB, MIB, 0).expect("a write");
        store.driver.write(&spec, 5 * MIB + 100, 50, 2).expect("a write");
        let first = store.back_up(&spec);
        first.assert_full(None);
        assert_eq!(first.held(), (2 * GRAIN, 0));
        store.purge(&spec);
    }
}

#[test]
fn an_increment_holds_what_changed() {
    let cluster = cluster_or_skip!("an_increment_holds_what_changed");
    let mut store = Store::new(&cluster);
    let (spec, first) = begun(&mut store, "increment");
    store.driver.write(&spec, MIB, GRAIN, 2).expect("a write");
    // Two bytes of two grains.
    store.driver.write(&spec, 3 * MIB - 1, 2, 3).expect("a write");
    let second = store.back_up(&spec);
    second.assert_upon(&first);
    // The whole of what two objects hold counts as changed: librbd does not tell more exactly.
    let (data, _) = second.held();
    assert!((3 * GRAIN..=2 * 65_536 + 2 * GRAIN).contains(&data), "{data}");
    store.check_again();
    store.purge(&spec);
}

#[test]
fn an_unchanged_image_makes_an_empty_layer() {
    let cluster = cluster_or_skip!("an_unchanged_image_makes_an_empty_layer");
    for mut store in Store::of_each_writer(&cluster) {
        let (spec, first) = begun(&mut store, "unchanged");
        let second = store.back_up(&spec);
        second.assert_upon(&first);
        assert_eq!((second.held(), second.read_bytes), ((0, 0), 0));
        let third = store.back_up(&spec);
        third.assert_upon(&second);
        // Nothing but a header and empty tables.
        assert!(third.number("layer_bytes") < MIB, "{}", third.manifest);
        store.purge(&spec);
    }
}

#[test]
fn a_grown_image() {
    let cluster = cluster_or_skip!("a_grown_image");
    for mut store in Store::of_each_writer(&cluster) {
        let (spec, first) = begun(&mut store, "grown");
        store.driver.resize(&spec, 6 * MIB + 512).expect("a resize");
        let second = store.back_up(&spec);
        second.assert_upon(&first);
        assert_eq!(second.held().0, 0, "nothing was written");
        store.driver.resize(&spec, 9 * MIB + 700).expect("a resize");
        store.driver.write(&spec, 9 * MIB, 700, 5).expect("a write");
        let third = store.back_up(&spec);
        third.assert_upon(&second);
        assert_eq!(third.number("virtual_size"), 9 * MIB + 700);
        store.check_again();
        store.purge(&spec);
    }
}

#[test]
fn a_shrunk_image() {
    let cluster = cluster_or_skip!("a_shrunk_image");
    for mut store in Store::of_each_writer(&cluster) {
        let (spec, first) = begun(&mut store, "shrunk");
        store.driver.resize(&spec, MIB + 12_345).expect("a resize");
        let second = store.back_up(&spec);
        second.assert_upon(&first);
        assert_eq!(second.number("virtual_size"), MIB + 12_345);
        store.driver.write(&spec, MIB, 12_345, 5).expect("a write");
        store.back_up(&spec).assert_upon(&second);
        // The older point is as large as it was.
        store.check_again();
        store.purge(&spec);
    }
}

/// Fast-diff says that nothing happened.
#[test]
fn shrunk_and_grown_again() {
    let cluster = cluster_or_skip!("shrunk_and_grown_again");
    for mut store in Store::of_each_writer(&cluster) {
        let (spec, mut last) = begun(&mut store, "shrunk-grown");
        // Sizes in and at the edges of objects, grains and sectors.
        for (size, snapshot) in
            [(MIB, true), (MIB, false), (MIB + 70_001, true), (MIB + 5 * GRAIN, true), (0, true), (0, false)]
        {
            store.driver.write(&spec, 0, 4 * MIB, 10 + size).expect("a write");
            let written = store.back_up(&spec);
            written.assert_upon(&last);
            store.driver.resize(&spec, size).expect("a resize");
            if snapshot {
                store.driver.snap_create(&spec, &format!("small-{size}")).expect("a snapshot");
            }
            store.driver.resize(&spec, 4 * MIB).expect("a resize");
            last = store.back_up(&spec);
            last.assert_upon(&written);
            let (data, zero) = last.held();
            assert!(zero >= (4 * MIB - size) / GRAIN * GRAIN && data <= 65_536, "{last:?}");
        }
        store.check_again();
        store.purge(&spec);
    }
}

#[test]
fn discards_become_zeroes() {
    let cluster = cluster_or_skip!("discards_become_zeroes");
    for mut store in Store::of_each_writer(&cluster) {
        let (spec, first) = begun(&mut store, "discards");
        store.driver.discard(&spec, 0, 3 * 65_536).expect("a discard");
        store.driver.discard(&spec, 5 * 65_536 + 8192, 4096).expect("a discard");
        store.driver.write_zeroes(&spec, MIB, 65_536).expect("zeroes");
        store.driver.discard(&spec, 3 * MIB, MIB).expect("a discard of nothing");
        let second = store.back_up(&spec);
        second.assert_upon(&first);
        let (data, zero) = second.held();
        assert!(zero >= 4 * 65_536 + 4096 && data < 65_536, "{data} {zero}");
        store.check_again();
        store.purge(&spec);
    }
}

/// Fast-diff says that nothing happened: the object map that comes back says "exists, clean".
#[test]
fn rolled_back_to_a_users_snapshot() {
    let cluster = cluster_or_skip!("rolled_back_to_a_users_snapshot");
    let mut store = Store::new(&cluster);
    let spec = store.image("rollback-user", 4 * MIB, &small_objects());
    store.driver.write(&spec, 0, MIB, 1).expect("a write");
    let first = store.back_up(&spec);
    store.driver.snap_create(&spec, "s1b").expect("a snapshot");
    store.driver.write(&spec, 0, MIB, 2).expect("a write");
    store.driver.write(&spec, 2 * MIB, MIB, 3).expect("a write");
    let second = store.back_up(&spec);
    second.assert_upon(&first);
    store.driver.rollback(&spec, "s1b").expect("a rollback");
    let third = store.back_up(&spec);
    third.assert_upon(&second);
    assert_eq!(third.held(), (MIB, MIB));
    store.check_again();
    store.purge(&spec);
}

#[test]
fn rolled_back_to_a_backup() {
    let cluster = cluster_or_skip!("rolled_back_to_a_backup");
    let mut store = Store::new(&cluster);
    store.options.keep_snapshots = 5;
    let (spec, first) = begun(&mut store, "rollback-backup");
    store.driver.write(&spec, MIB, 2 * MIB, 2).expect("a write");
    store.driver.resize(&spec, 5 * MIB).expect("a resize");
    let second = store.back_up(&spec);
    let snapshot = first.manifest["snapshot"].as_str().expect("a name");
    store.driver.rollback(&spec, snapshot).expect("a rollback");
    let third = store.back_up(&spec);
    third.assert_upon(&second);
    assert_eq!(third.number("virtual_size"), 4 * MIB);
    store.driver.rollback(&spec, second.manifest["snapshot"].as_str().expect("a name")).expect("a rollback");
    store.back_up(&spec).assert_upon(&third);
    store.check_again();
    store.purge(&spec);
}

/// A clone of 4 MiB with data in its first and third MiB, and its first backup.
fn begun_clone(store: &mut Store, name: &str) -> (Spec, Spec, Made) {
    let parent = store.image("parent", 4 * MIB, &Layout::new(18, FULL_FEATURES));
    store.driver.write(&parent, 0, MIB, 1).expect("a write");
    store.driver.write(&parent, 2 * MIB, MIB, 2).expect("a write");
    store.driver.snap_create(&parent, "base").expect("a snapshot");
    let spec = unique_image(name);
    store.driver.clone(&parent, "base", &spec, &small_objects()).expect("a clone");
    let first = store.back_up(&spec);
    first.assert_full(None);
    assert_eq!(first.held(), (2 * MIB, 0), "the parent's data belong to it");
    assert_eq!(first.manifest["clone_parent"]["image"], *parent.image);
    (parent, spec, first)
}

#[test]
fn a_clone_and_its_flattening() {
    let cluster = cluster_or_skip!("a_clone_and_its_flattening");
    let mut store = Store::new(&cluster);
    let (parent, spec, first) = begun_clone(&mut store, "flattened");
    store.driver.write(&spec, 100, 4096, 3).expect("a write");
    let second = store.back_up(&spec);
    second.assert_upon(&first);
    assert!(second.held().0 <= 65_536 + GRAIN, "{second:?}");
    store.driver.flatten(&spec).expect("a flattening");
    let third = store.back_up(&spec);
    third.assert_upon(&second);
    assert!(third.manifest["clone_parent"].is_null());
    store.driver.write(&spec, 2 * MIB - 100, 200, 4).expect("a write");
    let fourth = store.back_up(&spec);
    fourth.assert_upon(&third);
    assert!(fourth.held().0 <= 65_536 + GRAIN, "{fourth:?}");
    store.check_again();
    store.purge(&spec);
    store.purge(&parent);
}

/// An object that goes away uncovers the parent's data, and must not be taken for zeroes.
#[test]
fn a_clone_with_discards_and_rollback() {
    let cluster = cluster_or_skip!("a_clone_with_discards_and_rollback");
    let mut store = Store::new(&cluster);
    let (parent, spec, first) = begun_clone(&mut store, "uncovered");
    store.driver.snap_create(&spec, "pristine").expect("a snapshot");
    store.driver.write(&spec, 0, MIB / 2, 3).expect("a write");
    store.driver.discard(&spec, 2 * MIB, MIB / 2).expect("a discard");
    store.driver.discard(&spec, 2 * MIB + MIB / 2 + 4096, 8192).expect("a discard");
    let second = store.back_up(&spec);
    second.assert_upon(&first);
    assert!(second.held().1 >= MIB / 2, "{second:?}");
    store.driver.rollback(&spec, "pristine").expect("a rollback");
    let third = store.back_up(&spec);
    third.assert_upon(&second);
    assert!(third.held().0 >= MIB, "the parent's data are back: {third:?}");
    // Shrunk below what the parent shows, and grown again: the parent stays hidden.
    store.driver.resize(&spec, MIB + 5000).expect("a resize");
    store.driver.resize(&spec, 4 * MIB).expect("a resize");
    let fourth = store.back_up(&spec);
    fourth.assert_upon(&third);
    // Of a clone only what differs is held: where the parent had data behind its new end.
    assert_eq!(fourth.held(), (0, MIB), "{fourth:?}");
    store.check_again();
    store.purge(&spec);
    store.purge(&parent);
}

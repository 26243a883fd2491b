//! What the other tests take for granted of their second client.

use crate::cluster::{unique, unique_image};
use crate::cluster_or_skip;
use crate::driver::{FULL_FEATURES, Layout, Spec};

const ORDER: u8 = 16;

#[test]
fn contents_and_snapshots_are_what_they_should_be() {
    let cluster = cluster_or_skip!("contents_and_snapshots_are_what_they_should_be");
    let driver = cluster.driver();
    let spec = unique_image("driver");
    driver.create(&spec, 1 << 20, &Layout::new(ORDER, FULL_FEATURES)).unwrap();
    driver.fill(&spec, 1000, 100_000, 7).unwrap();
    driver.write_bytes(&spec, 0, b"begin").unwrap();
    let id = driver.snap_create(&spec, "one").unwrap();
    driver.discard(&spec, 0, 1 << 16).unwrap();
    driver.write_zeroes(&spec, 1 << 16, 100).unwrap();
    driver.resize(&spec, (1 << 20) + 1).unwrap();

    let mut expected = vec![0; 1 << 20];
    expected[1000..101_000].fill(7);
    expected[..5].copy_from_slice(b"begin");
    assert!(driver.read(&spec, Some("one")).unwrap() == expected);
    expected[..(1 << 16) + 100].fill(0);
    expected.push(0);
    assert!(driver.read(&spec, None).unwrap() == expected);
    driver.rollback(&spec, "one").unwrap();
    assert_eq!(driver.sha256(&spec, None).unwrap(), driver.sha256(&spec, Some("one")).unwrap());

    let snaps = driver.snaps(&spec).unwrap();
    assert_eq!((snaps[0].id, snaps[0].size, &*snaps[0].name), (id, 1 << 20, "one"));
    driver.snap_rename(&spec, "one", "two").unwrap();
    driver.snap_protect(&spec, "two").unwrap();
    let error = driver.snap_remove(&spec, "two").unwrap_err();
    assert_eq!(error.errno(), Some(16), "{error}");
    driver.purge(&spec).unwrap();
    let error = driver.info(&spec, None).unwrap_err();
    assert_eq!(error.errno(), Some(2), "{error}");
    assert!(error.to_string().contains(&spec.image), "{error}");
}

#[test]
fn names_survive() {
    let cluster = cluster_or_skip!("names_survive");
    let driver = cluster.driver();
    let pool = unique("pöol");
    driver.pool_create(&pool).unwrap();
    driver.namespace_create(&pool, "näme space").unwrap();
    let names = ["..", ".hidden", "a b%20:,\"\\'", "\u{1f980}\n"];
    for name in names {
        let spec = Spec::in_namespace(&pool, "näme space", name);
        driver.create(&spec, 4096, &Layout::default()).unwrap();
        driver.metadata_set(&spec, "clé:1", name).unwrap();
        assert_eq!(driver.metadata(&spec).unwrap()["clé:1"], name);
        driver.snap_create(&spec, name).unwrap();
        assert_eq!(driver.snaps(&spec).unwrap()[0].name, name);
    }
    let mut sorted = names.map(String::from);
    sorted.sort();
    assert_eq!(driver.images(&pool, "näme space").unwrap(), sorted);
    assert!(driver.images(&pool, "").unwrap().is_empty());
    driver.pool_remove(&pool).unwrap();
}

#[test]
fn object_maps_can_be_made_invalid_and_valid() {
    let cluster = cluster_or_skip!("object_maps_can_be_made_invalid_and_valid");
    let driver = cluster.driver();
    let spec = unique_image("flags");
    driver.create(&spec, 1 << 20, &Layout::new(ORDER, FULL_FEATURES)).unwrap();
    driver.write(&spec, 0, 1 << 17, 1).unwrap();
    driver.snap_create(&spec, "one").unwrap();
    let flags = |snapshot| {
        let info = driver.info(&spec, snapshot).unwrap();
        (info.object_map_invalid, info.fast_diff_invalid)
    };
    assert_eq!(flags(Some("one")), (false, false));
    driver.invalidate_object_maps(&spec).unwrap();
    assert_eq!((flags(Some("one")), flags(None)), ((true, true), (true, true)));
    driver.rebuild_object_map(&spec, None).unwrap();
    assert_eq!((flags(Some("one")), flags(None)), ((true, true), (false, false)));
    driver.rebuild_object_map(&spec, Some("one")).unwrap();
    assert_eq!(flags(Some("one")), (false, false));
    driver.purge(&spec).unwrap();
}

#[test]
fn a_clone_of_an_unprotected_snapshot_shows_its_parent() {
    let cluster = cluster_or_skip!("a_clone_of_an_unprotected_snapshot_shows_its_parent");
    let driver = cluster.driver();
    let (parent, child) = (unique_image("parent"), unique_image("child"));
    let layout = Layout::new(ORDER, FULL_FEATURES);
    driver.create(&parent, 1 << 20, &layout).unwrap();
    driver.write(&parent, 12_345, 1 << 17, 1).unwrap();
    driver.snap_create(&parent, "base").unwrap();
    driver.clone(&parent, "base", &child, &layout.striped(1 << 14, 3)).unwrap();
    let info = driver.info(&child, None).unwrap();
    assert_eq!(info.parent, Some([parent.pool.clone(), parent.image.clone(), "base".to_owned()]));
    assert_eq!((info.overlap, info.stripe_unit, info.stripe_count), (1 << 20, 1 << 14, 3));
    assert!(driver.read(&child, None).unwrap() == driver.read(&parent, Some("base")).unwrap());
    driver.flatten(&child).unwrap();
    assert_eq!(driver.info(&child, None).unwrap().parent, None);
    assert!(driver.read(&child, None).unwrap() == driver.read(&parent, Some("base")).unwrap());
    driver.purge(&child).unwrap();
    driver.purge(&parent).unwrap();
}

#[test]
fn a_dead_driver_is_told_from_a_refusal() {
    let cluster = cluster_or_skip!("a_dead_driver_is_told_from_a_refusal");
    let driver = cluster.driver();
    driver.fsid().unwrap();
    driver.kill();
    let error = driver.fsid().unwrap_err();
    assert!(error.is_breakdown(), "{error}");
}

/// The second client's librbd broke down in a plain list of snapshots, and took a test with it.
#[test]
fn a_driver_that_died_is_started_anew_for_a_look() {
    let cluster = cluster_or_skip!("a_driver_that_died_is_started_anew_for_a_look");
    let driver = cluster.driver();
    let spec = unique_image("anew");
    driver.create(&spec, 1 << 20, &Layout::new(ORDER, FULL_FEATURES)).unwrap();
    driver.snap_create(&spec, "one").unwrap();
    driver.kill();
    assert_eq!(driver.snaps(&spec).unwrap().len(), 1);
    driver.purge(&spec).unwrap();
}

/// What reads objects without librbd agrees with librbd, where nothing is wrong.
#[test]
fn objects_are_what_librbd_shows() {
    let cluster = cluster_or_skip!("objects_are_what_librbd_shows");
    let driver = cluster.driver();
    let (grandparent, parent, child) = (unique_image("old"), unique_image("middle"), unique_image("young"));
    let layout = Layout::new(ORDER, FULL_FEATURES);
    driver.create(&grandparent, 1 << 20, &layout).unwrap();
    driver.write(&grandparent, 0, 1 << 20, 1).unwrap();
    driver.snap_create(&grandparent, "base").unwrap();
    driver.clone(&grandparent, "base", &parent, &layout.clone().striped(1 << 13, 3)).unwrap();
    driver.write(&parent, 100_001, 77_777, 2).unwrap();
    driver.snap_create(&parent, "base").unwrap();
    driver.clone(&parent, "base", &child, &Layout::new(20, &["layering"])).unwrap();
    driver.write(&child, 500_000, 100, 3).unwrap();
    // An object without a byte is there all the same, and hides the parent.
    driver.discard(&child, 1 << 17, 1 << 17).unwrap();
    driver.discard(&parent, 1 << ORDER, 1 << ORDER).unwrap();
    driver.resize(&child, 900_000).unwrap();
    driver.resize(&child, 2_000_001).unwrap();
    driver.snap_create(&child, "one").unwrap();
    driver.write(&child, 1_999_999, 2, 4).unwrap();
    // Both stay as the parents of others, in the trash.
    driver.snap_remove(&parent, "base").unwrap();
    let id = driver.trash_move(&parent).unwrap();
    for (spec, snapshot) in [(&grandparent, Some("base")), (&child, Some("one")), (&child, None)] {
        let shown = driver.read(spec, snapshot).unwrap();
        assert!(driver.read_objects(spec, snapshot).unwrap() == shown, "{spec:?} {snapshot:?}");
        assert!(shown.iter().any(|byte| *byte != 0));
    }
    driver.trash_restore(&parent, &id).unwrap();
    driver.purge(&child).unwrap();
    driver.purge(&parent).unwrap();
    driver.purge(&grandparent).unwrap();
}

#[test]
fn a_stale_write_changes_a_snapshot_and_no_object_map() {
    let cluster = cluster_or_skip!("a_stale_write_changes_a_snapshot_and_no_object_map");
    let driver = cluster.driver();
    let spec = unique_image("stale");
    driver.create(&spec, 1 << 20, &Layout::new(ORDER, FULL_FEATURES)).unwrap();
    driver.write(&spec, 0, 4096, 1).unwrap();
    let first = driver.snap_create(&spec, "one").unwrap();
    driver.snap_create(&spec, "two").unwrap();
    assert_eq!(driver.snap_numbers(&spec).unwrap().len(), 2);
    let all = |snapshot| driver.read(&spec, snapshot).unwrap();
    let (one, two) = (all(Some("one")), all(Some("two")));
    // It knows the first snapshot, and not the second.
    driver.stale_write(&spec, 0, 100, 50, 2, first, &[first]).unwrap();
    driver.stale_write(&spec, 3, 0, 50, 3, first, &[first]).unwrap();
    assert!(all(Some("one")) == one);
    let start = 3 << ORDER;
    for snapshot in [Some("two"), None] {
        let now = all(snapshot);
        assert!(now[100..150] != two[100..150]);
        // librbd asks the object map of a snapshot, and that of the head only as the owner of its lock.
        assert_eq!(now[start..start + 50] == [0; 50], snapshot.is_some());
        let truth = driver.read_objects(&spec, snapshot).unwrap();
        assert!(truth[start..start + 50] != [0; 50]);
        assert!(truth[..start] == now[..start]);
    }
    driver.rebuild_object_map(&spec, Some("two")).unwrap();
    assert!(all(Some("two")) == driver.read_objects(&spec, Some("two")).unwrap());
    driver.purge(&spec).unwrap();
}

#[test]
fn images_migrate_and_are_copied() {
    let cluster = cluster_or_skip!("images_migrate_and_are_copied");
    let driver = cluster.driver();
    let (spec, other) = (unique_image("moving"), unique_image("moved"));
    let layout = Layout::new(ORDER, FULL_FEATURES);
    driver.create(&spec, 1 << 20, &layout).unwrap();
    driver.write(&spec, 0, 300_000, 1).unwrap();
    driver.snap_create(&spec, "one").unwrap();
    driver.write(&spec, 0, 3000, 2).unwrap();
    let (one, head) = (driver.read(&spec, Some("one")).unwrap(), driver.read(&spec, None).unwrap());
    let id = driver.info(&spec, None).unwrap().id;
    let is = |spec: &Spec| {
        assert!(driver.read(spec, Some("one")).unwrap() == one && driver.read(spec, None).unwrap() == head);
        driver.info(spec, None).unwrap()
    };
    driver.migration_prepare(&spec, &spec, &layout).unwrap();
    let info = is(&spec);
    assert!(info.id != id && info.features.contains(&"migrating".to_owned()), "{info:?}");
    driver.migration_abort(&spec).unwrap();
    assert_eq!(is(&spec).id, id);
    driver.migration_prepare(&spec, &other, &layout).unwrap();
    driver.migration_execute(&other).unwrap();
    driver.migration_commit(&other).unwrap();
    assert!(!is(&other).features.contains(&"migrating".to_owned()));
    driver.deep_copy(&other, &spec).unwrap();
    is(&spec);
    driver.purge(&spec).unwrap();
    driver.purge(&other).unwrap();
}

//! Changes that no diff reports, and points that are made by comparing the whole image.

use rbd2qcow2_core::chain::{Catalogue, ImageName};
use rbd2qcow2_core::layer::Compression;
use rbd2qcow2_core::options::{BaseGone, DiffMode};
use rbd2qcow2_core::progress::Status;
use rbd2qcow2_core::verify::VerifyStatus;

use super::{GRAIN, MIB, small_objects};
use crate::cluster_or_skip;
use crate::driver::{Layout, NO_OBJECT_MAP, Spec};
use crate::store::{Made, Store};
use crate::verify_source::verify;

/// An image of 64 objects, 32 of which have data; backed up, and half of these then written to by somebody
/// who does not know of the snapshot.
fn with_a_lost_change(store: &mut Store, name: &str, layout: &Layout) -> (Spec, Made) {
    let spec = store.image(name, 4 * MIB, layout);
    store.driver.write(&spec, 0, 2 * MIB, 1).expect("a write");
    let first = store.back_up(&spec);
    for object in 8..24 {
        store.driver.stale_write(&spec, object, 0, 64 << 10, object, 0, &[]).expect("a late write");
    }
    (spec, first)
}

fn suspects(store: &Store, spec: &Spec) -> Vec<bool> {
    let image = ImageName::new(&spec.image).expect("a name");
    let catalogue = Catalogue::read(&store.directory(spec), &image).expect("read");
    assert!(catalogue.problems().is_empty(), "{:?}", catalogue.problems());
    catalogue.points().iter().map(|point| catalogue.suspicion(point).is_some()).collect()
}

#[track_caller]
fn assert_compared(made: &Made, parent: &Made, reason: Option<&str>) {
    assert_eq!((made.kind, &made.manifest["diff_mode"]), ("incremental", &"compare".into()), "{made:?}");
    assert_eq!(made.manifest["parent"], parent.point);
    assert_eq!(made.manifest["chain"], parent.manifest["chain"]);
    match (reason, &made.reason) {
        (None, None) => {}
        (Some(expected), Some(given)) if given.contains(expected) => {}
        _ => panic!("{:?}, expected {reason:?}", made.reason),
    }
}

#[test]
fn a_change_that_was_lost_is_found_and_mended() {
    let cluster = cluster_or_skip!("a_change_that_was_lost_is_found_and_mended");
    for layout in [small_objects(), Layout::new(16, NO_OBJECT_MAP)] {
        let mut store = Store::new(&cluster);
        let (spec, first) = with_a_lost_change(&mut store, "lost", &layout);
        store.driver.write(&spec, 3 * MIB, 4096, 2).expect("a write");
        let before = store.snapshot_names(&spec);
        // 64 of 500 pages, half of which are wrong.
        let report = store.run(&spec);
        let error = report.error.as_ref().map(ToString::to_string).unwrap_or_default();
        assert!(report.status == Status::Failed && error.contains("a change was lost"), "{report:?}");
        assert!(error.contains(&first.point), "{error}");
        assert_eq!(store.snapshot_names(&spec), before, "its snapshot is gone again");
        assert_eq!(suspects(&store, &spec), [true]);
        // The note stays.
        store.freeze(&spec, &[]);
        // What was lost, and what was written since.
        let second = store.back_up(&spec);
        assert_compared(&second, &first, Some("suspect"));
        assert_eq!(second.held(), (MIB + GRAIN, 0));
        assert_eq!(suspects(&store, &spec), [true, false]);
        store.driver.write(&spec, 0, 4096, 3).expect("a write");
        let third = store.back_up(&spec);
        third.assert_upon(&second);
        assert_ne!(third.manifest["diff_mode"], "compare");
        let statuses: Vec<_> =
            verify(&cluster, store.dest(), &spec).iter().map(|report| report.status).collect();
        assert_eq!(statuses, [VerifyStatus::Suspect, VerifyStatus::Ok, VerifyStatus::Ok]);
        store.check_again();
        store.purge(&spec);
    }
}

#[test]
fn what_is_not_proved_is_believed() {
    let cluster = cluster_or_skip!("what_is_not_proved_is_believed");
    let mut store = Store::new(&cluster);
    let (spec, _) = with_a_lost_change(&mut store, "believed", &small_objects());
    store.options.prove = 0;
    let report = store.run(&spec);
    assert_eq!((report.status, report.proved_bytes), (Status::Ok, 0), "{report:?}");
    assert_eq!(suspects(&store, &spec), [false; 2]);
    store.purge(&spec);
}

#[test]
fn an_increment_is_proved_within_its_budget() {
    let cluster = cluster_or_skip!("an_increment_is_proved_within_its_budget");
    let mut store = Store::new(&cluster);
    let spec = store.image("proved", 64 * MIB, &small_objects());
    store.driver.write(&spec, 0, 32 * MIB, 1).expect("a write");
    store.back_up(&spec);
    store.driver.write(&spec, MIB, 10_000, 2).expect("a write");
    let report = store.run(&spec);
    // Of 8000 pages a few may be chosen twice.
    assert!(report.proved_bytes > 50 * 4096 && report.proved_bytes <= 64 * 4096, "{report:?}");
    store.purge(&spec);
}

#[test]
fn a_base_that_is_gone_is_compared_with_where_that_is_asked_for() {
    let cluster = cluster_or_skip!("a_base_that_is_gone_is_compared_with_where_that_is_asked_for");
    let mut store = Store::new(&cluster);
    let spec = store.image("base-compared", 4 * MIB, &small_objects());
    store.driver.write(&spec, 0, 2 * MIB, 1).expect("a write");
    let first = store.back_up(&spec);
    store.options.when_base_is_gone = BaseGone::Compare;
    let snapshot = |made: &Made| made.manifest["snapshot"].as_str().expect("a name").to_owned();
    store.driver.snap_remove(&spec, &snapshot(&first)).expect("a removal");
    store.driver.write(&spec, MIB, 8192, 2).expect("a write");
    store.driver.discard(&spec, 0, 65_536).expect("a discard");
    let second = store.back_up(&spec);
    assert_compared(&second, &first, Some("gone"));
    assert_eq!(second.held(), (8192, 65_536));
    // Made again under its name, after another change.
    store.driver.snap_remove(&spec, &snapshot(&second)).expect("a removal");
    store.driver.write(&spec, 3 * MIB, 4096, 3).expect("a write");
    store.driver.snap_create(&spec, &snapshot(&second)).expect("a snapshot");
    let third = store.back_up(&spec);
    assert_compared(&third, &second, Some("deleted and made again"));
    assert_eq!(third.held(), (4096, 0));
    store.back_up(&spec).assert_upon(&third);
    // Another image of this name is another matter.
    store.purge(&spec);
    store.driver.create(&spec, 4 * MIB, &small_objects()).expect("an image");
    store.back_up(&spec).assert_full(Some("the image was deleted and made again"));
    store.check_again();
    store.purge(&spec);
}

#[test]
fn images_of_every_history_are_compared() {
    let cluster = cluster_or_skip!("images_of_every_history_are_compared");
    for compression in [Compression::None, Compression::Zstd { level: None }] {
        for mut store in Store::of_each_writer(&cluster) {
            store.options.compression = compression;
            let parent = store.image("compared-parent", 4 * MIB, &small_objects());
            store.driver.write(&parent, 0, 3 * MIB, 1).expect("a write");
            store.driver.snap_create(&parent, "s").expect("a snapshot");
            let spec = crate::cluster::unique_image("compared");
            store.driver.clone(&parent, "s", &spec, &small_objects()).expect("a clone");
            let mut last = store.back_up(&spec);
            store.options.diff = DiffMode::Compare;
            type Change = fn(&Store, &Spec);
            let changes: [Change; 7] = [
                |_, _| {},
                |store, spec| store.driver.write(spec, 100_000, 70_000, 2).expect("a write"),
                |store, spec| store.driver.discard(spec, 1 << 16, 5 << 16).expect("a discard"),
                |store, spec| store.driver.resize(spec, 2 * MIB + 1000).expect("shrunk"),
                |store, spec| store.driver.resize(spec, 6 * MIB + 1).expect("grown"),
                |store, spec| store.driver.flatten(spec).expect("flattened"),
                |store, spec| {
                    store.driver.write(spec, 5 * MIB, MIB, 3).expect("a write");
                    store.driver.resize(spec, 5 * MIB + 700).expect("shrunk");
                },
            ];
            for (number, change) in changes.iter().enumerate() {
                change(&store, &spec);
                let made = store.back_up(&spec);
                assert_compared(&made, &last, None);
                if [0, 5].contains(&number) {
                    assert_eq!(made.held(), (0, 0), "after change {number}");
                }
                last = made;
            }
            store.options.diff = DiffMode::Exact;
            store.driver.write(&spec, 0, 4096, 4).expect("a write");
            store.back_up(&spec).assert_upon(&last);
            store.check_again();
            store.purge(&spec);
            store.purge(&parent);
        }
    }
}

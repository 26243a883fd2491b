//! What a backup builds upon: only a base that is beyond doubt.

use std::fs;
use std::process::Command;

use rbd2qcow2_core::chain::PointName;

use super::{MIB, small_objects};
use crate::cluster_or_skip;
use crate::driver::Spec;
use crate::store::{Made, Store, output};

fn begun(store: &mut Store, name: &str) -> (Spec, Made) {
    let spec = store.image(name, 2 * MIB, &small_objects());
    store.driver.write(&spec, 0, MIB, 1).expect("a write");
    let first = store.back_up(&spec);
    (spec, first)
}

fn snapshot(made: &Made) -> &str {
    made.manifest["snapshot"].as_str().expect("a name")
}

#[test]
fn an_image_made_again_under_its_name() {
    let cluster = cluster_or_skip!("an_image_made_again_under_its_name");
    let mut store = Store::new(&cluster);
    let (spec, first) = begun(&mut store, "made-again");
    store.purge(&spec);
    store.driver.create(&spec, 2 * MIB, &small_objects()).expect("an image");
    store.driver.write(&spec, MIB / 2, MIB, 2).expect("a write");
    // Not even a snapshot of the right name makes it the same image.
    store.driver.snap_create(&spec, snapshot(&first)).expect("a snapshot");
    let second = store.back_up(&spec);
    second.assert_full(Some("deleted and made again"));
    assert_ne!(first.manifest["chain"], second.manifest["chain"]);
    store.back_up(&spec).assert_upon(&second);
    store.check_again();
    store.purge(&spec);
}

#[test]
fn a_base_snapshot_that_is_gone() {
    let cluster = cluster_or_skip!("a_base_snapshot_that_is_gone");
    let mut store = Store::new(&cluster);
    let (spec, first) = begun(&mut store, "base-gone");
    store.driver.snap_remove(&spec, snapshot(&first)).expect("a removal");
    let second = store.back_up(&spec);
    second.assert_full(Some("gone"));
    store.driver.write(&spec, 0, 1000, 2).expect("a write");
    store.back_up(&spec).assert_upon(&second);
    store.check_again();
    store.purge(&spec);
}

#[test]
fn a_base_snapshot_made_again_under_its_name() {
    let cluster = cluster_or_skip!("a_base_snapshot_made_again_under_its_name");
    let mut store = Store::new(&cluster);
    let (spec, first) = begun(&mut store, "base-again");
    store.driver.snap_remove(&spec, snapshot(&first)).expect("a removal");
    // Were this believed, the change would be in no layer.
    store.driver.write(&spec, 0, MIB, 2).expect("a write");
    store.driver.snap_create(&spec, snapshot(&first)).expect("a snapshot");
    let second = store.back_up(&spec);
    second.assert_full(Some("deleted and made again"));
    store.back_up(&spec).assert_upon(&second);
    store.check_again();
    store.purge(&spec);
}

#[test]
fn two_destinations_do_not_harm_each_other() {
    let cluster = cluster_or_skip!("two_destinations_do_not_harm_each_other");
    let (mut here, mut there) = (Store::new(&cluster), Store::new(&cluster));
    let (spec, mut last_here) = begun(&mut here, "two-destinations");
    // Each opens the image for writing as a client of its own; let go of the lock in between.
    let mut last_there: Option<Made> = None;
    for round in 0..3 {
        here.driver.write(&spec, round * 10_000, 5000, round).expect("a write");
        here.driver.close(&spec).expect("closed");
        let made = there.back_up(&spec);
        match &last_there {
            Some(last) => made.assert_upon(last),
            None => made.assert_full(None),
        }
        last_there = Some(made);
        here.driver.discard(&spec, 300_000 + round * 65_536, 65_536).expect("a discard");
        let made = here.back_up(&spec);
        made.assert_upon(&last_here);
        last_here = made;
        // One base for each.
        assert_eq!(here.snapshot_names(&spec).len(), 2);
    }
    here.check_again();
    there.check_again();
    here.purge(&spec);
}

#[test]
fn a_full_backup_on_request() {
    let cluster = cluster_or_skip!("a_full_backup_on_request");
    let mut store = Store::new(&cluster);
    let (spec, _) = begun(&mut store, "full");
    store.options.full = true;
    let second = store.back_up(&spec);
    second.assert_full(Some("--full"));
    assert_eq!(second.held(), (MIB, 0));
    store.options.full = false;
    store.back_up(&spec).assert_upon(&second);
    store.check_again();
    store.purge(&spec);
}

#[test]
fn as_many_snapshots_are_kept_as_asked_for() {
    let cluster = cluster_or_skip!("as_many_snapshots_are_kept_as_asked_for");
    let mut store = Store::new(&cluster);
    let (spec, _) = begun(&mut store, "keep");
    store.driver.snap_create(&spec, "mine").expect("a snapshot");
    // How many are kept, and how many are there afterwards, besides the user's.
    for (keep, there) in [(1, 1), (3, 2), (3, 3), (3, 3), (1, 1), (0, 1)] {
        store.options.keep_snapshots = keep;
        store.back_up(&spec);
        let names = store.snapshot_names(&spec);
        assert!(names.contains("mine") && names.len() == there + 1, "{keep}: {names:?}");
    }
    store.purge(&spec);
}

/// The directory of the Python tool with one full and one incremental backup, and their snapshots.
pub fn python_chain(store: &mut Store, name: &str, times: [&str; 2]) -> Spec {
    let size = 2 * MIB + 1000;
    let spec = store.image(name, size, &small_objects());
    let directory = store.directory(&spec);
    fs::create_dir(&directory).expect("a directory");
    let mut backing = "empty.qcow2".to_owned();
    let qemu_img = |arguments: &[&str]| {
        let done = Command::new("qemu-img").args(arguments).current_dir(&directory).output();
        let done = done.expect("qemu-img runs");
        assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    };
    let sectors = size.next_multiple_of(512).to_string();
    qemu_img(&["create", "-q", "-f", "qcow2", "empty.qcow2", &sectors]);
    for (seed, time) in (1..).zip(times) {
        store.driver.write(&spec, 100_000 * seed, 300_000, seed).expect("a write");
        store.driver.snap_create(&spec, time).expect("a snapshot");
        let raw = tempfile::NamedTempFile::new().expect("a file");
        store.driver.read_to(&spec, Some(time), raw.path()).expect("the snapshot");
        let layer = format!("{}@{time}.qcow2", spec.image);
        let input = raw.path().to_str().expect("a path");
        qemu_img(&[
            "convert", "-q", "-f", "raw", "-O", "qcow2", "-B", &backing, "-F", "qcow2", input, &layer,
        ]);
        store.adopt(&spec, time, &directory.join(&layer), raw.path());
        backing = layer;
    }
    store.freeze(&spec, &[]);
    spec
}

#[test]
fn a_chain_of_the_python_tool_goes_on() {
    let cluster = cluster_or_skip!("a_chain_of_the_python_tool_goes_on");
    let mut store = Store::new(&cluster);
    let spec = python_chain(&mut store, "python", ["1700000000", "1700086400"]);
    store.driver.write(&spec, 2 * MIB, 1000, 7).expect("a write");
    store.driver.discard(&spec, 131_072, 65_536).expect("a discard");
    let [_, python] = store.points() else { panic!("two points") };
    let python = python.clone();
    let first = store.back_up(&spec);
    first.assert_upon(&python);
    assert!(first.held().0 <= 2 * 65_536, "{first:?}");
    let names = store.snapshot_names(&spec);
    assert!(names.contains("1700000000") && names.contains("1700086400") && names.len() == 3, "{names:?}");
    store.driver.write(&spec, 1_000_000, 10, 8).expect("a write");
    let second = store.back_up(&spec);
    second.assert_upon(&first);
    assert_eq!(first.manifest["chain"], second.manifest["chain"]);
    // Five files: two of ours, two of the Python tool and its empty one.
    let info = output("qemu-img".as_ref(), &["info", "--backing-chain", "--output=json"], &second.file);
    let info: Vec<serde_json::Value> = serde_json::from_slice(&info).expect("JSON");
    assert_eq!(info.len(), 5);
    store.check_again();
    store.purge(&spec);
}

#[test]
fn a_chain_of_the_python_tool_without_its_snapshot() {
    let cluster = cluster_or_skip!("a_chain_of_the_python_tool_without_its_snapshot");
    let mut store = Store::new(&cluster);
    let spec = python_chain(&mut store, "python-gone", ["1700000000", "1700086400"]);
    store.driver.snap_remove(&spec, "1700086400").expect("a removal");
    store.back_up(&spec).assert_full(Some("gone"));
    assert!(store.snapshot_names(&spec).contains("1700000000"));
    store.check_again();
    store.purge(&spec);
}

/// Seconds since 1970 of a point's name.
fn second(point: &str) -> i64 {
    PointName::parse(point).expect("a point").timestamp().as_second()
}

#[test]
fn points_within_a_second_have_names_of_their_own() {
    let cluster = cluster_or_skip!("points_within_a_second_have_names_of_their_own");
    let store = Store::new(&cluster);
    let spec = store.image("quick", MIB, &small_objects());
    let points: Vec<_> = (0..4)
        .map(|seed| {
            store.driver.write(&spec, 0, 4096, seed).expect("a write");
            // Nothing is checked in between, so several fall into a second.
            let report = store.run(&spec);
            report.point.clone().unwrap_or_else(|| panic!("{report:?}"))
        })
        .collect();
    let seconds: Vec<_> = points.iter().map(|point| second(point)).collect();
    assert!(seconds.windows(2).all(|pair| pair[0] < pair[1]), "{points:?}");
    store.purge(&spec);
}

#[test]
fn a_clock_that_went_back() {
    let cluster = cluster_or_skip!("a_clock_that_went_back");
    let mut store = Store::new(&cluster);
    // The last point is of the year 2100, so every clock has gone back.
    let spec = python_chain(&mut store, "clock", ["1700000000", "4102444800"]);
    let last = store.points()[1].clone();
    let first = store.back_up(&spec);
    first.assert_upon(&last);
    assert_eq!(first.point, "21000101T000001Z");
    store.driver.write(&spec, 0, 4096, 3).expect("a write");
    let second = store.back_up(&spec);
    second.assert_upon(&first);
    assert_eq!(second.point, "21000101T000002Z");
    store.check_again();
    store.purge(&spec);
}

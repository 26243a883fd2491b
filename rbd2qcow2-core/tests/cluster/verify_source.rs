//! Points held against the snapshots that they were taken from.

use std::path::Path;
use std::time::Duration;

use rbd2qcow2_core::cancel::Cancel;
use rbd2qcow2_core::chain::ImageName;
use rbd2qcow2_core::options::DiffMode;
use rbd2qcow2_core::progress::Status;
use rbd2qcow2_core::rbd::{ClusterOptions, Patience};
use rbd2qcow2_core::verify::{
    ClusterSnapshots, Finding, PointReport, SourceStatus, VerifyImage, VerifyOptions, VerifyProgress,
    VerifyStatus,
};

use crate::cluster::TestCluster;
use crate::cluster_or_skip;
use crate::driver::{Driver, FULL_FEATURES, Layout, Spec};
use crate::store::Store;

const MIB: u64 = 1 << 20;

/// Compares all points of an image with their snapshots.
pub fn verify(cluster: &TestCluster, dest: &Path, spec: &Spec) -> Vec<PointReport> {
    let patience = Patience { limit: Duration::from_secs(60), cancel: Cancel::new() };
    let options = ClusterOptions { conf: Some(cluster.conf.clone()), ..ClusterOptions::default() };
    let snapshots = ClusterSnapshots::connect(&options, patience).expect("the cluster answers");
    let image = ImageName::new(&spec.image).expect("a name");
    let verify = VerifyImage {
        dest,
        image: &image,
        points: &[],
        options: &VerifyOptions::default(),
        snapshots: Some(&snapshots),
        progress: &VerifyProgress::default(),
        cancel: &Cancel::new(),
    };
    verify.run().expect("verified")
}

/// All points are whole, and those whose snapshots are still there the same as these.
pub fn check(cluster: &TestCluster, dest: &Path, driver: &Driver, specs: &[Spec]) {
    for spec in specs {
        let snaps = driver.snaps(spec).expect("snapshots");
        let reports = verify(cluster, dest, spec);
        let mut compared = 0;
        for report in &reports {
            assert_eq!(report.status, VerifyStatus::Ok, "{report:?}");
            let is_there = snaps.iter().any(|snap| snap.name.ends_with(&format!("-{}", report.point)));
            match &report.source {
                Some(SourceStatus::Same) if is_there => compared += 1,
                Some(SourceStatus::NotCompared(why)) if !is_there && why.contains("not there") => {}
                source => panic!("{}@{}: {source:?}", spec.image, report.point),
            }
        }
        assert!(compared > 0, "{reports:?}");
    }
}

/// What fast-diff misses is what `--source` is for: an increment whose changes were left out.
#[test]
fn an_increment_that_lacks_its_changes_is_found() {
    let cluster = cluster_or_skip!("an_increment_that_lacks_its_changes_is_found");
    let mut store = Store::new(&cluster);
    store.options.keep_snapshots = 10;
    let spec = store.image("left-out", 8 * MIB, &Layout::new(18, FULL_FEATURES));
    store.driver.write(&spec, 0, 2 * MIB, 1).expect("a write");
    store.driver.write(&spec, 6 * MIB, 16_384, 2).expect("a write");
    store.back_up(&spec);
    store.driver.snap_create(&spec, "before").expect("a snapshot");
    store.driver.write(&spec, MIB, MIB / 2, 3).expect("a write");
    // The object stays, and so its bit in the map.
    store.driver.write_zeroes(&spec, 6 * MIB, 4096).expect("zeroes");
    store.back_up(&spec);
    check(&cluster, store.dest(), &store.driver, std::slice::from_ref(&spec));

    // The object maps come back with the rollback, and say that nothing has changed.
    store.driver.rollback(&spec, "before").expect("a rollback");
    store.options.diff = DiffMode::Fast;
    // Half of the time the proof would find it.
    store.options.prove = 0;
    let report = store.run(&spec);
    assert_eq!((report.status, report.data_bytes), (Status::Ok, 0), "fast-diff has learned: {report:?}");
    // One upon it, that is honest about what it adds.
    store.driver.write(&spec, 4 * MIB, 8192, 4).expect("a write");
    store.options.diff = DiffMode::Exact;
    let report = store.run(&spec);
    assert_eq!(report.status, Status::Ok);

    let reports = verify(&cluster, store.dest(), &spec);
    let statuses: Vec<_> = reports.iter().map(|report| report.status).collect();
    use VerifyStatus::{Damaged, Ok};
    assert_eq!(statuses, [Ok, Ok, Damaged, Damaged], "{reports:?}");
    for report in &reports[2..] {
        assert_eq!(report.source, Some(SourceStatus::Different));
        let ranges: Vec<_> = report
            .findings
            .iter()
            .filter_map(|finding| match finding {
                Finding::Source { range, .. } => Some(range.clone()),
                _ => None,
            })
            .collect();
        // What the rollback has changed, and nothing else.
        assert_eq!(ranges, [MIB..MIB + MIB / 2, 6 * MIB..6 * MIB + 4096], "{report:?}");
    }
    store.purge(&spec);
}

#[test]
fn snapshots_that_are_gone_or_not_the_same_ones_are_told_apart() {
    let cluster = cluster_or_skip!("snapshots_that_are_gone_or_not_the_same_ones_are_told_apart");
    let mut store = Store::new(&cluster);
    let spec = store.image("gone", 2 * MIB, &Layout::new(16, FULL_FEATURES));
    store.driver.write(&spec, 0, MIB, 1).expect("a write");
    let made = store.back_up(&spec);
    let snapshot = made.manifest["snapshot"].as_str().expect("a name").to_owned();
    let why = || {
        let reports = verify(&cluster, store.dest(), &spec);
        let [report] = &reports[..] else { panic!("{reports:?}") };
        assert_eq!(report.status, VerifyStatus::Ok);
        match &report.source {
            Some(SourceStatus::NotCompared(why)) => why.clone(),
            source => panic!("{source:?}"),
        }
    };
    // Another snapshot of the same name, of other content.
    store.driver.snap_remove(&spec, &snapshot).expect("removed");
    assert!(why().contains("the snapshot is not there"), "{}", why());
    store.driver.write(&spec, 0, 4096, 2).expect("a write");
    store.driver.snap_create(&spec, &snapshot).expect("made");
    assert!(why().contains("another snapshot"), "{}", why());
    // Another image of the same name, and none.
    store.purge(&spec);
    assert!(why().contains("the image is not there"), "{}", why());
    store.driver.create(&spec, 2 * MIB, &Layout::new(16, FULL_FEATURES)).expect("made");
    assert!(why().contains("another image"), "{}", why());
    store.purge(&spec);
}

/// Where nobody answers, nothing is said to be good.
#[test]
fn a_snapshot_that_cannot_be_read_is_an_error() {
    let cluster = cluster_or_skip!("a_snapshot_that_cannot_be_read_is_an_error");
    let mut store = Store::new(&cluster);
    let spec = store.image("unreadable", 2 * MIB, &Layout::new(16, FULL_FEATURES));
    store.driver.write(&spec, 0, MIB, 1).expect("a write");
    store.back_up(&spec);
    let cancel = Cancel::new();
    let patience = Patience { limit: Duration::from_secs(60), cancel: cancel.clone() };
    let options = ClusterOptions { conf: Some(cluster.conf.clone()), ..ClusterOptions::default() };
    let snapshots = ClusterSnapshots::connect(&options, patience).expect("the cluster answers");
    cancel.set();
    let verify = VerifyImage {
        dest: store.dest(),
        image: &ImageName::new(&spec.image).expect("a name"),
        points: &[],
        options: &VerifyOptions::default(),
        snapshots: Some(&snapshots),
        progress: &VerifyProgress::default(),
        cancel: &Cancel::new(),
    };
    let reports = verify.run().expect("looked at");
    let [report] = &reports[..] else { panic!("{reports:?}") };
    assert!(
        matches!(&report.source, Some(SourceStatus::Failed(why)) if why.contains("interrupted")),
        "{report:?}"
    );
    assert_eq!(report.status, VerifyStatus::Ok);
    store.purge(&spec);
}

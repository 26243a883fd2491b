//! Clones whose ancestors change while they are read. A handle that is open for reading keeps asking the
//! parents of when it was opened; what is gone of them reads as zeroes, without an error.

use rbd2qcow2_core::cancel::Cancel;
use rbd2qcow2_core::chain::ImageName;
use rbd2qcow2_core::chain::manifest::Manifest;
use rbd2qcow2_core::options::DiffMode;
use rbd2qcow2_core::progress::Stage;
use rbd2qcow2_core::rbd::{ClusterOptions, Patience};
use rbd2qcow2_core::source::BoxError;
use rbd2qcow2_core::verify::{
    ClusterSnapshots, Found, PointReport, Snapshots, SourceStatus, VerifyImage, VerifyOptions, VerifyProgress,
};

use super::{MIB, small_objects};
use crate::cluster::{TestCluster, unique_image};
use crate::cluster_or_skip;
use crate::driver::{Driver, FULL_FEATURES, Layout, Spec};
use crate::held::{Moment, back_up_meanwhile, held, judge, night};
use crate::store::{Store, told};

/// Read in three pieces.
const SIZE: u64 = 5 * MIB;

/// Why a run may refuse an image whose ancestors have changed.
const REASONS: &[&str] = &["parent", "ancest", "takes its data from"];

const MOMENTS: [Moment; 5] = [
    Moment::At(Stage::Snapshot),
    Moment::At(Stage::Queue),
    Moment::At(Stage::Copy),
    Moment::Copying,
    Moment::At(Stage::Commit),
];

/// Objects of 256 KiB: flattening takes its time for each.
fn objects() -> Layout {
    Layout::new(18, FULL_FEATURES)
}

/// A clone of a clone.
struct Family {
    old: Spec,
    middle: Spec,
    young: Spec,
}

impl Family {
    /// Each holds something that the others do not.
    fn make(driver: &Driver, layout: &Layout) -> Self {
        let [old, middle, young] = ["old", "middle", "young"].map(unique_image);
        driver.create(&old, SIZE, layout).expect("an image");
        driver.write(&old, 0, SIZE, 1).expect("a write");
        driver.snap_create(&old, "base").expect("a snapshot");
        driver.clone(&old, "base", &middle, layout).expect("a clone");
        driver.write(&middle, MIB, MIB / 2, 2).expect("a write");
        driver.snap_create(&middle, "base").expect("a snapshot");
        driver.clone(&middle, "base", &young, layout).expect("a clone");
        driver.write(&young, 2 * MIB, 5000, 3).expect("a write");
        driver.close_all().expect("closed");
        Self { old, middle, young }
    }

    /// The young one needs nobody any more, and the middle one goes.
    fn parent_goes(&self, driver: &Driver) {
        driver.flatten(&self.young).expect("flattened");
        driver.close(&self.young).expect("closed");
        driver.purge(&self.middle).expect("removed");
    }

    /// The middle one needs nobody any more, and the old one goes; the young one's parent is as it was.
    fn grandparent_goes(&self, driver: &Driver) {
        driver.flatten(&self.middle).expect("flattened");
        driver.close(&self.middle).expect("closed");
        driver.purge(&self.old).expect("removed");
    }

    /// The middle one needs nobody any more, and the old one loses its snapshot.
    fn snapshot_of_the_grandparent_goes(&self, driver: &Driver) {
        driver.flatten(&self.middle).expect("flattened");
        driver.close(&self.middle).expect("closed");
        driver.snap_remove(&self.old, "base").expect("removed");
        driver.close(&self.old).expect("closed");
        // The OSDs forget it in their own time.
        std::thread::sleep(std::time::Duration::from_millis(700));
    }

    /// The middle one gets another id, and the image of its old one goes.
    fn parent_migrates(&self, driver: &Driver) {
        driver.migration_prepare(&self.middle, &self.middle, &objects()).expect("prepared");
        driver.migration_execute(&self.middle).expect("executed");
        driver.migration_commit(&self.middle).expect("committed");
    }

    fn purge(&self, driver: &Driver) {
        for spec in [&self.young, &self.middle, &self.old] {
            match driver.purge(spec) {
                Err(error) if error.errno() != Some(2) => panic!("{error}"),
                _ => {}
            }
        }
    }
}

/// Has the ancestors change at each moment of a backup.
fn change_meanwhile(test: &str, layout: &Layout, change: impl Fn(&Family, &Driver)) {
    let cluster = TestCluster::find(test);
    let Some(cluster) = cluster else { return };
    let mut store = Store::new(&cluster);
    store.options.parallel = 1;
    // During a full backup, and during an incremental one.
    for (diff, nights) in [(DiffMode::Exact, 0), (DiffMode::Exact, 1), (DiffMode::Scan, 1)] {
        store.options.diff = diff;
        for moment in MOMENTS {
            if diff == DiffMode::Scan && !matches!(moment, Moment::At(Stage::Queue) | Moment::Copying) {
                continue;
            }
            let what = format!("{diff:?}, {moment:?}, after {nights} nights");
            let family = Family::make(&store.driver, layout);
            let spec = &family.young;
            for round in 0..nights {
                night(&store, spec, &what).assert_right(&what);
                store.driver.write(spec, MIB / 2, MIB, 10 + round).expect("a write");
                // Uncovers what the ancestors hold.
                store.driver.discard(spec, 2 * MIB, MIB / 4).expect("a discard");
                store.driver.close(spec).expect("closed");
            }
            store.options.rate_limit = (moment == Moment::Copying).then_some(12 * MIB);
            let report = back_up_meanwhile(&store, spec, moment, || change(&family, &store.driver));
            judge(&store, spec, &report, &what).assert_right_or_because(&what, REASONS);
            store.options.rate_limit = None;
            store.driver.write(spec, 0, 4096, 20).expect("a write");
            night(&store, spec, &format!("{what}, the next night")).assert_right(&what);
            family.purge(&store.driver);
        }
    }
}

#[test]
fn a_clone_is_flattened_and_its_parent_removed() {
    change_meanwhile("a_clone_is_flattened_and_its_parent_removed", &objects(), Family::parent_goes);
}

#[test]
fn a_clone_without_deep_flatten_is_flattened() {
    let layout = Layout::new(18, &["layering", "exclusive-lock", "object-map", "fast-diff"]);
    change_meanwhile("a_clone_without_deep_flatten_is_flattened", &layout, |family, driver| {
        driver.flatten(&family.young).expect("flattened");
        driver.close(&family.young).expect("closed");
        // Its snapshots still need the parent.
        driver.snap_remove(&family.middle, "base").expect("moved to the trash");
        driver.close(&family.middle).expect("closed");
    });
}

#[test]
fn a_parent_is_flattened_and_the_grandparent_removed() {
    change_meanwhile(
        "a_parent_is_flattened_and_the_grandparent_removed",
        &objects(),
        Family::grandparent_goes,
    );
}

#[test]
fn all_ancestors_go() {
    change_meanwhile("all_ancestors_go", &objects(), |family, driver| {
        family.parent_goes(driver);
        driver.purge(&family.old).expect("removed");
    });
}

#[test]
fn a_parent_migrates() {
    change_meanwhile("a_parent_migrates", &objects(), Family::parent_migrates);
}

/// No harm is done, and none must be seen.
#[test]
fn a_parent_is_moved_to_the_trash() {
    change_meanwhile("a_parent_is_moved_to_the_trash", &objects(), |family, driver| {
        driver.snap_remove(&family.middle, "base").expect("moved to the trash");
        let id = driver.trash_move(&family.middle).expect("moved to the trash");
        // So that it is found again.
        driver.trash_restore(&family.middle, &id).expect("restored");
    });
}

/// Changes the ancestors when a snapshot has been opened.
struct Meddling<'a, F> {
    snapshots: ClusterSnapshots,
    change: &'a F,
}

impl<F: Fn() + Sync> Snapshots for Meddling<'_, F> {
    fn find(&self, manifest: &Manifest) -> Result<Found, BoxError> {
        let found = self.snapshots.find(manifest)?;
        (self.change)();
        Ok(found)
    }
}

fn verify_meanwhile(
    cluster: &TestCluster,
    store: &Store,
    spec: &Spec,
    change: impl Fn() + Sync,
) -> PointReport {
    let patience = Patience { limit: std::time::Duration::from_secs(60), cancel: Cancel::new() };
    let options = ClusterOptions { conf: Some(cluster.conf.clone()), ..ClusterOptions::default() };
    let snapshots = ClusterSnapshots::connect(&options, patience).expect("the cluster answers");
    let verify = VerifyImage {
        dest: store.dest(),
        image: &ImageName::new(&spec.image).expect("a name"),
        points: &[],
        options: &VerifyOptions::default(),
        snapshots: Some(&Meddling { snapshots, change: &change }),
        progress: &VerifyProgress::default(),
        cancel: &Cancel::new(),
    };
    let mut reports = verify.run().expect("verified");
    assert_eq!(reports.len(), 1, "{reports:?}");
    reports.pop().expect("one point")
}

#[test]
fn verify_is_not_deceived() {
    let cluster = cluster_or_skip!("verify_is_not_deceived");
    let changes: [fn(&Family, &Driver); 3] =
        [Family::parent_goes, Family::grandparent_goes, Family::parent_migrates];
    for (number, change) in changes.into_iter().enumerate() {
        let store = Store::new(&cluster);
        let family = Family::make(&store.driver, &objects());
        let spec = &family.young;
        night(&store, spec, "a first night").assert_right("a first night");
        let report = verify_meanwhile(&cluster, &store, spec, || change(&family, &store.driver));
        // It is the same; and where that cannot be told, nothing is said of it.
        let is_true = match report.source.as_ref().expect("compared") {
            SourceStatus::Same => true,
            SourceStatus::NotCompared(why) | SourceStatus::Failed(why) => {
                REASONS.iter().any(|word| why.contains(word))
            }
            SourceStatus::Different => false,
        };
        assert!(is_true, "change {number}: {report:?}");
        family.purge(&store.driver);
    }
}

/// A clone that is restored over is read first: what it seems to hold already is not written.
#[test]
fn a_restore_over_a_clone_is_not_deceived() {
    let cluster = cluster_or_skip!("a_restore_over_a_clone_is_not_deceived");
    let changes: [fn(&Family, &Driver); 3] =
        [Family::parent_goes, Family::grandparent_goes, Family::snapshot_of_the_grandparent_goes];
    for (number, change) in changes.into_iter().enumerate() {
        for moment in [Moment::At(Stage::Empty), Moment::At(Stage::Copy)] {
            let mut store = Store::new(&cluster);
            let family = Family::make(&store.driver, &objects());
            let spec = &family.young;
            // The point has what the head of the oldest one has. The image has what its snapshot has; once
            // that is gone, an old handle shows the head instead, as if nothing were to do.
            store.driver.snap_create(spec, "covered").expect("a snapshot");
            store.driver.write(&family.old, 0, MIB / 2, 9).expect("a write");
            store.driver.write(spec, 0, MIB / 2, 9).expect("a write");
            store.driver.write_zeroes(spec, MIB / 2, MIB / 2).expect("zeroes");
            let made = store.back_up(spec);
            store.driver.rollback(spec, "covered").expect("a rollback");
            store.driver.close_all().expect("closed");
            let target = store.overwriting(spec);
            let mut change = Some(change);
            let result = held(
                |observer| store.restore_observed(&made, &target, observer),
                |now| {
                    if now == moment {
                        change.take().into_iter().for_each(|change| change(&family, &store.driver));
                    }
                },
            );
            let what = format!("change {number}, {moment:?}");
            assert!(change.is_none(), "{what}: never played, {result:?}");
            match result {
                Ok(_) => store.assert_image(&made, spec),
                Err(error) => {
                    let why = told(&error);
                    assert!(REASONS.iter().any(|word| why.contains(word)), "{what}: {why}");
                }
            }
            family.purge(&store.driver);
        }
    }
}

/// What showed the parent when the base was read, and is changed after a flatten: the base no longer tells that
/// it had a parent.
#[test]
fn a_clone_that_is_flattened_and_then_discarded_shrunk_or_truncated() {
    let cluster = cluster_or_skip!("a_clone_that_is_flattened_and_then_discarded_shrunk_or_truncated");
    const OBJECT: u64 = 64 << 10;
    let without_deep: &[&str] = &["layering", "exclusive-lock", "object-map", "fast-diff"];
    for (features, diff) in [
        (FULL_FEATURES, DiffMode::Exact),
        (FULL_FEATURES, DiffMode::Scan),
        (without_deep, DiffMode::Exact),
        (without_deep, DiffMode::Scan),
    ] {
        for change in 0..3 {
            let mut store = Store::new(&cluster);
            (store.options.diff, store.options.prove) = (diff, 0);
            let parent = store.image("flat-parent", 2 * MIB, &small_objects());
            store.driver.write(&parent, 0, 2 * MIB, 1).expect("a write");
            store.driver.snap_create(&parent, "base").expect("a snapshot");
            let spec = unique_image("flat");
            store.driver.clone(&parent, "base", &spec, &Layout::new(16, features)).expect("a clone");
            store.driver.write(&spec, 3 * OBJECT, 100, 2).expect("a write");
            let what = format!("{diff:?}, {features:?}, change {change}");
            night(&store, &spec, &what).assert_right(&what);
            let shrink = |size| store.driver.resize(&spec, size).expect("resized");
            match change {
                0 => {
                    store.driver.flatten(&spec).expect("flattened");
                    store.driver.discard(&spec, 5 * OBJECT, OBJECT).expect("a discard");
                }
                1 => {
                    store.driver.flatten(&spec).expect("flattened");
                    store.driver.discard(&spec, 5 * OBJECT + OBJECT / 2, OBJECT / 2).expect("a discard");
                }
                _ => {
                    shrink(4 * OBJECT);
                    shrink(2 * MIB);
                    store.driver.flatten(&spec).expect("flattened");
                }
            }
            store.driver.close(&spec).expect("closed");
            night(&store, &spec, &format!("{what}, flattened")).assert_right(&what);
            store.driver.write(&spec, 7 * OBJECT, 100, 3).expect("a write");
            store.driver.close(&spec).expect("closed");
            night(&store, &spec, &format!("{what}, the third night")).assert_right(&what);
            store.purge(&spec);
            store.purge(&parent);
        }
    }
}

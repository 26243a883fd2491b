//! Images that migrate: until the commit they are clones of their source, in ways of their own.

use rbd2qcow2_core::options::DiffMode;
use rbd2qcow2_core::progress::Stage;

use super::{MIB, small_objects};
use crate::cluster_or_skip;
use crate::driver::{Layout, NO_OBJECT_MAP, Spec};
use crate::held::{Moment, back_up_meanwhile, judge, night};
use crate::store::Store;

/// Why a run may refuse an image that migrates.
const REASONS: &[&str] = &["migrat", "parent", "ancest", "disappeared", "gone", "not exist", "not found"];

const SIZE: u64 = 4 * MIB;

/// Twelve backups of one image while it migrates. Nothing of ours is removed: a snapshot of before the
/// preparation that goes takes every writer with it.
fn begun(store: &mut Store, diff: DiffMode, layout: &Layout) -> Spec {
    store.options.keep_snapshots = 100;
    store.options.diff = diff;
    let spec = store.image("migrating", SIZE, layout);
    store.driver.write(&spec, 0, SIZE, 1).expect("a write");
    store.driver.close(&spec).expect("closed");
    spec
}

fn layouts() -> [Layout; 2] {
    [small_objects(), Layout::new(16, NO_OBJECT_MAP)]
}

/// The overlap with the source shrinks with the image. When it grows again, what it uncovers is in no
/// comparison.
#[test]
fn an_overlap_that_shrinks_and_grows_again() {
    let cluster = cluster_or_skip!("an_overlap_that_shrinks_and_grows_again");
    for diff in [DiffMode::Exact, DiffMode::Scan] {
        for layout in layouts() {
            for snapshot in [false, true] {
                let mut store = Store::new(&cluster);
                let spec = begun(&mut store, diff, &layout);
                let driver = &store.driver;
                if snapshot {
                    driver.snap_create(&spec, "before").expect("a snapshot");
                    driver.write(&spec, MIB, MIB, 2).expect("a write");
                }
                driver.migration_prepare(&spec, &spec, &layout).expect("prepared");
                let look = |what: &str| {
                    let what = format!("{diff:?}, {layout:?}, snapshot {snapshot}: {what}");
                    store.driver.close(&spec).expect("closed");
                    night(&store, &spec, &what).assert_right_or_because(&what, REASONS);
                };
                look("prepared");
                driver.resize(&spec, MIB).expect("a resize");
                look("shrunk");
                driver.resize(&spec, SIZE).expect("a resize");
                look("grown");
                driver.write(&spec, 2 * MIB, 10_000, 3).expect("a write");
                look("written to");
                if snapshot {
                    driver.rollback(&spec, "before").expect("a rollback");
                    look("rolled back");
                }
                driver.close(&spec).expect("closed");
                driver.migration_execute(&spec).expect("executed");
                look("executed");
                driver.write(&spec, MIB, 10_000, 4).expect("a write");
                look("executed and written to");
                driver.close(&spec).expect("closed");
                driver.migration_commit(&spec).expect("committed");
                look("committed");
                store.purge(&spec);
            }
        }
    }
}

#[test]
fn a_migration_is_aborted() {
    let cluster = cluster_or_skip!("a_migration_is_aborted");
    let mut store = Store::new(&cluster);
    let spec = begun(&mut store, DiffMode::Exact, &small_objects());
    night(&store, &spec, "before").assert_right("before");
    store.driver.migration_prepare(&spec, &spec, &small_objects()).expect("prepared");
    night(&store, &spec, "prepared").assert_right_or_because("prepared", REASONS);
    store.driver.migration_abort(&spec).expect("aborted");
    store.driver.write(&spec, 0, 4096, 2).expect("a write");
    store.driver.close(&spec).expect("closed");
    night(&store, &spec, "aborted").assert_right("aborted");
    store.purge(&spec);
}

#[test]
fn an_image_begins_and_ends_to_migrate_while_it_is_read() {
    let cluster = cluster_or_skip!("an_image_begins_and_ends_to_migrate_while_it_is_read");
    let moments = [Stage::Snapshot, Stage::Queue, Stage::Copy, Stage::Commit].map(Moment::At);
    for (number, moment) in moments.into_iter().enumerate() {
        for step in ["prepare", "execute", "commit", "abort"] {
            let mut store = Store::new(&cluster);
            let spec = begun(&mut store, DiffMode::Exact, &small_objects());
            let driver = &store.driver;
            if number % 2 == 1 {
                night(&store, &spec, "before").assert_right("before");
            }
            if step != "prepare" {
                driver.migration_prepare(&spec, &spec, &small_objects()).expect("prepared");
                driver.write(&spec, MIB, 10_000, 2).expect("a write");
                driver.close(&spec).expect("closed");
            }
            if step == "commit" {
                driver.migration_execute(&spec).expect("executed");
            }
            let what = format!("{step} at {moment:?}");
            let report = back_up_meanwhile(&store, &spec, moment, || {
                let done = match step {
                    "prepare" => driver.migration_prepare(&spec, &spec, &small_objects()),
                    "execute" => driver.migration_execute(&spec),
                    "commit" => driver.migration_commit(&spec),
                    _ => driver.migration_abort(&spec),
                };
                // Ceph may refuse it, for a snapshot that came meanwhile.
                if let Err(error) = done {
                    assert!(!error.is_breakdown(), "{what}: {error}");
                }
            });
            judge(&store, &spec, &report, &what).assert_right_or_because(&what, REASONS);
            let what = format!("{what}, the next night");
            night(&store, &spec, &what).assert_right_or_because(&what, REASONS);
            let migrating =
                driver.info(&spec, None).expect("it is there").features.iter().any(|f| f == "migrating");
            if migrating {
                driver.close(&spec).expect("closed");
                if driver.migration_abort(&spec).is_err() {
                    driver.migration_execute(&spec).expect("executed");
                    driver.migration_commit(&spec).expect("committed");
                }
            }
            store.purge(&spec);
        }
    }
}

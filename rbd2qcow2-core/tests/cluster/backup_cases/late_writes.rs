//! Images without exclusive-lock: a writer that has not heard of a snapshot writes into it, also when its
//! creation has long succeeded. What the point of that snapshot lacks must be in the next one.

use std::time::Instant;

use rbd2qcow2_core::progress::Stage;

use super::MIB;
use crate::cluster::say;
use crate::cluster_or_skip;
use crate::driver::{Driver, Layout, Spec};
use crate::held::{Moment, Night, back_up_meanwhile, judge, night};
use crate::store::Store;

const OBJECT: u64 = 64 << 10;

fn without_lock() -> Layout {
    Layout::new(16, &["layering"])
}

/// Writes as a client that has heard of all snapshots but the newest.
fn late_write(driver: &Driver, spec: &Spec, object: u64, seed: u64) {
    let numbers = driver.snap_numbers(spec).expect("snapshots");
    let known = &numbers[1..];
    let newest = known.first().copied().unwrap_or(0);
    driver.stale_write(spec, object, 4096, 8192, seed, newest, known).expect("a stale write");
}

#[test]
fn a_late_write_is_in_the_next_point() {
    let cluster = cluster_or_skip!("a_late_write_is_in_the_next_point");
    // While the run goes on, before and after it has read; `None`: after it.
    let moments = [
        Some(Moment::At(Stage::Queue)),
        Some(Moment::At(Stage::Commit)),
        Some(Moment::At(Stage::CleanUp)),
        None,
    ];
    for moment in moments {
        // Into the first snapshot of a chain, and into a later one.
        for nights in 0..3 {
            for keep in if nights == 2 { vec![1, 3] } else { vec![1] } {
                let mut store = Store::new(&cluster);
                store.options.keep_snapshots = keep;
                let spec = store.image("late", 2 * MIB, &without_lock());
                let what = format!("{moment:?}, after {nights} nights, keeping {keep}");
                store.driver.write(&spec, 0, MIB, 1).expect("a write");
                for round in 0..nights {
                    night(&store, &spec, &what).assert_right(&what);
                    store.driver.write(&spec, round * 10_000, 5000, 2 + round).expect("a write");
                    // A run waits for the writes of those who have it open.
                    store.driver.close(&spec).expect("closed");
                }
                store.driver.close(&spec).expect("closed");
                // One object that the snapshot has, and one that it has not.
                let play =
                    || [3, 30].iter().for_each(|object| late_write(&store.driver, &spec, *object, *object));
                let report = match moment {
                    Some(moment) => back_up_meanwhile(&store, &spec, moment, play),
                    None => {
                        let report = store.run(&spec);
                        play();
                        report
                    }
                };
                // What came before it was read is in the point.
                if moment == Some(Moment::At(Stage::Queue)) {
                    judge(&store, &spec, &report, &what).assert_right_or_because(&what, &["exclusive-lock"]);
                }
                store.driver.write(&spec, MIB + MIB / 2, 100, 50).expect("a write");
                store.driver.close(&spec).expect("closed");
                let what = format!("{what}, the next night");
                night(&store, &spec, &what).assert_right_or_because(&what, &["exclusive-lock", "differ"]);
                store.driver.write(&spec, MIB + MIB / 2, 100, 51).expect("a write");
                store.driver.close(&spec).expect("closed");
                let what = format!("{what}, and the one after it");
                night(&store, &spec, &what).assert_right_or_because(&what, &["exclusive-lock", "differ"]);
                store.purge(&spec);
            }
        }
    }
}

/// A machine that is frozen hears of nothing, and goes on with what it knew.
#[test]
fn a_writer_that_does_not_answer() {
    let cluster = cluster_or_skip!("a_writer_that_does_not_answer");
    let store = Store::new(&cluster);
    let spec = store.image("frozen", 2 * MIB, &without_lock());
    store.driver.write(&spec, 0, MIB, 1).expect("a write");
    store.driver.close(&spec).expect("closed");
    let writer = cluster.driver();
    writer.write(&spec, 0, 4096, 2).expect("a write");
    for seed in 3..5 {
        writer.freeze();
        let start = Instant::now();
        let report = store.run(&spec);
        say(&format!("a backup beside a frozen writer took {:?}", start.elapsed()));
        writer.thaw();
        // It takes note of the snapshot at some time after this, or before.
        writer.write(&spec, seed * OBJECT, 4096, seed).expect("a write");
        let what = format!("beside a frozen writer, {seed}");
        match judge(&store, &spec, &report, &what) {
            Night::Right => {}
            Night::Refused(why) => {
                assert!(why.contains("rbd feature enable") && why.contains("exclusive-lock"), "{why}");
                let left = store.snapshot_names(&spec);
                assert!(left.is_empty(), "a snapshot was left: {left:?}");
            }
        }
    }
    night(&store, &spec, "thawed").assert_right("thawed");
    writer.close(&spec).expect("closed");
    store.purge(&spec);
}

/// The same object map faults without a lock: a rollback, a discard and a late write meet.
#[test]
fn a_late_write_and_a_rollback() {
    let cluster = cluster_or_skip!("a_late_write_and_a_rollback");
    let store = Store::new(&cluster);
    let spec = store.image("late-rollback", 2 * MIB, &without_lock());
    store.driver.write(&spec, 0, MIB, 1).expect("a write");
    store.driver.snap_create(&spec, "mine").expect("a snapshot");
    night(&store, &spec, "the first night").assert_right("the first night");
    late_write(&store.driver, &spec, 3, 7);
    // The head is rid of what came late, and the base is not.
    store.driver.rollback(&spec, "mine").expect("a rollback");
    night(&store, &spec, "the second night")
        .assert_right_or_because("the second", &["exclusive-lock", "differ"]);
    night(&store, &spec, "the third night")
        .assert_right_or_because("the third", &["exclusive-lock", "differ"]);
    store.purge(&spec);
}

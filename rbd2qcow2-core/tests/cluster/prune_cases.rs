//! Points that are forgotten as time passes, while backups go on.

use std::sync::atomic::{AtomicUsize, Ordering};

use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};
use rbd2qcow2_core::cancel::Cancel;
use rbd2qcow2_core::chain::ImageName;
use rbd2qcow2_core::layer::Compression;
use rbd2qcow2_core::merge::{MergeObserver, MergeOptions, Way};
use rbd2qcow2_core::options::Writer;
use rbd2qcow2_core::prune::{Action, Limit, Policy, PruneImage, Wanted};

use crate::backup_cases::bases::python_chain;
use crate::cluster_or_skip;
use crate::driver::{FULL_FEATURES, Layout, Spec};
use crate::random::Random;
use crate::store::Store;
use crate::verify_source;

const MIB: u64 = 1 << 20;

/// Backups, one a day.
const DAYS: i64 = 40;

/// Counts the merges for which a large layer was not copied.
#[derive(Debug, Default)]
struct Reused(AtomicUsize);

impl MergeObserver for Reused {
    fn finished(&self, way: Way) {
        self.0.fetch_add(usize::from(matches!(way, Way::InPlace | Way::Shared)), Ordering::Relaxed);
    }
}

/// Prunes the image by the rules, and tells which points stay.
fn prune(store: &Store, spec: &Spec, policy: &Policy, now: Timestamp) -> Vec<String> {
    prune_with(store, spec, policy, now, (&MergeOptions::default(), &()))
}

fn prune_with(
    store: &Store,
    spec: &Spec,
    policy: &Policy,
    now: Timestamp,
    (options, observer): (&MergeOptions, &dyn MergeObserver),
) -> Vec<String> {
    let prune = PruneImage {
        dest: store.dest(),
        image: &ImageName::new(&spec.image).expect("a name"),
        wanted: &Wanted { policy: Some(policy.clone()), ..Wanted::default() },
        zone: &TimeZone::UTC,
        now,
        options,
        observer,
        cancel: &Cancel::new(),
    };
    let plan = prune.run().expect("pruned");
    let kept = plan.decisions.iter().filter(|decision| decision.action == Action::Keep);
    kept.map(|decision| decision.point.to_string()).collect()
}

/// Seven days and four weeks, of an image that changes, grows and shrinks, with layers of every kind.
#[test]
fn a_month_of_backups() {
    let cluster = cluster_or_skip!("a_month_of_backups");
    let mut store = Store::new(&cluster);
    let mut random = Random::new(40);
    let mut size = 6 * MIB;
    let spec = store.image("month", size, &Layout::new(18, FULL_FEATURES));
    let reused = Reused::default();
    let policy = Policy { daily: Limit::AtMost(7), weekly: Limit::AtMost(4), ..Policy::default() };
    // A Monday.
    let start: Timestamp = "2026-03-02T02:00:00Z".parse().expect("a time");
    for day in 0..DAYS {
        for _ in 0..3 {
            let offset = random.below(size - 70_000);
            store.driver.write(&spec, offset, 1 + random.below(70_000), random.next()).expect("a write");
        }
        if day % 9 == 4 {
            size = 4 * MIB + random.below(4 * MIB);
            store.driver.resize(&spec, size).expect("another size");
        }
        store.options.compression =
            if day % 3 == 0 { Compression::Zstd { level: None } } else { Compression::None };
        store.options.writer = if day % 5 == 2 { Writer::QemuNbd } else { Writer::Native };
        let now = start + (24 * day).hours();
        store.options.time = Some(now);
        store.back_up(&spec);
        let mut merges = MergeOptions::default();
        if day % 4 != 3 {
            // Wherever that is possible, however small layers are.
            merges.least_saving = 0;
        }
        let kept = prune_with(&store, &spec, &policy, now, (&merges, &reused));
        store.keep_only(&spec, &kept);
        store.check_directory(&spec);
        if day % 10 == 9 {
            store.check_again();
        }
    }
    assert!(reused.0.load(Ordering::Relaxed) > 0);
    let names: Vec<_> = store.points().iter().map(|made| made.point.as_str()).collect();
    // The last day is a Friday: the week's days, the Sunday before, and the Sundays of three weeks before it.
    let expected = [
        "20260322T020000Z",
        "20260329T020000Z",
        "20260404T020000Z",
        "20260405T020000Z",
        "20260406T020000Z",
        "20260407T020000Z",
        "20260408T020000Z",
        "20260409T020000Z",
        "20260410T020000Z",
    ];
    assert_eq!(names, expected);
    store.check_again();
    verify_source::check(&cluster, store.dest(), &store.driver, std::slice::from_ref(&spec));
    store.purge(&spec);
}

/// The snapshot of the newest point is found by its name, whatever that point has taken over; and in the end
/// nothing is left of the old tool's points but the data that nobody verified.
#[test]
fn a_chain_of_the_python_tool_is_pruned_and_goes_on() {
    let cluster = cluster_or_skip!("a_chain_of_the_python_tool_is_pruned_and_goes_on");
    let mut store = Store::new(&cluster);
    let spec = python_chain(&mut store, "python-pruned", ["1700000000", "1700086400"]);
    let python = store.points().to_vec();
    python.iter().for_each(|made| store.expect_removal(&made.file));
    let policy = Policy { last: Limit::AtMost(1), ..Policy::default() };
    let mut newest = python[1].clone();
    for seed in 11..14 {
        let kept = prune(&store, &spec, &policy, Timestamp::now());
        assert_eq!(kept, std::slice::from_ref(&newest.point));
        store.keep_only(&spec, &kept);
        store.check_directory(&spec);
        store.check_again();
        store.driver.write(&spec, 50_000 * seed, 1000, seed).expect("a write");
        let made = store.back_up(&spec);
        made.assert_upon(&newest);
        newest = made;
    }
    let [oldest, _] = store.points() else { panic!("two points") };
    assert_eq!(oldest.manifest["unverified"], serde_json::json!(["1700086400"]));
    store.check_again();
    store.purge(&spec);
}

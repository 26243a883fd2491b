//! Whole prunes of real layers: points that go are merged into those that stay.

use std::collections::BTreeSet;
use std::fs;
use std::sync::{Arc, Mutex};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use proptest::prelude::*;

use super::*;
use crate::chain::PointName;
use crate::chain::durable::fault::{self, Fault};
use crate::layer::native::testing::{cases, form, image, next_content};
use crate::merge::{MergeError, MergeProgress, Turn, Way};
use crate::testing::{Fixture, plain};

fn prune_watched(
    fixture: &Fixture,
    wanted: &Wanted,
    observer: &dyn MergeObserver,
    cancel: &Cancel,
) -> Result<Plan, PruneError> {
    let (dest, zone, now) = (fixture.dest.path(), &TimeZone::UTC, Timestamp::MAX);
    let options = &MergeOptions::default();
    PruneImage { dest, image: &fixture.image, wanted, zone, now, options, observer, cancel }.run()
}

fn prune(fixture: &Fixture, wanted: &Wanted) -> Result<Plan, PruneError> {
    prune_watched(fixture, wanted, &(), &Cancel::new())
}

fn named(points: impl IntoIterator<Item = PointName>) -> Wanted {
    Wanted { points: points.into_iter().collect(), ..Wanted::default() }
}

fn newest(count: u32) -> Wanted {
    let last = Limit::AtMost(count);
    Wanted { policy: Some(Policy { last, ..Policy::default() }), points: BTreeSet::new() }
}

fn names(fixture: &Fixture) -> Vec<PointName> {
    fixture.points.iter().map(|(name, _)| *name).collect()
}

proptest! {
    #![proptest_config(cases(16))]
    /// Whatever goes, in several runs, with a backup in between.
    #[test]
    fn what_stays_is_whole(
        steps in prop::collection::vec((form(), image()), 2..6),
        goes in prop::collection::vec(any::<bool>(), 8),
        next in (form(), image()),
        last in 1_u32..3
    ) {
        let mut fixture = Fixture::new(&steps);
        let all = names(&fixture);
        let gone: Vec<_> = all[..all.len() - 1].iter().zip(&goes).filter(|(_, goes)| **goes).map(|(name, _)| *name).collect();
        prune(&fixture, &named(gone.iter().copied())).expect("pruned");
        let mut there: Vec<_> = all.into_iter().filter(|name| !gone.contains(name)).collect();
        fixture.check_all(&there);
        let old = fixture.points.last().expect("a point").1.clone();
        fixture.back_up(&next.0, next_content(&old, &next.1));
        there.push(fixture.points.last().expect("a point").0);
        prune(&fixture, &newest(last)).expect("pruned");
        there.drain(..there.len().saturating_sub(last as usize));
        fixture.check_all(&there);
        prop_assert!(prune(&fixture, &newest(last)).expect("nothing is left to do").is_empty());
    }
}

/// What a plan can only guess is known in the end.
#[test]
fn what_was_freed_is_told() {
    let fixture = Fixture::of_sizes(&[1 << 20, 1 << 20, 1 << 20]);
    let names = names(&fixture);
    let taken = || fixture.catalogue().points().iter().map(|point| point.layer_bytes).sum::<u64>();
    let before = taken();
    let plan = prune(&fixture, &named([names[0]])).expect("pruned");
    assert!(before > taken());
    assert_eq!((plan.freed_at_least, plan.freed_at_most), (before - taken(), before - taken()));
}

/// Dies at every step, or has it fail. The next prune by the same rules does the rest, and so does a
/// backup before it.
#[test]
fn whenever_it_dies_what_stays_is_whole() {
    let sizes = [100_000, 90_000, 100_000, 110_000];
    let clean = Fixture::of_sizes(&sizes);
    let all = names(&clean);
    let wanted = named([all[0], all[2]]);
    let stay = [all[1], all[3]];
    fault::plan(None);
    prune(&clean, &wanted).expect("pruned");
    let steps = fault::steps();
    clean.check_all(&stay);
    for (at, step) in steps.iter().enumerate() {
        for kind in [Fault::Crash, Fault::Fail] {
            let fixture = Fixture::of_sizes(&sizes);
            fault::plan(Some((at, kind)));
            let result = prune(&fixture, &wanted);
            fault::steps();
            let context = format!("{kind:?} at step {at}, {step}: {result:?}");
            let there = fixture.check_content();
            assert!(stay.iter().all(|name| there.contains(name)), "{context}");
            // Where rules ask for nothing more, what was begun is put in order all the same.
            prune(&fixture, &newest(9)).expect("put in order");
            let catalogue = Catalogue::read(&fixture.directory(), &fixture.image).expect("read");
            assert!(!catalogue.is_unfinished(), "{context}");
            // What lies besides is the next writer's.
            drop(ChainWriter::open(fixture.dest.path(), &fixture.image).expect("opened"));
            let there = fixture.check_content();
            fixture.check_all(&there);
            let rest = [all[0], all[2]].into_iter().filter(|name| there.contains(name));
            prune(&fixture, &named(rest)).expect("pruned");
            fixture.check_all(&stay);
        }
    }
}

/// A layer that was to be reused may be all that is left, and nobody needs it.
#[test]
fn layers_that_nobody_needs_go_where_nothing_else_is_to_be_done() {
    let options = MergeOptions { least_saving: 0, ..MergeOptions::default() };
    let run = |fixture: &Fixture, wanted: &Wanted| {
        let (dest, zone, now) = (fixture.dest.path(), &TimeZone::UTC, Timestamp::MAX);
        let (options, cancel) = (&options, &Cancel::new());
        PruneImage { dest, image: &fixture.image, wanted, zone, now, options, observer: &(), cancel }.run()
    };
    let clean = Fixture::of_small_changes(3);
    let stay = names(&clean)[1..].to_vec();
    fault::plan(None);
    run(&clean, &newest(2)).expect("pruned");
    let steps = fault::steps();
    clean.check_all(&stay);
    for at in 0..steps.len() {
        let fixture = Fixture::of_small_changes(3);
        fault::plan(Some((at, Fault::Crash)));
        let _ = run(&fixture, &newest(2));
        fault::steps();
        run(&fixture, &newest(2)).expect("pruned");
        fixture.check_all(&stay);
    }
}

/// The everyday case: the Python tool began the chain, this program goes on, and old points go every night.
#[test]
fn chains_that_the_python_tool_began_are_pruned_while_backups_go_on() {
    let mut fixture = Fixture::begun_by_python(4, &[300_000, 250_000, 300_000, 350_000]);
    for number in 0..7_u8 {
        let count = fixture.points.len();
        prune(&fixture, &newest(3)).expect("pruned");
        fixture.check_all(&names(&fixture)[count - 3..]);
        let mut content = fixture.points[count - 1].1.clone();
        let at = usize::from(number) * 30_000;
        content[at..at + 50_000].fill(number);
        content.resize(350_000 - 9_999 * usize::from(number % 3), 7);
        fixture.back_up(&plain(), content);
    }
    prune(&fixture, &newest(1)).expect("pruned");
    let last = fixture.points.len() - 1;
    fixture.check_all(&names(&fixture)[last..]);
}

#[test]
fn a_stop_withdraws_the_note() {
    let fixture = Fixture::of_sizes(&[100_000, 90_000, 100_000]);
    let cancel = Cancel::new();
    cancel.set();
    let error = prune_watched(&fixture, &newest(1), &(), &cancel).expect_err("stopped");
    assert!(matches!(error, PruneError::Cancelled), "{error:?}");
    fixture.check_all(&names(&fixture));
}

#[test]
fn what_cannot_be_merged_stays() {
    let mut fixture = Fixture::of_sizes(&[100_000, 90_000, 100_000]);
    let all = names(&fixture);
    fs::rename(fixture.layer(1).with_extension("digests"), fixture.out.path().join("digests"))
        .expect("moved");
    let error = prune(&fixture, &named([all[1]])).expect_err("nothing to verify by");
    assert!(
        matches!(&error, PruneError::Merge(cause) if matches!(**cause, MergeError::NoDigests { .. })),
        "{error:?}"
    );
    fs::rename(fixture.out.path().join("digests"), fixture.layer(1).with_extension("digests"))
        .expect("moved");
    fixture.check_all(&all);
    fixture.back_up(&plain(), vec![1; 5000]);
    fixture.check_all(&names(&fixture));
}

/// What was told of a merge.
struct Told {
    turn: Turn,
    progress: Arc<MergeProgress>,
    way: Option<Way>,
}

/// What was told of each merge.
#[derive(Default)]
struct Watch(Mutex<Vec<Told>>);

impl MergeObserver for Watch {
    fn started(&self, turn: Turn, progress: &Arc<MergeProgress>) {
        self.0.lock().expect("no panic").push(Told { turn, progress: Arc::clone(progress), way: None });
    }

    fn finished(&self, way: Way) {
        self.0.lock().expect("no panic").last_mut().expect("one was begun").way = Some(way);
    }
}

#[test]
fn an_observer_is_told_of_each_merge() {
    let fixture = Fixture::of_sizes(&[300_000, 250_000, 300_000, 350_000]);
    let all = names(&fixture);
    let watch = Watch::default();
    prune_watched(&fixture, &named([all[0], all[2]]), &watch, &Cancel::new()).expect("pruned");
    let merges = watch.0.into_inner().expect("no panic");
    let turns: Vec<_> = merges.iter().map(|Told { turn, .. }| (turn.child, turn.number, turn.of)).collect();
    assert_eq!(turns, [(all[1], 1, 2), (all[3], 2, 2)]);
    for Told { progress, way, .. } in &merges {
        assert_eq!(*way, Some(Way::Copied));
        let MergeProgress { verify, copy, .. } = &**progress;
        assert!(verify.total.get() > 0 && copy.read.get() > 0, "{progress:?}");
        assert_eq!(verify.done.get(), verify.total.get());
        assert_eq!((copy.scanned.get(), copy.read.get()), (copy.size.get(), copy.to_read.get()));
        assert_eq!(progress.written(), copy.data.get());
    }
    // Where only files go, there is nothing to tell.
    let watch = Watch::default();
    prune_watched(&fixture, &newest(9), &watch, &Cancel::new()).expect("pruned");
    assert!(watch.0.into_inner().expect("no panic").is_empty());
}

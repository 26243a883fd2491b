#![allow(clippy::cast_possible_truncation, reason = "offsets in test data are small")]

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs;

use proptest::prelude::*;
use proptest::sample::Index;

use super::*;
use crate::chain::durable::fault::{self, Fault};
use crate::chain::{Catalogue, image_directory};
use crate::layer::native::testing::{cases, form, image, next_content};
use crate::layer::qemu_nbd::testing::qemus;
use crate::qcow2::check::check;
use crate::qcow2::layer::LayerReader;
use crate::testing::{Fixture, plain};
use crate::verify::{PointReport, VerifyImage, VerifyOptions, VerifyProgress, VerifyStatus};

mod full;
mod half_taken_over;
mod mixed;
mod packed;
mod progress;
mod python;
mod refused;
mod reuse;
mod unclear;

thread_local! {
    /// Has merges of this thread begin without the room that they want.
    pub(super) static SPACE_IS_NOT_CHECKED: Cell<bool> = const { Cell::new(false) };
}

impl Fixture {
    fn writer(&self) -> ChainWriter {
        ChainWriter::open(self.dest.path(), &self.image).expect("opened")
    }

    fn names(&self) -> Vec<PointName> {
        self.points.iter().map(|(name, _)| *name).collect()
    }

    /// Forgets points, after those that stay have taken over what they held.
    fn forget(&mut self, gone: &BTreeSet<PointName>, reuse: Reuse) -> Result<(), MergeError> {
        let mut writer = ChainWriter::open(self.dest.path(), &self.image)?;
        writer.note_forgetting(&gone.iter().copied().collect::<Vec<_>>())?;
        merge_around(&mut writer, gone, reuse)?;
        writer.forget()?;
        complete(&mut writer)
    }

    /// Completes what a merge upon a base has left for later.
    fn complete(&self) -> Result<(), MergeError> {
        complete(&mut self.writer())
    }

    /// Every point that there is reads as it was backed up, by our reader, and its layer is sound.
    pub(crate) fn check_content(&self) -> Vec<PointName> {
        let catalogue = Catalogue::read(&self.directory(), &self.image).expect("read");
        for point in catalogue.points() {
            let (_, content) = self.points.iter().find(|(name, _)| *name == point.name).expect("known");
            let chain = ChainReader::open(&catalogue.layers(point.name).expect("sound")).expect("readable");
            let mut found = vec![0xee; content.len().next_multiple_of(512)];
            assert_eq!(chain.virtual_size(), found.len() as u64);
            chain.read_at(0, &mut found).expect("readable");
            let mut wanted = content.clone();
            wanted.resize(found.len(), 0);
            assert!(found == wanted, "{} has changed", point.name);
            let layer = LayerReader::open(&point.path).expect("readable");
            assert!(check(&layer, &Cancel::new(), &mut |_| {}).expect("checked").is_clean());
        }
        catalogue.points().iter().map(|point| point.name).collect()
    }

    /// As `check_content`, and digests and manifests tell the same; nothing else lies there.
    pub(crate) fn check_all(&self, there: &[PointName]) {
        assert_eq!(self.check_content(), there);
        let catalogue = self.catalogue();
        assert_eq!(catalogue.problems().iter().map(ToString::to_string).collect::<Vec<_>>(), [""; 0]);
        assert!(catalogue.leftovers().is_empty(), "{:?}", catalogue.leftovers());
        self.check_verified("in the end");
        for point in catalogue.points() {
            self.check_unverified(point);
        }
        let files = fs::read_dir(self.directory()).expect("listed").count();
        let python = there.iter().filter(|name| name.is_python()).count();
        // Nobody removes what the Python tool's first layers build upon: it is not a point's.
        let root = self.points.iter().any(|(name, _)| name.is_python());
        let expected = 1 + usize::from(root) + 3 * (there.len() - python) + python;
        assert_eq!(files, expected, "the lock, the points' files, and the Python tool's root");
    }

    /// Verifies all points, as they lie there.
    fn check_verified(&self, context: &str) {
        for report in self.verify() {
            let expected = match self.is_unverifiable(report.point) {
                true => VerifyStatus::Unverifiable,
                false => VerifyStatus::Ok,
            };
            assert_eq!(report.status, expected, "{context}: {report:?}");
            assert_eq!(report.unverified.is_empty(), expected == VerifyStatus::Ok, "{context}: {report:?}");
        }
    }

    pub(crate) fn verify(&self) -> Vec<PointReport> {
        let verify = VerifyImage {
            dest: self.dest.path(),
            image: &self.image,
            points: &[],
            options: &VerifyOptions::default(),
            snapshots: None,
            progress: &VerifyProgress::default(),
            cancel: &Cancel::new(),
        };
        verify.run().expect("verified")
    }

    pub(crate) fn catalogue(&self) -> Catalogue {
        Catalogue::read(&self.directory(), &self.image).expect("read")
    }

    /// Whether a point was made upon data that never had digests. No merge makes that better, or worse.
    fn is_unverifiable(&self, name: PointName) -> bool {
        let below = self.points.iter().map(|(below, _)| *below).filter(|below| *below <= name);
        below.into_iter().any(PointName::is_python)
    }

    /// The manifest tells of whatever was taken over from the Python tool's points.
    fn check_unverified(&self, point: &Point) {
        let Some(manifest) = &point.manifest else { return assert!(point.name.is_python()) };
        let python = || self.points.iter().map(|(name, _)| *name).filter(|name| name.is_python());
        let taken_over =
            python().any(|name| name < point.name && point.parent.is_none_or(|parent| parent < name));
        assert!(!taken_over || !manifest.unverified.is_empty(), "{manifest:?}");
        let below: BTreeSet<_> = python().filter(|name| *name < point.name).collect();
        assert!(manifest.unverified.is_subset(&below), "{manifest:?}");
    }
}

/// Whether a layer is reused wherever that is possible, however small it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reuse {
    Always,
    Never,
}

fn options(reuse: Reuse) -> MergeOptions {
    let least_saving = if reuse == Reuse::Always { 0 } else { u64::MAX };
    MergeOptions { parallel: 2, least_saving, ..MergeOptions::default() }
}

fn merge(
    writer: &ChainWriter,
    child: PointName,
    parent: Option<PointName>,
    reuse: Reuse,
) -> Result<(), MergeError> {
    let merge = Merge {
        writer,
        child,
        parent,
        options: &options(reuse),
        compressors: &Compressors::default(),
        progress: &MergeProgress::default(),
        observer: &(),
        cancel: &Cancel::new(),
    };
    merge.run().map(drop)
}

fn complete(writer: &mut ChainWriter) -> Result<(), MergeError> {
    let points = writer.catalogue().points().iter();
    let waiting: Vec<_> =
        points.filter(|point| point.base.is_some()).map(|point| (point.name, point.parent)).collect();
    for (child, parent) in waiting {
        merge(writer, child, parent, Reuse::Always)?;
        writer.refresh()?;
    }
    Ok(())
}

/// Puts what goes into what stays.
fn merge_around(
    writer: &mut ChainWriter,
    gone: &BTreeSet<PointName>,
    reuse: Reuse,
) -> Result<(), MergeError> {
    let names: Vec<_> = writer.catalogue().points().iter().map(|point| point.name).collect();
    for name in names.into_iter().filter(|name| !gone.contains(name)) {
        let below = writer.catalogue().ancestry(name).expect("sound");
        if !below[0].parent.is_some_and(|parent| gone.contains(&parent)) {
            continue;
        }
        // Bases are not points.
        let stays = |name: &PointName| !gone.contains(name) && writer.catalogue().point(*name).is_some();
        let parent = below[1..].iter().map(|point| point.name).find(stays);
        merge(writer, name, parent, reuse)?;
        writer.refresh()?;
    }
    Ok(())
}

fn reuse() -> impl Strategy<Value = Reuse> {
    prop_oneof![Just(Reuse::Always), Just(Reuse::Never)]
}

proptest! {
    #![proptest_config(cases(24))]
    /// Points go in any order, until the newest is alone; and backups go on in between. Some points are in
    /// the Python tool's layout.
    #[test]
    fn what_stays_reads_the_same_whatever_goes(
        steps in prop::collection::vec((form(), image(), prop::bool::weighted(0.2)), 2..7),
        going in prop::collection::vec((any::<Index>(), 1_usize..4, reuse()), 1..5),
        next in (form(), image())
    ) {
        let mut fixture = Fixture::empty("vm/1");
        for (form, image, python) in steps {
            let content = next_content(fixture.points.last().map_or(&[], |(_, content)| content), &image);
            if python { fixture.back_up_as_python(&form, content) } else { fixture.back_up(&form, content) }
        }
        let mut there = fixture.names();
        for (number, (which, count, reuse)) in going.into_iter().enumerate() {
            if there.len() < 2 {
                break;
            }
            let start = which.index(there.len() - 1);
            let end = (start + count).min(there.len() - 1);
            let gone: BTreeSet<_> = there.drain(start..end).collect();
            fixture.forget(&gone, reuse).unwrap();
            fixture.check_all(&there);
            if number == 1 {
                let old = fixture.points.last().unwrap().1.clone();
                let content = next_content(&old, &next.1);
                fixture.back_up(&next.0, content);
                there.push(fixture.points.last().unwrap().0);
                fixture.check_all(&there);
            }
        }
    }
}

/// Points that are not next to each other go in one run.
#[test]
fn several_gaps_at_once() {
    let mut fixture = Fixture::of_sizes(&[1 << 20, 900_000, 1 << 20, 500_000, 1 << 20, 1 << 20]);
    let names = fixture.names();
    fixture.forget(&[names[0], names[2], names[3]].into(), Reuse::Never).expect("forgotten");
    fixture.check_all(&[names[1], names[4], names[5]]);
    let catalogue = Catalogue::read(&fixture.directory(), &fixture.image).expect("read");
    let parents: Vec<_> = catalogue.points().iter().map(|point| point.parent).collect();
    assert_eq!(parents, [None, Some(names[1]), Some(names[4])]);
}

/// Killed before any step, or with any step failing: what stays reads the same, and the next run
/// finishes or undoes it. A point that takes over may become a full one.
fn crash_at_every_step(gone: &[usize], reuse: Reuse) {
    crash_at_every_step_of_a_chain_begun_by_python(0, gone, reuse);
}

/// The first `python` of the four points are the Python tool's.
fn crash_at_every_step_of_a_chain_begun_by_python(python: usize, gone: &[usize], reuse: Reuse) {
    let points = || match reuse {
        Reuse::Always => Fixture::of_small_changes(4),
        // Layers of other sizes are never reused.
        Reuse::Never => Fixture::begun_by_python(python, &[300_000, 250_000, 300_000, 350_000]),
    };
    let mut clean = points();
    let names = clean.names();
    let (gone, stay): (Vec<_>, Vec<_>) = (0..names.len())
        .map(|index| names[index])
        .partition(|name| gone.iter().any(|at| names[*at] == *name));
    let gone: BTreeSet<_> = gone.into_iter().collect();
    fault::plan(None);
    clean.forget(&gone, reuse).expect("forgotten");
    let steps = fault::steps();
    assert!(steps.len() > 10, "{steps:?}");
    let reused = steps.iter().any(|step| step.starts_with("write to"));
    assert_eq!(reused, reuse == Reuse::Always, "{steps:?}");
    for kind in [Fault::Crash, Fault::Fail] {
        for (at, step) in steps.iter().enumerate() {
            let mut fixture = points();
            fault::plan(Some((at, kind)));
            let result = fixture.forget(&gone, reuse);
            fault::steps();
            let context = format!("{kind:?} at step {at}, {step}: {result:?}");
            assert!(result.is_err() || kind == Fault::Fail, "{context}");
            // As it lies there, with nothing put in order.
            let there = fixture.check_content();
            assert!(stay.iter().all(|name| there.contains(name)), "{context}");
            fixture.check_verified(&context);
            // Putting in order is the next writer's, who may die too.
            drop(fixture.writer());
            fixture.check_content();
            // Somebody may have open what is left, so that it must be copied, in whatever state it is.
            let base = fixture.catalogue().bases().first().map(|base| base.path.clone());
            let reader = base.filter(|_| at % 4 == 0).map(|path| fs::File::open(path).expect("opened"));
            fixture.complete().expect("completed");
            drop(reader);
            let there = fixture.check_content();
            fixture.check_all(&there);
            fixture
                .forget(&gone.iter().copied().filter(|name| there.contains(name)).collect(), reuse)
                .expect("forgotten");
            fixture.check_all(&stay);
        }
    }
}

#[test]
fn crashes_at_every_step_harm_nothing_below_the_middle() {
    crash_at_every_step(&[1, 2], Reuse::Never);
    crash_at_every_step(&[1], Reuse::Never);
}

#[test]
fn crashes_at_every_step_harm_nothing_where_a_point_becomes_a_full_one() {
    crash_at_every_step(&[0], Reuse::Never);
    crash_at_every_step(&[0, 1], Reuse::Never);
}

#[test]
fn crashes_at_every_step_harm_nothing_where_a_layer_is_reused() {
    crash_at_every_step(&[0, 1], Reuse::Always);
}

/// The run that puts things in order is cut short as well.
#[test]
fn putting_in_order_can_be_cut_short_too() {
    for index in [0, 1] {
        putting_in_order_cut_short(0, index);
    }
    putting_in_order_cut_short(1, 0);
}

fn putting_in_order_cut_short(python: usize, index: usize) {
    let make = || Fixture::begun_by_python(python, &[300_000, 250_000, 300_000]);
    let gone = |fixture: &Fixture| BTreeSet::from([fixture.names()[index]]);
    let mut clean = make();
    fault::plan(None);
    clean.forget(&gone(&clean), Reuse::Never).expect("forgotten");
    let steps = fault::steps();
    let commit = steps.iter().rposition(|step| step.starts_with("replace") && step.ends_with(".qcow2"));
    let commit = commit.expect("a commit");
    for first in commit..steps.len() {
        // Every fourth, another one each time: all pairs take too long.
        for second in (first % 4..16).step_by(4) {
            let mut fixture = make();
            let mut left = fixture.names();
            left.remove(index);
            fault::plan(Some((first, Fault::Crash)));
            fixture.forget(&gone(&fixture), Reuse::Never).expect_err("cut short");
            fault::plan(Some((second, Fault::Crash)));
            let opened = ChainWriter::open(fixture.dest.path(), &fixture.image).map(drop);
            fault::steps();
            fixture.check_content();
            drop(fixture.writer());
            let there = fixture.check_content();
            fixture.check_all(&there);
            assert!(there == left || first == commit, "{first} {second} {opened:?} {there:?}");
        }
    }
}

#[test]
fn stock_qemu_reads_what_was_merged() {
    for (tools, reuse) in qemus()
        .into_iter()
        .flat_map(|tools| [Reuse::Always, Reuse::Never].map(|reuse| (tools.clone(), reuse)))
    {
        let mut fixture = Fixture::of_sizes(&[1 << 20, 300_000, 900_000, 1 << 20]);
        let names = fixture.names();
        fixture.forget(&[names[1], names[2]].into(), reuse).expect("forgotten");
        for (name, content) in [&fixture.points[0], &fixture.points[3]] {
            let layer = format!("{}@{name}.qcow2", fixture.image.encoded());
            let mut wanted = content.clone();
            wanted.resize(content.len().next_multiple_of(512), 0);
            let found = crate::layer::qemu_nbd::testing::contents(&tools, &fixture.directory(), &layer);
            assert!(found == wanted, "{name}");
        }
    }
}

#[test]
fn a_full_disk_is_noticed_before() {
    let mut fixture = Fixture::of_sizes(&[1 << 20, 1 << 20]);
    let names = fixture.names();
    // A file of more blocks than any disk has free is not to be had: this is the arithmetic.
    let writer = fixture.writer();
    let merge = Merge {
        writer: &writer,
        child: names[1],
        parent: None,
        options: &MergeOptions::default(),
        compressors: &Compressors::default(),
        progress: &MergeProgress::default(),
        observer: &(),
        cancel: &Cancel::new(),
    };
    let error = merge.check_space(u64::MAX / 4).expect_err("too large");
    assert!(
        matches!(error, MergeError::NoSpace { .. }) && error.to_string().contains("nothing was changed"),
        "{error}"
    );
    let cancelled = Cancel::new();
    cancelled.set();
    let error = Merge { cancel: &cancelled, ..merge }.run().expect_err("cancelled");
    assert!(matches!(error, MergeError::Cancelled), "{error:?}");
    drop(writer);
    fixture.check_all(&names);
    fixture.back_up(&plain(), vec![1; 5000]);
    assert!(image_directory(fixture.dest.path(), &fixture.image).exists());
}

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use super::*;
use crate::chain::durable::fault::{self, Fault};
use crate::chain::lock::ChainLock;
use crate::chain::manifest::Hold;
use crate::chain::manifest::tests::record;
pub(super) use crate::chain::tests::point;
use crate::chain::tests::{CLUSTER_SIZE, VIRTUAL_SIZE, create_layer, image, qemu_img_is_there};
use crate::chain::{ChainError, ChainId, LayerPlan, PointKind, PointName, Record, SnapshotName, hold};

/// A destination with one image.
pub(super) struct Fixture(tempfile::TempDir);

impl Fixture {
    /// Points of which each builds upon the one before; `None` where the tools are missing.
    pub(super) fn chain(points: &[&str]) -> Option<Self> {
        if !qemu_img_is_there() {
            return None;
        }
        let fixture = Self(tempfile::tempdir().expect("a directory"));
        let mut parent = None;
        for name in points {
            fixture.add(name, parent);
            parent = Some(*name);
        }
        Some(fixture)
    }

    /// A chain as the Python tool makes it.
    pub(super) fn python(points: &[&str]) -> Option<Self> {
        let fixture = Self::chain(&[])?;
        fs::create_dir(fixture.directory()).expect("created");
        create_layer(&fixture.directory().join("empty.qcow2"), 1 << 20, None);
        let mut backing = "empty.qcow2".to_owned();
        for name in points {
            create_layer(&fixture.path(name, "qcow2"), 1 << 20, Some(&backing));
            backing = format!("vm%2F1@{name}.qcow2");
        }
        Some(fixture)
    }

    /// Adds a point upon `parent`, which was made when its name says.
    pub(super) fn add(&self, name: &str, parent: Option<&str>) {
        self.add_made(name, parent, &point(name).timestamp().to_string());
    }

    /// Adds the first point of a chain.
    fn add_of(&self, name: &str, chain: ChainId) {
        let snapshot = SnapshotName { chain, point: point(name) }.to_string();
        self.commit(Record { chain, snapshot, ..record(VIRTUAL_SIZE, point(name)) }, name, None);
    }

    /// Adds a point upon `parent`, whose backup ended at `created`.
    pub(super) fn add_made(&self, name: &str, parent: Option<&str>, created: &str) {
        let created = created.parse().expect("a time");
        self.commit(Record { created, ..record(VIRTUAL_SIZE, point(name)) }, name, parent);
    }

    fn commit(&self, record: Record, name: &str, parent: Option<&str>) {
        let writer = ChainWriter::open(self.dest(), &image()).expect("opened");
        let parent = parent.map(|name| writer.catalogue().point(point(name)).expect("the parent"));
        let plan = LayerPlan { point: point(name), parent, cluster_size: CLUSTER_SIZE };
        let pending = writer.begin(plan).expect("begun");
        let size = VIRTUAL_SIZE.next_multiple_of(512);
        create_layer(pending.layer_path(), size, pending.backing_name().as_deref());
        pending.commit(record).expect("committed");
    }

    pub(super) fn hold(&self, name: &str, reason: &str) {
        let held = Hold { reason: reason.to_owned(), since: Timestamp::UNIX_EPOCH };
        hold::hold(self.dest(), &image(), point(name), &held).expect("held");
    }

    pub(super) fn release(&self, name: &str) {
        hold::release(self.dest(), &image(), point(name)).expect("released");
    }

    pub(super) fn dest(&self) -> &Path {
        self.0.path()
    }

    fn directory(&self) -> PathBuf {
        image_directory(self.dest(), &image())
    }

    pub(super) fn path(&self, name: &str, suffix: &str) -> PathBuf {
        self.directory().join(format!("vm%2F1@{name}.{suffix}"))
    }

    pub(super) fn catalogue(&self) -> Catalogue {
        Catalogue::read(&self.directory(), &image()).expect("read")
    }

    fn prune(&self, wanted: &Wanted) -> Result<Plan, PruneError> {
        self.prune_until(wanted, &Cancel::new())
    }

    fn prune_until(&self, wanted: &Wanted, cancel: &Cancel) -> Result<Plan, PruneError> {
        let (dest, zone, now) = (self.dest(), &TimeZone::UTC, Timestamp::MAX);
        PruneImage {
            dest,
            image: &image(),
            wanted,
            zone,
            now,
            options: &MergeOptions::default(),
            observer: &(),
            cancel,
        }
        .run()
    }

    /// The points, where nothing is wrong with any.
    fn points(&self) -> Vec<String> {
        let catalogue = self.catalogue();
        assert!(catalogue.problems().is_empty(), "{:?}", catalogue.problems());
        assert!(catalogue.points().iter().all(|point| point.sound));
        names(&catalogue.points().iter().map(|point| point.name).collect::<Vec<_>>())
    }

    /// The chains that are known here.
    fn own_chains(&self) -> Vec<String> {
        let writer = ChainWriter::open(self.dest(), &image()).expect("opened");
        writer.own_chains().expect("read").iter().map(ToString::to_string).collect()
    }

    /// Every file with its content, except the lock and the list of chains.
    fn content(&self) -> BTreeMap<String, Vec<u8>> {
        let entries =
            fs::read_dir(self.directory()).expect("a directory").map(|entry| entry.expect("an entry"));
        let files = entries.map(|entry| (entry.file_name().into_string().expect("text"), entry.path()));
        files
            .filter(|(name, _)| ![".lock", ".retired"].contains(&name.as_str()))
            .map(|(name, path)| (name, fs::read(path).expect("readable")))
            .collect()
    }
}

pub(super) fn names(points: &[PointName]) -> Vec<String> {
    points.iter().map(ToString::to_string).collect()
}

/// Rules that keep everything.
pub(super) fn all() -> Wanted {
    let policy = Policy { last: Limit::All, ..Policy::default() };
    Wanted { policy: Some(policy), points: BTreeSet::new() }
}

fn last_one() -> Wanted {
    let policy = Policy { last: Limit::AtMost(1), ..Policy::default() };
    Wanted { policy: Some(policy), points: BTreeSet::new() }
}

/// An old chain of two points, and the newest point of another.
const POINTS: [&str; 3] = ["20261121T020000Z", "20261122T020000Z", "20261123T020000Z"];

/// The ids of the two.
const OLD_CHAIN: &str = "00c0ffee";
const NEW_CHAIN: &str = "00000002";

fn two_chains() -> Option<Fixture> {
    let fixture = Fixture::chain(&POINTS[..2])?;
    fixture.add_of(POINTS[2], ChainId::parse(NEW_CHAIN).expect("an id"));
    Some(fixture)
}

#[test]
fn points_that_none_builds_upon_go_with_all_their_files() {
    let Some(fixture) = two_chains() else { return };
    let mut expected = fixture.content();
    expected.retain(|name, _| name.contains(POINTS[2]));
    let plan = fixture.prune(&last_one()).expect("pruned");
    assert_eq!(names(&plan.removals), [POINTS[1], POINTS[0]]);
    assert_eq!(fixture.content(), expected);
    assert!(fixture.prune(&last_one()).expect("nothing is left to do").is_empty());
}

#[test]
fn a_chain_without_points_is_remembered() {
    let Some(fixture) = Fixture::chain(&[]) else { return };
    let ids = ["00000001", "00000002", "00000003"];
    for (name, id) in POINTS.iter().zip(ids) {
        fixture.add_of(name, ChainId::parse(id).expect("an id"));
    }
    let own = || fixture.own_chains();
    assert_eq!(own(), ids);
    let named = Wanted { points: BTreeSet::from([point(POINTS[0])]), ..Wanted::default() };
    fixture.prune(&named).expect("pruned");
    assert_eq!(own(), ids);
    fixture.prune(&last_one()).expect("pruned");
    assert_eq!(fixture.points(), [POINTS[2]]);
    assert_eq!(own(), ids);
    // What is damaged there hinders nobody.
    let list = fixture.directory().join(".retired");
    fs::remove_file(&list).expect("removed");
    fs::write(&list, b"00000002\n../evil\n0000").expect("written");
    assert_eq!(own(), ids[1..]);
    assert!(fixture.catalogue().problems().is_empty());
}

/// By the times in their names. What their first layers build upon is no point's, and stays.
#[test]
fn a_chain_of_the_python_tool_is_pruned_and_goes_on() {
    // Two of one day, and one of each of the two days before.
    let points = ["1795195992", "1795282392", "1795368792", "1795368999"];
    let Some(fixture) = Fixture::python(&points) else { return };
    let daily = Policy { daily: Limit::AtMost(2), ..Policy::default() };
    let plan = fixture.prune(&Wanted { policy: Some(daily), points: BTreeSet::new() }).expect("pruned");
    let reasons: Vec<_> = plan.decisions[1].reasons.iter().map(ToString::to_string).collect();
    assert_eq!(reasons, ["daily 2026-11-21"]);
    assert_eq!(fixture.points(), [points[1], points[3]]);
    let kinds = || fixture.catalogue().points().iter().map(|point| point.kind).collect::<Vec<_>>();
    let (full, incremental) = (Some(PointKind::Full), Some(PointKind::Incremental));
    assert_eq!(kinds(), [full, incremental]);
    // The next backup builds upon the newest as before: its name tells the snapshot.
    let newest = fixture.catalogue().newest().expect("a point").snapshot();
    assert_eq!(newest.as_deref(), Some(points[3]));
    fixture.add(POINTS[2], Some(points[3]));
    assert_eq!(kinds(), [full, incremental, incremental]);
    fixture.prune(&last_one()).expect("pruned");
    assert_eq!((fixture.points(), kinds()), (vec![POINTS[2].to_owned()], vec![full]));
    let files: Vec<_> = fixture.content().into_keys().collect();
    let own = ["digests", "json", "qcow2"].map(|suffix| format!("vm%2F1@{}.{suffix}", POINTS[2]));
    assert_eq!(files[0], "empty.qcow2");
    assert_eq!(files[1..], own);
}

#[test]
fn a_plan_changes_nothing() {
    let Some(fixture) = two_chains() else { return };
    let before = fixture.content();
    let (wanted, zone, cancel) = (&last_one(), &TimeZone::UTC, &Cancel::new());
    let _lock = ChainLock::exclusive(&fixture.directory()).expect("free");
    let (dest, image, now) = (fixture.dest(), &image(), Timestamp::MAX);
    let prune = PruneImage {
        dest,
        image,
        wanted,
        zone,
        now,
        options: &MergeOptions::default(),
        observer: &(),
        cancel,
    };
    assert_eq!(prune.plan().expect("planned").removed(), 2);
    assert_eq!(fixture.content(), before);
    let locked = prune.run().expect_err("somebody writes");
    assert!(matches!(locked, PruneError::Chain(ChainError::Locked { .. })), "{locked}");
}

#[test]
fn who_reads_keeps_the_points() {
    let Some(fixture) = two_chains() else { return };
    let before = fixture.content();
    let reader = ChainLock::shared(&fixture.directory()).expect("free");
    let locked = fixture.prune(&last_one()).expect_err("somebody reads");
    assert!(matches!(locked, PruneError::Chain(ChainError::Locked { .. })), "{locked}");
    assert_eq!(fixture.content(), before);
    // Where nothing is to go, nobody is in the way.
    assert!(fixture.prune(&all()).expect("nothing to do").is_empty());
    drop(reader);
    fixture.prune(&last_one()).expect("pruned");
    assert_eq!(fixture.points(), [POINTS[2]]);
}

#[test]
fn a_directory_of_something_else_gets_no_lock_file() {
    let Some(fixture) = Fixture::chain(&[]) else { return };
    let missing = fixture.prune(&last_one()).expect_err("no such image");
    assert!(matches!(missing, PruneError::Chain(ChainError::NoSuchImage { .. })), "{missing}");
    fs::create_dir(fixture.directory()).expect("created");
    assert!(fixture.prune(&last_one()).expect("no points").is_empty());
    assert!(!fixture.directory().join(".lock").exists());
}

#[test]
fn a_stop_leaves_whole_points() {
    let Some(fixture) = two_chains() else { return };
    let cancel = Cancel::new();
    cancel.set();
    let error = fixture.prune_until(&last_one(), &cancel).expect_err("stopped");
    assert!(matches!(error, PruneError::Cancelled), "{error}");
    assert_eq!(fixture.points(), POINTS);
}

#[test]
fn whenever_it_dies_the_points_are_whole_and_the_next_run_finishes() {
    let Some(fixture) = two_chains() else { return };
    let mut expected = fixture.content();
    expected.retain(|name, _| name.contains(POINTS[2]));
    fault::plan(None);
    fixture.prune(&last_one()).expect("nothing is in the way");
    let steps = fault::steps();
    let layers: Vec<_> = steps.iter().filter(|step| step.ends_with(".qcow2.partial")).collect();
    let layers: Vec<_> = layers.into_iter().filter(|step| step.starts_with("replace ")).collect();
    let of = |name: &str| format!("replace .vm%2F1@{name}.qcow2.partial");
    assert_eq!(layers, [&of(POINTS[1]), &of(POINTS[0])], "{steps:?}");
    for fault in [Fault::Crash, Fault::Fail] {
        for at in 0..steps.len() {
            let Some(fixture) = two_chains() else { return };
            fault::plan(Some((at, fault)));
            let error = fixture.prune(&last_one()).expect_err("told");
            fault::plan(None);
            assert!(fixture.catalogue().problems().is_empty(), "step {at}: a point looks lost");
            let left = fixture.points();
            let possible = [&POINTS[..], &[POINTS[0], POINTS[2]], &POINTS[2..]];
            assert!(
                possible.iter().any(|points| left == *points),
                "step {at} of {steps:?}: {left:?}: {error}"
            );
            fixture.prune(&last_one()).expect("pruned");
            // The next run that writes removes what is left of a point.
            assert_eq!(fixture.own_chains(), [OLD_CHAIN, NEW_CHAIN], "step {at}");
            assert_eq!(fixture.content(), expected, "step {at}");
        }
    }
}

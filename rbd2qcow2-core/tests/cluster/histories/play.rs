//! A history: steps, a backup during which more of them are played, and again.
//!
//! # What a point must be
//! What the objects of its snapshot hold, read without any object map by the second client: once when the
//! run has the snapshot and has read nothing of it (stage `Queue`), and once when it is over. Both are the
//! same, but for what a late writer brought in between: such a point may hold either, page by page, and the
//! next one must have it. What migrates is read through librbd, which alone knows its source.

use std::collections::BTreeMap;

use rbd2qcow2_core::cancel::Cancel;
use rbd2qcow2_core::options::{BackupOptions, DiffMode, Writer};
use rbd2qcow2_core::progress::{ImageReport, Stage, Status};

use super::steps::{Rule, Step, THEMES, Theme};
use super::tally::Tally;
use super::world::World;
use crate::cluster::TestCluster;
use crate::driver::{DriverError, Result, Spec};
use crate::held::{Moment, content, difference, held};
use crate::random::Random;
use crate::store::{read_json, told, why};

/// Backups of each image.
const NIGHTS: u64 = 7;

/// What a late write may leave half done.
const PAGE: usize = 4096;

/// Reasons for which a run may fail once a map may lie, or a base holds something else than its point.
const LASTING: &[&str] = &["object-map", "object map", "exclusive-lock", "migrat", "differ", "suspect"];

/// Plays the history of a seed.
///
/// # Errors
/// The second client broke down, or an image can no longer be opened.
///
/// # Panics
/// Where a point is wrong, or a run failed without need.
pub fn play(cluster: &TestCluster, seed: u64) -> Result<Tally> {
    let mut random = Random::new(seed);
    let theme = THEMES[(seed % THEMES.len() as u64) as usize];
    let options = draw_options(theme, &mut random);
    let told = vec![format!("RBD2QCOW2_SEED={seed}: {theme:?}, {options:?}")];
    let mut world = World::make(cluster, theme, random, told)?;
    world.store.options = options;
    world.tally.count(format!("histories/{theme:?}"));
    let mut points = Vec::new();
    for number in 0..NIGHTS {
        world.moment = "between".to_owned();
        for _ in 0..1 + world.random.below(4) {
            world.step()?;
        }
        world.restore_from_trash()?;
        if world.random.one_in(2) {
            world.store.driver.close_all()?;
        }
        if theme != Theme::Migration {
            world.store.options.keep_snapshots = 1 + world.random.below(3) as usize;
        }
        points.extend(night(&mut world, number)?);
        for copy in std::mem::take(&mut world.to_back_up) {
            back_up_copy(&mut world, &copy)?;
        }
    }
    for (file, held) in &points {
        assert!(content(file) == *held, "{} has changed", file.display());
    }
    finish(&mut world)?;
    println!("{}", world.told.join("\n"));
    Ok(std::mem::take(&mut world.tally))
}

fn draw_options(theme: Theme, random: &mut Random) -> BackupOptions {
    let mut options = BackupOptions::default();
    options.parallel = random.pick(&[1, 4, 16]);
    options.diff = random.pick(&[DiffMode::Exact, DiffMode::Exact, DiffMode::Scan]);
    options.writer = if random.one_in(8) { Writer::QemuNbd } else { Writer::Native };
    if theme == Theme::Migration {
        // None of ours is removed: one that was there at the preparation must stay.
        options.keep_snapshots = 1000;
    }
    options
}

/// The contents of the snapshots that a run has taken.
type Truths = BTreeMap<String, Vec<u8>>;

/// A run, during which steps are played. Gives its point and what that holds.
fn night(world: &mut World, number: u64) -> Result<Option<(std::path::PathBuf, Vec<u8>)>> {
    let moments = draw_moments(world);
    let is_slow = moments.contains(&Moment::Copying);
    world.store.options.rate_limit = is_slow.then_some(32 << 20);
    world.told.push(format!(
        "night {number}, steps at {moments:?}, keeping {}",
        world.store.options.keep_snapshots
    ));
    (world.late, world.migrated) = (false, false);
    world.now.clear();
    // By their ids: a run that failed may have left one whose name the next run gives anew.
    let before = world.store.driver.snaps(&world.spec)?.into_iter().map(|snap| snap.id).collect();
    let backup = world.store.pool_backup(std::slice::from_ref(&world.spec));
    let (mut early, mut failure) = (Truths::new(), None);
    let mut reports = held(
        |observer| backup.run(observer, &Cancel::new()).expect("the pool is there"),
        |moment| {
            if failure.is_some() {
                return;
            }
            let done = (|| {
                if moment == Moment::At(Stage::Queue) {
                    // Nothing has been played since they were taken.
                    early.extend(truths(world, &before)?);
                    let features = world.store.driver.info(&world.spec, None)?.features;
                    world.locked = features.iter().any(|name| name == "exclusive-lock");
                }
                if moments.contains(&moment) {
                    world.moment = match moment {
                        Moment::At(stage) => format!("{stage:?}"),
                        Moment::Copying => "Copying".to_owned(),
                    };
                    for _ in 0..1 + world.random.below(3) {
                        world.step()?;
                    }
                }
                Ok(())
            })();
            failure = done.err();
        },
    );
    world.moment = "between".to_owned();
    world.restore_from_trash()?;
    if let Some(failure) = failure {
        return Err(failure);
    }
    let report = reports.pop().expect("one report");
    if report.status != Status::Ok {
        refused(world, &report)?;
        return Ok(None);
    }
    let late = truths(world, &before)?;
    judge(world, &report, &early, &late).map(Some)
}

/// At which moments of the next run something happens.
fn draw_moments(world: &mut World) -> Vec<Moment> {
    let all = [
        Moment::At(Stage::Prepare),
        Moment::At(Stage::Snapshot),
        Moment::At(Stage::Queue),
        Moment::At(Stage::Copy),
        Moment::Copying,
        Moment::At(Stage::Commit),
        Moment::At(Stage::CleanUp),
    ];
    (0..world.random.below(3)).map(|_| world.random.pick(&all)).collect()
}

/// What the snapshots hold that were not there before.
fn truths(world: &World, before: &std::collections::BTreeSet<u64>) -> Result<Truths> {
    let mut truths = Truths::new();
    for snap in world.store.driver.snaps(&world.spec)? {
        if snap.name.starts_with("rbd2qcow2-") && !before.contains(&snap.id) {
            match world.store.driver.read_objects(&world.spec, Some(&snap.name)) {
                Ok(truth) => drop(truths.insert(snap.name, truth)),
                Err(error) if error.is_breakdown() => return Err(error),
                // It goes at this very moment.
                Err(_) => {}
            }
        }
    }
    Ok(truths)
}

/// A run has made no point: something must excuse it.
fn refused(world: &mut World, report: &ImageReport) -> Result<()> {
    let why = why(report);
    world.told.push(format!("    failed: {why}"));
    let played = |steps: &[Step], rule| steps.iter().any(|step| step.rule() == rule);
    let is_lasting = LASTING.iter().any(|word| why.contains(word));
    let excused = played(&world.now, Rule::RightOrRefused)
        || played(&world.now, Rule::RightOrMended)
        || played(&world.ever, Rule::RightOrMended) && is_lasting
        // Its snapshots are not always readable: librbd takes one size for another.
        || world.is_migrating()?;
    assert!(excused, "a run failed without need: {why}");
    let words = [
        "ancest",
        "parent",
        "object-map",
        "object map",
        "exclusive-lock",
        "migrat",
        "disappeared",
        "gone",
        "differ",
        "suspect",
        "not exist",
        "No such file",
    ];
    let word = words.iter().find(|word| why.contains(**word));
    world.tally.count(format!("failed/{:?}/{}", world.theme, word.map_or(&*why, |word| word)));
    if why.contains("object-map rebuild") {
        // What it asks for: the snapshot of this run is gone, and the next one gets the head's map.
        world.told.push("    the head's object map is rebuilt".to_owned());
        match world.store.driver.rebuild_object_map(&world.spec, None) {
            Err(error) if error.is_breakdown() => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Holds a point against its snapshot.
fn judge(
    world: &mut World,
    report: &ImageReport,
    early: &Truths,
    late: &Truths,
) -> Result<(std::path::PathBuf, Vec<u8>)> {
    let file = report.file.clone().expect("a layer");
    let manifest = read_json(&file.with_extension("json"));
    let snapshot = manifest["snapshot"].as_str().expect("a snapshot");
    let point = content(&file);
    let kind = report.kind.expect("a kind").as_str();
    world.told.push(format!("    {kind} point {}, because of {:?}", file.display(), report.reason));
    let truths: Vec<&Vec<u8>> = [early.get(snapshot), late.get(snapshot)].into_iter().flatten().collect();
    let Some(first) = truths.first() else { panic!("{snapshot} is gone, and the run has not noticed") };
    if truths.iter().all(|truth| difference(&point, truth).is_some()) {
        let [a, b] = [first, truths.last().expect("one at least")];
        let mixed = (world.late || world.migrated) && is_mixed(&point, a, b);
        assert!(
            mixed,
            "{} is not its snapshot {snapshot}: {}, or as it was in the end: {}",
            file.display(),
            difference(&point, a).unwrap_or_default(),
            difference(&point, b).unwrap_or_default()
        );
        world.tally.count("mixed points");
    }
    if world.theme == Theme::Ordinary {
        // The judge is judged, too.
        match world.store.driver.read(&world.spec, Some(snapshot)) {
            Ok(shown) => assert!(**first == shown, "librbd and the objects of {snapshot} disagree"),
            Err(error) => return Err(error),
        }
    }
    world.tally.count(format!("points/{:?}/{kind}", world.theme));
    world.tally.count("points");
    Ok((file, point))
}

/// Whether each page is that of one of the truths.
fn is_mixed(point: &[u8], a: &[u8], b: &[u8]) -> bool {
    if a.len() != b.len() || point.len() != a.len().next_multiple_of(512) {
        return false;
    }
    let pages = point.chunks(PAGE).zip(a.chunks(PAGE).zip(b.chunks(PAGE)));
    pages.into_iter().all(|(page, (a, b))| page[..a.len()] == *a || page[..b.len()] == *b)
}

/// A copy has our snapshots under their names, and is another image.
fn back_up_copy(world: &mut World, copy: &Spec) -> Result<()> {
    world.told.push(format!("{} is backed up", copy.image));
    let report = world.store.run(copy);
    if report.status != Status::Ok {
        // librbd's deep copy makes maps that deny objects without a byte. Whether that is so here Ceph itself
        // shall say.
        let why = why(&report);
        world.store.driver.snap_create(copy, "looked-at")?;
        world.store.driver.close(copy)?;
        world.store.driver.check_object_map(copy, Some("looked-at"))?;
        let is_wrong = world.store.driver.info(copy, Some("looked-at"))?.object_map_invalid;
        assert!(why.contains("object-map") && is_wrong, "the copy {}: {why}", copy.image);
        world.tally.count("failed/copies/object-map");
        return Ok(());
    }
    let file = report.file.as_ref().expect("a layer");
    let snapshot = read_json(&file.with_extension("json"))["snapshot"].as_str().expect("a name").to_owned();
    let truth = world.store.driver.read_objects(copy, Some(&snapshot))?;
    if let Some(difference) = difference(&content(file), &truth) {
        panic!("the copy {}: {difference}", copy.image);
    }
    world.tally.count("points");
    world.tally.count("points/copies");
    Ok(())
}

/// Everything goes. What Ceph does not remove stays: the cluster is nobody's.
fn finish(world: &mut World) -> Result<()> {
    let driver = &world.store.driver;
    let migrating = world.is_migrating()?;
    let mut images = std::mem::take(&mut world.copies);
    images.push(world.spec.clone());
    images.append(&mut world.ancestors);
    if migrating {
        let _ = driver.close_all();
        let _ = driver.migration_execute(&world.spec).and_then(|()| driver.migration_commit(&world.spec));
    }
    for spec in images {
        match driver.purge(&spec) {
            Err(error @ DriverError::Refused { .. }) => {
                world.told.push(told(&error));
                world.tally.count("left");
            }
            result => result?,
        }
    }
    Ok(())
}

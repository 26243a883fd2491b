//! What is told to a run, and several images in one.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rbd2qcow2_core::cancel::Cancel;
use rbd2qcow2_core::progress::{ImageReport, Observer, Stage, Status};

use super::{MIB, small_objects};
use crate::cluster::{unique, unique_image};
use crate::cluster_or_skip;
use crate::driver::{Driver, FULL_FEATURES, Layout, Spec};
use crate::random::Random;
use crate::store::{Made, Store, read_json, why};

#[test]
fn a_dry_run_changes_nothing() {
    let cluster = cluster_or_skip!("a_dry_run_changes_nothing");
    let mut store = Store::new(&cluster);
    let spec = store.image("dry", 4 * MIB, &small_objects());
    store.driver.write(&spec, MIB, MIB, 1).expect("a write");
    store.options.dry_run = true;
    let report = store.run(&spec);
    assert_eq!(report.status, Status::Ok, "{}", why(&report));
    assert_eq!(report.kind.map(|kind| kind.as_str()), Some("full"));
    assert_eq!((report.data_bytes, report.virtual_size, &report.file), (MIB, 4 * MIB, &None));
    assert_eq!(fs::read_dir(store.dest()).expect("the destination").count(), 0);
    assert!(store.snapshot_names(&spec).is_empty());

    store.options.dry_run = false;
    let first = store.back_up(&spec);
    // What a killed run has left is left alone, too.
    let left = store.directory(&spec).join(format!(".{}@20200101T000000Z.qcow2.partial", spec.image));
    fs::write(&left, "left").expect("a write");
    store.driver.write(&spec, 0, 65_536, 2).expect("a write");
    let snapshots = store.snapshot_names(&spec);
    store.options.dry_run = true;
    let report = store.run(&spec);
    assert_eq!(report.status, Status::Ok, "{}", why(&report));
    assert_eq!(report.kind.map(|kind| kind.as_str()), Some("incremental"));
    assert_eq!(report.data_bytes, 65_536);
    assert!(report.point.is_some_and(|point| point > first.point));
    assert_eq!(store.snapshot_names(&spec), snapshots);
    assert_eq!(fs::read(&left).expect("the left-over"), b"left");
    fs::remove_file(&left).expect("a removal");
    store.check_directory(&spec);
    store.check_again();
    store.purge(&spec);
}

/// librbd reports an object as changed from its start to the end of what was written: without a look
/// at what is zero, the layer would be as large as the objects.
#[test]
fn scattered_writes_make_a_small_layer() {
    let cluster = cluster_or_skip!("scattered_writes_make_a_small_layer");
    let mut store = Store::new(&cluster);
    let size = 2048 * MIB;
    let spec = store.image("scattered", size, &Layout::new(22, FULL_FEATURES));
    store.driver.write(&spec, 0, 8 * MIB, 1).expect("a write");
    let first = store.back_up(&spec);
    let mut random = Random::new(3);
    let mut pages = std::collections::BTreeSet::new();
    while pages.len() < 1024 {
        pages.insert(random.below(size / 4096));
    }
    for page in &pages {
        store.driver.write(&spec, page * 4096, 4096, 1000 + page).expect("a write");
    }
    let second = store.back_up(&spec);
    second.assert_upon(&first);
    let changed = 4096 * pages.len() as u64;
    let data = second.held().0;
    // Objects that hold data already are read from the start to the end of the write.
    assert!(data >= changed && data <= changed + 8 * MIB, "{data} of {changed}");
    // Data and tables. An L2 table of an extended layer covers 1 GiB with clusters of 128 KiB.
    let layer = second.number("layer_bytes");
    assert!(layer <= 2 * data, "{layer} bytes on disk for {data} bytes of data");
    store.purge(&spec);
}

#[test]
fn one_failing_image_leaves_the_others_alone() {
    let cluster = cluster_or_skip!("one_failing_image_leaves_the_others_alone");
    let mut store = Store::new(&cluster);
    let specs: Vec<_> = (0..5).map(|_| store.image("many", MIB, &small_objects())).collect();
    for (seed, spec) in (1..).zip(&specs) {
        store.driver.write(spec, 0, 100_000 * seed, seed).expect("a write");
    }
    let before: Vec<_> = specs.iter().map(|spec| store.driver.snaps(spec).expect("snapshots")).collect();
    let missing = unique_image("no-such-image");
    let mut all = specs.clone();
    all.insert(2, missing.clone());
    let mut backup = store.pool_backup(&all);
    backup.jobs = 4;
    let reports = backup.run(&(), &Cancel::new()).expect("the pool is there");
    assert_eq!(reports.len(), 6);
    let of = |spec: &Spec| reports.iter().find(|report| report.image == spec.image).expect("a report");
    assert_eq!(of(&missing).status, Status::Failed);
    assert!(why(of(&missing)).contains(&missing.image), "{}", why(of(&missing)));
    assert!(!store.directory(&missing).exists());
    for (spec, before) in specs.iter().zip(&before) {
        store.take_in(spec, of(spec), before).assert_full(None);
        store.purge(spec);
    }
}

#[test]
fn a_whole_pool_but_for_what_is_excluded() {
    let cluster = cluster_or_skip!("a_whole_pool_but_for_what_is_excluded");
    let store = Store::new(&cluster);
    let pool = unique("whole");
    store.driver.pool_create(&pool).expect("a pool");
    for name in ["vm-1", "vm-2", "vm-20", "scratch-1", "tmp"] {
        store.driver.create(&Spec::new(&pool, name), MIB, &small_objects()).expect("an image");
    }
    let mut backup = store.pool_backup(&[Spec::new(&pool, "all")]);
    backup.images.clear();
    backup.exclude = vec!["scratch-*".to_owned(), "vm-?".to_owned()];
    let reports = backup.run(&(), &Cancel::new()).expect("the pool is there");
    let mut done: Vec<_> = reports.iter().map(|report| (&*report.image, report.status)).collect();
    done.sort_unstable_by_key(|done| done.0);
    assert_eq!(done, [("tmp", Status::Ok), ("vm-20", Status::Ok)]);
    backup.exclude = vec!["*".to_owned()];
    assert!(backup.run(&(), &Cancel::new()).expect("the pool is there").is_empty());
    backup.exclude = vec!["vm-[".to_owned()];
    assert!(backup.run(&(), &Cancel::new()).is_err());
    store.driver.pool_remove(&pool).expect("the pool can be removed");
}

/// Who does what, and how many there were at once.
#[derive(Default)]
struct Crowd(Mutex<Counts>);

#[derive(Default)]
struct Counts {
    now: BTreeMap<String, Stage>,
    most: BTreeMap<&'static str, usize>,
}

impl Crowd {
    fn note(&self, image: &str, stage: Option<Stage>) {
        let Counts { now, most } = &mut *self.0.lock().expect("no panic");
        match stage {
            Some(stage) => now.insert(image.to_owned(), stage),
            None => now.remove(image),
        };
        let of = |wanted| now.values().filter(|stage| **stage == wanted).count();
        for (what, count) in [("copy", of(Stage::Copy)), ("queue", of(Stage::Queue)), ("all", now.len())] {
            let most = most.entry(what).or_default();
            *most = count.max(*most);
        }
    }

    fn most(self) -> [usize; 3] {
        let most = self.0.into_inner().expect("no panic").most;
        ["copy", "queue", "all"].map(|what| most[what])
    }
}

impl Observer for Crowd {
    fn stage(&self, image: &str, stage: Stage) {
        self.note(image, Some(stage));
    }

    fn finished(&self, report: &ImageReport) {
        self.note(&report.image, None);
    }
}

#[test]
fn snapshots_are_taken_while_others_copy() {
    let cluster = cluster_or_skip!("snapshots_are_taken_while_others_copy");
    let mut store = Store::new(&cluster);
    let specs: Vec<_> = (0..8).map(|_| store.image("crowd", MIB, &small_objects())).collect();
    for (seed, spec) in (1..).zip(&specs) {
        store.driver.write(spec, 0, MIB, seed).expect("a write");
    }
    // Two seconds for all.
    store.options.rate_limit = Some(4 * MIB);
    for jobs in [1, 2] {
        let mut backup = store.pool_backup(&specs);
        (backup.jobs, backup.options.full) = (jobs, true);
        let crowd = Crowd::default();
        let reports = backup.run(&crowd, &Cancel::new()).expect("the pool is there");
        assert!(reports.iter().all(|report| report.status == Status::Ok), "{reports:?}");
        let [copy, queue, all] = crowd.most();
        if jobs == 1 {
            assert_eq!([copy, queue, all], [1; 3]);
        } else {
            assert_eq!(copy, jobs);
            assert!(queue > jobs && all > 2 * jobs && all <= 4 * jobs, "{queue} waited, of {all}");
        }
    }
    for spec in &specs {
        store.purge(spec);
    }
}

/// Were a misspelt name an empty pool, a backup of nothing would look like a success.
#[test]
fn what_is_not_there_is_an_error() {
    let cluster = cluster_or_skip!("what_is_not_there_is_an_error");
    let store = Store::new(&cluster);
    let spec = store.image("there", MIB, &small_objects());
    let mut backup = store.pool_backup(std::slice::from_ref(&spec));
    backup.images.clear();
    let pool = std::mem::replace(&mut backup.pool, "no-such-pool".to_owned());
    let error = backup.run(&(), &Cancel::new()).expect_err("there is no such pool");
    assert!(error.to_string().contains("no-such-pool"), "{error}");
    backup.pool = pool;
    backup.namespace = "no-such-namespace".to_owned();
    let error = backup.run(&(), &Cancel::new()).expect_err("there is no such namespace");
    assert!(error.to_string().contains("no-such-namespace"), "{error}");
    backup.namespace = String::new();
    backup.dest = store.dest().join("not-mounted");
    let error = backup.run(&(), &Cancel::new()).expect_err("there is no such directory");
    assert!(error.to_string().contains("not-mounted") && !backup.dest.exists(), "{error}");
    assert!(store.snapshot_names(&spec).is_empty());
    store.purge(&spec);
}

#[test]
fn a_limited_rate_takes_its_time() {
    let cluster = cluster_or_skip!("a_limited_rate_takes_its_time");
    let mut store = Store::new(&cluster);
    let spec = store.image("rate", 16 * MIB, &Layout::default());
    store.driver.write(&spec, 0, 16 * MIB, 1).expect("a write");
    store.options.rate_limit = Some(8 * MIB);
    let start = Instant::now();
    let report = store.run(&spec);
    assert_eq!(report.status, Status::Ok, "{}", why(&report));
    // The last of four reads begins when the three before have had their time.
    assert!(start.elapsed() >= Duration::from_millis(1500), "{:?}", start.elapsed());
    let made = store.take_in(&spec, &report, &[]);
    assert_eq!(made.held(), (16 * MIB, 0));
    store.purge(&spec);
}

/// Tells when the copy has begun.
struct Begun(std::sync::mpsc::SyncSender<()>);

impl Observer for Begun {
    fn stage(&self, _image: &str, stage: Stage) {
        if stage == Stage::Copy {
            let _ = self.0.try_send(());
        }
    }
}

#[test]
fn a_second_run_on_a_locked_chain_fails_at_once() {
    let cluster = cluster_or_skip!("a_second_run_on_a_locked_chain_fails_at_once");
    let mut store = Store::new(&cluster);
    let spec = store.image("locked", 16 * MIB, &Layout::default());
    store.driver.write(&spec, 0, 16 * MIB, 1).expect("a write");
    let second = store.pool_backup(std::slice::from_ref(&spec));
    store.options.rate_limit = Some(2 * MIB);
    let first = store.pool_backup(std::slice::from_ref(&spec));
    let (begun, wait) = std::sync::mpsc::sync_channel(1);
    let report = std::thread::scope(|scope| {
        let first = scope.spawn(move || first.run(&Begun(begun), &Cancel::new()).expect("the pool").pop());
        wait.recv_timeout(Duration::from_secs(60)).expect("the copy begins");
        let refused = second.run(&(), &Cancel::new()).expect("the pool").pop().expect("a report");
        assert_eq!(refused.status, Status::Failed);
        assert!(why(&refused).contains("another run is writing"), "{}", why(&refused));
        assert!(
            !first.is_finished(),
            "the second run has waited, or the first was too quick to be in the way"
        );
        first.join().expect("no panic").expect("a report")
    });
    store.take_in(&spec, &report, &[]).assert_full(None);
    store.purge(&spec);
}

/// Sets the flag when the copy has begun.
struct StopAt(Stage, Cancel);

impl Observer for StopAt {
    fn stage(&self, _image: &str, stage: Stage) {
        if stage == self.0 {
            self.1.set();
        }
    }
}

#[test]
fn an_interrupted_run_leaves_nothing_behind() {
    let cluster = cluster_or_skip!("an_interrupted_run_leaves_nothing_behind");
    for mut store in Store::of_each_writer(&cluster) {
        let spec = store.image("interrupted", 4 * MIB, &small_objects());
        store.driver.write(&spec, 0, 4 * MIB, 1).expect("a write");
        let first = store.back_up(&spec);
        let snapshots = store.snapshot_names(&spec);
        store.driver.write(&spec, 0, 4 * MIB, 2).expect("a write");
        for stage in [Stage::Prepare, Stage::Snapshot, Stage::Queue, Stage::Copy, Stage::Commit] {
            let cancel = Cancel::new();
            let backup = store.pool_backup(std::slice::from_ref(&spec));
            let reports = backup.run(&StopAt(stage, cancel.clone()), &cancel).expect("the pool");
            let [report] = &reports[..] else { panic!("{reports:?}") };
            assert_eq!(report.status, Status::Failed, "{stage:?}");
            assert!(why(report).contains("interrupted"), "{stage:?}: {}", why(report));
            store.check_directory(&spec);
            assert_eq!(store.snapshot_names(&spec), snapshots, "{stage:?}");
        }
        store.back_up(&spec).assert_upon(&first);
        store.check_again();
        store.purge(&spec);
    }
}

/// Does something to the image once the copy has begun.
struct Meanwhile<F>(F);

impl<F: Fn() + Sync> Observer for Meanwhile<F> {
    fn stage(&self, _image: &str, stage: Stage) {
        if stage == Stage::Copy {
            (self.0)();
        }
    }
}

fn run_meanwhile(
    store: &Store,
    spec: &Spec,
    act: impl Fn(&Driver) -> crate::driver::Result<()> + Sync,
) -> ImageReport {
    let backup = store.pool_backup(std::slice::from_ref(spec));
    let observer = Meanwhile(|| act(&store.driver).expect("what happens meanwhile"));
    backup.run(&observer, &Cancel::new()).expect("the pool").pop().expect("a report")
}

/// The point is the snapshot, not what the image has become by the time that it is read.
#[test]
fn an_image_that_changes_while_it_is_backed_up() {
    let cluster = cluster_or_skip!("an_image_that_changes_while_it_is_backed_up");
    let mut store = Store::new(&cluster);
    let parent = store.image("moving-parent", 4 * MIB, &small_objects());
    store.driver.write(&parent, 0, 4 * MIB, 1).expect("a write");
    store.driver.snap_create(&parent, "base").expect("a snapshot");
    let spec = unique_image("moving");
    store.driver.clone(&parent, "base", &spec, &small_objects()).expect("a clone");
    let mut last: Option<Made> = None;
    for round in 0..3 {
        store.driver.write(&spec, 0, 2 * MIB, 10 + round).expect("a write");
        let before = store.driver.snaps(&spec).expect("snapshots");
        let report = run_meanwhile(&store, &spec, |driver| match round {
            0 => driver.write(&spec, MIB, 2 * MIB, 20).and_then(|()| driver.discard(&spec, 0, MIB)),
            1 => driver.resize(&spec, 500_000).and_then(|()| driver.resize(&spec, 4 * MIB)),
            _ => driver.resize(&spec, 100_000),
        });
        let made = store.take_in(&spec, &report, &before);
        match &last {
            Some(last) => made.assert_upon(last),
            None => made.assert_full(None),
        }
        last = Some(made);
    }
    store.check_again();
    store.purge(&spec);
    store.purge(&parent);
}

#[test]
fn a_clone_that_is_flattened_while_it_is_backed_up() {
    let cluster = cluster_or_skip!("a_clone_that_is_flattened_while_it_is_backed_up");
    let mut store = Store::new(&cluster);
    let parent = store.image("flattening-parent", 4 * MIB, &small_objects());
    store.driver.write(&parent, 0, 4 * MIB, 1).expect("a write");
    store.driver.snap_create(&parent, "base").expect("a snapshot");
    let spec = unique_image("flattening");
    store.driver.clone(&parent, "base", &spec, &small_objects()).expect("a clone");
    store.driver.discard(&spec, MIB, MIB).expect("a discard");
    store.back_up(&spec);
    store.driver.write(&spec, 0, 1000, 2).expect("a write");
    let begun = AtomicUsize::new(0);
    let report = run_meanwhile(&store, &spec, |driver| match begun.fetch_add(1, Ordering::Relaxed) {
        0 => driver.flatten(&spec).and_then(|()| driver.fill(&spec, 0, 4 * MIB, 7)),
        _ => Ok(()),
    });
    assert_eq!(report.status, Status::Ok, "{}", why(&report));
    // What was read of its parent counted for nothing, and all was read anew.
    assert_eq!(begun.into_inner(), 2);
    let file = report.file.expect("a file");
    let manifest = read_json(&file.with_extension("json"));
    assert!(manifest["clone_parent"].is_null(), "{manifest}");
    let truth = tempfile::NamedTempFile::new().expect("a file");
    store.driver.read_to(&spec, manifest["snapshot"].as_str(), truth.path()).expect("the snapshot");
    store.adopt(&spec, manifest["point"].as_str().expect("a point"), &file, truth.path());
    store.check_again();
    store.purge(&spec);
    store.purge(&parent);
}

#[test]
fn a_snapshot_that_is_removed_meanwhile_fails_the_backup() {
    let cluster = cluster_or_skip!("a_snapshot_that_is_removed_meanwhile_fails_the_backup");
    let mut store = Store::new(&cluster);
    let spec = store.image("removed-meanwhile", 4 * MIB, &small_objects());
    store.driver.write(&spec, 0, 4 * MIB, 1).expect("a write");
    for whose in ["base", "new", "new, made again", "base, made again"] {
        let first = store.back_up(&spec);
        let base = first.manifest["snapshot"].as_str().expect("a name");
        store.driver.write(&spec, 0, MIB, 2).expect("a write");
        let report = run_meanwhile(&store, &spec, |driver| {
            let snaps = driver.snaps(&spec)?;
            let is_meant = |name: &str| (name == base) == whose.starts_with("base");
            let gone = snaps.iter().find(|snap| is_meant(&snap.name)).expect("the snapshot");
            driver.snap_remove(&spec, &gone.name)?;
            if whose.ends_with("again") {
                driver.snap_create(&spec, &gone.name)?;
            }
            Ok(())
        });
        assert_eq!(report.status, Status::Failed, "{whose}: {report:?}");
        assert!(why(&report).contains("disappeared"), "{whose}: {}", why(&report));
        store.check_directory(&spec);
        let left = store.snapshot_names(&spec);
        assert!(left.is_subset(&[base.to_owned()].into()), "{whose}: {left:?}");
    }
    let root = store.back_up(&spec);
    root.assert_full(Some("base snapshot"));
    store.check_again();
    store.purge(&spec);
}

#[test]
fn a_protected_snapshot_of_a_backup_is_left_alone() {
    let cluster = cluster_or_skip!("a_protected_snapshot_of_a_backup_is_left_alone");
    let mut store = Store::new(&cluster);
    let spec = store.image("protected", MIB, &small_objects());
    store.options.keep_snapshots = 3;
    let made: Vec<_> = (0..3).map(|_| store.back_up(&spec)).collect();
    let names: Vec<_> = made.iter().map(|made| made.manifest["snapshot"].as_str().expect("a name")).collect();
    store.driver.snap_protect(&spec, names[1]).expect("protected");
    store.options.keep_snapshots = 1;
    let report = store.run(&spec);
    assert_eq!(report.status, Status::Ok, "{}", why(&report));
    let left = store.snapshot_names(&spec);
    // The new one and the protected one; the one older than that is gone, too.
    assert!(left.len() == 2 && left.contains(names[1]), "{left:?}");
    store.driver.snap_unprotect(&spec, names[1]).expect("unprotected");
    let report = store.run(&spec);
    assert_eq!(report.status, Status::Ok, "{}", why(&report));
    assert_eq!(store.snapshot_names(&spec).len(), 1);
    store.check_again();
    store.purge(&spec);
}

//! Backups of images with random histories: every point of every chain must be what its snapshot was.
//!
//! A seed makes the same histories again:
//! `RBD2QCOW2_SEED=1234 cargo test -p rbd2qcow2-core --test cluster backup_model`.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rbd2qcow2_core::layer::{Compression, ExtendedL2};
use rbd2qcow2_core::options::{BackupOptions, DiffMode, Writer};

use crate::cluster::{TestCluster, say, unique_image};
use crate::cluster_or_skip;
use crate::driver::{Driver, DriverError, Layout, Spec};
use crate::random::Random;
use crate::store::Store;
use crate::verify_source;

/// Kinds of layers.
const KINDS: u64 = 16;

/// Histories in CI, and with `RBD2QCOW2_LONG=1`. Each has its own kind of layers, in turn.
const HISTORIES: u64 = KINDS;
const LONG_HISTORIES: u64 = 120;

/// No history begins after this, so that a slow machine in CI does fewer of them, but at least one
/// with each writer and each kind of compression.
const LIMIT: Duration = Duration::from_secs(120);
const LEAST_HISTORIES: u64 = 6;

/// Backups of each image.
const ROUNDS: u64 = 4;

/// About the size of the images, in bytes.
const SIZE: u64 = 3 << 20;

const WITH_MAPS: &[&str] = &["layering", "exclusive-lock", "object-map", "fast-diff", "deep-flatten"];
const WITHOUT_MAPS: &[&str] = &["layering", "exclusive-lock"];

/// How the layers of a history are written and its changes found: each form by either writer.
fn options(number: u64) -> BackupOptions {
    let writer = if number.is_multiple_of(2) { Writer::Native } else { Writer::QemuNbd };
    let form = number % KINDS / 2;
    // Only one of the writers has levels.
    let zstd = |level| Compression::Zstd { level: Some(level).filter(|_| writer == Writer::Native) };
    let (cluster_size, compression, diff) = match form {
        0 => (None, Compression::None, DiffMode::Exact),
        1 => (Some(64 << 10), Compression::Zlib, DiffMode::Exact),
        2 => (None, zstd(19), DiffMode::Exact),
        // The finest grain, a sector.
        3 => (Some(16 << 10), Compression::None, DiffMode::Exact),
        // Too small for subclusters.
        4 => (Some(4 << 10), Compression::None, DiffMode::Scan),
        5 => (Some(2 << 20), zstd(3), DiffMode::Scan),
        6 => (Some(2 << 20), Compression::None, DiffMode::Exact),
        _ => (Some(512), Compression::Zlib, DiffMode::Exact),
    };
    let mut options = BackupOptions::default();
    (options.cluster_size, options.compression, options.diff) = (cluster_size, compression, diff);
    options.writer = writer;
    // For qemu-nbd, compression is the end of subclusters in any case.
    if form == 5 || form == 6 && writer == Writer::QemuNbd {
        options.extended_l2 = ExtendedL2::Off;
    }
    match form % 4 {
        // One read at a time, in the least memory there is.
        2 => (options.parallel, options.memory) = (1, 0),
        3 => options.parallel = 64,
        _ => {}
    }
    options
}

/// An image whose history is being made up.
struct Subject {
    spec: Spec,
    parent: Option<Spec>,
    object: u64,
    size: u64,
    mapped: bool,
    /// The user's snapshots and their number so far.
    snapshots: Vec<(String, u64)>,
    taken: u64,
}

/// One history: what happened is told when it ends badly.
struct History {
    random: Random,
    told: Vec<String>,
}

impl Drop for History {
    fn drop(&mut self) {
        if std::thread::panicking() {
            say(&self.told.join("\n"));
        }
    }
}

impl History {
    fn tell(&mut self, what: impl Into<String>) {
        self.told.push(what.into());
    }

    fn size(&mut self) -> u64 {
        match self.random.below(5) {
            0 => SIZE,
            1 => SIZE / 2 + self.random.below(SIZE),
            2 => (SIZE / 4 + self.random.below(SIZE)) / 4096 * 4096,
            3 => SIZE + self.random.below(3),
            _ => self.random.below(SIZE),
        }
    }

    fn layout(&mut self, mapped: bool) -> (Layout, u64) {
        // 4 KiB, less than a cluster and even a grain, makes many objects and slow rounds.
        let order = self.random.pick(&[12, 14, 16, 16, 18, 20, 22]);
        (Layout::new(order, if mapped { WITH_MAPS } else { WITHOUT_MAPS }), 1 << order)
    }

    /// A plain image, a clone, a striped one and one without object map.
    fn subjects(&mut self, driver: &Driver) -> Result<Vec<Subject>, DriverError> {
        let mut subjects = Vec::new();
        for kind in 0..4 {
            let mapped = kind != 3;
            let (mut layout, object) = self.layout(mapped);
            if kind == 2 {
                layout = layout.striped(object / self.random.pick(&[1, 2, 4]), 2 + self.random.below(4));
            }
            let spec = unique_image("model");
            let mut size = self.size();
            // The last one may be a clone, too.
            let parent =
                (kind == 1 || kind == 3 && self.random.one_in(2)).then(|| unique_image("model-parent"));
            self.tell(format!("{}: {size} bytes, {layout:?}, parent {parent:?}", spec.image));
            if let Some(parent) = &parent {
                let (layout, object) = self.layout(true);
                size = size.max(1);
                driver.create(parent, size, &layout)?;
                for _ in 0..4 {
                    let (offset, length) = self.range(object, size);
                    driver.write(parent, offset, length, self.random.next())?;
                }
                driver.snap_create(parent, "base")?;
            }
            match &parent {
                Some(parent) => driver.clone(parent, "base", &spec, &layout)?,
                None => driver.create(&spec, size, &layout)?,
            }
            subjects.push(Subject { spec, parent, object, size, mapped, snapshots: Vec::new(), taken: 0 });
        }
        Ok(subjects)
    }

    /// One or more whole objects, the head or tail of one, sectors, or anything, cut to the size.
    fn range(&mut self, object: u64, size: u64) -> (u64, u64) {
        let random = &mut self.random;
        let start = random.below(size.max(1)) / object * object;
        let inside = random.below(object);
        let (offset, length) = match random.below(7) {
            0 => (start, object),
            1 => (start, object * (1 + random.below(6))),
            2 => (start + inside, object - inside),
            3 => (start, inside + 1),
            4 => (start + inside / 512 * 512, 512 << random.below(6)),
            // The end, where padding is.
            5 => (size.saturating_sub(1 + random.below(5000)), 5000),
            _ => (start + inside, 1 + random.below(object * 3)),
        };
        let offset = offset.min(size);
        (offset, length.min(size - offset).min(2 << 20))
    }

    fn step(&mut self, driver: &Driver, subject: &mut Subject) -> Result<(), DriverError> {
        let what = self.random.below(26);
        let spec = &subject.spec;
        let (offset, length) = self.range(subject.object, subject.size);
        let told = |history: &mut Self, what: String| history.tell(format!("{}: {what}", spec.image));
        match what {
            0..7 => {
                let seed = self.random.next();
                told(self, format!("write {offset}+{length} seed {seed}"));
                driver.write(spec, offset, length, seed)
            }
            7..11 => {
                told(self, format!("discard {offset}+{length}"));
                driver.discard(spec, offset, length)
            }
            11 | 12 => {
                told(self, format!("write zeroes {offset}+{length}"));
                driver.write_zeroes(spec, offset, length)
            }
            13 | 14 => {
                let size = self.size();
                told(self, format!("resize to {size}"));
                driver.resize(spec, size)?;
                subject.size = size;
                Ok(())
            }
            15 | 16 => {
                // Shrunk and grown again, with or without a snapshot in between.
                let small = self.random.below(subject.size + 1);
                told(self, format!("resize to {small} and back"));
                driver.resize(spec, small)?;
                if self.random.one_in(2) {
                    self.snapshot(driver, subject, small)?;
                }
                driver.resize(&subject.spec, subject.size)
            }
            17..20 => self.snapshot(driver, subject, subject.size),
            20 => {
                if subject.snapshots.is_empty() {
                    return Ok(());
                }
                let index = self.random.below(subject.snapshots.len() as u64) as usize;
                let (name, _) = subject.snapshots.remove(index);
                told(self, format!("remove snapshot {name}"));
                driver.snap_remove(spec, &name)
            }
            21..24 => self.roll_back(driver, subject),
            24 if subject.parent.is_some() => {
                told(self, "flatten".to_owned());
                match driver.flatten(spec) {
                    // EINVAL: it has been flattened before, or was shrunk to nothing.
                    Err(error) if error.errno() == Some(22) => Ok(()),
                    result => result,
                }
            }
            24 => Ok(()),
            _ if subject.mapped && self.random.one_in(4) => {
                told(self, "invalidate the object maps".to_owned());
                driver.invalidate_object_maps(spec)
            }
            _ => Ok(()),
        }
    }

    fn snapshot(&mut self, driver: &Driver, subject: &mut Subject, size: u64) -> Result<(), DriverError> {
        let name = format!("user-{}", subject.taken);
        self.tell(format!("{}: snapshot {name}", subject.spec.image));
        driver.snap_create(&subject.spec, &name)?;
        subject.taken += 1;
        subject.snapshots.push((name, size));
        Ok(())
    }

    /// To one of the user's snapshots or of ours.
    fn roll_back(&mut self, driver: &Driver, subject: &mut Subject) -> Result<(), DriverError> {
        let snaps = driver.snaps(&subject.spec)?;
        if snaps.is_empty() {
            return Ok(());
        }
        let snap = &snaps[self.random.below(snaps.len() as u64) as usize];
        self.tell(format!("{}: roll back to {}", subject.spec.image, snap.name));
        driver.rollback(&subject.spec, &snap.name)?;
        subject.size = snap.size;
        Ok(())
    }
}

/// What was compared.
#[derive(Debug, Default)]
struct Tally {
    points: usize,
    incremental: usize,
    modes: BTreeSet<String>,
    /// How long the restores to images took.
    restoring: Duration,
}

/// Plays a history: some steps for each image, a backup of all, and again.
///
/// # Errors
/// The second client broke down; nothing can be said of the history.
///
/// # Panics
/// Where a point is not what its snapshot was.
fn play(
    cluster: &TestCluster,
    seed: u64,
    options: BackupOptions,
    tally: &mut Tally,
) -> Result<(), DriverError> {
    let mut store = Store::new(cluster);
    store.options = options;
    store.readers.extend(old_qemu().map(|directory| directory.join("qemu-img")));
    let told = vec![format!("RBD2QCOW2_SEED={seed}: {:?}", store.options)];
    let mut history = History { random: Random::new(seed), told };
    let mut subjects = history.subjects(&store.driver)?;
    let specs: Vec<_> = subjects.iter().map(|subject| subject.spec.clone()).collect();
    for round in 0..ROUNDS {
        for subject in &mut subjects {
            for _ in 0..2 + history.random.below(7) {
                history.step(&store.driver, subject)?;
            }
        }
        if history.random.one_in(2) {
            // Nobody holds the images' locks.
            store.driver.close_all()?;
        }
        store.options.keep_snapshots = 1 + history.random.below(3) as usize;
        history.tell(format!("backup {round}, keeping {}", store.options.keep_snapshots));
        for made in store.back_up_all(&specs) {
            history.tell(format!("{}@{}", made.spec.image, made.point));
            assert_eq!(made.kind == "full", round == 0, "{:?}", made.reason);
            tally.points += 1;
            tally.incremental += usize::from(round > 0);
            tally.modes.insert(made.manifest["diff_mode"].to_string());
        }
    }
    store.check_again();
    verify_source::check(cluster, store.dest(), &store.driver, &specs);
    // Every second one for each of the writers.
    if number("RBD2QCOW2_LONG") == Some(1) || matches!(seed % 4, 0 | 3) {
        let start = Instant::now();
        store.check_images();
        tally.restoring += start.elapsed();
    }
    for subject in &subjects {
        store.driver.purge(&subject.spec)?;
        subject.parent.iter().try_for_each(|parent| store.driver.purge(parent))?;
    }
    Ok(())
}

/// Where the programs of a second, older QEMU are, when there are any to test with.
fn old_qemu() -> Option<PathBuf> {
    std::env::var_os("RBD2QCOW2_TEST_QEMU_OLD").map(PathBuf::from)
}

fn number(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{variable} is {value:?}, not a number")))
}

/// A number that no other run begins with.
fn draw_seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    u64::from(now.subsec_nanos())
}

/// Plays a history; the second client may break down once.
fn play_surely(cluster: &TestCluster, seed: u64, options: &BackupOptions, tally: &mut Tally) {
    for _ in 0..2 {
        match play(cluster, seed, options.clone(), tally) {
            Ok(()) => return,
            Err(error) if error.is_breakdown() => say(&format!("seed {seed} is played again: {error}")),
            Err(error) => panic!("RBD2QCOW2_SEED={seed}: {error}"),
        }
    }
    panic!("RBD2QCOW2_SEED={seed}: the second client broke down twice");
}

#[test]
fn every_point_is_what_its_snapshot_was() {
    let cluster = cluster_or_skip!("every_point_is_what_its_snapshot_was");
    let long = number("RBD2QCOW2_LONG") == Some(1);
    let first = number("RBD2QCOW2_SEED");
    // The kind of layers comes from the seed, too, so that one number repeats a history.
    let seed = first.unwrap_or_else(|| draw_seed() / KINDS * KINDS);
    let count = if long { LONG_HISTORIES } else { HISTORIES };
    say(&format!("RBD2QCOW2_SEED={seed}, {count} histories"));
    let (start, mut tally) = (Instant::now(), Tally::default());
    for index in 0..count {
        if !long && index >= LEAST_HISTORIES && start.elapsed() > LIMIT {
            say(&format!("stopped after {index} histories, for lack of time"));
            break;
        }
        play_surely(&cluster, seed + index, &options(seed + index), &mut tally);
    }
    say(&format!("{tally:?} in {:?}", start.elapsed()));
    assert!(tally.incremental > 0 && tally.modes.contains("\"exact\"") && tally.modes.contains("\"scan\""));
}

#[test]
fn layers_of_an_older_qemu() {
    let Some(directory) = old_qemu() else {
        say("SKIPPED layers_of_an_older_qemu: RBD2QCOW2_TEST_QEMU_OLD is not set");
        return;
    };
    let cluster = cluster_or_skip!("layers_of_an_older_qemu");
    // Odd numbers are qemu-nbd's: none, zlib and zstd.
    let seed = number("RBD2QCOW2_SEED").unwrap_or_else(|| draw_seed() / KINDS * KINDS + 1);
    let mut tally = Tally::default();
    for seed in [seed, seed + 2, seed + 4] {
        let mut options = options(seed);
        options.writer = Writer::QemuNbd;
        if let Compression::Zstd { level } = &mut options.compression {
            *level = None;
        }
        options.qemu_img = directory.join("qemu-img");
        options.qemu_nbd = directory.join("qemu-nbd");
        play_surely(&cluster, seed, &options, &mut tally);
    }
    assert!(tally.incremental > 0);
}

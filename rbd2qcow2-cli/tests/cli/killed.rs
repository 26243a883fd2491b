//! SIGKILL at any moment: every point that exists stays as it is, and the next run clears up and
//! makes a point as if nothing had happened.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};

use crate::cluster::{TestCluster, say, unique_image};
use crate::cluster_or_skip;
use crate::driver::{FULL_FEATURES, Spec};
use crate::rig::{HANG, MIB, Rig, Running, WRITERS, assert_point, names_in, point_of, with};

/// Size of the images in MiB; every other one holds data. Enough that a copy can be met in its middle.
const SIZE: u64 = 32;

/// Features of an image that clients do not lock. A client that is killed while it holds an image's
/// exclusive lock, for a snapshot, keeps it for another 30 s, until the cluster believes that it is
/// dead; the next run waits for that. So most images of these tests have no such lock.
const UNLOCKED: &[&str] = &["layering"];

/// Makes the copy the longest part of a run. Whoever is killed while it takes or removes a snapshot
/// leaves a watch in the cluster, which the next run has to wait for: up to 30 s.
const SLOW: &[&str] = &["--rate-limit", "64M"];

/// No kill at random after this, but one with each form at least.
const LIMIT: Duration = Duration::from_secs(45);

/// What kind of backup is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// The image's first: its chain has no point yet.
    First,
    /// A new chain beside the old one.
    Full,
    Incremental,
}

const KINDS: [Kind; 3] = [Kind::First, Kind::Full, Kind::Incremental];

/// How layers are written, as options. Not a multiple of the kinds, so that all pairs are met.
const FORMS: [&[&str]; 4] = [
    WRITERS[0],
    &["--writer", "native", "--compression", "zstd:9"],
    WRITERS[1],
    &["--writer", "native", "--compression", "zlib"],
];

/// What a killed run had come to, judged by what it left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reached {
    Nothing,
    /// The note about the snapshot of a new chain.
    Announced,
    /// The digests' file, which is created when the snapshot is there and the copy begins.
    Begun,
    /// The layer's file.
    Layer,
    /// The digests have their name: all data is written and flushed.
    Sealed,
    /// The manifest has its name.
    Recorded,
    /// The layer has its name: the point exists.
    Committed,
    /// The note is gone again.
    Cleared,
}

/// An image, what its points must hold, and what it holds now.
struct Victim<'a> {
    rig: &'a Rig,
    image: Spec,
    /// The contents that points must have, by their layers.
    points: BTreeMap<PathBuf, PathBuf>,
    /// What the image holds now, and how many contents there were.
    truth: PathBuf,
    contents: usize,
}

impl<'a> Victim<'a> {
    fn new(rig: &'a Rig, name: &str, features: &'static [&'static str]) -> Self {
        let image = unique_image(name);
        rig.image(&image, SIZE, features);
        let truth = rig.truth(&image, 0);
        Self { rig, image, points: BTreeMap::new(), truth, contents: 0 }
    }

    /// Brings the image and its directory into the state that a run of `kind` needs.
    fn prepare(&mut self, kind: Kind, random: &mut Random) {
        if kind == Kind::First {
            self.forget();
        } else if self.points.is_empty() {
            self.rig.back_up(&self.image, &[]);
            self.adopt();
        }
        // Something that can be packed, and something that cannot.
        let (place, byte) = (random.below(SIZE) * MIB, random.below(255) as u8 + 1);
        self.rig.driver.fill(&self.image, place, MIB, byte).expect("filled");
        let offset = random.below(SIZE - 4) * MIB;
        self.rig.change(&self.image, offset, 3 * MIB + 4096, random.next());
        self.contents += 1;
        self.truth = self.rig.truth(&self.image, self.contents);
    }

    /// Throws the image's points away, and their snapshots.
    fn forget(&mut self) {
        let directory = self.rig.directory(&self.image);
        if directory.exists() {
            std::fs::remove_dir_all(&directory).expect("removed");
        }
        for snapshot in self.rig.driver.snaps(&self.image).expect("listed") {
            // One in the image's trash would be refused: the runs before must have left none.
            self.rig.driver.snap_remove(&self.image, &snapshot.name).expect("removed");
        }
        self.rig.driver.close(&self.image).expect("closed");
        self.points.clear();
    }

    fn start(&self, kind: Kind, arguments: &[&str]) -> Running {
        let full: &[&str] = if kind == Kind::Full { &["--full"] } else { &[] };
        Running::start(self.rig.backup(&self.image, &with(arguments, full)))
    }

    /// Counts what the last run made as a point of the present content, and says whether it made one.
    fn adopt(&mut self) -> bool {
        let layers = self.rig.layers(&self.image);
        let mut new = false;
        for layer in &layers {
            if !self.points.contains_key(layer) {
                assert_point(layer, &self.truth);
                self.points.insert(layer.clone(), self.truth.clone());
                new = true;
            }
        }
        assert_eq!(layers.len(), self.points.len(), "a point is gone: {layers:?}");
        new
    }

    /// How far a run has come that began when `before` was in the directory.
    fn reached(&self, before: &BTreeSet<String>) -> Reached {
        let names = names_in(&self.rig.directory(&self.image));
        let new: Vec<_> = names.difference(before).collect();
        let has = |suffix: &str, hidden: bool| {
            new.iter().any(|name| name.ends_with(suffix) && name.starts_with('.') == hidden)
        };
        let announced = names.contains(".pending.json");
        match () {
            () if has(".qcow2", false) && announced => Reached::Committed,
            () if has(".qcow2", false) => Reached::Cleared,
            () if has(".json", false) => Reached::Recorded,
            () if has(".digests", false) => Reached::Sealed,
            () if has(".qcow2.partial", true) => Reached::Layer,
            () if has(".digests.partial", true) => Reached::Begun,
            () if announced => Reached::Announced,
            () => Reached::Nothing,
        }
    }

    /// After a killed run: all points are there and whole; then the next run, after which nothing of
    /// the killed one is left. Returns whether the killed one left a snapshot without a point.
    fn recover(&mut self) -> bool {
        self.rig.assert_no_process();
        self.adopt();
        let points: Vec<_> = self.rig.layers(&self.image).iter().map(|layer| point_of(layer)).collect();
        let orphan = self.rig.snapshots(&self.image).iter().any(|point| !points.contains(point));
        self.rig.back_up(&self.image, &[]);
        assert!(self.adopt(), "the next run made no point");
        self.rig.assert_tidy(&self.image);
        self.rig.assert_only_the_newest_snapshot(&self.image);
        self.rig.assert_no_process();
        orphan
    }

    /// Looks once more at every point there is, the oldest included.
    fn check_all(&self) {
        for (layer, truth) in &self.points {
            assert_point(layer, truth);
        }
    }
}

/// Pseudo-random numbers (xorshift64*), the same for the same seed.
pub struct Random(u64);

impl Random {
    /// The seed of the environment, or one that no run had before. Printed, so that a run that
    /// failed can be repeated, as far as times can.
    pub fn of_this_run(test: &str) -> Self {
        let given = std::env::var("RBD2QCOW2_SEED").ok().and_then(|seed| seed.parse().ok());
        let clock = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("past 1970");
        let seed = given.unwrap_or_else(|| u64::from(clock().subsec_nanos()) | 1);
        say(&format!("{test}: RBD2QCOW2_SEED={seed}"));
        Self::new(seed)
    }

    pub fn new(seed: u64) -> Self {
        Self(seed.max(1))
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 1
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn time_below(&mut self, end: Duration) -> Duration {
        Duration::from_micros(self.below(u64::try_from(end.as_micros()).expect("short").max(1)))
    }
}

/// Kills in CI, or in a long run.
pub fn count(usual: usize) -> usize {
    if std::env::var("RBD2QCOW2_LONG").is_ok_and(|value| value == "1") { usual * 10 } else { usual }
}

/// Named to be the first of these, as it waits most of its time.
#[test]
fn an_image_with_the_exclusive_lock() {
    at_random_moments_with("locked", FULL_FEATURES, count(6));
}

#[test]
fn at_random_moments() {
    at_random_moments_with("random", UNLOCKED, count(25));
}

fn at_random_moments_with(name: &str, features: &'static [&'static str], rounds: usize) {
    let test = format!("killed::{name}");
    let cluster = cluster_or_skip!(&test);
    let mut random = Random::of_this_run(&test);
    let rig = Rig::new(&cluster);
    let mut victim = Victim::new(&rig, name, features);
    // How long each kind takes when it is left alone.
    let mut times = BTreeMap::new();
    for round in 0..rounds.min(FORMS.len() * KINDS.len()) {
        let (form, kind) = (round % FORMS.len(), KINDS[round % KINDS.len()]);
        victim.prepare(kind, &mut random);
        let start = Instant::now();
        let run = victim.start(kind, &with(FORMS[form], SLOW)).wait();
        assert_eq!(run.status, Some(0), "{run:?}");
        times.insert((form, kind), start.elapsed());
        assert!(victim.adopt());
    }

    let (mut reached, mut killed, mut orphans) = (BTreeMap::new(), 0, 0);
    let start = Instant::now();
    for round in 0..rounds {
        if round >= FORMS.len() && start.elapsed() > LIMIT * u32::try_from(count(1)).expect("small") {
            say(&format!("{test}: stopped after {round} rounds, for lack of time"));
            break;
        }
        let (form, kind) = (round % FORMS.len(), KINDS[round % KINDS.len()]);
        victim.prepare(kind, &mut random);
        let before = names_in(&rig.directory(&victim.image));
        let moment = random.time_below(times[&(form, kind)]);
        let running = victim.start(kind, &with(FORMS[form], SLOW));
        std::thread::sleep(moment);
        killed += usize::from(running.kill());
        *reached.entry(victim.reached(&before)).or_insert(0) += 1;
        orphans += usize::from(victim.recover());
        // A chain is no longer than the rounds until it is forgotten.
        if kind == Kind::Incremental {
            victim.check_all();
        }
    }
    say(&format!(
        "{test}: {killed} of {rounds} killed, {orphans} left a snapshot; they had reached {reached:?}"
    ));
    assert!(killed > 0, "no run was still alive when it was to be killed");
    rig.driver.purge(&victim.image).expect("removed");
}

#[test]
fn at_each_stage() {
    let cluster = cluster_or_skip!("killed::at_each_stage");
    let mut random = Random::of_this_run("killed::at_each_stage");
    let rig = Rig::new(&cluster);
    let mut victim = Victim::new(&rig, "stage", UNLOCKED);
    let stages = [
        Reached::Announced,
        Reached::Begun,
        Reached::Layer,
        Reached::Sealed,
        Reached::Recorded,
        Reached::Committed,
        Reached::Cleared,
    ];
    let (mut reached, mut orphans) = (BTreeMap::new(), 0);
    let mut forms = FORMS.into_iter().cycle();
    for _ in 0..count(1) {
        for stage in stages {
            for kind in [Kind::First, Kind::Incremental] {
                let announces = kind == Kind::First;
                if !announces && matches!(stage, Reached::Announced | Reached::Committed) {
                    continue;
                }
                victim.prepare(kind, &mut random);
                let before = names_in(&rig.directory(&victim.image));
                // What shall be met before its end must not be over in a moment.
                let slow: &[&str] = if stage < Reached::Sealed { &["--rate-limit", "16M"] } else { &[] };
                let mut running = victim.start(kind, &with(forms.next().expect("a cycle"), slow));
                let deadline = Instant::now() + HANG;
                // Without a pause: some stages last as long as one system call.
                while victim.reached(&before) < stage && !running.has_ended() {
                    assert!(Instant::now() < deadline, "{stage:?} was never reached");
                }
                // Now and then somewhat later: that is where the snapshot is taken, for instance.
                std::thread::sleep(random.time_below(Duration::from_millis(3)) * (random.below(2) as u32));
                let alive = running.kill();
                assert!(alive || stage >= Reached::Sealed, "{stage:?} passed unnoticed");
                let state = victim.reached(&before);
                assert!(state >= stage, "{stage:?} was undone by a kill: {state:?}");
                *reached.entry(state).or_insert(0) += 1;
                orphans += usize::from(victim.recover());
            }
        }
    }
    victim.check_all();
    say(&format!("killed at stages: {orphans} left a snapshot; they had come to {reached:?}"));
    assert!(orphans > 0, "no run left a snapshot, so that none had to be removed");
    assert!(reached.contains_key(&Reached::Layer), "no run was killed in the middle of its copy");
    rig.driver.purge(&victim.image).expect("removed");
}

/// The test's oracle must see what it is there for.
#[test]
fn points_that_differ_are_seen() {
    let _cluster: TestCluster = cluster_or_skip!("killed::points_that_differ_are_seen");
    let rig = Rig::new(&_cluster);
    let mut victim = Victim::new(&rig, "oracle", FULL_FEATURES);
    rig.back_up(&victim.image, &[]);
    assert!(victim.adopt());
    let old = victim.truth.clone();
    victim.prepare(Kind::Incremental, &mut Random(7));
    let layer = rig.layers(&victim.image).pop().expect("a point");
    assert_point(&layer, &old);
    let differs = std::panic::catch_unwind(|| assert_point(&layer, &victim.truth));
    assert!(differs.is_err(), "another content went unnoticed");
    rig.driver.purge(&victim.image).expect("removed");
}

#[test]
fn qemu_nbd_in_the_middle() {
    let cluster = cluster_or_skip!("killed::qemu_nbd_in_the_middle");
    let rig = Rig::new(&cluster);
    let mut victim = Victim::new(&rig, "server", FULL_FEATURES);
    rig.back_up(&victim.image, &[]);
    victim.adopt();
    rig.change(&victim.image, 0, 24 * MIB, 1);
    victim.truth = rig.truth(&victim.image, 1);
    let arguments = with(WRITERS[1], &["--rate-limit", "1M", "-v"]);
    let mut running = Running::start(rig.backup(&victim.image, &arguments));
    // A server that dies before it has answered is started once more, in another mode.
    running.wait_for_words("is written through");
    let server = rig.wait_for_qemu_nbd();
    kill_process(server, Signal::KILL).expect("it runs");
    let run = running.wait();
    assert_eq!(run.status, Some(1), "{run:?}");
    assert!(run.stderr.contains("qemu-nbd was killed by signal 9"), "{}", run.stderr);
    rig.assert_no_process();
    rig.assert_tidy(&victim.image);
    rig.assert_only_the_newest_snapshot(&victim.image);
    assert!(!victim.adopt(), "a point of a failed run");
    rig.back_up(&victim.image, &[]);
    assert!(victim.adopt());
    rig.assert_tidy(&victim.image);
    rig.driver.purge(&victim.image).expect("removed");
}

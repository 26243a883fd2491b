//! Random histories of small images. A seed makes the same history again:
//! `RBD2QCOW2_SEED=1234 cargo test -p rbd2qcow2-core --test cluster random_histories`.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rbd2qcow2_core::options::DiffMode;
use rbd2qcow2_core::rbd::Pool;

use super::{Pair, Wrong, check_reads, compare, open_pool};
use crate::cluster::{TestCluster, say, unique_image};
use crate::cluster_or_skip;
use crate::driver::{Driver, DriverError, Layout, Spec};
use crate::random::Random;

/// Rounds in CI, and with `RBD2QCOW2_LONG=1`.
const ROUNDS: u64 = 100;
const LONG_ROUNDS: u64 = 1000;

/// Threads that do rounds. Most of a round is waiting for the cluster.
const WORKERS: usize = 3;

/// Rounds that may end without a result because librbd took the second client down, one in so many.
const BREAKDOWNS: u64 = 20;

/// About the size of the images, in bytes.
const SIZE: u64 = 2 << 20;

/// Something that happens to an image. Offsets and sizes are cut to what the image then has.
#[derive(Clone, Debug)]
enum Step {
    Write {
        offset: u64,
        length: u64,
        seed: u64,
    },
    Discard {
        offset: u64,
        length: u64,
    },
    WriteZeroes {
        offset: u64,
        length: u64,
    },
    Resize(u64),
    Snapshot,
    /// Counted from the newest snapshot, which is 0.
    RemoveSnapshot(u64),
    Rollback(u64),
    Flatten,
}

/// An image and its history, drawn from a seed.
#[derive(Clone)]
struct Plan {
    seed: u64,
    size: u64,
    layout: Layout,
    parent: Option<ParentPlan>,
    steps: Vec<Step>,
}

#[derive(Clone, Debug)]
struct ParentPlan {
    size: u64,
    layout: Layout,
    steps: Vec<Step>,
}

impl fmt::Debug for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {}: {} bytes, {:?}", self.seed, self.size, self.layout)?;
        if let Some(parent) = &self.parent {
            writeln!(f, "  a clone of {} bytes, {:?}:", parent.size, parent.layout)?;
            parent.steps.iter().try_for_each(|step| writeln!(f, "    {step:?}"))?;
        }
        self.steps.iter().try_for_each(|step| writeln!(f, "  {step:?}"))
    }
}

/// What the features of an image may be.
const WITH_MAPS: [&[&str]; 2] = [
    &["layering", "exclusive-lock", "object-map", "fast-diff", "deep-flatten"],
    &["layering", "exclusive-lock", "object-map", "fast-diff"],
];
const WITHOUT_MAPS: [&[&str]; 2] = [&["layering", "exclusive-lock", "deep-flatten"], &["layering"]];

impl Plan {
    fn draw(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let (layout, object) = draw_layout(&mut random);
        let size = draw_size(&mut random);
        let parent = random.one_in(2).then(|| {
            let (layout, object) = draw_layout(&mut random);
            let mut steps: Vec<_> =
                (0..4 + random.below(8)).map(|_| draw_content(&mut random, object)).collect();
            if random.one_in(2) {
                // Data wherever the clone may uncover it.
                let seed = random.next();
                steps.insert(0, Step::Write { offset: 0, length: SIZE * 2, seed });
            }
            // Larger and smaller than the clone may become.
            ParentPlan { size: draw_size(&mut random), layout, steps }
        });
        let size = parent.as_ref().map_or(size, |parent| parent.size);
        let count = 12 + random.below(20);
        let mut steps = vec![];
        for _ in 0..count {
            draw_steps(&mut random, object, size, parent.is_some(), &mut steps);
        }
        steps.push(Step::Snapshot);
        Self { seed, size, layout, parent, steps }
    }
}

fn draw_layout(random: &mut Random) -> (Layout, u64) {
    // 4 KiB, less than a grain, makes many objects and slow rounds.
    let order = random.pick(&[12, 14, 14, 16, 16, 16, 18, 18]);
    let features = if random.below(3) < 2 { random.pick(&WITH_MAPS) } else { random.pick(&WITHOUT_MAPS) };
    let layout = Layout::new(order, features);
    let object = 1 << order;
    let layout = if random.one_in(4) {
        layout.striped(object / random.pick(&[1, 2, 4]), 2 + random.below(4))
    } else {
        layout
    };
    (layout, object)
}

fn draw_size(random: &mut Random) -> u64 {
    match random.below(4) {
        0 => SIZE,
        1 => SIZE / 2 + random.below(SIZE),
        2 => (SIZE / 4 + random.below(SIZE)) / 4096 * 4096,
        _ => SIZE + random.below(3),
    }
}

/// A range that is one or more whole objects, the tail or the head of one, or anything.
fn draw_range(random: &mut Random, object: u64) -> (u64, u64) {
    let start = random.below(SIZE * 5 / 4) / object * object;
    let inside = random.below(object);
    match random.below(6) {
        0 => (start, object),
        1 => (start, object * (1 + random.below(6))),
        2 => (start + inside, object - inside),
        3 => (start, inside + 1),
        4 => (start + inside / 512 * 512, 512 << random.below(6)),
        _ => (start + inside, 1 + random.below(object * 3)),
    }
}

fn draw_content(random: &mut Random, object: u64) -> Step {
    let (offset, length) = draw_range(random, object);
    match random.below(8) {
        0..4 => Step::Write { offset, length, seed: random.next() },
        4..7 => Step::Discard { offset, length },
        _ => Step::WriteZeroes { offset, length },
    }
}

fn draw_steps(random: &mut Random, object: u64, size: u64, clone: bool, steps: &mut Vec<Step>) {
    match random.below(24) {
        0..11 => steps.push(draw_content(random, object)),
        11..16 => steps.push(Step::Snapshot),
        16..18 => steps.push(Step::Rollback(random.below(4))),
        18 => steps.push(Step::RemoveSnapshot(random.below(4))),
        19 => steps.push(Step::Resize(draw_size(random))),
        20 => steps.push(Step::Resize(random.below(size + 1))),
        21 | 22 => {
            // Shrunk and grown again, with and without something between.
            steps.push(Step::Resize(random.below(size + 1)));
            if random.one_in(3) {
                steps.push(Step::Snapshot);
            }
            if random.one_in(3) {
                steps.push(draw_content(random, object));
            }
            steps.push(Step::Resize(size));
        }
        _ if clone => steps.push(Step::Flatten),
        _ => steps.push(draw_content(random, object)),
    }
}

/// An image whose history is played.
struct Player<'a> {
    driver: &'a Driver,
    spec: Spec,
    size: u64,
    /// Names and sizes, the oldest first.
    snapshots: Vec<(String, u64)>,
    taken: u32,
}

impl<'a> Player<'a> {
    fn new(driver: &'a Driver, spec: Spec, size: u64) -> Self {
        Self { driver, spec, size, snapshots: Vec::new(), taken: 0 }
    }

    fn play(&mut self, steps: &[Step]) -> Result<(), DriverError> {
        steps.iter().try_for_each(|step| self.step(step))
    }

    fn step(&mut self, step: &Step) -> Result<(), DriverError> {
        let (driver, spec, size) = (self.driver, &self.spec, self.size);
        let cut = |offset: u64, length: u64| (offset < size).then(|| (offset, length.min(size - offset)));
        let back = |back: u64| self.snapshots.len().checked_sub(1 + back as usize);
        match *step {
            Step::Write { offset, length, seed } => cut(offset, length)
                .map_or(Ok(()), |(offset, length)| driver.write(spec, offset, length, seed)),
            Step::Discard { offset, length } => {
                cut(offset, length).map_or(Ok(()), |(offset, length)| driver.discard(spec, offset, length))
            }
            Step::WriteZeroes { offset, length } => cut(offset, length)
                .map_or(Ok(()), |(offset, length)| driver.write_zeroes(spec, offset, length)),
            Step::Resize(size) => {
                driver.resize(spec, size)?;
                self.size = size;
                Ok(())
            }
            Step::Snapshot => {
                let name = format!("s{}", self.taken);
                driver.snap_create(spec, &name)?;
                self.taken += 1;
                self.snapshots.push((name, size));
                Ok(())
            }
            Step::RemoveSnapshot(which) => {
                let Some(index) = back(which) else { return Ok(()) };
                driver.snap_remove(spec, &self.snapshots.remove(index).0)
            }
            Step::Rollback(which) => {
                let Some(index) = back(which) else { return Ok(()) };
                let (name, size) = self.snapshots[index].clone();
                driver.rollback(spec, &name)?;
                self.size = size;
                Ok(())
            }
            // 22 (EINVAL): it has been flattened before, or was shrunk to nothing.
            Step::Flatten => match driver.flatten(spec) {
                Err(error) if error.errno() == Some(22) => Ok(()),
                result => result,
            },
        }
    }
}

/// How many diffs of each kind were compared, and what fast-diff got wrong.
#[derive(Clone, Debug, Default)]
struct Tally {
    full: u64,
    /// Incremental with object maps, and in how many of them fast-diff was wrong.
    mapped: u64,
    fast_wrong: u64,
    /// Incremental without object maps.
    scanned: u64,
}

/// Why a round failed.
#[derive(Debug)]
enum Failure {
    /// The second client failed, so there is nothing to compare.
    Driver(DriverError),
    /// A mode that must never be wrong was.
    Wrong { mode: DiffMode, base: Option<String>, snapshot: String, wrong: Wrong },
}

impl From<DriverError> for Failure {
    fn from(error: DriverError) -> Self {
        Self::Driver(error)
    }
}

/// Plays a plan, compares the diffs of some pairs of its snapshots, and removes the images.
fn round(cluster: &TestCluster, driver: &Driver, plan: &Plan) -> Result<Tally, Failure> {
    let spec = unique_image("random");
    let parent = plan.parent.as_ref().map(|plan| (unique_image("random-parent"), plan));
    if let Some((parent, plan)) = &parent {
        driver.create(parent, plan.size, &plan.layout)?;
        Player::new(driver, parent.clone(), plan.size).play(&plan.steps)?;
        driver.snap_create(parent, "base")?;
    }
    match &parent {
        Some((parent, _)) => driver.clone(parent, "base", &spec, &plan.layout)?,
        None => driver.create(&spec, plan.size, &plan.layout)?,
    }
    let mut player = Player::new(driver, spec.clone(), plan.size);
    player.play(&plan.steps)?;
    let compared = compare_pairs(&open_pool(cluster, &spec), &player, plan.seed);
    driver.purge(&spec)?;
    if let Some((parent, _)) = &parent {
        driver.purge(parent)?;
    }
    compared
}

fn compare_pairs(pool: &Pool, player: &Player<'_>, seed: u64) -> Result<Tally, Failure> {
    let mut random = Random::new(!seed);
    let mut contents = BTreeMap::new();
    let mut tally = Tally::default();
    // What a first backup sees, the next one, and any other two.
    let last = player.snapshots.len() - 1;
    let mut pairs = vec![(None, last)];
    if last > 0 {
        pairs.push((Some(random.below(last as u64) as usize), last));
        let second = 1 + random.below(last as u64) as usize;
        pairs.push((Some(random.below(second as u64) as usize), second));
    }
    for (base, snapshot) in pairs {
        for index in base.into_iter().chain([snapshot]) {
            if let std::collections::btree_map::Entry::Vacant(place) = contents.entry(index) {
                place.insert(player.driver.read(&player.spec, Some(&player.snapshots[index].0))?);
            }
        }
        let pair = Pair {
            pool,
            spec: &player.spec,
            base: base.map(|base| &*player.snapshots[base].0),
            snapshot: &player.snapshots[snapshot].0,
        };
        let old = base.map_or(&[][..], |base| &contents[&base]);
        compare_modes(&pair, old, &contents[&snapshot], &mut random, &mut tally)?;
    }
    Ok(tally)
}

fn compare_modes(
    pair: &Pair<'_>,
    old: &[u8],
    new: &[u8],
    random: &mut Random,
    tally: &mut Tally,
) -> Result<(), Failure> {
    let mut must_be_right = |mode| {
        let source = pair.open(mode);
        let found = compare(&source, old, new);
        if let Some(wrong) = found.wrong {
            let (base, snapshot) = (pair.base.map(str::to_owned), pair.snapshot.to_owned());
            return Err(Failure::Wrong { mode, base, snapshot, wrong });
        }
        check_reads(&source, &found.extents, new, random);
        Ok(source.mode())
    };
    let mode = must_be_right(DiffMode::Exact)?;
    if mode == DiffMode::Exact {
        must_be_right(DiffMode::Scan)?;
    }
    match (pair.base, mode) {
        (None, _) => tally.full += 1,
        (Some(_), DiffMode::Exact) => {
            let source = pair.open(DiffMode::Fast);
            assert_eq!(source.mode(), DiffMode::Fast);
            tally.mapped += 1;
            tally.fast_wrong += u64::from(compare(&source, old, new).wrong.is_some());
        }
        (Some(_), _) => tally.scanned += 1,
    }
    Ok(())
}

/// Leaves out steps for as long as the round still fails, so that a person can see why.
fn shrink(cluster: &TestCluster, mut plan: Plan) -> Plan {
    let give_up = Instant::now() + Duration::from_secs(90);
    let driver = cluster.driver();
    let mut index = 0;
    while index < plan.steps.len() && Instant::now() < give_up {
        let mut shorter = plan.clone();
        shorter.steps.remove(index);
        // compare_pairs needs a snapshot to look at.
        let has_snapshot = matches!(shorter.steps.last(), Some(Step::Snapshot));
        if has_snapshot && matches!(round(cluster, &driver, &shorter), Err(Failure::Wrong { .. })) {
            plan = shorter;
        } else {
            index += 1;
        }
    }
    plan
}

/// What all workers share.
struct Shared<'a> {
    cluster: &'a TestCluster,
    first_seed: u64,
    rounds: u64,
    next: AtomicU64,
    tally: Mutex<Tally>,
    breakdowns: Mutex<Vec<String>>,
    wrong: Mutex<Option<(Plan, String)>>,
}

impl Shared<'_> {
    fn work(&self) {
        let mut driver = self.cluster.driver();
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number >= self.rounds || self.wrong.lock().unwrap().is_some() {
                return;
            }
            let plan = Plan::draw(self.first_seed.wrapping_add(number));
            match round(self.cluster, &driver, &plan) {
                Ok(tally) => {
                    let mut all = self.tally.lock().unwrap();
                    all.full += tally.full;
                    all.mapped += tally.mapped;
                    all.fast_wrong += tally.fast_wrong;
                    all.scanned += tally.scanned;
                }
                Err(Failure::Driver(error)) if error.is_breakdown() => {
                    self.breakdowns.lock().unwrap().push(format!("seed {}: {error}", plan.seed));
                    driver = self.cluster.driver();
                }
                Err(Failure::Driver(error)) => panic!("{error}\n{plan:?}"),
                Err(Failure::Wrong { mode, base, snapshot, wrong }) => {
                    let text = format!("{mode:?} from {base:?} to {snapshot:?}: {wrong}");
                    self.wrong.lock().unwrap().get_or_insert((plan, text));
                }
            }
        }
    }
}

#[test]
fn random_histories() {
    let cluster = cluster_or_skip!("random_histories");
    let setting = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let given = setting("RBD2QCOW2_SEED").map(|seed| seed.parse().expect("RBD2QCOW2_SEED is a number"));
    let now = || std::time::UNIX_EPOCH.elapsed().map_or(0, |now| now.as_micros() as u64);
    let rounds = match (given, setting("RBD2QCOW2_LONG").as_deref()) {
        (Some(_), _) => 1,
        (None, None | Some("0")) => ROUNDS,
        (None, Some(_)) => LONG_ROUNDS,
    };
    let shared = Shared {
        cluster: &cluster,
        first_seed: given.unwrap_or_else(now),
        rounds,
        next: AtomicU64::new(0),
        tally: Mutex::default(),
        breakdowns: Mutex::default(),
        wrong: Mutex::default(),
    };
    say(&format!("random_histories: {rounds} rounds from seed {} on", shared.first_seed));
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| shared.work());
        }
    });
    if let Some((plan, text)) = shared.wrong.into_inner().unwrap() {
        let seed = plan.seed;
        say(&format!("RBD2QCOW2_SEED={seed} is wrong, shrinking it: {text}\n{plan:?}"));
        panic!("RBD2QCOW2_SEED={seed}: {text}; at the least:\n{:?}", shrink(&cluster, plan));
    }
    let tally = shared.tally.into_inner().unwrap();
    let breakdowns = shared.breakdowns.into_inner().unwrap();
    say(&format!(
        "random_histories: {rounds} rounds, {} full, {} incremental diffs with object maps and {} without: \
         exact and scan were right in all. fast was wrong in {} of {}. The second client broke down {} times{}",
        tally.full,
        tally.mapped,
        tally.scanned,
        tally.fast_wrong,
        tally.mapped,
        breakdowns.len(),
        breakdowns.iter().map(|breakdown| format!("\n  {breakdown}")).collect::<String>(),
    ));
    assert!(breakdowns.len() as u64 <= rounds / BREAKDOWNS, "the second client broke down too often");
    assert!(given.is_some() || tally.mapped > rounds / 2, "too few diffs were compared: {tally:?}");
}

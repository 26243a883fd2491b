//! `prune` of a chain whose large root goes, killed at any moment: what stays reads the same at once, in every
//! state in between, and when the next run has done the rest.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::cluster::say;
use crate::killed::{Random, count};
use crate::large::{Chain, FORMS, POINTS, Reached, Reader, compare};
use crate::rig::{Running, names_in};

/// What is asked for, and what goes.
#[derive(Clone, Copy, Debug)]
pub struct Scene {
    /// A point that is held before.
    hold: Option<usize>,
    /// `prune` and its arguments.
    pub words: &'static [&'static str],
    last: usize,
}

pub const SCENES: [Scene; 3] = [
    Scene { hold: None, words: &["prune", "--keep-last", "5"], last: 5 },
    Scene { hold: None, words: &["prune", "--keep-last", "3"], last: 3 },
    // Two gaps: the first two go, and one in the middle.
    Scene { hold: Some(2), words: &["prune", "--keep-last", "2"], last: 2 },
];

impl Scene {
    pub fn chain(&self, form: usize) -> Chain {
        let chain = Chain::new(form);
        self.hold(&chain);
        chain
    }

    pub fn hold(&self, chain: &Chain) {
        if let Some(held) = self.hold {
            let point = format!("vm@{}", chain.names()[held]);
            let told = chain.run(&["hold", &point, "--reason", "a test"]);
            assert_eq!(told.status, Some(0), "{told:?}");
        }
    }

    /// What stays of all points that there have ever been.
    pub fn stay(&self, chain: &Chain) -> Vec<String> {
        let names = chain.names();
        let first = names.len() - self.last;
        let stays = |number: &usize| *number >= first || self.hold == Some(*number);
        (0..names.len()).filter(stays).map(|number| names[number].clone()).collect()
    }

    /// Prunes, which must succeed.
    pub fn prune(&self, chain: &Chain) {
        let told = chain.run(self.words);
        assert_eq!(told.status, Some(0), "{told:?}");
    }
}

/// When a run is killed.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// Anywhere.
    Any,
    /// Once the layer that is reused has its second name.
    Base,
    /// Once the oldest point is gone.
    Gone,
}

impl Moment {
    /// Waits for it, and perhaps for somewhat longer.
    fn wait(self, chain: &Chain, running: &mut Running, whole: Duration, random: &mut Random) {
        let limit = match self {
            Self::Any => whole,
            Self::Base | Self::Gone => whole / 4,
        };
        let has_come = || match self {
            Self::Any => true,
            Self::Base => names_in(&chain.directory()).iter().any(|name| name.ends_with(".qcow2.base")),
            Self::Gone => !chain.layer(&chain.names()[0]).exists(),
        };
        // Without a pause: some of it is over in a moment.
        while !has_come() && !running.has_ended() {}
        std::thread::sleep(random.time_below(limit));
    }
}

/// How long a prune takes that is left alone; all is right after it, and the root was reused.
fn undisturbed(scene: Scene, form: usize) -> Duration {
    let chain = scene.chain(form);
    let root = chain.inode(&chain.names()[0]);
    let start = Instant::now();
    scene.prune(&chain);
    let time = start.elapsed();
    let stay = scene.stay(&chain);
    chain.assert_only(&stay);
    assert_eq!(chain.inode(&stay[0]), root, "the root was copied: {scene:?}");
    time
}

#[test]
fn at_random_moments() {
    const TEST: &str = "prune_killed::at_random_moments";
    let mut random = Random::of_this_run(TEST);
    let mut reached = BTreeMap::new();
    let (mut killed, mut reused) = (0, 0);
    let mut times = BTreeMap::new();
    let moments = [Moment::Any, Moment::Base, Moment::Gone, Moment::Base];
    let with_base = |reached: &BTreeMap<Reached, i32>| {
        let states = [Reached::BaseNamed, Reached::OntoBase, Reached::Waiting];
        states.iter().any(|state| reached.contains_key(state))
    };
    let mut rounds = 0;
    // Some more, where all kills have come too early or too late for what they are for.
    for round in 0..5 * count(6) {
        if round >= count(6) && with_base(&reached) {
            break;
        }
        rounds += 1;
        // All forms with all scenes, and with all moments, in the end.
        let (form, scene) = (round % FORMS.len(), SCENES[round / FORMS.len() % SCENES.len()]);
        let moment = moments[round % 7 % moments.len()];
        let whole = *times.entry(form).or_insert_with(|| undisturbed(SCENES[2 - form], form));
        let mut chain = scene.chain(form);
        let root = chain.inode(&chain.names()[0]);
        // Now and then the run that puts things in order is killed, too.
        for _ in 0..1 + random.below(2) {
            let mut running = Running::start(chain.command(scene.words));
            moment.wait(&chain, &mut running, whole, &mut random);
            killed += usize::from(running.kill());
            *reached.entry(chain.reached()).or_insert(0) += 1;
            chain.assert_points(&scene.stay(&chain));
            chain.assert_verified();
        }
        if random.below(3) == 0 {
            chain.back_up(&mut random);
            chain.assert_points(&scene.stay(&chain));
            chain.assert_verified();
        }
        scene.prune(&chain);
        let stay = scene.stay(&chain);
        chain.assert_only(&stay);
        reused += usize::from(chain.inode(&stay[0]) == root);
        // Nothing is left to do.
        scene.prune(&chain);
        assert_eq!(chain.points(), stay);
    }
    say(&format!("{TEST}: {killed} killed, {reused} of {rounds} roots reused; they had reached {reached:?}"));
    assert!(killed > 0, "no run was still alive when it was to be killed");
    assert!(with_base(&reached), "no run has left a base");
    assert!(reused * 2 > rounds, "roots are copied");
}

/// Kills a prune when the oldest point is gone, or a moment later.
pub fn at_gone(chain: &Chain, mut running: Running, random: &mut Random) {
    Moment::Gone.wait(chain, &mut running, Duration::from_millis(2), random);
    running.kill();
}

/// A chain whose prune was killed when the root had to wait for its child's place.
pub fn half_done(scene: Scene, form: usize, random: &mut Random) -> Chain {
    for _ in 0..50 {
        let chain = scene.chain(form);
        at_gone(&chain, Running::start(chain.command(scene.words)), random);
        if chain.reached() == Reached::Waiting {
            return chain;
        }
    }
    panic!("no run was ever killed while a root waited for its child's place");
}

/// Everything works on what a killed prune has left.
#[test]
fn what_is_half_done_is_as_good_as_any() {
    let mut random = Random::of_this_run("prune_killed::what_is_half_done_is_as_good_as_any");
    for (form, scene) in SCENES.into_iter().enumerate().take(FORMS.len()) {
        let mut chain = half_done(scene, form, &mut random);
        let stay = scene.stay(&chain);
        let oldest = format!("vm@{}", stay[0]);
        assert!(chain.hidden().iter().any(|name| name.ends_with(".qcow2.base")), "{:?}", chain.hidden());
        assert_eq!(chain.points(), stay);
        chain.assert_points(&stay);
        chain.assert_verified();

        let told = chain.run(&["list"]);
        assert!(told.status == Some(0) && told.stderr.contains("is whole, but a run"), "{told:?}");
        assert!(!told.stdout.contains(&chain.names()[0]), "{told:?}");
        stay.iter().for_each(|name| assert!(told.stdout.contains(name), "{told:?}"));
        let out = tempfile::TempDir::new().unwrap();
        let raw = out.path().join("raw");
        for name in [&stay[0], stay.last().unwrap()] {
            let point = format!("vm@{name}");
            let told = chain.run(&["restore", &point, "--to-file", raw.to_str().unwrap()]);
            assert_eq!(told.status, Some(0), "{told:?}");
            assert!(compare(raw.to_str().unwrap(), &chain.truth(name)), "{name}");
            std::fs::remove_file(&raw).unwrap();
        }
        serve_and_compare(&chain, &oldest, &stay[0], out.path());
        assert!(Reader::open(&chain.layer(&stay[0])).is_some());
        assert_eq!(chain.reached(), Reached::Waiting);

        // Backups go on, whether the next prune comes or not; and none of it hurts the base.
        chain.back_up(&mut random);
        chain.back_up(&mut random);
        assert_eq!(chain.reached(), Reached::Waiting);
        chain.assert_points(&stay);
        chain.assert_verified();
        assert_eq!(chain.points().len(), stay.len() + 2);
        scene.prune(&chain);
        chain.assert_only(&scene.stay(&chain));
        assert_eq!(chain.names().len(), POINTS + 2);
    }
}

/// What the program serves of a point, stock QEMU reads as it should.
fn serve_and_compare(chain: &Chain, point: &str, name: &str, out: &Path) {
    let mut serve = chain.command(&["serve", point]);
    serve.env("XDG_RUNTIME_DIR", out).env("TMPDIR", out);
    let mut running = Running::start(serve);
    let uri = running.wait_for_line();
    assert!(compare(uri.trim(), &chain.truth(name)), "{name} as it is served");
    running.signal(rustix::process::Signal::INT);
    running.wait();
}

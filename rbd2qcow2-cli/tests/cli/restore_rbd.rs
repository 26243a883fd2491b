//! Restores to RBD images that are killed, interrupted or left alone by the cluster: the image is
//! marked, nobody takes it for a good one, and the same command finishes it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::cluster::{OwnCluster, TestCluster, say, unique_image};
use crate::cluster_or_skip;
use crate::driver::{FULL_FEATURES, Layout, Spec};
use crate::faults::fails;
use crate::killed::{Random, count};
use crate::program::{self, Run};
use crate::rig::{MIB, Rig, Running, STOP_LIMIT, point_of, wait_for, with};

/// The key of an image that is not whole.
const MARK: &str = "rbd2qcow2-incomplete";

/// Size of the images in MiB. Every other one holds data: enough to be met in the middle.
const SIZE: u64 = 96;

/// Takes as long as it can.
const SLOW: &[&str] = &["--parallel", "1"];

/// No kill at random after this, but some.
const LIMIT: Duration = Duration::from_secs(30);
const LEAST_ROUNDS: usize = 6;

/// Small objects, with a map of them: what is written takes many requests.
fn layout() -> Layout {
    Layout::new(16, FULL_FEATURES)
}

/// An image with two points, the second of which is restored.
struct Scene {
    rig: Rig,
    image: Spec,
    /// What the points hold.
    truths: [PathBuf; 2],
    /// `IMAGE@POINT` of each.
    points: [String; 2],
}

impl Scene {
    fn new(cluster: &TestCluster) -> Self {
        let (rig, image) = (Rig::new(cluster), unique_image("origin"));
        rig.driver.create(&image, SIZE * MIB, &layout()).expect("created");
        for offset in (0..SIZE).step_by(2) {
            rig.driver.write(&image, offset * MIB, MIB, offset).expect("written");
        }
        rig.driver.metadata_set(&image, "owner", "me").expect("set");
        rig.driver.close(&image).expect("closed");
        let truths = [0, 1].map(|number| {
            let truth = rig.truth(&image, number);
            rig.back_up(&image, &[]);
            rig.change(&image, 5 * MIB + 1, 20 * MIB, 1000);
            truth
        });
        let layers = rig.layers(&image);
        let points = [0, 1].map(|number: usize| format!("{}@{}", image.image, point_of(&layers[number])));
        Self { rig, image, truths, points }
    }

    fn restore(&self, point: usize, target: &Spec, arguments: &[&str]) -> Command {
        let mut command = program::command();
        command.arg("-c").arg(&self.rig.conf).arg("restore").arg(self.rig.dest());
        command.arg(&self.points[point]).arg("--to-rbd").arg(format!("{}/{}", target.pool, target.image));
        command.args(arguments);
        command
    }

    /// An image that holds something else.
    fn other(&self) -> Spec {
        let spec = unique_image("other");
        self.rig.driver.create(&spec, SIZE * MIB, &layout()).expect("created");
        self.rig.driver.write(&spec, MIB / 2, SIZE * MIB / 2, 77).expect("written");
        self.rig.driver.metadata_set(&spec, "owner", "you").expect("set");
        self.rig.driver.close(&spec).expect("closed");
        spec
    }

    fn is_listed(&self, target: &Spec) -> bool {
        self.rig.driver.images(&target.pool, &target.namespace).expect("listed").contains(&target.image)
    }

    /// Whether there is an image, too: its name comes first.
    fn is_there(&self, target: &Spec) -> bool {
        self.rig.driver.info(target, None).is_ok()
    }

    fn mark(&self, target: &Spec) -> Option<String> {
        self.rig.driver.metadata_get(target, MARK).expect("asked")
    }

    fn holds(&self, target: &Spec, truth: &Path) -> bool {
        let found = self.rig.truth(target, 99);
        let same = std::fs::read(&found).expect("read") == std::fs::read(truth).expect("read");
        std::fs::remove_file(found).expect("removed");
        same
    }

    /// Whether the image is the second point, with `owner` in its metadata and nothing else, and nobody
    /// has it open.
    fn assert_whole(&self, target: &Spec, owner: &str) {
        let metadata = self.rig.driver.metadata(target).expect("listed");
        assert_eq!(metadata, BTreeMap::from([("owner".to_owned(), owner.to_owned())]));
        assert!(self.holds(target, &self.truths[1]), "{target:?} differs");
        assert_eq!(self.rig.driver.watchers(target).expect("listed"), [""; 0]);
    }

    /// A restore that has marked its image, made it as large as it is going to be, and is stopped there
    /// until it gets a [`Signal::CONT`].
    fn start_copy(&self, target: &Spec, arguments: &[&str]) -> Running {
        let mut running = Running::start(self.restore(1, target, &with(SLOW, arguments)));
        wait_for("mark", || {
            assert!(!running.has_ended(), "it ended before");
            let begun = self.is_there(target)
                && self.mark(target).is_some()
                && self.rig.driver.info(target, None).expect("told").size > 0;
            begun.then_some(())
        });
        running.signal(Signal::STOP);
        assert!(!running.has_ended() && self.mark(target).is_some(), "it was too fast");
        running
    }

    /// Has the cluster forget clients that died: by itself it takes 30 s.
    fn bury(&self, target: &Spec) {
        for client in self.rig.driver.watchers(target).expect("listed") {
            self.rig.driver.blocklist(&client).expect("blocklisted");
        }
        wait_for("end of the watches", || {
            self.rig.driver.watchers(target).expect("listed").is_empty().then_some(())
        });
    }

    /// A marked image is nobody's backup and no other point's place.
    fn assert_shunned(&self, target: &Spec) {
        let unfinished = format!("unfinished restore of {}", self.points[1]);
        fails(self.rig.backup(target, &[]), &[&unfinished, "restore that again to finish it", MARK]);
        assert!(!self.rig.directory(target).exists());
        fails(self.restore(0, target, &[]), &[&target.image, &unfinished, "or say --overwrite"]);
    }

    /// The same command again.
    fn finish(&self, target: &Spec, arguments: &[&str], owner: &str) {
        let run = Running::start(self.restore(1, target, arguments)).wait();
        assert_eq!(run.status, Some(0), "{run:?}");
        self.assert_whole(target, owner);
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        // A test that fails leaves its image to the cluster's end, which may be frozen.
        if !std::thread::panicking() {
            let _ = self.rig.driver.purge(&self.image);
        }
    }
}

#[test]
fn what_is_said_of_a_restore() {
    let cluster = cluster_or_skip!("restore_rbd::what_is_said_of_a_restore");
    let scene = Scene::new(&cluster);
    let target = unique_image("target");
    let run = Running::start(scene.restore(1, &target, &["--json", "-q"])).wait();
    assert_eq!((run.status, &*run.stderr), (Some(0), ""), "{run:?}");
    scene.assert_whole(&target, "me");
    let line: Value = serde_json::from_str(&run.stdout).expect("JSON");
    let number = |line: &Value, key: &str| line[key].as_u64().unwrap_or_else(|| panic!("{key} of {line}"));
    assert_eq!(line["target"], format!("rbd/{}", target.image));
    assert_eq!(number(&line, "bytes_written") + number(&line, "zero_bytes"), SIZE * MIB);

    fails(scene.restore(0, &target, &[]), &[&target.image, "exists; --overwrite"]);
    let run = Running::start(scene.restore(0, &target, &["--overwrite"])).wait();
    let line = format!("{}: restored to rbd/{}, ", scene.points[0], target.image);
    assert!(
        run.status == Some(0) && run.stderr.contains(&line) && run.stderr.contains("as they were"),
        "{run:?}"
    );
    assert!(scene.holds(&target, &scene.truths[0]));
    scene.rig.driver.purge(&target).expect("removed");
}

#[test]
fn killed_at_random_moments() {
    const TEST: &str = "restore_rbd::killed_at_random_moments";
    let cluster = cluster_or_skip!(TEST);
    let mut random = Random::of_this_run(TEST);
    let scene = Scene::new(&cluster);
    let kinds: [(&[&str], &str); 2] = [(&[], "me"), (&["--overwrite"], "you")];
    let target = |overwrite: bool| if overwrite { scene.other() } else { unique_image("target") };
    let times = kinds.map(|(arguments, owner)| {
        let target = target(!arguments.is_empty());
        let (run, time) = Running::start(scene.restore(1, &target, &with(SLOW, arguments))).wait_timed();
        assert_eq!(run.status, Some(0), "{run:?}");
        scene.assert_whole(&target, owner);
        scene.rig.driver.purge(&target).expect("removed");
        time
    });

    let mut reached = BTreeMap::new();
    let start = Instant::now();
    for round in 0..count(14) {
        if round >= LEAST_ROUNDS && start.elapsed() > LIMIT * u32::try_from(count(1)).expect("small") {
            say(&format!("{TEST}: stopped after {round} rounds, for lack of time"));
            break;
        }
        let (arguments, owner) = kinds[round % 2];
        let target = target(!arguments.is_empty());
        let moment = random.time_below(times[round % 2]);
        let running = Running::start(scene.restore(1, &target, &with(SLOW, arguments)));
        std::thread::sleep(moment);
        let killed = running.kill();
        let state = if !scene.is_listed(&target) {
            "nothing"
        } else if !scene.is_there(&target) {
            "half made"
        } else if scene.mark(&target).is_some() {
            "marked"
        } else if scene.rig.driver.info(&target, None).expect("told").size == 0 {
            "created"
        } else if scene.holds(&target, &scene.truths[1]) {
            "whole"
        } else {
            "untouched"
        };
        *reached.entry((state, owner)).or_insert(0) += 1;
        if !matches!(state, "nothing" | "half made") {
            scene.bury(&target);
        }
        match state {
            "half made" => {
                fails(scene.restore(1, &target, arguments), &["not made to the end", "rbd rm"]);
                scene.rig.driver.remove(&target).expect("removed");
            }
            "marked" => scene.assert_shunned(&target),
            "untouched" => assert_eq!(owner, "you", "a new image that is neither marked nor whole"),
            "whole" if owner == "me" => {
                fails(scene.restore(1, &target, arguments), &["exists; --overwrite"]);
                scene.assert_whole(&target, owner);
            }
            _ => assert!(killed || state == "whole", "it ended with {state}"),
        }
        if (state, owner) != ("whole", "me") {
            scene.finish(&target, arguments, owner);
        }
        scene.rig.driver.purge(&target).expect("removed");
    }
    say(&format!("{TEST}: whole runs take {times:?}; those that were killed had reached {reached:?}"));
    assert!(reached.keys().any(|(state, _)| *state == "marked"), "no run was killed in its middle");
}

/// Nobody tells the cluster that the client is dead: the next run waits until the cluster knows.
#[test]
fn a_dead_client_is_waited_for() {
    const TEST: &str = "restore_rbd::a_dead_client_is_waited_for";
    if std::env::var("RBD2QCOW2_LONG").as_deref() != Ok("1") {
        say(&format!("SKIPPED {TEST}: it takes 30 s, RBD2QCOW2_LONG is not set"));
        return;
    }
    let cluster = cluster_or_skip!(TEST);
    let scene = Scene::new(&cluster);
    for (target, arguments, owner) in
        [(unique_image("target"), &[][..], "me"), (scene.other(), &["--overwrite"], "you")]
    {
        assert!(scene.start_copy(&target, arguments).kill());
        let start = Instant::now();
        scene.finish(&target, arguments, owner);
        say(&format!("{TEST}: {:?}", start.elapsed()));
        scene.rig.driver.purge(&target).expect("removed");
    }
}

/// It ended soon, and said that the image is not whole.
fn ends_incomplete(what: &str, running: Running, status: i32, target: &Spec) -> Run {
    let (run, time) = running.wait_timed();
    say(&format!("{what}: ended after {time:?}"));
    assert_eq!((run.status, &*run.stdout), (Some(status), ""), "{what}: {run:?}");
    assert!(time < STOP_LIMIT, "{what}: {time:?}");
    for word in [&target.image, "incomplete", "the same command again finishes it"] {
        assert!(run.stderr.contains(word), "{what}, without {word:?}: {}", run.stderr);
    }
    run
}

#[test]
fn interrupted() {
    let cluster = cluster_or_skip!("restore_rbd::interrupted");
    let scene = Scene::new(&cluster);
    for (target, arguments, owner, signal) in [
        (unique_image("target"), &[][..], "me", Signal::INT),
        (scene.other(), &["--overwrite"], "you", Signal::TERM),
    ] {
        let running = scene.start_copy(&target, arguments);
        running.signal(signal);
        running.signal(Signal::CONT);
        ends_incomplete("a signal", running, 130, &target);
        scene.assert_shunned(&target);
        // It left nobody behind who would have to be waited for.
        assert_eq!(scene.rig.driver.watchers(&target).expect("listed"), [""; 0]);
        scene.finish(&target, arguments, owner);
        scene.rig.driver.purge(&target).expect("removed");
    }
}

/// One test, because each cluster takes seconds to start.
#[test]
fn a_cluster_that_leaves() {
    let _cluster = cluster_or_skip!("restore_rbd::a_cluster_that_leaves");
    let own = OwnCluster::start_with_mgr();
    let scene = Scene::new(&own.cluster);
    an_osd_that_is_frozen(&own, &scene);
    a_quota_that_is_used_up(&scene);
}

fn an_osd_that_is_frozen(own: &OwnCluster, scene: &Scene) {
    for (target, arguments, owner) in
        [(unique_image("target"), &[][..], "me"), (scene.other(), &["--overwrite"], "you")]
    {
        let running = scene.start_copy(&target, &with(arguments, &["--timeout", "2"]));
        own.pause_osd();
        running.signal(Signal::CONT);
        let run = ends_incomplete("an OSD that is frozen", running, 1, &target);
        assert!(run.stderr.contains("gave no answer for 2 s"), "{}", run.stderr);
        own.resume_osd();
        scene.bury(&target);
        scene.assert_shunned(&target);
        scene.finish(&target, arguments, owner);
        scene.rig.driver.purge(&target).expect("removed");
    }
    let target = unique_image("target");
    let running = scene.start_copy(&target, &[]);
    own.pause_osd();
    running.signal(Signal::CONT);
    running.signal(Signal::INT);
    ends_incomplete("SIGINT while an OSD is frozen", running, 130, &target);
    own.resume_osd();
    scene.bury(&target);
    scene.finish(&target, &[], "me");
    scene.rig.driver.purge(&target).expect("removed");
}

fn a_quota_that_is_used_up(scene: &Scene) {
    let ask = |command: Value| scene.rig.driver.mon_command(&command).expect("done");
    for (who, name) in [("mgr", "mgr_stats_period"), ("mon", "mon_tick_interval")] {
        ask(json!({"prefix": "config set", "who": who, "name": name, "value": "1"}));
    }
    let quota = |bytes: u64, full: bool| {
        let val = bytes.to_string();
        ask(json!({"prefix": "osd pool set-quota", "pool": "rbd", "field": "max_bytes", "val": val}));
        wait_for("word of the quota", || {
            let dump = ask(json!({"prefix": "osd dump"}));
            let mut pools = dump["pools"].as_array().expect("pools").iter();
            let pool = pools.find(|pool| pool["pool_name"] == "rbd").expect("the pool");
            let is_full = pool["flags_names"].as_str().expect("flags").contains("full_quota");
            (is_full == full).then_some(())
        });
    };
    // Before the restore begins.
    let target = unique_image("target");
    let other = scene.other();
    quota(MIB, true);
    fails(
        scene.restore(1, &target, &[]),
        &["cannot restore to image", "create image", &target.image, "the quota is used up"],
    );
    assert!(!scene.is_listed(&target));
    let running = Running::start(scene.restore(1, &other, &["--overwrite"]));
    let run = ends_incomplete("a quota that was used up before", running, 1, &other);
    assert!(run.stderr.contains("the quota is used up"), "{}", run.stderr);
    quota(0, false);
    scene.finish(&other, &["--overwrite"], "you");
    // And in its middle.
    scene.rig.driver.purge(&other).expect("removed");
    for (target, arguments, owner) in [(target, &[][..], "me"), (scene.other(), &["--overwrite"], "you")] {
        let running = scene.start_copy(&target, arguments);
        quota(MIB, true);
        running.signal(Signal::CONT);
        let run = ends_incomplete("a quota that is used up", running, 1, &target);
        assert!(run.stderr.contains("the quota is used up"), "{}", run.stderr);
        quota(0, false);
        scene.finish(&target, arguments, owner);
        scene.rig.driver.purge(&target).expect("removed");
    }
}

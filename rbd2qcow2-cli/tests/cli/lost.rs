//! Points that have lost their layer: every command says so, and none makes it worse.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::cluster_or_skip;
use crate::directory::Backups;
use crate::faults::Scene;
use crate::program::{Run, run};
use crate::rig::{assert_point, names_in, point_of};

const POINTS: [&str; 3] = ["20261122T173312Z", "20261123T173307Z", "20261124T173307Z"];

/// An image of three points, one of which has lost its layer.
struct Loss {
    backups: Backups,
    lost: PathBuf,
    left: BTreeSet<String>,
}

impl Loss {
    fn of(number: usize) -> Self {
        let backups = Backups::new();
        for time in ["2026-11-22T17:33:12Z", "2026-11-23T17:33:07Z", "2026-11-24T17:33:07Z"] {
            backups.add("vm", "0123abcd", time);
        }
        let lost = backups.image("vm").join(format!("vm@{}.qcow2", POINTS[number]));
        fs::remove_file(&lost).unwrap();
        let left = names_in(&backups.image("vm"));
        Self { backups, lost, left }
    }

    fn run(&self, words: &[&str]) -> Run {
        let mut args: Vec<&str> = words.to_vec();
        args.insert(1, self.dest().to_str().unwrap());
        let run = run(&args);
        assert_eq!(names_in(&self.backups.image("vm")), self.left, "{words:?}: {run:?}");
        run
    }

    fn dest(&self) -> &Path {
        self.backups.path()
    }

    fn words(&self, number: usize) -> String {
        format!("point {} is lost: its layer {} is missing", POINTS[number], self.lost.display())
    }
}

#[test]
fn verify_and_list_tell_of_a_lost_point() {
    for (number, needed_by) in [(2, ""), (1, "; point 20261124T173307Z needs it"), (0, "; points 2026112")] {
        let loss = Loss::of(number);
        let told = loss.run(&["verify"]);
        assert_eq!(told.status, Some(1), "{told:?}");
        let line = format!("vm@{}: damaged, ", POINTS[number]);
        assert!(told.stdout.contains(&line), "{told:?}");
        assert!(told.stdout.contains(&format!("{}{needed_by}", loss.words(number))), "{told:?}");
        assert_eq!(told.stdout.matches(": ok, ").count(), number, "{told:?}");
        let told = loss.run(&["verify", "--json", "--sample", "5"]);
        let lines = told.stdout.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let status: Vec<_> = lines.map(|line| line["status"].as_str().unwrap().to_owned()).collect();
        let expected: Vec<_> = (0..3).map(|point| if point < number { "ok" } else { "damaged" }).collect();
        assert_eq!((told.status, status), (Some(1), expected.iter().map(ToString::to_string).collect()));
        let told = loss.run(&["verify", &format!("vm@{}", POINTS[number])]);
        assert_eq!((told.status, told.stdout.lines().count()), (Some(1), 2), "{told:?}");
        let listed = loss.run(&["list"]);
        assert!(listed.stderr.contains(&format!("warning: {}", loss.words(number))), "{listed:?}");
        assert!(!listed.stderr.contains("did not end"), "{listed:?}");
    }
}

#[test]
fn nobody_gets_an_older_point_without_a_word() {
    let loss = Loss::of(2);
    let target = loss.dest().join("vm.raw");
    let target = target.to_str().unwrap();
    let named = format!("vm@{}", POINTS[2]);
    let socket = loss.dest().join("s");
    let commands: [&[&str]; 4] = [
        &["restore", "vm", "--to-file", target],
        &["restore", &named, "--to-file", target],
        &["serve", "vm", "--socket", socket.to_str().unwrap()],
        &["serve", &named, "--socket", socket.to_str().unwrap()],
    ];
    for command in commands {
        let told = loss.run(command);
        assert_eq!(told.status, Some(1), "{told:?}");
        let words = format!("point {} of image \"vm\" is broken; not affected: {}", POINTS[2], POINTS[1]);
        assert!(told.stderr.contains(&words) && told.stderr.contains(&loss.words(2)), "{told:?}");
    }
    let older = loss.run(&["restore", &format!("vm@{}", POINTS[1]), "--to-file", target]);
    assert_eq!(older.status, Some(0), "{older:?}");
    for command in [&["hold", &named, "--reason", "x"][..], &["release", &named]] {
        let told = loss.run(command);
        assert_eq!(told.status, Some(1), "{told:?}");
        assert!(told.stderr.contains(&loss.words(2)), "{told:?}");
    }
    let held = loss.run(&["hold", &format!("vm@{}", POINTS[0]), "--reason", "x"]);
    assert_eq!(held.status, Some(0), "{held:?}");
}

#[test]
fn a_lost_point_is_not_pruned_away() {
    for (number, point) in POINTS.iter().enumerate() {
        let loss = Loss::of(number);
        let named = format!("vm@{point}");
        for rest in
            [&["--keep-last", "1"][..], &["--keep-last", "9"], &["--dry-run", "--keep-last", "1"], &[&named]]
        {
            let told = loss.run(&[&["prune"], rest].concat());
            assert_eq!(told.status, Some(1), "{told:?}");
            assert!(told.stderr.contains("nothing of it is pruned"), "{told:?}");
            assert!(told.stderr.contains(point), "{told:?}");
        }
    }
}

#[test]
fn a_backup_says_that_the_newest_point_is_lost() {
    let cluster = cluster_or_skip!("lost::a_backup_says_that_the_newest_point_is_lost");
    for (older_snapshots, kind) in [("1", "full"), ("2", "incremental")] {
        let scene = Scene::new(&cluster, &format!("lost-{kind}"));
        scene.change(1);
        scene.rig.back_up(&scene.image, &["--keep-snapshots", older_snapshots]);
        let layers = scene.rig.layers(&scene.image);
        let (base, lost) = (point_of(&layers[0]), point_of(&layers[1]));
        fs::remove_file(&layers[1]).expect("removed");
        let left = names_in(&scene.rig.directory(&scene.image));
        let truth = scene.change(2);
        let dry = scene.rig.back_up(&scene.image, &["--dry-run"]);
        let made = scene.rig.back_up(&scene.image, &[]);
        for run in [&dry, &made] {
            let words =
                format!("{kind} (point {lost}, the newest, is lost: {} is missing", layers[1].display());
            assert!(run.stderr.contains(&words), "{run:?}");
            assert_eq!(run.stderr.contains(&format!("this builds upon {base}")), kind == "incremental");
        }
        assert_point(scene.rig.layers(&scene.image).last().expect("a point"), &truth);
        assert!(names_in(&scene.rig.directory(&scene.image)).is_superset(&left));
        assert!(scene.rig.snapshots(&scene.image).contains(&lost));
        let next = scene.rig.back_up(&scene.image, &[]);
        assert!(next.stderr.contains(": incremental, "), "{next:?}");
        assert!(next.stderr.contains(&format!("point {lost} is lost")), "{next:?}");
        assert!(scene.rig.snapshots(&scene.image).contains(&lost));
    }
}

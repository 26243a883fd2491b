//! Bad input and faults: a clear error, exit status 1, and nothing lost or left.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::Signal;

use crate::cluster::{POOL, TestCluster, say, unique_image};
use crate::cluster_or_skip;
use crate::driver::{FULL_FEATURES, Spec};
use crate::program;
use crate::rig::{MIB, Rig, Running, STOP_LIMIT, WRITERS, assert_point, names_in, point_of, with};

/// Size of the images in MiB; every other one holds data.
const SIZE: u64 = 16;

/// A rig with one image, which has a point.
pub struct Scene {
    pub rig: Rig,
    pub image: Spec,
}

impl Scene {
    pub fn new(cluster: &TestCluster, name: &str) -> Self {
        let (rig, image) = (Rig::new(cluster), unique_image(name));
        rig.image(&image, SIZE, FULL_FEATURES);
        rig.back_up(&image, &[]);
        Self { rig, image }
    }

    /// Changes the image, so that the next backup has something to copy; gives what it then holds.
    pub fn change(&self, number: usize) -> PathBuf {
        self.rig.change(&self.image, MIB, 6 * MIB, number as u64);
        self.rig.truth(&self.image, number)
    }

    /// A run that must fail and say all of `words`, without a trace of it.
    pub fn fails(&self, command: Command, words: &[&str]) -> program::Run {
        let points = self.rig.layers(&self.image);
        let run = fails(command, words);
        assert_eq!(self.rig.layers(&self.image), points);
        self.rig.assert_tidy(&self.image);
        self.rig.assert_only_the_newest_snapshot(&self.image);
        self.rig.assert_no_process();
        run
    }

    /// The next run succeeds, and its point is right.
    fn recovers(&self, truth: &Path) -> program::Run {
        let run = self.rig.back_up(&self.image, &[]);
        assert_point(self.rig.layers(&self.image).last().expect("a point"), truth);
        self.rig.assert_tidy(&self.image);
        self.rig.assert_only_the_newest_snapshot(&self.image);
        run
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        // A test that fails leaves its image to the cluster's end.
        let _ = self.rig.driver.purge(&self.image);
    }
}

/// A run that must fail and say all of `words`.
pub fn fails(command: Command, words: &[&str]) -> program::Run {
    let run = Running::start(command).wait();
    assert_eq!(run.status, Some(1), "{run:?}");
    for word in words {
        assert!(run.stderr.contains(word), "without {word:?}: {}", run.stderr);
    }
    assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
    run
}

/// A script in the place of a program.
fn script(directory: &Path, name: &str, text: &str) -> String {
    let path = directory.join(name);
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("executable");
    path.to_str().expect("UTF-8").to_owned()
}

#[test]
fn wrong_names_are_told() {
    let cluster = cluster_or_skip!("faults::wrong_names_are_told");
    let scene = Scene::new(&cluster, "names");
    let conf = cluster.conf.to_str().expect("UTF-8");
    let other = tempfile::tempdir().expect("a directory");
    let keyring = other.path().join("keyring");
    fs::write(&keyring, "[client.admin]\n key = AQBz1F5fAAAAABAAzPkA6jL1wYc6Wc5V0xJvkw==\n")
        .expect("written");
    let keyring = keyring.to_str().expect("UTF-8");
    let empty = other.path().join("empty.conf");
    fs::write(&empty, "[global]\n").expect("written");
    let empty = empty.to_str().expect("UTF-8");
    let (here, there) = (scene.rig.dest().to_str().expect("UTF-8"), "/nonexistent/there");
    let image = &*scene.image.image;
    let cases: &[(&[&str], &[&str])] = &[
        (&["-c", there, "backup", POOL, here], &["configuration file", there]),
        (&["-c", conf, "-k", there, "backup", POOL, here], &["keyring", there]),
        (&["-c", conf, "-k", keyring, "backup", POOL, here], &["permission denied", "keyring"]),
        (&["-c", conf, "--id", "nobody", "backup", POOL, here], &["client.nobody", "keyring"]),
        (&["-c", empty, "backup", POOL, here], &["monitor"]),
        (&["-c", conf, "backup", "no-such-pool", here], &["pool \"no-such-pool\"", "does not exist"]),
        (&["-c", conf, "backup", "rbd/no-such", here], &["namespace \"no-such\"", "does not exist"]),
        (&["-c", conf, "backup", POOL, here, "no-such"], &["image \"no-such\"", "does not exist"]),
        (&["-c", conf, "backup", POOL, there, image], &[there, "create it, or mount"]),
        (&["-c", conf, "backup", POOL, conf, image], &[conf, "not a directory"]),
        (
            // Nobody listens there.
            &["-c", conf, "-m", "127.0.0.1:1", "backup", "--timeout", "2", POOL, here],
            &["127.0.0.1:1", "are the monitors reachable?"],
        ),
    ];
    for (arguments, words) in cases {
        let mut command = program::command();
        command.args(*arguments).env_remove("HOME");
        scene.fails(command, words);
    }
    assert!(!scene.rig.dest().join("no-such").exists(), "a directory for an image that is not there");
}

#[test]
fn a_run_without_images_is_told() {
    let cluster = cluster_or_skip!("faults::a_run_without_images_is_told");
    let rig = Rig::new(&cluster);
    let mut command = program::command();
    command
        .arg("-c")
        .arg(&cluster.conf)
        .args(["-q", "backup", POOL])
        .arg(rig.dest())
        .args(["--exclude", "*"]);
    let run = Running::start(command).wait();
    assert_eq!((run.status, run.stdout.as_str()), (Some(0), ""), "{run:?}");
    assert!(run.stderr.contains("no images to back up"), "{run:?}");
}

#[test]
fn unusable_qemu_tools_are_told() {
    let cluster = cluster_or_skip!("faults::unusable_qemu_tools_are_told");
    let scene = Scene::new(&cluster, "tools");
    let truth = scene.change(1);
    let other = tempfile::tempdir().expect("a directory");
    let old = script(other.path(), "old", "echo 'Supported qcow2 options:'; echo '  cluster_size=<size>'");
    let failing =
        script(other.path(), "failing", "echo 'error while loading shared libraries' >&2; exit 127");
    let hasty =
        script(other.path(), "hasty", "[ \"$1\" = --version ] || { echo 'out of luck' >&2; exit 3; }");
    let plain = other.path().join("plain");
    fs::write(&plain, "no program").expect("written");
    let plain = plain.to_str().expect("UTF-8");
    let cases: &[(&str, &str, &[&str])] = &[
        ("--qemu-img", "/nonexistent/qemu-img", &["/nonexistent/qemu-img was not found", "qemu-utils"]),
        ("--qemu-nbd", "/nonexistent/qemu-nbd", &["/nonexistent/qemu-nbd was not found", "qemu-utils"]),
        ("--qemu-img", plain, &["is it an executable file?"]),
        ("--qemu-nbd", plain, &["is it an executable file?"]),
        ("--qemu-img", &old, &["is too old", "5.2"]),
        ("--qemu-nbd", &failing, &["failing failed", "shared libraries"]),
        ("--qemu-nbd", &hasty, &["hasty ended with exit status 3", "out of luck"]),
    ];
    for (option, program, words) in cases {
        let arguments = ["--writer", "qemu-nbd", option, program];
        scene.fails(scene.rig.backup(&scene.image, &arguments), words);
    }
    scene.recovers(&truth);
}

#[test]
fn one_failure_among_many_leaves_the_others_alone() {
    let cluster = cluster_or_skip!("faults::one_failure_among_many_leaves_the_others_alone");
    let rig = Rig::new(&cluster);
    let images = ["one", "bad", "two", "skip"].map(unique_image);
    for image in &images {
        rig.image(image, 4, FULL_FEATURES);
    }
    rig.driver.metadata_set(&images[3], "backup-skip", "1").expect("set");
    rig.driver.close_all().expect("closed");
    // A file stands where the directory of the image should be.
    fs::write(rig.directory(&images[1]), "").expect("written");
    let truths = images.each_ref().map(|image| rig.truth(image, 0));
    let run = fails(rig.backup_to(rig.dest(), &images.each_ref(), &["--json"]), &["is not a directory"]);
    let mut lines = std::collections::BTreeMap::new();
    for line in run.stdout.lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect("nothing but JSON on stdout");
        lines.insert(line["image"].as_str().expect("a name").to_owned(), line);
    }
    assert_eq!(lines.len(), images.len(), "{}", run.stdout);
    for (image, truth) in images.iter().zip(&truths) {
        let line = &lines[&image.image];
        match image.image.split('-').next() {
            Some("bad") => {
                assert_eq!(line["status"], "failed", "{line}");
                assert!(line["error"].as_str().is_some_and(|e| e.contains("is not a directory")), "{line}");
                assert!(line["file"].is_null() && line["data_bytes"].is_null(), "{line}");
                assert_eq!(rig.snapshots(image), [""; 0]);
            }
            Some("skip") => {
                assert_eq!(line["status"], "skipped", "{line}");
                assert!(!rig.directory(image).exists());
            }
            _ => {
                assert_eq!((&line["status"], &line["kind"]), (&"ok".into(), &"full".into()), "{line}");
                let file = Path::new(line["file"].as_str().expect("a file"));
                assert_point(file, truth);
                assert_eq!(line["point"], point_of(file));
                assert!(line["error"].is_null() && line["data_bytes"] == 2 * MIB, "{line}");
                rig.assert_tidy(image);
            }
        }
    }
    for image in &images {
        rig.driver.purge(image).expect("removed");
    }
}

#[test]
fn a_chain_that_is_being_written_is_left_alone() {
    let cluster = cluster_or_skip!("faults::a_chain_that_is_being_written_is_left_alone");
    let scene = Scene::new(&cluster, "locked");
    let truth = scene.change(1);
    // A chain belongs to whoever writes it, by whichever writer.
    for (writer, other) in [(WRITERS[0], WRITERS[1]), (WRITERS[1], WRITERS[0])] {
        // Enough to copy for every round.
        let arguments = with(writer, &["--full", "--rate-limit", "4M"]);
        let mut first = scene.rig.start_copy(&[&scene.image], &arguments);
        let second = fails(
            scene.rig.backup(&scene.image, &with(other, &["--json"])),
            &["another run is writing this chain: process"],
        );
        assert!(!first.has_ended(), "the second run has waited for the first");
        assert!(second.stdout.contains("another run is writing"), "{}", second.stdout);
        let first = first.wait();
        assert_eq!(first.status, Some(0), "{first:?}");
        assert_point(scene.rig.layers(&scene.image).last().expect("a point"), &truth);
        scene.rig.assert_tidy(&scene.image);
        scene.rig.assert_only_the_newest_snapshot(&scene.image);
    }
}

#[test]
fn a_damaged_chain_makes_room_for_a_new_one() {
    let cluster = cluster_or_skip!("faults::a_damaged_chain_makes_room_for_a_new_one");
    // What happens, to which of two points, how, and what the next report says of it.
    type Damage = fn(&Path);
    let cases: &[(&str, usize, Damage, &str)] = &[
        ("the root is missing", 0, |layer| fs::remove_file(layer).expect("removed"), "is missing"),
        (
            "the root is renamed",
            0,
            |layer| fs::rename(layer, layer.with_file_name("old.qcow2")).expect("renamed"),
            "is missing",
        ),
        (
            "the newest is cut off",
            1,
            |layer| {
                let file = fs::OpenOptions::new().write(true).open(layer).expect("opened");
                file.set_len(file.metadata().expect("there").len() / 2).expect("cut off");
            },
            "damaged",
        ),
        (
            "the root is something else",
            0,
            |layer| {
                fs::set_permissions(layer, fs::Permissions::from_mode(0o600)).expect("writable");
                fs::write(layer, "not a layer at all").expect("written");
            },
            "cannot be used: not a qcow2 file",
        ),
        (
            "the newest manifest is damaged",
            1,
            |layer| {
                let manifest = layer.with_extension("json");
                fs::set_permissions(&manifest, fs::Permissions::from_mode(0o600)).expect("writable");
                fs::write(manifest, "{\"format\": 1").expect("written");
            },
            "manifest",
        ),
        (
            "the newest manifest is missing",
            1,
            |layer| fs::remove_file(layer.with_extension("json")).expect("removed"),
            "manifest",
        ),
    ];
    for (number, (what, victim, damage, words)) in cases.iter().enumerate() {
        let scene = Scene::new(&cluster, &format!("damaged-{number}"));
        scene.change(1);
        scene.rig.back_up(&scene.image, &[]);
        let layers = scene.rig.layers(&scene.image);
        damage(&layers[*victim]);
        let before = names_in(&scene.rig.directory(&scene.image));
        let truth = scene.change(2);
        let run = scene.rig.back_up(&scene.image, &["--json"]);
        let line: serde_json::Value = serde_json::from_str(&run.stdout).expect("one line");
        assert_eq!(line["kind"], "full", "{what}: {line}");
        let reason = line["reason"].as_str().expect("a reason");
        assert!(reason.contains(words), "{what}: {reason}");
        let file = Path::new(line["file"].as_str().expect("a file"));
        assert_point(file, &truth);
        let after = names_in(&scene.rig.directory(&scene.image));
        assert!(after.is_superset(&before), "{what}: files of the old chain are gone: {after:?}");
        // And on it goes from there.
        let truth = scene.change(3);
        let run = scene.rig.back_up(&scene.image, &["--json"]);
        let line: serde_json::Value = serde_json::from_str(&run.stdout).expect("one line");
        assert_eq!(line["kind"], "incremental", "{what}: {line}");
        assert_point(Path::new(line["file"].as_str().expect("a file")), &truth);
    }
}

#[test]
fn files_that_are_not_ours_are_left_alone() {
    let cluster = cluster_or_skip!("faults::files_that_are_not_ours_are_left_alone");
    let scene = Scene::new(&cluster, "foreign");
    let directory = scene.rig.directory(&scene.image);
    let foreign = ["notes.txt", "other@20200101T000000Z.qcow2", ".hidden"];
    for name in foreign {
        fs::write(directory.join(name), name).expect("written");
    }
    let truth = scene.change(1);
    let run = scene.rig.back_up(&scene.image, &["--json"]);
    let line: serde_json::Value = serde_json::from_str(&run.stdout).expect("one line");
    assert_eq!(line["kind"], "incremental", "{line}");
    assert_point(Path::new(line["file"].as_str().expect("a file")), &truth);
    for name in foreign {
        assert_eq!(fs::read_to_string(directory.join(name)).expect("still there"), name);
    }
}

#[test]
fn outputs_keep_to_their_streams() {
    let cluster = cluster_or_skip!("faults::outputs_keep_to_their_streams");
    let scene = Scene::new(&cluster, "outputs");
    let run = scene.rig.back_up(&scene.image, &["-q"]);
    // Only what is a warning: two points within a second make one.
    let warnings = run.stderr.lines().filter(|line| !line.contains("WARN"));
    assert_eq!((run.stdout.as_str(), warnings.count()), ("", 0), "{}", run.stderr);
    let run = scene.rig.back_up(&scene.image, &["-v", "--json"]);
    assert_eq!(run.stdout.lines().count(), 1, "{}", run.stdout);
    serde_json::from_str::<serde_json::Value>(&run.stdout).expect("JSON");
    let run = scene.rig.back_up(&scene.image, &[]);
    assert_eq!(run.stdout, "");

    // A reader who left, and a disk that is full, do not stop a backup, but are told.
    let points = scene.rig.layers(&scene.image).len();
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("there is one");
    for stdout in [Stdio::from(writer), Stdio::from(full)] {
        let mut command = scene.rig.backup(&scene.image, &["--json"]);
        let output = command.stdin(Stdio::null()).stdout(stdout).output().expect("it was built");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains("standard output") && !stderr.contains("panicked"), "{stderr}");
    }
    assert_eq!(scene.rig.layers(&scene.image).len(), points + 2);
    // Nor does it matter that nobody hears the messages.
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let mut command = scene.rig.backup(&scene.image, &["-v"]);
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(writer).status();
    assert_eq!(status.expect("it was built").code(), Some(0));
    scene.rig.assert_tidy(&scene.image);
}

#[test]
fn signals_in_the_middle_of_a_copy() {
    let cluster = cluster_or_skip!("faults::signals_in_the_middle_of_a_copy");
    let scene = Scene::new(&cluster, "signals");
    let truth = scene.change(1);
    let signals = [Signal::INT, Signal::TERM];
    for (signal, writer) in signals.into_iter().flat_map(|signal| WRITERS.map(|writer| (signal, writer))) {
        let points = scene.rig.layers(&scene.image);
        let arguments = with(writer, &["--rate-limit", "1M", "--json"]);
        let running = scene.rig.start_copy(&[&scene.image], &arguments);
        running.signal(signal);
        let (run, time) = running.wait_timed();
        say(&format!("{signal:?} in the middle of a copy, {writer:?}: ended after {time:?}"));
        assert_eq!(run.status, Some(130), "{run:?}");
        assert!(time < STOP_LIMIT, "{time:?}");
        assert!(run.stderr.contains("interrupted") && run.stdout.contains("interrupted"), "{run:?}");
        let line: serde_json::Value = serde_json::from_str(&run.stdout).expect("JSON");
        assert!(line["point"].is_null(), "a point that does not exist: {line}");
        assert_eq!(scene.rig.layers(&scene.image), points);
        scene.rig.assert_tidy(&scene.image);
        scene.rig.assert_only_the_newest_snapshot(&scene.image);
        scene.rig.assert_no_process();
    }
    scene.recovers(&truth);
}

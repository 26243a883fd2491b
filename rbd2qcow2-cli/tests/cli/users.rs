//! Several users in one destination: root prunes, holds and verifies, another one backs up; and others read.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::cluster::unique_image;
use crate::cluster_or_skip;
use crate::directory::Backups;
use crate::driver::FULL_FEATURES;
use crate::program::{self, Run, run};
use crate::rig::{MIB, Rig, assert_point};

/// The other user, and his group.
const OTHER: (u32, u32) = (4321, 4322);

/// What lets another user run the program; `None` where that takes root, or a tool is missing.
struct Other {
    directory: TempDir,
}

impl Other {
    fn new(test: &str) -> Option<Self> {
        let root = rustix::process::geteuid().is_root();
        let tool = Command::new("setpriv").arg("--version").output().is_ok();
        let required = std::env::var("RBD2QCOW2_REQUIRE_TOOLS").is_ok_and(|value| value == "1");
        assert!(!required || (root && tool), "{test} needs root and setpriv");
        if !root || !tool {
            _ = writeln!(std::io::stderr(), "SKIPPED {test}: needs root and setpriv");
            return None;
        }
        // Where the program was built he may not get.
        let directory = TempDir::new().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::copy(env!("CARGO_BIN_EXE_rbd2qcow2"), directory.path().join("program")).unwrap();
        Some(Self { directory })
    }

    fn command(&self) -> Command {
        let mut command = Command::new("setpriv");
        let (uid, gid) = OTHER;
        command.args([&format!("--reuid={uid}"), &format!("--regid={gid}"), "--clear-groups"]);
        command.arg(self.directory.path().join("program"));
        command
    }

    fn run(&self, args: &[&str]) -> Run {
        self.command().args(args).output().unwrap().into()
    }
}

/// Everything in a destination, with the destination.
fn all(dest: &Path) -> Vec<PathBuf> {
    let mut found = vec![dest.to_owned()];
    let mut next = 0;
    while let Some(path) = found.get(next).cloned() {
        if path.is_dir() {
            found.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        next += 1;
    }
    found
}

fn give(dest: &Path) {
    for path in all(dest) {
        chown(path, Some(OTHER.0), Some(OTHER.1)).unwrap();
    }
}

fn assert_given(dest: &Path, after: &str) {
    for path in all(dest) {
        let found = fs::symlink_metadata(&path).unwrap();
        assert_eq!((found.uid(), found.gid()), OTHER, "{} after {after}", path.display());
    }
}

/// Four points of data, one of them without a successor.
fn backups() -> Backups {
    let backups = Backups::new();
    let mut content = vec![7; 600_000];
    let mut base: Option<Vec<u8>> = None;
    for day in 1..=4 {
        content[day * 1000..day * 1000 + 100_000].fill(u8::try_from(day).unwrap());
        backups.fill("vm", &format!("2026-11-0{day}T12:00:00Z"), &content, base.as_deref());
        base = Some(content.clone());
    }
    backups
}

#[test]
fn what_root_leaves_belongs_to_who_backs_up() {
    let Some(other) = Other::new("users::what_root_leaves_belongs_to_who_backs_up") else { return };
    let backups = backups();
    let dest = backups.path().to_str().unwrap();
    give(backups.path());
    for command in [
        &["hold", dest, "vm@20261104T120000Z", "--reason", "x"][..],
        &["verify", dest],
        &["prune", dest, "vm@20261102T120000Z"],
        &["prune", dest, "--keep-last", "1"],
        &["release", dest, "vm@20261104T120000Z"],
        &["list", dest],
        &["verify", dest],
    ] {
        // Whoever comes first makes the lock file.
        fs::remove_file(backups.image("vm").join(".lock")).unwrap();
        let told = run(command);
        assert_eq!(told.status, Some(0), "{command:?}: {told:?}");
        assert!(!told.stderr.contains("cannot be given"), "{told:?}");
        assert_given(backups.path(), command[0]);
        if command[0] == "list" {
            assert_eq!(run(&["verify", dest]).status, Some(0));
        }
        let held = other.run(&["hold", dest, "vm@20261104T120000Z", "--reason", "y"]);
        assert_eq!(held.status, Some(0), "after {command:?}: {held:?}");
        assert_eq!(other.run(&["verify", dest]).status, Some(0), "after {command:?}");
    }
    // A lock file that an older version has left to root, beside files of his.
    chown(backups.image("vm").join(".lock"), Some(0), Some(0)).unwrap();
    let told = other.run(&["verify", dest]);
    assert_eq!(told.status, Some(1), "{told:?}");
    assert!(told.stderr.contains(".lock: run as its owner"), "{told:?}");
    assert_eq!(run(&["verify", dest]).status, Some(0));
    assert_given(backups.path(), "verify");
}

#[test]
fn what_may_not_be_read_is_not_damaged() {
    let Some(other) = Other::new("users::what_may_not_be_read_is_not_damaged") else { return };
    let backups = backups();
    let dest = backups.path().to_str().unwrap();
    fs::set_permissions(backups.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let target = other.directory.path().join("out");
    fs::create_dir(&target).unwrap();
    chown(&target, Some(OTHER.0), Some(OTHER.1)).unwrap();
    let target = |name: &str| target.join(name).to_str().unwrap().to_owned();
    let refused = |words: &[&str]| {
        let told = other.run(words);
        assert_eq!(told.status, Some(1), "{words:?}: {told:?}");
        let text = format!("{}{}", told.stdout, told.stderr);
        assert!(text.to_lowercase().contains("permission denied"), "{words:?}: {told:?}");
        for word in ["damaged", "broken", "is lost"] {
            assert!(!text.contains(word), "{words:?}: {told:?}");
        }
        assert!(text.contains("this user may not read"), "{words:?}: {told:?}");
        told
    };
    let readers = || {
        refused(&["list", dest]);
        refused(&["verify", dest]);
        refused(&["verify", dest, "vm@20261101T120000Z"]);
        refused(&["restore", dest, "vm", "--to-file", &target("a.raw")]);
    };
    // As it is made: nobody else may even list it.
    let directory = backups.image("vm");
    assert_eq!(fs::metadata(&directory).unwrap().permissions().mode() & 0o7, 0);
    readers();
    // As older versions made it; without the lock file nothing keeps a reader from the files.
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).unwrap();
    readers();
    fs::remove_file(directory.join(".lock")).unwrap();
    readers();
    // A single file.
    for path in all(&directory).iter().filter(|path| path.is_file()) {
        fs::set_permissions(path, fs::Permissions::from_mode(0o444)).unwrap();
    }
    for words in [&["list", dest][..], &["verify", dest]] {
        assert_eq!(other.run(words).status, Some(0), "{words:?}");
    }
    assert_eq!(other.run(&["restore", dest, "vm", "--to-file", &target("b.raw")]).status, Some(0));
    for suffix in ["qcow2", "json", "digests"] {
        let path = directory.join(format!("vm@20261102T120000Z.{suffix}"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
        let told = refused(&["verify", dest]);
        assert!(told.stderr.contains(path.to_str().unwrap()), "{told:?}");
        assert_eq!(other.run(&["verify", dest, "vm@20261101T120000Z"]).status, Some(0));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
    }
    // Root's hold leaves the others what they could read.
    assert_eq!(run(&["hold", dest, "vm@20261104T120000Z", "--reason", "x"]).status, Some(0));
    fs::set_permissions(directory.join(".lock"), fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(other.run(&["verify", dest]).status, Some(0));
}

#[test]
fn another_user_backs_up_after_root_was_there() {
    let cluster = cluster_or_skip!("users::another_user_backs_up_after_root_was_there");
    let Some(other) = Other::new("users::another_user_backs_up_after_root_was_there") else { return };
    let rig = Rig::new(&cluster);
    let image = unique_image("users");
    rig.image(&image, 8, FULL_FEATURES);
    // The cluster's key is root's.
    let keyring = cluster.conf.with_file_name("keyring");
    let (own, conf) = (other.directory.path().join("keyring"), other.directory.path().join("conf"));
    fs::copy(&keyring, &own).unwrap();
    chown(&own, Some(OTHER.0), Some(OTHER.1)).unwrap();
    let text = fs::read_to_string(&cluster.conf).unwrap();
    fs::write(&conf, text.replace(keyring.to_str().unwrap(), own.to_str().unwrap())).unwrap();
    let dest = TempDir::new().unwrap();
    chown(dest.path(), Some(OTHER.0), Some(OTHER.1)).unwrap();
    let path = dest.path().to_str().unwrap();
    let back_up = |mut command: Command, conf: &Path| {
        command.arg("-c").arg(conf).args(["backup", &image.pool, path, &image.image]);
        let run: Run = command.output().unwrap().into();
        assert_eq!(run.status, Some(0), "{run:?}");
        assert_given(dest.path(), "a backup");
        run
    };
    // Root makes the first point, in a directory that he makes for it.
    back_up(program::command(), &cluster.conf);
    for number in 1..5 {
        rig.change(&image, MIB, MIB, number);
        let made = back_up(other.command(), &conf);
        assert!(made.stderr.contains(": incremental, "), "{made:?}");
        let newest = run(&["list", "--json", path]).stdout;
        let newest: serde_json::Value = serde_json::from_str(newest.lines().last().unwrap()).unwrap();
        let point = format!("{}@{}", image.image, newest["point"].as_str().unwrap());
        let told = match number {
            1 => run(&["hold", path, &point, "--reason", "x"]),
            2 => run(&["verify", path]),
            _ => run(&["prune", path, "--keep-last", "1"]),
        };
        assert_eq!(told.status, Some(0), "{told:?}");
        assert_given(dest.path(), "root");
    }
    let truth = rig.truth(&image, 9);
    let layers = rig_layers(&dest.path().join(&image.image));
    assert_point(layers.last().unwrap(), &truth);
    rig.driver.purge(&image).expect("removed");
}

fn rig_layers(directory: &Path) -> Vec<PathBuf> {
    let mut layers = all(directory);
    layers.retain(|path| path.extension().is_some_and(|suffix| suffix == "qcow2"));
    layers.sort();
    layers
}

//! `restore` to files and to standard output, without a cluster.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::directory::Backups;
use crate::faults::fails;
use crate::mount::Mount;
use crate::program::{self, Run};
use crate::rig::{MIB, Running, assert_point, names_in, wait_for};

const FIRST: &str = "20261122T173312Z";
const SECOND: &str = "20261123T173307Z";

/// An image with two points, and a directory to restore to.
struct Scene {
    backups: Backups,
    out: TempDir,
    contents: [Vec<u8>; 2],
}

impl Scene {
    fn new() -> Self {
        // Ragged, with zeroes at the start, and shrunk.
        Self::of([content(3_000_001, 1), content(2_500_003, 2)])
    }

    fn of(contents: [Vec<u8>; 2]) -> Self {
        let backups = Backups::new();
        backups.fill("web/1", "2026-11-22T17:33:12Z", &contents[0], None);
        backups.fill("web/1", "2026-11-23T17:33:07Z", &contents[1], Some(&contents[0]));
        Self { backups, out: TempDir::new().expect("a temporary directory"), contents }
    }

    fn out(&self) -> PathBuf {
        self.out.path().join("vm")
    }

    fn restore_to(&self, point: &str, to: &Path, arguments: &[&str]) -> Command {
        let mut command = program::command();
        command.arg("restore").arg(self.backups.path()).arg(point).arg("--to-file").arg(to).args(arguments);
        command
    }

    fn restore(&self, point: &str, arguments: &[&str]) -> Command {
        self.restore_to(point, &self.out(), arguments)
    }

    /// A restore that must succeed.
    fn restored(&self, point: &str, arguments: &[&str]) -> Run {
        let run = Running::start(self.restore(point, arguments)).wait();
        assert_eq!(run.status, Some(0), "{run:?}");
        assert_eq!(names_in(self.out.path()), ["vm".to_owned()].into());
        run
    }

    /// A restore that must fail, say all of `words`, and leave nothing.
    fn refused(&self, point: &str, arguments: &[&str], words: &[&str]) -> Run {
        let run = fails(self.restore(point, arguments), words);
        assert_eq!(names_in(self.out.path()), [].into(), "{run:?}");
        assert_eq!(run.stdout, "");
        run
    }

    fn layer(&self, point: &str) -> PathBuf {
        self.backups.image("web/1").join(format!("web%2F1@{point}.qcow2"))
    }

    /// A content as a file.
    fn truth(&self, number: usize) -> PathBuf {
        let path = self.backups.path().join("truth");
        let mut content = self.contents[number].clone();
        content.resize(content.len().next_multiple_of(512), 0);
        fs::write(&path, content).expect("written");
        path
    }
}

/// Data that do not compress, behind some zeroes.
fn content(size: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut content = vec![0; size];
    for chunk in content[size / 3..].chunks_mut(8) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        chunk.copy_from_slice(&(state ^ state >> 29).to_le_bytes()[..chunk.len()]);
    }
    content
}

/// Writes into a layer, which is read-only.
fn overwrite(path: &Path, offset: u64, bytes: &[u8]) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).expect("changed");
    let file = fs::File::options().write(true).open(path).expect("writable");
    file.write_all_at(bytes, offset).expect("written");
}

#[test]
fn a_raw_file_is_the_image() {
    let scene = Scene::new();
    let run = scene.restored("web/1", &[]);
    assert!(fs::read(scene.out()).unwrap() == scene.contents[1]);
    let line = format!("web/1@{SECOND}: restored to {}, 1.59 MiB written", scene.out().display());
    assert!(run.stderr.contains(&line) && run.stderr.contains("of zeroes left out in "), "{run:?}");
    assert_eq!(run.stdout, "");
    assert_eq!(fs::metadata(scene.out()).unwrap().permissions().mode() & 0o7777, 0o600);
}

#[test]
fn json_tells_what_was_restored() {
    let scene = Scene::new();
    let run = scene.restored(&format!("web/1@{FIRST}"), &["--json", "-q"]);
    assert!(fs::read(scene.out()).unwrap() == scene.contents[0]);
    assert_eq!(run.stderr, "");
    let line: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!((&line["image"], &line["point"]), (&"web/1".into(), &FIRST.into()));
    assert_eq!(line["target"], scene.out().to_str().unwrap());
    let number = |key: &str| line[key].as_u64().unwrap();
    assert_eq!(number("bytes_written") + number("zero_bytes"), 3_000_001);
    // Two thirds, and the rest of a block.
    assert_eq!(number("zero_bytes"), 1_000_000 / 4096 * 4096);
    assert!(line["seconds"].as_f64().unwrap() > 0.0);
    let keys: Vec<_> = ["image", "point", "target", "bytes_written", "zero_bytes", "seconds"].into();
    let places: Vec<_> = keys.iter().map(|key| run.stdout.find(&format!("\"{key}\"")).unwrap()).collect();
    assert!(places.is_sorted(), "{}", run.stdout);
}

#[test]
fn a_qcow2_file_stands_alone() {
    let scene = Scene::new();
    let small = ["--compression", "zlib", "--cluster-size", "64K", "--no-extended-l2"];
    for more in [&[][..], &["--compression", "zstd:1"], &small] {
        scene.restored("web/1", &[&["--format", "qcow2"], more].concat());
        assert_point(&scene.out(), &scene.truth(1));
        let info = Command::new("qemu-img").args(["info", "-f", "qcow2"]).arg(scene.out()).output().unwrap();
        let info = String::from_utf8(info.stdout).unwrap();
        assert!(!info.contains("backing file"), "{info}");
        let cluster = if more == small { "cluster_size: 65536" } else { "cluster_size: 131072" };
        assert!(info.contains(cluster), "{info}");
        fs::remove_file(scene.out()).unwrap();
    }
}

#[test]
fn a_stream_is_the_image() {
    let scene = Scene::new();
    let mut command = scene.restore_to("web/1", Path::new("-"), &[]);
    let output = command.stderr(Stdio::piped()).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stdout == scene.contents[1]);
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("restored to standard output, 2.38 MiB written in "), "{told}");
    // Into a file, which is synced.
    let file = fs::File::create(scene.out()).unwrap();
    let status = scene.restore_to("web/1", Path::new("-"), &["-q"]).stdout(file).status().unwrap();
    assert!(status.success() && fs::read(scene.out()).unwrap() == scene.contents[1]);
    // Where nothing can be kept.
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = scene.restore_to("web/1", Path::new("-"), &[]).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("at offset 0 of 2500003 bytes") && told.contains("No space left"), "{told}");
}

#[test]
fn a_reader_who_leaves_is_an_error() {
    let scene = Scene::new();
    let mut command = scene.restore_to("web/1", Path::new("-"), &[]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("Broken pipe"), "{told}");
}

/// Nobody reads the pipe, so the program waits in a write; the first signal must end it.
#[test]
fn a_stream_that_waits_for_its_reader_is_interrupted() {
    let scene = Scene::new();
    let mut command = scene.restore_to("web/1", Path::new("-"), &["-v"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    // No pipe takes the whole of a block.
    child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, Signal::TERM).unwrap();
    assert_eq!(wait_for("end", || child.try_wait().unwrap()).code(), Some(130));
}

#[test]
fn near_names_are_suggested() {
    let scene = Scene::new();
    scene.refused("web-1", &[], &[r#"holds no backups of image "web-1"; did you mean "web/1"?"#]);
    let words = format!("\"web/1\" has no point 20261123T000000Z; did you mean {FIRST:?} or {SECOND:?}?");
    scene.refused("web/1@20261123T000000Z", &[], &[&words]);
    let words = format!(": \"20261122T17\" names no point of image \"web/1\"; did you mean {FIRST:?}");
    scene.refused("web/1@20261122T17", &[], &[&words]);
    let mut elsewhere = program::command();
    elsewhere.args(["restore", "/not/mounted", "x", "--to-file"]).arg(scene.out());
    fails(elsewhere, &["/not/mounted does not exist"]);
}

#[test]
fn nothing_is_overwritten_and_no_chain_is_written_into() {
    let scene = Scene::new();
    fs::write(scene.out(), "precious").unwrap();
    fails(scene.restore("web/1", &[]), &["vm exists; nothing is overwritten"]);
    assert_eq!(fs::read(scene.out()).unwrap(), b"precious");
    let before = names_in(&scene.backups.image("web/1"));
    let within = scene.backups.image("web/1").join("vm");
    fails(scene.restore_to("web/1", &within, &[]), &["which holds backups: choose another directory"]);
    assert_eq!(names_in(&scene.backups.image("web/1")), before);
    fails(scene.restore_to("web/1", &scene.out.path().join("no/vm"), &[]), &["cannot restore into", "/no"]);
    let run = Running::start(scene.restore_to("web/1", Path::new("/tmp/.."), &[])).wait();
    assert_eq!(run.status, Some(2), "{run:?}");
}

#[test]
fn damage_is_named_and_leaves_no_file() {
    let scene = Scene::new();
    let layer = scene.layer(SECOND);
    let bytes = fs::read(&layer).unwrap();
    let number = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let table = number(usize::try_from(number(40)).unwrap()) & 0x00ff_ffff_ffff_fe00;
    // A bit that must be 0, in the entry of a cluster of data.
    overwrite(&layer, table + 20 * 8, &[0x81]);
    let name = layer.to_str().unwrap();
    let not_affected = format!("not affected: {FIRST}");
    for format in [&[][..], &["--format", "qcow2", "--compression", "zstd"]] {
        scene.refused("web/1", format, &[name, "L2 table", &not_affected]);
    }
    fs::File::options().write(true).open(&layer).unwrap().set_len(100_000).unwrap();
    scene.refused("web/1", &[], &[name, "is broken", &not_affected]);
    fs::remove_file(&layer).unwrap();
    scene.refused(&format!("web/1@{SECOND}"), &[], &["is lost", name, &not_affected]);
    // Who says nothing of a point wants the newest, and not one that happens to be left.
    scene.refused("web/1", &[], &["is lost", name]);
    scene.restored(&format!("web/1@{FIRST}"), &[]);
    assert!(fs::read(scene.out()).unwrap() == scene.contents[0]);
}

#[test]
fn a_chain_that_is_written_is_not_restored() {
    let scene = Scene::new();
    let image = rbd2qcow2_core::chain::ImageName::new("web/1").unwrap();
    let writer = rbd2qcow2_core::chain::ChainWriter::open(scene.backups.path(), &image).unwrap();
    scene.refused("web/1", &[], &["another run is writing this chain: process "]);
    drop(writer);
    scene.restored("web/1", &[]);
}

#[test]
fn a_limit_on_the_size_of_files() {
    let scene = Scene::new();
    for format in [&[][..], &["--format", "qcow2"]] {
        let restore = scene.restore("web/1", format);
        let mut limited = Command::new("prlimit");
        limited.arg("--fsize=1000000").arg("--").arg(restore.get_program()).args(restore.get_args());
        let out = format!("cannot restore to {}", scene.out().display());
        let run = fails(limited, &[&out, "File too large"]);
        assert_eq!(names_in(scene.out.path()), [].into(), "{run:?}");
    }
}

#[test]
fn a_full_disk_keeps_nothing() {
    const TEST: &str = "restore::a_full_disk_keeps_nothing";
    let scene = Scene::of([content(6 << 20, 1), content(6 << 20, 2)]);
    let Some(mut mount) = Mount::new(TEST, scene.out.path(), "mount -t tmpfs -o size=2m tmpfs \"$d\"") else {
        return;
    };
    for format in [&[][..], &["--format", "qcow2"]] {
        fails(
            mount.inside(&scene.restore("web/1", format)),
            &["No space left on device", "cannot restore to"],
        );
        assert_eq!(names_in(&mount.seen_from_outside()), [].into());
    }
    // The holes take nothing.
    mount.run("mount -o remount,size=5m \"$d\"");
    let run = Running::start(mount.inside(&scene.restore("web/1", &[]))).wait();
    assert_eq!(run.status, Some(0), "{run:?}");
    assert!(fs::read(mount.seen_from_outside().join("vm")).unwrap() == scene.contents[1]);
}

/// The slowest compression there is gives time for signals.
#[test]
fn a_restore_that_is_stopped_or_killed() {
    let scene = Scene::of([content(48 << 20, 1), content(48 << 20, 2)]);
    let slow = ["--format", "qcow2", "--compression", "zstd:22", "--cluster-size", "2M"];
    let start = || {
        let mut running = Running::start(scene.restore("web/1", &slow));
        wait_for("data in the file", || {
            assert!(!running.has_ended());
            let names = names_in(scene.out.path());
            let partial = scene.out.path().join(names.first()?);
            (partial.metadata().ok()?.len() > MIB).then_some(())
        });
        running
    };
    for signal in [Signal::INT, Signal::TERM] {
        let running = start();
        running.signal(signal);
        let run = running.wait();
        assert_eq!((run.status, run.stdout.as_str()), (Some(130), ""), "{run:?}");
        assert!(run.stderr.ends_with("interrupted\n"), "{run:?}");
        assert_eq!(names_in(scene.out.path()), [].into());
    }
    assert!(start().kill(), "it was not done yet");
    let names = names_in(scene.out.path());
    assert!(names.len() == 1 && names.first().unwrap().starts_with(".vm."), "{names:?}");
    // The next one clears that up.
    scene.restored("web/1", &[]);
    assert!(fs::read(scene.out()).unwrap() == scene.contents[1]);
}

//! Chains of very many layers, with few files open, in little memory.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use crate::directory::{Backups, create_layer};
use crate::program::{Run, command};
use crate::rig::MIB;

/// Size of the images that have very many layers.
const SIZE: u64 = 64 * MIB;

/// Where the oldest layer holds data.
const DATA: std::ops::Range<usize> = 1 << 20..(1 << 20) + 4096;

/// An image of so many layers as the Python tool makes them, all but the oldest without data. Each is a copy of
/// one that names another file.
fn long_chain(layers: usize) -> Backups {
    let backups = Backups::new();
    let mut content = vec![0; SIZE as usize];
    content[DATA].fill(7);
    backups.fill_as_python("vm", second(0), &content, None);
    let directory = backups.image("vm");
    let file = |number: usize| format!("vm@{}.qcow2", second(number));
    create_layer(&directory.join(file(1)), SIZE, Some(&file(0)));
    let pattern = fs::read(directory.join(file(1))).unwrap();
    let name = file(0).into_bytes();
    let at = pattern.windows(name.len()).position(|bytes| bytes == name).expect("the header names it");
    for number in 2..layers {
        let mut layer = pattern.clone();
        layer[at..at + name.len()].copy_from_slice(file(number - 1).as_bytes());
        fs::write(directory.join(file(number)), layer).unwrap();
    }
    backups
}

fn second(number: usize) -> i64 {
    1_700_000_000 + 3600 * number as i64
}

/// The program with a limit of open files: what `ulimit` takes.
fn limited(limit: &str, words: &[&str]) -> Run {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("ulimit {limit} && exec \"$@\""), "sh"]);
    shell.arg(command().get_program()).args(words);
    for variable in ["RUST_LOG", "CEPH_CONF", "CEPH_ARGS"] {
        shell.env_remove(variable);
    }
    shell.output().expect("a shell").into()
}

/// Nothing is called damaged that is not.
fn assert_not_accused(run: &Run, context: &str) {
    for word in ["damaged", "broken", "unverifiable", "cannot be used", "missing", "cannot be read whole"] {
        // What says that it is not.
        let told = [&run.stdout, &run.stderr].map(|text| text.replace("known to be damaged", ""));
        assert!(told.iter().all(|text| !text.contains(word)), "{context}: {word}: {run:?}");
    }
}

#[test]
fn a_thousand_layers_under_a_hard_limit_of_512_files() {
    let backups = long_chain(1000);
    let (dest, scratch) = (backups.path().to_str().unwrap(), TempDir::new().unwrap());
    for limit in [512, 256] {
        let limit = format!("-n {limit}");
        let raw = scratch.path().join(format!("raw{limit}"));
        for words in [
            &["list", "-q", dest][..],
            &["verify", "-q", dest, "vm"],
            &["restore", "-q", dest, "vm", "--to-file", raw.to_str().unwrap()],
            &["prune", "-q", dest, "vm", "--keep-last", "3", "--dry-run"],
        ] {
            let run = limited(&limit, words);
            assert_eq!(run.status, Some(0), "{limit}, {words:?}: {:?} {}", run.status, run.stderr);
            if words[0] == "list" {
                assert!(run.stderr.contains("long chain of 1000 layers"), "{}", run.stderr);
            }
        }
        let restored = fs::read(&raw).unwrap();
        assert!(restored.len() as u64 == SIZE && restored[DATA].iter().all(|byte| *byte == 7));
        assert_eq!(restored.iter().filter(|byte| **byte != 0).count(), DATA.len());
    }
    let run = limited("-n 256", &["prune", "-q", dest, "vm", "--keep-last", "3"]);
    assert_eq!(run.status, Some(0), "{}", run.stderr);
    let raw = scratch.path().join("pruned");
    let run = limited("-n 256", &["restore", "-q", dest, "vm", "--to-file", raw.to_str().unwrap()]);
    assert_eq!(run.status, Some(0), "{}", run.stderr);
    assert!(fs::read(&raw).unwrap()[DATA].iter().all(|byte| *byte == 7));
}

#[test]
fn the_soft_limit_is_raised() {
    // With so few files the chain's own would not be enough, but for those that are opened again.
    let run = limited("-Sn 20", &["-v", "list", TempDir::new().unwrap().path().to_str().unwrap()]);
    assert!(!run.stderr.contains("too many"), "{run:?}");
    let debug = limited("-Sn 20", &["-vv", "list", "/nowhere"]);
    assert!(debug.stderr.contains("raised from 20"), "{debug:?}");
}

/// Whatever cannot be opened for that reason is not known to be damaged, and the message says what to do.
#[test]
fn too_few_files_are_no_damage() {
    let backups = Backups::of_two_images();
    let dest = backups.path().to_str().unwrap();
    let scratch = TempDir::new().unwrap();
    let (mut failed, mut done) = (0, 0);
    for limit in 4..24 {
        let raw = scratch.path().join(limit.to_string());
        for words in [
            &["list", dest][..],
            &["list", "--json", dest],
            &["verify", dest],
            &["verify", "--json", dest],
            &["restore", dest, "web/1", "--to-file", raw.to_str().unwrap()],
            &["prune", dest, "web/1", "--keep-last", "1", "--dry-run"],
            &["hold", "--reason", "a test", dest, "web/1@20261122T173312Z"],
        ] {
            let run = limited(&format!("-n {limit}"), words);
            let context = format!("{limit} files, {words:?}");
            assert_not_accused(&run, &context);
            match run.status {
                Some(0) => done += 1,
                // The dynamic loader is no part of the program.
                Some(127) => {}
                Some(1) => {
                    failed += 1;
                    assert!(run.stderr.contains("ulimit -n"), "{context}: {run:?}");
                }
                other => panic!("{context}: {other:?}: {run:?}"),
            }
        }
    }
    assert!(failed > 10 && done > 10, "{failed} failed, {done} done");
    assert_eq!(command().args(["verify", dest]).output().unwrap().status.code(), Some(0));
}

/// The most memory that the program has taken, in bytes.
fn peak(words: &[&str]) -> u64 {
    let mut program = command();
    program.args(words).stdout(std::process::Stdio::null());
    let mut child = program.spawn().expect("started");
    let status = Path::new("/proc").join(child.id().to_string()).join("status");
    let mut peak = 0;
    let ended = loop {
        if let Some(ended) = child.try_wait().expect("a child") {
            break ended;
        }
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let told = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        peak = peak.max(told.unwrap_or(0) << 10);
        std::thread::sleep(Duration::from_millis(2));
    };
    assert!(ended.success(), "{words:?}: {ended:?}");
    peak
}

/// Each of these layers has more tables than the 4 MiB that a layer may keep by itself.
#[test]
fn memory_does_not_grow_with_layers() {
    const LAYERS: u64 = 30;
    let backups = Backups::new();
    for layer in 0..LAYERS {
        // A page in each GiB but one, which is another in each layer; L2 tables describe half of one.
        let places = (0..512).filter(|gib| *gib != layer).map(|gib| (gib << 30) + (layer << 20)).step_by(2);
        backups.scatter("vm", second(24 * layer as usize), 512 << 30, &places.collect::<Vec<_>>());
    }
    let (dest, scratch) = (backups.path().to_str().unwrap(), TempDir::new().unwrap());
    let raw = scratch.path().join("raw");
    let restore = peak(&["restore", "-q", dest, "vm", "--to-file", raw.to_str().unwrap()]);
    let prune = peak(&["prune", "-q", dest, "--keep-last", "2"]);
    println!("restore: {} MiB, prune: {} MiB", restore >> 20, prune >> 20);
    assert!(restore < 100 << 20 && prune < 110 << 20, "{} and {} MiB", restore >> 20, prune >> 20);
    assert!(restore > 10 << 20, "it was looked at too late");
}

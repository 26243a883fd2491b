//! Help, versions and wrong usage.

use std::fs::OpenOptions;
use std::process::Stdio;

use crate::program::{command, run};

#[test]
fn help_goes_to_standard_output() {
    for args in [
        &["--help"][..],
        &["-h"],
        &["help", "backup"],
        &["backup", "--help"],
        &["restore", "--help"],
        &["serve", "--help"],
    ] {
        let help = run(args);
        assert_eq!(help.status, Some(0), "{args:?}: {help:?}");
        assert!(help.stdout.contains("Exit status:") && help.stdout.contains("130"), "{args:?}: {help:?}");
        assert_eq!(help.stderr, "", "{args:?}");
    }
}

#[test]
fn the_version_is_told() {
    let version = run(&["--version"]);
    assert_eq!(version.status, Some(0));
    assert_eq!(version.stdout, format!("rbd2qcow2 {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn wrong_usage_is_status_2_and_silent_on_standard_output() {
    for args in [
        &[][..],
        &["frobnicate"],
        &["backup"],
        &["backup", "rbd"],
        &["backup", "rbd", "/d", "--no-such-option"],
        &["backup", "rbd/a/b", "/d"],
        &["backup", "rbd", "/d", "--writer", "dd"],
        &["backup", "rbd", "/d", "--writer", "qemu-nbd", "--compression", "zstd:3"],
        &["backup", "rbd", "/d", "--compression", "lz4"],
        &["backup", "rbd", "/d", "--compression", "zlib:9"],
        &["backup", "rbd", "/d", "--compression", "zstd:0"],
        &["backup", "rbd", "/d", "--compression", "zstd:23"],
        &["backup", "rbd", "/d", "--cluster-size", "256"],
        &["backup", "rbd", "/d", "--cluster-size", "4M"],
        &["backup", "rbd", "/d", "--cluster-size", "65535"],
        &["restore", "/d", "x"],
        &["restore", "/d", "--to-file", "f"],
        &["restore", "/d", "", "--to-file", "f"],
        &["restore", "/d", "x", "--to-file", "f", "--format", "vmdk"],
        &["restore", "/d", "x", "--to-file", "f", "--compression", "zstd"],
        &["restore", "/d", "x", "--to-file", "-", "--format", "qcow2"],
        &["restore", "/d", "x", "--to-file", "-", "--json"],
        &["serve", "/d"],
        &["serve", "/d", ""],
        &["serve", "/d", "x", "--socket", "s", "--port", "1"],
        &["serve", "/d", "x", "--port", "65536"],
        &["serve", "/d", "x", "--address", "127.0.0.1"],
        &["serve", "/d", "x", "--port", "1", "--address", "localhost"],
        &["serve", "/d", "x", "--overlay-dir", "o"],
        &["serve", "/d", "x", "--connections", "0"],
        &["prune", "/d"],
        &["prune", "/d", "--keep-last", "many"],
        &["prune", "/d", "--keep-last", "-2"],
        &["prune", "/d", "--keep-within", "7"],
        &["hold", "/d", "x", "--reason", "y"],
        &["hold", "/d", "x@20261122T173312Z"],
        &["release", "/d", "x"],
        &["--id", "a", "backup", "rbd", "/d", "--name", "client.b"],
    ] {
        let wrong = run(args);
        assert_eq!(wrong.status, Some(2), "{args:?}: {wrong:?}");
        assert_eq!(wrong.stdout, "", "{args:?}");
        assert!(wrong.stderr.contains("--help"), "{args:?}: {wrong:?}");
    }
}

#[test]
fn a_reader_who_left_is_no_panic() {
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = command().arg("--help").stdout(full).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

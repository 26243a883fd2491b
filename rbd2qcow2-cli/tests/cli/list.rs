//! `list` on directories without a cluster.

use std::fs::{self, OpenOptions};
use std::process::Stdio;

use serde_json::Value;

use crate::directory::{Backups, SIZE, create_layer};
use crate::program::{Run, command, run};

/// Lists a directory.
fn list(backups: &Backups, args: &[&str]) -> Run {
    let mut words = vec!["list", backups.path().to_str().unwrap()];
    words.extend(args);
    run(&words)
}

/// The lines of standard output, each a JSON object.
fn objects(run: &Run) -> Vec<Value> {
    run.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_table_for_people() {
    let listed = list(&Backups::of_two_images(), &[]);
    assert_eq!((listed.status, listed.stderr.as_str()), (Some(0), ""), "{listed:?}");
    let lines: Vec<Vec<_>> = listed.stdout.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines.len(), 5, "{listed:?}");
    assert_eq!(lines[1][..3], ["db", "20261122T173400Z", "full"]);
    assert_eq!(lines[2][..5], ["web/1", "20261122T173312Z", "full", "2026-11-22", "17:33:12"]);
    assert_eq!(lines[3][..3], ["web/1", "20261123T173307Z", "incremental"]);
    assert_eq!(lines[3].last(), Some(&"20261122T173312Z"));
    assert!(listed.stdout.contains("2 images, 3 points, files of"), "{listed:?}");
}

#[test]
fn json_tells_each_point() {
    let backups = Backups::of_two_images();
    let listed = list(&backups, &["--json", "web/1"]);
    assert_eq!(listed.status, Some(0), "{listed:?}");
    let points = objects(&listed);
    assert_eq!(points.len(), 2, "{listed:?}");
    let point = &points[1];
    assert_eq!(point["image"], "web/1");
    assert_eq!(point["kind"], "incremental");
    assert_eq!(point["parent"], "20261122T173312Z");
    assert_eq!(point["created"], "2026-11-23T17:33:07Z");
    assert_eq!(point["virtual_size"], SIZE);
    assert!(point["layer_bytes"].as_u64().unwrap() > 0);
    let file = backups.image("web/1").join("web%2F1@20261123T173307Z.qcow2");
    assert_eq!(point["file"], file.to_str().unwrap());
    assert!(file.exists());
    assert_eq!(point["snapshot"], "rbd2qcow2-0123abcd-20261123T173307Z");
    assert_eq!(point["chain"], "0123abcd");
    assert_eq!((&point["pool"], &point["namespace"]), (&"rbd".into(), &"".into()));
    assert_eq!(points[0]["parent"], Value::Null);
}

#[test]
fn points_of_the_python_tool_are_listed() {
    let backups = Backups::new();
    let image = backups.image("vm");
    fs::create_dir(&image).unwrap();
    create_layer(&image.join("empty.qcow2"), 1 << 20, None);
    create_layer(&image.join("vm@1700000000.qcow2"), 1 << 20, Some("empty.qcow2"));
    create_layer(&image.join("vm@1700003600.qcow2"), 1 << 20, Some("vm@1700000000.qcow2"));
    let listed = list(&backups, &["--json"]);
    assert_eq!((listed.status, listed.stderr.as_str()), (Some(0), ""), "{listed:?}");
    let points = objects(&listed);
    assert_eq!((&points[0]["kind"], &points[1]["kind"]), (&"full".into(), &"incremental".into()));
    assert_eq!(points[1]["parent"], "1700000000");
    assert_eq!(points[1]["snapshot"], "1700003600");
    assert_eq!(points[0]["created"], "2023-11-14T22:13:20Z");
    for key in ["chain", "pool", "namespace"] {
        assert_eq!(points[0][key], Value::Null, "{key}");
    }
}

#[test]
fn damage_is_a_warning() {
    let backups = Backups::of_two_images();
    fs::remove_file(backups.image("web/1").join("web%2F1@20261122T173312Z.qcow2")).unwrap();
    let listed = list(&backups, &["-q"]);
    assert_eq!(listed.status, Some(0), "{listed:?}");
    assert!(listed.stdout.contains("incremental, broken"), "{listed:?}");
    assert!(listed.stderr.contains("warning: ") && listed.stderr.contains("20261122T173312Z"), "{listed:?}");
}

#[test]
fn an_unknown_image_fails_and_the_others_are_listed() {
    let backups = Backups::of_two_images();
    let listed = list(&backups, &["web-1", "db"]);
    assert_eq!(listed.status, Some(1), "{listed:?}");
    assert!(listed.stdout.contains("20261122T173400Z"), "{listed:?}");
    assert!(listed.stderr.starts_with("error: "), "{listed:?}");
    assert!(listed.stderr.contains(r#""web-1"; did you mean "web/1"?"#), "{listed:?}");
}

#[test]
fn an_empty_directory_holds_nothing() {
    let backups = Backups::new();
    assert_eq!(list(&backups, &[]).stdout, "0 images, 0 points, files of 0 B\n");
    let json = list(&backups, &["--json"]);
    assert_eq!((json.status, json.stdout.as_str()), (Some(0), ""));
}

#[test]
fn a_missing_destination_is_told() {
    let backups = Backups::new();
    let missing = backups.path().join("not/mounted");
    let listed = run(&["list", missing.to_str().unwrap(), "--json"]);
    assert_eq!((listed.status, listed.stdout.as_str()), (Some(1), ""), "{listed:?}");
    assert!(listed.stderr.starts_with("error: ") && listed.stderr.contains("does not exist"), "{listed:?}");
    assert!(listed.stderr.contains(missing.to_str().unwrap()), "{listed:?}");
}

#[test]
fn a_reader_who_leaves_early_is_no_error() {
    let backups = Backups::of_two_images();
    let mut command = command();
    command.arg("list").arg(backups.path()).arg("--json").stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn a_full_disk_below_standard_output_is_an_error() {
    let backups = Backups::of_two_images();
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output =
        command().arg("list").arg(backups.path()).stdout(full).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.starts_with("error: cannot write to standard output\n  caused by: "), "{error}");
}

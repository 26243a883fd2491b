//! `list` on directories without a cluster.

use std::fs::{self, OpenOptions};
use std::process::Stdio;

use rbd2qcow2_core::chain::lock::ChainLock;
use rbd2qcow2_core::chain::{Announcement, ChainWriter, ImageName, SnapshotName};
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

/// Two images, whose points no clock takes for points to come.
fn two_images() -> Backups {
    let backups = Backups::new();
    backups.add("web/1", "0123abcd", "2024-11-22T17:33:12Z");
    backups.add("web/1", "0123abcd", "2024-11-23T17:33:07Z");
    backups.add("db", "89abcdef", "2024-11-22T17:34:00Z");
    backups
}

/// Standard output without what depends on the day and the file system: ages and bytes on disk. Each
/// line's words are one space apart behind its stem.
fn shape(run: &Run) -> Vec<String> {
    let line = |line: &str| {
        let (line, _) = line.split_once(", files of").unwrap_or((line, ""));
        let words: Vec<_> = line.split_whitespace().collect();
        let kept = match words.iter().position(|word| *word == "full" || *word == "incr") {
            Some(kind) => {
                [&words[kind - 1..kind + 3], &words[kind + 4..kind + 6], &words[kind + 8..]].concat()
            }
            None => words,
        };
        let stem = line.len() - line.trim_start_matches(['├', '┬', '│', '└', '─', ' ']).len();
        format!("{}{}", &line[..stem], kept.join(" ").trim_start_matches(['├', '┬', '│', '└', '─', ' ']))
    };
    run.stdout.lines().map(line).collect()
}

/// The warnings.
fn warnings(run: &Run) -> Vec<&str> {
    assert_eq!(run.status, Some(0), "{run:?}");
    run.stderr.lines().map(|line| line.strip_prefix("warning: ").expect("nothing but warnings")).collect()
}

#[test]
fn a_tree_for_people() {
    let listed = list(&two_images(), &[]);
    assert_eq!((listed.status, listed.stderr.as_str()), (Some(0), ""), "{listed:?}");
    assert_eq!(
        shape(&listed),
        [
            "POINT KIND CREATED (UTC) AGE SIZE ON DISK NEEDED BY",
            "db: 1 point",
            "└┬ chain 89abcdef: 1 point",
            " └ 20241122T173400Z full 2024-11-22 17:34 977 KiB 0",
            "",
            "web/1: 2 points",
            "└┬ chain 0123abcd: 2 points",
            " ├ 20241122T173312Z full 2024-11-22 17:33 977 KiB 1",
            " └ 20241123T173307Z incr 2024-11-23 17:33 977 KiB 0",
            "",
            "2 images, 3 points",
        ]
    );
    let heading = listed.stdout.lines().find(|line| line.starts_with("web/1")).unwrap();
    assert!(heading.ends_with(", from rbd"), "{heading}");
}

#[test]
fn lines_fit_a_terminal_whatever_an_image_is_called() {
    let backups = two_images();
    let long = "a name that is so long that it would move everything \u{1b}[2J\n out of sight".repeat(2);
    backups.add_sized(&long, "0123abcd", "2024-11-22T17:33:12Z", 100 << 30);
    backups.add_sized(&long, "0123abcd", "2024-11-23T17:33:12Z", 200 << 30);
    let listed = list(&backups, &[]);
    assert!(!listed.stdout.contains('\u{1b}'), "{listed:?}");
    let image = listed.stdout.lines().find(|line| line.starts_with("a name")).unwrap();
    assert!(image.contains(r"\u{1b}[2J\n out of sight") && image.contains(": 2 points, "), "{image}");
    for line in listed.stdout.lines().filter(|line| *line != image) {
        assert!(line.chars().count() <= 80, "{line:?}");
    }
}

#[test]
fn a_size_that_changes_is_marked() {
    let backups = Backups::new();
    for (day, size) in [(1, 8 << 30), (2, (8 << 30) + 1), (3, (8 << 30) + 1), (4, 4 << 30)] {
        backups.add_sized("vm", "0123abcd", &format!("2024-11-0{day}T00:00:00Z"), size);
    }
    let sizes: Vec<_> = shape(&list(&backups, &[]))[3..7]
        .iter()
        .map(|line| line.split_whitespace().nth(5).unwrap().to_owned())
        .collect();
    assert_eq!(sizes, ["8.00", "↑8.00", "8.00", "↓4.00"]);
}

#[test]
fn several_chains_and_branches_are_told_apart() {
    let backups = Backups::new();
    let [first, second] = ["20241101T000000Z", "20241102T000000Z"];
    backups.add("vm", "0123abcd", "2024-11-01T00:00:00Z");
    backups.add("vm", "0123abcd", "2024-11-02T00:00:00Z");
    backups.add_upon(None, "vm", "89abcdef", "2024-11-03T00:00:00Z");
    backups.add_upon(Some(second), "vm", "0123abcd", "2024-11-04T00:00:00Z");
    backups.add_upon(Some(first), "vm", "0123abcd", "2024-11-05T00:00:00Z");
    backups.add_upon(Some("20241103T000000Z"), "vm", "89abcdef", "2024-11-06T00:00:00Z");
    let listed = list(&backups, &[]);
    assert_eq!(
        shape(&listed)[1..10],
        [
            "vm: 6 points in 2 chains",
            "├┬ chain 0123abcd: 4 points",
            "│├ 20241101T000000Z full 2024-11-01 00:00 977 KiB 3",
            "│├┬ 20241102T000000Z incr 2024-11-02 00:00 977 KiB 1",
            "││└ 20241104T000000Z incr 2024-11-04 00:00 977 KiB 0",
            "│└─ 20241105T000000Z incr 2024-11-05 00:00 977 KiB 0",
            "└┬ chain 89abcdef: 2 points",
            " ├ 20241103T000000Z full 2024-11-03 00:00 977 KiB 1",
            " └ 20241106T000000Z incr 2024-11-06 00:00 977 KiB 0",
        ]
    );
    let [warning] = warnings(&listed)[..] else { panic!("{listed:?}") };
    let old =
        r#"image "vm": chain 0123abcd is not continued since 20241105T000000Z; it holds 4 points, files of "#;
    assert!(warning.starts_with(old), "{warning}");
}

#[test]
fn what_runs_left_behind_is_told_unless_one_is_writing() {
    let backups = two_images();
    let directory = backups.image("db");
    fs::write(directory.join(".db@20241124T173307Z.qcow2.partial"), vec![1; 8192]).unwrap();
    fs::write(directory.join("db@20241124T173307Z.digests"), b"{}").unwrap();
    let listed = list(&backups, &[]);
    let [warning] = warnings(&listed)[..] else { panic!("{listed:?}") };
    assert!(warning.starts_with(r#"image "db": 2 files of a run that did not end, "#), "{warning}");
    assert!(warning.contains(".qcow2.partial") && warning.contains("the next backup of the image removes"));
    // Each of them is named to those who want to know more.
    let verbose = list(&backups, &["-v"]);
    assert!(verbose.stderr.contains("db@20241124T173307Z.digests is left over"), "{verbose:?}");

    let lock = ChainLock::exclusive(&directory).unwrap();
    let listed = list(&backups, &[]);
    let [warning] = warnings(&listed)[..] else { panic!("{listed:?}") };
    let pid = std::process::id();
    assert_eq!(
        warning,
        format!(
            r#"image "db": another run is writing this chain: process {pid}; what it makes is not listed yet"#
        )
    );
    drop(lock);
    let reader = ChainLock::shared(&directory).unwrap();
    assert!(list(&backups, &[]).stderr.contains("files of a run that did not end"));
    drop(reader);
    // A backup removes them, as was said.
    backups.add("db", "89abcdef", "2024-11-25T17:34:00Z");
    assert_eq!(list(&backups, &[]).stderr, "");
}

#[test]
fn what_was_left_half_merged_is_told_until_it_is_pruned() {
    let backups = Backups::new();
    let mut content: Vec<u8> = (0..1 << 20).map(|byte: u32| (byte / 7) as u8 | 1).collect();
    backups.fill("vm", "2024-11-22T17:33:12Z", &content, None);
    let old = content.clone();
    content[..4096].fill(9);
    backups.fill("vm", "2024-11-23T17:33:07Z", &content, Some(&old));
    backups.half_merge("vm");
    let listed = list(&backups, &[]);
    let [warning] = warnings(&listed)[..] else { panic!("{listed:?}") };
    assert_eq!(
        warning,
        "image \"vm\": point 20241123T173307Z is whole, but a run that was cut short has left the layer of another \
         point, which is gone, below it; the next `prune` of the image completes that"
    );
    assert!(!listed.stdout.contains("broken"), "{listed:?}");
    // Whoever prunes may be at it.
    let lock = ChainLock::exclusive(&backups.image("vm")).unwrap();
    assert!(!list(&backups, &[]).stderr.contains("cut short"));
    drop(lock);
    let pruned = run(&["prune", backups.path().to_str().unwrap(), "vm", "--keep-last", "9"]);
    assert_eq!(pruned.status, Some(0), "{pruned:?}");
    let listed = list(&backups, &[]);
    assert_eq!((listed.status, listed.stderr.as_str()), (Some(0), ""), "{listed:?}");
}

#[test]
fn a_first_backup_that_did_not_end_is_told() {
    let backups = Backups::new();
    let image = ImageName::new("vm").unwrap();
    let writer = ChainWriter::open(backups.path(), &image).unwrap();
    let snapshot = SnapshotName::parse("rbd2qcow2-0123abcd-20241122T173312Z").unwrap();
    let (fsid, pool, namespace) = (String::new(), "rbd".to_owned(), String::new());
    writer.announce(&Announcement { snapshot, fsid, pool, namespace }).unwrap();
    let running = list(&backups, &[]);
    assert!(running.stderr.contains("is writing this chain") && running.stderr.lines().count() == 1);
    drop(writer);
    let listed = list(&backups, &[]);
    let [note, empty] = warnings(&listed)[..] else { panic!("{listed:?}") };
    assert!(note.contains("the snapshot rbd2qcow2-0123abcd-20241122T173312Z, if it is there"), "{note}");
    assert_eq!(empty, r#"image "vm": no backup of it was completed yet"#);
    assert_eq!(listed.stdout, "vm: 0 points, files of 0 B\n\n1 image, 0 points, files of 0 B\n");
    assert_eq!(list(&backups, &["--json"]).stdout, "");
}

#[test]
fn a_point_to_come_is_told() {
    let backups = two_images();
    backups.add("db", "89abcdef", "2999-01-01T00:00:00Z");
    let listed = list(&backups, &[]);
    let [warning] = warnings(&listed)[..] else { panic!("{listed:?}") };
    let future =
        r#"image "db": a point is named in the future, the newest 29990101T000000Z; the clock was wrong"#;
    assert!(warning.starts_with(future), "{warning}");
}

#[test]
fn what_lacks_a_file_or_is_nobodys_is_told() {
    let backups = two_images();
    let directory = backups.image("db");
    fs::remove_file(directory.join("db@20241122T173400Z.digests")).unwrap();
    fs::write(directory.join("notes.txt"), b"").unwrap();
    fs::remove_file(backups.image("web/1").join("web%2F1@20241123T173307Z.json")).unwrap();
    fs::create_dir(backups.path().join("lost+found")).unwrap();
    let listed = list(&backups, &[]);
    for words in [
        "notes.txt does not belong to the chain",
        "db@20241122T173400Z.digests are missing, so the layer cannot be verified",
        "web%2F1@20241123T173307Z.json cannot be used (the layer can still be restored)",
    ] {
        assert!(
            listed.stderr.lines().any(|line| line.starts_with("warning: ") && line.contains(words)),
            "{words}"
        );
    }
    assert!(!listed.stderr.contains("lost+found"), "{listed:?}");
    assert!(list(&backups, &["-v"]).stderr.contains("lost+found is no directory of an image"));
}

#[test]
fn the_directory_of_an_image_is_no_destination() {
    let backups = two_images();
    for (image, word) in [("web/1", "web/1"), ("db", "db")] {
        let listed = run(&["list".as_ref(), backups.image(image).as_os_str()]);
        assert_eq!((listed.status, listed.stdout.as_str()), (Some(1), ""), "{listed:?}");
        let dest = backups.path().canonicalize().unwrap();
        let command = format!("; say `rbd2qcow2 list {} {word}`\n", dest.display());
        assert!(listed.stderr.starts_with("error: ") && listed.stderr.ends_with(&command), "{listed:?}");
        // To have verified nothing would be no success either.
        let verified = run(&["verify".as_ref(), backups.image(image).as_os_str()]);
        assert_eq!(verified.status, Some(1), "{verified:?}");
        assert!(verified.stderr.contains("is no destination"), "{verified:?}");
    }
}

#[test]
fn json_tells_each_point() {
    let backups = two_images();
    let listed = list(&backups, &["--json", "web/1"]);
    assert_eq!(listed.status, Some(0), "{listed:?}");
    let points = objects(&listed);
    assert_eq!(points.len(), 2, "{listed:?}");
    let point = &points[1];
    assert_eq!(point["image"], "web/1");
    assert_eq!(point["kind"], "incremental");
    assert_eq!(point["parent"], "20241122T173312Z");
    assert_eq!(point["created"], "2024-11-23T17:33:07Z");
    assert_eq!(point["virtual_size"], SIZE);
    assert!(point["layer_bytes"].as_u64().unwrap() > 0);
    let file = backups.image("web/1").join("web%2F1@20241123T173307Z.qcow2");
    assert_eq!(point["file"], file.to_str().unwrap());
    assert!(file.exists());
    assert_eq!(point["snapshot"], "rbd2qcow2-0123abcd-20241123T173307Z");
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
    let listed = list(&backups, &[]);
    assert_eq!(
        shape(&listed)[1..5],
        [
            "vm: 2 points",
            "└┬ chain of the Python rbd2qcow2: 2 points",
            " ├ 1700000000 full 2023-11-14 22:13 1.00 MiB 1",
            " └ 1700003600 incr 2023-11-14 23:13 1.00 MiB 0",
        ]
    );
    // What continues it is no multiple of a sector, and has not shrunk for all that.
    backups.add_sized("vm", "0123abcd", "2024-11-22T17:33:12Z", (1 << 20) - 1);
    let listed = shape(&list(&backups, &[]));
    assert_eq!(listed[2], "└┬ chain of the Python rbd2qcow2, continued as 0123abcd: 3 points");
    assert_eq!(listed[5], " └ 20241122T173312Z incr 2024-11-22 17:33 1.00 MiB 0");
}

#[test]
fn damage_is_a_warning() {
    let backups = two_images();
    fs::remove_file(backups.image("web/1").join("web%2F1@20241122T173312Z.qcow2")).unwrap();
    let listed = list(&backups, &["-q"]);
    assert_eq!(listed.status, Some(0), "{listed:?}");
    assert_eq!(
        shape(&listed)[5..8],
        [
            "web/1: 1 point",
            "└┬ chain 0123abcd (20241122T173312Z is missing): 1 point",
            " └ 20241123T173307Z incr 2024-11-23 17:33 977 KiB 0 broken",
        ]
    );
    let [warning, lost] = warnings(&listed)[..] else { panic!("{listed:?}") };
    assert!(warning.ends_with("builds upon point 20241122T173312Z, which is missing"), "{warning}");
    assert!(lost.starts_with("point 20241122T173312Z is lost: its layer "), "{lost}");
    assert!(lost.contains("is missing; point 20241123T173307Z needs it; bring that file back"), "{lost}");
}

#[test]
fn an_unknown_image_fails_and_the_others_are_listed() {
    let backups = two_images();
    let listed = list(&backups, &["web-1", "db"]);
    assert_eq!(listed.status, Some(1), "{listed:?}");
    assert!(listed.stdout.contains("20241122T173400Z"), "{listed:?}");
    assert!(listed.stderr.starts_with("error: "), "{listed:?}");
    assert!(listed.stderr.contains(r#""web-1"; did you mean "web/1"?"#), "{listed:?}");
}

#[test]
fn an_empty_directory_holds_nothing() {
    let backups = Backups::new();
    assert_eq!(list(&backups, &[]).stdout, "0 images, 0 points, files of 0 B\n");
    let json = list(&backups, &["--json"]);
    assert_eq!((json.status, json.stdout.as_str()), (Some(0), ""));
    // It may just not be mounted.
    let warning = format!("warning: {} is empty; is the file system mounted", backups.path().display());
    assert!(json.stderr.starts_with(&warning), "{json:?}");
    fs::create_dir(backups.path().join("lost+found")).unwrap();
    let listed = list(&backups, &[]);
    assert_eq!(listed.status, Some(0), "{listed:?}");
    assert!(listed.stderr.contains("holds no image's backups, only "), "{listed:?}");
    assert!(listed.stderr.contains("lost+found; is the file system mounted"), "{listed:?}");
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
    let backups = two_images();
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
    let backups = two_images();
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output =
        command().arg("list").arg(backups.path()).stdout(full).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.starts_with("error: cannot write to standard output\n  caused by: "), "{error}");
}

//! `verify`: on directories without a cluster, and on what a backup made.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use serde_json::Value;

use crate::cluster::unique_image;
use crate::cluster_or_skip;
use crate::directory::Backups;
use crate::driver::FULL_FEATURES;
use crate::program::{Run, run};
use crate::rig::{MIB, Rig};

fn verify(dest: &Path, args: &[&str]) -> Run {
    let mut words = vec!["verify", dest.to_str().unwrap()];
    words.extend(args);
    run(&words)
}

/// The lines of standard output, each a JSON object: point, status, number of errors.
fn objects(run: &Run) -> Vec<(String, String, usize)> {
    let lines = run.stdout.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    lines
        .map(|line| (text(&line["point"]), text(&line["status"]), line["errors"].as_array().unwrap().len()))
        .collect()
}

fn open_for_damage(path: &Path) -> File {
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

#[test]
fn whole_points_are_ok_for_people_and_programs() {
    let backups = Backups::of_two_images();
    let told = verify(backups.path(), &[]);
    assert_eq!((told.status, told.stderr.as_str()), (Some(0), ""), "{told:?}");
    let lines: Vec<_> = told.stdout.lines().collect();
    assert_eq!(lines.len(), 3, "{told:?}");
    assert!(lines[0].starts_with("db@20261122T173400Z: ok, "), "{told:?}");
    assert_eq!(verify(backups.path(), &["-q"]).stdout, "");
    let told = verify(backups.path(), &["--json", "web/1@20261123T173307Z", "db"]);
    let ok = |point: &str| (point.to_owned(), "ok".to_owned(), 0);
    assert_eq!(objects(&told), [ok("20261122T173400Z"), ok("20261123T173307Z")], "{told:?}");
    let first: Value = serde_json::from_str(told.stdout.lines().next().unwrap()).unwrap();
    let keys = r#"{"image":"db","point":"20261122T173400Z","status":"ok","checked_bytes":0,"errors":[]}"#;
    assert_eq!(told.stdout.lines().next().unwrap(), keys, "{first}");
}

#[test]
fn a_layer_that_is_cut_off_damages_what_builds_upon_it() {
    let backups = Backups::of_two_images();
    let layer = backups.image("web/1").join("web%2F1@20261122T173312Z.qcow2");
    let file = open_for_damage(&layer);
    file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    let told = verify(backups.path(), &[]);
    assert_eq!(told.status, Some(1), "{told:?}");
    let damaged: Vec<_> = told.stdout.lines().filter(|line| line.contains(": damaged, ")).collect();
    assert_eq!(damaged.len(), 2, "{told:?}");
    assert!(told.stdout.contains("web%2F1@20261122T173312Z.qcow2 is cut off"), "{told:?}");
    assert!(told.stdout.contains("db@20261122T173400Z: ok"), "{told:?}");
}

#[test]
fn unknown_names_are_told_and_the_others_verified() {
    let backups = Backups::of_two_images();
    for (asked, words) in [
        ("web/2", "did you mean \"web/1\"?"),
        ("web/2@20261122T173312Z", "did you mean \"web/1\"?"),
        ("web/1@yesterday", "names no point"),
        ("web/1@20261122T173313Z", "there is no point 20261122T173313Z"),
    ] {
        let told = verify(backups.path(), &[asked, "db"]);
        assert_eq!(told.status, Some(1), "{told:?}");
        assert!(told.stderr.contains(words), "{told:?}");
        assert!(told.stdout.contains("db@20261122T173400Z: ok"), "{told:?}");
    }
    let told = verify(&backups.path().join("absent"), &[]);
    assert_eq!((told.status, told.stdout.as_str()), (Some(1), ""), "{told:?}");
    for sample in ["0", "-1", "101", "NaN", "many"] {
        let told = verify(backups.path(), &["--sample", sample]);
        assert_eq!(told.status, Some(2), "{sample}: {told:?}");
    }
}

/// A proof of nothing is none.
#[test]
fn nothing_to_verify_is_no_success() {
    let backups = Backups::new();
    let dest = backups.path().display().to_string();
    for args in [&[][..], &["--json"], &["-q"], &["--sample", "5"]] {
        let told = verify(backups.path(), args);
        assert_eq!((told.status, told.stdout.as_str()), (Some(1), ""), "{args:?}: {told:?}");
        let words = format!("error: nothing was verified: {dest} is empty; is the file system mounted");
        assert!(told.stderr.starts_with(&words), "{args:?}: {told:?}");
    }
    fs::create_dir(backups.path().join("lost+found")).unwrap();
    let told = verify(backups.path(), &[]);
    assert_eq!(told.status, Some(1), "{told:?}");
    assert!(told.stderr.contains(&format!("only {dest}/lost+found; is the file system")), "{told:?}");
    // An image whose first backup never ended, alone and among others, named and not.
    fs::create_dir(backups.image("db")).unwrap();
    fs::write(backups.image("db").join(".lock"), "").unwrap();
    backups.add("web", "0123abcd", "2026-11-22T17:33:12Z");
    for args in [&[][..], &["--json"], &["db"], &["web", "db"], &["--sample", "5"]] {
        let told = verify(backups.path(), args);
        assert_eq!(told.status, Some(1), "{args:?}: {told:?}");
        let words = format!(r#"error: nothing of image "db" was verified: {dest}/db holds no points of it"#);
        assert!(told.stderr.contains(&words), "{args:?}: {told:?}");
        assert_eq!(told.stdout.contains("20261122T173312Z"), args != ["db"], "{args:?}: {told:?}");
    }
    assert_eq!(verify(backups.path(), &["web"]).status, Some(0));
    let told = verify(backups.path(), &["web", "nothing"]);
    assert_eq!(told.status, Some(1), "{told:?}");
}

#[test]
fn what_a_backup_made_is_ok_until_a_byte_of_it_changes() {
    let cluster = cluster_or_skip!("verify::what_a_backup_made_is_ok_until_a_byte_of_it_changes");
    let rig = Rig::new(&cluster);
    for (number, options) in
        [&[][..], &["--compression", "zstd"], &["--writer", "qemu-nbd"]].iter().enumerate()
    {
        let image = unique_image("verify");
        rig.image(&image, 8, FULL_FEATURES);
        rig.back_up(&image, options);
        // The last MiB shows the first layer no more.
        rig.change(&image, 6 * MIB, 2 * MIB, number as u64);
        rig.back_up(&image, options);
        let told = verify(rig.dest(), &["--json", &image.image]);
        assert_eq!(told.status, Some(0), "{told:?}");
        let points = objects(&told);
        assert!(points.len() == 2 && points.iter().all(|(_, status, _)| status == "ok"), "{told:?}");
        assert_eq!(verify(rig.dest(), &["--sample", "20", &image.image]).status, Some(0));

        // A byte in the middle of the first layer's data: of the first MiB, which all points show.
        let layers = rig.layers(&image);
        let bytes = fs::read(&layers[0]).unwrap();
        let mut truth = vec![0; 4096];
        File::open(rig.truth(&image, 0)).unwrap().read_exact_at(&mut truth, 512 << 10).unwrap();
        let at = bytes.windows(64).position(|window| window == &truth[..64]);
        // Compressed data are not found; any byte behind the tables will do.
        let at = at.unwrap_or(bytes.iter().rposition(|byte| *byte != 0).unwrap() / 2);
        let file = open_for_damage(&layers[0]);
        let changed = [bytes[at] ^ 0x10];
        file.write_all_at(&changed, at as u64).unwrap();
        let told = verify(rig.dest(), &["--json", &image.image]);
        assert_eq!(told.status, Some(1), "{told:?}");
        assert_eq!(objects(&told)[0].1, "damaged", "{told:?}");
        if !options.contains(&"zstd") {
            assert_eq!(objects(&told)[1].1, "damaged", "{told:?}");
            assert!(told.stdout.contains("are not what was backed up, in "), "{told:?}");
        }
        rig.driver.purge(&image).expect("removed");
    }
}

#[test]
fn points_are_compared_with_their_snapshots() {
    let cluster = cluster_or_skip!("verify::points_are_compared_with_their_snapshots");
    let rig = Rig::new(&cluster);
    let image = unique_image("verify-source");
    rig.image(&image, 8, FULL_FEATURES);
    rig.back_up(&image, &[]);
    rig.driver.snap_create(&image, "before").expect("a snapshot");
    rig.change(&image, MIB, MIB, 1);
    rig.back_up(&image, &["--keep-snapshots", "9"]);
    let conf = cluster.conf.to_str().expect("UTF-8");
    let source = |more: &[&str]| {
        let dest = rig.dest().to_str().expect("UTF-8");
        run(&[&["-c", conf, "verify", dest, &image.image, "--source"], more].concat())
    };
    let told = source(&[]);
    assert_eq!(told.status, Some(0), "{told:?}");
    assert_eq!(told.stdout.matches("the same as its snapshot").count(), 2, "{told:?}");
    let told = source(&["--json"]);
    assert_eq!(told.stdout.matches(r#""errors":[],"source":"same"}"#).count(), 2, "{told:?}");

    // What fast-diff misses after a rollback.
    rig.driver.rollback(&image, "before").expect("a rollback");
    rig.driver.close(&image).expect("closed");
    rig.back_up(&image, &["--diff", "fast", "--prove", "0"]);
    let told = source(&[]);
    assert_eq!(told.status, Some(1), "{told:?}");
    assert!(told.stdout.contains(": damaged, 0 B of data checked, different from its snapshot"), "{told:?}");
    assert!(told.stdout.contains("bytes 1048576..2097152 of the image differ from its snapshot"), "{told:?}");
    assert_eq!(told.stdout.matches(": ok, ").count(), 2, "{told:?}");
    // By the directory alone nobody can know.
    assert_eq!(verify(rig.dest(), &[&image.image]).status, Some(0));

    rig.driver.purge(&image).expect("removed");
    let told = source(&[]);
    assert_eq!(told.status, Some(0), "{told:?}");
    let not = "not compared with its snapshot (the image is not there any more)";
    assert_eq!(told.stdout.matches(not).count(), 3, "{told:?}");
    let dest = rig.dest().to_str().expect("UTF-8");
    let told = run(&["-c", "/dev/null", "verify", dest, "--source"]);
    assert_eq!((told.status, told.stdout.as_str()), (Some(1), ""), "{told:?}");
    assert!(told.stderr.contains("cannot connect to the cluster"), "{told:?}");
}

//! `prune`, `hold` and `release`: on directories without a cluster, and between backups.

use std::fs;
use std::path::Path;

use rbd2qcow2_core::chain::lock::ChainLock;
use serde_json::Value;

use crate::cluster::{say, unique_image};
use crate::cluster_or_skip;
use crate::directory::Backups;
use crate::driver::FULL_FEATURES;
use crate::killed::{Random, count};
use crate::program::{Run, command, run};
use crate::rig::{MIB, Rig};

/// Runs a command on a destination; the local time is that of Berlin, whatever the tester's is.
fn on(dest: &Path, words: &[&str]) -> Run {
    let (name, args) = words.split_first().unwrap();
    let mut command = command();
    command.arg(name).arg(dest).args(args).env("TZ", "CET-1CEST,M3.5.0,M10.5.0/3");
    command.output().unwrap().into()
}

/// Two chains of an image, the old one of two points, and another image of one point.
fn two_chains() -> Backups {
    let backups = Backups::new();
    backups.add("vm", "0123abcd", "2026-11-20T22:30:00Z");
    backups.add("vm", "0123abcd", "2026-11-21T23:30:00Z");
    backups.add_upon(None, "vm", "89abcdef", "2026-11-22T22:30:00Z");
    backups.add("db", "89abcdef", "2026-11-22T17:34:00Z");
    backups
}

/// The names of the files of an image's points.
fn files(backups: &Backups, image: &str) -> Vec<String> {
    let entries = fs::read_dir(backups.image(image)).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| !name.starts_with('.'));
    names.sort();
    names
}

#[test]
fn a_dry_run_tells_why_and_changes_nothing() {
    let backups = two_chains();
    let before = files(&backups, "vm");
    let told = on(backups.path(), &["prune", "--keep-last", "1", "--keep-daily", "1", "--dry-run"]);
    assert_eq!(told.status, Some(0), "{told:?}");
    assert_eq!(
        told.stdout,
        "db@20261122T173400Z: keep (newest, last, daily 2026-11-22)\n\
         vm@20261120T223000Z: remove (no rule keeps it)\n\
         vm@20261121T233000Z: remove (no rule keeps it)\n\
         vm@20261122T223000Z: keep (newest, last, daily 2026-11-22)\n"
    );
    assert!(told.stderr.starts_with("2 points would stay, 2 would be removed, "), "{told:?}");
    assert_eq!(files(&backups, "vm"), before);
    // Half past eleven in the evening UTC is the next day already, and so the same as that of the newest.
    let told = on(backups.path(), &["prune", "vm", "--keep-daily", "2", "--dry-run", "--json"]);
    let lines: Vec<Value> = told.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let reasons: Vec<_> = lines.iter().map(|line| line["reason"].as_str().unwrap()).collect();
    assert_eq!(reasons, ["daily 2026-11-20", "no rule keeps it", "newest, daily 2026-11-22"], "{told:?}");
    assert_eq!(lines[1]["merged_into"], Value::Null);
    assert_eq!(
        told.stdout.lines().next().unwrap(),
        r#"{"image":"vm","point":"20261120T223000Z","action":"keep","reason":"daily 2026-11-20","merged_into":null}"#
    );
}

#[test]
fn a_dry_run_tells_what_is_merged_where() {
    let backups = Backups::of_two_images();
    backups.add("web/1", "0123abcd", "2026-11-24T17:33:07Z");
    let told = on(backups.path(), &["prune", "web/1", "--keep-last", "1", "--dry-run", "--json"]);
    assert_eq!(told.status, Some(0), "{told:?}");
    let lines: Vec<Value> = told.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let into: Vec<_> = lines.iter().map(|line| line["merged_into"].as_str()).collect();
    assert_eq!(into, [Some("20261124T173307Z"), Some("20261124T173307Z"), None]);
    let told = on(backups.path(), &["prune", "web/1", "--keep-last", "1", "--dry-run"]);
    assert!(told.stdout.contains("remove, merged into 20261124T173307Z (no rule keeps it)"), "{told:?}");
    assert!(told.stderr.contains("0 B to "), "{told:?}");
}

/// Contents that follow each other: all alike but for some parts of each.
fn contents(count: u8) -> Vec<Vec<u8>> {
    let mut content: Vec<u8> =
        (0..2 << 20).map(|byte: u32| (byte.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let follow = |number: u8| {
        let at = usize::from(number) * 150_000;
        content[at..at + 300_000].fill(number);
        content.clone()
    };
    (0..count).map(follow).collect()
}

/// An image with a point for each content, and the names of these.
fn filled(contents: &[Vec<u8>]) -> (Backups, Vec<String>) {
    let backups = Backups::new();
    let mut base = None;
    let mut names = Vec::new();
    for (number, content) in contents.iter().enumerate() {
        backups.fill("vm", &format!("2026-11-{:02}T02:00:00Z", number + 1), content, base);
        names.push(format!("202611{:02}T020000Z", number + 1));
        base = Some(content.as_slice());
    }
    (backups, names)
}

/// What stock QEMU reads of a point.
fn read(backups: &Backups, point: &str) -> Vec<u8> {
    let raw = backups.path().join("raw");
    let layer = backups.image("vm").join(format!("vm@{point}.qcow2"));
    let mut convert = std::process::Command::new("qemu-img");
    convert.args(["convert", "-U", "-O", "raw"]).arg(layer).arg(&raw);
    assert!(convert.status().expect("qemu-img runs").success(), "{point}");
    let content = fs::read(&raw).unwrap();
    fs::remove_file(raw).unwrap();
    content
}

fn points(backups: &Backups) -> Vec<String> {
    let layers = files(backups, "vm").into_iter();
    layers.filter_map(|name| Some(name.strip_prefix("vm@")?.strip_suffix(".qcow2")?.to_owned())).collect()
}

#[test]
fn what_others_need_is_merged_into_them() {
    let contents = contents(4);
    let (backups, names) = filled(&contents);
    let of = |index: usize| format!("vm@{}", names[index]);
    let told = on(backups.path(), &["prune", &of(0), &of(2)]);
    assert_eq!(told.status, Some(0), "{told:?}");
    let line = format!("{}: removed, merged into {} (named)\n", of(2), names[3]);
    assert!(told.stdout.contains(&line), "{told:?}");
    assert_eq!(points(&backups), [names[1].as_str(), &names[3]]);
    for index in [1, 3] {
        assert!(read(&backups, &names[index]) == contents[index], "{}", names[index]);
    }
    assert_eq!(files(&backups, "vm").len(), 6);
    assert_eq!(on(backups.path(), &["verify"]).status, Some(0));
    let told = on(backups.path(), &["prune", "--keep-last", "1"]);
    assert_eq!((told.status, points(&backups)), (Some(0), vec![names[3].clone()]), "{told:?}");
    assert!(read(&backups, &names[3]) == contents[3]);
    assert_eq!(on(backups.path(), &["verify"]).status, Some(0));
}

#[test]
fn merges_are_told_when_they_are_done() {
    let contents = contents(4);
    let prune = |options: &[&str]| {
        let (backups, names) = filled(&contents);
        let points = [0, 2].map(|index: usize| format!("vm@{}", names[index]));
        let told = on(backups.path(), &[&["prune", &points[0], &points[1]], options].concat());
        assert_eq!(told.status, Some(0), "{told:?}");
        assert_eq!(told.stderr.matches("kept, 2 removed, ").count(), usize::from(options != ["-q"]));
        (told.stderr, names)
    };
    let (told, names) = prune(&[]);
    for point in [&names[1], &names[3]] {
        let lines: Vec<_> = told.lines().filter(|line| line.contains(point.as_str())).collect();
        let [line] = lines[..] else { panic!("{told}") };
        assert!(line.contains(&format!("INFO ] vm: merged into point {point}: copied, ")), "{line}");
        assert!(line.contains(" of data written in ") && !line.contains(", 0 B of data"), "{line}");
    }
    assert_eq!(told.lines().count(), 3, "{told}");
    let (told, names) = prune(&["-v"]);
    for (number, point) in [(1, &names[1]), (2, &names[3])] {
        assert!(told.contains(&format!("vm: merging into point {point} ({number} of 2)\n")), "{told}");
        assert!(told.contains(&format!("\nvm@{point}: prepare ")), "{told}");
    }
    for words in ["\n  verify  ", "\n  diff    ", "\n  reads   ", "\n  writes  "] {
        assert_eq!(told.matches(words).count(), 2, "{words:?}: {told}");
    }
    assert_eq!(prune(&["-q"]).0, "");
}

#[test]
fn merges_have_a_bar() {
    let (backups, names) = filled(&contents(3));
    let prune = ["prune", "--keep-last", "1", "--progress", "always"];
    let dry = on(backups.path(), &[&prune[..], &["--dry-run"]].concat());
    assert!(dry.status == Some(0) && dry.stderr.starts_with("1 point would stay"), "{dry:?}");
    assert!(dry.stderr.lines().count() == 1 && !dry.stderr.contains('\u{1b}'), "{dry:?}");
    let told = on(backups.path(), &prune);
    assert_eq!(told.status, Some(0), "{told:?}");
    for words in ["verifying ".to_owned(), format!("merging into {} (1 of 1)", names[2])] {
        assert!(told.stderr.contains(&words), "{words}: {told:?}");
    }
}

#[test]
fn what_a_run_left_half_merged_is_completed() {
    let contents = contents(3);
    let (backups, names) = filled(&contents);
    backups.half_merge("vm");
    assert!(read(&backups, &names[2]) == contents[2]);
    let told = on(backups.path(), &["prune", "--keep-last", "1", "--progress", "always", "-v"]);
    assert_eq!(told.status, Some(0), "{told:?}");
    assert!(told.stderr.contains("taking over in place "), "{told:?}");
    let line = format!("vm: merged into point {}: the large layer below reused", names[2]);
    assert!(told.stderr.contains(&line), "{told:?}");
    assert!(told.stderr.contains("\n  take over "), "{told:?}");
    assert!(read(&backups, &names[2]) == contents[2]);
    assert_eq!(files(&backups, "vm").len(), 3);
    assert_eq!(on(backups.path(), &["verify"]).status, Some(0));
}

#[test]
fn what_the_python_tool_began_is_pruned_and_stays_unverifiable() {
    let contents = contents(5);
    let backups = Backups::new();
    backups.fill_as_python("vm", 1_795_195_992, &contents[0], None);
    backups.fill_as_python("vm", 1_795_282_392, &contents[1], Some(&contents[0]));
    backups.fill_as_python("vm", 1_795_368_792, &contents[2], Some(&contents[1]));
    backups.fill("vm", "2026-11-23T02:00:00Z", &contents[3], Some(&contents[2]));
    backups.fill("vm", "2026-11-24T02:00:00Z", &contents[4], Some(&contents[3]));
    let [python, first, second] = ["1795368792", "20261123T020000Z", "20261124T020000Z"];
    let told = on(backups.path(), &["prune", "--keep-daily", "3"]);
    assert_eq!(told.status, Some(0), "{told:?}");
    let line = format!("vm@1795282392: removed, merged into {python} (no rule keeps it)\n");
    assert!(told.stdout.contains(&line), "{told:?}");
    assert!(told.stdout.contains(&format!("vm@{python}: kept (daily 2026-11-22)\n")), "{told:?}");
    assert_eq!(points(&backups), [python, first, second]);
    let told = on(backups.path(), &["list"]);
    assert_eq!((told.status, told.stderr.as_str()), (Some(0), ""), "{told:?}");
    assert!(
        told.stdout.contains("chain of the Python rbd2qcow2, continued as 0123abcd: 3 points"),
        "{told:?}"
    );
    let told = on(backups.path(), &["verify"]);
    assert_eq!((told.status, told.stdout.matches(": unverifiable, ").count()), (Some(0), 3), "{told:?}");
    let reason = format!(": there are no digests of {python}; the structure is sound\n");
    assert_eq!(told.stdout.matches(&reason).count(), 3, "{told:?}");

    let told = on(backups.path(), &["prune", &format!("vm@{python}")]);
    assert_eq!(told.status, Some(0), "{told:?}");
    assert_eq!(points(&backups), [first, second]);
    for (point, content) in [(first, &contents[3]), (second, &contents[4])] {
        assert!(read(&backups, point) == *content, "{point}");
    }
    let told = on(backups.path(), &["list"]);
    assert_eq!((told.status, told.stderr.as_str()), (Some(0), ""), "{told:?}");
    assert!(told.stdout.contains("chain 0123abcd: 2 points"), "{told:?}");
    let told = on(backups.path(), &["verify"]);
    let reason =
        format!(": {first} took over data of {python}, which never had digests; the structure is sound\n");
    assert_eq!((told.status, told.stdout.matches(&reason).count()), (Some(0), 2), "{told:?}");
    assert!(!told.stdout.contains(", 0 B of data checked"), "{told:?}");
    let told = on(backups.path(), &["verify", "--json", "-q"]);
    assert_eq!(told.stdout.matches(r#""status":"unverifiable""#).count(), 2, "{told:?}");
    assert_eq!(told.stdout.matches(r#""errors":[]}"#).count(), 2, "{told:?}");
}

#[test]
fn damage_is_told_and_nothing_merged() {
    let contents = contents(3);
    let (backups, names) = filled(&contents);
    let layer = backups.image("vm").join(format!("vm@{}.qcow2", names[1]));
    let mut bytes = fs::read(&layer).unwrap();
    let at = bytes.windows(4096).position(|window| window == [1; 4096]).unwrap();
    bytes[at + 100] ^= 1;
    fs::remove_file(&layer).unwrap();
    fs::write(&layer, bytes).unwrap();
    let told = on(backups.path(), &["prune", "--keep-last", "1"]);
    assert_eq!(told.status, Some(1), "{told:?}");
    assert!(told.stderr.contains(&format!("point {} is damaged", names[1])), "{told:?}");
    assert!(told.stderr.contains("are not what was backed up"), "{told:?}");
    assert_eq!(points(&backups), names);
    assert_eq!(on(backups.path(), &["verify"]).status, Some(1));
}

#[test]
fn killed_at_random_moments() {
    let mut random = Random::of_this_run("prune::killed_at_random_moments");
    let contents = contents(5);
    let mut longest = std::time::Duration::from_millis(50);
    let (mut killed, mut partly) = (0, 0);
    for round in 0..count(20) {
        let (backups, names) = filled(&contents);
        let mut prune = command();
        prune
            .arg("prune")
            .arg(backups.path())
            .args([&names[0], &names[2], &names[3]].map(|name| format!("vm@{name}")));
        let start = std::time::Instant::now();
        let mut child =
            prune.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap();
        if round == 0 {
            child.wait().unwrap();
            longest = start.elapsed();
        } else {
            std::thread::sleep(random.time_below(longest));
            child.kill().unwrap();
            killed += usize::from(child.wait().unwrap().code().is_none());
        }
        let there = points(&backups);
        for (name, content) in names.iter().zip(&contents) {
            assert!(!there.contains(name) || read(&backups, name) == *content, "{name} has changed");
        }
        assert!(there.contains(&names[1]) && there.contains(&names[4]), "{there:?}");
        partly += usize::from(there.len() < 5 || fs::read_dir(backups.image("vm")).unwrap().count() != 16);
        // The next run ends it.
        let told = on(backups.path(), &["prune", "vm", "--keep-last", "5"]);
        assert_eq!(told.status, Some(0), "{told:?}");
        let rest: Vec<_> =
            points(&backups).into_iter().filter(|name| *name != names[1] && *name != names[4]).collect();
        if !rest.is_empty() {
            let mut words = vec!["prune".to_owned()];
            words.extend(rest.iter().map(|name| format!("vm@{name}")));
            let told = on(backups.path(), &words.iter().map(String::as_str).collect::<Vec<_>>());
            assert_eq!(told.status, Some(0), "{told:?}");
        }
        assert_eq!(points(&backups), [names[1].as_str(), &names[4]]);
        for index in [1, 4] {
            assert!(read(&backups, &names[index]) == contents[index], "{}", names[index]);
        }
        assert_eq!(on(backups.path(), &["verify"]).status, Some(0));
    }
    say(&format!("prune::killed_at_random_moments: {killed} killed, {partly} had begun"));
    assert!(killed > 0, "no run was still alive when it was to be killed");
}

#[test]
fn an_old_chain_is_removed() {
    let backups = two_chains();
    let told = on(backups.path(), &["prune", "--keep-last", "1"]);
    assert_eq!(told.status, Some(0), "{told:?}");
    assert!(told.stdout.contains("vm@20261120T223000Z: removed (no rule keeps it)\n"), "{told:?}");
    assert!(told.stderr.starts_with("2 points kept, 2 removed, "), "{told:?}");
    let left = [".digests", ".json", ".qcow2"].map(|suffix| format!("vm@20261122T223000Z{suffix}"));
    assert_eq!(files(&backups, "vm"), left);
    assert_eq!(files(&backups, "db").len(), 3);
    let again = on(backups.path(), &["prune", "--keep-last", "1", "-q"]);
    assert_eq!((again.status, again.stdout.as_str(), again.stderr.as_str()), (Some(0), "", ""));
    assert_eq!(on(backups.path(), &["verify"]).status, Some(0));
}

#[test]
fn single_points_are_removed() {
    let backups = two_chains();
    let told = on(backups.path(), &["prune", "vm@20261121T233000Z"]);
    assert_eq!(told.status, Some(0), "{told:?}");
    assert_eq!(
        told.stdout,
        "vm@20261120T223000Z: kept (not named)\n\
         vm@20261121T233000Z: removed (named)\n\
         vm@20261122T223000Z: kept (newest, not named)\n"
    );
    assert_eq!(files(&backups, "vm").len(), 6);
    for (asked, words) in [
        ("vm@20261122T223000Z", "is its newest"),
        ("vm@20261120T223001Z", "did you mean \"20261120T223000Z\""),
        ("vm@yesterday", "names no point"),
        ("vm2", "did you mean \"vm\"?"),
    ] {
        let told = on(backups.path(), &["prune", asked, "db", "--keep-last", "1"]);
        assert_eq!(told.status, Some(1), "{told:?}");
        assert!(told.stderr.contains(words), "{told:?}");
        assert_eq!(told.stdout, "db@20261122T173400Z: kept (newest, last)\n");
    }
    assert_eq!(files(&backups, "vm").len(), 6);
}

#[test]
fn rules_and_points_that_do_not_go_together_are_wrong_usage() {
    let backups = two_chains();
    for (words, said) in [
        (&["prune"][..], "nothing tells which points to keep"),
        (&["prune", "--keep-last", "0"], "nothing tells which points to keep"),
        (&["prune", "vm", "--keep-daily", "0"], "nothing tells which points of image \"vm\""),
        (&["prune", "vm@20261121T233000Z", "--keep-last", "1"], "only single points are named"),
        (&["hold", "vm", "--reason", "x"], "must be IMAGE@POINT"),
        (&["hold", "vm@20261121T233000Z"], "--reason"),
    ] {
        let told = on(backups.path(), words);
        assert_eq!((told.status, told.stdout.as_str()), (Some(2), ""), "{told:?}");
        assert!(told.stderr.contains(said), "{told:?}");
    }
    assert_eq!(files(&backups, "vm").len(), 9);
}

#[test]
fn a_point_that_is_held_stays_until_it_is_released() {
    let backups = two_chains();
    let point = "vm@20261121T233000Z";
    let told = on(backups.path(), &["hold", point, "--reason", "before the upgrade"]);
    assert_eq!((told.status, told.stdout.as_str()), (Some(0), ""), "{told:?}");
    assert_eq!(told.stderr, format!("{point}: held (before the upgrade)\n"));
    let listed = on(backups.path(), &["list", "vm"]);
    let line = listed.stdout.lines().find(|line| line.contains("20261121T233000Z")).unwrap();
    assert!(line.ends_with("  held"), "{listed:?}");
    assert_eq!(listed.stdout.matches("held").count(), 1, "{listed:?}");
    assert!(!on(backups.path(), &["list", "vm", "--json"]).stdout.contains("held"));

    let told = on(backups.path(), &["prune", point]);
    assert_eq!(told.status, Some(1), "{told:?}");
    assert!(told.stderr.contains("is held (\"before the upgrade\")"), "{told:?}");
    let told = on(backups.path(), &["prune", "vm", "--keep-last", "1", "--dry-run"]);
    assert!(told.stdout.contains(&format!("{point}: keep (held: before the upgrade)\n")), "{told:?}");
    assert_eq!(on(backups.path(), &["verify"]).status, Some(0));

    let told = on(backups.path(), &["release", point, "--json", "-q"]);
    assert_eq!((told.status, told.stderr.as_str()), (Some(0), ""), "{told:?}");
    let line: Value = serde_json::from_str(&told.stdout).unwrap();
    assert_eq!((&line["held"], &line["reason"]), (&Value::Bool(false), &"before the upgrade".into()));
    let again = on(backups.path(), &["release", point]);
    assert_eq!(again.status, Some(1), "{again:?}");
    assert!(again.stderr.contains("is not held"), "{again:?}");
    assert_eq!(on(backups.path(), &["prune", "vm", "--keep-last", "1"]).status, Some(0));
    assert_eq!(files(&backups, "vm").len(), 3);
    let unknown = on(backups.path(), &["hold", point, "--reason", "x"]);
    assert_eq!(unknown.status, Some(1), "{unknown:?}");
    assert!(unknown.stderr.contains("has no point 20261121T233000Z; did you mean "), "{unknown:?}");
}

#[test]
fn an_image_in_use_is_left_for_the_next_run() {
    let backups = two_chains();
    backups.add_upon(None, "db", "0123abcd", "2026-11-23T17:34:00Z");
    let lock = ChainLock::shared(&backups.image("vm")).unwrap();
    let told = on(backups.path(), &["prune", "--keep-last", "1"]);
    assert_eq!(told.status, Some(1), "{told:?}");
    assert!(told.stderr.contains("image \"vm\" is left for the next run"), "{told:?}");
    assert!(told.stderr.contains("another run is reading this chain"), "{told:?}");
    assert_eq!((files(&backups, "vm").len(), files(&backups, "db").len()), (9, 3));
    // Neither a look nor an image of which nothing goes waits for anybody.
    assert_eq!(on(backups.path(), &["prune", "--keep-last", "1", "--dry-run"]).status, Some(0));
    assert_eq!(on(backups.path(), &["prune", "--keep-within", "1y"]).status, Some(0));
    drop(lock);
    assert_eq!(on(backups.path(), &["prune", "--keep-last", "1"]).status, Some(0));
    assert_eq!(files(&backups, "vm").len(), 3);
}

#[test]
fn nothing_of_a_broken_image_is_removed_and_the_others_are_pruned() {
    let backups = two_chains();
    backups.add_upon(None, "db", "0123abcd", "2026-11-23T17:34:00Z");
    fs::remove_file(backups.image("vm").join("vm@20261120T223000Z.qcow2")).unwrap();
    let left = files(&backups, "vm");
    let told = on(backups.path(), &["prune", "--keep-last", "1"]);
    assert_eq!(told.status, Some(1), "{told:?}");
    assert!(told.stderr.contains("nothing of it is pruned"), "{told:?}");
    assert!(
        told.stderr.contains("vm@20261121T233000Z.qcow2 builds upon point 20261120T223000Z, which"),
        "{told:?}"
    );
    assert_eq!(files(&backups, "vm"), left);
    assert_eq!(files(&backups, "db").len(), 3);
}

#[test]
fn help_tells_the_rules() {
    let help = run(&["prune", "--help"]);
    for words in ["--keep-within", "--keep-yearly", "restic forget", "newest point of an image always stays"]
    {
        assert!(help.stdout.contains(words), "{words}: {help:?}");
    }
}

#[test]
fn backups_go_on_after_an_old_chain_is_gone_and_so_do_its_snapshots() {
    let cluster = cluster_or_skip!("prune::backups_go_on_after_an_old_chain_is_gone_and_so_do_its_snapshots");
    let rig = Rig::new(&cluster);
    let image = unique_image("prune");
    rig.image(&image, 8, FULL_FEATURES);
    for full in
        [&["--keep-snapshots", "9"][..], &["--keep-snapshots", "9"], &["--keep-snapshots", "9", "--full"]]
    {
        rig.change(&image, 0, MIB, 1);
        rig.back_up(&image, full);
    }
    assert_eq!(rig.snapshots(&image).len(), 3);
    let told = on(rig.dest(), &["prune", "--keep-last", "1"]);
    assert_eq!(told.status, Some(0), "{told:?}");
    assert_eq!((rig.layers(&image).len(), rig.snapshots(&image).len()), (1, 3));
    rig.change(&image, MIB, MIB, 2);
    let told = rig.back_up(&image, &[]);
    assert!(told.stderr.contains(": incremental, "), "{told:?}");
    rig.assert_only_the_newest_snapshot(&image);
    let told = on(rig.dest(), &["verify", "--source", "-c", rig.conf.to_str().unwrap()]);
    assert_eq!(told.status, Some(0), "{told:?}");
}

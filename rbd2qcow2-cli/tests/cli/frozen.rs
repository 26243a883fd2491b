//! A cluster, or a disk, that gives no answer: the program gives up in time, stops when it is told
//! to, and the next run finds nothing in its way.
//!
//! Each test has a cluster of its own, because it freezes parts of it.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::process::{Signal, kill_process};
use serde_json::json;

use crate::cluster::{OwnCluster, say, unique_image};
use crate::cluster_or_skip;
use crate::driver::{FULL_FEATURES, Spec};
use crate::program;
use crate::rig::{MIB, Rig, Running, STOP_LIMIT, WRITERS, assert_point, wait_for, with};

/// Size of the images in MiB; every other one holds data.
const SIZE: u64 = 24;

/// Reads slowly enough to be met in the middle.
const SLOW: &[&str] = &["--rate-limit", "4M"];

/// With an answer to be had within two seconds.
const HASTY: &[&str] = &["--rate-limit", "4M", "--timeout", "2"];

fn image(rig: &Rig, name: &str) -> Spec {
    let image = unique_image(name);
    rig.image(&image, SIZE, FULL_FEATURES);
    image
}

/// Waits for its end, which must come soon, and tells how long that took.
fn ends_soon(what: &str, running: Running, status: i32) -> program::Run {
    let (run, time) = running.wait_timed();
    say(&format!("{what}: ended after {time:?}"));
    assert_eq!(run.status, Some(status), "{what}: {run:?}");
    assert!(time < STOP_LIMIT, "{what}: {time:?}");
    run
}

/// The next run makes a point that equals `truth`, and leaves nothing else.
fn recovers(rig: &Rig, image: &Spec, truth: &Path) {
    rig.assert_no_process();
    rig.back_up(image, &[]);
    assert_point(rig.layers(image).last().expect("a point"), truth);
    rig.assert_tidy(image);
    rig.assert_only_the_newest_snapshot(image);
}

#[test]
fn an_osd() {
    let _cluster = cluster_or_skip!("frozen::an_osd");
    let own = OwnCluster::start();
    let rig = Rig::new(&own.cluster);
    let image = image(&rig, "osd");
    let truth = rig.truth(&image, 0);

    // Gone and back: the reads wait.
    let mut running = rig.start_copy(&[&image], SLOW);
    own.stop_osd();
    std::thread::sleep(Duration::from_secs(1));
    assert!(!running.has_ended(), "it did not need the OSD");
    own.start_osd();
    let run = running.wait();
    assert_eq!(run.status, Some(0), "{run:?}");
    assert_point(rig.layers(&image).last().expect("a point"), &truth);
    rig.assert_tidy(&image);

    // Stopped by the user while reads hang.
    rig.change(&image, 0, 16 * MIB, 1);
    let truth = rig.truth(&image, 1);
    let [native, qemu_nbd] = WRITERS;
    for (signal, writer) in
        [(Signal::INT, native), (Signal::TERM, qemu_nbd), (Signal::TERM, native), (Signal::INT, qemu_nbd)]
    {
        let points = rig.layers(&image);
        let running = rig.start_copy(&[&image], &with(SLOW, writer));
        own.pause_osd();
        std::thread::sleep(Duration::from_millis(500));
        running.signal(signal);
        let run = ends_soon(&format!("{signal:?} while an OSD is frozen, {writer:?}"), running, 130);
        assert!(run.stderr.contains("interrupted"), "{}", run.stderr);
        assert_eq!(rig.layers(&image), points);
        // The snapshot cannot go away now, the files can.
        rig.assert_tidy(&image);
        rig.assert_no_process();
        own.resume_osd();
    }
    recovers(&rig, &image, &truth);

    // A second signal does not wait for anything.
    rig.change(&image, 0, 16 * MIB, 2);
    let truth = rig.truth(&image, 2);
    for writer in WRITERS {
        let running = rig.start_copy(&[&image], &with(SLOW, writer));
        own.pause_osd();
        running.signal(Signal::INT);
        std::thread::sleep(Duration::from_millis(300));
        running.signal(Signal::INT);
        ends_soon(&format!("the second SIGINT, {writer:?}"), running, 130);
        own.resume_osd();
    }
    recovers(&rig, &image, &truth);
}

/// An image whose data is on an OSD that gives no answer must not keep others from their backups.
#[test]
fn one_osd_of_two() {
    let _cluster = cluster_or_skip!("frozen::one_osd_of_two");
    let own = OwnCluster::start_with(2);
    let rig = Rig::new(&own.cluster);
    // Each OSD gets a class of its own, and a pool that is on nothing else.
    let ask = |command: serde_json::Value| rig.driver.mon_command(&command).expect("done");
    for (osd, class, pool) in [("osd.0", "well", "rbd"), ("osd.1", "ill", "data")] {
        ask(json!({"prefix": "osd crush rm-device-class", "ids": [osd]}));
        ask(json!({"prefix": "osd crush set-device-class", "class": class, "ids": [osd]}));
        let rule = json!({"prefix": "osd crush rule create-replicated", "name": class, "root": "default",
            "type": "osd", "class": class});
        ask(rule);
        if pool != "rbd" {
            rig.driver.pool_create(pool).expect("created");
        }
        ask(json!({"prefix": "osd pool set", "pool": pool, "var": "crush_rule", "val": class}));
    }
    let (well, ill) = (image(&rig, "well"), unique_image("ill"));
    let mut create = Command::new("rbd");
    create.arg("-c").arg(&rig.conf).args(["create", "--data-pool", "data", "--size", "24"]).arg(&ill.image);
    let created = create.output().expect("rbd is installed");
    assert!(created.status.success(), "{}", String::from_utf8_lossy(&created.stderr));
    rig.change(&ill, 0, 16 * MIB, 1);
    let truths = [&well, &ill].map(|image| rig.truth(image, 0));

    own.pause_osd_number(1);
    // One after the other, the one that fails first.
    let mut arguments = HASTY.to_vec();
    arguments.extend(["--jobs", "1", "--json"]);
    let run = Running::start(rig.backup_to(rig.dest(), &[&ill, &well], &arguments)).wait();
    assert_eq!(run.status, Some(1), "{run:?}");
    assert!(run.stderr.contains("gave no answer for 2 s"), "{}", run.stderr);
    let lines: Vec<serde_json::Value> =
        run.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let statuses: Vec<_> = lines.iter().map(|line| &line["status"]).collect();
    assert_eq!(statuses, ["failed", "ok"], "{}", run.stdout);
    assert_point(rig.layers(&well).last().expect("a point"), &truths[0]);
    rig.assert_tidy(&well);
    assert_eq!(rig.layers(&ill), [""; 0].map(std::path::PathBuf::from));
    rig.assert_no_process();
    own.resume_osd_number(1);
    recovers(&rig, &ill, &truths[1]);
}

#[test]
fn the_monitors() {
    let _cluster = cluster_or_skip!("frozen::the_monitors");
    let own = OwnCluster::start();
    let rig = Rig::new(&own.cluster);
    let (first, second) = (image(&rig, "first"), image(&rig, "second"));
    let truths = [&first, &second].map(|image| rig.truth(image, 0));

    // Not there from the start.
    own.pause_mon();
    let running = Running::start(rig.backup(&first, HASTY));
    let run = ends_soon("no monitor", running, 1);
    assert!(run.stderr.contains("are the monitors reachable?"), "{}", run.stderr);
    let running = Running::start(rig.backup(&first, SLOW));
    std::thread::sleep(Duration::from_millis(500));
    running.signal(Signal::TERM);
    ends_soon("SIGTERM while connecting", running, 130);
    own.resume_mon();
    assert!(!rig.directory(&first).exists());

    // Gone before the second image's snapshot is taken.
    let both = |arguments: &[&str]| {
        let running = rig.start_copy(&[&first, &second], &with(arguments, &["--jobs", "1", "--full"]));
        own.pause_mon();
        let note = rig.directory(&second).join(".pending.json");
        wait_for("note about a snapshot", || note.exists().then_some(()));
        running
    };
    let running = both(SLOW);
    std::thread::sleep(Duration::from_millis(300));
    running.signal(Signal::INT);
    let run = ends_soon("SIGINT while a snapshot is taken", running, 130);
    assert!(run.stderr.contains("1 ok, 0 skipped, 1 failed"), "{}", run.stderr);
    own.resume_mon();
    assert_point(rig.layers(&first).last().expect("a point"), &truths[0]);
    recovers(&rig, &second, &truths[1]);

    let run = ends_soon_after_limit(both(&with(HASTY, WRITERS[1])));
    assert!(
        run.stderr.contains("create snapshot") && run.stderr.contains("gave no answer for 2 s"),
        "{run:?}"
    );
    own.resume_mon();
    recovers(&rig, &first, &truths[0]);
    recovers(&rig, &second, &truths[1]);

    // The request for a snapshot is given up, and comes true all the same, before the run ends.
    let others = ["third", "fourth", "fifth"].map(|name| self::image(&rig, name));
    let truth = rig.truth(&others[1], 0);
    let mut running = rig.start_copy(&others.each_ref(), &with(HASTY, &["--jobs", "1"]));
    own.pause_mon();
    running.wait_for_words("create snapshot");
    own.resume_mon();
    let run = running.wait();
    assert_eq!(run.status, Some(1), "{run:?}");
    say(&format!("a request that was given up left the snapshots {:?}", rig.snapshots(&others[1])));
    recovers(&rig, &others[1], &truth);
}

/// As [`ends_soon`], for a run that gives up by itself: each wait has its limit.
fn ends_soon_after_limit(running: Running) -> program::Run {
    let (run, time) = running.wait_timed();
    say(&format!("a snapshot that is not taken: given up after {time:?}"));
    assert_eq!(run.status, Some(1), "{run:?}");
    run
}

/// qemu-nbd stands for the disk here: one that hangs hangs qemu-nbd. What a disk does to a thread of
/// this program is in `disks`.
#[test]
fn the_disk_of_qemu_nbd() {
    let cluster = cluster_or_skip!("frozen::the_disk_of_qemu_nbd");
    let rig = Rig::new(&cluster);
    let image = image(&rig, "disk");
    let truth = rig.truth(&image, 0);
    // In the middle of the copy, and when all is read and waits to be written.
    for rate in ["4M", "24M"] {
        let arguments = with(WRITERS[1], &["--rate-limit", rate]);
        let mut running = rig.start_copy(&[&image], &arguments);
        kill_process(rig.wait_for_qemu_nbd(), Signal::STOP).expect("it runs");
        std::thread::sleep(Duration::from_millis(1500));
        assert!(!running.has_ended(), "it did not need qemu-nbd");
        running.signal(Signal::INT);
        ends_soon("SIGINT while qemu-nbd is frozen", running, 130);
        rig.assert_no_process();
        rig.assert_tidy(&image);
        assert_eq!(rig.snapshots(&image), [""; 0]);
    }
    recovers(&rig, &image, &truth);
    rig.driver.purge(&image).expect("removed");
}

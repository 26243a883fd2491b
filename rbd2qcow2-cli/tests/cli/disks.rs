//! Disks that are full, read-only, limited or hang: a clear error, and nothing lost or left.

use std::path::Path;
use std::process::Command;

use rustix::process::Signal;

use crate::cluster::{TestCluster, say, unique_image};
use crate::cluster_or_skip;
use crate::driver::{FULL_FEATURES, Spec};
use crate::faults::{Scene, fails};
use crate::mount::Mount;
use crate::rig::{MIB, Rig, Running, STOP_LIMIT, WRITERS, assert_point, wait_for, with};

/// Size of the images in MiB; every other one holds data.
const SIZE: u64 = 16;

/// Mounts an ext4 of 64 MiB on a loop device that needs no file once it is there.
const EXT4: &str = "truncate -s 64M \"$d/ext4\" && mkfs.ext4 -q -m 0 \"$d/ext4\" && \
    mount -o loop \"$d/ext4\" \"$d\" && rmdir \"$d/lost+found\"";

/// Mounts 64 MiB of memory.
const TMPFS: &str = "mount -t tmpfs -o size=64m tmpfs \"$d\"";

/// A rig whose destination is a file system of its own, and an image without a point.
fn rig_on(test: &str, cluster: &TestCluster, mount: &str) -> Option<(Rig, Spec)> {
    if mount == EXT4 && !has_loop_devices() {
        // Not skip(), which fails where tools are required: no package brings them to a machine.
        say(&format!("SKIPPED {test}, as far as it needs one: this machine has no loop device"));
        return None;
    }
    let (mut rig, image) = (Rig::new(cluster), unique_image("disk"));
    rig.mount = Some(Mount::new(test, rig.dest(), mount)?);
    rig.image(&image, SIZE, FULL_FEATURES);
    Some((rig, image))
}

/// Whether a file can be mounted as a disk. Some containers do not have that.
pub fn has_loop_devices() -> bool {
    let try_it = "d=$(mktemp -d) && trap 'rm -rf \"$d\"' EXIT && truncate -s 4M \"$d/ext4\" && \
        mkfs.ext4 -q \"$d/ext4\" && mkdir \"$d/mnt\" && mount -o loop \"$d/ext4\" \"$d/mnt\" && umount \"$d/mnt\"";
    let output = Command::new("unshare").args(["-m", "sh", "-c", try_it]).output();
    output.is_ok_and(|output| output.status.success())
}

fn on_disk(rig: &mut Rig, command: &str) {
    rig.mount.as_mut().expect("it was mounted").run(command);
}

/// Nothing is left of a run that failed before the image's first point.
fn assert_nothing(rig: &Rig, image: &Spec) {
    rig.assert_no_process();
    rig.assert_tidy(image);
    assert_eq!(rig.layers(image), [""; 0].map(std::path::PathBuf::from));
    assert_eq!(rig.snapshots(image), [""; 0]);
}

/// The newest point is what the image was, and nothing else is there.
fn assert_newest(rig: &Rig, image: &Spec, truth: &Path) {
    assert_point(rig.layers(image).last().expect("a point"), truth);
    rig.assert_tidy(image);
    rig.assert_only_the_newest_snapshot(image);
}

#[test]
fn a_read_only_destination_is_told() {
    const TEST: &str = "disks::a_read_only_destination_is_told";
    let cluster = cluster_or_skip!(TEST);
    let mut scene = Scene::new(&cluster, "read-only");
    let read_only = "mount --bind \"$d\" \"$d\" && mount -o remount,bind,ro \"$d\"";
    let Some(mount) = Mount::new(TEST, scene.rig.dest(), read_only) else { return };
    scene.rig.mount = Some(mount);
    scene.fails(scene.rig.backup(&scene.image, &[]), &["cannot be written to", "read-only"]);
}

#[test]
fn a_full_disk_keeps_nothing() {
    const TEST: &str = "disks::a_full_disk_keeps_nothing";
    let cluster = cluster_or_skip!(TEST);
    let [native, qemu_nbd] = WRITERS;
    let packed = with(native, &["--compression", "zstd"]);
    for (mount, writer) in [(TMPFS, native), (TMPFS, &packed), (TMPFS, qemu_nbd), (EXT4, native)] {
        let Some((mut rig, image)) = rig_on(TEST, &cluster, mount) else { return };
        let truth = rig.truth(&image, 0);
        on_disk(
            &mut rig,
            "fallocate -l $(($(df --output=avail -B1 \"$d\" | tail -n 1) - 3000000)) \"$d/big\"",
        );
        let layer = rig.dest().join(&image.image).join(format!(".{}@", image.image));
        let layer = format!("the layer {}", layer.display());
        fails(rig.backup(&image, writer), &["No space left on device", &layer]);
        assert_nothing(&rig, &image);
        on_disk(&mut rig, "rm \"$d/big\"");
        rig.back_up(&image, writer);
        assert_newest(&rig, &image, &truth);
        rig.driver.purge(&image).expect("removed");
    }
}

/// Whatever it is that finds no space: data, tables, header, digests or manifest.
#[test]
fn wherever_the_space_ends() {
    const TEST: &str = "disks::wherever_the_space_ends";
    let cluster = cluster_or_skip!(TEST);
    let Some((mut rig, image)) = rig_on(TEST, &cluster, TMPFS) else { return };
    let truth = rig.truth(&image, 0);
    let mut failures = Vec::new();
    for pages in 0.. {
        on_disk(&mut rig, &format!("mount -o remount,size={} \"$d\"", SIZE / 2 * MIB + pages * 4096));
        let run = Running::start(rig.backup(&image, &[])).wait();
        if run.status == Some(0) {
            break;
        }
        assert_eq!(run.status, Some(1), "{run:?}");
        assert!(run.stderr.contains("No space left on device"), "{}", run.stderr);
        assert_nothing(&rig, &image);
        let what = run.stderr.split("failed after").nth(1).and_then(|text| text.split('\n').next());
        let what = what.and_then(|text| text.split_once(": ")).expect("a reason").1;
        failures.push(what.split(" /").next().expect("words").to_owned());
        assert!(pages < 100, "it never fits: {failures:?}");
    }
    assert_newest(&rig, &image, &truth);
    failures.dedup();
    say(&format!("{TEST}: {failures:?}"));
    assert!(failures.len() > 1, "the space has always ended at the same place: {failures:?}");
    rig.driver.purge(&image).expect("removed");
}

#[test]
fn a_limit_on_the_size_of_files() {
    const TEST: &str = "disks::a_limit_on_the_size_of_files";
    let cluster = cluster_or_skip!(TEST);
    let (rig, image) = (Rig::new(&cluster), unique_image("limit"));
    rig.image(&image, SIZE, FULL_FEATURES);
    let truth = rig.truth(&image, 0);
    let limited = |limit: u64, writer: &[&str]| {
        let backup = rig.backup(&image, writer);
        let mut command = Command::new("prlimit");
        command.arg(format!("--fsize={limit}")).arg("--").arg(backup.get_program()).args(backup.get_args());
        command
    };
    let [native, qemu_nbd] = WRITERS;
    // qemu-nbd is killed by SIGXFSZ, or says that there is no space, as it happens.
    for (writer, words) in [(native, "File too large"), (qemu_nbd, "qemu-nbd")] {
        fails(limited(3 * MIB, writer), &["cannot write the layer", words]);
        assert_nothing(&rig, &image);
    }
    // A file that stays below the limit is made, though files grow ahead of what is written to them.
    let run = Running::start(limited((SIZE / 2 + 1) * MIB, native)).wait();
    assert_eq!(run.status, Some(0), "{run:?}");
    assert_newest(&rig, &image, &truth);
    rig.driver.purge(&image).expect("removed");
}

/// A thread that writes to a disk that hangs is in the kernel's hands, and so is the process: no
/// signal ends it, not even SIGKILL. But it ends as soon as the disk lets it.
#[test]
fn a_disk_that_hangs() {
    const TEST: &str = "disks::a_disk_that_hangs";
    let cluster = cluster_or_skip!(TEST);
    let Some((mut rig, image)) = rig_on(TEST, &cluster, EXT4) else { return };
    let truth = rig.truth(&image, 0);
    let [native, qemu_nbd] = WRITERS;
    let (stop, end): (&[Signal], &[Signal]) = (&[Signal::INT], &[Signal::INT, Signal::TERM]);
    // The second signal ends the process at once, as far as the kernel lets it.
    let cases = [
        (native, stop, Some(130)),
        (native, end, Some(130)),
        (native, &[Signal::KILL], None),
        (native, &[], Some(0)),
        (qemu_nbd, stop, Some(130)),
        (qemu_nbd, end, Some(130)),
    ];
    for (writer, signals, status) in cases {
        let points = rig.layers(&image);
        let mut running = rig.start_copy(&[&image], &with(writer, &["--full", "--rate-limit", "4M"]));
        on_disk(&mut rig, "fsfreeze -f \"$d\"");
        wait_for("thread that hangs", || rig.thread_states().contains('D').then_some(()));
        signals.iter().for_each(|&signal| running.signal(signal));
        if signals.len() == 2 || signals == [Signal::KILL] {
            // What is left is what the kernel holds.
            let have_gone = |states: String| states.chars().all(|state| "DXZ".contains(state));
            wait_for("end of all else", || have_gone(rig.thread_states()).then_some(()));
        }
        let (states, ended) = (rig.thread_states(), running.has_ended());
        on_disk(&mut rig, "fsfreeze -u \"$d\"");
        let (run, time) = running.wait_timed();
        let what = format!("{signals:?} while the disk of {writer:?} hangs");
        say(&format!("{what}: ended {ended}, threads {states}; {time:?} after it came back"));
        assert_eq!(run.status, status, "{what}: {run:?}");
        assert!(time < STOP_LIMIT, "{what}: {time:?}");
        rig.assert_no_process();
        if status == Some(0) {
            assert_newest(&rig, &image, &truth);
        } else {
            assert_eq!(rig.layers(&image), points);
        }
        if signals == stop {
            rig.assert_tidy(&image);
        }
    }
    // Whatever is left, the next run clears it up.
    rig.back_up(&image, &[]);
    assert_newest(&rig, &image, &truth);
    rig.driver.purge(&image).expect("removed");
}

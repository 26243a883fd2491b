//! `prune` of a chain whose large root goes, on file systems that share data and on others: little is written,
//! little is taken meanwhile, and a full disk harms nothing.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use rustix::fs::statvfs;
use tempfile::TempDir;

use crate::cluster::say;
use crate::disks::has_loop_devices;
use crate::killed::Random;
use crate::large::{Chain, FORMS, Reached, Reader, scratch};
use crate::mount::Mount;
use crate::program::Run;
use crate::prune_killed::{SCENES, Scene, at_gone};
use crate::rig::{MIB, Running};

/// File systems on a loop device that needs no file once it is there.
const EXT4: &str = "truncate -s 512M \"$d/disk\" && mkfs.ext4 -q -m 0 \"$d/disk\" && \
    mount -o loop \"$d/disk\" \"$d\" && rmdir \"$d/lost+found\"";
const XFS: &str = "truncate -s 512M \"$d/disk\" && mkfs.xfs -q -m reflink=1 \"$d/disk\" && \
    mount -o loop \"$d/disk\" \"$d\"";

const TMPFS: &str = "mount -t tmpfs -o size=512m tmpfs \"$d\"";

/// A chain on a file system of its own.
struct Disk {
    chain: Chain,
    mount: Mount,
    place: TempDir,
}

impl Disk {
    fn new(test: &str, mount: &str, scene: Scene, form: usize) -> Option<Self> {
        if mount != TMPFS && !has_loop_devices() {
            // Not skip(), which fails where tools are required: no package brings them to a machine.
            say(&format!("SKIPPED {test}, as far as it needs one: this machine has no loop device"));
            return None;
        }
        let place = scratch();
        let mount = Mount::new(test, place.path(), mount)?;
        let chain = Chain::at(form, mount.seen_from_outside());
        scene.hold(&chain);
        Some(Self { chain, mount, place })
    }

    fn command(&self, words: &[&str]) -> Command {
        self.mount.inside(&Chain::command_at(self.place.path(), words))
    }

    fn run(&self, words: &[&str]) -> Run {
        self.command(words).output().unwrap().into()
    }

    /// Bytes that are in use.
    fn used(&self) -> u64 {
        let found = statvfs(self.chain.backups.path()).unwrap();
        (found.f_blocks - found.f_bfree) * found.f_frsize
    }

    /// Bytes that were written to the loop device.
    fn written(&mut self) -> u64 {
        let device = self.mount.told("sync -f \"$d\" && findmnt -n -o SOURCE \"$d\"");
        let name = Path::new(&device).file_name().unwrap().to_str().unwrap();
        let numbers = std::fs::read_to_string(format!("/sys/block/{name}/stat")).unwrap();
        // In sectors, whatever the device's are.
        numbers.split_whitespace().nth(6).unwrap().parse::<u64>().unwrap() * 512
    }

    /// Leaves so many bytes free in memory.
    fn leave(&mut self, bytes: u64) {
        let size = self.used() + bytes;
        self.mount.run(&format!("mount -o remount,size={size} \"$d\""));
    }
}

/// Prunes, and looks what that takes.
fn little_is_written(test: &str, mount: &str, in_place: bool) {
    for form in 0..FORMS.len() {
        let scene = SCENES[1];
        let Some(mut disk) = Disk::new(test, mount, scene, form) else { return };
        let names = disk.chain.names();
        let root = disk.chain.layer(&names[0]).metadata().unwrap();
        let (used, written) = (disk.used(), disk.written());
        let mut running = Running::start(disk.command(scene.words));
        let mut most = used;
        while !running.has_ended() {
            most = most.max(disk.used());
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let run = running.wait();
        assert_eq!(run.status, Some(0), "{run:?}");
        let written = disk.written() - written;
        let stay = scene.stay(&disk.chain);
        let told = format!(
            "{test}: of a root of {} MiB, {} MiB written, {} MiB more used meanwhile",
            root.len() / MIB,
            written / MIB,
            (most - used) / MIB
        );
        say(&told);
        assert_eq!(disk.chain.inode(&stay[0]) == root.ino(), in_place, "{told}");
        assert!(written < root.blocks() * 512 / 4, "{told}");
        // XFS reserves room behind a file that grows, as much again at the most, until it is closed.
        let reserved = if in_place { 0 } else { root.blocks() * 512 };
        assert!(most - used < root.blocks() * 512 / 4 + reserved, "{told}");
        // XFS gives back what it has reserved in its own time, which may be minutes.
        assert!(!in_place || disk.used() < used, "{told}");
        disk.chain.assert_only(&stay);
    }
}

#[test]
fn little_is_written_on_xfs_which_shares_data() {
    little_is_written("prune_disks::little_is_written_on_xfs_which_shares_data", XFS, false);
}

#[test]
fn little_is_written_on_ext4_which_does_not() {
    little_is_written("prune_disks::little_is_written_on_ext4_which_does_not", EXT4, true);
}

/// Where data are shared, those who read hinder nothing.
#[test]
fn who_reads_on_xfs_costs_nothing() {
    const TEST: &str = "prune_disks::who_reads_on_xfs_costs_nothing";
    let scene = SCENES[0];
    let Some(mut disk) = Disk::new(TEST, XFS, scene, 0) else { return };
    let (names, stay) = (disk.chain.names(), scene.stay(&disk.chain));
    let readers = [&names[0], &stay[0]].map(|name| (name, Reader::open(&disk.chain.layer(name)).unwrap()));
    let root = disk.chain.layer(&names[0]).metadata().unwrap().blocks() * 512;
    let written = disk.written();
    let told = disk.run(scene.words);
    assert_eq!(told.status, Some(0), "{told:?}");
    let written = disk.written() - written;
    assert!(written < root / 4, "{written} bytes written");
    for (name, reader) in &readers {
        reader.assert_reads(&disk.chain.truth(name), name);
    }
    disk.chain.assert_only(&stay);
}

/// A run that finds too little space says so and changes nothing that anybody sees; with more it succeeds.
#[test]
fn a_full_disk_harms_nothing() {
    const TEST: &str = "prune_disks::a_full_disk_harms_nothing";
    let scene = SCENES[2];
    // Whether somebody has the root open, so that it is copied.
    for read in [false, true] {
        let Some(mut disk) = Disk::new(TEST, TMPFS, scene, 0) else { return };
        let stay = scene.stay(&disk.chain);
        let reader = read.then(|| Reader::open(&disk.chain.layer(&stay[0])).unwrap());
        let step = if read { 16 * MIB } else { 3 * MIB };
        let mut said = Vec::new();
        for number in 0.. {
            disk.leave(number * step);
            let told = disk.run(scene.words);
            disk.chain.assert_points(&stay);
            if told.status == Some(0) {
                break;
            }
            assert_eq!(told.status, Some(1), "{told:?}");
            let refused = told.stderr.contains("are free; nothing was changed");
            assert!(refused || told.stderr.contains("No space left on device"), "{told:?}");
            said.push(refused);
            assert!(number < 60, "it never fits");
        }
        drop(reader);
        assert!(said.contains(&false) && said.contains(&true), "{said:?}");
        disk.chain.assert_only(&stay);
    }
}

/// A root that has to wait for its child's place does so until there is space.
#[test]
fn a_full_disk_between_the_steps_harms_nothing() {
    const TEST: &str = "prune_disks::a_full_disk_between_the_steps_harms_nothing";
    let mut random = Random::of_this_run(TEST);
    let scene = SCENES[1];
    for form in 0..FORMS.len() {
        let half_done = (0..50).find_map(|_| {
            let disk = Disk::new(TEST, TMPFS, scene, form)?;
            at_gone(&disk.chain, Running::start(disk.command(scene.words)), &mut random);
            (disk.chain.reached() == Reached::Waiting).then_some(disk)
        });
        let Some(mut disk) = half_done else { return };
        let stay = scene.stay(&disk.chain);
        let mut failed = 0;
        for number in 0.. {
            disk.leave(number * 128 * 1024);
            let told = disk.run(scene.words);
            disk.chain.assert_points(&stay);
            if told.status == Some(0) {
                break;
            }
            assert_eq!(told.status, Some(1), "{told:?}");
            assert!(told.stderr.contains("No space left on device"), "{told:?}");
            failed += 1;
            assert!(number < 60, "it never fits");
        }
        say(&format!("{TEST}: failed {failed} times"));
        assert!(failed > 0, "it has always fitted");
        disk.chain.assert_only(&stay);
    }
}

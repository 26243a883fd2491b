//! The README's chapter on the bad day, carried out as it is written.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use crate::boot::Life;
use crate::cluster::POOL;
use crate::cluster_or_skip;
use crate::driver::Spec;
use crate::rig::Running;
use crate::vm::{self, Boot, FSTAB, Vm, assert_clean};

const README: &str = include_str!("../../../README.md");

/// The size of the image that the chapter is about.
const SIZE: u64 = 34_359_738_368;

/// The chapter's commands that need no other machine, no volume group and no kernel module: the blocks
/// that are marked as shell.
fn commands() -> String {
    let (_, chapter) = README.split_once("\n## The bad day\n").expect("the chapter");
    let (chapter, _) = chapter.split_once("\n## ").expect("it is not the last one");
    let blocks = chapter.split("\n```sh\n").skip(1);
    blocks.fold("set -e\n".to_owned(), |mut script, block| {
        let (block, _) = block.split_once("\n```").expect("the end of a block");
        let _ = writeln!(script, "{block}");
        script
    })
}

/// Replaces what must be there.
fn replace(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "the chapter says nothing of {from}");
    text.replace(from, to)
}

#[test]
fn the_bad_day_as_written() {
    const TEST: &str = "bad_day::the_bad_day_as_written";
    let cluster = cluster_or_skip!(TEST);
    let Some(vm) = Vm::find(TEST) else { return };
    let mut life = Life::begin(&cluster, vm);
    life.resize(SIZE);
    life.live(&[]);
    life.live(&["--compression", "zstd"]);
    let before = life.files();
    let (point, _) = before.last().expect("a point");
    let new = Spec::new(POOL, &format!("{}-new", life.image.image));

    let script = replace(&commands(), "/backups/vm1/vm1@20261123T173307Z.qcow2", &point.to_string_lossy());
    let script = replace(&script, "/backups/vm1", &life.rig.directory(&life.image).to_string_lossy());
    let script = replace(&script, "rbd/vm1", &format!("{}/{}", new.pool, new.image));
    let out = TempDir::new().expect("a temporary directory");
    // Should it hang, all that it runs is ended, which needs more than an end of the shell.
    let mut bash = Command::new("timeout");
    let path = std::env::var("PATH").unwrap_or_default();
    bash.env("PATH", format!("{}:{path}:/usr/sbin:/sbin", life.vm.programs().display()));
    bash.env("CEPH_CONF", &life.rig.conf).args(["-k5", "170", "bash", "-c", &script]).current_dir(out.path());
    let run = Running::start(bash).wait_within(vm::LIMIT);
    assert_eq!(run.status, Some(0), "{run:?}");

    // Two boots: one whose writes are thrown away, one whose writes are kept.
    let [forgotten, kept] = <[Boot; 2]>::try_from(Boot::all(&run.stdout)).expect("two boots");
    let mut journal = life.journals.last().expect("the point's").clone();
    assert_eq!((&forgotten.journal, &kept.journal), (&journal, &journal));
    // What came back into the cluster is the point.
    let image = life.vm.boot(&vm::image(&life.rig.conf, &new), &[]);
    assert_eq!(image.journal, journal);
    let info = life.rig.driver.info(&new, None).expect("an image");
    assert_eq!((info.size, info.object_size), (SIZE, 4 << 20));
    let metadata = life.rig.driver.metadata(&new).expect("metadata");
    assert_eq!(metadata.get("owner").map(String::as_str), Some("ops team"));
    life.rig.driver.purge(&new).expect("removed");
    // What was made a disk of its own has the writes that were kept.
    journal.push(kept.written.expect("the disk could be written"));
    for (name, format) in [("vm1.raw", "raw"), ("vm1.qcow2", "qcow2")] {
        let drive = format!("file={},format={format}", out.path().join(name).display());
        assert_eq!(life.vm.boot(&drive, &["-snapshot"]).journal, journal, "{name}");
    }
    assert_clean(&out.path().join("vm1.raw"));
    assert_eq!(fs::read_to_string(out.path().join("fstab")).expect("a file"), FSTAB);
    assert_same_files(&life.rig.directory(&life.image), &out.path().join("vm1-copy"));
    assert!(life.files() == before, "the chain was changed");
}

fn assert_same_files(directory: &Path, copy: &Path) {
    let status = Command::new("diff").arg("-r").args([directory, copy]).status().expect("diffutils");
    assert!(status.success(), "{} is not {}", copy.display(), directory.display());
}

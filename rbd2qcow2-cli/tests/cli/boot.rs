//! A virtual machine lives in the cluster, and boots from every point that was made of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::cluster::{TestCluster, unique_image};
use crate::cluster_or_skip;
use crate::driver::Spec;
use crate::program;
use crate::rig::{MIB, Rig, Running, assert_point, point_of};
use crate::serve;
use crate::vm::{self, NEW, Vm};

/// How the machine is backed up after each of its days.
const DAYS: [&[&str]; 4] = [
    &[],
    &["--writer", "qemu-nbd"],
    &["--compression", "zstd"],
    &["--no-extended-l2", "--compression", "zlib"],
];

/// A machine in the cluster, and what its journal held at each point.
pub struct Life {
    pub rig: Rig,
    pub vm: Vm,
    pub image: Spec,
    pub journals: Vec<Vec<String>>,
}

impl Life {
    /// A new machine, never backed up.
    pub fn begin(cluster: &TestCluster, vm: Vm) -> Self {
        let (rig, image) = (Rig::new(cluster), unique_image("machine"));
        let mut rbd = Command::new("rbd");
        rbd.arg("-c").arg(&rig.conf).args(["import", "--no-progress"]).arg(vm.disk());
        let output = rbd.arg(format!("{}/{}", image.pool, image.image)).output();
        let output = output.expect("ceph-common is installed");
        assert!(output.status.success(), "rbd import: {}", String::from_utf8_lossy(&output.stderr));
        Self { rig, vm, image, journals: Vec::new() }
    }

    /// The machine runs in the cluster, and is backed up.
    pub fn live(&mut self, options: &[&str]) {
        let boot = self.vm.boot(&vm::image(&self.rig.conf, &self.image), &[]);
        let mut journal = self.journals.last().cloned().unwrap_or_else(|| vec![NEW.to_owned()]);
        assert_eq!(boot.journal, journal);
        journal.push(boot.written.expect("images can be written"));
        self.journals.push(journal);
        self.rig.back_up(&self.image, options);
    }

    /// As `live`, and the point is compared with what the machine has left.
    fn live_and_compare(&mut self, options: &[&str]) {
        self.live(options);
        let truth = self.rig.truth(&self.image, self.journals.len());
        self.rig.driver.close(&self.image).expect("closed");
        vm::assert_clean(&truth);
        assert_point(self.rig.layers(&self.image).last().expect("a point"), &truth);
    }

    /// The image is larger the next time.
    pub fn resize(&self, size: u64) {
        self.rig.driver.resize(&self.image, size).expect("grown");
        self.rig.driver.close(&self.image).expect("closed");
    }

    fn restore(&self, point: &str, to: &Path, options: &[&str]) {
        let mut command = program::command();
        command.arg("restore").arg(self.rig.dest()).arg(format!("{}@{point}", self.image.image));
        command.arg("--to-file").arg(to).args(options);
        let run = Running::start(command).wait();
        assert_eq!(run.status, Some(0), "{run:?}");
    }

    /// The machine runs from the point as it is served, so many times, and all that it writes is forgotten
    /// in the end.
    fn boot_served(&self, point: &str, out: &Path, journal: &[String], times: usize) {
        let point = format!("{}@{point}", self.image.image);
        let (server, uri) =
            serve::announced(serve::serve(self.rig.dest(), out, &point, &["-q", "--writable"]));
        let mut journal = journal.to_vec();
        for _ in 0..times {
            let boot = self.vm.boot(&format!("file={uri},format=raw"), &[]);
            assert_eq!(boot.journal, journal, "{point}");
            journal.push(boot.written.expect("it is writable"));
        }
        serve::interrupted(server, Signal::INT);
    }

    /// All files of the chain, and what is in them.
    pub fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let read = |layer: PathBuf| (layer.clone(), fs::read(layer).expect("a layer"));
        self.rig.layers(&self.image).into_iter().map(read).collect()
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        // A test that fails leaves its image to the cluster's end.
        let _ = self.rig.driver.purge(&self.image);
    }
}

#[test]
fn a_machine_boots_from_every_point() {
    const TEST: &str = "boot::a_machine_boots_from_every_point";
    let cluster = cluster_or_skip!(TEST);
    let Some(vm) = Vm::find(TEST) else { return };
    let mut life = Life::begin(&cluster, vm);
    for (number, options) in DAYS.iter().enumerate() {
        life.live_and_compare(options);
        life.resize((100 + number as u64) * MIB);
    }
    let before = life.files();
    assert_eq!(before.len(), DAYS.len());
    let out = TempDir::new().expect("a temporary directory");
    for ((layer, _), journal) in before.iter().zip(&life.journals) {
        // Straight from the chain. What the machine writes is thrown away.
        let boot = life.vm.boot(&vm::layer(layer), &["-snapshot"]);
        assert_eq!(&boot.journal, journal, "{}", layer.display());
        assert!(boot.written.is_some(), "{boot:?}");
        let restored = out.path().join(point_of(layer));
        life.restore(&point_of(layer), &restored, &[]);
        vm::assert_clean(&restored);
        // Each boot takes seconds.
        let times = if journal.len() == DAYS.len() { 2 } else { 1 };
        life.boot_served(&point_of(layer), out.path(), journal, times);
    }
    assert!(life.files() == before, "a boot has changed the chain");
}

#[test]
fn a_machine_goes_on_from_a_restored_image() {
    const TEST: &str = "boot::a_machine_goes_on_from_a_restored_image";
    let cluster = cluster_or_skip!(TEST);
    let Some(vm) = Vm::find(TEST) else { return };
    let mut life = Life::begin(&cluster, vm);
    life.live(&[]);
    life.live(&["--compression", "zstd"]);
    let points: Vec<_> = life.rig.layers(&life.image).iter().map(|layer| point_of(layer)).collect();
    // A new image, and the machine's own, rolled back to the day before.
    let new = unique_image("reborn");
    for (image, options) in [(&new, &[][..]), (&life.image, &["--overwrite"])] {
        let mut command = program::command();
        command.arg("-c").arg(&life.rig.conf).arg("restore").arg(life.rig.dest());
        command.arg(format!("{}@{}", life.image.image, points[0]));
        command.args(["--to-rbd", &format!("{}/{}", image.pool, image.image)]).args(options);
        let run = Running::start(command).wait();
        assert_eq!(run.status, Some(0), "{run:?}");
        let boot = life.vm.boot(&vm::image(&life.rig.conf, image), &[]);
        assert_eq!(boot.journal, life.journals[0], "{run:?}");
        assert!(boot.written.is_some(), "{boot:?}");
    }
    // And backups go on from there.
    life.journals.truncate(1);
    let lived = life.vm.boot(&vm::image(&life.rig.conf, &life.image), &["-snapshot"]);
    life.journals.push(lived.journal);
    life.live(&[]);
    let journal = life.journals.last().expect("the last day");
    let layer = life.rig.layers(&life.image).pop().expect("a point");
    assert_eq!(&life.vm.boot(&vm::layer(&layer), &["-snapshot"]).journal, journal);
    life.rig.driver.purge(&new).expect("removed");
}

#[test]
fn a_machine_goes_on_from_a_restored_file() {
    const TEST: &str = "boot::a_machine_goes_on_from_a_restored_file";
    let cluster = cluster_or_skip!(TEST);
    let Some(vm) = Vm::find(TEST) else { return };
    let mut life = Life::begin(&cluster, vm);
    life.live(&["--compression", "zstd"]);
    life.live(&[]);
    let before = life.files();
    let out = TempDir::new().expect("a temporary directory");
    let point = point_of(&before[0].0);
    for (number, options) in
        [&[][..], &["--format", "qcow2", "--compression", "zstd"]].into_iter().enumerate()
    {
        let restored = out.path().join(number.to_string());
        life.restore(&point, &restored, options);
        let drive = format!("file={},format={}", restored.display(), ["raw", "qcow2"][number]);
        let mut journal = life.journals[0].clone();
        for _ in 0..2 {
            let boot = life.vm.boot(&drive, &[]);
            assert_eq!(boot.journal, journal, "{drive}");
            journal.push(boot.written.expect("the file is not read-only"));
        }
    }
    assert!(life.files() == before, "a boot has changed the chain");
}

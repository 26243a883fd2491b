//! The virtual machine of `scripts/fetch-vm`: it boots from its disk alone, shows the journal that it
//! keeps there, adds a line to it, and turns itself off.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::cluster::skip;
use crate::driver::Spec;
use crate::rig::Running;

/// Where on its disk the journal's file system begins, in bytes.
pub const EXT4_OFFSET: u64 = 1 << 20;

/// What the journal holds before the machine boots for the first time.
pub const NEW: &str = "a new machine";

/// `/etc/fstab` on its disk.
pub const FSTAB: &str = "/dev/vda1 / ext4 defaults 0 1\n";

/// The longest that a boot may take. It takes 2 s where nothing else runs.
pub const LIMIT: Duration = Duration::from_secs(180);

/// Memory of the machine, in MiB.
const MEMORY: &str = "256";

/// The emulator, and a disk that was never booted.
#[derive(Debug)]
pub struct Vm(PathBuf);

/// What the machine did between power on and power off.
#[derive(Debug)]
pub struct Boot {
    /// What its disk held.
    pub journal: Vec<String>,
    /// The line that it added; `None` where its disk took none.
    pub written: Option<String>,
}

impl Vm {
    /// The one of the environment, or `None`, said aloud.
    ///
    /// # Panics
    /// Where there is none and the environment says that all tests must run.
    pub fn find(test: &str) -> Option<Self> {
        let found = std::env::var_os("RBD2QCOW2_TEST_VM").map(|directory| Self(directory.into()));
        if found.is_none() {
            skip(test, "RBD2QCOW2_TEST_VM is not set (scripts/fetch-vm DIR makes what it names)");
        }
        found
    }

    /// A disk that was never booted.
    pub fn disk(&self) -> PathBuf {
        self.0.join("disk.raw")
    }

    /// Where the emulator is, and a `qemu-img` that reaches the cluster.
    pub fn programs(&self) -> PathBuf {
        self.0.join("bin")
    }

    /// Runs the machine from power on to power off. `drive` says what its disk is, as `-drive` has it.
    ///
    /// # Panics
    /// With all that its console showed, where it did not get as far as to show its journal.
    pub fn boot(&self, drive: &str, options: &[&str]) -> Boot {
        let mut command = Command::new(self.programs().join("qemu-system-x86_64"));
        // Software alone: where KVM is offered inside a virtual machine, it may hang.
        command.args(["-accel", "tcg", "-m", MEMORY, "-nographic", "-no-reboot", "-nic", "none"]);
        command.args(options).arg("-drive").arg(format!("{drive},if=virtio"));
        let run = Running::start(command).wait_within(LIMIT);
        assert_eq!(run.status, Some(0), "{drive}: {run:?}");
        Boot::all(&run.stdout).pop().unwrap_or_else(|| panic!("{drive} does not boot: {run:?}"))
    }
}

impl Boot {
    /// The machine's lives that consoles have shown, one after the other.
    pub fn all(consoles: &str) -> Vec<Self> {
        let consoles = consoles.replace('\r', "");
        consoles.split("the journal begins\n").skip(1).filter_map(Self::read).collect()
    }

    /// One that begins with the journal; `None` where it does not get as far as its end.
    fn read(console: &str) -> Option<Self> {
        let (journal, rest) = console.split_once("the journal ends\n")?;
        let written = rest.lines().find_map(|line| line.strip_prefix("written: "));
        Some(Self {
            journal: journal.lines().map(str::to_owned).collect(),
            written: written.map(str::to_owned),
        })
    }
}

/// A layer as the machine's disk.
pub fn layer(path: &Path) -> String {
    format!("file={},format=qcow2", path.display())
}

/// An image in the cluster as the machine's disk.
pub fn image(conf: &Path, image: &Spec) -> String {
    format!("file=rbd:{}/{}:conf={},format=raw", image.pool, image.image, conf.display())
}

/// Whether the file system on a raw copy of the disk is clean.
pub fn assert_clean(disk: &Path) {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut e2fsck = Command::new("e2fsck");
    e2fsck.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    let output = e2fsck.arg("-fn").arg(format!("{}?offset={EXT4_OFFSET}", disk.display())).output();
    let output = output.expect("e2fsprogs is installed");
    assert!(output.status.success(), "{}: {}", disk.display(), String::from_utf8_lossy(&output.stdout));
}

//! The cluster that tests run on, and names in it that no other test uses.

use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rbd2qcow2_core::cancel::Cancel;
use rbd2qcow2_core::rbd::{Cluster, ClusterOptions, Patience};

use crate::driver::{Driver, Spec};

/// The pool that `scripts/ceph-cluster` makes.
pub const POOL: &str = "rbd";

/// A running cluster whose images nobody misses.
#[derive(Clone, Debug)]
pub struct TestCluster {
    /// Its configuration file, which names the keyring too.
    pub conf: PathBuf,
}

impl TestCluster {
    /// The cluster of the environment, or `None`, said aloud, where there is none to be had.
    ///
    /// Only the one of `scripts/ceph-cluster` will do: what `CEPH_CONF` names may be the user's own.
    ///
    /// # Panics
    /// Where there is none and the environment says that all tests must run.
    pub fn find(test: &str) -> Option<Self> {
        let dir = std::env::var_os("RBD2QCOW2_TEST_CLUSTER").map(PathBuf::from);
        let found = dir.map(|dir| Self { conf: dir.join("ceph.conf") });
        if found.is_none() {
            skip(test, "RBD2QCOW2_TEST_CLUSTER is not set (scripts/ceph-cluster run DIR -- cargo test)");
        }
        found
    }

    /// The client under test. `limit`: how long one call may take.
    pub fn connect(&self, limit: Duration) -> Cluster {
        let options = ClusterOptions { conf: Some(self.conf.clone()), ..ClusterOptions::default() };
        Cluster::connect(&options, Patience { limit, cancel: Cancel::new() }).expect("the cluster answers")
    }

    /// A second client of the cluster.
    pub fn driver(&self) -> Driver {
        Driver::start(&self.conf).expect("the driver starts")
    }
}

/// Says that a test is not run, and why.
///
/// # Panics
/// Where the environment says that all tests must run: CI, or `RBD2QCOW2_REQUIRE_TOOLS=1`.
pub fn skip(test: &str, why: &str) {
    let set = |name: &str| std::env::var(name).is_ok_and(|value| !matches!(&*value, "" | "0" | "false"));
    assert!(!set("RBD2QCOW2_REQUIRE_TOOLS") && !set("CI"), "{test} cannot run: {why}");
    say(&format!("SKIPPED {test}: {why}"));
}

/// Prints a line past the test harness, which hides what tests that pass have printed.
pub fn say(line: &str) {
    // Nobody reads it, perhaps; that is no reason to fail.
    let _ = std::io::stderr().lock().write_all(format!("\n{line}\n").as_bytes());
}

/// A name that no other test of this or another process uses.
pub fn unique(name: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("{name}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// An image of such a name in the common pool.
pub fn unique_image(name: &str) -> Spec {
    Spec::new(POOL, &unique(name))
}

/// Stands at the beginning of a test: the cluster, or leaves the test.
#[macro_export]
macro_rules! cluster_or_skip {
    ($test:expr) => {
        match $crate::cluster::TestCluster::find($test) {
            Some(cluster) => cluster,
            None => return,
        }
    };
}

/// A cluster of one OSD that a test may freeze. It is gone when this is dropped.
#[derive(Debug)]
pub struct OwnCluster {
    dir: tempfile::TempDir,
    pub cluster: TestCluster,
}

impl OwnCluster {
    /// Starts one, which takes some seconds.
    pub fn start() -> Self {
        Self::start_with(1)
    }

    /// One with so many OSDs.
    pub fn start_with(osds: u32) -> Self {
        Self::start_as(&["--osds", &osds.to_string()])
    }

    /// One that counts what its pools hold, and heeds their quotas.
    pub fn start_with_mgr() -> Self {
        Self::start_as(&["--osds", "1", "--mgr"])
    }

    fn start_as(options: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let cluster = TestCluster { conf: dir.path().join("ceph.conf") };
        let own = Self { dir, cluster };
        own.script(&["start"], options);
        own
    }

    /// Freezes the OSD: what is asked of it gets no answer.
    pub fn pause_osd(&self) {
        self.pause_osd_number(0);
    }

    pub fn pause_osd_number(&self, id: u32) {
        self.script(&["osd-pause"], &[&id.to_string()]);
        self.wait_until_frozen(&format!("osd.{id}"));
    }

    pub fn resume_osd(&self) {
        self.resume_osd_number(0);
    }

    pub fn resume_osd_number(&self, id: u32) {
        self.script(&["osd-resume"], &[&id.to_string()]);
    }

    /// Ends the OSD: connections to it break.
    pub fn stop_osd(&self) {
        self.script(&["osd-stop"], &["0"]);
    }

    pub fn start_osd(&self) {
        self.script(&["osd-start"], &["0"]);
    }

    /// Freezes the monitor.
    pub fn pause_mon(&self) {
        self.script(&["mon-pause"], &[]);
        self.wait_until_frozen("mon.a");
    }

    pub fn resume_mon(&self) {
        self.script(&["mon-resume"], &[]);
    }

    /// A stop signal is sent at once and heeded by each thread when it next runs, on a busy machine
    /// after it has answered a request or two.
    fn wait_until_frozen(&self, daemon: &str) {
        let pid = std::fs::read_to_string(self.dir.path().join(format!("run/{daemon}.pid"))).expect("a pid");
        let frozen = |task: std::io::Result<std::fs::DirEntry>| {
            let status = task.and_then(|task| std::fs::read_to_string(task.path().join("status")));
            status.is_ok_and(|status| status.contains("\nState:\tT"))
        };
        for _ in 0..1000 {
            if std::fs::read_dir(format!("/proc/{}/task", pid.trim())).expect("its threads").all(frozen) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("{daemon} did not freeze");
    }

    fn script(&self, command: &[&str], arguments: &[&str]) {
        let output = self.run(command, arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "ceph-cluster {command:?} failed ({}): {said}", output.status);
    }

    fn run(&self, command: &[&str], arguments: &[&str]) -> std::process::Output {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/ceph-cluster");
        std::process::Command::new(script)
            .args(command)
            .arg(self.dir.path())
            .args(arguments)
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap_or_else(|error| panic!("cannot run {script}: {error}"))
    }
}

impl Drop for OwnCluster {
    fn drop(&mut self) {
        // Thaws what is frozen, stops everything and removes the directory.
        let output = self.run(&["stop"], &[]);
        if !output.status.success() {
            say(&format!("a cluster was not stopped: {}", String::from_utf8_lossy(&output.stderr)));
        }
    }
}

//! `backup` where it does not get as far as a cluster.

use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::program::{Run, command, run};

/// A monitor that takes connections and never says a word.
struct SilentMonitor {
    /// Holds `ceph.conf` and is the destination.
    directory: TempDir,
    /// Where clients connect.
    listener: TcpListener,
}

impl SilentMonitor {
    /// Starts it.
    fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let conf = format!(
            "[global]\nmon host = v2:{}\nauth client required = none\nlog file =\n",
            listener.local_addr().unwrap()
        );
        fs::write(directory.path().join("ceph.conf"), conf).unwrap();
        Self { directory, listener }
    }

    /// A configuration that leads to it.
    fn conf(&self) -> PathBuf {
        self.directory.path().join("ceph.conf")
    }

    /// A backup from it.
    fn backup(&self) -> Command {
        let mut command = command();
        command.arg("-c").arg(self.conf()).args(["backup", "rbd"]).arg(self.directory.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// A backup that has got as far as to wait for it.
    fn waiting_backup(&self) -> Child {
        let child = self.backup().arg("--json").spawn().unwrap();
        self.listener.accept().unwrap();
        child
    }
}

/// Sends a signal to a child.
fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

#[test]
fn a_missing_destination_is_told_before_anything_is_done() {
    let missing = TempDir::new().unwrap().path().join("not/mounted");
    let failed = run(&["backup", "rbd", missing.to_str().unwrap(), "--json"]);
    assert_eq!((failed.status, failed.stdout.as_str()), (Some(1), ""), "{failed:?}");
    assert!(failed.stderr.starts_with("error: "), "{failed:?}");
    assert!(failed.stderr.contains(missing.to_str().unwrap()), "{failed:?}");
    assert!(failed.stderr.contains("\n  caused by: "), "{failed:?}");
}

#[test]
fn a_bad_pattern_is_wrong_usage() {
    let directory = TempDir::new().unwrap();
    let failed = run(&["backup", "rbd", directory.path().to_str().unwrap(), "--exclude", "a[b"]);
    assert_eq!((failed.status, failed.stdout.as_str()), (Some(2), ""), "{failed:?}");
    assert!(failed.stderr.contains(r#""a[b""#), "{failed:?}");
}

#[test]
fn a_silent_cluster_is_given_up_in_time() {
    let monitor = SilentMonitor::new();
    let start = Instant::now();
    let failed = Run::from(monitor.backup().args(["--timeout", "2", "--json"]).output().unwrap());
    assert_eq!((failed.status, failed.stdout.as_str()), (Some(1), ""), "{failed:?}");
    assert!(failed.stderr.contains("error: ") && failed.stderr.contains("rbd"), "{failed:?}");
    let taken = start.elapsed();
    assert!((Duration::from_secs(1)..Duration::from_secs(10)).contains(&taken), "{taken:?}");
}

#[test]
fn a_signal_stops_within_a_second_though_the_cluster_hangs() {
    for signal_sent in [Signal::INT, Signal::TERM] {
        let monitor = SilentMonitor::new();
        let child = monitor.waiting_backup();
        let start = Instant::now();
        signal(&child, signal_sent);
        let stopped = Run::from(child.wait_with_output().unwrap());
        let taken = start.elapsed();
        assert_eq!((stopped.status, stopped.stdout.as_str()), (Some(130), ""), "{stopped:?}");
        assert!(stopped.stderr.contains("interrupted"), "{stopped:?}");
        assert!(taken < Duration::from_secs(1), "{signal_sent:?}: {taken:?}");
    }
}

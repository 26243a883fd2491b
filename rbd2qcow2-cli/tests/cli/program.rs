//! Runs the program and holds on to what it said.

use std::ffi::OsStr;
use std::process::{Command, Output};

/// What a run of the program left behind.
#[derive(Debug)]
pub struct Run {
    /// The exit status; `None` when a signal ended it.
    pub status: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// The program, with nothing of the tester's environment that could change what it does.
pub fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rbd2qcow2"));
    for variable in ["RUST_LOG", "RBD2QCOW2_QEMU_IMG", "RBD2QCOW2_QEMU_NBD", "CEPH_CONF", "CEPH_ARGS"] {
        command.env_remove(variable);
    }
    command
}

/// Runs the program to its end.
pub fn run<S: AsRef<OsStr>>(args: &[S]) -> Run {
    command().args(args).output().expect("the program was built for this test").into()
}

impl From<Output> for Run {
    fn from(output: Output) -> Self {
        Self {
            status: output.status.code(),
            stdout: String::from_utf8(output.stdout).expect("standard output is UTF-8"),
            stderr: String::from_utf8(output.stderr).expect("standard error is UTF-8"),
        }
    }
}

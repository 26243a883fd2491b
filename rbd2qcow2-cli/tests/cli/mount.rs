//! A file system of its own at a rig's destination, which can be small, read-only or frozen.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use crate::cluster::skip;

/// `sh -c`: `$1` mounts something at `$2`, then lines of standard input are carried out, each answered
/// by a line. When there are no more, because the test has died perhaps, nothing may stay frozen:
/// a process that writes to a frozen file system cannot be killed. So signals do not count here.
const HOLDER: &str = r#"
    trap '' INT TERM HUP
    d=$2
    if eval "$1"; then echo done; else echo failed; fi
    while read -r line; do
        if eval "$line"; then echo done; else echo failed; fi
    done
    fsfreeze -u "$d" 2>/dev/null
"#;

/// A file system in a mount namespace that a shell holds. The shell, and with it the file system, is
/// gone when this is dropped.
#[derive(Debug)]
pub struct Mount {
    shell: Child,
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    /// Where it is in the namespace; outside there is an empty directory.
    place: PathBuf,
}

impl Mount {
    /// Runs a shell command that mounts something at the directory `$d`, which is `place`. `None`,
    /// said aloud, where that cannot be done.
    pub fn new(test: &str, place: &Path, command: &str) -> Option<Self> {
        let shell = Command::new("unshare")
            .args(["-m", "sh", "-c", HOLDER, "sh", command])
            .arg(place)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mounted = shell.ok().and_then(|mut shell| {
            let commands = shell.stdin.take();
            let answers = BufReader::new(shell.stdout.take().expect("piped"));
            let mut mount = Self { shell, commands, answers, place: place.to_owned() };
            mount.is_done().then_some(mount)
        });
        if mounted.is_none() {
            skip(test, &format!("this cannot be done here (unshare -m, as root): {command}"));
        }
        mounted
    }

    /// Carries a shell command out in the namespace; `$d` is the directory.
    pub fn run(&mut self, command: &str) {
        let commands = self.commands.as_mut().expect("until it is dropped");
        writeln!(commands, "{command}").expect("the shell lives");
        assert!(self.is_done(), "failed: {command}");
    }

    /// What a shell command prints in the namespace; `$d` is the directory.
    pub fn told(&mut self, command: &str) -> String {
        // Past the pipe of the answers, and not in the directory, which may be full.
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        self.run(&format!("{{ {command}; }} > '{}'", file.path().display()));
        std::fs::read_to_string(file.path()).expect("it was written").trim().to_owned()
    }

    fn is_done(&mut self) -> bool {
        let mut answer = String::new();
        self.answers.read_line(&mut answer).is_ok_and(|_| answer == "done\n")
    }

    /// The same command, in the namespace.
    pub fn inside(&self, command: &Command) -> Command {
        let mut inside = Command::new("nsenter");
        inside.args(["-t", &self.shell.id().to_string(), "-m", "--"]);
        inside.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => inside.env(name, value),
                None => inside.env_remove(name),
            };
        }
        inside
    }

    /// Where the directory can be looked at from outside.
    pub fn seen_from_outside(&self) -> PathBuf {
        let place = self.place.strip_prefix("/").expect("an absolute path");
        PathBuf::from(format!("/proc/{}/root", self.shell.id())).join(place)
    }

    /// Whether a process is in the namespace, and not the one that holds it.
    pub fn is_inhabitant(&self, pid: u32) -> bool {
        let namespace = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
        pid != self.shell.id() && namespace(pid).is_some_and(|is| Some(is) == namespace(self.shell.id()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.commands = None;
        // Whatever it says, there is nothing more to be done.
        let _ = self.shell.wait();
    }
}

//! `serve`: what is announced, and what is left when it ends.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::cluster::unique_image;
use crate::cluster_or_skip;
use crate::directory::{Backups, SIZE};
use crate::driver::{FULL_FEATURES, Layout};
use crate::faults::fails;
use crate::mount::Mount;
use crate::program::{self, Run};
use crate::rig::{MIB, Rig, Running, assert_no_process_in, names_in, wait_for, with};

const POINT: &str = "20261122T173312Z";

/// An image with a point, and a directory for what the program makes.
struct Scene {
    backups: Backups,
    out: TempDir,
    content: Vec<u8>,
}

impl Scene {
    fn new() -> Self {
        let (backups, out) = (Backups::new(), TempDir::new().expect("a temporary directory"));
        let content: Vec<u8> = (0..SIZE).map(|byte| (byte / 7 % 251) as u8).collect();
        backups.fill("web/1", "2026-11-22T17:33:12Z", &content, None);
        Self { backups, out, content }
    }

    fn serve(&self, point: &str, arguments: &[&str]) -> Command {
        serve(self.backups.path(), self.out.path(), point, arguments)
    }

    /// A server that has told where it is.
    fn served(&self, arguments: &[&str]) -> (Running, String) {
        announced(self.serve("web/1", arguments))
    }

    fn socket(&self) -> PathBuf {
        self.out.path().join("nbd")
    }

    /// What stock QEMU reads there.
    fn content_of(&self, uri: &str) -> Vec<u8> {
        let copy = self.backups.path().join("copy");
        convert(uri, &copy);
        fs::read(copy).expect("readable")
    }

    fn padded(&self) -> Vec<u8> {
        let mut padded = self.content.clone();
        padded.resize(padded.len().next_multiple_of(512), 0);
        padded
    }

    /// No process, no socket, no overlay, and the chain is free.
    fn assert_nothing_left(&self) {
        assert_no_process_in(self.backups.path());
        assert_eq!(names_in(self.out.path()), [].into());
        assert_no_lock(&self.backups.image("web/1"));
    }
}

/// A server whose sockets and overlays are in `out` unless told otherwise.
pub fn serve(dest: &Path, out: &Path, point: &str, arguments: &[&str]) -> Command {
    let mut command = program::command();
    command.env("XDG_RUNTIME_DIR", out).env("TMPDIR", out);
    command.arg("serve").arg(dest).arg(point).args(arguments);
    command
}

/// Starts a server, and waits for the line that it prints.
pub fn announced(command: Command) -> (Running, String) {
    let mut running = Running::start(command);
    let line = running.wait_for_line();
    (running, line)
}

fn convert(uri: &str, copy: &Path) {
    let mut convert = Command::new("qemu-img");
    let convert = convert.args(["convert", "-f", "raw", "-O", "raw", uri]).arg(copy).output();
    let convert = convert.expect("qemu-img is installed");
    assert!(convert.status.success(), "{uri}: {}", String::from_utf8_lossy(&convert.stderr));
}

fn assert_no_lock(directory: &Path) {
    let lock = fs::File::open(directory.join(".lock")).expect("there");
    let operation = rustix::fs::FlockOperation::NonBlockingLockExclusive;
    rustix::fs::flock(&lock, operation).expect("nobody holds it");
}

/// Ends a server.
pub fn interrupted(running: Running, signal: Signal) -> Run {
    running.signal(signal);
    let run = running.wait();
    assert_eq!(run.status, Some(130), "{run:?}");
    run
}

#[test]
fn a_point_is_served_until_a_signal() {
    let scene = Scene::new();
    for signal in [Signal::INT, Signal::TERM] {
        let (running, uri) = scene.served(&[]);
        let path = uri.strip_prefix("nbd+unix:///?socket=").expect("a URI of a socket");
        assert_eq!(Path::new(path), scene.out.path().join(format!("rbd2qcow2-web_1-{POINT}.sock")));
        assert_eq!(fs::metadata(path).expect("there").permissions().mode() & 0o7777, 0o600);
        assert!(scene.content_of(&uri) == scene.padded());
        let run = interrupted(running, signal);
        assert_eq!(run.stdout, format!("{uri}\n"));
        for words in [&format!("web/1@{POINT}: served, 977.0"), "read-only", "Ctrl-C", "interrupted"] {
            assert!(run.stderr.contains(words), "without {words:?}: {run:?}");
        }
        scene.assert_nothing_left();
    }
}

/// With SIGHUP as `env` sets it for the program: whoever runs the tests may ignore it.
fn with_hangup(option: &str, command: &Command) -> Command {
    let mut env = Command::new("env");
    env.arg(option).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => env.env(name, value),
            None => env.env_remove(name),
        };
    }
    env
}

/// Who closes the terminal ends what runs there.
#[test]
fn a_hangup_ends_it_in_order() {
    let scene = Scene::new();
    let (running, _) = announced(with_hangup("--default-signal=HUP", &scene.serve("web/1", &["--writable"])));
    // A terminal and a shell may both send one.
    running.signal(Signal::HUP);
    interrupted(running, Signal::HUP);
    scene.assert_nothing_left();
}

#[test]
fn a_hangup_that_is_ignored_stays_so() {
    let scene = Scene::new();
    let (running, uri) = announced(with_hangup("--ignore-signal=HUP", &scene.serve("web/1", &[])));
    running.signal(Signal::HUP);
    assert!(scene.content_of(&uri) == scene.padded());
    interrupted(running, Signal::TERM);
    scene.assert_nothing_left();
}

/// The shell that ends qemu-nbd with us is killed, as by somebody who tidies up.
#[test]
fn a_killed_shell_ends_it() {
    let scene = Scene::new();
    let (running, _) = scene.served(&[]);
    let shell = rustix::process::Pid::from_raw(running.child().try_into().unwrap()).unwrap();
    rustix::process::kill_process(shell, Signal::KILL).unwrap();
    let run = running.wait();
    assert_eq!(run.status, Some(1), "{run:?}");
    assert!(run.stderr.contains("was killed by signal 9"), "{run:?}");
    scene.assert_nothing_left();
}

/// A path, and no name in `PATH`, although qemu-nbd starts in another directory.
#[test]
fn qemu_nbd_is_found_by_a_relative_path() {
    let scene = Scene::new();
    let programs = TempDir::new().unwrap();
    let program = programs.path().join("my-nbd");
    fs::write(&program, "#!/bin/sh\nexec qemu-nbd \"$@\"\n").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = scene.serve("web/1", &["--qemu-nbd", "./my-nbd"]);
    command.current_dir(programs.path());
    let (running, uri) = announced(command);
    assert!(scene.content_of(&uri) == scene.padded());
    interrupted(running, Signal::TERM);
    scene.assert_nothing_left();
}

#[test]
fn json_tells_where_and_what() {
    let scene = Scene::new();
    for (arguments, writable) in [(&["--json", "-q"][..], false), (&["--json", "-q", "--writable"], true)] {
        let (running, line) = scene.served(arguments);
        let value: Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!((&value["image"], &value["point"]), (&"web/1".into(), &POINT.into()));
        assert_eq!(value["writable"], writable);
        assert_eq!(value["size"], SIZE.next_multiple_of(512));
        assert!(scene.content_of(value["uri"].as_str().expect("text")) == scene.padded());
        let places: Vec<_> = ["image", "point", "uri", "writable", "size"]
            .map(|key| line.find(&format!("\"{key}\"")).expect("there"))
            .into();
        assert!(places.is_sorted(), "{line}");
        let run = interrupted(running, Signal::INT);
        assert_eq!((run.stdout, run.stderr.as_str()), (format!("{line}\n"), ""));
        scene.assert_nothing_left();
    }
}

#[test]
fn what_is_written_goes_to_the_overlay_and_with_it() {
    let scene = Scene::new();
    let layer = scene.backups.image("web/1").join(format!("web%2F1@{POINT}.qcow2"));
    let before = (fs::read(&layer).unwrap(), layer.metadata().unwrap().mtime_nsec());
    let overlays = TempDir::new().unwrap();
    let directory = overlays.path().to_str().unwrap();
    let (running, uri) = scene.served(&["--writable", "--overlay-dir", directory]);
    let write =
        Command::new("qemu-io").args(["-f", "raw", "-c", "write -P 7 4096 8192", &uri]).output().unwrap();
    assert!(write.status.success(), "{write:?}");
    let mut content = scene.padded();
    content[4096..12288].fill(7);
    assert!(scene.content_of(&uri) == content);
    assert_eq!(names_in(overlays.path()), [].into());
    interrupted(running, Signal::INT);
    scene.assert_nothing_left();
    assert!((fs::read(&layer).unwrap(), layer.metadata().unwrap().mtime_nsec()) == before);
}

/// The client is told, and nobody else is harmed.
#[test]
fn an_overlay_without_space_is_the_clients_error() {
    let scene = Scene::new();
    let small = TempDir::new().unwrap();
    let tmpfs = "mount -t tmpfs -o size=600k tmpfs \"$d\"";
    let test = "serve::an_overlay_without_space_is_the_clients_error";
    let Some(mount) = Mount::new(test, small.path(), tmpfs) else { return };
    let socket = scene.socket();
    let arguments = ["--writable", "--socket", socket.to_str().unwrap()];
    let overlays = ["--overlay-dir", small.path().to_str().unwrap()];
    let (running, uri) = announced(mount.inside(&scene.serve("web/1", &with(&arguments, &overlays))));
    let write = |length: &str| {
        let command = format!("write -P 7 0 {length}");
        let output = Command::new("qemu-io").args(["-f", "raw", "-c", &command, &uri]).output().unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    };
    let (full, told) = write("900k");
    assert!(!full && told.contains("No space left on device"), "{told}");
    // It goes on for those who need less.
    let (fits, told) = write("4k");
    assert!(fits, "{told}");
    interrupted(running, Signal::INT);
    drop(mount);
    scene.assert_nothing_left();
    let (running, uri) = scene.served(&[]);
    assert!(scene.content_of(&uri) == scene.padded());
    interrupted(running, Signal::INT);
}

#[test]
fn a_killed_run_leaves_a_socket_that_the_next_replaces() {
    let scene = Scene::new();
    let socket = scene.socket();
    let arguments = ["--writable", "--socket", socket.to_str().unwrap()];
    let (running, uri) = scene.served(&arguments);
    assert!(running.kill());
    assert_no_process_in(scene.backups.path());
    assert_eq!(names_in(scene.out.path()), ["nbd".to_owned()].into());
    assert_no_lock(&scene.backups.image("web/1"));
    let (running, again) = scene.served(&arguments);
    assert_eq!(uri, again);
    assert!(scene.content_of(&uri) == scene.padded());
    let run = interrupted(running, Signal::TERM);
    assert!(run.stderr.contains("which a killed server has left"), "{run:?}");
    scene.assert_nothing_left();
}

#[test]
fn a_port_is_told() {
    let scene = Scene::new();
    let (running, uri) = scene.served(&["--port", "0"]);
    let port = uri.strip_prefix("nbd://127.0.0.1:").expect("a URI of a port").to_owned();
    assert!(scene.content_of(&uri) == scene.padded());
    let run =
        fails(scene.serve("web/1", &["--port", &port]), &[&format!("port {port} of 127.0.0.1 is in use")]);
    assert_eq!(run.stdout, "");
    let run = interrupted(running, Signal::INT);
    assert!(!run.stderr.contains("password"), "{run:?}");
    scene.assert_nothing_left();
    // Open to others, which must not go unnoticed.
    let (running, uri) = scene.served(&["--port", "0", "--address", "0.0.0.0", "-q"]);
    let reachable = uri.replace("0.0.0.0", "127.0.0.1");
    assert!(scene.content_of(&reachable) == scene.padded());
    let run = interrupted(running, Signal::INT);
    assert!(run.stderr.contains("whoever reaches 0.0.0.0:"), "{run:?}");
    scene.assert_nothing_left();
}

#[test]
fn what_cannot_be_served_is_told_and_not_announced() {
    let scene = Scene::new();
    let refused = |point: &str, arguments: &[&str], words: &[&str]| {
        let run = fails(scene.serve(point, arguments), words);
        assert_eq!(run.stdout, "");
        assert_eq!(names_in(scene.out.path()), [].into(), "{run:?}");
        assert_no_process_in(scene.backups.path());
    };
    refused("web-1", &[], &[r#"holds no backups of image "web-1"; did you mean "web/1"?"#]);
    refused("web/1@20261123T000000Z", &[], &["has no point", &format!("did you mean {POINT:?}?")]);
    let missing = ["--qemu-nbd", "/nowhere/qemu-nbd"];
    refused("web/1", &missing, &["/nowhere/qemu-nbd was not found", "install QEMU's disk tools"]);
    refused("web/1", &["--qemu-nbd", "/bin/false"], &["cannot serve the point: it ended with exit status 1"]);
    refused("web/1", &["--socket", "/nowhere/nbd"], &["cannot make the socket /nowhere/nbd", "No such file"]);
    let long = format!("/tmp/{}", "x".repeat(103));
    refused("web/1", &["--socket", &long], &["has 108 bytes, and may have 107: choose a shorter one"]);
    let within = scene.backups.image("web/1");
    let within = within.to_str().unwrap();
    refused("web/1", &["--writable", "--overlay-dir", within], &["which holds backups"]);
}

/// Who does not want to know where the disk is has no use for the server.
#[test]
fn an_output_that_fails_ends_it() {
    let scene = Scene::new();
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = scene.serve("web/1", &[]).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("cannot write to standard output"), "{told}");
    scene.assert_nothing_left();
}

/// A file system as a virtual machine has it: backed up, served, copied out by stock QEMU, sound, and a
/// file of it is read back, without root and without a mount.
#[test]
fn a_file_comes_back_out_of_a_served_point() {
    let cluster = cluster_or_skip!("serve::a_file_comes_back_out_of_a_served_point");
    let (rig, image) = (Rig::new(&cluster), unique_image("files"));
    let work = TempDir::new().unwrap();
    let out = TempDir::new().unwrap();
    let file = |name: &str| work.path().join(name);
    let tree = file("tree");
    fs::create_dir_all(tree.join("etc")).unwrap();
    let old: Vec<u8> = (0..3 * MIB + 17).map(|byte| (byte * byte / 251 % 256) as u8).collect();
    fs::write(tree.join("etc/big"), &old).unwrap();
    fs::write(tree.join("etc/name"), "old\n").unwrap();
    let make = |tree: &Path| {
        let disk = file("disk");
        let _ = fs::remove_file(&disk);
        let mut mke2fs = Command::new("mke2fs");
        mke2fs.args(["-q", "-F", "-t", "ext4", "-d"]).arg(tree).arg(&disk).arg("32M");
        succeeds(&mut mke2fs);
        fs::read(&disk).unwrap()
    };
    rig.driver.create(&image, 32 * MIB, &Layout::new(22, FULL_FEATURES)).expect("created");
    let put = |disk: &[u8]| {
        for (offset, piece) in (0..).step_by(MIB as usize).zip(disk.chunks(MIB as usize)) {
            rig.driver.write_bytes(&image, offset, piece).expect("written");
        }
        rig.driver.close(&image).expect("closed");
    };
    put(&make(&tree));
    rig.back_up(&image, &["--compression", "zstd"]);
    fs::write(tree.join("etc/name"), "new\n").unwrap();
    put(&make(&tree));
    rig.back_up(&image, &[]);

    let layers = rig.layers(&image);
    for (layer, name) in layers.iter().zip(["old\n", "new\n"]) {
        let point = format!("{}@{}", image.image, crate::rig::point_of(layer));
        let (running, uri) = announced(serve(rig.dest(), out.path(), &point, &[]));
        let copy = file("copy");
        convert(&uri, &copy);
        succeeds(Command::new("e2fsck").args(["-f", "-n"]).arg(&copy));
        for (path, content) in [("/etc/name", name.as_bytes()), ("/etc/big", &old)] {
            let target = file("target");
            let dump = format!("dump {path} {}", target.display());
            succeeds(Command::new("debugfs").args(["-R", &dump]).arg(&copy));
            assert!(fs::read(&target).unwrap() == content, "{path}");
        }
        // No backup meanwhile.
        fails(rig.backup(&image, &[]), &["another run is reading this chain"]);
        interrupted(running, Signal::TERM);
        rig.assert_no_process();
    }
    assert_eq!(layers.len(), 2);
    rig.back_up(&image, &[]);
    rig.driver.purge(&image).expect("removed");
}

fn succeeds(command: &mut Command) {
    let output = command.output().expect("e2fsprogs is installed");
    assert!(output.status.success(), "{command:?}: {output:?}");
}

/// Many at once, each with a name of its own.
#[test]
fn one_point_is_served_many_times() {
    let scene = Scene::new();
    let servers: Vec<_> = (0..4).map(|_| Running::start(scene.serve("web/1", &["-q"]))).collect();
    let mut uris = Vec::new();
    let servers: Vec<_> = servers
        .into_iter()
        .map(|mut server| {
            uris.push(server.wait_for_line());
            server
        })
        .collect();
    for uri in &uris {
        assert!(scene.content_of(uri) == scene.padded());
    }
    uris.sort();
    uris.dedup();
    assert_eq!(uris.len(), servers.len());
    for server in servers {
        interrupted(server, Signal::INT);
    }
    wait_for("end", || names_in(scene.out.path()).is_empty().then_some(()));
    scene.assert_nothing_left();
}

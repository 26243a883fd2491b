use std::fs;
use std::io::{BufRead, BufReader};

use rustix::process::kill_process;

use super::*;
use crate::layer::qemu_nbd::QemuTools;
use crate::layer::qemu_nbd::testing::{self, qemu_img, qemus};
use crate::nbd::client::{Client, ClientOptions};

const SOON: Duration = Duration::from_secs(20);

/// Tells the test binary, run by itself, that it is to be killed while it has a server.
const VICTIM: &str = "RBD2QCOW2_TEST_VICTIM";

fn start(program: &Path, arguments: &[&str], connections: usize) -> (ServerProcess, Vec<UnixStream>) {
    let command = ServerCommand {
        program: program.to_owned(),
        arguments: arguments.iter().map(Into::into).collect(),
        directory: "/".into(),
        connections,
    };
    ServerProcess::start(&command).expect("started")
}

/// Processes, by number, whose command line holds `text`, but for this one and zombies.
fn processes_with(text: &str) -> Vec<u32> {
    let all = fs::read_dir("/proc").expect("proc is there").flatten();
    let numbers = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let with_text = numbers.filter(|number| {
        fs::read_to_string(format!("/proc/{number}/cmdline")).is_ok_and(|line| line.contains(text))
    });
    with_text.filter(|number| *number != std::process::id()).collect()
}

/// Those that [`processes_with`] finds, which were to be gone: no failed test leaves them.
fn left_with(text: &str) -> Vec<u32> {
    let left = processes_with(text);
    for number in &left {
        let pid = i32::try_from(*number).ok().and_then(Pid::from_raw).expect("a number");
        let _ = kill_process(pid, Signal::KILL);
    }
    left
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + SOON;
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A program for the shell.
fn script(body: &str) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let program = testing::script(directory.path(), "server", body);
    (directory, program)
}

/// A raw disk of 1 MiB in a directory whose name is found in no other command line.
fn disk(tools: &QemuTools) -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    qemu_img(tools, directory.path(), &["create", "-q", "-f", "raw", "disk", "1M"]);
    let disk = directory.path().join("disk").to_str().expect("UTF-8").to_owned();
    (directory, disk)
}

#[test]
fn a_program_that_fails_is_told_with_its_last_words() {
    let (_directory, program) = script("echo \"$@\"; echo last words >&2; exit 3");
    let (server, streams) = start(&program, &["argument"], 2);
    let exit = server.exit_within(SOON).expect("it ended");
    assert_eq!(exit.to_string(), "ended with exit status 3, and wrote: --shared=2 argument; last words");
    let error = Client::connect(streams, &ClientOptions::default()).expect_err("nobody there");
    assert!(error.is_disconnect(), "{error:?}");
}

#[test]
fn a_missing_program_is_called_missing() {
    let (server, _streams) = start(Path::new("/nowhere/qemu-nbd"), &[], 1);
    let exit = server.exit_within(SOON).expect("it ended");
    assert_eq!(exit.code, Some(127));
    assert!(exit.to_string().starts_with("was not found, or lacks a library, and wrote: "), "{exit}");
}

#[test]
fn a_signal_is_named() {
    let (_directory, program) = script("kill -9 $$");
    let (server, _streams) = start(&program, &[], 1);
    let exit = server.exit_within(SOON).expect("it ended");
    assert_eq!(exit.to_string(), "was killed by signal 9 and wrote nothing to its standard error");
}

#[test]
fn drop_leaves_no_process() {
    for tools in qemus() {
        let (_directory, disk) = disk(&tools);
        let (server, streams) = start(tools.qemu_nbd(), &["-f", "raw", &disk], 3);
        let client = Client::connect(streams, &ClientOptions::default()).expect("connected");
        assert_eq!(processes_with(&disk).len(), 2, "the shell and the server");
        assert!(server.exit_within(Duration::ZERO).is_none());
        drop(server);
        assert!(processes_with(&disk).is_empty());
        assert!(client.flush().is_err_and(|e| e.is_disconnect()));
    }
}

/// A server that has greeted, and whose shell was killed.
fn start_and_kill_the_shell(tools: &QemuTools, disk: &str) -> (ServerProcess, Vec<UnixStream>) {
    let (server, streams) = start(tools.qemu_nbd(), &["-f", "raw", disk], 1);
    io::Read::read_exact(&mut &streams[0], &mut [0; 8]).expect("greeted");
    let shell = i32::try_from(server.supervisor()).ok().and_then(Pid::from_raw).expect("a number");
    kill_process(shell, Signal::KILL).expect("it runs");
    (server, streams)
}

#[test]
fn drop_leaves_no_server_whose_shell_was_killed() {
    for tools in qemus() {
        let (_directory, disk) = disk(&tools);
        let (server, _streams) = start_and_kill_the_shell(&tools, &disk);
        drop(server);
        assert_eq!(left_with(&disk), [0; 0]);
    }
}

#[test]
fn a_server_whose_shell_was_killed_has_ended() {
    for tools in qemus() {
        let (_directory, disk) = disk(&tools);
        let (server, _streams) = start_and_kill_the_shell(&tools, &disk);
        until("the end of the shell", || server.exit_within(Duration::ZERO).is_some());
        assert_eq!(left_with(&disk), [0; 0]);
        assert_eq!(server.exit_within(Duration::ZERO).expect("it ended").code, Some(128 + 9));
        assert_eq!(server.kill().code, Some(128 + 9));
    }
}

/// What a server has started goes with it, too.
#[test]
fn nothing_is_left_of_the_group() {
    let (directory, program) = script("sh -c 'echo > \"$0\"; sleep 1000' \"$2\"; exit 0");
    let started = directory.path().join("started");
    let (server, _streams) = start(&program, &[started.to_str().expect("UTF-8")], 1);
    until("the start", || started.exists());
    drop(server);
    assert_eq!(left_with(started.to_str().expect("UTF-8")), [0; 0]);
}

#[test]
fn a_relative_path_is_of_this_processes_directory() {
    let (directory, program) = script("exit 5");
    let mut relative = PathBuf::new();
    let mut elsewhere = directory.path().to_owned();
    for _ in std::env::current_dir().expect("a directory").components().skip(1) {
        relative.push("..");
        elsewhere.push("deep");
    }
    relative.push(program.strip_prefix("/").expect("absolute"));
    fs::create_dir_all(&elsewhere).expect("created");
    let command =
        ServerCommand { program: relative, arguments: Vec::new(), directory: elsewhere, connections: 1 };
    let (server, _streams) = ServerProcess::start(&command).expect("started");
    assert_eq!(server.exit_within(SOON).expect("it ended").code, Some(5));
}

#[test]
fn nothing_is_left_of_the_socket() {
    for tools in qemus() {
        let (_directory, disk) = disk(&tools);
        let (_server, streams) = start(tools.qemu_nbd(), &["-f", "raw", &disk], 1);
        let peer = streams[0].peer_addr().expect("a peer");
        assert!(!peer.as_pathname().expect("a path").parent().expect("a directory").exists());
        Client::connect(streams, &ClientOptions::default()).expect("connected");
    }
}

/// Not a test by itself: what the next test kills. Says when it has come to the stage asked for.
#[test]
fn victim() {
    let Ok(stage) = std::env::var(VICTIM) else { return };
    let (stage, rest) = stage.split_once(' ').expect("a stage, a program and a disk");
    let (program, disk) = rest.split_once(' ').expect("a program and a disk");
    let (_server, streams) = start(Path::new(program), &["-f", "raw", disk], 2);
    let _client = match stage {
        "negotiated" => Some(Client::connect(streams, &ClientOptions::default()).expect("connected")),
        "ready" => {
            // The server has greeted, but nobody negotiates.
            io::Read::read_exact(&mut &streams[0], &mut [0; 8]).expect("greeted");
            None
        }
        _ => None,
    };
    writeln!(io::stderr(), "victim is ready").expect("written");
    thread::sleep(SOON * 2);
}

#[test]
fn no_server_survives_a_killed_client() {
    for tools in qemus() {
        for stage in ["started", "ready", "negotiated"] {
            let (_directory, disk) = disk(&tools);
            let program = tools.qemu_nbd().display();
            let mut victim = Command::new(std::env::current_exe().expect("this binary"))
                .args(["nbd::server_process::tests::victim", "--exact", "--nocapture"])
                .env(VICTIM, format!("{stage} {program} {disk}"))
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .expect("started");
            let lines = BufReader::new(victim.stderr.take().expect("piped")).lines();
            assert!(lines.map_while(Result::ok).any(|line| line.contains("victim is ready")));
            // A process that just starts may not show its arguments yet.
            until("the start of the server", || !processes_with(&disk).is_empty());
            victim.kill().expect("killed");
            victim.wait().expect("ended");
            until("the end of the server", || processes_with(&disk).is_empty());
        }
    }
}

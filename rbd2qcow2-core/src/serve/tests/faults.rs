//! What keeps a point from being served, or ends that.

use std::thread;
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};

use super::*;
use crate::error::Causes;
use crate::nbd::NbdError;

/// Not served, and nothing is left: no socket, no overlay, no lock.
fn refused(fixture: &Fixture, serve: &Serve) -> ServeError {
    let before = fixture.names_in_out();
    let error = serve.start(&Cancel::new()).expect_err("not served");
    assert_eq!(fixture.names_in_out(), before, "{error:?}");
    ChainWriter::open(fixture.dest.path(), &fixture.image).expect("free");
    error
}

/// The newest point by a program of the shell, writable.
fn by_script(fixture: &Fixture, programs: &tempfile::TempDir, body: &str) -> Serve {
    let mut serve = fixture.writable(&QemuTools::default());
    serve.options.qemu_nbd = script(programs.path(), "server", body);
    serve
}

#[test]
fn what_is_not_there_is_told() {
    let fixture = Fixture::new();
    let mut serve = fixture.serve();
    serve.point = Some(PointName::parse("20261122T173312Z").expect("a point"));
    let error = refused(&fixture, &serve);
    assert!(matches!(error, ServeError::Point(PointError::UnknownPoint { .. })), "{error:?}");
    serve.image = "vm".into();
    let error = refused(&fixture, &serve);
    assert!(matches!(error, ServeError::Point(PointError::UnknownImage { .. })), "{error:?}");
    serve.image = String::new();
    assert!(matches!(refused(&fixture, &serve), ServeError::Point(PointError::Name(_))));
}

#[test]
fn a_broken_chain_is_not_served() {
    let fixture = Fixture::new();
    let name = format!("{}@{}.qcow2", fixture.image.encoded(), fixture.points[1].0);
    fs::remove_file(fixture.directory().join(name)).expect("removed");
    let error = refused(&fixture, &fixture.serve());
    assert!(
        matches!(&error, ServeError::Point(PointError::Broken { whole, .. }) if *whole == [fixture.points[0].0]),
        "{error:?}"
    );
}

#[test]
fn a_missing_program_is_told_with_what_to_do() {
    let fixture = Fixture::new();
    for program in ["/nowhere/qemu-nbd", "no-such-qemu-nbd"] {
        let mut serve = fixture.serve();
        serve.options.qemu_nbd = program.into();
        let error = refused(&fixture, &serve);
        assert!(matches!(&error, ServeError::NotFound { .. }), "{error:?}");
        let text = error.to_string();
        assert!(
            text.starts_with(&format!("{program} was not found, ")) && text.contains("; install "),
            "{text}"
        );
    }
}

#[test]
fn a_server_that_cannot_serve_is_told_with_its_words() {
    let fixture = Fixture::new();
    let programs = tempfile::tempdir().expect("a directory");
    let serve = by_script(&fixture, &programs, "echo 'no such option' >&2; exit 1");
    let error = refused(&fixture, &serve);
    assert!(matches!(&error, ServeError::Failed { .. }), "{error:?}");
    assert!(error.to_string().ends_with("it ended with exit status 1, and wrote: no such option"), "{error}");
}

/// What our reader does not look at when it opens a chain, and QEMU does: where the refcounts are.
#[test]
fn a_layer_that_qemu_does_not_open_is_told_with_its_words() {
    for tools in qemus() {
        let fixture = Fixture::new();
        let name = format!("{}@{}.qcow2", fixture.image.encoded(), fixture.points[0].0);
        let path = fixture.directory().join(name);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("changed");
        let file = fs::File::options().write(true).open(&path).expect("writable");
        std::os::unix::fs::FileExt::write_all_at(&file, &(1_u64 << 32).to_be_bytes(), 48).expect("written");
        drop(file);
        match fixture.serve_with(&tools).start(&Cancel::new()) {
            Err(ServeError::Failed { exit, .. }) => assert!(exit.stderr.contains("refcount"), "{exit}"),
            // Whoever looks first has something to say.
            Err(ServeError::Point(error)) => {
                assert!(Causes(&error).to_string().contains("refcount"), "{error}")
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(fixture.names_in_out(), [""; 0]);
    }
}

#[test]
fn another_disk_is_not_announced() {
    for tools in qemus() {
        let fixture = Fixture::new();
        let programs = tempfile::tempdir().expect("a directory");
        let size = fixture.newest().len().next_multiple_of(512);
        qemu_img(&tools, programs.path(), &["create", "-q", "-f", "raw", "right", &size.to_string()]);
        qemu_img(&tools, programs.path(), &["create", "-q", "-f", "raw", "wrong", "1M"]);
        let disk = |name: &str| {
            let disk = programs.path().join(name);
            format!("exec {} --persistent -r -f raw {}", tools.qemu_nbd().display(), disk.display())
        };
        fs::write(programs.path().join("wrong"), [0; 512]).expect("written");
        let error = refused(&fixture, &by_script(&fixture, &programs, &disk("wrong")));
        let expected = size as u64;
        assert!(
            matches!(error, ServeError::WrongSize { expected: e, found: 512 } if e == expected),
            "{error:?}"
        );
        let error = refused(&fixture, &by_script(&fixture, &programs, &disk("right")));
        assert!(matches!(error, ServeError::WrongAccess { read_only: true }), "{error:?}");
    }
}

#[test]
fn a_server_that_says_nothing_is_given_up() {
    let fixture = Fixture::new();
    let programs = tempfile::tempdir().expect("a directory");
    let mut serve = by_script(&fixture, &programs, "exec sleep 1000");
    serve.options.start_limit = Duration::from_millis(200);
    let error = refused(&fixture, &serve);
    assert!(matches!(&error, ServeError::Nbd { cause: NbdError::TimedOut { .. }, .. }), "{error:?}");
}

#[test]
fn a_stop_ends_the_start() {
    let fixture = Fixture::new();
    let programs = tempfile::tempdir().expect("a directory");
    let started = programs.path().join("started");
    let serve = by_script(&fixture, &programs, &format!("> {}; exec sleep 1000", started.display()));
    let cancel = Cancel::new();
    let error = thread::scope(|scope| {
        let starter = scope.spawn(|| serve.start(&cancel));
        let deadline = Instant::now() + HANG;
        while !started.exists() {
            assert!(Instant::now() < deadline, "it never started");
            thread::sleep(Duration::from_millis(5));
        }
        cancel.set();
        starter.join().expect("no panic").expect_err("stopped")
    });
    assert!(matches!(error, ServeError::Cancelled), "{error:?}");
    assert_eq!(fixture.names_in_out(), [""; 0]);
}

#[test]
fn a_server_that_dies_is_told() {
    for tools in qemus() {
        let fixture = Fixture::new();
        let served = start(&fixture.writable(&tools));
        let client = connect(&fixture.socket(), 1);
        let pid = Pid::from_raw(i32::try_from(server_of(&served)).expect("a number")).expect("not 0");
        kill_process(pid, Signal::KILL).expect("it runs");
        let error = served.wait(&Cancel::new()).expect_err("it is dead");
        assert!(matches!(&error, ServeError::Died { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("was killed by signal 9") && text.ends_with("not served any more"), "{text}");
        assert!(client.read(0, &mut [0; 512]).is_err_and(|error| error.is_disconnect()));
        drop(served);
        assert_eq!(fixture.names_in_out(), [""; 0]);
    }
}

#[test]
fn a_server_whose_shell_was_killed_is_told_and_gone() {
    for tools in qemus() {
        let fixture = Fixture::new();
        let served = start(&fixture.writable(&tools));
        let client = connect(&fixture.socket(), 1);
        let server = server_of(&served);
        let shell = i32::try_from(served.server.supervisor()).expect("a number");
        kill_process(Pid::from_raw(shell).expect("not 0"), Signal::KILL).expect("it runs");
        let error = served.wait(&Cancel::new()).expect_err("it is dead");
        assert!(matches!(&error, ServeError::Died { .. }), "{error:?}");
        // A zombie has no arguments; whose child it is by now may not wait for it.
        let arguments = fs::read(format!("/proc/{server}/cmdline")).unwrap_or_default();
        assert!(arguments.is_empty(), "{}", String::from_utf8_lossy(&arguments));
        assert!(client.read(0, &mut [0; 512]).is_err_and(|error| error.is_disconnect()));
        drop(served);
        assert_eq!(fixture.names_in_out(), [""; 0]);
    }
}

/// As systemd stops a service.
#[test]
fn a_server_that_is_stopped_with_us_has_not_died() {
    for tools in qemus() {
        let fixture = Fixture::new();
        let served = start(&fixture.serve_with(&tools));
        let cancel = Cancel::new();
        thread::scope(|scope| {
            let waiter = scope.spawn(|| served.wait(&cancel));
            let pid = Pid::from_raw(i32::try_from(server_of(&served)).expect("a number")).expect("not 0");
            kill_process(pid, Signal::TERM).expect("it runs");
            cancel.set();
            waiter.join().expect("no panic").expect("it was to end");
        });
    }
}

#[test]
fn an_overlay_has_no_place_within_the_chain() {
    let fixture = Fixture::new();
    let mut serve = fixture.serve();
    let link = fixture.out.path().join("link");
    std::os::unix::fs::symlink(fixture.directory(), &link).expect("a link");
    let files = fixture.files();
    for place in [fixture.directory(), link] {
        serve.options.access = Access::Writable { overlay_directory: Some(place) };
        let error = refused(&fixture, &serve);
        assert!(matches!(&error, ServeError::WithinChain { .. }), "{error:?}");
    }
    for place in ["missing", "file"] {
        fs::write(fixture.out.path().join("file"), "").expect("written");
        serve.options.access = Access::Writable { overlay_directory: Some(fixture.out.path().join(place)) };
        let error = refused(&fixture, &serve);
        assert!(matches!(&error, ServeError::OverlayDirectory { .. }), "{error:?}");
    }
    assert!(fixture.files() == files);
}

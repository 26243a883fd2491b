//! Names, modes and addresses.

use super::*;

fn error_of(serve: &Serve) -> ServeError {
    serve.start(&Cancel::new()).expect_err("not served")
}

#[test]
fn a_port_is_chosen_told_and_not_shared() {
    let fixture = Fixture::new();
    for tools in qemus() {
        for any in ["127.0.0.1:0", "[::1]:0"] {
            if std::net::TcpListener::bind(any).is_err() {
                assert!(any.starts_with('['), "no IPv4");
                continue;
            }
            let mut serve = fixture.serve_with(&tools);
            serve.options.listen = Listen::Tcp(any.parse().expect("an address"));
            let served = start(&serve);
            let uri = served.uri();
            let address: SocketAddr = uri.strip_prefix("nbd://").expect("nbd").parse().expect("an address");
            assert!(address.ip().is_loopback() && address.port() != 0);
            assert!(converted(&tools, fixture.out.path(), &uri) == padded(fixture.newest()));
            serve.options.listen = Listen::Tcp(address);
            let error = error_of(&serve);
            assert!(
                matches!(error, ServeError::PortInUse { address: found } if found == address),
                "{error:?}"
            );
            assert!(error.to_string().starts_with(&format!("port {} of ", address.port())), "{error}");
            // The port is free again at once.
            drop(served);
            assert_eq!(start(&serve).uri(), uri);
        }
    }
}

#[test]
fn an_address_of_another_machine_is_refused() {
    let fixture = Fixture::new();
    let mut serve = fixture.serve();
    serve.options.listen = Listen::Tcp("192.0.2.1:10809".parse().expect("an address"));
    assert!(matches!(error_of(&serve), ServeError::Address { .. }));
}

#[test]
fn a_socket_that_a_killed_server_left_is_replaced() {
    let fixture = Fixture::new();
    for tools in qemus() {
        drop(UnixListener::bind(fixture.socket()).expect("bound"));
        let serve = fixture.serve_with(&tools);
        let served = start(&serve);
        assert!(read_all(&connect(&fixture.socket(), 1)) == padded(fixture.newest()));
        // This one is alive.
        let error = error_of(&serve);
        assert!(matches!(&error, ServeError::SocketInUse { path } if *path == fixture.socket()), "{error:?}");
        assert!(read_all(&connect(&fixture.socket(), 1)) == padded(fixture.newest()));
        drop(served);
        assert!(!fixture.socket().exists());
    }
}

#[test]
fn a_name_that_is_another_servers_by_now_stays() {
    let fixture = Fixture::new();
    for tools in qemus() {
        let served = start(&fixture.serve_with(&tools));
        fs::remove_file(fixture.socket()).expect("removed");
        let _other = UnixListener::bind(fixture.socket()).expect("bound");
        drop(served);
        assert!(fixture.socket().exists());
        fs::remove_file(fixture.socket()).expect("removed");
    }
}

/// Two runs that replace the same left-over may meet: the one whose name is gone must not announce it.
#[test]
fn a_name_that_leads_elsewhere_is_not_announced() {
    let fixture = Fixture::new();
    let programs = tempfile::tempdir().expect("a directory");
    for tools in qemus() {
        let point = OpenPoint::open(fixture.dest.path(), &fixture.image, None).expect("opened");
        let listen = Listen::Socket(fixture.socket());
        let (listener, socket) = Listener::bind(&listen, fixture.dest.path(), &point).expect("bound");
        fs::remove_file(fixture.socket()).expect("removed");
        qemu_img(&tools, programs.path(), &["create", "-q", "-f", "raw", "disk", "1M"]);
        let body = format!(
            "unset LISTEN_FDS LISTEN_PID; exec {} -t -f raw -k {} {}",
            tools.qemu_nbd().display(),
            fixture.socket().display(),
            programs.path().join("disk").display(),
        );
        let command = ServerCommand {
            program: script(programs.path(), "other", &body),
            arguments: Vec::new(),
            directory: "/".into(),
            connections: 1,
        };
        let other = ServerProcess::listen(&command, socket).expect("started");
        let deadline = std::time::Instant::now() + HANG;
        while UnixStream::connect(fixture.socket()).is_err() {
            assert!(std::time::Instant::now() < deadline, "the other server never came");
            std::thread::sleep(Duration::from_millis(5));
        }
        let error = probe::probe(&listener, &other, HANG, &Cancel::new()).expect_err("not ours");
        assert!(matches!(error, ProbeError::Replaced), "{error:?}");
        drop(other);
        drop(listener);
        fs::remove_file(fixture.socket()).expect("the other's was left alone");
    }
}

/// All find the same left-over at once: one replaces it, and keeps the name.
#[test]
fn one_of_many_replaces_a_left_over() {
    let fixture = Fixture::new();
    let point = OpenPoint::open(fixture.dest.path(), &fixture.image, None).expect("opened");
    let listen = Listen::Socket(fixture.socket());
    let barrier = std::sync::Barrier::new(8);
    for _ in 0..5 {
        drop(UnixListener::bind(fixture.socket()).expect("bound"));
        let attempt = || {
            barrier.wait();
            Listener::bind(&listen, fixture.dest.path(), &point)
        };
        let attempts: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(attempt)).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        let (bound, refused): (Vec<_>, Vec<_>) = attempts.into_iter().partition(Result::is_ok);
        assert_eq!(bound.len(), 1);
        assert!(refused.iter().all(|result| matches!(result, Err(ServeError::SocketInUse { .. }))));
        UnixStream::connect(fixture.socket()).expect("it is there and listens");
        drop(bound);
        assert_eq!(fixture.names_in_out(), [""; 0]);
    }
}

/// Whoever keeps the directory locked keeps nobody from serving there.
#[test]
fn a_directory_that_somebody_locks_is_used() {
    let fixture = Fixture::new();
    let directory = fs::File::open(fixture.out.path()).expect("opened");
    rustix::fs::flock(&directory, rustix::fs::FlockOperation::LockExclusive).expect("locked");
    let point = OpenPoint::open(fixture.dest.path(), &fixture.image, None).expect("opened");
    let listen = Listen::Socket(fixture.socket());
    let _bound = Listener::bind(&listen, fixture.dest.path(), &point).expect("bound");
    UnixStream::connect(fixture.socket()).expect("it listens");
}

#[test]
fn what_is_in_the_way_stays() {
    let fixture = Fixture::new();
    let serve = fixture.serve();
    fs::write(fixture.socket(), "precious").expect("written");
    let error = error_of(&serve);
    assert!(matches!(&error, ServeError::SocketExists { .. }), "{error:?}");
    assert_eq!(fs::read(fixture.socket()).expect("there"), b"precious");
    fs::remove_file(fixture.socket()).expect("removed");
    for target in ["nowhere", "/"] {
        std::os::unix::fs::symlink(target, fixture.socket()).expect("a link");
        assert!(matches!(error_of(&serve), ServeError::SocketExists { .. }), "{target}");
        assert!(fixture.socket().is_symlink());
        fs::remove_file(fixture.socket()).expect("removed");
    }
    assert_eq!(fixture.names_in_out(), [""; 0]);
}

#[test]
fn places_where_no_socket_can_be_are_told() {
    let fixture = Fixture::new();
    let mut serve = fixture.serve();
    let mut refused = |path: PathBuf| {
        serve.options.listen = Listen::Socket(path);
        error_of(&serve)
    };
    let long = fixture.out.path().join("x".repeat(100));
    let error = refused(long.clone());
    assert!(matches!(&error, ServeError::SocketTooLong { limit: 107, path } if *path == long), "{error:?}");
    let error = refused(fixture.out.path().join("missing/nbd"));
    assert!(matches!(&error, ServeError::Socket { .. }), "{error:?}");
    let within = fixture.directory().join("nbd");
    let link = fixture.out.path().join("link");
    std::os::unix::fs::symlink(fixture.directory(), &link).expect("a link");
    for path in [within.clone(), link.join("nbd")] {
        let error = refused(path);
        assert!(matches!(&error, ServeError::WithinChain { .. }), "{error:?}");
    }
    assert!(!within.exists());
}

#[test]
fn the_longest_path_is_served() {
    let fixture = Fixture::new();
    for tools in qemus() {
        let mut serve = fixture.serve_with(&tools);
        let rest = 107 - fixture.out.path().as_os_str().len() - 1;
        let path = fixture.out.path().join("x".repeat(rest));
        serve.options.listen = Listen::Socket(path.clone());
        let served = start(&serve);
        assert!(read_all(&connect(&path, 1)) == padded(fixture.newest()));
        assert!(converted(&tools, fixture.out.path(), &served.uri()) == padded(fixture.newest()));
    }
}

#[test]
fn a_socket_may_have_any_name() {
    let fixture = Fixture::new();
    for tools in qemus() {
        let mut serve = fixture.serve_with(&tools);
        serve.options.listen = Listen::Socket(fixture.out.path().join("a b,c=d:é?#+[x]"));
        let served = start(&serve);
        assert!(
            converted(&tools, fixture.out.path(), &served.uri()) == padded(fixture.newest()),
            "{served:?}"
        );
    }
}

#[test]
fn sockets_with_names_of_their_own_do_not_collide() {
    let fixture = Fixture::new();
    let point = OpenPoint::open(fixture.dest.path(), &fixture.image, None).expect("opened");
    let bind = || listener::bind_any(fixture.out.path(), fixture.dest.path(), &point).expect("bound");
    let name = |end: &str| {
        let start = format!("rbd2qcow2-a_b_c_d___-{}", fixture.points.last().expect("points").0);
        OsString::from(start + end)
    };
    let (first, socket) = bind();
    let (_second, _socket) = bind();
    assert_eq!(fixture.names_in_out(), [name("-2.sock"), name(".sock")]);
    for entry in fs::read_dir(fixture.out.path()).expect("listed") {
        let metadata = entry.expect("listed").metadata().expect("there");
        assert!(metadata.file_type().is_socket());
        assert_eq!(metadata.permissions().mode() & 0o7777, 0o600);
    }
    // Nobody listens any more, as after a kill: the name is taken again.
    std::mem::forget(first);
    drop(socket);
    let (_third, _socket) = bind();
    assert_eq!(fixture.names_in_out(), [name("-2.sock"), name(".sock")]);
    // What is no socket is left alone.
    fs::write(fixture.out.path().join(name("-3.sock")), "").expect("written");
    let (_fourth, _socket) = bind();
    assert!(fixture.out.path().join(name("-4.sock")).exists());
}

#[test]
fn the_socket_of_nobody_else_is_used() {
    let fixture = Fixture::new();
    for tools in qemus() {
        let mut serve = fixture.serve_with(&tools);
        serve.options.listen = Listen::AnySocket;
        let (one, two) = (start(&serve), start(&serve));
        assert_ne!(one.uri(), two.uri());
        for uri in [one.uri(), two.uri()] {
            assert!(converted(&tools, fixture.out.path(), &uri) == padded(fixture.newest()));
        }
    }
}

use std::io;
use std::io::Cursor;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::thread;

use self::double::{Double, MULTI, PLAIN, Shown};
use super::*;
use crate::layer::qemu_nbd::testing::Random;
use crate::nbd::Violation;
use crate::nbd::wire::{CMD_FAST_ZERO, Errno, Request};

mod double;
mod qemu;

/// How long a test waits for what should happen at once.
const SOON: Duration = Duration::from_secs(20);

fn options() -> ClientOptions {
    ClientOptions {
        allocation: true,
        handshake_limit: SOON,
        disconnect_limit: SOON,
        ..ClientOptions::default()
    }
}

/// Runs `server` in a thread for each of some connections, and `test` with the client's ends.
fn with_servers<T>(
    connections: usize,
    server: impl Fn(usize, Double) -> io::Result<()> + Sync,
    test: impl FnOnce(Vec<UnixStream>) -> T,
) -> T {
    let pairs: Vec<_> = (0..connections).map(|_| UnixStream::pair().expect("a pair of sockets")).collect();
    let (clients, servers): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
    thread::scope(|scope| {
        let server = &server;
        for (number, stream) in servers.into_iter().enumerate() {
            // The client may well have left in the middle.
            scope.spawn(move || server(number, Double(stream)).ok());
        }
        test(clients)
    })
}

/// Runs `server` on one connection, with a client connected to it.
fn with_server<T>(
    shown: Shown,
    server: impl Fn(&mut Double) -> io::Result<()> + Sync,
    test: impl FnOnce(Client) -> T,
) -> T {
    let serve = |_, mut double: Double| {
        double.negotiate(shown)?;
        server(&mut double)
    };
    with_servers(1, serve, |streams| test(Client::connect(streams, &options()).expect("connected")))
}

fn zeroes(length: usize) -> Bytes {
    Bytes::from(vec![0; length])
}

#[test]
fn the_nbd_crates_server_is_understood() {
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    let server = thread::spawn(move || {
        let export =
            |_: &str| Ok(nbd::Export::<()> { size: 4 << 20, send_flush: true, ..Default::default() });
        nbd::server::handshake(&theirs, export).expect("negotiated");
        let mut disk = Cursor::new(vec![0xff; 4 << 20]);
        nbd::server::transmission(&theirs, &mut disk).expect("served");
        disk.into_inner()
    });
    let client = Client::connect(vec![ours], &options()).expect("connected");
    assert!(!client.export().structured);
    let mut random = Random::new(7);
    let data = random.bytes(1 << 20);
    client.write(512, Bytes::from(data.clone())).expect("written");
    // The server has no write-zeroes: zeroes travel.
    client.write_zeroes(1 << 20, 3 << 20, ZeroOptions::default()).expect("zeroed");
    client.flush().expect("flushed");
    let mut read = vec![1; (1 << 20) - 512];
    client.read(512, &mut read).expect("read");
    assert!(read == data[..read.len()]);
    let status = client.block_status(0, 512);
    assert!(matches!(status, Err(NbdError::Unsupported { command: Command::BlockStatus })), "{status:?}");
    client.disconnect().expect("disconnected");
    let disk = server.join().expect("no panic");
    assert!(disk[..512].iter().all(|byte| *byte == 0xff));
    assert!(disk[512..1 << 20] == data[..read.len()] && disk[1 << 20..].iter().all(|byte| *byte == 0));
}

/// Serves several requests at a time, in random order, reads in random pieces.
fn jumble(double: &mut Double, disk: &Mutex<Vec<u8>>, random: &mut Random) -> io::Result<()> {
    loop {
        let mut requests = vec![double.request()?];
        // Takes only what is there: never waits for a request while one is unanswered.
        while requests.len() < 9 && random.below(4) > 0 && double.has_request() {
            requests.push(double.request()?);
        }
        while !requests.is_empty() {
            let next = usize::try_from(random.below(requests.len() as u64)).expect("small");
            let (request, payload) = requests.swap_remove(next);
            if request.command.get() == Command::Disconnect as u16 {
                return Ok(());
            }
            serve_one(double, disk, random, &request, &payload)?;
        }
    }
}

fn serve_one(
    double: &mut Double,
    disk: &Mutex<Vec<u8>>,
    random: &mut Random,
    request: &Request,
    payload: &[u8],
) -> io::Result<()> {
    let cookie = request.cookie.get();
    let from = usize::try_from(request.offset.get()).expect("small");
    let to = from + request.length.get() as usize;
    match request.command.get() {
        0 => {
            let mut at = from;
            while at < to {
                let end = to.min(at + 1 + usize::try_from(random.below(9000)).expect("small").max(600));
                let bytes = disk.lock().expect("no panic")[at..end].to_vec();
                let offset = (at as u64).to_be_bytes();
                if bytes.iter().all(|byte| *byte == 0) {
                    let length = request.length.get().min(u32::try_from(end - at).expect("small"));
                    double.chunk(cookie, 0, 2, &[&offset[..], &length.to_be_bytes()].concat())?;
                } else {
                    double.chunk(cookie, 0, 1, &[&offset[..], &bytes].concat())?;
                }
                at = end;
            }
            double.chunk(cookie, 1, 0, &[])
        }
        1 => {
            disk.lock().expect("no panic")[from..to].copy_from_slice(payload);
            double.simple(cookie, 0)
        }
        6 => {
            disk.lock().expect("no panic")[from..to].fill(0);
            double.chunk(cookie, 1, 0, &[])
        }
        _ => double.simple(cookie, 0),
    }
}

#[test]
fn replies_in_any_order_over_several_connections_equal_the_model() {
    const SIZE: usize = 4 << 20;
    for seed in 1..=4 {
        let mut random = Random::new(seed);
        let mut model = random.bytes(SIZE);
        let disk = Mutex::new(model.clone());
        let shown =
            Shown { size: SIZE as u64, flags: MULTI, blocks: [512, 4096, 65_536], ..Shown::default() };
        let serve = |number: usize, mut double: Double| {
            double.negotiate(shown)?;
            jumble(&mut double, &disk, &mut Random::new(seed * 100 + number as u64))
        };
        with_servers(3, serve, |streams| {
            let client = Client::connect(streams, &options()).expect("connected");
            assert_eq!(client.connections(), 3);
            for round in 0..4 {
                let mut at = 0;
                while at < SIZE {
                    let end = SIZE.min(at + 512 * (1 + usize::try_from(random.below(400)).expect("small")));
                    match random.below(3) {
                        0 => {
                            model[at..end].fill(0);
                            client.write_zeroes(at as u64, (end - at) as u64, ZeroOptions::default())
                        }
                        1 => Ok(()),
                        _ => {
                            model[at..end].copy_from_slice(&random.bytes(end - at));
                            client.write(at as u64, Bytes::copy_from_slice(&model[at..end]))
                        }
                    }
                    .expect("accepted");
                    at = end;
                }
                client.flush().expect("flushed");
                let mut read = vec![1; SIZE];
                client.read(0, &mut read).expect("read");
                assert!(read == model, "seed {seed}, round {round}");
            }
            client.disconnect().expect("disconnected");
        });
        assert!(*disk.lock().expect("no panic") == model);
    }
}

/// What the double does with the first request, and a word of the client's error.
#[test]
fn each_misbehaviour_has_its_error() {
    type Deed = fn(&mut Double, u64) -> io::Result<()>;
    let cases: [(&str, Deed); 9] = [
        ("UnknownCookie", |double, cookie| double.simple(cookie + 1000, 0)),
        ("UnknownCookie", |double, cookie| {
            double.simple(cookie, 0)?;
            double.simple(cookie, 0)
        }),
        ("UnknownCookie", |double, cookie| {
            double.chunk(cookie, 1, 0, &[])?;
            double.chunk(cookie, 1, 0, &[])
        }),
        ("BadMagic", |double, _| io::Write::write_all(&mut double.0, b"what?")),
        ("Closed", |double, _| double.0.shutdown(std::net::Shutdown::Both)),
        ("Closed", |double, _| io::Write::write_all(&mut double.0, &[0x67, 0x44])),
        ("WrongChunk {", |double, cookie| double.chunk(cookie, 1, 1, b"01234567x")),
        ("Refused { operation: Operation { command: Write, offset: 1024, length: 512 }", |double, cookie| {
            double.simple(cookie, 28)
        }),
        // The reason counts, not the connection that breaks right after.
        ("errno: Errno(5), message: \"oh\"", |double, cookie| {
            double.chunk(cookie, 1, wire::CHUNK_ERROR, b"\0\0\0\x05\0\x02oh")?;
            double.0.shutdown(std::net::Shutdown::Both)
        }),
    ];
    for (expected, deed) in cases {
        let serve = |double: &mut Double| {
            let (request, _) = double.request()?;
            deed(double, request.cookie.get())
        };
        with_server(Shown::default(), serve, |client| {
            client.write(1024, zeroes(512)).expect("queued");
            let first = loop {
                // A second reply to one request may come after the drain.
                if let Err(error) = client.drain().and_then(|()| client.write(0, zeroes(512))) {
                    break error;
                }
            };
            assert!(format!("{first:?}").contains(expected), "{first:?} is not {expected}");
            for later in [client.write(0, zeroes(512)), client.flush(), client.read(0, &mut [0; 512])] {
                assert_eq!(format!("{:?}", later.expect_err("failed")), format!("{first:?}"));
            }
            assert_eq!(format!("{:?}", client.disconnect().expect_err("failed")), format!("{first:?}"));
        });
    }
}

#[test]
fn a_reply_over_the_wrong_connection_is_not_taken() {
    let (ours, theirs): (Vec<_>, Vec<_>) =
        (0..2).map(|_| UnixStream::pair().expect("a pair of sockets")).unzip();
    let server = thread::spawn(move || {
        let mut doubles: Vec<_> = theirs.into_iter().map(Double).collect();
        for double in &mut doubles {
            double.negotiate(Shown { flags: MULTI, ..Shown::default() })?;
        }
        while !doubles[0].has_request() && !doubles[1].has_request() {
            thread::sleep(Duration::from_millis(1));
        }
        if !doubles[0].has_request() {
            doubles.swap(0, 1);
        }
        let cookie = doubles[0].request()?.0.cookie.get();
        doubles[1].simple(cookie, 0)?;
        // Stays until the client has had enough.
        doubles[0].request().map(|_| ())
    });
    let client = Client::connect(ours, &options()).expect("connected");
    client.write(0, zeroes(512)).expect("queued");
    let error = client.drain().expect_err("not answered");
    assert!(matches!(error, NbdError::Protocol(Violation::UnknownCookie { .. })), "{error:?}");
    assert!(server.join().expect("no panic").is_err());
}

#[test]
fn one_late_reply_holds_up_nobody() {
    let serve = |double: &mut Double| {
        let (first, _) = double.request()?;
        for _ in 0..100 {
            let (request, _) = double.request()?;
            double.simple(request.cookie.get(), 0)?;
        }
        double.simple(first.cookie.get(), 0)?;
        double.agree()
    };
    with_server(Shown::default(), serve, |client| {
        for number in 0..101 {
            client.write(number * 512, zeroes(512)).expect("queued");
        }
        client.drain().expect("drained");
        client.disconnect().expect("disconnected");
    });
}

#[test]
fn abort_frees_everybody() {
    let (done, wait) = bounded::<()>(0);
    let serve = |double: &mut Double| {
        double.request()?;
        let _ = wait.recv_timeout(SOON);
        Ok(())
    };
    with_server(Shown::default(), serve, |client| {
        thread::scope(|scope| {
            let writer = scope.spawn(|| (0..).find_map(|n| client.write(n * 512, zeroes(512)).err()));
            let reader = scope.spawn(|| client.read(0, &mut [0; 512]));
            let drainer = scope.spawn(|| {
                loop {
                    // Nothing may be queued yet.
                    client.drain()?;
                }
            });
            thread::sleep(Duration::from_millis(100));
            assert!(!writer.is_finished() && !reader.is_finished() && !drainer.is_finished());
            client.abort();
            let aborted = |error| matches!(error, Some(NbdError::Aborted));
            assert!(aborted(writer.join().expect("no panic")));
            assert!(aborted(reader.join().expect("no panic").err()));
            let drained: Result<(), NbdError> = drainer.join().expect("no panic");
            assert!(aborted(drained.err()));
        });
        drop(done);
    });
}

#[test]
fn dropping_the_client_closes_the_connection() {
    let (tell, wait) = bounded(2);
    let serve = |double: &mut Double| {
        let _ = tell.send(double.request().is_ok());
        let _ = tell.send(double.request().is_ok());
        Ok(())
    };
    with_server(Shown::default(), serve, |client| {
        client.write(0, zeroes(512)).expect("queued");
        assert_eq!(wait.recv_timeout(SOON), Ok(true));
        drop(client);
        assert_eq!(wait.recv_timeout(SOON), Ok(false));
    });
}

#[test]
fn a_silent_server_is_given_up() {
    let (done, wait) = bounded::<()>(0);
    let serve = |_, double: Double| {
        let _ = wait.recv_timeout(SOON);
        drop(double);
        Ok(())
    };
    with_servers(1, serve, |streams| {
        let options = ClientOptions { handshake_limit: Duration::from_millis(50), ..options() };
        let error = Client::connect(streams, &options).expect_err("silent");
        assert!(matches!(error, NbdError::TimedOut { .. }), "{error:?}");
        drop(done);
    });
}

#[test]
fn a_server_must_end_when_told_to() {
    let disconnect = |deed: fn(&mut Double) -> io::Result<()>| {
        let (done, wait) = bounded::<()>(0);
        let serve = |_, mut double: Double| {
            double.negotiate(Shown::default())?;
            double.agree()?;
            deed(&mut double)?;
            let _ = wait.recv_timeout(SOON);
            Ok(())
        };
        with_servers(1, serve, |streams| {
            let options = ClientOptions { disconnect_limit: Duration::from_millis(100), ..options() };
            let result = Client::connect(streams, &options).expect("connected").disconnect();
            drop(done);
            result.expect_err("not in order")
        })
    };
    let stays = disconnect(|_| Ok(()));
    assert!(matches!(stays, NbdError::TimedOut { .. }), "{stays:?}");
    let talks = disconnect(|double| double.simple(1, 0));
    assert!(matches!(talks, NbdError::Protocol(Violation::UnknownCookie { .. })), "{talks:?}");
}

#[test]
fn connections_must_show_the_same_export() {
    let serve = |number: usize, mut double: Double| {
        double.negotiate(Shown { size: 512 * (1 + number as u64), flags: MULTI, ..Shown::default() })
    };
    let error =
        with_servers(2, serve, |streams| Client::connect(streams, &options()).expect_err("they differ"));
    assert!(matches!(error, NbdError::ExportsDiffer { connection: 1, .. }), "{error:?}");
    let none = Client::connect(Vec::new(), &options());
    assert!(matches!(none, Err(NbdError::NoConnection)));
}

#[test]
fn without_multi_conn_one_connection_is_used() {
    let serve = |number: usize, mut double: Double| {
        if number > 0 {
            // Never negotiated, just closed.
            double.0.set_read_timeout(Some(SOON))?;
            assert!(double.negotiate(Shown::default()).is_err());
            return Ok(());
        }
        double.negotiate(Shown::default())?;
        double.agree()
    };
    with_servers(3, serve, |streams| {
        let client = Client::connect(streams, &options()).expect("connected");
        assert_eq!(client.connections(), 1);
        client.flush().expect("flushed");
        client.disconnect().expect("disconnected");
    });
}

#[test]
fn zeroes_that_cannot_be_fast_are_made_slowly() {
    let asked = Mutex::new(Vec::new());
    let serve = |double: &mut Double| {
        loop {
            let (request, _) = double.request()?;
            let cookie = request.cookie.get();
            match (request.command.get(), request.flags.get() & CMD_FAST_ZERO) {
                (2, _) => return Ok(()),
                (6, 0) => asked.lock().expect("no panic").push((request.offset.get(), request.length.get())),
                (6, _) => {
                    double.simple(cookie, Errno::ENOTSUP.0)?;
                    continue;
                }
                _ => {}
            }
            double.simple(cookie, 0)?;
        }
    };
    let shown =
        Shown { size: 3 << 30, flags: PLAIN | TransmissionFlags::SEND_FAST_ZERO.0, ..Shown::default() };
    with_server(shown, serve, |client| {
        let fast = ZeroOptions { fast: true, ..ZeroOptions::default() };
        client.write_zeroes(512, (2 << 30) + 512, fast).expect("queued");
        client.flush().expect("flushed");
        client.disconnect().expect("disconnected");
    });
    let mut asked = asked.into_inner().expect("no panic");
    asked.sort_unstable();
    assert_eq!(asked, [(512, 1 << 30), ((1 << 30) + 512, 1 << 30), ((2 << 30) + 512, 512)]);
}

#[test]
fn impossible_requests_are_refused_and_leave_the_client_intact() {
    let shown = Shown { size: 1 << 20, ..Shown::default() };
    with_server(shown, Double::agree, |client| {
        let misaligned = |result| matches!(result, Err(NbdError::Misaligned { minimum: 512, .. }));
        let outside = |result| matches!(result, Err(NbdError::OutOfBounds { .. }));
        assert!(misaligned(client.write(1, zeroes(512))));
        assert!(misaligned(client.write(0, zeroes(511))));
        assert!(misaligned(client.write_zeroes(0, 1, ZeroOptions::default())));
        assert!(misaligned(client.read(3, &mut [0; 512])));
        assert!(outside(client.write(1 << 20, zeroes(512))));
        assert!(outside(client.write_zeroes(u64::MAX - 511, 512, ZeroOptions::default())));
        client.write(0, Bytes::new()).expect("nothing to do");
        client.write_zeroes(1 << 20, 0, ZeroOptions::default()).expect("nothing to do");
        client.flush().expect("flushed");
        client.disconnect().expect("disconnected");
    });
    let read_only = Shown { flags: 0b11, ..Shown::default() };
    with_server(read_only, Double::agree, |client| {
        assert!(matches!(client.write(0, zeroes(512)), Err(NbdError::ReadOnly)));
        assert!(matches!(client.flush(), Err(NbdError::Unsupported { command: Command::Flush })));
        client.disconnect().expect("disconnected");
    });
}

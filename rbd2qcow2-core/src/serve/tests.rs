use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Output};

use bytes::Bytes;

use super::*;
use crate::chain::lock::LOCK_FILE;
use crate::chain::manifest::tests::record;
use crate::chain::{ChainError, ChainWriter, LayerPlan, Record, image_directory};
use crate::layer::native::testing::{Form, spec_of, write};
use crate::layer::qemu_nbd::QemuTools;
use crate::layer::qemu_nbd::testing::{Random, contents, qemu_img, qemus, script};
use crate::layer::{Compression, ExtendedL2, LayerWriter};
use crate::nbd::client::{Client, ClientOptions};
use crate::point::PointError;
use crate::qcow2::testing::{VARIANTS, make, qemu};

mod faults;
mod sockets;

/// A limit for what takes a moment. Only a hang takes as long.
const HANG: Duration = Duration::from_secs(60);

/// Sizes of an image at its points: no multiple of a sector, grown, shrunk.
const SIZES: [usize; 4] = [1_000_001, 3 << 20, 2_500_003, 1 << 20];

/// An image whose names are as strange as they can be, and a directory for sockets.
struct Fixture {
    dest: tempfile::TempDir,
    out: tempfile::TempDir,
    image: ImageName,
    /// What each point holds, the oldest first.
    points: Vec<(PointName, Vec<u8>)>,
}

impl Fixture {
    fn empty() -> Self {
        let strange = OsString::from_vec(b"d,,e:s=t% \xff\"{".to_vec());
        Self {
            dest: tempfile::Builder::new().prefix(&strange).tempdir().expect("a directory"),
            out: tempfile::tempdir().expect("a directory"),
            image: ImageName::new("a:b,c=d%/é").expect("a name"),
            points: Vec::new(),
        }
    }

    fn new() -> Self {
        let mut fixture = Self::empty();
        let mut random = Random::new(0x5e7e);
        for (number, size) in SIZES.into_iter().enumerate() {
            let mut content = fixture.points.last().map_or_else(Vec::new, |(_, content)| content.clone());
            content.resize(size, 0);
            for _ in 0..6 {
                let from = usize::try_from(random.below(size as u64)).expect("small");
                let to = size.min(from + usize::try_from(random.below(200_000)).expect("small"));
                content[from..to].copy_from_slice(&random.bytes(to - from));
            }
            let compression = if number == 1 { Compression::Zlib } else { Compression::None };
            let form = Form { cluster_bits: 16, extended_l2: ExtendedL2::Auto, compression, block: 4096 };
            fixture.back_up(&form, content);
        }
        fixture
    }

    fn back_up(&mut self, form: &Form, content: Vec<u8>) {
        let writer = ChainWriter::open(self.dest.path(), &self.image).expect("opened");
        let seconds = 1_700_000_000 + i64::try_from(self.points.len()).expect("few");
        let point = PointName::at(jiff::Timestamp::from_second(seconds).expect("a time")).expect("a name");
        let cluster_size = 1 << form.cluster_bits;
        let parent = writer.catalogue().newest();
        let pending = writer.begin(LayerPlan { point, parent, cluster_size }).expect("begun");
        let mut spec = spec_of(self.dest.path(), "layer", content.len(), pending.backing_name(), form);
        spec.path = pending.layer_path().to_owned();
        let base = self.points.last().map(|(_, content)| content.as_slice());
        let layer = write(&spec, &content, base, form.block);
        let extended_l2 = layer.grain() < u64::from(cluster_size);
        let record = Record { cluster_size, extended_l2, ..record(content.len() as u64, point) };
        pending.commit(record).expect("committed");
        self.points.push((point, content));
    }

    fn directory(&self) -> PathBuf {
        image_directory(self.dest.path(), &self.image)
    }

    fn socket(&self) -> PathBuf {
        self.out.path().join("nbd")
    }

    /// The newest point on [`Fixture::socket`].
    fn serve(&self) -> Serve {
        let mut options = ServeOptions { listen: Listen::Socket(self.socket()), ..ServeOptions::default() };
        options.start_limit = HANG;
        Serve {
            dest: self.dest.path().to_owned(),
            image: self.image.as_str().to_owned(),
            point: None,
            options,
        }
    }

    fn serve_with(&self, tools: &QemuTools) -> Serve {
        let mut serve = self.serve();
        serve.options.qemu_nbd = tools.qemu_nbd().to_owned();
        serve
    }

    fn writable(&self, tools: &QemuTools) -> Serve {
        let mut serve = self.serve_with(tools);
        serve.options.access = Access::Writable { overlay_directory: Some(self.out.path().to_owned()) };
        serve
    }

    fn newest(&self) -> &[u8] {
        &self.points.last().expect("points").1
    }

    /// Everything in the image's directory but the lock: its name, content, mode and time of change.
    fn files(&self) -> Vec<(OsString, Vec<u8>, u32, i64, i64)> {
        let mut files: Vec<_> = fs::read_dir(self.directory())
            .expect("listed")
            .map(|entry| entry.expect("listed"))
            .filter(|entry| entry.file_name() != LOCK_FILE)
            .map(|entry| {
                let metadata = entry.metadata().expect("there");
                let content = fs::read(entry.path()).expect("readable");
                (entry.file_name(), content, metadata.mode(), metadata.mtime(), metadata.mtime_nsec())
            })
            .collect();
        files.sort();
        files
    }

    fn names_in_out(&self) -> Vec<OsString> {
        let mut names: Vec<_> =
            fs::read_dir(self.out.path()).expect("listed").map(|e| e.expect("listed").file_name()).collect();
        names.sort();
        names
    }
}

fn padded(content: &[u8]) -> Vec<u8> {
    let mut padded = content.to_vec();
    padded.resize(content.len().next_multiple_of(512), 0);
    padded
}

fn start(serve: &Serve) -> Served {
    serve.start(&Cancel::new()).expect("served")
}

fn connect(path: &Path, connections: usize) -> Client {
    let streams = (0..connections).map(|_| UnixStream::connect(path).expect("connected"));
    Client::connect(streams.collect(), &ClientOptions::default()).expect("negotiated")
}

fn read_all(client: &Client) -> Vec<u8> {
    let mut content = vec![0xee; usize::try_from(client.export().size).expect("small")];
    client.read(0, &mut content).expect("read");
    content
}

/// What stock QEMU reads at a URI.
fn converted(tools: &QemuTools, directory: &Path, uri: &str) -> Vec<u8> {
    qemu_img(tools, directory, &["convert", "-f", "raw", "-O", "raw", uri, "converted"]);
    let content = fs::read(directory.join("converted")).expect("readable");
    fs::remove_file(directory.join("converted")).expect("removed");
    content
}

fn qemu_io(uri: &str, command: &str) -> Output {
    Command::new("qemu-io").args(["-f", "raw", "-c", command, uri]).output().expect("qemu-io runs")
}

/// Number of the qemu-nbd below the shell.
fn server_of(served: &Served) -> u32 {
    let shell = served.server.supervisor();
    let children = fs::read_to_string(format!("/proc/{shell}/task/{shell}/children")).expect("proc is there");
    children.trim().parse().expect("one child")
}

#[test]
fn every_point_is_served_as_it_was() {
    let fixture = Fixture::new();
    for tools in qemus() {
        for (point, content) in &fixture.points {
            let mut serve = fixture.serve_with(&tools);
            serve.point = Some(*point);
            let served = start(&serve);
            assert_eq!((served.image(), served.point()), (&fixture.image, *point));
            assert_eq!(served.size(), content.len().next_multiple_of(512) as u64);
            assert!(!served.is_writable());
            let uri = served.uri();
            assert_eq!(uri, format!("nbd+unix:///?socket={}", fixture.socket().display()));
            let mode = fs::metadata(fixture.socket()).expect("there").permissions().mode();
            assert_eq!(mode & 0o7777, 0o600);
            let client = connect(&fixture.socket(), 4);
            assert_eq!(client.connections(), 4);
            assert!(read_all(&client) == padded(content));
            assert!(converted(&tools, fixture.out.path(), &uri) == padded(content));
            drop(served);
            assert!(client.read(0, &mut [0; 512]).is_err_and(|error| error.is_disconnect()));
            assert_eq!(fixture.names_in_out(), [""; 0]);
        }
    }
}

#[test]
fn an_export_tells_what_it_is() {
    let fixture = Fixture::new();
    for tools in qemus() {
        let _served = start(&fixture.serve_with(&tools));
        let mut list = Command::new(tools.qemu_nbd());
        let list = list.arg("--list").arg("--socket").arg(fixture.socket()).output().expect("runs");
        let list = String::from_utf8(list.stdout).expect("UTF-8");
        let point = fixture.points.last().expect("points").0;
        assert!(list.contains(&format!("description: a:b,c=d%/é@{point}\n")), "{list}");
        assert!(list.contains("exports available: 1\n export: ''\n"), "{list}");
    }
}

#[test]
fn a_read_only_point_takes_no_writes() {
    let fixture = Fixture::new();
    for tools in qemus() {
        let files = fixture.files();
        let served = start(&fixture.serve_with(&tools));
        let client = connect(&fixture.socket(), 1);
        assert!(matches!(
            client.write(0, Bytes::from_static(&[1; 512])),
            Err(crate::nbd::NbdError::ReadOnly)
        ));
        let output = qemu_io(&served.uri(), "write 0 512");
        assert!(!output.status.success(), "{output:?}");
        assert!(read_all(&client) == padded(fixture.newest()));
        drop(served);
        assert!(fixture.files() == files);
    }
}

#[test]
fn what_clients_write_is_gone_with_the_server() {
    for tools in qemus() {
        let fixture = Fixture::new();
        let files = fixture.files();
        let served = start(&fixture.writable(&tools));
        assert!(served.is_writable());
        // Nothing that a kill could leave: the overlay has no name any more.
        assert_eq!(fixture.names_in_out(), ["nbd"]);
        assert_only_the_overlay_is_writable(&fixture, server_of(&served));
        let client = connect(&fixture.socket(), 2);
        let mut model = padded(fixture.newest());
        let mut random = Random::new(11);
        for round in 0..200 {
            let from = 512 * usize::try_from(random.below(model.len() as u64 / 512)).expect("small");
            let to = model.len().min(from + 512 * usize::try_from(random.below(100)).expect("small"));
            if round % 4 == 0 {
                model[from..to].fill(0);
                client.write_zeroes(from as u64, (to - from) as u64, Default::default()).expect("queued");
            } else {
                model[from..to].copy_from_slice(&random.bytes(to - from));
                client.write(from as u64, Bytes::copy_from_slice(&model[from..to])).expect("queued");
            }
            // Requests that overlap are not ordered.
            client.drain().expect("drained");
        }
        client.flush().expect("flushed");
        assert!(read_all(&client) == model);
        // Another client, and stock QEMU, see the same.
        assert!(converted(&tools, fixture.out.path(), &served.uri()) == model);
        assert!(qemu_io(&served.uri(), "write -P 7 4096 4096").status.success());
        model[4096..8192].fill(7);
        assert!(read_all(&connect(&fixture.socket(), 1)) == model);
        drop(served);
        assert!(fixture.files() == files, "the chain was written to");
        assert_eq!(fixture.names_in_out(), [""; 0]);

        let _served = start(&fixture.writable(&tools));
        assert!(read_all(&connect(&fixture.socket(), 1)) == padded(fixture.newest()));
    }
}

/// The server's files, from the kernel: of the chain for reading, of others without a name.
fn assert_only_the_overlay_is_writable(fixture: &Fixture, server: u32) {
    let directory = fixture.directory().canonicalize().expect("there");
    let (mut layers, mut overlays) = (0, 0);
    for entry in fs::read_dir(format!("/proc/{server}/fd")).expect("listed") {
        let entry = entry.expect("listed");
        let info = Path::new("/proc").join(server.to_string()).join("fdinfo").join(entry.file_name());
        // The probe's connection may just be closed.
        let (Ok(info), Ok(file)) = (fs::read_to_string(info), fs::read_link(entry.path())) else { continue };
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).expect("flags").trim();
        let flags = u32::from_str_radix(flags, 8).expect("octal");
        if file.starts_with(&directory) {
            assert_eq!(flags & 0o3, 0, "{} is open for writing", file.display());
            layers += 1;
        } else if file.starts_with(fixture.out.path()) {
            assert!(file.as_os_str().as_bytes().ends_with(b" (deleted)"), "{}", file.display());
            assert_eq!(flags & 0o3, 2);
            overlays += 1;
        }
    }
    assert_eq!((layers, overlays), (SIZES.len(), 1));
}

#[test]
fn clients_beyond_the_limit_wait() {
    let fixture = Fixture::new();
    for tools in qemus() {
        let mut serve = fixture.serve_with(&tools);
        serve.options.connections = 2;
        let _served = start(&serve);
        let clients = [connect(&fixture.socket(), 1), connect(&fixture.socket(), 1)];
        let waiting = UnixStream::connect(fixture.socket()).expect("queued");
        waiting.set_nonblocking(true).expect("set");
        for client in &clients {
            assert!(read_all(client) == padded(fixture.newest()));
        }
        let nothing = std::io::Read::read(&mut &waiting, &mut [0; 8]).expect_err("no greeting");
        assert_eq!(nothing.kind(), std::io::ErrorKind::WouldBlock);
        let [first, _second] = clients;
        first.disconnect().expect("disconnected");
        waiting.set_nonblocking(false).expect("set");
        let client = Client::connect(vec![waiting], &ClientOptions::default()).expect("its turn");
        assert!(read_all(&client) == padded(fixture.newest()));
    }
}

/// As the Python tool lays them out, of every kind of file that QEMU makes.
#[test]
fn chains_of_the_python_tool_are_served() {
    let Some(tools) = qemu() else { return };
    let mut fixture = Fixture::empty();
    fixture.image = ImageName::new("vm").expect("a name");
    let directory = fixture.directory();
    fs::create_dir(&directory).expect("created");
    qemu_img(&tools, &directory, &["create", "-q", "-f", "qcow2", "empty.qcow2", "1M"]);
    let (mut backing, mut random) = ("empty.qcow2".to_owned(), Random::new(0xc0de));
    for (number, variant) in (1_700_000_000..).zip(VARIANTS) {
        let size = (1 + random.below(3 * 4096)) * 512;
        let name = format!("vm@{number}.qcow2");
        make(&tools, &directory, &name, Some(&backing), variant, size, &mut random);
        backing = name;
        let expected = contents(&tools, &directory, &backing);
        let mut serve = fixture.writable(&tools);
        for _ in 0..2 {
            let _served = start(&serve);
            assert!(read_all(&connect(&fixture.socket(), 2)) == expected, "{variant:?}");
            serve.options.access = Access::ReadOnly;
        }
    }
}

#[test]
fn an_image_without_a_byte_is_served() {
    for tools in qemus() {
        let mut fixture = Fixture::empty();
        let form = Form {
            cluster_bits: 16,
            extended_l2: ExtendedL2::Auto,
            compression: Compression::None,
            block: 4096,
        };
        fixture.back_up(&form, Vec::new());
        for serve in [fixture.serve_with(&tools), fixture.writable(&tools)] {
            let served = start(&serve);
            assert_eq!((served.size(), connect(&fixture.socket(), 1).export().size), (0, 0));
        }
    }
}

#[test]
fn the_chain_is_held_until_the_end() {
    for tools in qemus() {
        let fixture = Fixture::new();
        let open = || ChainWriter::open(fixture.dest.path(), &fixture.image);
        let writer = open().expect("opened");
        let error = fixture.serve_with(&tools).start(&Cancel::new()).expect_err("it is being written");
        assert!(
            matches!(&error, ServeError::Point(PointError::Chain(ChainError::Locked { .. }))),
            "{error:?}"
        );
        drop(writer);
        let served = start(&fixture.serve_with(&tools));
        assert!(matches!(open(), Err(ChainError::Locked { .. })));
        // Readers do not hinder each other.
        let mut other = fixture.serve_with(&tools);
        other.options.listen = Listen::Tcp("127.0.0.1:0".parse().expect("an address"));
        let other = start(&other);
        drop(served);
        assert!(matches!(open(), Err(ChainError::Locked { .. })));
        drop(other);
        open().expect("free again");
    }
}

#[test]
fn a_stop_is_waited_for() {
    for tools in qemus() {
        let fixture = Fixture::new();
        let served = start(&fixture.serve_with(&tools));
        let cancel = Cancel::new();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| served.wait(&cancel));
            assert!(read_all(&connect(&fixture.socket(), 1)) == padded(fixture.newest()));
            assert!(!waiter.is_finished());
            cancel.set();
            waiter.join().expect("no panic").expect("a stop is no error");
        });
        // Still there: who waits decides when it ends.
        assert!(read_all(&connect(&fixture.socket(), 1)) == padded(fixture.newest()));
    }
}

//! NBD: what its bytes cost without a server, with one that drops everything, and with one that writes a layer.
//!
//! Needs `qemu-nbd` and `qemu-img`.

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};
use rbd2qcow2_benches::{
    KIB, MIB, NOISE, Null, TEXT, benchmarks, copy, layer_spec, scattered, sized, usual_memory, usual_parallel,
};
use rbd2qcow2_core::extent::{Extent, ExtentKind};
use rbd2qcow2_core::layer::qemu_nbd::{QemuNbdLayer, QemuNbdOptions};
use rbd2qcow2_core::layer::{Compression, LayerError, LayerWriter, Patch};
use rbd2qcow2_core::nbd::client::{Client, ClientOptions, ZeroOptions};
use rbd2qcow2_core::nbd::reply::{PendingReply, Progress, ReplyReader, Yield};
use rbd2qcow2_core::nbd::server_process::{ServerCommand, ServerProcess};
use rbd2qcow2_core::nbd::wire::{self, BlockDescriptor, Chunk, Command, Request, SimpleReply};
use rbd2qcow2_core::source::RbdDiffSource;
use rbd2qcow2_core::source::pattern::PatternSource;
use tempfile::TempDir;
use zerocopy::IntoBytes;
use zerocopy::network_endian::{U32, U64};

/// Number of the context in block status.
const CONTEXT: u32 = 1;

/// What a server sends, and what it answers.
struct Conversation {
    name: &'static str,
    sent: Vec<u8>,
    requests: Vec<(Command, u64, u32)>,
}

fn chunk(kind: u16, cookie: u64, content: &[u8]) -> Vec<u8> {
    let length = u32::try_from(content.len()).expect("a short chunk");
    let chunk = Chunk {
        flags: wire::CHUNK_DONE.into(),
        kind: kind.into(),
        cookie: cookie.into(),
        length: length.into(),
    };
    [U32::new(wire::CHUNK_MAGIC).as_bytes(), chunk.as_bytes(), content].concat()
}

/// Good replies to writes.
fn writes(count: u64) -> Conversation {
    let reply = |cookie: u64| {
        let reply = SimpleReply { error: 0.into(), cookie: cookie.into() };
        [U32::new(wire::SIMPLE_REPLY_MAGIC).as_bytes(), reply.as_bytes()].concat()
    };
    let requests = (0..count).map(|cookie| (Command::Write, cookie * 4096, 4096)).collect();
    Conversation { name: "of writes", sent: (0..count).flat_map(reply).collect(), requests }
}

/// The data of reads, a MiB each.
fn reads(count: u64) -> Conversation {
    const LENGTH: u32 = 1 << 20;
    let data = vec![1; 1 << 20];
    let reply = |cookie: u64| {
        let content = [U64::new(cookie * u64::from(LENGTH)).as_bytes(), &data].concat();
        chunk(wire::CHUNK_OFFSET_DATA, cookie, &content)
    };
    let requests = (0..count).map(|cookie| (Command::Read, cookie * u64::from(LENGTH), LENGTH)).collect();
    Conversation { name: "of reads", sent: (0..count).flat_map(reply).collect(), requests }
}

/// Where data are: in each second of 1024 pages, every time.
fn statuses(count: u64) -> Conversation {
    const PAGES: u32 = 1024;
    let extents =
        (0..PAGES).map(|page| BlockDescriptor { length: 4096.into(), flags: (page % 2 * 3).into() });
    let extents: Vec<_> = extents.collect();
    let content = [U32::new(CONTEXT).as_bytes(), extents.as_bytes()].concat();
    let reply = |cookie| chunk(wire::CHUNK_BLOCK_STATUS, cookie, &content);
    let requests = (0..count).map(|_| (Command::BlockStatus, 0, PAGES * 4096)).collect();
    Conversation { name: "of block status", sent: (0..count).flat_map(reply).collect(), requests }
}

/// Reads all replies; gives the bytes and the extents that came.
fn parse(conversation: &Conversation) -> (usize, usize) {
    let mut replies = ReplyReader::new(black_box(&conversation.sent[..]), true);
    let (mut bytes, mut extents) = (0, 0);
    for (cookie, (command, offset, length)) in (0..).zip(&conversation.requests) {
        let header = replies.header().expect("a header").expect("not the end");
        assert_eq!(header.cookie(), cookie);
        let mut pending = PendingReply::new(*command, *offset, *length, CONTEXT);
        match replies.content(&header, &mut pending).expect("a good reply") {
            Progress::Done(Ok(Yield::Data(data))) => bytes += black_box(data).len(),
            Progress::Done(Ok(Yield::Extents(found))) => extents += black_box(found).len(),
            Progress::Done(Ok(Yield::Nothing)) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(replies.header().expect("no error").is_none(), "all is read");
    (bytes, extents)
}

fn in_memory(c: &mut Criterion) {
    let mut group = c.benchmark_group("nbd wire");
    let count = sized(1 << 16);
    let mut sent = Vec::new();
    let request = |cookie: u64| Request::new(Command::Write, 0, cookie, cookie * 4096, 4096);
    let bytes = count * request(0).as_bytes().len() as u64;
    group.throughput(Throughput::ElementsAndBytes { elements: count, bytes });
    group.bench_function("requests", |b| {
        b.iter(|| {
            sent.clear();
            for cookie in 0..count {
                sent.extend_from_slice(request(black_box(cookie)).as_bytes());
            }
            assert_eq!(black_box(&sent).len() as u64, bytes);
        });
    });
    for (conversation, expected) in
        [(writes(count), (0, 0)), (reads(64), (64 << 20, 0)), (statuses(64), (0, 64 << 10))]
    {
        group.throughput(Throughput::ElementsAndBytes {
            elements: conversation.requests.len() as u64,
            bytes: conversation.sent.len() as u64,
        });
        group.bench_function(BenchmarkId::new("replies", conversation.name), |b| {
            b.iter(|| assert_eq!(parse(&conversation), expected));
        });
    }
    group.finish();
}

/// A layer behind an NBD connection: what `qemu_nbd` does without a file.
struct NbdLayer {
    client: Client,
    _server: ServerProcess,
    _directory: TempDir,
}

impl NbdLayer {
    /// Starts a server of an image that drops everything.
    fn null(size: u64, connections: usize) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let image = format!("driver=null-co,size={size},read-zeroes=on");
        let command = ServerCommand {
            program: "qemu-nbd".into(),
            arguments: vec!["--image-opts".into(), OsString::from(image)],
            directory: directory.path().to_owned(),
            connections,
        };
        let (server, streams) = ServerProcess::start(&command).expect("a shell");
        let client = Client::connect(streams, &ClientOptions::default()).expect("qemu-nbd is installed");
        assert_eq!((client.export().size, client.connections()), (size, connections));
        Self { client, _server: server, _directory: directory }
    }

    fn error(cause: impl std::error::Error + Send + Sync + 'static) -> LayerError {
        LayerError::Write { path: "null-co".into(), cause: Box::new(cause) }
    }
}

impl LayerWriter for NbdLayer {
    fn grain(&self) -> u64 {
        Null::GRAIN
    }

    fn unit(&self) -> u64 {
        Null::GRAIN
    }

    fn wants_whole_units(&self) -> bool {
        false
    }

    fn write(&self, patch: Patch) -> Result<Vec<Extent>, LayerError> {
        for piece in &patch.pieces {
            let sent = match piece.kind {
                ExtentKind::Data => self.client.write(piece.offset, patch.bytes(piece)),
                ExtentKind::Zero => {
                    self.client.write_zeroes(piece.offset, piece.length, ZeroOptions::default())
                }
            };
            sent.map_err(Self::error)?;
        }
        Ok(patch.pieces)
    }

    fn abort(&self) {
        self.client.abort();
    }

    fn finish(&self) -> Result<(), LayerError> {
        self.client.flush().map_err(Self::error)
    }
}

fn null_server(c: &mut Criterion) {
    let buffers = usual_memory();
    let size = sized(256 * MIB);
    let small = sized(32 * MIB);
    let long: Box<dyn RbdDiffSource> = Box::new(PatternSource::full(size, NOISE));
    let short = Box::new(scattered(2 * small, 8 * KIB, 0, 4 * KIB, NOISE));
    for (name, source, bytes) in [("2 MiB", long, size), ("4 KiB", short, small)] {
        let mut group = c.benchmark_group(format!("nbd copy into null by connections, writes of {name}"));
        group.throughput(Throughput::Bytes(bytes));
        for connections in [1, 2, 4] {
            let layer = NbdLayer::null(source.size(), connections);
            group.bench_function(BenchmarkId::from_parameter(connections), |b| {
                b.iter(|| {
                    assert_eq!(copy(&*source, &layer, &buffers, usual_parallel()).data.get(), bytes);
                });
            });
        }
        group.finish();
    }
}

fn reading(c: &mut Criterion) {
    let mut group = c.benchmark_group("nbd read from null by connections");
    let size = sized(256 * MIB);
    group.throughput(Throughput::Bytes(size));
    let mut buffer = vec![1; rbd2qcow2_benches::index(size)];
    for connections in [1, 2] {
        let layer = NbdLayer::null(size, connections);
        group.bench_function(BenchmarkId::from_parameter(connections), |b| {
            b.iter(|| layer.client.read(0, black_box(&mut buffer)).expect("read"));
        });
        assert_eq!(buffer.last(), Some(&0), "zeroes came");
    }
    group.finish();
}

/// How a layer is packed, and what it is made of.
struct Form {
    compression: Compression,
    random: usize,
    size: u64,
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.compression.fmt(f)
    }
}

/// Whole layers, as `--writer qemu-nbd` makes them: servers are started and end, and the disk is measured along.
fn qemu_nbd_layer(c: &mut Criterion) {
    let buffers = usual_memory();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut group = c.benchmark_group("nbd copy into a layer of qemu-nbd");
    group.measurement_time(Duration::from_secs(2));
    for form in [
        Form { compression: Compression::None, random: NOISE, size: sized(256 * MIB) },
        Form { compression: Compression::Zstd { level: None }, random: TEXT, size: sized(64 * MIB) },
        Form { compression: Compression::Zlib, random: TEXT, size: sized(64 * MIB) },
    ] {
        let source = PatternSource::full(form.size, form.random);
        let spec = layer_spec(&directory.path().join("layer.qcow2"), form.size, form.compression);
        let options = QemuNbdOptions::default();
        group.throughput(Throughput::Bytes(form.size));
        group.bench_function(BenchmarkId::from_parameter(&form), |b| {
            b.iter(|| {
                let layer = QemuNbdLayer::create(&spec, options.clone());
                let layer = layer.expect("qemu-img and qemu-nbd are installed");
                assert_eq!(copy(&source, &layer, &buffers, usual_parallel()).data.get(), form.size);
                fs::remove_file(&spec.path).expect("the layer is there");
            });
        });
    }
    group.finish();
}

benchmarks!(in_memory, null_server, reading, qemu_nbd_layer);

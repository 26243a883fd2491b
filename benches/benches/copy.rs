//! The copy pipeline without Ceph: a source that makes data up, into a layer that drops everything,
//! and into files by each of the writers. What a backup costs besides reading.

use std::hint::black_box;
use std::path::Path;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rbd2qcow2_core::buffer::BufferPool;
use rbd2qcow2_core::cancel::Cancel;
use rbd2qcow2_core::copy::Copy;
use rbd2qcow2_core::extent::{Extent, is_zero};
use rbd2qcow2_core::layer::native::{Compressors, NativeLayer};
use rbd2qcow2_core::layer::qemu_nbd::{QemuNbdLayer, QemuNbdOptions};
use rbd2qcow2_core::layer::{Compression, ExtendedL2, LayerError, LayerSpec, LayerWriter, Patch};
use rbd2qcow2_core::options::Writer;
use rbd2qcow2_core::progress::Progress;
use rbd2qcow2_core::source::pattern::PatternSource;

/// What each run copies.
const SIZE: u64 = 256 << 20;

/// Memory for image data: the program's default.
const MEMORY: usize = 128 << 20;

/// A layer that drops everything.
struct Null;

impl LayerWriter for Null {
    fn grain(&self) -> u64 {
        4096
    }

    fn unit(&self) -> u64 {
        4096
    }

    fn wants_whole_units(&self) -> bool {
        false
    }

    fn write(&self, patch: Patch) -> Result<Vec<Extent>, LayerError> {
        drop(black_box(patch.data));
        Ok(patch.pieces)
    }

    fn abort(&self) {}

    fn finish(&self) -> Result<(), LayerError> {
        Ok(())
    }
}

fn run(source: &PatternSource, layer: &dyn LayerWriter, buffers: &BufferPool, parallel: usize) {
    let (cancel, progress) = (Cancel::new(), Progress::default());
    let stop = cancel.part();
    let copy = Copy {
        source,
        layer,
        root: true,
        digests: None,
        buffers,
        rate_limit: None,
        parallel,
        progress: &progress,
        cancel: &cancel,
        stop: &stop,
    };
    copy.run().expect("nothing can fail here");
    layer.finish().expect("the layer is finished");
    assert_eq!(progress.data.get(), SIZE);
}

fn copy_into_null(c: &mut Criterion) {
    let mut group = c.benchmark_group("copy into null");
    group.throughput(Throughput::Bytes(SIZE)).sample_size(10);
    let (source, buffers) = (PatternSource::full(SIZE, 16), BufferPool::new(MEMORY));
    for parallel in [1, 4, 16] {
        group.bench_with_input(BenchmarkId::from_parameter(parallel), &parallel, |b, parallel| {
            b.iter(|| run(&source, &Null, &buffers, *parallel));
        });
    }
    group.finish();
}

/// How a layer is written.
type Form = (&'static str, Writer, Compression);

const ZSTD: Compression = Compression::Zstd { level: None };

fn copy_into_files(c: &mut Criterion) {
    const NOISE: [Form; 2] =
        [("native", Writer::Native, Compression::None), ("qemu-nbd", Writer::QemuNbd, Compression::None)];
    const TEXT: [Form; 6] = [
        ("native zstd:1", Writer::Native, Compression::Zstd { level: Some(1) }),
        ("native zstd", Writer::Native, ZSTD),
        ("native zstd:3", Writer::Native, Compression::Zstd { level: Some(3) }),
        ("qemu-nbd zstd", Writer::QemuNbd, ZSTD),
        ("native zlib", Writer::Native, Compression::Zlib),
        ("qemu-nbd zlib", Writer::QemuNbd, Compression::Zlib),
    ];
    copy_into(c, "copy of noise", &PatternSource::full(SIZE, 16), &NOISE);
    copy_into(c, "copy of what compresses", &PatternSource::full(SIZE, 4), &TEXT);
}

fn copy_into(c: &mut Criterion, name: &str, source: &PatternSource, forms: &[Form]) {
    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Bytes(SIZE)).sample_size(10);
    let buffers = BufferPool::new(MEMORY);
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("layer.qcow2");
    for (name, writer, compression) in forms {
        group.bench_function(*name, |b| {
            b.iter(|| {
                run(source, &*layer(&path, *writer, *compression), &buffers, 16);
                std::fs::remove_file(&path).expect("the layer is there");
            });
        });
    }
    group.finish();
}

fn layer(path: &Path, writer: Writer, compression: Compression) -> Box<dyn LayerWriter> {
    let spec = LayerSpec {
        path: path.to_owned(),
        virtual_size: SIZE,
        backing: None,
        cluster_size: LayerSpec::DEFAULT_CLUSTER_SIZE,
        compression,
        extended_l2: ExtendedL2::Auto,
    };
    match writer {
        Writer::QemuNbd => {
            let layer = QemuNbdLayer::create(&spec, QemuNbdOptions::default());
            Box::new(layer.expect("qemu-img and qemu-nbd are installed"))
        }
        _ => Box::new(NativeLayer::create(&spec, Compressors::default()).expect("a layer")),
    }
}

fn zero_detection(c: &mut Criterion) {
    let mut group = c.benchmark_group("zero detection");
    let zeroes = vec![0_u8; 4 << 20];
    group.throughput(Throughput::Bytes(zeroes.len() as u64));
    group.bench_function("4 MiB of zeroes", |b| b.iter(|| is_zero(black_box(&zeroes))));
    group.finish();
}

criterion_group!(benches, copy_into_null, copy_into_files, zero_detection);
criterion_main!(benches);

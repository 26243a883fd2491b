//! The copy pipeline without Ceph: a source in memory, into a layer that drops everything and into
//! qemu-nbd. What a backup costs besides reading.

use std::hint::black_box;
use std::ops::Range;
use std::path::Path;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rbd2qcow2_core::buffer::{Buffer, BufferPool};
use rbd2qcow2_core::cancel::Cancel;
use rbd2qcow2_core::copy::Copy;
use rbd2qcow2_core::extent::{Extent, ExtentKind, is_zero};
use rbd2qcow2_core::layer::qemu_nbd::{QemuNbdLayer, QemuNbdOptions};
use rbd2qcow2_core::layer::{Compression, ExtendedL2, LayerError, LayerSpec, LayerWriter, Patch};
use rbd2qcow2_core::progress::Progress;
use rbd2qcow2_core::source::{RbdDiffSource, SourceError};

/// What each run copies.
const SIZE: u64 = 256 << 20;

/// Memory for image data: the program's default.
const MEMORY: usize = 128 << 20;

/// A snapshot full of bytes that do not compress, made by copying one block again and again.
struct Noise {
    block: Vec<u8>,
}

impl Noise {
    fn new() -> Self {
        // xorshift64: enough to defeat zero detection and compression.
        let mut state = 0x9E37_79B9_7F4A_7C15_u64;
        let words = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        });
        Self { block: words.take(512 << 10).flatten().collect() }
    }
}

impl RbdDiffSource for Noise {
    fn size(&self) -> u64 {
        SIZE
    }

    fn segments(&self, align: u64) -> Box<dyn Iterator<Item = Result<Range<u64>, SourceError>> + Send + '_> {
        let step = align.max(128 << 20);
        Box::new((0..SIZE.div_ceil(step)).map(move |n| Ok(n * step..((n + 1) * step).min(SIZE))))
    }

    fn diff(&self, segment: Range<u64>, found: &mut Vec<Extent>) -> Result<(), SourceError> {
        found.extend(Extent::new(segment, ExtentKind::Data));
        Ok(())
    }

    fn read(&self, _offset: u64, buffer: &mut Buffer) -> Result<(), SourceError> {
        let length = buffer.len();
        buffer.copy_from_slice(&self.block[..length]);
        Ok(())
    }
}

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

fn run(source: &Noise, layer: &dyn LayerWriter, buffers: &BufferPool, parallel: usize) {
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
    let (source, buffers) = (Noise::new(), BufferPool::new(MEMORY));
    for parallel in [1, 4, 16] {
        group.bench_with_input(BenchmarkId::from_parameter(parallel), &parallel, |b, parallel| {
            b.iter(|| run(&source, &Null, &buffers, *parallel));
        });
    }
    group.finish();
}

fn copy_into_qemu_nbd(c: &mut Criterion) {
    let mut group = c.benchmark_group("copy into qemu-nbd");
    group.throughput(Throughput::Bytes(SIZE)).sample_size(10);
    let (source, buffers) = (Noise::new(), BufferPool::new(MEMORY));
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("layer.qcow2");
    for parallel in [1, 16] {
        group.bench_with_input(BenchmarkId::from_parameter(parallel), &parallel, |b, parallel| {
            b.iter(|| {
                run(&source, &layer(&path), &buffers, *parallel);
                std::fs::remove_file(&path).expect("the layer is there");
            });
        });
    }
    group.finish();
}

fn layer(path: &Path) -> QemuNbdLayer {
    let spec = LayerSpec {
        path: path.to_owned(),
        virtual_size: SIZE,
        backing: None,
        cluster_size: LayerSpec::DEFAULT_CLUSTER_SIZE,
        compression: Compression::None,
        extended_l2: ExtendedL2::Auto,
    };
    QemuNbdLayer::create(&spec, QemuNbdOptions::default()).expect("qemu-img and qemu-nbd are installed")
}

fn zero_detection(c: &mut Criterion) {
    let mut group = c.benchmark_group("zero detection");
    let zeroes = vec![0_u8; 4 << 20];
    group.throughput(Throughput::Bytes(zeroes.len() as u64));
    group.bench_function("4 MiB of zeroes", |b| b.iter(|| is_zero(black_box(&zeroes))));
    group.finish();
}

criterion_group!(benches, copy_into_null, copy_into_qemu_nbd, zero_detection);
criterion_main!(benches);

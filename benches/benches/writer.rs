//! Layers written by the program itself, to the end: synced to the disk, which is measured along.

use std::fs;
use std::path::PathBuf;

use criterion::{BenchmarkId, Criterion, Throughput};
use rbd2qcow2_benches::{
    KIB, MIB, NOISE, TEXT, benchmarks, copy, layer_spec, scattered, sized, usual_memory, usual_parallel,
};
use rbd2qcow2_core::buffer::BufferPool;
use rbd2qcow2_core::layer::native::{Compressors, NativeLayer};
use rbd2qcow2_core::layer::{Compression, ExtendedL2, LayerSpec, LayerWriter};
use rbd2qcow2_core::progress::Progress;
use rbd2qcow2_core::source::RbdDiffSource;
use rbd2qcow2_core::source::pattern::PatternSource;
use tempfile::TempDir;

fn zstd(level: u8) -> Compression {
    Compression::Zstd { level: Some(level) }
}

/// A place for one layer.
struct Place {
    _directory: TempDir,
    path: PathBuf,
    buffers: BufferPool,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("layer.qcow2");
        Self { _directory: directory, path, buffers: usual_memory() }
    }

    fn spec(&self, source: &dyn RbdDiffSource) -> LayerSpec {
        layer_spec(&self.path, source.size(), Compression::None)
    }

    /// Writes a layer, and removes it; gives what it held, and its length.
    fn write(&self, source: &dyn RbdDiffSource, spec: &LayerSpec) -> (Progress, u64) {
        let layer = NativeLayer::create(spec, Compressors::default()).expect("created");
        let subclusters = spec.extended_l2 == ExtendedL2::Auto && spec.cluster_size > 8 << 10;
        assert_eq!(layer.grain() < layer.unit(), subclusters);
        let copied = copy(source, &layer, &self.buffers, usual_parallel());
        drop(layer);
        let length = fs::metadata(&self.path).expect("the layer is there").len();
        fs::remove_file(&self.path).expect("the layer is there");
        (copied, length)
    }
}

fn by_compression(c: &mut Criterion) {
    let place = Place::new();
    let size = sized(64 * MIB);
    let source = PatternSource::full(size, TEXT);
    let mut group = c.benchmark_group("writer by compression");
    group.throughput(Throughput::Bytes(size));
    let zstds = [1, 2, 3, 6, 12].map(zstd);
    for compression in [Compression::None, Compression::Zlib].into_iter().chain(zstds) {
        let spec = LayerSpec { compression, ..place.spec(&source) };
        group.bench_function(BenchmarkId::from_parameter(compression), |b| {
            b.iter(|| {
                let (copied, length) = place.write(&source, &spec);
                assert_eq!(copied.data.get(), size);
                assert_eq!(length < size, compression != Compression::None, "{length} bytes");
            });
        });
    }
    group.finish();
}

fn by_cluster_size(c: &mut Criterion) {
    let place = Place::new();
    for (how, compression, random, size) in
        [("none", Compression::None, NOISE, 256 * MIB), ("zstd:2", zstd(2), TEXT, 64 * MIB)]
    {
        let size = sized(size);
        let source = PatternSource::full(size, random);
        let mut group = c.benchmark_group(format!("writer by cluster size, {how}"));
        group.throughput(Throughput::Bytes(size));
        for kib in [64, 128, 512, 2048] {
            let spec = LayerSpec { cluster_size: kib << 10, compression, ..place.spec(&source) };
            group.bench_function(BenchmarkId::from_parameter(format!("{kib} KiB")), |b| {
                b.iter(|| assert_eq!(place.write(&source, &spec).0.data.get(), size));
            });
        }
        group.finish();
    }
}

/// One page in two clusters has changed. What is counted is that, not what the layer makes of it.
fn scattered_pages(c: &mut Criterion) {
    const PAGE: u64 = 4 * KIB;
    let place = Place::new();
    let every = 2 * u64::from(LayerSpec::DEFAULT_CLUSTER_SIZE);
    let size = sized(512 * MIB);
    let (pages, clusters) = (size / every * PAGE, size / 2);
    let mut group = c.benchmark_group("writer of scattered pages");
    group.throughput(Throughput::Bytes(pages));
    for (how, compression, random) in [("none", Compression::None, NOISE), ("zstd:2", zstd(2), TEXT)] {
        let source = scattered(size, every, 20 * KIB, PAGE, random);
        for (name, extended_l2) in [("subclusters", ExtendedL2::Auto), ("clusters", ExtendedL2::Off)] {
            let spec = LayerSpec { compression, extended_l2, ..place.spec(&source) };
            group.bench_function(BenchmarkId::new(name, how), |b| {
                b.iter(|| {
                    let held = place.write(&source, &spec).0.data.get();
                    match extended_l2 {
                        ExtendedL2::Auto => assert_eq!(held, pages),
                        ExtendedL2::Off => assert_eq!(held, clusters),
                    }
                });
            });
        }
    }
    group.finish();
}

benchmarks!(by_compression, by_cluster_size, scattered_pages);

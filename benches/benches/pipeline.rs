//! The pipeline of the copy, from a source in memory into a layer that drops everything: what a backup costs
//! besides its reads and writes; and from one that is as far away as a cluster, which many reads at once are for.

use std::ops::Range;
use std::thread;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};
use rbd2qcow2_benches::{
    KIB, LONGEST_READ, MIB, NOISE, Null, benchmarks, copy, index, scattered, sized, usual_memory,
    usual_parallel,
};
use rbd2qcow2_core::buffer::{Buffer, BufferPool};
use rbd2qcow2_core::extent::Extent;
use rbd2qcow2_core::source::pattern::PatternSource;
use rbd2qcow2_core::source::{RbdDiffSource, SourceError};

/// A source that answers each read after a while.
struct Distant(PatternSource);

impl RbdDiffSource for Distant {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn segments(&self, align: u64) -> Box<dyn Iterator<Item = Result<Range<u64>, SourceError>> + Send + '_> {
        self.0.segments(align)
    }

    fn diff(&self, segment: Range<u64>, found: &mut Vec<Extent>) -> Result<(), SourceError> {
        self.0.diff(segment, found)
    }

    fn read(&self, offset: u64, buffer: &mut Buffer) -> Result<(), SourceError> {
        thread::sleep(Duration::from_millis(2));
        self.0.read(offset, buffer)
    }
}

/// Copies all of a source of `bytes` of data into nothing, in so many patches.
fn run(source: &dyn RbdDiffSource, unit: u64, buffers: &BufferPool, parallel: usize, expected: (u64, u64)) {
    let layer = Null::new(unit);
    let copied = copy(source, &layer, buffers, parallel);
    assert_eq!((copied.data.get(), layer.patches()), expected);
}

/// Shorter reads come of shorter changes: each is followed by as much that has not changed. Longer ones come of
/// a layer with units so long, which are never cut.
fn by_request(c: &mut Criterion) {
    let size = sized(256 * MIB);
    let buffers = usual_memory();
    let mut group = c.benchmark_group("pipeline by request size");
    group.throughput(Throughput::Bytes(size));
    for kib in [4, 16, 64, 256, 1024, 2048, 4096, 8192] {
        let request = kib * KIB;
        let (source, unit) = if request < LONGEST_READ {
            (scattered(2 * size, 2 * request, 0, request, NOISE), Null::GRAIN)
        } else {
            (PatternSource::full(size, NOISE), if request > LONGEST_READ { request } else { Null::GRAIN })
        };
        let expected = (size, size / request);
        group.bench_function(BenchmarkId::from_parameter(format!("{kib} KiB")), |b| {
            b.iter(|| run(&source, unit, &buffers, usual_parallel(), expected));
        });
    }
    group.finish();
}

fn by_parallelism(c: &mut Criterion) {
    let buffers = BufferPool::new(index(128 * MIB));
    for (name, source) in sources() {
        let size = source.size();
        let mut group = c.benchmark_group(format!("pipeline by parallelism, {name}"));
        group.throughput(Throughput::Bytes(size));
        for parallel in [1, 2, 4, 8, 16, 32] {
            let expected = (size, size.div_ceil(LONGEST_READ));
            group.bench_function(BenchmarkId::from_parameter(parallel), |b| {
                b.iter(|| run(&*source, Null::GRAIN, &buffers, parallel, expected));
            });
        }
        group.finish();
    }
}

fn by_memory(c: &mut Criterion) {
    for (name, source) in sources() {
        let size = source.size();
        let mut group = c.benchmark_group(format!("pipeline by memory, {name}"));
        group.throughput(Throughput::Bytes(size));
        for mib in [8, 16, 48, 128] {
            let buffers = BufferPool::new(index(mib * MIB));
            let expected = (size, size.div_ceil(LONGEST_READ));
            group.bench_function(BenchmarkId::from_parameter(format!("{mib} MiB")), |b| {
                b.iter(|| run(&*source, Null::GRAIN, &buffers, 32, expected));
            });
        }
        group.finish();
    }
}

fn sources() -> [(&'static str, Box<dyn RbdDiffSource>); 2] {
    let near = PatternSource::full(sized(256 * MIB), NOISE);
    let far = Distant(PatternSource::full(sized(128 * MIB), NOISE));
    [("from memory", Box::new(near)), ("2 ms away", Box::new(far))]
}

benchmarks!(by_request, by_parallelism, by_memory);

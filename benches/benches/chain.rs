//! Reading a point through its chain, by the number of layers.
//!
//! The oldest layer is full. In each of the others one page of each MiB has changed, in another place than in the
//! others. The files are in the page cache.

use std::hint::black_box;
use std::path::PathBuf;

use criterion::{BenchmarkId, Criterion, Throughput};
use rbd2qcow2_benches::points::Points;
use rbd2qcow2_benches::{
    KIB, LONGEST_READ, MIB, Null, TEXT, benchmarks, copy, index, is_test, scattered, sized, usual_memory,
    usual_parallel,
};
use rbd2qcow2_core::cancel::Cancel;
use rbd2qcow2_core::layer::Compression;
use rbd2qcow2_core::qcow2::chain::ChainReader;
use rbd2qcow2_core::source::RbdDiffSource;
use rbd2qcow2_core::source::chain::ChainSource;
use rbd2qcow2_core::source::pattern::PatternSource;

fn depths() -> &'static [u64] {
    if is_test() { &[1, 4] } else { &[1, 4, 16, 64] }
}

/// A point of so many layers.
fn point(size: u64, depth: u64, compression: Compression) -> Points {
    let mut points = Points::new(compression);
    points.add(&PatternSource::full(size, TEXT));
    for number in 1..depth {
        points.add(&scattered(size, MIB, number * 16 * KIB, 4 * KIB, TEXT));
    }
    points
}

/// Checks that a chain reads as what was backed up, and that each layer has a part in it.
fn check(chain: &ChainReader) {
    let size = chain.virtual_size();
    let (truth, buffers) = (PatternSource::full(size, TEXT), usual_memory());
    let mut expected = buffers.get(index(LONGEST_READ), &Cancel::new()).expect("nobody cancels");
    let mut found = vec![0; index(LONGEST_READ)];
    for offset in offsets(size) {
        truth.read(offset, &mut expected).expect("it is made up");
        chain.read_at(offset, &mut found).expect("a whole chain");
        assert!(found[..] == expected[..], "the chain differs at {offset}");
    }
    let mut layers = vec![false; chain.layers().len()];
    for piece in chain.map(0..size).expect("within the image") {
        layers[piece.expect("a whole chain").layer.expect("the oldest is full")] = true;
    }
    assert!(layers.iter().all(|seen| *seen), "a layer is hidden");
}

fn offsets(size: u64) -> impl Iterator<Item = u64> {
    (0..size / LONGEST_READ).map(|number| number * LONGEST_READ)
}

fn reading(c: &mut Criterion) {
    let size = sized(128 * MIB);
    for (how, compression) in [("none", Compression::None), ("zstd:2", Compression::Zstd { level: Some(2) })]
    {
        let points: Vec<_> = depths().iter().map(|depth| point(size, *depth, compression)).collect();
        let paths: Vec<_> = points.iter().map(Points::layers).collect();
        let open = |paths: &Vec<PathBuf>| {
            let chain = ChainReader::open(paths).expect("a whole chain");
            check(&chain);
            chain
        };
        let chains: Vec<_> = paths.iter().map(open).collect();
        assert!(chains.iter().map(|chain| chain.layers().len() as u64).eq(depths().iter().copied()));
        one_thread(c, how, &chains);
        restore(c, how, &chains);
        if compression == Compression::None {
            map(c, &paths);
        }
    }
}

/// From the start to the end, by one thread.
fn one_thread(c: &mut Criterion, how: &str, chains: &[ChainReader]) {
    let mut buffer = vec![0; index(LONGEST_READ)];
    let mut group = c.benchmark_group(format!("chain read by depth, {how}"));
    for chain in chains {
        let size = chain.virtual_size();
        group.throughput(Throughput::Bytes(size));
        group.bench_function(BenchmarkId::from_parameter(chain.layers().len()), |b| {
            b.iter(|| {
                for offset in offsets(size) {
                    chain.read_at(offset, &mut buffer).expect("a whole chain");
                }
            });
        });
    }
    group.finish();
}

/// By the pipeline, as a restore reads.
fn restore(c: &mut Criterion, how: &str, chains: &[ChainReader]) {
    let buffers = usual_memory();
    let mut group = c.benchmark_group(format!("chain into null by depth, {how}"));
    for chain in chains {
        let size = chain.virtual_size();
        let source = ChainSource::new(chain, size);
        group.throughput(Throughput::Bytes(size));
        group.bench_function(BenchmarkId::from_parameter(chain.layers().len()), |b| {
            b.iter(|| {
                let copied = copy(&source, &Null::default(), &buffers, usual_parallel());
                assert_eq!(copied.data.get(), size);
            });
        });
    }
    group.finish();
}

/// Opens all layers and reads all tables, and no data.
fn map(c: &mut Criterion, chains: &[Vec<PathBuf>]) {
    let mut group = c.benchmark_group("chain open and map by depth");
    group.throughput(Throughput::Bytes(sized(128 * MIB)));
    for paths in chains {
        group.bench_function(BenchmarkId::from_parameter(paths.len()), |b| {
            b.iter(|| {
                let chain = ChainReader::open(paths).expect("a whole chain");
                let pieces = chain.map(0..chain.virtual_size()).expect("within the image");
                let mut count = 0;
                for piece in pieces {
                    black_box(piece.expect("a whole chain"));
                    count += 1;
                }
                assert!(count >= paths.len());
            });
        });
    }
    group.finish();
}

benchmarks!(reading);

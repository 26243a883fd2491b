//! What becomes of an image's changes before anything is read: aligned, gathered, cut.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput};
use rbd2qcow2_benches::{KIB, LONGEST_READ, MIB, benchmarks, sized};
use rbd2qcow2_core::extent::{Extent, ExtentKind, align, bundles};

/// The grain and the cluster of a layer without options.
const GRAIN: u64 = 4 * KIB;
const UNIT: u64 = 128 * KIB;

fn extent(offset: u64, length: u64, kind: ExtentKind) -> Extent {
    Extent { offset, length, kind }
}

/// Changes of different kinds, and the size of the image that they lie in.
fn sets() -> [(&'static str, Vec<Extent>, u64); 4] {
    let count = sized(1 << 16);
    let data = |offset, length| extent(offset, length, ExtentKind::Data);
    // Sectors that fit no grain, far from each other.
    let scattered = (0..count).map(|number| data(number * 256 * KIB + 512, 4 * KIB)).collect();
    // Whole objects and more, every other of them zeroes, in segments of what fits an answer.
    let kind = |number: u64| if number.is_multiple_of(2) { ExtentKind::Data } else { ExtentKind::Zero };
    let long = (0..count / 16).map(|number| extent(number * 48 * MIB, 48 * MIB, kind(number)));
    // In rows of eight each covers half of the next, and they do not come in order: 40503 is odd, so each comes
    // once.
    let place = |number: u64| number * 8 * KIB + number / 8 * 64 * KIB;
    let overlapping = (0..count).map(|number| data(place(number * 40_503 % count), 16 * KIB)).collect();
    // Data and zeroes that share grains, from end to end.
    let mixed = (0..count).map(|number| extent(number * 6 * KIB, 6 * KIB, kind(number / 2)));
    [
        ("scattered", scattered, count * 256 * KIB),
        ("long", long.collect(), count / 16 * 48 * MIB),
        ("overlapping", overlapping, place(count)),
        ("mixed", mixed.collect(), count * 6 * KIB),
    ]
}

/// Extents a second, and bytes of the image that they lie in.
fn throughput(extents: &[Extent], size: u64) -> Throughput {
    Throughput::ElementsAndBytes { elements: extents.len() as u64, bytes: size }
}

fn covered(extents: &[Extent]) -> u64 {
    extents.iter().map(|extent| extent.length).sum()
}

fn aligning(c: &mut Criterion) {
    let mut group = c.benchmark_group("extents align");
    for (name, extents, size) in sets() {
        let aligned = align(extents.clone(), GRAIN, size);
        assert!(aligned.iter().all(|extent| extent.offset.is_multiple_of(GRAIN)), "{name} is aligned");
        assert!(covered(&aligned) <= size && aligned.len() <= 2 * extents.len(), "{name}");
        group.throughput(throughput(&extents, size));
        group.bench_function(name, |b| {
            b.iter_batched(|| extents.clone(), |extents| align(extents, GRAIN, size), BatchSize::LargeInput);
        });
    }
    group.finish();
}

fn gathering(c: &mut Criterion) {
    let mut group = c.benchmark_group("extents bundles");
    for (name, extents, size) in sets() {
        let aligned = align(extents, GRAIN, size);
        let gathered: u64 = bundles(aligned.clone(), UNIT, LONGEST_READ).map(|bundle| covered(&bundle)).sum();
        assert_eq!(gathered, covered(&aligned), "all of {name} is in bundles");
        group.throughput(throughput(&aligned, size));
        group.bench_function(name, |b| {
            let all = |aligned| bundles(aligned, UNIT, LONGEST_READ).map(black_box).count();
            b.iter_batched(|| aligned.clone(), all, BatchSize::LargeInput);
        });
    }
    group.finish();
}

fn cutting(c: &mut Criterion) {
    let mut group = c.benchmark_group("extents split");
    for (name, block) in [("blocks", LONGEST_READ), ("clusters", UNIT)] {
        let whole = extent(GRAIN, sized(1 << 16) * block, ExtentKind::Data);
        let pieces = whole.split(block).count() as u64;
        assert_eq!(pieces, whole.length / block + 1, "it begins within a block");
        group.throughput(Throughput::ElementsAndBytes { elements: pieces, bytes: whole.length });
        group.bench_function(name, |b| b.iter(|| black_box(whole).split(block).map(black_box).count()));
    }
    group.finish();
}

benchmarks!(aligning, gathering, cutting);

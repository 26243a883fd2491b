//! How fast zeroes are found, beside what the memory allows: a plain read and a copy of the same bytes.
//!
//! The two largest buffers fit no cache of a core. One that all cores share may still hold them, on large servers.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput};
use rbd2qcow2_benches::{KIB, LONGEST_READ, MIB, TEXT, benchmarks, index, is_test};
use rbd2qcow2_core::buffer::BufferPool;
use rbd2qcow2_core::cancel::Cancel;
use rbd2qcow2_core::extent::{ExtentKind, is_zero, runs};
use rbd2qcow2_core::source::RbdDiffSource;
use rbd2qcow2_core::source::pattern::PatternSource;

/// What [`runs`] tells apart, in bytes.
const GRAIN: usize = 4096;

/// Fits the first cache, the second, none of a core's own, and none at all on most machines.
fn sizes() -> &'static [(&'static str, u64)] {
    const SIZES: [(&str, u64); 4] =
        [("16 KiB", 16 * KIB), ("1 MiB", MIB), ("64 MiB", 64 * MIB), ("512 MiB", 512 * MIB)];
    if is_test() { &SIZES[..2] } else { &SIZES }
}

/// Zeroes in memory of their own. Fresh memory that nobody has written to is one page of the kernel's, mapped
/// over and over, and always in the first cache.
fn zeroes(size: u64) -> Vec<u8> {
    let mut bytes = black_box(vec![1; index(size)]);
    bytes.fill(0);
    bytes
}

fn sum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    assert!(rest.is_empty());
    words.iter().fold(0, |sum, word| sum.wrapping_add(u64::from_ne_bytes(*word)))
}

fn against_memory(c: &mut Criterion) {
    let mut group = c.benchmark_group("zeroes");
    for (name, size) in sizes() {
        let bytes = zeroes(*size);
        let mut target = vec![1; bytes.len()];
        assert!(is_zero(&bytes) && sum(&bytes) == 0);
        group.throughput(Throughput::Bytes(*size));
        group.bench_function(BenchmarkId::new("is_zero", name), |b| b.iter(|| is_zero(black_box(&bytes))));
        group.bench_function(BenchmarkId::new("sum of u64", name), |b| b.iter(|| sum(black_box(&bytes))));
        group.bench_function(BenchmarkId::new("memcpy", name), |b| {
            b.iter(|| black_box(&mut target).copy_from_slice(black_box(&bytes)));
        });
    }
    group.finish();
}

/// What a thread of the copy does with one read, which comes from another's cache or from memory: the buffers are
/// taken in turn.
fn in_reads(c: &mut Criterion) {
    let reads = if is_test() { 1 } else { 32 };
    let data = filled(LONGEST_READ);
    // A grain that is not zero shows that where it begins, or at its very end.
    let mut alternating = zeroes(LONGEST_READ);
    let mut ends = zeroes(LONGEST_READ);
    for number in (0..ends.len() / GRAIN).step_by(2) {
        let grain = number * GRAIN..(number + 1) * GRAIN;
        alternating[grain.clone()].copy_from_slice(&data[grain.clone()]);
        ends[grain.end - 1] = 1;
    }
    let grains = ends.len() / GRAIN;
    let kinds: [(&str, Vec<u8>, usize); 4] = [
        ("data", data, 1),
        ("zeroes", zeroes(LONGEST_READ), 1),
        ("every other grain", alternating, grains),
        ("every other grain, in its last byte", ends, grains),
    ];
    let mut group = c.benchmark_group("zeroes by grain");
    group.throughput(Throughput::Bytes(reads as u64 * LONGEST_READ));
    for (name, bytes, expected) in kinds {
        assert_eq!(runs(&bytes, GRAIN).count(), expected, "{name}");
        let buffers = vec![bytes; reads];
        let count = |bytes: &Vec<u8>| {
            runs(black_box(bytes), GRAIN).filter(|(_, kind)| *kind == ExtentKind::Zero).count()
        };
        group.bench_function(name, |b| b.iter(|| buffers.iter().map(count).sum::<usize>()));
    }
    group.finish();
}

/// Data that hold no zeroes to speak of.
fn filled(size: u64) -> Vec<u8> {
    let buffer = BufferPool::new(index(size)).get(index(size), &Cancel::new());
    let mut buffer = buffer.expect("nobody cancels");
    PatternSource::full(size, TEXT).read(0, &mut buffer).expect("it is made up");
    buffer.to_vec()
}

benchmarks!(against_memory, in_reads);

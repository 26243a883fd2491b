//! Forgetting the older of two points: the newer takes over what it needs. With all that belongs to it: the
//! verification before, and the syncs.

use std::collections::BTreeSet;
use std::sync::Mutex;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use rbd2qcow2_benches::points::Points;
use rbd2qcow2_benches::{KIB, MIB, TEXT, benchmarks, scattered, sized};
use rbd2qcow2_core::cancel::Cancel;
use rbd2qcow2_core::layer::Compression;
use rbd2qcow2_core::merge::{MergeObserver, MergeOptions, Way};
use rbd2qcow2_core::prune::{PruneImage, Wanted};
use rbd2qcow2_core::source::pattern::PatternSource;

/// Keeps how merges were done.
#[derive(Default)]
struct Ways(Mutex<Vec<Way>>);

impl MergeObserver for Ways {
    fn finished(&self, way: Way) {
        self.0.lock().expect("no panic").push(way);
    }
}

/// Forgets the oldest point, and tells how.
fn forget_oldest(points: &Points, options: &MergeOptions) -> Vec<Way> {
    let wanted = Wanted { policy: None, points: BTreeSet::from([points.names()[0]]) };
    let observer = Ways::default();
    let prune = PruneImage {
        dest: points.dest(),
        image: points.image(),
        wanted: &wanted,
        zone: &TimeZone::UTC,
        now: Timestamp::now(),
        options,
        observer: &observer,
        cancel: &Cancel::new(),
    };
    let plan = prune.run().expect("a whole chain");
    assert_eq!((plan.merges.len(), points.layers().len()), (1, 1), "one point was merged into the other");
    observer.0.into_inner().expect("no panic")
}

/// A full point of `size` bytes, and one that changed a cluster of each `every` bytes.
fn two_points(size: u64, every: u64, compression: Compression) -> Points {
    let mut points = Points::new(compression);
    points.add(&PatternSource::full(size, TEXT));
    points.add(&scattered(size, every, 0, 128 * KIB, TEXT));
    points
}

fn merging(c: &mut Criterion) {
    let size = sized(128 * MIB);
    let mut group = c.benchmark_group("merge");
    group.throughput(Throughput::Bytes(size));
    let mut options = [MergeOptions::default(), MergeOptions::default()];
    // Nothing saves so much, and everything so little.
    (options[0].least_saving, options[1].least_saving) = (u64::MAX, 1);
    let [copying, reusing] = &options;
    for (how, compression) in [("none", Compression::None), ("zstd:2", Compression::Zstd { level: Some(2) })]
    {
        // A 64th has changed, or half.
        let little = two_points(size, 8 * MIB, compression);
        let much = two_points(size, 256 * KIB, compression);
        for (name, points, options) in [
            ("little changed, copied", &little, copying),
            ("little changed, reused", &little, reusing),
            ("much changed, copied", &much, copying),
        ] {
            group.bench_function(BenchmarkId::new(name, how), |b| {
                let merge = |points: Points| {
                    let ways = forget_oldest(&points, options);
                    assert_eq!(ways[0] == Way::UponBase, options.least_saving == 1, "{ways:?}");
                    assert_eq!(ways.contains(&Way::Copied), options.least_saving > 1, "{ways:?}");
                    points
                };
                b.iter_batched(|| points.duplicate(), merge, BatchSize::PerIteration);
            });
        }
    }
    group.finish();
}

benchmarks!(merging);

//! The diff against the truth: what it finds, applied to the old content, must give the new.

mod case;
mod clones;
mod named;
mod random;

use std::fmt;
use std::ops::Range;
use std::time::Duration;

use rbd2qcow2_core::buffer::BufferPool;
use rbd2qcow2_core::cancel::Cancel;
use rbd2qcow2_core::extent::{self, Extent, ExtentKind};
use rbd2qcow2_core::options::DiffMode;
use rbd2qcow2_core::rbd::Pool;
use rbd2qcow2_core::source::RbdDiffSource;
use rbd2qcow2_core::source::librbd::{BaseSnapshot, LibrbdSource};

use crate::cluster::TestCluster;
use crate::driver::Spec;

/// How segments are aligned, and the grains of the layers that would be written.
const GRAINS: [u64; 3] = [512, 4096, 65_536];

/// librbd hangs now and then: long enough for a busy machine, short enough for a test.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where the diff is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Wrong {
    /// These bytes differ and were not reported.
    Missed(Range<u64>),
    /// These were reported to be zero and hold data.
    NotZero(Range<u64>),
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missed(range) => write!(f, "bytes {range:?} changed and were not reported"),
            Self::NotZero(range) => write!(f, "bytes {range:?} were reported to be zero and hold data"),
        }
    }
}

/// What a diff found, and what it should have.
#[derive(Debug)]
struct Found {
    /// Segments and extents for the finest grain.
    segments: Vec<Range<u64>>,
    extents: Vec<Extent>,
    wrong: Option<Wrong>,
}

impl Found {
    /// Whether every byte of `range` was reported, as data or as zeroes.
    fn covers(&self, range: Range<u64>) -> bool {
        let mut end = range.start;
        for extent in &self.extents {
            if extent.offset <= end {
                end = end.max(extent.end());
            }
        }
        end >= range.end
    }

    /// Bytes of data and of zeroes.
    fn bytes(&self) -> (u64, u64) {
        let sum =
            |kind| self.extents.iter().filter(|extent| extent.kind == kind).map(|extent| extent.length).sum();
        (sum(ExtentKind::Data), sum(ExtentKind::Zero))
    }
}

fn open_pool(cluster: &TestCluster, spec: &Spec) -> Pool {
    cluster.connect(PATIENCE).pool(&spec.pool, &spec.namespace).expect("the pool is there")
}

/// Compares what `source` reports with the contents of its two snapshots (`old` is empty without a
/// base), for every grain.
///
/// # Panics
/// Where the source breaks the rules of its trait, or fails.
fn compare(source: &LibrbdSource, old: &[u8], new: &[u8]) -> Found {
    assert_eq!(source.size(), new.len() as u64);
    let all = GRAINS.map(|grain| compare_at(source, grain, old, new));
    let wrong = all.iter().find_map(|found| found.wrong.clone());
    let [finest, ..] = all;
    Found { wrong, ..finest }
}

fn compare_at(source: &LibrbdSource, grain: u64, old: &[u8], new: &[u8]) -> Found {
    let mut segments = Vec::new();
    let mut all = Vec::new();
    // As the diff says it, and as a layer would be written.
    let mut exact = Rebuilt::new(old, new);
    let mut grained = Rebuilt::new(old, new);
    let mut end = 0;
    for segment in source.segments(grain) {
        let segment = segment.expect("the segments are listed");
        assert!(segment.start >= end && segment.start < segment.end, "{segment:?} comes after {end}");
        assert_eq!(segment.start % grain, 0, "{segment:?} at a grain of {grain}");
        assert!(
            segment.end % grain == 0 || segment.end == source.size(),
            "{segment:?} at a grain of {grain}"
        );
        end = segment.end;
        let mut extents = Vec::new();
        source.diff(segment.clone(), &mut extents).expect("the changes are listed");
        extents.sort_by_key(|extent| extent.offset);
        let mut last = segment.start;
        for extent in &extents {
            assert!(extent.offset >= last && extent.length > 0, "{extent:?} comes after {last}");
            last = extent.end();
            // Where a parent may show through, nothing is called zero that was not read.
            let below = extent.kind == ExtentKind::Zero && extent.offset < source.info().overlap;
            assert!(!below, "{extent:?} lies within the overlap of {} bytes", source.info().overlap);
            exact.take(extent);
        }
        assert!(last <= segment.end, "{extents:?} leave {segment:?}");
        for extent in extent::align(extents.clone(), grain, source.size()) {
            assert!(extent.offset >= segment.start && extent.end() <= segment.end, "{extent:?}, {segment:?}");
            grained.take(&extent);
        }
        all.extend(extents);
        segments.push(segment);
    }
    assert!(end <= source.size());
    let wrong = exact.wrong().or_else(|| grained.wrong());
    Found { segments, extents: all, wrong }
}

/// The new content, made of the old one and of what a diff reports.
struct Rebuilt<'a> {
    bytes: Vec<u8>,
    new: &'a [u8],
    not_zero: Option<Wrong>,
}

impl<'a> Rebuilt<'a> {
    fn new(old: &[u8], new: &'a [u8]) -> Self {
        let mut bytes = old.to_vec();
        bytes.resize(new.len(), 0);
        Self { bytes, new, not_zero: None }
    }

    fn take(&mut self, extent: &Extent) {
        let range = extent.offset as usize..extent.end() as usize;
        match extent.kind {
            ExtentKind::Data => self.bytes[range.clone()].copy_from_slice(&self.new[range]),
            ExtentKind::Zero => {
                self.bytes[range.clone()].fill(0);
                if self.bytes[range.clone()] != self.new[range] {
                    self.not_zero = Some(Wrong::NotZero(extent.range()));
                }
            }
        }
    }

    fn wrong(&self) -> Option<Wrong> {
        if self.bytes == self.new {
            return None;
        }
        let different = |(old, new): (&u8, &u8)| old != new;
        let first = self.bytes.iter().zip(self.new).position(different)?;
        let last = self.bytes.iter().zip(self.new).rposition(different)?;
        // A wrong zero also shows as a difference: tell it as what it is.
        self.not_zero.clone().or(Some(Wrong::Missed(first as u64..last as u64 + 1)))
    }
}

/// Reads some ranges of the snapshot and all that the diff calls data, and compares them with it.
fn check_reads(source: &LibrbdSource, extents: &[Extent], new: &[u8], random: &mut crate::random::Random) {
    let pool = BufferPool::new(8 << 20);
    let cancel = Cancel::new();
    let mut ranges: Vec<Range<u64>> =
        extents.iter().filter(|extent| extent.kind == ExtentKind::Data).map(Extent::range).collect();
    if !new.is_empty() {
        ranges.extend((0..5).map(|_| {
            let start = random.below(new.len() as u64);
            start..start + 1 + random.below((new.len() as u64 - start).min(100_000))
        }));
    }
    for range in ranges {
        let mut buffer = pool.get((range.end - range.start) as usize, &cancel).expect("within the limit");
        buffer.fill(0xa5);
        source.read(range.start, &mut buffer).expect("the snapshot can be read");
        assert!(buffer[..] == new[range.start as usize..range.end as usize], "{range:?} reads wrong");
    }
}

/// What is opened for a diff.
struct Pair<'a> {
    pool: &'a Pool,
    spec: &'a Spec,
    base: Option<&'a str>,
    snapshot: &'a str,
}

impl Pair<'_> {
    fn open(&self, mode: DiffMode) -> LibrbdSource {
        let base = self.base.map(|name| BaseSnapshot {
            name: name.to_owned(),
            map_digest: None,
            objects: None,
            overlap: None,
            guard: None,
        });
        LibrbdSource::open(self.pool, &self.spec.image, self.snapshot, base.as_ref(), mode).unwrap_or_else(
            |error| panic!("cannot compare {:?} with {:?}: {error}", self.base, self.snapshot),
        )
    }
}

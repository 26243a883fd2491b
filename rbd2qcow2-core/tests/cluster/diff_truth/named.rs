//! Each kind of image and of history that a diff was ever wrong about, or could be.

use rbd2qcow2_core::options::DiffMode;
use rbd2qcow2_core::rbd::{Granularity, Pool};
use rbd2qcow2_core::source::RbdDiffSource;

use super::random::Random;
use super::{Found, Pair, Rebuilt, Wrong, check_reads, compare, open_pool};
use crate::cluster::{POOL, TestCluster, say, unique, unique_image};
use crate::cluster_or_skip;
use crate::driver::{Driver, FULL_FEATURES, Layout, NO_OBJECT_MAP, Spec};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// The objects' size in most of these tests.
const OBJECT: u64 = 64 * KIB;

fn layout() -> Layout {
    Layout::new(16, FULL_FEATURES)
}

/// An image of 2 MiB and what is done to it.
struct Case {
    driver: Driver,
    pool: Pool,
    spec: Spec,
    parent: Option<Spec>,
    seed: u64,
}

impl Case {
    fn plain(cluster: &TestCluster, size: u64, layout: &Layout) -> Self {
        let driver = cluster.driver();
        let spec = unique_image("named");
        driver.create(&spec, size, layout).unwrap();
        Self { driver, pool: open_pool(cluster, &spec), spec, parent: None, seed: 0 }
    }

    /// A clone of an image of 2 MiB that is full of data.
    fn cloned(cluster: &TestCluster, layout: &Layout) -> Self {
        let driver = cluster.driver();
        let (parent, spec) = (unique_image("parent"), unique_image("clone"));
        driver.create(&parent, 2 * MIB, &self::layout()).unwrap();
        driver.write(&parent, 0, 2 * MIB, 99).unwrap();
        driver.snap_create(&parent, "base").unwrap();
        driver.clone(&parent, "base", &spec, layout).unwrap();
        Self { driver, pool: open_pool(cluster, &spec), spec, parent: Some(parent), seed: 0 }
    }

    fn write(&mut self, offset: u64, length: u64) {
        self.seed += 1;
        self.driver.write(&self.spec, offset, length, self.seed).unwrap();
    }

    fn discard(&self, offset: u64, length: u64) {
        self.driver.discard(&self.spec, offset, length).unwrap();
    }

    fn resize(&self, size: u64) {
        self.driver.resize(&self.spec, size).unwrap();
    }

    fn snap(&self, name: &str) {
        self.driver.snap_create(&self.spec, name).unwrap();
    }

    fn rollback(&self, name: &str) {
        self.driver.rollback(&self.spec, name).unwrap();
    }

    fn flatten(&self) {
        self.driver.flatten(&self.spec).unwrap();
    }

    fn content(&self, snapshot: &str) -> Vec<u8> {
        self.driver.read(&self.spec, Some(snapshot)).unwrap()
    }

    fn diff(&self, base: Option<&str>, snapshot: &str, mode: DiffMode) -> Found {
        let pair = Pair { pool: &self.pool, spec: &self.spec, base, snapshot };
        let source = pair.open(mode);
        let old = base.map_or_else(Vec::new, |base| self.content(base));
        let new = self.content(snapshot);
        let found = compare(&source, &old, &new);
        check_reads(&source, &found.extents, &new, &mut Random::new(1));
        found
    }

    /// Wants both modes that must never be wrong to be right. What the first of them found.
    fn right(&self, base: Option<&str>, snapshot: &str) -> Found {
        let [exact, scan] = [DiffMode::Exact, DiffMode::Scan].map(|mode| {
            let found = self.diff(base, snapshot, mode);
            if let Some(wrong) = &found.wrong {
                panic!("{mode:?} from {base:?} to {snapshot:?}: {wrong}; it found {:?}", found.extents);
            }
            found
        });
        let asked = |found: &Found| found.segments.iter().map(|segment| segment.end - segment.start).sum();
        let (asked_exact, asked_scan): (u64, u64) = (asked(&exact), asked(&scan));
        assert!(asked_exact <= asked_scan, "{asked_exact} bytes were compared, a scan compares {asked_scan}");
        exact
    }

    /// The same where the two contents must differ, so that there is something to find.
    fn right_and_different(&self, base: &str, snapshot: &str) -> Found {
        let (mut old, new) = (self.content(base), self.content(snapshot));
        old.resize(new.len(), 0);
        assert!(old != new, "the test changed nothing that a diff could find");
        self.right(Some(base), snapshot)
    }
}

impl Drop for Case {
    fn drop(&mut self) {
        // What is left over when a test fails goes with the cluster.
        let _ = self.driver.purge(&self.spec);
        if let Some(parent) = &self.parent {
            let _ = self.driver.purge(parent);
        }
    }
}

/// Says whether librbd's own fast-diff, without what the source knows better, still misses a change
/// that it was once seen to miss.
fn report_fast(case: &Case, hazard: &str, base: &str, snapshot: &str) {
    let new = case.content(snapshot);
    let mut rebuilt = Rebuilt::new(&case.content(base), &new);
    let image = case.pool.open(&case.spec.image, Some(snapshot)).unwrap();
    let found = image
        .diff(Some(base), 0..new.len() as u64, Granularity::Objects, false, Vec::new(), |found, extent| {
            found.push(extent);
        })
        .unwrap();
    found.iter().for_each(|extent| rebuilt.take(extent));
    match rebuilt.wrong() {
        Some(wrong) => say(&format!("librbd's fast-diff misses {hazard}: {wrong}")),
        None => say(&format!("librbd's fast-diff does not miss {hazard} on this machine")),
    }
}

#[test]
fn a_full_diff_holds_all_data_and_an_unchanged_image_nothing() {
    let cluster = cluster_or_skip!("a_full_diff_holds_all_data_and_an_unchanged_image_nothing");
    let mut case = Case::plain(&cluster, 2 * MIB, &layout());
    case.snap("empty");
    case.write(100, 3 * OBJECT);
    case.write(MIB + 5, 10);
    case.snap("full");
    case.snap("same");
    assert_eq!(case.right(None, "empty").bytes(), (0, 0));
    assert_eq!(case.diff(None, "empty", DiffMode::Exact).segments, []);
    let (data, _) = case.right(None, "full").bytes();
    assert!((3 * OBJECT..6 * OBJECT).contains(&data), "{data}");
    assert_eq!(case.right(Some("full"), "same").bytes(), (0, 0));
    assert_eq!(case.right(Some("empty"), "full").bytes().0, data);
}

#[test]
fn only_objects_that_exist_are_looked_at() {
    let cluster = cluster_or_skip!("only_objects_that_exist_are_looked_at");
    let mut case = Case::plain(&cluster, 64 * MIB, &layout());
    case.write(3 * OBJECT, 1);
    case.snap("one");
    case.write(700 * OBJECT, 1);
    case.discard(3 * OBJECT, OBJECT);
    case.snap("two");
    let pair = Pair { pool: &case.pool, spec: &case.spec, base: Some("one"), snapshot: "two" };
    let source = pair.open(DiffMode::Exact);
    assert_eq!((source.mode(), source.fallback()), (DiffMode::Exact, None));
    let segments: Vec<_> = source.segments(4096).map(Result::unwrap).collect();
    assert_eq!(segments, [3 * OBJECT..4 * OBJECT, 700 * OBJECT..701 * OBJECT]);
    let scanned: Vec<_> = pair.open(DiffMode::Scan).segments(4096).map(Result::unwrap).collect();
    assert_eq!(scanned.iter().map(|segment| segment.end - segment.start).sum::<u64>(), 64 * MIB);
    case.right_and_different("one", "two");
}

#[test]
fn grown() {
    let cluster = cluster_or_skip!("grown");
    let mut case = Case::plain(&cluster, 2 * MIB, &layout());
    case.write(2 * MIB - 100, 100);
    case.snap("one");
    case.resize(3 * MIB + 1);
    case.snap("empty");
    case.write(3 * MIB - 7, 8);
    case.snap("two");
    case.right(Some("one"), "empty");
    case.right_and_different("one", "two");
    case.right(None, "two");
}

#[test]
fn shrunk() {
    let cluster = cluster_or_skip!("shrunk");
    let mut case = Case::plain(&cluster, 2 * MIB, &layout());
    case.write(0, 2 * MIB);
    case.snap("one");
    case.resize(MIB + 1000);
    case.snap("two");
    case.write(MIB, 1000);
    case.snap("three");
    case.right(Some("one"), "two");
    case.right_and_different("one", "three");
    case.right(None, "three");
}

#[test]
fn shrunk_and_grown_again_with_a_snapshot_between() {
    let cluster = cluster_or_skip!("shrunk_and_grown_again_with_a_snapshot_between");
    let mut case = Case::plain(&cluster, 64 * MIB, &Layout::new(22, FULL_FEATURES));
    case.write(32 * MIB, 4 * KIB);
    case.snap("s1");
    case.resize(16 * MIB);
    case.snap("s2");
    case.resize(64 * MIB);
    case.snap("s3");
    // The size between is known, so no librbd need be believed about what lies behind it.
    let found = case.right_and_different("s1", "s3");
    assert!(found.covers(16 * MIB..64 * MIB), "{:?}", found.extents);
    assert_eq!(case.diff(Some("s1"), "s3", DiffMode::Fast).wrong, None);
    case.right(Some("s2"), "s3");
    report_fast(&case, "what was shrunk and grown again", "s1", "s3");
}

#[test]
fn shrunk_and_grown_again_without_a_snapshot_between() {
    let cluster = cluster_or_skip!("shrunk_and_grown_again_without_a_snapshot_between");
    let mut case = Case::plain(&cluster, 2 * MIB, &layout());
    case.write(0, 2 * MIB);
    case.snap("one");
    case.resize(MIB + 1000);
    case.resize(2 * MIB);
    case.snap("two");
    case.write(2 * MIB - 3, 3);
    case.snap("three");
    case.right_and_different("one", "two");
    case.right_and_different("one", "three");
    case.right_and_different("two", "three");
}

#[test]
fn discards_and_zeroes() {
    let cluster = cluster_or_skip!("discards_and_zeroes");
    let mut case = Case::plain(&cluster, 2 * MIB, &layout());
    case.write(0, 2 * MIB);
    case.snap("one");
    case.discard(0, OBJECT);
    case.discard(OBJECT + 512, 1024);
    case.discard(3 * OBJECT - 5000, 2 * OBJECT);
    case.driver.write_zeroes(&case.spec, 10 * OBJECT, OBJECT).unwrap();
    case.driver.write_zeroes(&case.spec, 12 * OBJECT + 1, 3).unwrap();
    case.snap("two");
    let (_, zeroes) = case.right_and_different("one", "two").bytes();
    assert!(zeroes >= 2 * OBJECT, "whole objects that are gone are known to be zero: {zeroes}");
}

/// facts: `rbd snap rollback` copies the old object map, where the object is "exists, clean".
#[test]
fn rolled_back_to_a_snapshot_before_the_base() {
    let cluster = cluster_or_skip!("rolled_back_to_a_snapshot_before_the_base");
    let mut case = Case::plain(&cluster, 2 * MIB, &layout());
    case.write(0, OBJECT);
    case.snap("s1");
    case.snap("s1b");
    case.write(0, OBJECT);
    case.snap("s2");
    case.rollback("s1b");
    case.snap("s3");
    case.right_and_different("s2", "s3");
    case.right_and_different("s1", "s2");
    case.right(Some("s1"), "s3");
    report_fast(&case, "what a rollback changed", "s2", "s3");
}

#[test]
fn rolled_back_over_discards_and_sizes() {
    let cluster = cluster_or_skip!("rolled_back_over_discards_and_sizes");
    let mut case = Case::plain(&cluster, 2 * MIB, &layout());
    case.write(0, 2 * MIB);
    case.snap("s1");
    case.discard(OBJECT, 3 * OBJECT);
    case.resize(MIB);
    case.snap("s2");
    case.resize(3 * MIB);
    case.write(2 * MIB, MIB);
    case.snap("s3");
    case.rollback("s1");
    case.snap("s4");
    case.rollback("s2");
    case.snap("s5");
    for (base, snapshot) in [("s1", "s2"), ("s2", "s3"), ("s3", "s4"), ("s2", "s4"), ("s4", "s5")] {
        case.right_and_different(base, snapshot);
    }
    for (base, snapshot) in [("s1", "s4"), ("s2", "s5"), ("s1", "s5"), ("s3", "s5")] {
        case.right(Some(base), snapshot);
    }
}

#[test]
fn a_clone_shows_its_parent() {
    let cluster = cluster_or_skip!("a_clone_shows_its_parent");
    for layout in [layout(), Layout::new(14, NO_OBJECT_MAP), Layout::new(18, FULL_FEATURES)] {
        let mut case = Case::cloned(&cluster, &layout);
        case.snap("one");
        case.write(OBJECT + 100, 50);
        case.resize(3 * MIB);
        case.write(3 * MIB - 10, 10);
        case.snap("two");
        assert_eq!(case.right(None, "one").bytes(), (2 * MIB, 0));
        case.right_and_different("one", "two");
        case.right(None, "two");
    }
}

#[test]
fn a_flattened_clone() {
    let cluster = cluster_or_skip!("a_flattened_clone");
    for features in [FULL_FEATURES, &["layering", "exclusive-lock", "object-map", "fast-diff"]] {
        let mut case = Case::cloned(&cluster, &Layout::new(16, features));
        case.write(5 * OBJECT, 10);
        case.discard(8 * OBJECT, OBJECT);
        case.snap("one");
        case.flatten();
        case.snap("two");
        case.discard(10 * OBJECT, 2 * OBJECT);
        case.snap("three");
        assert!(case.content("one") == case.content("two"));
        case.right(Some("one"), "two");
        case.right_and_different("one", "three");
        case.right_and_different("two", "three");
        case.right(None, "three");
    }
}

/// A discard hides the parent behind an empty object; a rollback removes that and uncovers it.
#[test]
fn a_clone_discarded_and_rolled_back() {
    let cluster = cluster_or_skip!("a_clone_discarded_and_rolled_back");
    for features in [FULL_FEATURES, NO_OBJECT_MAP, &["layering", "exclusive-lock", "object-map", "fast-diff"]]
    {
        let mut case = Case::cloned(&cluster, &Layout::new(16, features));
        case.snap("s1");
        case.discard(3 * OBJECT, 2 * OBJECT);
        case.discard(7 * OBJECT + 4096, OBJECT - 4096);
        case.discard(9 * OBJECT + 4096, 4096);
        case.driver.write_zeroes(&case.spec, 11 * OBJECT, OBJECT).unwrap();
        case.snap("s2");
        case.rollback("s1");
        case.snap("s3");
        case.write(3 * OBJECT + 5, 10);
        case.snap("s4");
        case.rollback("s2");
        case.snap("s5");
        for (base, snapshot) in
            [("s1", "s2"), ("s2", "s3"), ("s2", "s4"), ("s3", "s4"), ("s4", "s5"), ("s3", "s5")]
        {
            case.right_and_different(base, snapshot);
        }
        case.right(Some("s1"), "s3");
        case.right(Some("s2"), "s5");
        case.right(None, "s2");
        case.right(None, "s3");
    }
}

/// Whole objects are written without asking the parent, so no older snapshot gets an object; cut short,
/// they hide the parent behind their end, and a rollback removes them.
#[test]
fn a_clone_with_short_objects_rolled_back() {
    let cluster = cluster_or_skip!("a_clone_with_short_objects_rolled_back");
    for features in [FULL_FEATURES, NO_OBJECT_MAP] {
        let mut case = Case::cloned(&cluster, &Layout::new(16, features));
        case.snap("s1");
        case.write(3 * OBJECT, OBJECT);
        case.discard(3 * OBJECT + 4096, OBJECT - 4096);
        case.snap("s2");
        case.rollback("s1");
        case.snap("s3");
        case.rollback("s2");
        case.snap("s4");
        for (base, snapshot) in [("s1", "s2"), ("s2", "s3"), ("s3", "s4"), ("s1", "s4")] {
            case.right_and_different(base, snapshot);
        }
        case.right(None, "s2");
        case.right(None, "s4");
        case.right(Some("s1"), "s3");
        case.right(Some("s2"), "s4");
    }
}

#[test]
fn a_clone_shrunk_below_its_overlap_and_grown_again() {
    let cluster = cluster_or_skip!("a_clone_shrunk_below_its_overlap_and_grown_again");
    for features in [FULL_FEATURES, NO_OBJECT_MAP, &["layering", "exclusive-lock", "object-map", "fast-diff"]]
    {
        let mut case = Case::cloned(&cluster, &Layout::new(16, features));
        case.write(20 * OBJECT, OBJECT);
        case.snap("s1");
        case.resize(MIB + 1000);
        case.resize(2 * MIB);
        case.snap("s2");
        case.flatten();
        case.snap("s3");
        case.rollback("s1");
        case.snap("s4");
        // The overlap that has shrunk tells it, though no snapshot does.
        let found = case.right_and_different("s1", "s2");
        assert!(found.covers(MIB + 1000..2 * MIB), "{:?}", found.extents);
        case.right_and_different("s1", "s3");
        case.right(Some("s2"), "s3");
        case.right_and_different("s3", "s4");
        case.right_and_different("s2", "s4");
        case.right(Some("s1"), "s4");
        case.right(None, "s2");
    }
}

/// The overlap is gone in the one snapshot and no clue is left of how far it once reached.
#[test]
fn a_clone_shrunk_grown_and_flattened_without_a_snapshot_between() {
    let cluster = cluster_or_skip!("a_clone_shrunk_grown_and_flattened_without_a_snapshot_between");
    for features in [FULL_FEATURES, NO_OBJECT_MAP, &["layering", "exclusive-lock", "object-map", "fast-diff"]]
    {
        let case = Case::cloned(&cluster, &Layout::new(16, features));
        case.snap("s1");
        case.resize(MIB + 1000);
        case.resize(2 * MIB);
        case.flatten();
        case.snap("s2");
        case.right_and_different("s1", "s2");
    }
}

#[test]
fn striped() {
    let cluster = cluster_or_skip!("striped");
    for (unit, count) in [(16 * KIB, 3), (64 * KIB, 2), (4 * KIB, 5)] {
        let mut case = Case::plain(&cluster, 2 * MIB + 1000, &layout().striped(unit, count));
        case.write(10_000, 300_000);
        case.snap("s1");
        case.write(MIB, 5000);
        case.write(2 * MIB - 5000, 5000);
        case.discard(100_000, 100_000);
        case.snap("s2");
        case.resize(MIB + 12_345);
        case.resize(2 * MIB);
        case.snap("s3");
        case.rollback("s1");
        case.snap("s4");
        case.right(None, "s2");
        for (base, snapshot) in [("s1", "s2"), ("s2", "s3"), ("s1", "s3"), ("s3", "s4"), ("s2", "s4")] {
            case.right_and_different(base, snapshot);
        }
    }
}

#[test]
fn objects_of_other_sizes() {
    let cluster = cluster_or_skip!("objects_of_other_sizes");
    for (order, features) in
        [(12, FULL_FEATURES), (12, NO_OBJECT_MAP), (20, FULL_FEATURES), (25, FULL_FEATURES)]
    {
        let mut case = Case::plain(&cluster, 2 * MIB + 5, &Layout::new(order, features));
        case.write(70_000, 100_000);
        case.snap("s1");
        case.write(2 * MIB, 5);
        case.discard(80_000, 40_000);
        case.snap("s2");
        case.right(None, "s1");
        case.right_and_different("s1", "s2");
    }
}

#[test]
fn sizes_that_are_no_multiple_of_anything() {
    let cluster = cluster_or_skip!("sizes_that_are_no_multiple_of_anything");
    for size in [1, 511, 513, OBJECT - 1, OBJECT + 1, MIB + 4095] {
        let mut case = Case::plain(&cluster, size, &layout());
        case.write(size - 1, 1);
        case.snap("s1");
        case.write(0, size.min(10));
        case.snap("s2");
        case.driver.write_zeroes(&case.spec, 0, size).unwrap();
        case.snap("s3");
        case.right(None, "s1");
        case.right_and_different("s1", "s2");
        case.right_and_different("s2", "s3");
    }
}

#[test]
fn an_image_of_no_size() {
    let cluster = cluster_or_skip!("an_image_of_no_size");
    let mut case = Case::plain(&cluster, 0, &layout());
    case.snap("s1");
    case.resize(MIB);
    case.write(0, 10);
    case.snap("s2");
    case.resize(0);
    case.snap("s3");
    case.right(None, "s1");
    case.right_and_different("s1", "s2");
    case.right(Some("s2"), "s3");
}

#[test]
fn without_object_maps_everything_is_scanned() {
    let cluster = cluster_or_skip!("without_object_maps_everything_is_scanned");
    let mut case = Case::plain(&cluster, 2 * MIB, &Layout::new(16, NO_OBJECT_MAP));
    case.write(0, OBJECT);
    case.snap("s1");
    case.write(MIB, 10);
    case.snap("s2");
    for mode in [DiffMode::Exact, DiffMode::Fast] {
        let pair = Pair { pool: &case.pool, spec: &case.spec, base: Some("s1"), snapshot: "s2" };
        let source = pair.open(mode);
        assert_eq!(source.mode(), DiffMode::Scan);
        assert_eq!(source.fallback(), Some("the snapshot has no valid object map"));
    }
    case.right_and_different("s1", "s2");
}

#[test]
fn invalid_object_maps_are_not_asked() {
    let cluster = cluster_or_skip!("invalid_object_maps_are_not_asked");
    let mut case = Case::plain(&cluster, 2 * MIB, &layout());
    case.write(0, MIB);
    case.snap("s1");
    case.driver.invalidate_object_maps(&case.spec).unwrap();
    case.write(MIB, 10);
    case.snap("s2");
    let open = |base, snapshot| {
        let pair = Pair { pool: &case.pool, spec: &case.spec, base, snapshot };
        let source = pair.open(DiffMode::Exact);
        (source.mode(), source.fallback())
    };
    let invalid = Some("the snapshot has no valid object map");
    assert_eq!(open(Some("s1"), "s2"), (DiffMode::Scan, invalid));
    case.driver.rebuild_object_map(&case.spec, Some("s2")).unwrap();
    let invalid = Some("the base snapshot has no valid object map");
    assert_eq!(open(Some("s1"), "s2"), (DiffMode::Scan, invalid));
    assert_eq!(open(None, "s2"), (DiffMode::Exact, None));
    case.right_and_different("s1", "s2");
    case.right(None, "s2");
    case.driver.rebuild_object_map(&case.spec, Some("s1")).unwrap();
    assert_eq!(open(Some("s1"), "s2"), (DiffMode::Exact, None));
    case.right_and_different("s1", "s2");
}

#[test]
fn a_snapshot_in_a_namespace() {
    let cluster = cluster_or_skip!("a_snapshot_in_a_namespace");
    let driver = cluster.driver();
    let namespace = unique("namespace");
    driver.namespace_create(POOL, &namespace).unwrap();
    let spec = Spec::in_namespace(POOL, &namespace, "image of: ..%20 \u{fc}");
    driver.create(&spec, 2 * MIB, &layout()).unwrap();
    let pool = open_pool(&cluster, &spec);
    assert_eq!(pool.images().unwrap(), [&*spec.image]);
    let mut case = Case { driver, pool, spec, parent: None, seed: 0 };
    case.write(0, MIB);
    case.snap("a: b%,@\u{fc}");
    case.discard(OBJECT, OBJECT);
    case.snap("..");
    case.right_and_different("a: b%,@\u{fc}", "..");
    case.right(None, "..");
}

#[test]
fn the_two_kinds_of_wrong_are_told_apart() {
    // The comparison itself must be able to fail, or all of the above proves nothing.
    let (old, new) = ([1_u8; 100], {
        let mut new = [1_u8; 100];
        new[20..30].fill(2);
        new
    });
    let extent = |start, end, kind| super::Extent::new(start..end, kind).unwrap();
    let wrong = |extents: &[super::Extent]| {
        let mut rebuilt = super::Rebuilt::new(&old, &new);
        extents.iter().for_each(|extent| rebuilt.take(extent));
        rebuilt.wrong()
    };
    assert_eq!(wrong(&[]), Some(Wrong::Missed(20..30)));
    assert_eq!(wrong(&[extent(15, 29, super::ExtentKind::Data)]), Some(Wrong::Missed(29..30)));
    assert_eq!(wrong(&[extent(15, 40, super::ExtentKind::Data)]), None);
    assert_eq!(wrong(&[extent(15, 40, super::ExtentKind::Zero)]), Some(Wrong::NotZero(15..40)));
}

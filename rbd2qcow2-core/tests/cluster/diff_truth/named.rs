//! Each kind of image and of history that a diff was ever wrong about, or could be.

use rbd2qcow2_core::options::DiffMode;
use rbd2qcow2_core::source::RbdDiffSource;

use super::case::{Case, KIB, MIB, OBJECT, layout, report_fast};
use super::{Pair, Wrong, open_pool};
use crate::cluster::{POOL, unique};
use crate::cluster_or_skip;
use crate::driver::{FULL_FEATURES, Layout, NO_OBJECT_MAP, Spec};

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
    // What the map denies is asked for, too, and holds nothing.
    let [all] = &case.diff(None, "empty", DiffMode::Exact).segments[..] else { panic!("one segment") };
    assert_eq!(*all, 0..2 * MIB);
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

/// `rbd snap rollback` copies the old object map, where the object is "exists, clean".
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

//! What a diff of clones could be wrong about: the parent that shows through, or no longer does.

use rbd2qcow2_core::options::DiffMode;
use rbd2qcow2_core::rbd::Granularity;
use rbd2qcow2_core::source::RbdDiffSource;

use super::case::{Case, MIB, OBJECT, layout};
use super::{Pair, Rebuilt, check_reads};
use crate::cluster_or_skip;
use crate::driver::{FULL_FEATURES, Layout, NO_OBJECT_MAP};
use crate::random::Random;

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

/// A whole object can be written without asking the parent; cut short it hides the parent behind its
/// end, which a rollback uncovers.
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

/// The first write to an object of a clone puts the parent's data into its snapshots, and the object into their
/// maps. Who has read the map before must not take that for a lie.
#[test]
fn a_clone_that_is_written_to_after_its_map_was_read() {
    let cluster = cluster_or_skip!("a_clone_that_is_written_to_after_its_map_was_read");
    for mode in [DiffMode::Exact, DiffMode::Scan] {
        let mut case = Case::cloned(&cluster, &layout());
        case.write(OBJECT, 100);
        case.snap("one");
        let content = case.content("one");
        let pair = Pair { pool: &case.pool, spec: &case.spec, base: None, snapshot: "one" };
        let source = pair.open(mode);
        let segments: Vec<_> = source.segments(4096).map(Result::unwrap).collect();
        let listed = || {
            let image = case.pool.open(&case.spec.image, Some("one")).unwrap();
            image
                .diff(None, 0..2 * MIB, Granularity::Objects, false, 0, |sum, one| *sum += one.length)
                .unwrap()
        };
        let before: u64 = listed();
        case.driver.write(&case.spec, 5 * OBJECT + 7, 100, 8).unwrap();
        case.driver.write(&case.spec, 9 * OBJECT, OBJECT, 9).unwrap();
        assert!(listed() > before, "nothing was copied up");
        let mut found = Vec::new();
        for segment in segments {
            source.diff(segment, &mut found).expect("nothing is wrong with the map");
        }
        source.confirm().expect("nothing is wrong with the map");
        let mut rebuilt = Rebuilt::new(&[], &content);
        found.iter().for_each(|extent| rebuilt.take(extent));
        assert_eq!(rebuilt.wrong(), None, "{mode:?}");
        check_reads(&source, &found, &content, &mut Random::new(1));
    }
}

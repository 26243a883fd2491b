//! What a diff of clones could be wrong about: the parent that shows through, or no longer does.

use super::case::{Case, MIB, OBJECT, layout};
use crate::cluster_or_skip;
use crate::driver::{FULL_FEATURES, Layout, NO_OBJECT_MAP};

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

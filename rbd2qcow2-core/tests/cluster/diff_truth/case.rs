//! An image and what tests do to it.

use rbd2qcow2_core::options::DiffMode;
use rbd2qcow2_core::rbd::{Granularity, Pool};

use super::{Found, Pair, Rebuilt, check_reads, compare, open_pool};
use crate::cluster::{TestCluster, say, unique_image};
use crate::driver::{Driver, FULL_FEATURES, Layout, Spec};
use crate::random::Random;

pub(super) const KIB: u64 = 1 << 10;
pub(super) const MIB: u64 = 1 << 20;
/// The objects' size in most of these tests.
pub(super) const OBJECT: u64 = 64 * KIB;

pub(super) fn layout() -> Layout {
    Layout::new(16, FULL_FEATURES)
}

/// An image of 2 MiB and what is done to it.
pub(super) struct Case {
    pub(super) driver: Driver,
    pub(super) pool: Pool,
    pub(super) spec: Spec,
    pub(super) parent: Option<Spec>,
    pub(super) seed: u64,
}

impl Case {
    pub(super) fn plain(cluster: &TestCluster, size: u64, layout: &Layout) -> Self {
        let driver = cluster.driver();
        let spec = unique_image("named");
        driver.create(&spec, size, layout).unwrap();
        Self { driver, pool: open_pool(cluster, &spec), spec, parent: None, seed: 0 }
    }

    /// A clone of an image of 2 MiB that is full of data.
    pub(super) fn cloned(cluster: &TestCluster, layout: &Layout) -> Self {
        let driver = cluster.driver();
        let (parent, spec) = (unique_image("parent"), unique_image("clone"));
        driver.create(&parent, 2 * MIB, &self::layout()).unwrap();
        driver.write(&parent, 0, 2 * MIB, 99).unwrap();
        driver.snap_create(&parent, "base").unwrap();
        driver.clone(&parent, "base", &spec, layout).unwrap();
        Self { driver, pool: open_pool(cluster, &spec), spec, parent: Some(parent), seed: 0 }
    }

    pub(super) fn write(&mut self, offset: u64, length: u64) {
        self.seed += 1;
        self.driver.write(&self.spec, offset, length, self.seed).unwrap();
    }

    pub(super) fn discard(&self, offset: u64, length: u64) {
        self.driver.discard(&self.spec, offset, length).unwrap();
    }

    pub(super) fn resize(&self, size: u64) {
        self.driver.resize(&self.spec, size).unwrap();
    }

    pub(super) fn snap(&self, name: &str) {
        self.driver.snap_create(&self.spec, name).unwrap();
    }

    pub(super) fn rollback(&self, name: &str) {
        self.driver.rollback(&self.spec, name).unwrap();
    }

    pub(super) fn flatten(&self) {
        self.driver.flatten(&self.spec).unwrap();
    }

    pub(super) fn content(&self, snapshot: &str) -> Vec<u8> {
        self.driver.read(&self.spec, Some(snapshot)).unwrap()
    }

    pub(super) fn diff(&self, base: Option<&str>, snapshot: &str, mode: DiffMode) -> Found {
        let pair = Pair { pool: &self.pool, spec: &self.spec, base, snapshot };
        let source = pair.open(mode);
        let old = base.map_or_else(Vec::new, |base| self.content(base));
        let new = self.content(snapshot);
        let found = compare(&source, &old, &new);
        check_reads(&source, &found.extents, &new, &mut Random::new(1));
        found
    }

    /// Wants both modes that must never be wrong to be right. What the first of them found.
    pub(super) fn right(&self, base: Option<&str>, snapshot: &str) -> Found {
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
    pub(super) fn right_and_different(&self, base: &str, snapshot: &str) -> Found {
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
pub(super) fn report_fast(case: &Case, hazard: &str, base: &str, snapshot: &str) {
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

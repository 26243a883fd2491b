//! Ranges where something is wrong, bounded in memory.

use std::ops::Range;
use std::sync::Arc;

use super::affected::seen_through;
use crate::qcow2::layer::LayerReader;

/// Ranges that are kept apart. What comes behind them is taken for one.
const KEPT: usize = 10_000;

/// Ranges in any order, which may touch.
#[derive(Debug, Default)]
pub(super) struct Damage {
    ranges: Vec<Range<u64>>,
    /// A layer through which alone the damaged one is seen: what that hides does not count. What is kept apart
    /// here is bounded, so nothing that nobody sees may be among it.
    above: Option<Arc<LayerReader>>,
}

impl Damage {
    /// For a layer that is seen through `above` only.
    pub(super) fn below(above: Arc<LayerReader>) -> Self {
        Self { ranges: Vec::new(), above: Some(above) }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    pub(super) fn add(&mut self, range: Range<u64>) {
        match self.above.clone() {
            None => self.add_seen(range),
            Some(above) => seen_through(&above, &range).into_iter().for_each(|range| self.add_seen(range)),
        }
    }

    fn add_seen(&mut self, range: Range<u64>) {
        match self.ranges.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.ranges.push(range),
        }
        if self.ranges.len() > 2 * KEPT {
            self.settle();
        }
    }

    /// Sorts and joins.
    fn settle(&mut self) {
        self.ranges.sort_unstable_by_key(|range| range.start);
        let mut joined: Vec<Range<u64>> = Vec::new();
        for range in self.ranges.drain(..) {
            let full = joined.len() > KEPT;
            match joined.last_mut() {
                Some(last) if last.end >= range.start || full => last.end = last.end.max(range.end),
                _ => joined.push(range),
            }
        }
        self.ranges = joined;
    }

    /// What was added: ascending, disjoint.
    pub(super) fn into_ranges(mut self) -> Vec<Range<u64>> {
        self.settle();
        self.ranges
    }

    pub(super) fn extend(&mut self, ranges: impl IntoIterator<Item = Range<u64>>) {
        ranges.into_iter().for_each(|range| self.add(range));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_joined_and_bounded() {
        let mut damage = Damage::default();
        for start in [30, 10, 40, 0, 15] {
            damage.add(start..start + 10);
        }
        assert_eq!(damage.into_ranges(), [0..25, 30..50]);
        let mut damage = Damage::default();
        let many = 5 * KEPT as u64;
        damage.extend((0..many).rev().map(|number| 10 * number..10 * number + 1));
        let ranges = damage.into_ranges();
        assert!(ranges.len() <= KEPT + 1, "{}", ranges.len());
        assert_eq!((ranges[0].start, ranges.last().map(|last| last.end)), (0, Some(10 * many - 9)));
    }
}

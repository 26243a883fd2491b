//! What is made of extents that were listed. Pure.

use std::ops::Range;

use crate::extent::{Extent, ExtentKind};

/// The parts of extents that lie in `range`.
pub(super) fn within(extents: &[Extent], range: &Range<u64>) -> impl Iterator<Item = Extent> {
    extents.iter().filter_map(|extent| {
        let start = extent.offset.max(range.start);
        let end = extent.end().min(range.end);
        Extent::new(start..end.max(start), extent.kind)
    })
}

/// The data among `held` within `range`, and `rest` for all the rest of it.
pub(super) fn fill(held: &[Extent], range: &Range<u64>, rest: ExtentKind) -> Vec<Extent> {
    let mut data: Vec<_> = within(held, range).filter(|extent| extent.kind == ExtentKind::Data).collect();
    data.sort_unstable_by_key(|extent| extent.offset);
    let mut filled = Vec::with_capacity(data.len() * 2 + 1);
    let mut end = range.start;
    for extent in data {
        let start = extent.offset.max(end);
        filled.extend(Extent::new(end..start, rest));
        filled.extend(Extent::new(start..extent.end().max(start), ExtentKind::Data));
        end = extent.end().max(start);
    }
    filled.extend(Extent::new(end..range.end, rest));
    filled
}

/// The extents, with zeroes made data up to `covered`, where they may be what shows through from elsewhere.
pub(super) fn distrust_zeroes(extents: impl IntoIterator<Item = Extent>, covered: u64) -> Vec<Extent> {
    let mut found = Vec::new();
    for extent in extents {
        let covered = extent.end().min(covered);
        if extent.kind == ExtentKind::Data || extent.offset >= covered {
            found.push(extent);
            continue;
        }
        found.extend(Extent::new(extent.offset..covered, ExtentKind::Data));
        found.extend(Extent::new(covered..extent.end(), ExtentKind::Zero));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(range: Range<u64>) -> Extent {
        Extent::new(range, ExtentKind::Data).unwrap()
    }

    fn zero(range: Range<u64>) -> Extent {
        Extent::new(range, ExtentKind::Zero).unwrap()
    }

    #[test]
    fn what_is_not_held_is_filled() {
        let held = [data(30..50), zero(50..60), data(0..12), data(90..200)];
        let filled = fill(&held, &(10..100), ExtentKind::Zero);
        assert_eq!(filled, [data(10..12), zero(12..30), data(30..50), zero(50..90), data(90..100)]);
        assert_eq!(fill(&[], &(10..20), ExtentKind::Zero), [zero(10..20)]);
        assert_eq!(fill(&held, &(20..40), ExtentKind::Data), [data(20..30), data(30..40)]);
    }

    #[test]
    fn zeroes_that_may_be_a_parents_data_are_read() {
        let found = distrust_zeroes([zero(0..10), data(10..20), zero(20..40), zero(50..60)], 30);
        assert_eq!(found, [data(0..10), data(10..20), data(20..30), zero(30..40), zero(50..60)]);
    }

    #[test]
    fn extents_are_cut_to_a_range() {
        let extents = [data(0..10), zero(10..20), data(30..40)];
        assert_eq!(within(&extents, &(5..15)).collect::<Vec<_>>(), [data(5..10), zero(10..15)]);
        assert_eq!(within(&extents, &(20..30)).count(), 0);
    }
}

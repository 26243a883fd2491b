//! A choice of places out of very many, made while they pass by. Pure.

use std::ops::Range;

use crate::extent::{align_down, align_up};

/// Bytes of a place: a page of most guests' file systems. As good as any larger piece to find a lost change,
/// and what a cluster reads fastest.
pub(crate) const PAGE: u64 = PAGE_BYTES as u64;

/// The same, of memory.
pub(crate) const PAGE_BYTES: usize = 4096;

/// Keeps a number of places, each drawn evenly from all that it was offered, on its own: so memory is that
/// of the places kept, however many there were. The same place may be kept twice.
#[derive(Clone, Debug)]
pub(crate) struct Sampler {
    slots: Vec<u64>,
    /// Places that were offered.
    total: u64,
    random: Random,
}

impl Sampler {
    /// Keeps `count` places. Another `seed` keeps others.
    pub(crate) fn new(count: usize, seed: u64) -> Self {
        Self { slots: vec![0; count], total: 0, random: Random(seed) }
    }

    /// Offers all pages of some ranges, in bytes, which begin at pages and are not empty. A page may be
    /// ragged where a range ends.
    pub(crate) fn offer(&mut self, ranges: &[Range<u64>]) {
        // How many places there are up to the end of each range: all are one to those who draw.
        let mut ends = Vec::with_capacity(ranges.len());
        let mut offered = 0;
        for range in ranges {
            offered += (range.end - range.start).div_ceil(PAGE);
            ends.push(offered);
        }
        if offered == 0 {
            return;
        }
        self.total += offered;
        for slot in &mut self.slots {
            // Among all so far; the new ones come first.
            let drawn = self.random.below(self.total);
            if drawn < offered {
                let index = ends.partition_point(|end| *end <= drawn);
                let before = if index == 0 { 0 } else { ends[index - 1] };
                *slot = ranges[index].start + (drawn - before) * PAGE;
            }
        }
    }

    /// The places that were kept: none where none was offered.
    pub(crate) fn places(&self) -> &[u64] {
        if self.total == 0 { &[] } else { &self.slots }
    }
}

/// The gaps that `extents`, ascending and disjoint, leave in `range`, as far as they are whole pages and
/// whole grains, ascending. `size` is where the last grain ends. `grain` is a power of two.
pub(crate) fn gaps(
    range: &Range<u64>,
    extents: impl Iterator<Item = Range<u64>>,
    grain: u64,
    size: u64,
) -> Vec<Range<u64>> {
    let grain = grain.max(PAGE);
    let mut found = Vec::new();
    let mut start = range.start;
    for extent in extents.chain(std::iter::once(range.end..range.end)) {
        let end = if extent.start == size { size } else { align_down(extent.start, grain) };
        let gap = align_up(start, grain)..end;
        if gap.start < gap.end {
            found.push(gap);
        }
        start = start.max(extent.end);
    }
    found
}

/// Even enough to choose places by, and no secret: splitmix64.
#[derive(Clone, Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number below `limit`, which is not 0.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        // The upper half of the product: less than `limit`.
        let product = u128::from(self.next()) * u128::from(limit);
        u64::try_from(product >> 64).unwrap_or(0)
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "lists of one range")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Ascending, disjoint ranges of some image, and its size.
    fn image() -> impl Strategy<Value = (Vec<Range<u64>>, u64)> {
        (prop::collection::vec((0_u64..60_000, 1_u64..60_000), 0..12), 0_u64..40_000).prop_map(
            |(parts, tail)| {
                let (mut end, mut ranges) = (0, Vec::new());
                for (gap, length) in parts {
                    ranges.push(end + gap..end + gap + length);
                    end += gap + length;
                }
                (ranges, end + tail)
            },
        )
    }

    proptest! {
        #[test]
        fn gaps_are_all_pages_that_touch_no_grain_with_a_change((extents, size) in image(), bits in 9_u32..17) {
            let grain = 1_u64 << bits;
            let unit = grain.max(PAGE);
            let found = gaps(&(0..size), extents.iter().cloned(), grain, size);
            let mut expected = Vec::new();
            for start in (0..size).step_by(usize::try_from(unit).unwrap()) {
                let end = (start + unit).min(size);
                if !extents.iter().any(|extent| extent.start < end && extent.end > start) {
                    expected.push(start..end);
                }
            }
            let single = found.iter().flat_map(|gap| {
                let end = gap.end;
                (gap.start..end).step_by(usize::try_from(unit).unwrap()).map(move |at| at..(at + unit).min(end))
            });
            prop_assert_eq!(single.collect::<Vec<_>>(), expected);
        }

        #[test]
        fn only_what_was_offered_is_kept((extents, size) in image(), seed: u64, cut in 1_usize..4) {
            let offered = gaps(&(0..size), extents.into_iter(), PAGE, size);
            let mut sampler = Sampler::new(20, seed);
            for part in offered.chunks(cut) {
                sampler.offer(part);
            }
            prop_assert_eq!(sampler.places().len(), if offered.is_empty() { 0 } else { 20 });
            for place in sampler.places() {
                prop_assert!(place % PAGE == 0 && offered.iter().any(|range| range.contains(place)));
            }
        }
    }

    #[test]
    fn each_place_is_as_likely_as_any_other() {
        // 100 places, offered in very uneven portions.
        let portions: [&[Range<u64>]; 4] = [
            &[0..50 * PAGE],
            &[],
            &[60 * PAGE..61 * PAGE, 70 * PAGE..100 * PAGE],
            &[200 * PAGE..218 * PAGE + 1],
        ];
        let mut counts = std::collections::BTreeMap::new();
        for seed in 0..500 {
            let mut sampler = Sampler::new(200, seed << 20);
            for portion in portions {
                sampler.offer(portion);
            }
            for place in sampler.places() {
                *counts.entry(*place).or_insert(0_i32) += 1;
            }
        }
        assert_eq!(counts.len(), 100);
        // 1000 are expected of each; six times the standard deviation is 190.
        for (place, count) in counts {
            assert!((count - 1000).abs() < 190, "{count} times {place}");
        }
    }

    #[test]
    fn other_nights_see_other_places() {
        let kept = |seed| {
            let mut sampler = Sampler::new(64, seed);
            sampler.offer(&[0..1 << 40]);
            sampler.places().to_vec()
        };
        assert_eq!(kept(1), kept(1));
        let (first, second) = (kept(1), kept(2));
        assert!(!first.iter().any(|place| second.contains(place)));
    }
}

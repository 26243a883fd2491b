//! Lists of ranges: ascending and disjoint. Pure.

use std::ops::Range;

/// What two lists have in common.
pub(crate) fn intersection(some: &[Range<u64>], others: &[Range<u64>]) -> Vec<Range<u64>> {
    let (mut some, mut others) = (some.iter().peekable(), others.iter().peekable());
    let mut common = Vec::new();
    while let (Some(one), Some(other)) = (some.peek(), others.peek()) {
        let both = one.start.max(other.start)..one.end.min(other.end);
        if both.start < both.end {
            common.push(both);
        }
        if one.end <= other.end { _ = some.next() } else { _ = others.next() }
    }
    common
}

/// What is in `all` and not in `others`.
pub(crate) fn remainder(all: &[Range<u64>], others: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut gaps = Vec::with_capacity(others.len() + 1);
    let mut end = 0;
    for other in others {
        gaps.push(end..other.start);
        end = other.end;
    }
    gaps.push(end..u64::MAX);
    intersection(all, &gaps)
}

/// Ranges that ascend, and may overlap, made wider to multiples of `unit` and joined.
pub(crate) fn widened(ranges: impl Iterator<Item = Range<u64>>, unit: u64) -> Vec<Range<u64>> {
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        let wide = range.start / unit * unit..range.end.div_ceil(unit).saturating_mul(unit);
        match joined.last_mut() {
            Some(last) if last.end >= wide.start => last.end = last.end.max(wide.end),
            _ => joined.push(wide),
        }
    }
    joined
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "lists of one range")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list() -> impl Strategy<Value = Vec<Range<u64>>> {
        prop::collection::vec((0_u64..9, 1_u64..9), 0..10).prop_map(|parts| {
            let mut end = 0;
            let place = |(gap, length)| {
                let start = end + gap;
                end = start + length;
                start..end
            };
            parts.into_iter().map(place).collect()
        })
    }

    fn numbers(ranges: &[Range<u64>]) -> Vec<u64> {
        ranges.iter().cloned().flatten().collect()
    }

    proptest! {
        #[test]
        fn lists_agree_with_numbers(some in list(), others in list(), unit in 1_u64..12) {
            let there = |number: &u64| others.iter().any(|range| range.contains(number));
            let (inside, outside): (Vec<_>, Vec<_>) = numbers(&some).into_iter().partition(there);
            prop_assert_eq!(numbers(&intersection(&some, &others)), inside);
            prop_assert_eq!(numbers(&remainder(&some, &others)), outside);
            let wide = widened(some.iter().cloned(), unit);
            let touched = |number: &u64| some.iter().cloned().flatten().any(|other| other / unit == number / unit);
            prop_assert_eq!(numbers(&wide), (0..300).filter(touched).collect::<Vec<_>>());
        }
    }
}

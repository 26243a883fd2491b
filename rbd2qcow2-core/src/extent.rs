//! Ranges of an image that hold data or zeroes, and their alignment to a layer's grain. Pure.

use std::ops::Range;

/// What is known of an extent's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ExtentKind {
    /// Must be read to be known.
    Data,
    /// Zeroes.
    Zero,
}

/// A range of an image, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte, counted from the image's start.
    pub offset: u64,
    /// Number of bytes, not 0.
    pub length: u64,
    /// What is known of the bytes.
    pub kind: ExtentKind,
}

impl Extent {
    /// The extent of a range that is not empty; `None` for an empty one.
    #[must_use]
    pub fn new(range: Range<u64>, kind: ExtentKind) -> Option<Self> {
        let length = range.end.checked_sub(range.start).filter(|length| *length > 0)?;
        Some(Self { offset: range.start, length, kind })
    }

    /// First byte behind the extent.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset + self.length
    }

    /// The bytes that it covers.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.offset..self.end()
    }

    /// Cuts the extent at the multiples of `block` (bytes, a power of two).
    pub fn split(self, block: u64) -> impl Iterator<Item = Self> {
        let mut rest = self.range();
        std::iter::from_fn(move || {
            let start = rest.start;
            rest.start = (align_down(start, block) + block).min(rest.end);
            Self::new(start..rest.start, self.kind)
        })
    }
}

/// The largest multiple of `grain` (a power of two) up to `offset`.
#[must_use]
pub fn align_down(offset: u64, grain: u64) -> u64 {
    offset & !(grain - 1)
}

/// The smallest multiple of `grain` (a power of two) from `offset` on; saturates at the largest.
#[must_use]
pub fn align_up(offset: u64, grain: u64) -> u64 {
    match offset.checked_add(grain - 1) {
        Some(sum) => align_down(sum, grain),
        None => align_down(u64::MAX, grain),
    }
}

/// Turns what changed into what must be copied, in whole grains: ascending, disjoint, and no two
/// neighbours of one kind.
///
/// A grain that lies wholly in zeroes becomes zeroes; any other grain that an extent touches becomes
/// data, to be read whole. So every grain is written once, whole, and depends on no older layer.
/// `grain` is a power of two; the last grain ends at `size`.
///
/// Where extents overlap against what their source promises, data wins.
#[must_use]
pub fn align(extents: Vec<Extent>, grain: u64, size: u64) -> Vec<Extent> {
    let mut aligned = Vec::with_capacity(extents.len());
    for extent in join(extents) {
        let outer = align_down(extent.offset, grain)..align_up(extent.end(), grain).min(size);
        let inner_end = if extent.end() == size { size } else { align_down(extent.end(), grain) };
        let inner = align_up(extent.offset, grain)..inner_end;
        let pieces = match extent.kind {
            ExtentKind::Zero if inner.start < inner.end => [
                (outer.start..inner.start, ExtentKind::Data),
                (inner.clone(), ExtentKind::Zero),
                (inner.end..outer.end, ExtentKind::Data),
            ],
            _ => [(outer, ExtentKind::Data), (0..0, ExtentKind::Data), (0..0, ExtentKind::Data)],
        };
        aligned.extend(pieces.into_iter().filter_map(|(range, kind)| Extent::new(range, kind)));
    }
    coalesce(aligned)
}

/// The same bytes in ascending, disjoint extents. Where two of different kinds overlap, data wins.
#[must_use]
pub fn join(mut extents: Vec<Extent>) -> Vec<Extent> {
    extents.sort_unstable_by_key(|extent| (extent.offset, extent.kind));
    coalesce(extents)
}

/// Gathers aligned extents (as [`align`] returns them) so that those that touch the same unit are
/// together, and no more than that: data are cut at the multiples of `block`, zeroes only where a
/// unit's data require it, so zeroes that fill whole units come alone, whatever their length.
///
/// `unit` and `block` are powers of two, `unit` no more than `block`. What lies in one bundle that
/// holds data lies in one block.
pub fn bundles(extents: Vec<Extent>, unit: u64, block: u64) -> impl Iterator<Item = Vec<Extent>> {
    let mut pieces = extents.into_iter().flat_map(move |extent| pieces(extent, unit, block)).peekable();
    std::iter::from_fn(move || {
        let mut bundle = vec![pieces.next()?];
        while let (Some(last), Some(next)) = (bundle.last(), pieces.peek())
            && align_down(last.end() - 1, unit) == align_down(next.offset, unit)
        {
            bundle.push(*next);
            pieces.next();
        }
        Some(bundle)
    })
}

/// Data in blocks; of zeroes the part of a unit at the start, the whole units, and the part at the
/// end.
fn pieces(extent: Extent, unit: u64, block: u64) -> Vec<Extent> {
    if extent.kind == ExtentKind::Data {
        return extent.split(block).collect();
    }
    let first = align_up(extent.offset, unit).min(extent.end());
    let last = align_down(extent.end(), unit).max(first);
    let parts = [extent.offset..first, first..last, last..extent.end()];
    parts.into_iter().filter_map(|range| Extent::new(range, ExtentKind::Zero)).collect()
}

/// Joins sorted neighbours of one kind, and makes overlaps of two kinds data.
fn coalesce(sorted: Vec<Extent>) -> Vec<Extent> {
    let mut joined: Vec<Extent> = Vec::with_capacity(sorted.len());
    for extent in sorted {
        match joined.last_mut() {
            Some(last) if last.end() >= extent.offset && last.kind == extent.kind => {
                last.length = last.end().max(extent.end()) - last.offset;
            }
            Some(last) if last.end() > extent.offset => {
                last.length = last.end().max(extent.end()) - last.offset;
                last.kind = ExtentKind::Data;
            }
            _ => joined.push(extent),
        }
    }
    joined
}

/// Whether all bytes are zero.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    // Chunks long enough to fill vector registers, short enough to stop early in data.
    const CHUNK: usize = 256;
    let (chunks, rest) = bytes.as_chunks::<CHUNK>();
    chunks.iter().all(|chunk| chunk.iter().fold(0, |seen, byte| seen | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

/// The runs of whole grains in `bytes` that are all zero or hold data, ascending. The last grain may
/// be ragged. `bytes` begins at a grain.
pub fn runs(bytes: &[u8], grain: usize) -> impl Iterator<Item = (Range<usize>, ExtentKind)> {
    let kind = move |start: usize| {
        let end = bytes.len().min(start + grain);
        if is_zero(&bytes[start..end]) { ExtentKind::Zero } else { ExtentKind::Data }
    };
    let mut next = (!bytes.is_empty()).then(|| (0, kind(0)));
    std::iter::from_fn(move || {
        let (start, this) = next.take()?;
        let mut end = start + grain;
        while end < bytes.len() {
            let other = kind(end);
            if other != this {
                next = Some((end, other));
                break;
            }
            end += grain;
        }
        Some((start..end.min(bytes.len()), this))
    })
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "offsets in test data are small")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Byte {
        Unchanged,
        Zero,
        Data,
    }

    fn kind() -> impl Strategy<Value = ExtentKind> {
        prop_oneof![Just(ExtentKind::Data), Just(ExtentKind::Zero)]
    }

    /// Disjoint extents within an image of some size, in any order.
    fn image() -> impl Strategy<Value = (u64, Vec<Extent>)> {
        let pieces = prop::collection::vec((0_u64..40, 1_u64..60, kind()), 0..12);
        (pieces, 0_u64..20).prop_perturb(|(pieces, tail), mut random| {
            let mut end = 0;
            let mut extents = Vec::new();
            for (gap, length, kind) in pieces {
                extents.push(Extent { offset: end + gap, length, kind });
                end += gap + length;
            }
            for last in (1..extents.len()).rev() {
                extents.swap(last, random.random_range(0..=last));
            }
            (end + tail, extents)
        })
    }

    proptest! {
        #[test]
        fn align_agrees_with_a_model_of_single_bytes((size, extents) in image(), bits in 0_u32..6) {
            let grain = 1_u64 << bits;
            let mut bytes = vec![Byte::Unchanged; usize::try_from(size).unwrap()];
            for extent in &extents {
                let byte = if extent.kind == ExtentKind::Data { Byte::Data } else { Byte::Zero };
                bytes[extent.offset as usize..extent.end() as usize].fill(byte);
            }
            let mut expected = bytes.clone();
            for grain in expected.chunks_mut(grain as usize) {
                let wanted = match () {
                    () if grain.iter().all(|byte| *byte == Byte::Unchanged) => Byte::Unchanged,
                    () if grain.iter().all(|byte| *byte == Byte::Zero) => Byte::Zero,
                    () => Byte::Data,
                };
                grain.fill(wanted);
            }
            let aligned = align(extents, grain, size);
            let mut got = vec![Byte::Unchanged; bytes.len()];
            for extent in &aligned {
                let byte = if extent.kind == ExtentKind::Data { Byte::Data } else { Byte::Zero };
                got[extent.offset as usize..extent.end() as usize].fill(byte);
            }
            prop_assert_eq!(got, expected);
            for pair in aligned.windows(2) {
                prop_assert!(pair[0].end() < pair[1].offset
                    || (pair[0].end() == pair[1].offset && pair[0].kind != pair[1].kind));
            }
        }

        #[test]
        fn split_covers_the_extent_in_pieces_that_stay_in_one_block(
            offset in 0_u64..1000, length in 1_u64..1000, bits in 0_u32..9, kind in kind()
        ) {
            let block = 1 << bits;
            let extent = Extent { offset, length, kind };
            let mut end = offset;
            for piece in extent.split(block) {
                prop_assert_eq!(piece.offset, end);
                prop_assert_eq!(piece.kind, kind);
                prop_assert_eq!(align_down(piece.offset, block), align_down(piece.end() - 1, block));
                end = piece.end();
            }
            prop_assert_eq!(end, extent.end());
        }

        #[test]
        fn bundles_hold_all_extents_and_share_no_unit(
            (size, extents) in image(), grain in 0_u32..4, unit in 0_u32..4, block in 0_u32..4
        ) {
            let (unit, block) = (1 << (grain + unit), 1 << (grain + unit + block));
            let aligned = align(extents, 1 << grain, size);
            let bundles: Vec<_> = bundles(aligned.clone(), unit, block).collect();
            for bundle in &bundles {
                let zeroes = bundle.iter().all(|piece| piece.kind == ExtentKind::Zero);
                let (first, last) = (bundle[0].offset, bundle[bundle.len() - 1].end() - 1);
                prop_assert!(zeroes && bundle.len() == 1 || align_down(first, block) == align_down(last, block));
                // Whatever could go alone does: reads are made for each bundle.
                for pair in bundle.windows(2) {
                    prop_assert_eq!(align_down(pair[0].end() - 1, unit), align_down(pair[1].offset, unit));
                }
            }
            for pair in bundles.windows(2) {
                let last = pair[0][pair[0].len() - 1].end() - 1;
                prop_assert!(align_down(last, unit) < align_down(pair[1][0].offset, unit));
            }
            prop_assert_eq!(coalesce(bundles.concat()), aligned);
        }

        #[test]
        fn runs_agree_with_a_model(
            pattern in prop::collection::vec(prop::bool::weighted(0.2), 0..2000), bits in 0_u32..9
        ) {
            let grain = 1_usize << bits;
            let bytes: Vec<u8> = pattern.iter().map(|set| u8::from(*set)).collect();
            let mut end = 0;
            let mut last = None;
            for (range, kind) in runs(&bytes, grain) {
                prop_assert_eq!(range.start, end);
                prop_assert_ne!(last, Some(kind));
                for piece in bytes[range.clone()].chunks(grain) {
                    prop_assert_eq!(piece.contains(&1), kind == ExtentKind::Data);
                }
                (end, last) = (range.end, Some(kind));
            }
            prop_assert_eq!(end, bytes.len());
        }
    }

    #[test]
    fn overlapping_extents_of_two_kinds_become_data() {
        let extents = vec![
            Extent { offset: 0, length: 8, kind: ExtentKind::Zero },
            Extent { offset: 4, length: 2, kind: ExtentKind::Data },
        ];
        let data = Extent { offset: 0, length: 8, kind: ExtentKind::Data };
        assert_eq!(align(extents, 4, 100), [data]);
    }

    #[test]
    fn alignment_does_not_overflow() {
        assert_eq!(align_up(u64::MAX, 4096), align_down(u64::MAX, 4096));
        assert_eq!(align_up(4097, 4096), 8192);
    }
}

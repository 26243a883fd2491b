//! Which objects exist, as object maps tell it.

use std::hash::{BuildHasher, RandomState};
use std::ops::Range;

use crate::rbd::{Granularity, Image, RbdError};

/// Maps have long runs: any level makes them small.
const PACKED_LEVEL: i32 = 3;

/// One bit for each piece of a part of the image. A piece is a stripe unit: it lies in one object.
#[derive(Clone, Debug)]
pub(super) struct Pieces {
    /// In bytes, from a multiple of the piece on; may reach behind the image's end.
    range: Range<u64>,
    piece: u64,
    bits: Vec<u64>,
}

impl Pieces {
    /// None is marked. `range` is short enough for a bit of memory for each piece.
    pub(super) fn new(range: Range<u64>, piece: u64) -> Self {
        let words = usize::try_from((range.end - range.start).div_ceil(piece).div_ceil(64));
        Self { range, piece, bits: vec![0; words.expect("a part is short")] }
    }

    pub(super) fn range(&self) -> &Range<u64> {
        &self.range
    }

    /// How many are marked.
    pub(super) fn marked(&self) -> u64 {
        self.bits.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Marks all pieces that share a byte with `range`.
    pub(super) fn mark(&mut self, range: Range<u64>) {
        let start = range.start.max(self.range.start);
        let end = range.end.min(self.range.end);
        if start >= end {
            return;
        }
        let first = (start - self.range.start) / self.piece;
        let last = (end - 1 - self.range.start) / self.piece;
        for index in first..=last {
            self.bits[word(index)] |= 1 << (index % 64);
        }
    }

    /// Marks those that `change` makes of the words of marks of two others of the same range.
    pub(super) fn mark_each(&mut self, one: &Self, other: &Self, change: impl Fn(u64, u64) -> u64) {
        for ((own, one), other) in self.bits.iter_mut().zip(&one.bits).zip(&other.bits) {
            *own |= change(*one, *other);
        }
    }

    /// Whether the piece of the byte at `offset` is marked.
    pub(super) fn is_marked(&self, offset: u64) -> bool {
        let index = (offset - self.range.start) / self.piece;
        self.bits[word(index)] & (1 << (index % 64)) != 0
    }

    /// Up to where, within `limit`, all pieces are marked, or not, as the one of the byte at `offset` is.
    pub(super) fn same_until(&self, offset: u64, limit: u64) -> u64 {
        let (marked, mut end) = (self.is_marked(offset), offset);
        while end < limit && self.is_marked(end) == marked {
            end += self.piece - (end - self.range.start) % self.piece;
        }
        end.min(limit)
    }

    /// The runs of marked pieces, ascending.
    pub(super) fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        let mut next = self.range.start;
        std::iter::from_fn(move || {
            let start = self.first_marked(next)?;
            next = self.same_until(start, self.range.end);
            Some(start..next)
        })
    }

    /// Marks what another one of the same pieces has marked.
    pub(super) fn mark_as(&mut self, other: &Self) {
        let mut next = self.range.start.max(other.range.start);
        while next < self.range.end
            && let Some(start) = other.first_marked(next)
            && start < self.range.end
        {
            next = other.same_until(start, other.range.end);
            self.mark(start..next);
        }
    }

    /// The marks as text: the bits, packed, in hex.
    pub(super) fn to_text(&self) -> Option<String> {
        let bytes: Vec<u8> = self.bits.iter().flat_map(|word| word.to_le_bytes()).collect();
        let packed = zstd::bulk::compress(&bytes, PACKED_LEVEL).ok()?;
        Some(packed.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// The marks that [`to_text`](Self::to_text) made a text of, of the same range and pieces; `None` where they
    /// were of others.
    pub(super) fn from_text(text: &str, range: Range<u64>, piece: u64) -> Option<Self> {
        let mut pieces = Self::new(range, piece);
        let digits = text.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).ok());
        let packed = digits.map(|pair| u8::from_str_radix(pair?, 16).ok()).collect::<Option<Vec<u8>>>()?;
        let bytes = zstd::bulk::decompress(&packed, pieces.bits.len() * 8).ok()?;
        let (words, rest) = bytes.as_chunks::<8>();
        if words.len() != pieces.bits.len() || !rest.is_empty() {
            return None;
        }
        pieces.bits = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
        Some(pieces)
    }

    /// The start of the first marked piece from the one of `offset` on.
    fn first_marked(&self, offset: u64) -> Option<u64> {
        if offset >= self.range.end {
            return None;
        }
        let first = (offset - self.range.start) / self.piece;
        let mut mask = u64::MAX << (first % 64);
        for (index, bits) in self.bits.iter().enumerate().skip(word(first)) {
            let found = bits & mask;
            if found != 0 {
                let index = index as u64 * 64 + u64::from(found.trailing_zeros());
                return Some(self.range.start + index * self.piece).filter(|start| *start < self.range.end);
            }
            mask = u64::MAX;
        }
        None
    }

    /// The first part from `offset` on of whole `unit`s (bytes, a multiple of the piece, and so is the
    /// distance of their starts from this range's), at most `longest` bytes, each with a marked piece.
    pub(super) fn next_marked(&self, offset: u64, unit: u64, longest: u64) -> Option<Range<u64>> {
        let unit_of = |at: u64| at - (at - self.range.start) % unit;
        let start = unit_of(self.first_marked(offset)?);
        let mut end = start + unit;
        while end - start < longest
            && let Some(next) = self.first_marked(end)
            && unit_of(next) == end
        {
            end += unit;
        }
        Some(start..end.min(self.range.end))
    }

    /// Marks the pieces of objects that the object maps list between the snapshot `from` and the image's;
    /// from the beginning of time, those are the objects that exist. Looks at bytes of `range` only. Blocks.
    pub(super) fn listed(
        self,
        image: &Image,
        from: Option<&str>,
        range: Range<u64>,
    ) -> Result<Self, RbdError> {
        if range.is_empty() {
            return Ok(self);
        }
        image.diff(from, range, Granularity::Objects, false, self, |pieces, extent| {
            pieces.mark(extent.range());
        })
    }

    /// Marks up to `runs` times `length` pieces that are not marked in `listed` and lie before `end`: others
    /// each time.
    pub(super) fn mark_some_besides(&mut self, listed: &Self, end: u64, runs: u64, length: u64) {
        let length_in_bytes = end.min(self.range.end).saturating_sub(self.range.start);
        let count = length_in_bytes.div_ceil(self.piece);
        if count == 0 {
            return;
        }
        for _ in 0..runs {
            let first = random() % count;
            for index in first..count.min(first + length) {
                let start = self.range.start + index * self.piece;
                if !listed.is_marked(start) {
                    self.mark(start..start + 1);
                }
            }
        }
    }
}

fn word(index: u64) -> usize {
    usize::try_from(index / 64).expect("a part is short")
}

/// Any number: the keys of a hash map are random, and others each time.
fn random() -> u64 {
    RandomState::new().hash_one(0)
}

/// A digest of what a map lists, part by part. However the image is divided, one content has one digest.
#[derive(Clone, Debug, Default)]
pub(super) struct MapDigest {
    hasher: blake3::Hasher,
    /// The last run, which may go on in the next part.
    last: Option<Range<u64>>,
}

impl MapDigest {
    /// Adds the marks of the next part.
    pub(super) fn add(&mut self, pieces: &Pieces) {
        for run in pieces.runs() {
            match &mut self.last {
                Some(last) if last.end == run.start => last.end = run.end,
                last => {
                    let done = last.replace(run);
                    self.put(done);
                }
            }
        }
    }

    fn put(&mut self, run: Option<Range<u64>>) {
        if let Some(run) = run {
            self.hasher.update(&run.start.to_le_bytes());
            self.hasher.update(&run.end.to_le_bytes());
        }
    }

    /// In hex.
    pub(super) fn finish(mut self) -> String {
        let last = self.last.take();
        self.put(last);
        self.hasher.finalize().to_hex().to_string()
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "lists of one range")]
mod tests {
    use super::*;

    #[test]
    fn parts_with_marked_pieces_are_given_in_whole_units() {
        let mut pieces = Pieces::new(1000..2000, 10);
        assert_eq!(pieces.next_marked(1000, 10, 100), None);
        pieces.mark(0..1001);
        pieces.mark(1095..1101);
        pieces.mark(1990..u64::MAX);
        assert_eq!(pieces.next_marked(1000, 10, 100), Some(1000..1010));
        assert_eq!(pieces.next_marked(1010, 10, 100), Some(1090..1110));
        assert_eq!(pieces.next_marked(1010, 10, 10), Some(1090..1100));
        assert_eq!(pieces.next_marked(1110, 10, 100), Some(1990..2000));
        assert_eq!(pieces.next_marked(2000, 10, 100), None);
        assert_eq!(pieces.next_marked(1010, 50, 100), Some(1050..1150));
        assert_eq!(pieces.marked(), 4);
    }

    #[test]
    fn the_last_piece_may_be_ragged() {
        let mut pieces = Pieces::new(0..1001, 10);
        pieces.mark(1000..1001);
        assert_eq!(pieces.next_marked(0, 10, 100), Some(1000..1001));
        assert_eq!(pieces.runs().collect::<Vec<_>>(), [1000..1001]);
    }

    #[test]
    fn runs_and_stretches_end_where_marks_change() {
        let mut pieces = Pieces::new(0..10_000, 10);
        pieces.mark(630..660);
        pieces.mark(1280..1290);
        assert_eq!(pieces.runs().collect::<Vec<_>>(), [630..660, 1280..1290]);
        assert_eq!(pieces.same_until(0, 10_000), 630);
        assert_eq!(pieces.same_until(5, 600), 600);
        assert_eq!(pieces.same_until(635, 10_000), 660);
    }

    #[test]
    fn one_map_has_one_digest_however_it_is_divided() {
        let digest = |parts: &[Range<u64>], marked: &[Range<u64>]| {
            let mut digest = MapDigest::default();
            for part in parts {
                let mut pieces = Pieces::new(part.clone(), 10);
                marked.iter().for_each(|range| pieces.mark(range.clone()));
                digest.add(&pieces);
            }
            digest.finish()
        };
        let whole = digest(&[0..1000], &[90..130, 500..510]);
        assert_eq!(whole, digest(&[0..100, 100..500, 500..1000], &[90..130, 500..510]));
        assert_ne!(whole, digest(&[0..1000], &[90..140, 500..510]));
        assert_ne!(whole, digest(&[0..1000], &[90..130]));
    }

    #[test]
    fn marks_survive_as_text_and_are_taken_over() {
        let mut pieces = Pieces::new(0..100_000, 10);
        pieces.mark(90..130);
        pieces.mark(5000..5010);
        pieces.mark(99_990..100_000);
        let text = pieces.to_text().unwrap();
        let again = Pieces::from_text(&text, 0..100_000, 10).unwrap();
        assert_eq!(again.runs().collect::<Vec<_>>(), [90..130, 5000..5010, 99_990..100_000]);
        let mut part = Pieces::new(100..5000, 10);
        part.mark_as(&again);
        assert_eq!(part.runs().collect::<Vec<_>>(), [100..130]);
        for wrong in ["", "zz", "28b52ffd", &text[..text.len() - 2]] {
            assert!(Pieces::from_text(wrong, 0..100_000, 10).is_none(), "{wrong}");
        }
        assert!(Pieces::from_text(&text, 0..1000, 10).is_none());
    }

    #[test]
    fn some_that_are_not_listed_are_drawn_and_no_others() {
        let mut listed = Pieces::new(0..64_000, 1);
        listed.mark(0..63_000);
        let mut all = Pieces::new(0..64_000, 1);
        for _ in 0..200 {
            let mut drawn = Pieces::new(0..64_000, 1);
            drawn.mark_some_besides(&listed, 63_900, 64, 32);
            assert!(drawn.marked() <= 64 * 32);
            assert!(drawn.runs().all(|run| run.start >= 63_000 && run.end <= 63_900));
            all.mark_each(&drawn, &listed, |drawn, _| drawn);
        }
        assert!(all.marked() > 600, "{} of 900 were drawn in all", all.marked());
    }
}

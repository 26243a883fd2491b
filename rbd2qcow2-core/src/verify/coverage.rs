//! Whether a layer holds what its digests say: no less and no more.

use std::ops::Range;

use crate::chain::digests::{Content, DigestRecord};
use crate::qcow2::layer::Piece;

/// How a range of a layer differs from what the digests say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Difference {
    /// The digests have it, the layer does not.
    Missing,
    /// The layer has it, the digests do not.
    Extra,
    /// Zeroes by the digests, and data by the layer.
    NotZero,
}

/// Compares pieces with records, both ascending, as they come.
pub(super) struct Coverage<R: Iterator<Item = DigestRecord>> {
    records: std::iter::Peekable<R>,
}

impl<R: Iterator<Item = DigestRecord>> Coverage<R> {
    pub(super) fn new(records: R) -> Self {
        Self { records: records.peekable() }
    }

    /// Takes the next piece of the layer, which begins where the last one ended.
    pub(super) fn piece(
        &mut self,
        range: Range<u64>,
        piece: Piece,
        tell: &mut impl FnMut(Difference, Range<u64>),
    ) {
        let mut at = range.start;
        while at < range.end {
            let Some(record) = self.records.peek() else {
                return Self::uncovered(at..range.end, piece, tell);
            };
            if record.offset > at {
                let end = record.offset.min(range.end);
                Self::uncovered(at..end, piece, tell);
                at = end;
                continue;
            }
            let end = record.end().min(range.end);
            match (piece, record.content) {
                (Piece::Absent, _) => tell(Difference::Missing, at..end),
                (Piece::Data | Piece::Compressed, Content::Zero) => tell(Difference::NotZero, at..end),
                // The hash tells.
                (_, Content::Data(_)) | (Piece::Zero, Content::Zero) => {}
            }
            if record.end() <= range.end {
                self.records.next();
            }
            at = end;
        }
    }

    /// Leaves out everything before `end`, of which the layer cannot be asked.
    pub(super) fn skip(&mut self, end: u64) {
        while self.records.next_if(|record| record.end() <= end).is_some() {}
    }

    fn uncovered(range: Range<u64>, piece: Piece, tell: &mut impl FnMut(Difference, Range<u64>)) {
        if piece != Piece::Absent && !range.is_empty() {
            tell(Difference::Extra, range);
        }
    }

    /// Tells of what lies behind the layer's end.
    pub(super) fn finish(self, size: u64, tell: &mut impl FnMut(Difference, Range<u64>)) {
        for record in self.records {
            tell(Difference::Missing, record.offset.max(size)..record.end());
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PIECES: [Piece; 4] = [Piece::Absent, Piece::Zero, Piece::Data, Piece::Compressed];

    /// Runs of numbers below 4, as ranges.
    fn runs(lengths: &[(u8, u64)]) -> Vec<(Range<u64>, u8)> {
        let mut at = 0;
        let run = |&(kind, length): &(u8, u64)| {
            at += length;
            (at - length..at, kind)
        };
        lengths.iter().map(run).collect()
    }

    proptest! {
        #[test]
        fn differences_are_those_of_single_bytes(
            pieces in prop::collection::vec((0_u8..4, 1_u64..9), 1..12),
            records in prop::collection::vec((0_u8..3, 1_u64..9), 0..12)
        ) {
            let (pieces, records) = (runs(&pieces), runs(&records));
            let size = pieces.last().map_or(0, |(range, _)| range.end);
            let mut expected = Vec::new();
            for at in 0..100 {
                let kind_at = |runs: &[(Range<u64>, u8)]| runs.iter().find(|(range, _)| range.contains(&at)).map(|(_, kind)| *kind);
                let piece = kind_at(&pieces).map_or(Piece::Absent, |kind| PIECES[usize::from(kind)]);
                match (piece, kind_at(&records).unwrap_or(0)) {
                    (Piece::Absent, 0) => {}
                    (Piece::Absent, _) => expected.push((at, Difference::Missing)),
                    (_, 0) => expected.push((at, Difference::Extra)),
                    (Piece::Data | Piece::Compressed, 1) => expected.push((at, Difference::NotZero)),
                    _ => {}
                }
            }
            let hash = blake3::hash(b"");
            let records = records.into_iter().filter(|(_, kind)| *kind > 0).map(|(range, kind)| DigestRecord {
                offset: range.start,
                length: range.end - range.start,
                content: if kind == 1 { Content::Zero } else { Content::Data(hash) },
            });
            let mut found = Vec::new();
            let mut tell = |difference, range: Range<u64>| found.extend(range.map(|at| (at, difference)));
            let mut coverage = Coverage::new(records);
            for (range, kind) in pieces {
                coverage.piece(range, PIECES[usize::from(kind)], &mut tell);
            }
            coverage.finish(size, &mut tell);
            prop_assert_eq!(found, expected);
        }
    }
}

//! What a patch means for each cluster. Pure.

use std::ops::Range;

use super::NativeError;
use crate::extent::{Extent, ExtentKind};
use crate::qcow2::table::{SUBCLUSTERS, SubclusterKind, Subclusters};

/// What changed in a cluster, or in several alike. Clusters go by their numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Changed {
    /// All of these clusters, to zeroes.
    Zeroes(Range<u64>),
    /// All of a cluster, as far as the image goes, and to data.
    Whole(u64),
    /// Parts of a cluster, or all of it but not all to the same.
    Parts(u64, Subclusters),
}

/// The shape of a layer, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) grain: u64,
    pub(super) cluster_size: u64,
    pub(super) virtual_size: u64,
}

impl Shape {
    /// The bytes of clusters, as far as the image goes.
    pub(super) fn range(&self, clusters: Range<u64>) -> Range<u64> {
        clusters.start * self.cluster_size..(clusters.end * self.cluster_size).min(self.virtual_size)
    }

    /// What changed in each cluster that the pieces of a patch touch, ascending.
    ///
    /// # Errors
    /// [`NativeError::BadPiece`].
    pub(super) fn clusters(&self, pieces: &[Extent]) -> Result<Vec<Changed>, NativeError> {
        let mut changes = Vec::new();
        let mut end = 0;
        for piece in pieces {
            self.check(piece, end)?;
            end = piece.end();
            let mut start = piece.offset;
            while start < end {
                let cluster = start / self.cluster_size;
                let whole = self.range(cluster..cluster + 1);
                let stop = end.min(whole.end);
                match piece.kind {
                    _ if (start, stop) != (whole.start, whole.end) => {
                        self.add_part(&mut changes, cluster, start..stop, piece.kind);
                        start = stop;
                    }
                    ExtentKind::Data => {
                        changes.push(Changed::Whole(cluster));
                        start = stop;
                    }
                    ExtentKind::Zero => {
                        // All whole clusters at once: there may be very many.
                        let last = if end == self.virtual_size {
                            end.div_ceil(self.cluster_size)
                        } else {
                            end / self.cluster_size
                        };
                        changes.push(Changed::Zeroes(cluster..last));
                        start = self.range(cluster..last).end;
                    }
                }
            }
        }
        Ok(changes)
    }

    /// Adds a part of a cluster to what is known of it already.
    fn add_part(&self, changes: &mut Vec<Changed>, cluster: u64, range: Range<u64>, kind: ExtentKind) {
        let start = cluster * self.cluster_size;
        let (first, last) = ((range.start - start) / self.grain, (range.end - start).div_ceil(self.grain));
        let parts = match changes.last_mut() {
            Some(Changed::Parts(last, parts)) if *last == cluster => parts,
            _ => {
                changes.push(Changed::Parts(cluster, Subclusters::default()));
                let Some(Changed::Parts(_, parts)) = changes.last_mut() else { return };
                parts
            }
        };
        let kind = match kind {
            ExtentKind::Data => SubclusterKind::Data,
            ExtentKind::Zero => SubclusterKind::Zero,
        };
        for index in first..last {
            parts.set(index, kind);
        }
    }

    fn check(&self, piece: &Extent, end: u64) -> Result<(), NativeError> {
        let Shape { grain, virtual_size, .. } = *self;
        let whole = piece.offset.is_multiple_of(grain)
            && piece
                .offset
                .checked_add(piece.length)
                .is_some_and(|end| end <= virtual_size && (end.is_multiple_of(grain) || end == virtual_size));
        if whole && piece.length > 0 && piece.offset >= end {
            return Ok(());
        }
        Err(NativeError::BadPiece { piece: *piece, grain, virtual_size })
    }
}

/// What the layer holds of a patch in the end: ascending, and no two neighbours alike.
#[derive(Debug)]
pub(super) struct Held {
    shape: Shape,
    pub(super) extents: Vec<Extent>,
}

impl Held {
    pub(super) fn new(shape: Shape) -> Self {
        Self { shape, extents: Vec::new() }
    }

    pub(super) fn clusters(&mut self, clusters: Range<u64>, kind: ExtentKind) {
        self.push(self.shape.range(clusters), kind);
    }

    pub(super) fn parts(&mut self, cluster: u64, parts: Subclusters) {
        let whole = self.shape.range(cluster..cluster + 1);
        for (run, kind) in parts.runs() {
            let kind = match kind {
                SubclusterKind::Data => ExtentKind::Data,
                SubclusterKind::Zero => ExtentKind::Zero,
                SubclusterKind::Absent => continue,
            };
            let range = whole.start + run.start * self.shape.grain..whole.start + run.end * self.shape.grain;
            self.push(range.start..range.end.min(whole.end), kind);
        }
    }

    fn push(&mut self, range: Range<u64>, kind: ExtentKind) {
        match self.extents.last_mut() {
            Some(last) if last.end() == range.start && last.kind == kind => {
                last.length = range.end - last.offset
            }
            _ => self.extents.extend(Extent::new(range, kind)),
        }
    }
}

const _: () = assert!(SUBCLUSTERS == 32, "a bitmap has a bit for each");

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What each grain is, as extents: whole runs, or cut up.
    fn pieces(grains: &[Option<ExtentKind>], shape: Shape, cuts: u64) -> Vec<Extent> {
        let mut pieces: Vec<Extent> = Vec::new();
        for (index, kind) in (0..).zip(grains) {
            let start = index * shape.grain;
            let range = start..(start + shape.grain).min(shape.virtual_size);
            let Some(piece) = kind.and_then(|kind| Extent::new(range, kind)) else { continue };
            match pieces.last_mut() {
                Some(last) if last.end() == start && last.kind == piece.kind && index % cuts != 0 => {
                    last.length += piece.length;
                }
                _ => pieces.push(piece),
            }
        }
        pieces
    }

    fn kind() -> impl Strategy<Value = Option<ExtentKind>> {
        prop_oneof![Just(None), Just(Some(ExtentKind::Data)), Just(Some(ExtentKind::Zero))]
    }

    fn grains() -> impl Strategy<Value = Vec<Option<ExtentKind>>> {
        let run = (kind(), prop_oneof![3 => 1_usize..8, 1 => 1_usize..100]);
        prop::collection::vec(run, 1..16)
            .prop_map(|runs| runs.into_iter().flat_map(|(kind, length)| vec![kind; length]).collect())
    }

    fn to_extent(kind: SubclusterKind) -> Option<ExtentKind> {
        match kind {
            SubclusterKind::Data => Some(ExtentKind::Data),
            SubclusterKind::Zero => Some(ExtentKind::Zero),
            SubclusterKind::Absent => None,
        }
    }

    proptest! {
        #[test]
        fn clusters_say_what_the_pieces_say(
            grains in grains(), ragged in 1_u64..=8, extended in any::<bool>(), cuts in 2_u64..40
        ) {
            // Of 4 KiB grains, the last one short by some sectors.
            let virtual_size = (grains.len() as u64) * 4096 - 4096 + ragged * 512;
            let cluster_size = if extended { 32 * 4096 } else { 4096 };
            let shape = Shape { grain: 4096, cluster_size, virtual_size };
            // Pieces that are cut in a cluster are allowed too.
            let changed = pieces(&grains, shape, cuts);
            let mut found = vec![None; grains.len()];
            let mut held = Held::new(shape);
            let mut end = 0;
            for changed in shape.clusters(&changed).unwrap() {
                let mut put = |range: Range<u64>, kind| {
                    for grain in range.start / 4096..range.end.div_ceil(4096) {
                        let index = usize::try_from(grain).unwrap();
                        assert!(found[index].is_none(), "grain {index} is said twice");
                        found[index] = kind;
                    }
                };
                let clusters = match changed {
                    Changed::Zeroes(clusters) => {
                        put(shape.range(clusters.clone()), Some(ExtentKind::Zero));
                        held.clusters(clusters.clone(), ExtentKind::Zero);
                        clusters
                    }
                    Changed::Whole(cluster) => {
                        put(shape.range(cluster..cluster + 1), Some(ExtentKind::Data));
                        held.clusters(cluster..cluster + 1, ExtentKind::Data);
                        cluster..cluster + 1
                    }
                    Changed::Parts(cluster, parts) => {
                        let whole = shape.range(cluster..cluster + 1);
                        for (run, kind) in parts.runs() {
                            let range = whole.start + run.start * 4096..whole.start + run.end * 4096;
                            if kind != SubclusterKind::Absent {
                                put(range.start..range.end.min(whole.end), to_extent(kind));
                            }
                        }
                        held.parts(cluster, parts);
                        cluster..cluster + 1
                    }
                };
                prop_assert!(clusters.start >= end && !clusters.is_empty(), "each cluster comes once, in order");
                end = clusters.end;
            }
            prop_assert_eq!(&found, &grains);
            prop_assert_eq!(held.extents, pieces(&grains, shape, u64::MAX));
        }
    }

    #[test]
    fn pieces_that_are_no_grains_are_refused() {
        let shape = Shape { grain: 4096, cluster_size: 32 * 4096, virtual_size: 40 * 4096 + 512 };
        let piece = |offset, length| Extent { offset, length, kind: ExtentKind::Data };
        assert!(shape.clusters(&[piece(40 * 4096, 512),]).is_ok());
        for bad in [
            vec![piece(512, 4096)],
            vec![piece(0, 512)],
            vec![piece(0, 0)],
            vec![piece(40 * 4096, 4096)],
            vec![piece(u64::MAX - 4095, 4096)],
            vec![piece(4096, 4096), piece(0, 4096)],
            vec![piece(0, 8192), piece(4096, 4096)],
        ] {
            let error = shape.clusters(&bad).expect_err("bad");
            assert!(matches!(error, NativeError::BadPiece { .. }), "{error}");
        }
    }
}

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

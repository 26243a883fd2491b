//! The walk through the tables.

use std::ops::Range;

use super::{
    CompressedCluster, Geometry, GuestOffset, HostOffset, L2Entry, LayerReader, Page, Piece, ReadError,
};
use crate::qcow2::table::{L1Entry, SUBCLUSTERS, SubclusterKind};

/// What stands in the tables of a range that lies within one cluster, or is absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Held {
    /// Data: where the range's first byte lies in the file.
    Data(HostOffset),
    /// Zeroes.
    Zero,
    /// The range's cluster.
    Compressed(CompressedCluster),
    /// Not in this layer.
    Absent,
}

impl Held {
    pub(super) fn piece(self) -> Piece {
        match self {
            Self::Data(_) => Piece::Data,
            Self::Zero => Piece::Zero,
            Self::Compressed(_) => Piece::Compressed,
            Self::Absent => Piece::Absent,
        }
    }
}

/// Walks a range of the guest's image, which lies within it, entry by entry.
///
/// Ends for every content of the tables: each step moves on, and tables are two levels deep.
#[derive(Debug)]
pub(super) struct Segments<'a> {
    layer: &'a LayerReader,
    /// What is still to be told.
    rest: Range<u64>,
    /// The L2 table in use, by its index in the L1 table.
    table: Option<(u64, HostOffset)>,
    /// The page of a table in use, so that the cache is asked once a page.
    page: Option<Page>,
}

impl<'a> Segments<'a> {
    pub(super) fn new(layer: &'a LayerReader, range: Range<u64>) -> Self {
        Self { layer, rest: range, table: None, page: None }
    }

    pub(super) fn release_page(&mut self) {
        self.page = None;
    }

    /// What stands at the start of the rest, and where that ends.
    fn step(&mut self) -> Result<(u64, Held), ReadError> {
        let geometry = &self.layer.geometry;
        let offset = self.rest.start;
        let coverage = geometry.l2_coverage();
        let Some(table) = self.l2_table(offset / coverage)? else {
            return Ok(((offset / coverage + 1) * coverage, Held::Absent));
        };
        let cluster_size = geometry.cluster_size();
        let start = offset - offset % cluster_size;
        let whole = start + cluster_size;
        Ok(match self.l2_entry(table, start)? {
            L2Entry::Absent => (whole, Held::Absent),
            L2Entry::Zero => (whole, Held::Zero),
            L2Entry::Data(host) => (whole, Held::Data(HostOffset(host.0 + (offset - start)))),
            L2Entry::Compressed(cluster) => (whole, Held::Compressed(cluster)),
            L2Entry::Subclusters(host, subclusters) => {
                let size = cluster_size / SUBCLUSTERS;
                let first = (offset - start) / size;
                let kind = subclusters.kind(first);
                // All that are alike at once: one read for neighbouring data.
                let alike = (first..SUBCLUSTERS).take_while(|&index| subclusters.kind(index) == kind);
                let end = start + (first + alike.count() as u64) * size;
                let held = match kind {
                    SubclusterKind::Data => Held::Data(HostOffset(host.0 + (offset - start))),
                    SubclusterKind::Zero => Held::Zero,
                    SubclusterKind::Absent => Held::Absent,
                };
                (end, held)
            }
        })
    }

    /// The L2 table that the L1 table's entry `index` names.
    fn l2_table(&mut self, index: u64) -> Result<Option<HostOffset>, ReadError> {
        if let Some((known, table)) = self.table
            && known == index
        {
            return Ok(Some(table));
        }
        let layer = self.layer;
        // The header was checked to have an entry for every byte of the image.
        let raw = self.number(HostOffset(layer.header.l1_table.offset + index * 8))?;
        let entry = L1Entry::new(raw, &layer.geometry).map_err(|fault| ReadError::L1Entry {
            path: layer.path.clone(),
            index,
            guest: GuestOffset(index * layer.geometry.l2_coverage()),
            fault,
        })?;
        self.table = entry.table.map(|table| (index, table));
        Ok(entry.table)
    }

    /// The entry of `table` for the cluster that begins at `start`.
    fn l2_entry(&mut self, table: HostOffset, start: u64) -> Result<L2Entry, ReadError> {
        let layer = self.layer;
        let geometry: &Geometry = &layer.geometry;
        let entry_bytes = geometry.l2_entry_bytes();
        let index = start % geometry.l2_coverage() / geometry.cluster_size();
        let host = HostOffset(table.0 + index * entry_bytes);
        let raw = self.number(host)?;
        let bitmap = if geometry.extended_l2 { self.number(HostOffset(host.0 + 8))? } else { 0 };
        L2Entry::new(raw, bitmap, geometry).map_err(|fault| ReadError::L2Entry {
            path: layer.path.clone(),
            table,
            index,
            guest: GuestOffset(start),
            fault,
        })
    }

    /// The number of 8 bytes at `host`, in a table that lies within the file.
    fn number(&mut self, host: HostOffset) -> Result<u64, ReadError> {
        if let Some(number) = self.page.as_ref().and_then(|page| page.number(host)) {
            return Ok(number);
        }
        let page = self.layer.page(host)?;
        let number = page.number(host).ok_or_else(|| self.layer.shrunk(host))?;
        self.page = Some(page);
        Ok(number)
    }
}

impl Iterator for Segments<'_> {
    type Item = Result<(Range<u64>, Held), ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        Some(self.step().map(|(end, held)| {
            let start = std::mem::replace(&mut self.rest.start, end.min(self.rest.end));
            (start..self.rest.start, held)
        }))
    }
}

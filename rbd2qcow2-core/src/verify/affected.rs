//! Which points show what is damaged in a layer below.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::{FINDINGS_KEPT, Finding, VerifyError};
use crate::chain::{Catalogue, Point, PointName};
use crate::files::Shortage;
use crate::qcow2::layer::{LayerReader, Piece};

/// Follows the damage in each layer upwards, as far as newer layers do not hold the range themselves.
/// Only `points` are looked at.
///
/// # Errors
/// [`VerifyError::TooManyFiles`].
pub(super) fn affected(
    catalogue: &Catalogue,
    points: &BTreeSet<PointName>,
    damage: BTreeMap<PointName, Vec<Range<u64>>>,
) -> Result<BTreeMap<PointName, Vec<Finding>>, VerifyError> {
    let mut findings: BTreeMap<PointName, Vec<Finding>> = BTreeMap::new();
    for (from, ranges) in damage.into_iter().filter(|(_, ranges)| !ranges.is_empty()) {
        let mut shown = vec![(from, ranges)];
        while let Some((below, ranges)) = shown.pop() {
            let layers = catalogue.points().iter().chain(catalogue.bases());
            let children = layers.filter(|child| child.below() == Some(below));
            for child in children.filter(|child| points.contains(&child.name)) {
                let ranges = shown_by(child, &ranges)?;
                if ranges.is_empty() {
                    continue;
                }
                let found = findings.entry(child.name).or_default();
                let room = FINDINGS_KEPT.saturating_sub(found.len());
                found.extend(
                    ranges.iter().take(room).map(|range| Finding::Inherited { from, range: range.clone() }),
                );
                shown.push((child.name, ranges));
            }
        }
    }
    Ok(findings)
}

/// What of `ranges` a point shows of the layers below its own.
fn shown_by(point: &Point, ranges: &[Range<u64>]) -> Result<Vec<Range<u64>>, VerifyError> {
    match LayerReader::open(&point.path) {
        Ok(layer) => Ok(ranges.iter().flat_map(|range| seen_through(&layer, range)).collect()),
        // It shows nothing; its point is damaged on its own account.
        Err(cause) => {
            Shortage::of(&cause).map_or(Ok(Vec::new()), |cause| Err(VerifyError::TooManyFiles(cause)))
        }
    }
}

/// What of a range is seen through a layer.
pub(super) fn seen_through(layer: &LayerReader, range: &Range<u64>) -> Vec<Range<u64>> {
    let range = range.start..range.end.min(layer.virtual_size());
    if range.is_empty() {
        return Vec::new();
    }
    let Ok(pieces) = layer.map(range) else { return Vec::new() };
    let absent = pieces.map_while(Result::ok).filter(|(_, piece)| *piece == Piece::Absent);
    absent.map(|(range, _)| range).collect()
}

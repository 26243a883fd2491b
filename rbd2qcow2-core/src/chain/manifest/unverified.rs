//! The points whose data nobody has verified, as a manifest tells them.

use std::collections::BTreeSet;

use super::{ManifestError, parse_point, wrong};
use crate::chain::names::PointName;

/// The points without digests that `point` has taken over.
///
/// # Errors
/// [`ManifestError::Value`].
pub(super) fn parse_unverified(
    names: &[String],
    point: PointName,
) -> Result<BTreeSet<PointName>, ManifestError> {
    let mut found = BTreeSet::new();
    for text in names {
        let name = parse_point("unverified", text)?;
        // One set has one spelling.
        if name >= point || found.last().is_some_and(|last| *last >= name) {
            return Err(wrong("unverified", text, "older than the point, and in order"));
        }
        found.insert(name);
    }
    Ok(found)
}

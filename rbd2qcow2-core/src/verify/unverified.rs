//! Why it is not known whether data are what was backed up.

use std::collections::BTreeSet;

use super::Verdict;
use crate::chain::{Catalogue, PointName};

/// How many points a reason names at most. The rest is counted.
const NAMED: usize = 8;

/// A layer with data that cannot be held against what was backed up.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unverified {
    /// It has no digests: its point is one of the Python tool, or they are lost.
    NoDigests {
        /// Its point.
        point: PointName,
    },
    /// Its point has taken over data that had none. Its digests tell that these have not changed since, no
    /// more.
    TakenOver {
        /// Its point.
        point: PointName,
        /// Whose data, the oldest first; at least one.
        from: Vec<PointName>,
    },
    /// Its point's manifest is lost, which alone would tell whether it has taken over such data.
    NoManifest {
        /// Its point.
        point: PointName,
    },
}

/// What of a layer is not known to be what was backed up, if anything.
pub(super) fn of(catalogue: &Catalogue, name: PointName, verdict: &Verdict) -> Option<Unverified> {
    if !verdict.verifiable {
        return Some(Unverified::NoDigests { point: name });
    }
    // A base has no manifest any more: that of the point above tells what it took over.
    match &catalogue.point(name)?.manifest {
        None => Some(Unverified::NoManifest { point: name }),
        Some(manifest) if manifest.unverified.is_empty() => None,
        Some(manifest) => {
            Some(Unverified::TakenOver { point: name, from: manifest.unverified.iter().copied().collect() })
        }
    }
}

/// Says in words, and by the points' names, why nobody can tell whether data are what was backed up. Empty
/// where there is no reason.
#[must_use]
pub fn reason(unverified: &[Unverified]) -> String {
    let (mut without_digests, mut without_manifest, mut takers) = (Vec::new(), Vec::new(), Vec::new());
    let mut taken = BTreeSet::new();
    for gap in unverified {
        match gap {
            Unverified::NoDigests { point } => without_digests.push(*point),
            Unverified::NoManifest { point } => without_manifest.push(*point),
            Unverified::TakenOver { point, from } => {
                takers.push(*point);
                taken.extend(from.iter().copied());
            }
        }
    }
    let taken: Vec<_> = taken.into_iter().collect();
    let mut parts = Vec::new();
    if !without_digests.is_empty() {
        parts.push(format!("there are no digests of {}", listed(&without_digests)));
    }
    if !takers.is_empty() {
        let (takers, taken) = (listed(&takers), listed(&taken));
        parts.push(format!("{takers} took over data of {taken}, which never had digests"));
    }
    if !without_manifest.is_empty() {
        let names = listed(&without_manifest);
        parts.push(format!("without a manifest it is not known whose data {names} took over"));
    }
    parts.join(", and ")
}

/// Names, as a sentence lists them: `a, b and c`, or `a, b and 17 more`.
fn listed(names: &[PointName]) -> String {
    let (head, last) = match names {
        [] => return String::new(),
        [only] => return only.to_string(),
        [head @ .., last] if names.len() <= NAMED => (head, last.to_string()),
        _ => (&names[..NAMED - 1], format!("{} more", names.len() - (NAMED - 1))),
    };
    let head: Vec<_> = head.iter().map(ToString::to_string).collect();
    format!("{} and {last}", head.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(text: &str) -> PointName {
        PointName::parse(text).expect("a point")
    }

    #[test]
    fn a_reason_names_the_points() {
        assert_eq!(reason(&[]), "");
        let old = ["1795368792", "1795368999"].map(|name| Unverified::NoDigests { point: point(name) });
        assert_eq!(reason(&old[..1]), "there are no digests of 1795368792");
        assert_eq!(reason(&old), "there are no digests of 1795368792 and 1795368999");
        let from = (1_795_368_001..1_795_368_010).map(|second| point(&format!("{second}"))).collect();
        let taken = Unverified::TakenOver { point: point("20261123T173307Z"), from };
        assert_eq!(
            reason(&[old[0].clone(), taken]),
            "there are no digests of 1795368792, and 20261123T173307Z took over data of 1795368001, \
             1795368002, 1795368003, 1795368004, 1795368005, 1795368006, 1795368007 and 2 more, which never had digests"
        );
        let lost = Unverified::NoManifest { point: point("20261123T173307Z") };
        assert_eq!(
            reason(&[lost]),
            "without a manifest it is not known whose data 20261123T173307Z took over"
        );
    }
}

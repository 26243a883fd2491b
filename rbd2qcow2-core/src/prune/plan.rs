//! What is to be done so that only some points of an image stay: decided, not yet done.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::policy::Policy;
use super::reason::Reason;
use crate::chain::{Catalogue, ImageName, Point, PointName, Problem};

/// Which points are to go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// All that these rules do not keep. `None` keeps all but the named ones.
    pub policy: Option<Policy>,
    /// These, whatever the rules say. The rules do not see them.
    pub points: BTreeSet<PointName>,
}

/// Why nothing can be planned for an image. It stays as it is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// A policy without any rule would keep nothing.
    #[error("no rule tells which points to keep")]
    NoRule,
    /// A point is to be removed that the image does not have.
    #[error("image {:?} has no point {point}", image.as_str())]
    UnknownPoint {
        /// The image.
        image: ImageName,
        /// The point.
        point: PointName,
        /// The points that it has, the oldest first.
        known: Vec<PointName>,
    },
    /// The newest point is to be removed.
    #[error("point {point} of image {:?} is its newest, which the next backup builds upon: it stays", image.as_str())]
    Newest {
        /// The image.
        image: ImageName,
        /// The point.
        point: PointName,
    },
    /// A point is to be removed that somebody holds.
    #[error("point {point} of image {:?} is held ({reason:?}): it stays until it is released", image.as_str())]
    Held {
        /// The image.
        image: ImageName,
        /// The point.
        point: PointName,
        /// Why it is held.
        reason: String,
    },
    /// A file is missing, damaged, or not what it should be. What could still be saved of the points
    /// must not be lost, nor could a hold be read in a damaged manifest.
    #[error(
        "image {:?} is not as it should be, so nothing of it is pruned; bring the file back, or move away what \
         cannot be saved",
        image.as_str()
    )]
    Broken {
        /// The image.
        image: ImageName,
        /// What is wrong, and with which file.
        #[source]
        cause: Box<Problem>,
    },
}

/// What becomes of a point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// It stays.
    Keep,
    /// It goes.
    Remove {
        /// The points whose layers take over what it held, the oldest first: the next that stays, or
        /// several where several build upon it. None where no point that stays needs it.
        merged_into: Vec<PointName>,
    },
}

/// What becomes of a point, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The point.
    pub point: PointName,
    /// What becomes of it.
    pub action: Action,
    /// Why; at least one reason.
    pub reasons: Vec<Reason>,
}

/// A layer that is to take over what points below it hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merge {
    /// The point, which stays.
    pub child: PointName,
    /// The points between it and its new parent, the newest first; at least one.
    pub removed: Vec<PointName>,
    /// The point that it builds upon afterwards; `None` if it then stands alone.
    pub parent: Option<PointName>,
}

/// What is to be done for one image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Plan {
    /// All points, the oldest first.
    pub decisions: Vec<Decision>,
    /// The layers to be made anew, the oldest first. Each removed point whose content is still needed is
    /// in the merges of all points that stay and need it.
    pub merges: Vec<Merge>,
    /// The removed points that no point builds upon that stays: their files only need to be deleted,
    /// in this order, the newest first. A point that is merged, too, may be below some of them.
    pub removals: Vec<PointName>,
    /// What deleting frees at least, in bytes on disk: a merged layer may be as large as all its parts. When
    /// the plan was carried out, what was freed.
    pub freed_at_least: u64,
    /// What it frees at most: the layers of all points that go. When the plan was carried out, what was freed.
    pub freed_at_most: u64,
}

impl Plan {
    /// Plans for the image of `catalogue`. Reads no files, and blocks on nothing.
    ///
    /// The rules count all points, to whatever chain they belong. Their periods are those of `zone`. What
    /// lies after `now` is a mistake of some clock.
    ///
    /// # Errors
    /// All of [`PlanError`].
    pub fn new(
        catalogue: &Catalogue,
        wanted: &Wanted,
        zone: &TimeZone,
        now: Timestamp,
    ) -> Result<Self, PlanError> {
        check_whole(catalogue)?;
        for &name in &wanted.points {
            check_removable(catalogue, name)?;
        }
        let reasons = reasons(catalogue, wanted, zone, now)?;
        let points = catalogue.points();
        let kept: BTreeSet<_> =
            reasons.iter().filter(|(_, why)| !why.is_empty()).map(|(name, _)| *name).collect();
        let links: Vec<_> = points.iter().map(|point| (point.name, point.parent)).collect();
        let (merges, removals) = work(&links, &kept);
        let decisions = reasons.into_iter().map(|(point, reasons)| {
            if !reasons.is_empty() {
                return Decision { point, action: Action::Keep, reasons };
            }
            let into = merges.iter().filter(|merge| merge.removed.contains(&point)).map(|merge| merge.child);
            let named = wanted.points.contains(&point);
            Decision {
                point,
                action: Action::Remove { merged_into: into.collect() },
                reasons: vec![if named { Reason::Named } else { Reason::NoRule }],
            }
        });
        let decisions = decisions.collect();
        let bytes = |name: &PointName| catalogue.point(*name).map_or(0, |point| point.layer_bytes);
        let freed_at_most = points.iter().map(|point| point.name).filter(|name| !kept.contains(name));
        let freed_at_most = freed_at_most.fold(0_u64, |sum, name| sum.saturating_add(bytes(&name)));
        let merged = merges.iter().flat_map(|merge| &merge.removed);
        let merged = merged.fold(0_u64, |sum, name| sum.saturating_add(bytes(name)));
        let freed_at_least = freed_at_most.saturating_sub(merged);
        Ok(Self { decisions, merges, removals, freed_at_least, freed_at_most })
    }

    /// Whether all points stay.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.merges.is_empty() && self.removals.is_empty()
    }

    /// How many points go.
    #[must_use]
    pub fn removed(&self) -> usize {
        self.decisions.iter().filter(|decision| decision.action != Action::Keep).count()
    }
}

/// Refuses an image of which anything might be lost for good.
fn check_whole(catalogue: &Catalogue) -> Result<(), PlanError> {
    let harmless = |problem: &Problem| {
        matches!(
            problem,
            Problem::Foreign { .. } | Problem::DigestsMissing { .. } | Problem::DigestsLength { .. }
        )
    };
    let broken = catalogue.problems().iter().find(|problem| !harmless(problem)).cloned();
    // Whatever is unsound has a problem; should that ever change, nothing is lost here.
    let unsound = || catalogue.points().iter().find_map(|point| catalogue.ancestry(point.name).err());
    match broken.or_else(unsound) {
        Some(cause) => Err(PlanError::Broken { image: catalogue.image().clone(), cause: cause.into() }),
        None => Ok(()),
    }
}

/// Refuses a point that is named although it must stay.
fn check_removable(catalogue: &Catalogue, name: PointName) -> Result<(), PlanError> {
    let image = catalogue.image().clone();
    let Some(point) = catalogue.point(name) else {
        let known = catalogue.points().iter().map(|point| point.name).collect();
        return Err(PlanError::UnknownPoint { image, point: name, known });
    };
    if let Some(reason) = held(point) {
        return Err(PlanError::Held { image, point: name, reason: reason.to_owned() });
    }
    if catalogue.newest().is_some_and(|newest| newest.name == name) {
        return Err(PlanError::Newest { image, point: name });
    }
    Ok(())
}

fn held(point: &Point) -> Option<&str> {
    Some(&point.manifest.as_ref()?.hold.as_ref()?.reason)
}

/// When a point was taken. Its name tells; but the names of points that followed one which a wrong clock
/// had put in the future are only counted on from that, and the end of their backup tells more.
fn time(point: &Point) -> Timestamp {
    let named = point.name.timestamp();
    point.manifest.as_ref().map_or(named, |manifest| manifest.record.created.min(named))
}

/// Why each point stays; those that go have no reason to.
fn reasons(
    catalogue: &Catalogue,
    wanted: &Wanted,
    zone: &TimeZone,
    now: Timestamp,
) -> Result<BTreeMap<PointName, Vec<Reason>>, PlanError> {
    let named = |point: &&Point| wanted.points.contains(&point.name);
    let others: Vec<_> = catalogue.points().iter().filter(|point| !named(point)).collect();
    let by_rules = match &wanted.policy {
        Some(policy) if policy.is_empty() => return Err(PlanError::NoRule),
        Some(policy) => {
            let times: Vec<_> = others.iter().map(|point| time(point)).collect();
            policy.apply(&times, zone, now)
        }
        None => vec![vec![Reason::NotNamed]; others.len()],
    };
    let newest = catalogue.newest().map(|point| point.name);
    let mut reasons = BTreeMap::new();
    for (point, by_rules) in others.into_iter().zip(by_rules) {
        let newest = (newest == Some(point.name)).then_some(Reason::Newest);
        let held = held(point).map(|reason| Reason::Held { reason: reason.to_owned() });
        reasons.insert(point.name, newest.into_iter().chain(held).chain(by_rules).collect());
    }
    reasons.extend(wanted.points.iter().map(|&name| (name, Vec::new())));
    Ok(reasons)
}

/// What keeps the points `kept` whole when the others go: layers to merge, and points to delete. The
/// links are those of all points, the oldest first, to what each builds upon.
fn work(
    links: &[(PointName, Option<PointName>)],
    kept: &BTreeSet<PointName>,
) -> (Vec<Merge>, Vec<PointName>) {
    let parents: BTreeMap<_, _> = links.iter().copied().collect();
    let mut merges = Vec::new();
    let mut needed = BTreeSet::new();
    for &(child, mut parent) in links.iter().filter(|(name, _)| kept.contains(name)) {
        let mut removed = Vec::new();
        // Ends: a parent is older than its child, or the child is not sound.
        while let Some(name) = parent.filter(|name| !kept.contains(name)) {
            removed.push(name);
            parent = parents.get(&name).copied().flatten();
        }
        needed.extend(removed.iter().copied());
        if !removed.is_empty() {
            merges.push(Merge { child, removed, parent });
        }
    }
    let names = links.iter().rev().map(|(name, _)| *name);
    let removals = names.filter(|name| !kept.contains(name) && !needed.contains(name)).collect();
    (merges, removals)
}

#[cfg(test)]
mod tests;

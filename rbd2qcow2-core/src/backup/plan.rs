//! What a backup builds upon, or why it builds upon nothing.

use super::{Backup, BackupError};
use crate::chain::catalogue::{Catalogue, Point, PointKind};
use crate::chain::names::{ChainId, ImageName, PointName, SnapshotName};
use crate::chain::{ChainError, image_directory};
use crate::error::Causes;
use crate::layer::SECTOR;
use crate::progress::{ImageReport, Status};
use crate::rbd::{Features, Granularity, Image, ImageInfo, Snapshot};
use crate::source::librbd::{BaseSnapshot, Doubt};

/// What a backup will be. Incremental only when the base is beyond doubt.
#[derive(Clone, Debug)]
pub struct Plan {
    base: Option<Base>,
    /// Why the backup is full where it need not be.
    reason: Option<String>,
}

#[derive(Clone, Debug)]
struct Base {
    point: Point,
    /// The RBD snapshot that the point was taken from.
    snapshot: Snapshot,
    /// The one before, where writers may have changed that one after it was read.
    guard: Option<String>,
}

impl Plan {
    fn full(reason: Option<String>) -> Self {
        Self { base: None, reason }
    }

    /// The point that the new one builds upon; `None` for a root.
    #[must_use]
    pub fn parent(&self) -> Option<&Point> {
        self.base.as_ref().map(|base| &base.point)
    }

    /// The snapshot that the new one is compared with; `None` for a root.
    #[must_use]
    pub fn base_snapshot(&self) -> Option<BaseSnapshot> {
        let base = self.base.as_ref()?;
        let manifest = base.point.manifest.as_ref();
        Some(BaseSnapshot {
            name: base.snapshot.name.clone(),
            map_digest: manifest.and_then(|manifest| manifest.record.object_map.clone()),
            guard: base.guard.clone(),
        })
    }

    /// The chain that goes on; `None` when one begins (also on top of the Python tool's points).
    #[must_use]
    pub fn chain(&self) -> Option<ChainId> {
        Some(self.base.as_ref()?.point.manifest.as_ref()?.record.chain)
    }

    /// The snapshot that the new one is compared with, as it was listed when that was decided.
    pub(super) fn base_listed(&self) -> Option<&Snapshot> {
        self.base.as_ref().map(|base| &base.snapshot)
    }

    pub(super) fn tell(&self, report: &mut ImageReport) {
        report.kind = Some(if self.base.is_some() { PointKind::Incremental } else { PointKind::Full });
        report.reason.clone_from(&self.reason);
    }
}

impl Backup<'_> {
    /// Decides what the new point builds upon. Changes nothing.
    ///
    /// `before` is what made the last attempt fail.
    pub(super) fn plan(
        &self,
        catalogue: &Catalogue,
        head: &Image,
        before: Option<&Doubt>,
    ) -> Result<Plan, BackupError> {
        if self.options.full {
            return Ok(Plan::full(Some("--full asks for it".into())));
        }
        let Some(newest) = catalogue.newest() else { return Ok(Plan::full(None)) };
        if let Err(problem) = catalogue.ancestry(newest.name) {
            let reason = format!("the chain is damaged: {}", Causes(&problem));
            log::warn!("{}: {reason}; a new chain begins, the files of the old one stay", self.image);
            return Ok(Plan::full(Some(reason)));
        }
        if let Some(doubt @ Doubt::BaseMapChanged { .. }) = before {
            return Ok(Plan::full(Some(doubt.to_string())));
        }
        let (info, snapshots) = (head.info()?, head.snapshots()?);
        let snapshot = match self.base_of(newest, &info, &snapshots) {
            Ok(snapshot) => snapshot,
            Err(reason) => return Ok(Plan::full(Some(reason))),
        };
        if !may_have_changed(newest, &info) {
            let base = Base { point: newest.clone(), snapshot, guard: None };
            return Ok(Plan { base: Some(base), reason: None });
        }
        Ok(match guard_of(newest, &snapshot, &snapshots) {
            Some(guard) => {
                let base = Base { point: newest.clone(), snapshot, guard: Some(guard) };
                Plan { base: Some(base), reason: None }
            }
            None => Plan::full(Some("the image has no exclusive-lock, so its snapshot may have changed since it was read, and there is no older one that would tell".into())),
        })
    }

    /// The snapshot that guards the base that the next backup is going to have: see [`guard_of`].
    pub(super) fn guard(
        &self,
        catalogue: &Catalogue,
        image: &ImageInfo,
        snapshots: &[Snapshot],
    ) -> Option<String> {
        let newest = catalogue.newest().filter(|newest| may_have_changed(newest, image))?;
        guard_of(newest, &self.base_of(newest, image, snapshots).ok()?, snapshots)
    }

    /// The snapshot that `point` was taken from, or why that is in doubt.
    fn base_of(&self, point: &Point, image: &ImageInfo, snapshots: &[Snapshot]) -> Result<Snapshot, String> {
        let find = |name: &str| {
            let found = snapshots.iter().find(|snapshot| snapshot.name == name);
            found.ok_or_else(|| format!("the base snapshot {name:?} is gone from the cluster"))
        };
        let Some(manifest) = &point.manifest else {
            if !point.name.is_python() {
                return Err(format!("the manifest of {} is missing or damaged", point.path.display()));
            }
            return python_base(point, find);
        };
        let record = &manifest.record;
        let same = |what: &str, then: &str, now: &str| match then == now {
            true => Ok(()),
            false => Err(format!("{what} is {now:?}, and was {then:?} at the last point")),
        };
        same("the cluster's fsid", &record.fsid, self.fsid)?;
        same("the pool", &record.pool, self.pool_name)?;
        same("the namespace", &record.namespace, self.namespace)?;
        same("the image's id", &record.image_id, &image.id)
            .map_err(|different| format!("the image was deleted and made again: {different}"))?;
        let snapshot = find(&record.snapshot)?;
        if snapshot.id != record.snapshot_id {
            return Err(format!(
                "the base snapshot {:?} was deleted and made again: its id is {}, and was {}",
                snapshot.name, snapshot.id, record.snapshot_id
            ));
        }
        Ok(snapshot.clone())
    }

    /// Says what a backup would do. Changes nothing, and takes no lock.
    pub(super) fn rehearse(
        &self,
        name: &ImageName,
        head: &Image,
        report: &mut ImageReport,
    ) -> Result<Status, BackupError> {
        let catalogue = match Catalogue::read(&image_directory(self.dest, name), name) {
            Ok(catalogue) => Some(catalogue),
            Err(ChainError::NoSuchImage { .. }) => None,
            Err(error) => return Err(error.into()),
        };
        let plan = match &catalogue {
            Some(catalogue) => self.plan(catalogue, head, None)?,
            None => Plan::full(None),
        };
        plan.tell(report);
        let last = catalogue.and_then(|catalogue| catalogue.last_name());
        let (point, _) = PointName::next_after(last, jiff::Timestamp::now())?;
        report.point = Some(point.to_string());
        let size = head.info()?.size;
        report.virtual_size = size;
        if size > 0 {
            // An estimate may believe the object maps.
            let base = plan.base_snapshot();
            let from = base.as_ref().map(|base| base.name.as_str());
            report.data_bytes =
                head.diff(from, 0..size, Granularity::Objects, from.is_none(), 0, |sum, extent| {
                    *sum += extent.length;
                })?;
        }
        Ok(Status::Ok)
    }
}

/// Whether writers that had not heard of the point's snapshot may have written into it since it was read.
/// Only an exclusive lock keeps them from that: its owner takes the snapshot itself.
fn may_have_changed(point: &Point, image: &ImageInfo) -> bool {
    let recorded = point.manifest.as_ref().map(|manifest| Features(manifest.record.features.bits));
    // The Python tool recorded no features.
    !recorded.unwrap_or(image.features).has(Features::EXCLUSIVE_LOCK)
}

/// The snapshot of the same chain before the one of `point`. What came late into that one changed since this
/// one, in all likelihood: writers have had a whole interval between backups to hear of it.
fn guard_of(point: &Point, base: &Snapshot, snapshots: &[Snapshot]) -> Option<String> {
    let chain = point.manifest.as_ref()?.record.chain;
    let of_chain = |snapshot: &&Snapshot| {
        let name = SnapshotName::parse(&snapshot.name).ok();
        name.is_some_and(|name| name.chain == chain && name.point < point.name) && snapshot.id < base.id
    };
    let newest = snapshots.iter().filter(of_chain).max_by_key(|snapshot| snapshot.id)?;
    Some(newest.name.clone())
}

/// The snapshot of a point of the Python tool, which is named like the point. It recorded nothing
/// else; that the size fits is all that can be asked besides.
fn python_base<'a>(
    point: &Point,
    find: impl Fn(&str) -> Result<&'a Snapshot, String>,
) -> Result<Snapshot, String> {
    let snapshot = find(&point.name.to_string())?;
    let expected = snapshot.size.next_multiple_of(SECTOR);
    if point.virtual_size() != Some(expected) {
        return Err(format!(
            "{} is not as large as its snapshot {:?}, which has {expected} bytes",
            point.path.display(),
            snapshot.name
        ));
    }
    Ok(snapshot.clone())
}

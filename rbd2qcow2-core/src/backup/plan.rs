//! What a backup builds upon, or why it builds upon nothing.

use super::{Backup, BackupError};
use crate::chain::catalogue::{Catalogue, Point, PointKind};
use crate::chain::names::{ChainId, ImageName, PointName, SnapshotName};
use crate::chain::{ChainError, Doubt, image_directory};
use crate::error::Causes;
use crate::layer::SECTOR;
use crate::options::{BaseGone, DiffMode};
use crate::progress::{ImageReport, Status};
use crate::rbd::{Features, Granularity, Image, ImageInfo, Snapshot};
use crate::source::librbd::{BaseSnapshot, Distrust};

/// What a backup will be. Incremental only when the base is beyond doubt, or is compared with.
#[derive(Clone, Debug)]
pub struct Plan {
    base: Option<Base>,
    /// Why the backup is full where it need not be, compares the whole image where it need not, or builds upon
    /// another point than the newest.
    reason: Option<String>,
}

#[derive(Clone, Debug)]
struct Base {
    point: Point,
    /// The RBD snapshot that the point was taken from, where what changed since is asked for; `None` where
    /// the whole image is compared with the point.
    snapshot: Option<Snapshot>,
    /// The snapshot before that one, where writers may have changed that one after it was read.
    guard: Option<String>,
}

/// Why a point is not to be built upon by asking what changed since.
enum Gone {
    /// Its snapshot is not there any more. Everything else is as it was.
    Snapshot(String),
    /// It may be the point of something else.
    Doubt(String),
}

impl Plan {
    fn full(reason: Option<String>) -> Self {
        Self { base: None, reason }
    }

    /// Builds upon `point`, of the base snapshot `snapshot`, if that one and the image can be compared at all.
    fn upon(point: &Point, snapshot: Snapshot, image: &ImageInfo, snapshots: &[Snapshot]) -> Self {
        if is_migrating(point, image) {
            let reason = "compared with the chain, as what an image shows while it migrates is in no diff";
            return Self::comparing(point, Some(reason.into()));
        }
        let guard = may_have_changed(point, image).then(|| guard_of(point, &snapshot, snapshots));
        if let Some(None) = guard {
            let reason = "compared with the chain: the image has no exclusive-lock, so that writers may have changed \
                the base snapshot after it was read, and there is no older one yet that would tell";
            return Self::comparing(point, Some(reason.into()));
        }
        let base = Base { point: point.clone(), snapshot: Some(snapshot), guard: guard.flatten() };
        Self { base: Some(base), reason: None }
    }

    /// Builds upon `point`, and finds out what changed by comparing the whole image with it. `reason` tells
    /// why, where nobody asked for that.
    fn comparing(point: &Point, reason: Option<String>) -> Self {
        Self { base: Some(Base { point: point.clone(), snapshot: None, guard: None }), reason }
    }

    /// Whether the whole image is compared with the point that is built upon.
    #[must_use]
    pub fn compares(&self) -> bool {
        self.base.as_ref().is_some_and(|base| base.snapshot.is_none())
    }

    /// The point that the new one builds upon; `None` for a root.
    #[must_use]
    pub fn parent(&self) -> Option<&Point> {
        self.base.as_ref().map(|base| &base.point)
    }

    /// The snapshot that the new one is compared with; `None` for a root, and where the whole image is
    /// compared with the point.
    #[must_use]
    pub fn base_snapshot(&self) -> Option<BaseSnapshot> {
        let base = self.base.as_ref()?;
        let manifest = base.point.manifest.as_ref();
        Some(BaseSnapshot {
            name: base.snapshot.as_ref()?.name.clone(),
            map_digest: manifest.and_then(|manifest| manifest.record.object_map.clone()),
            objects: manifest.and_then(|manifest| manifest.record.objects.clone()),
            overlap: manifest
                .map(|manifest| manifest.record.clone_parent.as_ref().map_or(0, |parent| parent.overlap)),
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
        self.base.as_ref()?.snapshot.as_ref()
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
        before: Option<&Distrust>,
    ) -> Result<Plan, BackupError> {
        if self.options.full {
            return Ok(Plan::full(Some("--full asks for it".into())));
        }
        for lost in catalogue.lost() {
            log::warn!("{}: {}", self.image, catalogue.no_such_point(lost.name));
        }
        let lost = catalogue.newest_lost().map(|lost| {
            format!("point {}, the newest, is lost: {} is missing", lost.name, lost.path.display())
        });
        let Some(newest) = catalogue.newest() else { return Ok(Plan::full(lost)) };
        if let Err(problem) = catalogue.ancestry(newest.name) {
            let what =
                if problem.is_denied() { "this user may not read the chain" } else { "the chain is damaged" };
            let reason = format!("{what}: {}", Causes(&problem));
            log::warn!("{}: {reason}; a new chain begins, the files of the old one stay", self.image);
            return Ok(Plan::full(Some(reason)));
        }
        let mut plan = self.plan_upon(catalogue, newest, head, before)?;
        if let Some(lost) = lost {
            plan.reason = Some(match plan.reason {
                Some(reason) => format!("{lost}; and of {}: {reason}", newest.name),
                // What the image holds is compared with what is there, so nothing of the lost point is needed.
                None => format!("{lost}; this builds upon {}", newest.name),
            });
        }
        Ok(plan)
    }

    /// The same, of a chain that can be built upon.
    fn plan_upon(
        &self,
        catalogue: &Catalogue,
        newest: &Point,
        head: &Image,
        before: Option<&Distrust>,
    ) -> Result<Plan, BackupError> {
        let suspicion = catalogue.suspicion(newest);
        if let Some(suspicion) = suspicion.filter(|suspicion| suspicion.doubt == Doubt::Unreadable) {
            return Ok(Plan::full(Some(format!("the chain cannot be read: {}", suspicion.describe()))));
        }
        let asked = self.options.diff == DiffMode::Compare;
        let may_compare = asked || self.options.when_base_is_gone == BaseGone::Compare;
        let (info, snapshots) = (head.info()?, head.snapshots()?);
        Ok(match (self.base_of(newest, &info, &snapshots), suspicion) {
            (Err(Gone::Snapshot(reason)), _) if may_compare => Plan::comparing(newest, Some(reason)),
            (Err(Gone::Snapshot(reason) | Gone::Doubt(reason)), _) => Plan::full(Some(reason)),
            (Ok(_), _) if before.is_some_and(|before| matches!(before, Distrust::BaseMapChanged { .. })) => {
                Plan::comparing(newest, before.map(ToString::to_string))
            }
            (Ok(_), Some(suspicion)) => {
                let reason = format!(
                    "compared with the whole image, as the chain is suspect: {}",
                    suspicion.describe()
                );
                Plan::comparing(newest, Some(reason))
            }
            (Ok(_), None) if asked => Plan::comparing(newest, None),
            (Ok(snapshot), None) => Plan::upon(newest, snapshot, &info, &snapshots),
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
    fn base_of(&self, point: &Point, image: &ImageInfo, snapshots: &[Snapshot]) -> Result<Snapshot, Gone> {
        let find = |name: &str| {
            let found = snapshots.iter().find(|snapshot| snapshot.name == name);
            found.ok_or_else(|| format!("the base snapshot {name:?} is gone from the cluster"))
        };
        let Some(manifest) = &point.manifest else {
            if !point.name.is_python() {
                let text = format!("the manifest of {} is missing or damaged", point.path.display());
                return Err(Gone::Doubt(text));
            }
            // Nothing but the snapshot tells that the image is the same.
            return python_base(point, find).map_err(Gone::Doubt);
        };
        let record = &manifest.record;
        let same = |what: &str, then: &str, now: &str| match then == now {
            true => Ok(()),
            false => Err(format!("{what} is {now:?}, and was {then:?} at the last point")),
        };
        same("the cluster's fsid", &record.fsid, self.fsid).map_err(Gone::Doubt)?;
        same("the pool", &record.pool, self.pool_name).map_err(Gone::Doubt)?;
        same("the namespace", &record.namespace, self.namespace).map_err(Gone::Doubt)?;
        same("the image's id", &record.image_id, &image.id)
            .map_err(|different| Gone::Doubt(format!("the image was deleted and made again: {different}")))?;
        let snapshot = find(&record.snapshot).map_err(Gone::Snapshot)?;
        if snapshot.id != record.snapshot_id {
            return Err(Gone::Snapshot(format!(
                "the base snapshot {:?} was deleted and made again: its id is {}, and was {}",
                snapshot.name, snapshot.id, record.snapshot_id
            )));
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

/// Whether the image is on its way to another place, or was when the point was made.
fn is_migrating(point: &Point, image: &ImageInfo) -> bool {
    let recorded = point.manifest.as_ref().map(|manifest| Features(manifest.record.features.bits));
    [Some(image.features), recorded].into_iter().flatten().any(|features| features.has(Features::MIGRATING))
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

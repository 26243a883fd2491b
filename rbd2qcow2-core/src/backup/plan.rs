//! What a backup builds upon, or why it builds upon nothing.

use super::{Backup, BackupError};
use crate::chain::catalogue::{Catalogue, Point, PointKind};
use crate::chain::names::{ChainId, ImageName, PointName};
use crate::chain::{ChainError, image_directory};
use crate::error::Causes;
use crate::layer::SECTOR;
use crate::progress::{ImageReport, Status};
use crate::rbd::{Granularity, Image, ImageInfo, Snapshot};

/// What a backup will be. Incremental only when the base is beyond doubt.
#[derive(Clone, Debug)]
pub struct Plan {
    base: Option<Base>,
    /// Why the backup is full where it need not be, or builds upon another point than the newest.
    reason: Option<String>,
}

#[derive(Clone, Debug)]
struct Base {
    point: Point,
    /// The RBD snapshot that the point was taken from.
    snapshot: Snapshot,
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
    pub fn base_snapshot(&self) -> Option<&str> {
        self.base.as_ref().map(|base| base.snapshot.name.as_str())
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
    pub(super) fn plan(&self, catalogue: &Catalogue, head: &Image) -> Result<Plan, BackupError> {
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
        Ok(match self.base_of(newest, &head.info()?, &head.snapshots()?) {
            Ok(snapshot) => {
                // What the image holds is compared with that snapshot, so nothing of the lost point is needed.
                let reason = lost.map(|lost| format!("{lost}; this builds upon {}", newest.name));
                Plan { base: Some(Base { point: newest.clone(), snapshot }), reason }
            }
            Err(reason) => {
                let of = newest.name;
                Plan::full(Some(lost.map_or(reason.clone(), |lost| format!("{lost}; and of {of}: {reason}"))))
            }
        })
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
            Some(catalogue) => self.plan(catalogue, head)?,
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
            let from = plan.base_snapshot();
            report.data_bytes =
                head.diff(from, 0..size, Granularity::Objects, from.is_none(), 0, |sum, extent| {
                    *sum += extent.length;
                })?;
        }
        Ok(Status::Ok)
    }
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

//! Points whose layer is gone, told from what an interrupted run has left.
//!
//! A manifest without its layer is one of two things. Either a run was cut short before its commit, or while
//! it was removing the point: then the layer lies beside it under the name that it has while it is written,
//! finished. For the manifest gets its name when the layer is complete and that name is on stable storage, and
//! loses it, for good, before the layer's file goes. Or else the layer was there and is lost: somebody has
//! deleted it, or the file system has.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::directory::{Files, OfPoint, Presence};
use super::{Catalogue, Problem};
use crate::chain::manifest::{Manifest, ManifestError};
use crate::chain::names::{FileKind, PointFile, PointName};
use crate::qcow2::header::Header;

/// A point whose layer is gone, while its manifest is there. What else is left of it stays, and so does its
/// snapshot in the cluster.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LostPoint {
    /// Its name.
    pub name: PointName,
    /// The file that is missing.
    pub path: PathBuf,
    /// What is still known of it; `None` where the manifest cannot be read.
    pub manifest: Option<Manifest>,
    /// The points that cannot be read without it, the oldest first.
    pub needed_by: Vec<PointName>,
}

/// What a manifest without a layer is.
pub(super) enum Without {
    /// The layer has come meanwhile.
    Nothing,
    /// What an interrupted run has left.
    LeftOver,
    /// All that is left of a point.
    Lost(Option<Box<Manifest>>),
    /// This user may not read what would tell.
    Unknown(Problem),
}

impl Catalogue {
    /// Tells what the manifest of a point is whose layer was not found. Right also where a run that writes
    /// moves files meanwhile.
    pub(super) fn without_layer(&self, name: PointName) -> Without {
        let layer = self.path_of(name, FileKind::Layer);
        let partial = self.directory.join(self.file_of(name, FileKind::Layer).partial_name());
        // A commit renames the partial layer to the layer, a removal does the reverse. What is at neither
        // place, looked at in this order, is gone.
        let is_aside = is_there(&partial);
        if is_there(&layer) {
            return Without::Nothing;
        }
        let is_aside = is_aside || is_there(&partial);
        let path = self.path_of(name, FileKind::Manifest);
        let manifest = match Manifest::read(&path, &self.image, name) {
            Err(ManifestError::Missing) => return Without::LeftOver,
            Err(cause @ ManifestError::Read(_)) => {
                return Without::Unknown(Problem::Manifest { path, cause: cause.into() });
            }
            Err(_) => None,
            Ok(manifest) => Some(Box::new(manifest)),
        };
        match manifest {
            Some(manifest) if is_aside && self.tells_of(&manifest, &partial) => Without::LeftOver,
            _ if is_there(&layer) => Without::Nothing,
            manifest => Without::Lost(manifest),
        }
    }

    /// Whether `manifest` tells of the finished layer at `path`. A merge writes another one to that name: its
    /// layer builds upon something else, or is not finished.
    fn tells_of(&self, manifest: &Manifest, path: &Path) -> bool {
        let Ok(header) = Header::read(path) else { return false };
        let file = |point| PointFile { image: self.image.clone(), point, kind: FileKind::Layer };
        let below = manifest.base.map(|base| file(base).base_name());
        let below = below.or_else(|| manifest.parent.map(|parent| file(parent).file_name()));
        let same_link = header.chain_backing().is_ok_and(|backing| backing == below.as_deref());
        let bytes = fs::symlink_metadata(path).map(|metadata| metadata.len());
        same_link && bytes.is_ok_and(|bytes| bytes == manifest.file_bytes)
    }

    /// Takes a point for lost; which points need it, is found later.
    pub(super) fn lose(&mut self, name: PointName, manifest: Option<Box<Manifest>>) {
        let path = self.path_of(name, FileKind::Layer);
        let manifest = manifest.map(|manifest| *manifest);
        self.lost.push(LostPoint { name, path, manifest, needed_by: Vec::new() });
    }

    /// Finds which points need those that are lost, and tells of each.
    pub(super) fn tell_of_lost(&mut self) {
        let of_lost = |lost: &LostPoint| (lost.name, lost.manifest.as_ref().and_then(|found| found.parent));
        let points = self.points.iter().map(|point| (point.name, point.parent));
        let mut links: Vec<_> = points.chain(self.lost.iter().map(of_lost)).collect();
        links.sort_unstable();
        for lost in &mut self.lost {
            let mut needing = BTreeSet::from([lost.name]);
            // What is older comes first, so one pass suffices.
            for (name, parent) in &links {
                if parent.is_some_and(|parent| needing.contains(&parent)) {
                    needing.insert(*name);
                }
            }
            needing.remove(&lost.name);
            lost.needed_by = needing.into_iter().collect();
            let (path, point, needed_by) = (lost.path.clone(), lost.name, lost.needed_by.clone());
            self.problems.push(Problem::LayerMissing { path, point, needed_by });
        }
    }

    /// The points whose layer is gone, the oldest first.
    #[must_use]
    pub fn lost(&self) -> &[LostPoint] {
        &self.lost
    }

    /// The newest point of all, if that is lost.
    #[must_use]
    pub fn newest_lost(&self) -> Option<&LostPoint> {
        let newest = self.newest().map(|point| point.name);
        self.lost.last().filter(|lost| newest.is_none_or(|newest| newest < lost.name))
    }

    /// Whether there was a point of this name, as something that is there tells: its manifest, or a point
    /// that builds upon it. Its snapshot must stay.
    #[must_use]
    pub fn is_missed(&self, name: PointName) -> bool {
        let is_lost = self.lost.iter().any(|lost| lost.name == name);
        is_lost || (self.point(name).is_none() && self.points.iter().any(|point| point.parent == Some(name)))
    }

    /// What is wrong with a point that is not there.
    pub(crate) fn no_such_point(&self, point: PointName) -> Problem {
        let path = self.path_of(point, FileKind::Layer);
        match self.lost.iter().find(|lost| lost.name == point) {
            Some(lost) => Problem::LayerMissing { path, point, needed_by: lost.needed_by.clone() },
            None => Problem::NoSuchPoint { path, point },
        }
    }

    /// The layers that are being written, of points that are missed: whatever they are, they stay.
    pub(super) fn kept_aside(&self, files: &Files) -> BTreeSet<PathBuf> {
        let without = |(_, of_point): &(&PointName, &OfPoint)| of_point.layer == Presence::Nothing;
        let missed = files.by_point.iter().filter(without).map(|(name, _)| *name);
        let missed = missed.filter(|name| self.is_missed(*name));
        missed.map(|name| self.directory.join(self.file_of(name, FileKind::Layer).partial_name())).collect()
    }
}

/// What cannot be looked at counts as there: then nothing is done on its account.
fn is_there(path: &Path) -> bool {
    !fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

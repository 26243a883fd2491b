//! What the directory of an image holds: the points, how they build upon each other, and whatever is
//! wrong.
//!
//! Two kinds of points are understood: this program's, and those of the Python rbd2qcow2, which are
//! named by a unix time, have no manifest, and whose first layer has the backing file `empty.qcow2`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::announcement::Announcement;
use super::error::ChainError;
use super::names::{ChainId, FileKind, ImageName, PointFile, PointName};
use super::suspect::{self, Doubt, Suspicion};
use crate::files::Shortage;

mod directory;
mod examine;
mod lost;
mod point;
mod problem;

pub use directory::{Images, images_in};
pub use lost::LostPoint;
pub(super) use point::Link;
pub use point::{Point, PointKind};
pub use problem::Problem;

use directory::{Files, OfPoint, Presence};
use lost::Without;

/// The empty image that the first layers of the Python tool build upon. Not a point.
pub const PYTHON_ROOT: &str = "empty.qcow2";

/// What the directory of an image held when it was read.
///
/// Nothing here is locked: where another run may write meanwhile, take a
/// [`ChainLock`](super::lock::ChainLock) first, or expect to see a moment in between. (Points appear
/// whole in any case.)
#[derive(Clone, Debug)]
pub struct Catalogue {
    directory: PathBuf,
    image: ImageName,
    /// By name, so by time.
    points: Vec<Point>,
    /// Points whose layer is gone, by name.
    lost: Vec<LostPoint>,
    /// Layers that others build upon, of points that are gone.
    bases: Vec<Point>,
    problems: Vec<Problem>,
    /// Files that a killed run left behind.
    leftovers: Vec<PathBuf>,
    /// Points with files that wait to replace others.
    unsettled: Vec<PointName>,
    /// Whether there is a list of points to forget.
    forgetting: bool,
    /// Whether there are files of bases that nobody builds upon. They are among what is left behind.
    unused_bases: bool,
    /// The newest name at whose layer's place something stands that is no file, or cannot be looked at.
    newest_unseen: Option<PointName>,
    /// The newest name that any file of the image bears.
    last_name: Option<PointName>,
    /// What is known against points.
    suspicions: Vec<Suspicion>,
}

impl Catalogue {
    /// Reads `directory`, which holds the points of `image`. Reads the header of every layer and
    /// every manifest, no image data. Whatever is wrong with single points becomes a [`Problem`].
    ///
    /// # Errors
    /// [`ChainError::NoSuchImage`], [`ChainError::NotADirectory`], [`ChainError::NotAllowed`], [`ChainError::Io`]
    /// when the directory cannot be listed, [`ChainError::TooManyFiles`].
    pub fn read(directory: &Path, image: &ImageName) -> Result<Self, ChainError> {
        let mut files = Files::sort(directory, image)?;
        let mut catalogue = Self {
            directory: directory.to_owned(),
            image: image.clone(),
            points: Vec::new(),
            lost: Vec::new(),
            bases: Vec::new(),
            problems: std::mem::take(&mut files.problems),
            leftovers: Vec::new(),
            unsettled: Vec::new(),
            forgetting: files.forgetting,
            unused_bases: false,
            newest_unseen: None,
            last_name: files.by_point.keys().next_back().copied(),
            suspicions: Vec::new(),
        };
        catalogue.suspicions = suspect::read(directory, image, catalogue.last_name);
        let waits = |of_point: &OfPoint| of_point.merged_manifest || of_point.merged_digests;
        let unsettled = files.by_point.iter().filter(|(_, of_point)| waits(of_point));
        catalogue.unsettled = unsettled.map(|(name, _)| *name).collect();
        for (&name, of_point) in &mut files.by_point {
            if of_point.layer == Presence::Nothing && of_point.manifest == Presence::File {
                match catalogue.without_layer(name) {
                    Without::Nothing => of_point.layer = Presence::File,
                    Without::LeftOver => {}
                    Without::Lost(manifest) => catalogue.lose(name, manifest),
                    Without::Unknown(problem) => {
                        catalogue.problems.push(problem);
                        (of_point.manifest, of_point.digests) = (Presence::Other, Presence::Other);
                    }
                }
            }
            match of_point.layer {
                Presence::Nothing => {}
                Presence::File => {
                    let point = catalogue.read_point(name, of_point);
                    catalogue.points.push(point);
                }
                Presence::Other => catalogue.newest_unseen = Some(name),
            }
        }
        catalogue.tell_of_lost();
        // Nothing that was not looked at is broken, or missing.
        let shortage = |problem: &Problem| Some((problem.path().to_owned(), Shortage::of(problem)?));
        if let Some((path, cause)) = catalogue.problems.iter().find_map(shortage) {
            return Err(ChainError::TooManyFiles { path, cause });
        }
        catalogue.find_soundness();
        catalogue.find_leftovers(&files);
        Ok(catalogue)
    }

    /// The points, the oldest first.
    #[must_use]
    pub fn points(&self) -> &[Point] {
        &self.points
    }

    /// The newest point that is there, sound or not.
    #[must_use]
    pub fn newest(&self) -> Option<&Point> {
        self.points.last()
    }

    /// Whether there is no point, not even a lost one.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.points.is_empty() && self.lost.is_empty()
    }

    /// The point of the given name.
    #[must_use]
    pub fn point(&self, name: PointName) -> Option<&Point> {
        self.index(name).map(|index| &self.points[index])
    }

    /// Everything that is wrong in the directory.
    #[must_use]
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// What killed runs left behind: files being written, and manifests and digests of such layers. The next
    /// run that writes removes them, the manifests first: what is beside them tells that they are left over.
    #[must_use]
    pub fn leftovers(&self) -> &[PathBuf] {
        &self.leftovers
    }

    /// The points with files that a merge has put beside those that they are to replace.
    pub(super) fn unsettled(&self) -> &[PointName] {
        &self.unsettled
    }

    /// The newest layer of which nobody can tell what it builds upon.
    pub(super) fn newest_unlinked(&self) -> Option<PointName> {
        let unread = self.points.iter().rfind(|point| point.linked.is_none()).map(|point| point.name);
        unread.max(self.newest_unseen)
    }

    /// Whether a run that was cut short has left work: merges to complete or to undo, or points to forget,
    /// for the next one that writes; or layers to put into the bases that they build upon, or such to remove
    /// (which may be as large as all that is left), for the next one that prunes.
    #[must_use]
    pub fn is_unfinished(&self) -> bool {
        let has_base = || self.points.iter().any(|point| point.base.is_some());
        self.forgetting || !self.unsettled.is_empty() || self.unused_bases || has_base()
    }

    /// The points whose layer has yet to be put into the base that it builds upon: a run that was cut short
    /// has left that, and the next one that prunes the image does it. Until then they read as they should.
    ///
    /// Where the base's point is there (it was to go, but a merge of others failed), it may be wanted again,
    /// and its layer stays as it is.
    pub fn half_merged(&self) -> impl Iterator<Item = &Point> {
        self.points.iter().filter(|point| point.base.is_some_and(|base| self.point(base).is_none()))
    }

    /// The note of a run that was killed before the first point of its chain was committed, as it
    /// stands there now. The snapshot it names may exist and belongs to no point.
    ///
    /// # Errors
    /// [`ChainError::AnnouncementDamaged`], [`ChainError::Io`].
    pub fn announced(&self) -> Result<Option<Announcement>, ChainError> {
        Announcement::read(&self.directory, &self.image)
    }

    /// What is known against points: that they may lack changes, though nothing is wrong with their files.
    #[must_use]
    pub fn suspicions(&self) -> &[Suspicion] {
        &self.suspicions
    }

    /// What is known against a point: the worst of it.
    #[must_use]
    pub fn suspicion(&self, point: &Point) -> Option<&Suspicion> {
        let concerning = || self.suspicions.iter().filter(|suspicion| suspicion.concerns(point));
        concerning().find(|suspicion| suspicion.doubt == Doubt::Unreadable).or_else(|| concerning().next())
    }

    /// The newest name that is in use, also by damaged points: the next one must be newer.
    #[must_use]
    pub fn last_name(&self) -> Option<PointName> {
        self.last_name
    }

    /// The ids of all chains that have points here, lost ones too, that of the newest point last. A directory has
    /// several when backups began anew.
    #[must_use]
    pub fn chain_ids(&self) -> Vec<ChainId> {
        let points = self.points.iter().map(|point| (point.name, &point.manifest));
        let lost = self.lost.iter().map(|lost| (lost.name, &lost.manifest));
        let mut manifests: Vec<_> = points.chain(lost).collect();
        manifests.sort_by_key(|(name, _)| *name);
        let mut ids = Vec::new();
        for manifest in manifests.into_iter().filter_map(|(_, manifest)| manifest.as_ref()) {
            ids.retain(|id| *id != manifest.record.chain);
            ids.push(manifest.record.chain);
        }
        ids
    }

    /// The directory that was read.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The image whose points these are.
    #[must_use]
    pub fn image(&self) -> &ImageName {
        &self.image
    }

    /// The point of the given name and everything that it builds upon: itself first, the full backup
    /// last. Where a point has a base, that comes next, as a point.
    ///
    /// # Errors
    /// The first problem on the way that keeps the point from being read. [`Problem::NoSuchPoint`]
    /// when there is no such point.
    pub fn ancestry(&self, name: PointName) -> Result<Vec<&Point>, Problem> {
        let mut found = Vec::new();
        let mut next = Some(self.point(name).ok_or_else(|| self.no_such_point(name))?);
        // Ends: what is not older than what builds upon it is a fatal problem of the latter.
        while let Some(point) = next {
            if let Some(fatal) = point.fatal {
                return Err(self.problems[fatal].clone());
            }
            found.push(point);
            let missing = |name| move || self.no_such_point(name);
            next = match (point.base, point.parent) {
                (Some(base), _) => Some(self.base(base).ok_or_else(missing(base))?),
                (None, Some(parent)) => Some(self.point(parent).ok_or_else(missing(parent))?),
                (None, None) => None,
            };
        }
        Ok(found)
    }

    /// The files to read for the point of the given name, as
    /// [`ChainReader::open`](crate::qcow2::chain::ChainReader::open) takes them: the layers of its
    /// [`ancestry`](Self::ancestry), and what the first layer of a Python chain builds upon.
    ///
    /// # Errors
    /// Those of [`ancestry`](Self::ancestry).
    pub fn layers(&self, name: PointName) -> Result<Vec<PathBuf>, Problem> {
        let points = self.ancestry(name)?;
        let mut paths: Vec<_> = points.iter().map(|point| point.path.clone()).collect();
        let root = points.last().and_then(|point| point.header.as_ref());
        // A root with any backing file is one of the Python tool's.
        if root.is_some_and(|header| header.backing.is_some()) {
            paths.push(self.directory.join(PYTHON_ROOT));
        }
        Ok(paths)
    }

    /// The point of the given name, or else the base: the layer that a point of that name has left.
    pub(crate) fn layer(&self, name: PointName) -> Option<&Point> {
        self.point(name).or_else(|| self.base(name))
    }

    /// The base of the given name: the layer that a point has left.
    pub(crate) fn base(&self, name: PointName) -> Option<&Point> {
        self.bases.iter().find(|base| base.name == name)
    }

    /// All bases.
    pub(crate) fn bases(&self) -> &[Point] {
        &self.bases
    }

    fn index(&self, name: PointName) -> Option<usize> {
        self.points.binary_search_by_key(&name, |point| point.name).ok()
    }

    fn file_of(&self, point: PointName, kind: FileKind) -> PointFile {
        PointFile { image: self.image.clone(), point, kind }
    }

    /// Where a file of a point is, or would be.
    pub(crate) fn path_of(&self, point: PointName, kind: FileKind) -> PathBuf {
        self.directory.join(self.file_of(point, kind).file_name())
    }

    /// Where a file of a point is while its layer outlives it.
    pub(crate) fn base_path(&self, point: PointName, kind: FileKind) -> PathBuf {
        self.directory.join(self.file_of(point, kind).base_name())
    }

    /// Parents come before their children, so one pass suffices.
    fn find_soundness(&mut self) {
        for index in 0..self.points.len() {
            let point = &self.points[index];
            let below = match point.parent {
                None => true,
                Some(parent) => self.point(parent).is_some_and(|parent| parent.sound),
            };
            self.points[index].sound = below && point.fatal.is_none();
        }
    }

    fn find_leftovers(&mut self, files: &Files) {
        let needed: BTreeSet<PointName> = self.points.iter().filter_map(|point| point.parent).collect();
        let aside = self.kept_aside(files);
        self.leftovers = files.partial.clone();
        self.leftovers.retain(|path| !aside.contains(path));
        let mut unused = Vec::new();
        // A layer of which nobody can tell what it builds upon may need any base, and so may one that was lost,
        // when it is brought back.
        let missed = !self.lost.is_empty() || needed.iter().any(|name| self.point(*name).is_none());
        if self.newest_unlinked().is_none() && !missed {
            for (&name, of_point) in files.by_point.iter().filter(|(name, _)| self.base(**name).is_none()) {
                let kinds =
                    [(FileKind::Layer, of_point.base_layer), (FileKind::Digests, of_point.base_digests)];
                let there = kinds.into_iter().filter(|(_, there)| *there);
                unused.extend(there.map(|(kind, _)| self.base_path(name, kind)));
            }
        }
        self.unused_bases = !unused.is_empty();
        self.leftovers.append(&mut unused);
        for (&name, of_point) in &files.by_point {
            // What is known of a layer that is lost, and not left over, may be needed to mend the chain.
            if of_point.layer != Presence::Nothing || self.is_missed(name) {
                continue;
            }
            for (kind, presence) in
                [(FileKind::Manifest, of_point.manifest), (FileKind::Digests, of_point.digests)]
            {
                if presence == Presence::File {
                    self.leftovers.push(self.path_of(name, kind));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;

//! What the directory of an image holds: the points, how they build upon each other, and whatever is
//! wrong.
//!
//! Two kinds of points are understood: this program's, and those of the Python rbd2qcow2, which are
//! named by a unix time, have no manifest, and whose first layer has the backing file `empty.qcow2`.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::announcement::Announcement;
use super::error::ChainError;
use super::manifest::{Manifest, ManifestError};
use super::names::{ChainId, FileKind, ImageName, PointFile, PointName};
use crate::qcow2::header::Header;

mod directory;
mod problem;

pub use directory::{Images, images_in};
pub use problem::Problem;

use directory::{Files, OfPoint, Presence};

/// The empty image that the first layers of the Python tool build upon. Not a point.
pub const PYTHON_ROOT: &str = "empty.qcow2";

/// Whether a point stands alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PointKind {
    /// Holds the whole image.
    Full,
    /// Holds what changed since its parent.
    Incremental,
}

impl PointKind {
    /// The word that stands for it in reports: `full` or `incremental`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Incremental => "incremental",
        }
    }
}

/// A point of an image: a layer that is there, sound or not.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Point {
    /// Its name.
    pub name: PointName,
    /// Its layer.
    pub path: PathBuf,
    /// Whether it stands alone; `None` when neither header nor manifest can be read.
    pub kind: Option<PointKind>,
    /// The point it builds upon, which need not exist.
    pub parent: Option<PointName>,
    /// The point, gone by now, whose layer lies between its own and the parent's: a merge has yet to put
    /// the two into one.
    pub base: Option<PointName>,
    /// The layer's header, unless it is unreadable.
    pub header: Option<Header>,
    /// The manifest. Points of the Python tool have none; otherwise its absence is a problem, but
    /// one that leaves the layer readable.
    pub manifest: Option<Manifest>,
    /// What the layer takes on disk, in bytes, with that of the base.
    pub layer_bytes: u64,
    /// The length of the layer's file, in bytes.
    pub file_bytes: u64,
    /// Where its digests are. They need not be there.
    pub digests: PathBuf,
    /// What the layer's header says of what is below; `None` where that cannot be told.
    pub(super) linked: Option<Link>,
    /// Whether the point can be read: its layer and all that it builds upon are there and fit
    /// together. Says nothing of their content.
    pub sound: bool,
    /// The first problem of the layer itself that keeps it from being read: its place in the list.
    fatal: Option<usize>,
}

/// What a layer builds upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Link {
    /// The point below; `None` where there is none.
    pub(super) parent: Option<PointName>,
    /// The point, gone by now, whose layer lies between.
    pub(super) base: Option<PointName>,
}

impl Link {
    /// What a manifest says.
    pub(super) fn of(manifest: &Manifest) -> Self {
        Self { parent: manifest.parent, base: manifest.base }
    }
}

impl Point {
    /// The point whose layer this one's is directly put upon: that of the base, or else the parent.
    pub(crate) fn below(&self) -> Option<PointName> {
        self.base.or(self.parent)
    }

    /// The image's size in bytes: exact where there is a manifest, else the layer's, which is
    /// rounded up to 512.
    #[must_use]
    pub fn virtual_size(&self) -> Option<u64> {
        let recorded = self.manifest.as_ref().map(|manifest| manifest.record.virtual_size);
        recorded.or(self.header.as_ref().map(|header| header.virtual_size))
    }

    /// The name of the RBD snapshot that the point was taken from.
    #[must_use]
    pub fn snapshot(&self) -> Option<String> {
        match &self.manifest {
            Some(manifest) => Some(manifest.record.snapshot.clone()),
            // The Python tool names both alike.
            None => self.name.is_python().then(|| self.name.to_string()),
        }
    }
}

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
    /// Layers that others build upon, of points that are gone.
    bases: Vec<Point>,
    problems: Vec<Problem>,
    /// Files that a killed run left behind.
    leftovers: Vec<PathBuf>,
    /// Points with files that wait to replace others.
    unsettled: Vec<PointName>,
    /// Whether there is a list of points to forget.
    forgetting: bool,
    /// The newest name at whose layer's place something stands that is no file, or cannot be looked at.
    newest_unseen: Option<PointName>,
    /// The newest name that any file of the image bears.
    last_name: Option<PointName>,
}

impl Catalogue {
    /// Reads `directory`, which holds the points of `image`. Reads the header of every layer and
    /// every manifest, no image data. Whatever is wrong with single points becomes a [`Problem`].
    ///
    /// # Errors
    /// [`ChainError::NoSuchImage`], [`ChainError::NotADirectory`], [`ChainError::Io`] when the
    /// directory cannot be listed.
    pub fn read(directory: &Path, image: &ImageName) -> Result<Self, ChainError> {
        let mut files = Files::sort(directory, image)?;
        let mut catalogue = Self {
            directory: directory.to_owned(),
            image: image.clone(),
            points: Vec::new(),
            bases: Vec::new(),
            problems: std::mem::take(&mut files.problems),
            leftovers: Vec::new(),
            unsettled: Vec::new(),
            forgetting: files.forgetting,
            newest_unseen: None,
            last_name: files.by_point.keys().next_back().copied(),
        };
        let waits = |of_point: &OfPoint| of_point.merged_manifest || of_point.merged_digests;
        let unsettled = files.by_point.iter().filter(|(_, of_point)| waits(of_point));
        catalogue.unsettled = unsettled.map(|(name, _)| *name).collect();
        for (&name, of_point) in &files.by_point {
            match of_point.layer {
                Presence::Nothing => {}
                Presence::File => {
                    let point = catalogue.read_point(name, of_point);
                    catalogue.points.push(point);
                }
                Presence::Other => catalogue.newest_unseen = Some(name),
            }
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

    /// The newest point, sound or not.
    #[must_use]
    pub fn newest(&self) -> Option<&Point> {
        self.points.last()
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

    /// What killed runs left behind: files being written, and manifests and digests without their
    /// layer. The next run that writes removes them.
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
    /// for the next one that writes; or layers to put into the bases that they build upon, for the next one
    /// that prunes.
    #[must_use]
    pub fn is_unfinished(&self) -> bool {
        self.forgetting || !self.unsettled.is_empty() || self.points.iter().any(|point| point.base.is_some())
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

    /// The newest name that is in use, also by damaged points: the next one must be newer.
    #[must_use]
    pub fn last_name(&self) -> Option<PointName> {
        self.last_name
    }

    /// The ids of all chains that have points here, that of the newest point last. A directory has
    /// several when backups began anew.
    #[must_use]
    pub fn chain_ids(&self) -> Vec<ChainId> {
        let mut ids = Vec::new();
        for manifest in self.points.iter().filter_map(|point| point.manifest.as_ref()) {
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

    pub(super) fn no_such_point(&self, point: PointName) -> Problem {
        Problem::NoSuchPoint { path: self.path_of(point, FileKind::Layer), point }
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

    /// Reads header and manifest of one point and compares them.
    fn read_point(&mut self, name: PointName, files: &OfPoint) -> Point {
        let path = self.path_of(name, FileKind::Layer);
        let mut examined = Examined { path: path.clone(), problems: Vec::new(), fatal: None };
        let (layer_bytes, file_bytes) = match fs::symlink_metadata(&path) {
            Ok(metadata) => (metadata.blocks().saturating_mul(512), metadata.len()),
            Err(error) => {
                examined.fatal(Problem::Unreadable { path: path.clone(), cause: error.into() });
                (0, 0)
            }
        };
        let header = examined.header();
        let link = header.as_ref().and_then(|header| self.link(name, header, &mut examined));
        let base = link.and_then(|link| Some(self.read_base(link.base?, link.parent)));
        let merged = self.merged_manifest(name, files, link);
        let is_merged = merged.is_some();
        let digests = match is_merged && files.merged_digests {
            true => self.directory.join(self.file_of(name, FileKind::Digests).merged_name()),
            false => self.path_of(name, FileKind::Digests),
        };
        let manifest = merged.or_else(|| self.read_manifest(name, &mut examined));
        if let Some(manifest) = &manifest {
            self.check_digests_length(manifest, files, &digests, &mut examined);
        }
        if let Some(manifest) = &manifest {
            examined.compare(manifest, header.as_ref(), link, file_bytes);
        }
        let linked = link;
        let link = link.or(manifest.as_ref().map(Link::of));
        let layer_bytes = layer_bytes.saturating_add(base.as_ref().map_or(0, |base| base.layer_bytes));
        self.bases.extend(base);
        let fatal = examined.fatal.map(|index| self.problems.len() + index);
        self.problems.append(&mut examined.problems);
        Point {
            name,
            path,
            kind: link.map(|link| match link.parent {
                Some(_) => PointKind::Incremental,
                None => PointKind::Full,
            }),
            parent: link.and_then(|link| link.parent),
            base: link.and_then(|link| link.base),
            header,
            manifest,
            layer_bytes,
            file_bytes,
            digests,
            linked,
            sound: false,
            fatal,
        }
    }

    /// The layer that a point of this name has left, as a point. Its header was read before.
    fn read_base(&self, name: PointName, parent: Option<PointName>) -> Point {
        let path = self.base_path(name, FileKind::Layer);
        let metadata = fs::symlink_metadata(&path).ok();
        Point {
            name,
            kind: None,
            parent,
            base: None,
            header: Header::read(&path).ok(),
            manifest: None,
            layer_bytes: metadata.as_ref().map_or(0, |metadata| metadata.blocks().saturating_mul(512)),
            file_bytes: metadata.map_or(0, |metadata| metadata.len()),
            digests: self.base_path(name, FileKind::Digests),
            linked: Some(Link { parent, base: None }),
            sound: false,
            fatal: None,
            path,
        }
    }

    /// Where a file of a point is while its layer outlives it.
    pub(crate) fn base_path(&self, point: PointName, kind: FileKind) -> PathBuf {
        self.directory.join(self.file_of(point, kind).base_name())
    }

    /// The manifest that a merge has put beside the other, if the layer is that of the merge: it builds
    /// upon something else than before.
    fn merged_manifest(&self, name: PointName, files: &OfPoint, link: Option<Link>) -> Option<Manifest> {
        if !files.merged_manifest {
            return None;
        }
        let path = self.directory.join(self.file_of(name, FileKind::Manifest).merged_name());
        let manifest = Manifest::read(&path, &self.image, name).ok()?;
        (link == Some(Link::of(&manifest))).then_some(manifest)
    }

    fn read_manifest(&self, name: PointName, examined: &mut Examined) -> Option<Manifest> {
        let path = self.path_of(name, FileKind::Manifest);
        match Manifest::read(&path, &self.image, name) {
            Ok(manifest) => Some(manifest),
            Err(ManifestError::Missing) if name.is_python() => None,
            Err(cause) => {
                examined.problems.push(Problem::Manifest { path, cause: cause.into() });
                None
            }
        }
    }

    fn check_digests_length(
        &self,
        manifest: &Manifest,
        files: &OfPoint,
        path: &Path,
        examined: &mut Examined,
    ) {
        let path = path.to_owned();
        let expected = manifest.digests.bytes;
        match fs::symlink_metadata(&path) {
            // Something else of that name was reported as such.
            _ if files.digests == Presence::Other => {}
            Ok(metadata) if metadata.len() == expected => {}
            Ok(metadata) => {
                examined.problems.push(Problem::DigestsLength { path, found: metadata.len(), expected });
            }
            Err(_) => examined.problems.push(Problem::DigestsMissing { path }),
        }
    }

    /// What the layer builds upon by its header.
    fn link(&self, name: PointName, header: &Header, examined: &mut Examined) -> Option<Link> {
        let path = examined.path.clone();
        let backing = match header.chain_backing() {
            Ok(Some(backing)) => backing.to_owned(),
            Ok(None) => return Some(Link { parent: None, base: None }),
            Err(cause) => {
                examined.fatal(Problem::Header { path, cause: cause.into() });
                return None;
            }
        };
        if backing == PYTHON_ROOT && name.is_python() {
            self.check_python_root(examined);
            return Some(Link { parent: None, base: None });
        }
        let below = |file: Option<PointFile>| match file {
            Some(PointFile { image, point, kind: FileKind::Layer })
                if image == self.image && point < name =>
            {
                Some(point)
            }
            _ => None,
        };
        if let Some(base) = below(PointFile::parse_base(&backing)) {
            return self.link_through(base, examined);
        }
        let Some(parent) = below(PointFile::parse(&backing)) else {
            examined.fatal(Problem::ForeignBacking { path, backing });
            return None;
        };
        if !self.directory.join(&backing).exists() {
            examined.fatal(Problem::ParentMissing { path, parent });
        }
        Some(Link { parent: Some(parent), base: None })
    }

    /// What a layer builds upon that builds upon the base of the given name.
    fn link_through(&self, base: PointName, examined: &mut Examined) -> Option<Link> {
        let path = self.base_path(base, FileKind::Layer);
        let header =
            match Header::read(&path).and_then(|header| header.check_restore_point().map(|()| header)) {
                Ok(header) => header,
                Err(cause) => {
                    examined.fatal(Problem::Header { path, cause: cause.into() });
                    return None;
                }
            };
        let mut of_base = Examined { path, problems: Vec::new(), fatal: None };
        let link = self.link(base, &header, &mut of_base);
        if let Some(fatal) = of_base.fatal {
            examined.fatal(of_base.problems.swap_remove(fatal));
        }
        let link = link?;
        if link.base.is_some() {
            // No merge makes such a thing.
            let (path, backing) = (examined.path.clone(), self.file_of(base, FileKind::Layer).base_name());
            examined.fatal(Problem::ForeignBacking { path, backing });
            return None;
        }
        Some(Link { parent: link.parent, base: Some(base) })
    }

    /// A layer upon `empty.qcow2` is a full backup as long as that really is an empty image.
    fn check_python_root(&self, examined: &mut Examined) {
        let path = self.directory.join(PYTHON_ROOT);
        match Header::read(&path) {
            Ok(root) if root.backing.is_none() && root.check_restore_point().is_ok() => {}
            Ok(_) => {
                let path = examined.path.clone();
                examined.fatal(Problem::ForeignBacking { path, backing: PYTHON_ROOT.to_owned() });
            }
            Err(cause) => examined.fatal(Problem::Header { path, cause: cause.into() }),
        }
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
        self.leftovers = files.partial.clone();
        let mut unused = Vec::new();
        // A layer of which nobody can tell what it builds upon may need any base.
        if self.newest_unlinked().is_none() {
            for (&name, of_point) in files.by_point.iter().filter(|(name, _)| self.base(**name).is_none()) {
                let kinds =
                    [(FileKind::Layer, of_point.base_layer), (FileKind::Digests, of_point.base_digests)];
                let there = kinds.into_iter().filter(|(_, there)| *there);
                unused.extend(there.map(|(kind, _)| self.base_path(name, kind)));
            }
        }
        self.leftovers.append(&mut unused);
        for (&name, of_point) in &files.by_point {
            // Where a child still asks for the layer it was lost, not left over: what is known of
            // it may be needed to mend the chain.
            if of_point.layer != Presence::Nothing || needed.contains(&name) {
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

/// A point under examination: its layer, and what was found out about it.
struct Examined {
    path: PathBuf,
    problems: Vec<Problem>,
    /// The first one that keeps the layer from being read.
    fatal: Option<usize>,
}

impl Examined {
    fn fatal(&mut self, problem: Problem) {
        self.fatal.get_or_insert(self.problems.len());
        self.problems.push(problem);
    }

    fn header(&mut self) -> Option<Header> {
        let path = self.path.clone();
        match Header::read(&self.path) {
            Ok(header) => {
                if let Err(cause) = header.check_restore_point() {
                    self.fatal(Problem::Header { path, cause: cause.into() });
                }
                Some(header)
            }
            Err(cause) => {
                self.fatal(Problem::Header { path, cause: cause.into() });
                None
            }
        }
    }

    /// Reports what manifest and layer do not agree about.
    fn compare(&mut self, manifest: &Manifest, header: Option<&Header>, link: Option<Link>, file_bytes: u64) {
        let mut disagree = |what, layer: String, manifest: String| {
            if layer != manifest {
                let path = self.path.clone();
                self.fatal(Problem::Disagreement { path, what, layer, manifest });
            }
        };
        let name = |parent: Option<PointName>| parent.map_or("none".to_owned(), |parent| parent.to_string());
        if let Some(link) = link {
            disagree("parent", name(link.parent), name(manifest.parent));
            disagree("base", name(link.base), name(manifest.base));
        }
        if let Some(header) = header {
            let record = &manifest.record;
            let size = record.layer_size();
            disagree("virtual size", header.virtual_size.to_string(), size.to_string());
            let clusters = header.cluster_bits.size();
            disagree("cluster size", clusters.to_string(), record.cluster_size.to_string());
            disagree("extended L2", header.extended_l2.to_string(), record.extended_l2.to_string());
        }
        if file_bytes < manifest.file_bytes {
            let (path, expected) = (self.path.clone(), manifest.file_bytes);
            self.fatal(Problem::Truncated { path, found: file_bytes, expected });
        } else {
            disagree("file length", file_bytes.to_string(), manifest.file_bytes.to_string());
        }
    }
}

#[cfg(test)]
mod tests;

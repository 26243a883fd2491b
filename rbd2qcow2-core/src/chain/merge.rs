//! Replacing the layer of a point by one that takes over what the points below it hold.
//!
//! A point has three files, and no rename changes three at once. So the new manifest and digests are put
//! beside the old ones first, under names of their own (`.<file>.merged`); then the new layer is renamed
//! over the old one, which is the commit; then the other two follow. A reader that comes in between finds
//! two manifests, of which just one names the parent that the layer's header names: that one counts
//! ([`Catalogue`] knows). The next run that writes completes what was committed, and removes what was not.
//! Where nobody can tell, it touches nothing.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::catalogue::{Link, Point};
use super::digests::{DigestWriter, DigestsError, DigestsInfo};
use super::error::ChainError;
use super::manifest::{Manifest, ManifestError, Record};
use super::names::{FileKind, PointFile, PointName};
use super::planned::Planned;
use super::{ChainWriter, Paths, durable};
use crate::error::Causes;

/// A layer that is being written to replace a point's. Dropping it removes whatever was written aside;
/// [`commit`](Self::commit) puts it into the old one's place.
#[derive(Debug)]
#[must_use]
pub struct PendingMerge<'w> {
    pub(super) writer: &'w ChainWriter,
    pub(super) child: PointName,
    pub(super) below: Link,
    pub(super) cluster_size: u32,
    pub(super) paths: Paths,
    /// The file that is to become the point's layer.
    pub(super) layer: PathBuf,
    /// What the point's manifest says so far; `None` for a point of the Python tool.
    pub(super) manifest: Option<Manifest>,
    /// `None` for a point without a manifest, and within [`commit`](Self::commit).
    pub(super) digests: Option<Digests>,
    /// The files that exist, or may, and go with this unless it is committed.
    pub(super) files: Vec<PathBuf>,
}

/// The digests of a layer that is to replace another.
#[derive(Debug)]
pub(super) enum Digests {
    /// They are being written.
    New(DigestWriter),
    /// They are those of a base, and stay where they are until the layer is in place.
    OfBase(PathBuf, DigestsInfo),
}

/// What a merged layer builds upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Onto {
    /// A point that stays, or nothing.
    Point(Option<PointName>),
    /// The layer that a point leaves behind when it goes.
    Base(PointName),
}

/// What a layer that replaces another is.
#[derive(Clone, Debug)]
pub struct MergedLayer {
    /// The size that its header tells, in bytes.
    pub virtual_size: u64,
    /// Whether its clusters have subclusters.
    pub extended_l2: bool,
    /// What the point's manifest is to say; `None` for a point without one.
    pub record: Option<Record>,
    /// The points that never had digests whose data the layer has taken over, and those that these had
    /// taken over. What the point's manifest says of earlier merges is added.
    pub unverified: BTreeSet<PointName>,
}

impl ChainWriter {
    /// Begins a layer that is to replace the one of `child` and to build upon `onto`, one of the
    /// points below, or upon nothing. `cluster_size` is the new layer's, in bytes. Nothing is visible to
    /// readers until [`PendingMerge::commit`].
    ///
    /// # Errors
    /// [`ChainError::ParentUnsound`] where `child` cannot be read, or `onto` is not below it;
    /// [`ChainError::NothingToMerge`] where it builds upon that already;
    /// [`ChainError::ManifestUnusable`]; [`ChainError::Io`], [`ChainError::Digests`].
    pub fn begin_merge(
        &self,
        child: PointName,
        onto: Onto,
        cluster_size: u32,
    ) -> Result<PendingMerge<'_>, ChainError> {
        let points = self.catalogue.ancestry(child).map_err(|cause| self.unsound(child, cause))?;
        let find = |name| {
            let found = points[1..].iter().find(|point| point.name == name);
            found.ok_or_else(|| self.unsound(name, self.catalogue.no_such_point(name)))
        };
        let below = match onto {
            Onto::Point(parent) => {
                let is_point = |parent| find(parent).map(|_| self.catalogue.point(parent).is_some());
                if let Some(parent) = parent
                    && !is_point(parent)?
                {
                    return Err(self.unsound(parent, self.catalogue.no_such_point(parent)));
                }
                Link { parent, base: None }
            }
            Onto::Base(base) => Link { parent: find(base)?.parent, base: Some(base) },
        };
        // By what it builds upon the new layer is told from the old one.
        if (Link { parent: points[0].parent, base: points[0].base }) == below {
            return Err(ChainError::NothingToMerge { path: self.directory.clone(), point: child });
        }
        let paths = Paths::new(self, child);
        let (layer, mut files) = (paths.layer_partial.clone(), vec![paths.layer_partial.clone()]);
        let manifest = self.manifest_to_replace(points[0])?;
        let digests = match &manifest {
            None => None,
            Some(_) => {
                files.push(paths.digests_partial.clone());
                Some(Digests::New(DigestWriter::create(&paths.digests_partial, cluster_size)?))
            }
        };
        Ok(PendingMerge { writer: self, child, below, cluster_size, paths, layer, manifest, digests, files })
    }

    fn unsound(&self, point: PointName, cause: super::Problem) -> ChainError {
        ChainError::ParentUnsound { path: self.directory.clone(), point, cause: cause.into() }
    }

    /// The manifest of a point whose layer is to be replaced; `None` for a point that never had one.
    pub(super) fn manifest_to_replace(&self, point: &Point) -> Result<Option<Manifest>, ChainError> {
        if let Some(manifest) = &point.manifest {
            return Ok(Some(manifest.clone()));
        }
        let path = self.file(point.name, FileKind::Manifest);
        match Manifest::read(&path, &self.image, point.name) {
            Err(ManifestError::Missing) if point.name.is_python() => Ok(None),
            Err(cause) => Err(ChainError::ManifestUnusable { path, cause }),
            Ok(manifest) => Ok(Some(manifest)),
        }
    }

    /// Completes merges that were committed when their run was cut short, and removes what is left of
    /// those that were not.
    ///
    /// # Errors
    /// [`ChainError::MergeUnclear`] where it cannot be told which of the two it is; nothing of that merge
    /// is touched. [`ChainError::Io`].
    pub(super) fn settle_merges(&mut self) -> Result<(), ChainError> {
        let unsettled = self.catalogue.unsettled().to_vec();
        if unsettled.is_empty() {
            return Ok(());
        }
        // The layer's name must not be lost when the other files have got theirs.
        durable::sync_directory(&self.directory)?;
        for name in &unsettled {
            if self.is_committed(*name)? {
                let layer = self.file(*name, FileKind::Layer);
                log::info!("completing the merge into {}, which was interrupted", layer.display());
                self.settle(*name)?;
            } else {
                log::info!("removing what an interrupted merge into point {name} left behind");
                // The manifest tells that there is a merge: it goes first.
                durable::remove(&self.merged(*name, FileKind::Manifest))?;
                durable::remove(&self.merged(*name, FileKind::Digests))?;
                durable::sync_directory(&self.directory)?;
            }
        }
        self.refresh()
    }

    /// Whether the files that wait beside those of a point belong to its layer. That is only said where
    /// something was read that proves it, and so is the contrary.
    fn is_committed(&self, name: PointName) -> Result<bool, ChainError> {
        let (waiting, digests) =
            (self.merged(name, FileKind::Manifest), self.merged(name, FileKind::Digests));
        let unclear = |path: &Path, reason| Err(ChainError::MergeUnclear { path: path.to_owned(), reason });
        let read = |path: &Path| Manifest::read(path, &self.image, name);
        let old = read(&self.file(name, FileKind::Manifest));
        let new = match read(&waiting) {
            // Only digests wait: those of a merge that was not committed, unless the manifest that is in
            // place names them.
            Err(ManifestError::Missing) => {
                let Ok(manifest) = old else {
                    return unclear(&digests, "the point's manifest cannot be read");
                };
                return match manifest.digests.check_file(&digests) {
                    Ok(()) => Ok(true),
                    Err(DigestsError::OtherFile) => Ok(false),
                    Err(_) => unclear(&digests, "it cannot be read"),
                };
            }
            new => new,
        };
        let Some(link) = self.catalogue.point(name).and_then(|point| point.linked) else {
            return unclear(&waiting, "the layer's header cannot be read, or names a foreign file");
        };
        let names =
            |manifest: &Result<Manifest, _>| manifest.as_ref().is_ok_and(|found| Link::of(found) == link);
        match (names(&old), names(&new)) {
            (false, true) => Ok(true),
            (true, false) => Ok(false),
            (true, true) => unclear(&waiting, "both manifests name the parent that the layer has"),
            (false, false) => {
                unclear(&waiting, "no manifest that can be read names the parent that the layer has")
            }
        }
    }

    /// Gives the merged digests and manifest of a point their names.
    fn settle(&self, name: PointName) -> Result<(), ChainError> {
        let place = |kind| -> Result<(), ChainError> {
            let waiting = self.merged(name, kind);
            if waiting.try_exists().map_err(ChainError::io("look at", &waiting))? {
                durable::replace(&waiting, &self.file(name, kind))?;
                durable::sync_directory(&self.directory)?;
            }
            Ok(())
        };
        // The manifest comes last, when the digests have their name for good: it tells that there is
        // something to settle.
        place(FileKind::Digests)?;
        place(FileKind::Manifest)
    }

    pub(super) fn file(&self, point: PointName, kind: FileKind) -> PathBuf {
        self.directory.join(PointFile { image: self.image.clone(), point, kind }.file_name())
    }

    fn merged(&self, point: PointName, kind: FileKind) -> PathBuf {
        self.directory.join(PointFile { image: self.image.clone(), point, kind }.merged_name())
    }
}

impl PendingMerge<'_> {
    /// What the point's manifest says so far; `None` for a point of the Python tool, which has none.
    #[must_use]
    pub fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_ref()
    }

    /// Where the layer is written.
    #[must_use]
    pub fn layer_path(&self) -> &Path {
        &self.layer
    }

    /// The backing file to name in the layer's header; `None` where the point becomes a full one.
    #[must_use]
    pub fn backing_name(&self) -> Option<String> {
        let file = |point| PointFile { image: self.writer.image.clone(), point, kind: FileKind::Layer };
        let base = self.below.base.map(|base| file(base).base_name());
        base.or_else(|| self.below.parent.map(|parent| file(parent).file_name()))
    }

    /// Takes the digests of what the layer provides; `None` for a point without a manifest, which has
    /// none.
    #[must_use]
    pub fn digests(&self) -> Option<&DigestWriter> {
        match &self.digests {
            Some(Digests::New(digests)) => Some(digests),
            Some(Digests::OfBase(..)) | None => None,
        }
    }

    /// Puts the layer into the old one's place. Its writer must have finished.
    ///
    /// The points that build upon the child read the same before and after, and at any moment between.
    ///
    /// # Errors
    /// [`ChainError`]. With [`ChainError::CommitUncertain`] the new layer may be in place, or come to be
    /// after a power failure; the points below must stay until that is certain. After every other error
    /// before the commit all points are as they were. The next run completes or removes what is left.
    ///
    /// # Panics
    /// Where the point has a manifest, and `layer` has nothing for it.
    pub fn commit(mut self, layer: MergedLayer) -> Result<(), ChainError> {
        let planned = Planned {
            path: &self.layer,
            backing: self.backing_name(),
            virtual_size: layer.virtual_size,
            cluster_size: self.cluster_size,
        };
        let (file_bytes, layer_bytes) = planned.seal(Some(layer.extended_l2))?;
        durable::take_after(&self.layer, &self.paths.layer)?;
        let digests = match self.digests.take() {
            None => None,
            Some(Digests::New(digests)) => Some((self.paths.digests_partial.clone(), digests.finish()?)),
            Some(Digests::OfBase(path, info)) => Some((path, info)),
        };
        let with_manifest = digests.is_some();
        if let Some((path, digests)) = digests {
            let before = self.manifest.as_ref().map(|manifest| manifest.unverified.clone());
            let manifest = Manifest {
                tool: Manifest::this_tool(),
                image: self.writer.image.clone(),
                point: self.child,
                parent: self.below.parent,
                base: self.below.base,
                record: layer.record.expect("the point has a manifest"),
                file_bytes,
                layer_bytes,
                digests,
                // Whoever holds the point goes on holding it.
                hold: self.manifest.as_ref().and_then(|manifest| manifest.hold.clone()),
                // A set that only grows: nobody can tell which of these data were overwritten since.
                unverified: &layer.unverified | &before.unwrap_or_default(),
            };
            self.put_beside(&manifest, &path)?;
        }
        // Whether a rename that failed has come about, after all, only the next run can tell. It needs
        // what waits beside.
        self.files.retain(|path| *path == self.layer);
        durable::replace(&self.layer, &self.paths.layer)?;
        // From here on it is not ours to remove.
        self.files.clear();
        durable::sync_directory(&self.writer.directory).map_err(|cause| ChainError::CommitUncertain {
            path: self.paths.layer.clone(),
            cause: cause.into(),
        })?;
        if with_manifest { self.writer.settle(self.child) } else { Ok(()) }
    }

    /// Puts manifest and digests beside those that they are to replace.
    fn put_beside(&mut self, manifest: &Manifest, digests: &Path) -> Result<(), ChainError> {
        let bytes = manifest.to_bytes();
        let bytes =
            bytes.map_err(|cause| ChainError::Manifest { path: self.paths.manifest.clone(), cause })?;
        durable::write_aside(&self.paths.manifest_partial, &bytes)?;
        self.files.push(self.paths.manifest_partial.clone());
        durable::take_after(&self.paths.manifest_partial, &self.paths.manifest)?;
        let beside = |kind| self.writer.merged(self.child, kind);
        let (waiting, manifest) = (beside(FileKind::Digests), beside(FileKind::Manifest));
        self.files.push(waiting.clone());
        if digests == self.paths.digests_partial {
            durable::take_after(digests, &self.paths.digests)?;
            durable::replace(digests, &waiting)?;
        } else {
            durable::link(digests, &waiting)?;
        }
        self.files.push(manifest.clone());
        durable::replace(&self.paths.manifest_partial, &manifest)?;
        // A power failure must not keep the layer's name and lose the manifest's.
        durable::sync_directory(&self.writer.directory)
    }
}

impl Drop for PendingMerge<'_> {
    fn drop(&mut self) {
        // The manifest beside, which tells that there is a merge, was put there last.
        for path in self.files.iter().rev() {
            if let Err(error) = durable::remove(path) {
                // The reason for the drop is reported by whoever dropped it.
                log::warn!("{}; the next run tries again", Causes(&error));
            }
        }
    }
}

#[cfg(test)]
mod tests;

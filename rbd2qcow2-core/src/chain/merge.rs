//! Replacing the layer of a point by one that takes over what the points below it hold, and forgetting
//! points.
//!
//! A point has three files, and no rename changes three at once. So the new manifest and digests are put
//! beside the old ones first, under names of their own (`.<file>.merged`); then the new layer is renamed
//! over the old one, which is the commit; then the other two follow. A reader that comes in between finds
//! two manifests, of which just one names the parent that the layer's header names: that one counts
//! ([`Catalogue`] knows). The next run that writes completes what was committed, and removes what was not.
//!
//! Points that are to be forgotten are listed in a file before the first of them goes, so that the next
//! run can go on. What is listed goes only when no point builds upon it any more.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::digests::DigestWriter;
use super::error::ChainError;
use super::manifest::{Manifest, ManifestError, Record, read_bounded};
use super::names::{FileKind, PointFile, PointName};
use super::planned::Planned;
use super::{ChainWriter, FORGET_FILE, FORGET_PARTIAL, Paths, durable};
use crate::error::Causes;

/// Longest list of points to be forgotten that is read, in bytes.
const FORGET_MAX: u64 = 16 << 20;

/// Points to be forgotten, as they stand in the file.
#[derive(Serialize, Deserialize)]
struct Forget {
    format: u64,
    points: Vec<String>,
}

/// A layer that is being written to replace a point's. Dropping it removes whatever was written;
/// [`commit`](Self::commit) puts it into the old one's place.
#[derive(Debug)]
#[must_use]
pub struct PendingMerge<'w> {
    writer: &'w ChainWriter,
    child: PointName,
    parent: Option<PointName>,
    cluster_size: u32,
    paths: Paths,
    /// `None` for a point without a manifest, and within [`commit`](Self::commit).
    digests: Option<DigestWriter>,
    /// The files that exist, or may, and go with this unless it is committed.
    files: Vec<PathBuf>,
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
}

impl ChainWriter {
    /// Begins a layer that is to replace the one of `child` and to build upon `parent`, one of the
    /// points below, or upon nothing. `cluster_size` is the new layer's, in bytes. Nothing is visible to
    /// readers until [`PendingMerge::commit`].
    ///
    /// # Errors
    /// [`ChainError::ParentUnsound`] where `child` cannot be read, or `parent` is not below it;
    /// [`ChainError::Io`], [`ChainError::Digests`].
    pub fn begin_merge(
        &self,
        child: PointName,
        parent: Option<PointName>,
        cluster_size: u32,
    ) -> Result<PendingMerge<'_>, ChainError> {
        let unsound = |point, cause: super::Problem| ChainError::ParentUnsound {
            path: self.directory.clone(),
            point,
            cause: cause.into(),
        };
        let below = self.catalogue.ancestry(child).map_err(|cause| unsound(child, cause))?;
        if let Some(parent) = parent
            && !below[1..].iter().any(|point| point.name == parent)
        {
            return Err(unsound(parent, self.catalogue.no_such_point(parent)));
        }
        let paths = Paths::new(self, child);
        let mut files = vec![paths.layer_partial.clone()];
        let digests = match &below[0].manifest {
            None => None,
            Some(_) => {
                files.push(paths.digests_partial.clone());
                Some(DigestWriter::create(&paths.digests_partial, cluster_size)?)
            }
        };
        Ok(PendingMerge { writer: self, child, parent, cluster_size, paths, digests, files })
    }

    /// Completes merges that were committed when their run was cut short, and removes what is left of
    /// those that were not.
    pub(super) fn settle_merges(&mut self) -> Result<(), ChainError> {
        let unsettled = self.catalogue.unsettled().to_vec();
        for name in &unsettled {
            let (manifest, digests) =
                (self.merged(*name, FileKind::Manifest), self.merged(*name, FileKind::Digests));
            if self.catalogue.is_merged(*name) {
                log::info!(
                    "completing the merge into {}, which was interrupted",
                    self.file(*name, FileKind::Layer).display()
                );
                self.settle(*name)?;
            } else {
                log::info!("removing what an interrupted merge into point {name} left behind");
                // The manifest tells that there is a merge: it goes first.
                durable::remove(&manifest)?;
                durable::remove(&digests)?;
                durable::sync_directory(&self.directory)?;
            }
        }
        if unsettled.is_empty() { Ok(()) } else { self.refresh() }
    }

    /// Gives the merged digests and manifest of a point their names.
    fn settle(&self, name: PointName) -> Result<(), ChainError> {
        let digests = self.merged(name, FileKind::Digests);
        // The manifest comes last: it tells that there is something to settle.
        if digests.exists() {
            durable::replace(&digests, &self.file(name, FileKind::Digests))?;
        }
        durable::replace(&self.merged(name, FileKind::Manifest), &self.file(name, FileKind::Manifest))?;
        durable::sync_directory(&self.directory)
    }

    fn file(&self, point: PointName, kind: FileKind) -> PathBuf {
        self.directory.join(PointFile { image: self.image.clone(), point, kind }.file_name())
    }

    fn merged(&self, point: PointName, kind: FileKind) -> PathBuf {
        self.directory.join(PointFile { image: self.image.clone(), point, kind }.merged_name())
    }

    /// Notes durably which points are to be forgotten, so that the next run goes on if this one does not
    /// come to it. To be called before the merges that make way.
    ///
    /// # Errors
    /// [`ChainError::Io`]; nothing was changed then.
    pub fn note_forgetting(&self, points: &[PointName]) -> Result<(), ChainError> {
        let (partial, path) = (self.directory.join(FORGET_PARTIAL), self.directory.join(FORGET_FILE));
        let forget = Forget { format: 1, points: points.iter().map(ToString::to_string).collect() };
        let bytes = serde_json::to_vec_pretty(&forget)
            .map_err(|error| ChainError::io("write", &path)(std::io::Error::from(error)))?;
        durable::write_aside(&partial, &bytes)?;
        durable::replace(&partial, &path).inspect_err(|_| _ = durable::remove(&partial))?;
        durable::sync_directory(&self.directory)
    }

    /// Removes the points that were [noted](Self::note_forgetting), the newest first, as far as no point
    /// builds upon them; and the note. Returns those that were removed.
    ///
    /// # Errors
    /// [`ChainError::Io`]; the next run goes on.
    pub fn forget(&mut self) -> Result<Vec<PointName>, ChainError> {
        self.refresh()?;
        let mut gone = Vec::new();
        let mut points = self.noted_forgetting()?;
        points.sort_unstable();
        for name in points.into_iter().rev() {
            let points = || self.catalogue.points().iter();
            let needed = points().any(|point| point.parent == Some(name) && !gone.contains(&point.name));
            if needed || self.catalogue.point(name).is_none() {
                continue;
            }
            // Without its layer it is no point any more, and the rest is left over.
            for kind in [FileKind::Layer, FileKind::Manifest, FileKind::Digests] {
                durable::remove(&self.file(name, kind))?;
            }
            // What builds upon it must be gone for good before it goes itself.
            durable::sync_directory(&self.directory)?;
            gone.push(name);
        }
        if durable::remove(&self.directory.join(FORGET_FILE))? {
            durable::sync_directory(&self.directory)?;
        }
        self.refresh()?;
        Ok(gone)
    }

    /// Goes on where an interrupted run has left off.
    pub(super) fn finish_forgetting(&mut self) -> Result<(), ChainError> {
        if !self.directory.join(FORGET_FILE).exists() {
            return Ok(());
        }
        let gone = self.forget()?;
        if !gone.is_empty() {
            let gone: Vec<_> = gone.iter().map(ToString::to_string).collect();
            log::info!(
                "{}: an interrupted run was to forget {}; they are gone now",
                self.image,
                gone.join(", ")
            );
        }
        Ok(())
    }

    /// The points that were to be forgotten. A note that nobody understands asks for nothing.
    fn noted_forgetting(&self) -> Result<Vec<PointName>, ChainError> {
        let path = self.directory.join(FORGET_FILE);
        let bytes = match read_bounded(&path, FORGET_MAX) {
            Ok(bytes) => bytes,
            Err(ManifestError::Missing) => return Ok(Vec::new()),
            Err(ManifestError::Read(cause)) => return Err(ChainError::io("read", &path)(cause)),
            Err(error) => {
                log::warn!("{}: {}; nothing is forgotten on its account", path.display(), Causes(&error));
                return Ok(Vec::new());
            }
        };
        let forget = serde_json::from_slice::<Forget>(&bytes).ok().filter(|forget| forget.format == 1);
        let points = forget.map(|forget| forget.points).unwrap_or_else(|| {
            log::warn!("{} is damaged; nothing is forgotten on its account", path.display());
            Vec::new()
        });
        Ok(points.iter().filter_map(|point| PointName::parse(point).ok()).collect())
    }
}

impl PendingMerge<'_> {
    /// Where the layer is to be written. Nothing is there yet.
    #[must_use]
    pub fn layer_path(&self) -> &Path {
        &self.paths.layer_partial
    }

    /// The backing file to name in the layer's header; `None` where the point becomes a full one.
    #[must_use]
    pub fn backing_name(&self) -> Option<String> {
        let image = self.writer.image.clone();
        self.parent.map(|point| PointFile { image, point, kind: FileKind::Layer }.file_name())
    }

    /// Takes the digests of what the layer provides; `None` for a point without a manifest, which has
    /// none.
    #[must_use]
    pub fn digests(&self) -> Option<&DigestWriter> {
        self.digests.as_ref()
    }

    /// Puts the layer into the old one's place. Its writer must have finished.
    ///
    /// The points that build upon the child read the same before and after, and at any moment between.
    ///
    /// # Errors
    /// [`ChainError`]. With [`ChainError::CommitUncertain`] the new layer may be in place, or come to be
    /// after a power failure; the points below must stay until that is certain. After every other error
    /// before the commit all is as it was. The next run completes or removes what is left.
    ///
    /// # Panics
    /// Where the point has a manifest, and `layer` has nothing for it.
    pub fn commit(mut self, layer: MergedLayer) -> Result<(), ChainError> {
        let planned = Planned {
            path: &self.paths.layer_partial,
            backing: self.backing_name(),
            virtual_size: layer.virtual_size,
            cluster_size: self.cluster_size,
        };
        let (file_bytes, layer_bytes) = planned.seal(Some(layer.extended_l2))?;
        let digests = self.digests.take();
        let with_manifest = digests.is_some();
        if let Some(digests) = digests {
            let manifest = Manifest {
                tool: Manifest::this_tool(),
                image: self.writer.image.clone(),
                point: self.child,
                parent: self.parent,
                record: layer.record.expect("the point has a manifest"),
                file_bytes,
                layer_bytes,
                digests: digests.finish()?,
                hold: self.hold(),
            };
            self.put_beside(&manifest)?;
        }
        let layer = &self.paths.layer;
        durable::replace(&self.paths.layer_partial, layer)?;
        // From here on it is not ours to remove.
        self.files.clear();
        durable::sync_directory(&self.writer.directory)
            .map_err(|cause| ChainError::CommitUncertain { path: layer.clone(), cause: cause.into() })?;
        if with_manifest { self.writer.settle(self.child) } else { Ok(()) }
    }

    /// Whoever holds the point goes on holding it.
    fn hold(&self) -> Option<super::manifest::Hold> {
        self.writer.catalogue.point(self.child)?.manifest.as_ref()?.hold.clone()
    }

    /// Puts manifest and digests beside those that they are to replace.
    fn put_beside(&mut self, manifest: &Manifest) -> Result<(), ChainError> {
        let bytes = manifest.to_bytes();
        let bytes =
            bytes.map_err(|cause| ChainError::Manifest { path: self.paths.manifest.clone(), cause })?;
        durable::write_aside(&self.paths.manifest_partial, &bytes)?;
        self.files.push(self.paths.manifest_partial.clone());
        let beside = |kind| self.writer.merged(self.child, kind);
        let (digests, manifest) = (beside(FileKind::Digests), beside(FileKind::Manifest));
        self.files.push(digests.clone());
        durable::replace(&self.paths.digests_partial, &digests)?;
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

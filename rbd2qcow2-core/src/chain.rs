//! The directory of one image: its points, their files and how they come to be.
//!
//! Whoever reads takes a [`Catalogue`]. Whoever adds a point opens a [`ChainWriter`], which locks the
//! directory and clears away what killed runs left there; [begins](ChainWriter::begin) a
//! [`PendingLayer`], has the layer written to its [path](PendingLayer::layer_path), and
//! [commits](PendingLayer::commit) it. A point exists from the moment its layer has its name, which
//! is one rename; everything else about the point is on stable storage before that.
//!
//! Points are forgotten by [`ChainWriter::forget`]. Where others build upon them, a layer that takes over
//! what they hold [replaces](ChainWriter::begin_merge) the one above first.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::Access;

mod announcement;
mod base;
pub mod catalogue;
pub mod digests;
pub mod durable;
mod error;
mod forget;
pub mod hold;
mod lease;
pub mod lock;
pub mod manifest;
mod merge;
pub mod names;
mod owner;
mod planned;
mod retired;
mod suspect;

pub use announcement::Announcement;
pub use catalogue::{Catalogue, LostPoint, Point, PointKind, Problem, images_in};
pub use error::ChainError;
pub use manifest::{Manifest, Record};
pub use merge::{MergedLayer, Onto, PendingMerge};
pub use names::{ChainId, ImageName, PointName, SnapshotName};
pub use suspect::{Doubt, Suspicion};

use crate::error::Causes;
use digests::DigestWriter;
use lock::ChainLock;
use names::{FileKind, NameError, PointFile};
use planned::Planned;

/// Name of the note about a snapshot of a chain without points.
const ANNOUNCEMENT_FILE: &str = ".pending.json";

/// Its name while it is being written.
const ANNOUNCEMENT_PARTIAL: &str = ".pending.json.partial";

/// Name of the list of points that are to be forgotten.
const FORGET_FILE: &str = ".forget.json";

/// Its name while it is being written.
const FORGET_PARTIAL: &str = ".forget.json.partial";

/// Name of the list of chains that have no points any more.
const RETIRED_FILE: &str = ".retired";

/// Its name while it is being written.
const RETIRED_PARTIAL: &str = ".retired.partial";

/// Name of the note about points that may lack something.
const SUSPECT_FILE: &str = ".suspect.json";

/// Its name while it is being written.
const SUSPECT_PARTIAL: &str = ".suspect.json.partial";

/// The directory where the points of `image` are, in the destination `dest`. It need not exist.
#[must_use]
pub fn image_directory(dest: &Path, image: &ImageName) -> PathBuf {
    dest.join(image.encoded())
}

/// The directory of the image in the destination `dest` that `directory` is or lies in, if any: nothing
/// but points may be put there. `directory` must be canonical; the destination may lead through links.
///
/// # Errors
/// Those of [`images_in`].
pub fn image_directory_around(dest: &Path, directory: &Path) -> Result<Option<PathBuf>, ChainError> {
    let mut chains = images_in(dest)?.images.into_iter().map(|image| image_directory(dest, &image));
    let around = |chain: &PathBuf| chain.canonicalize().is_ok_and(|chain| directory.starts_with(chain));
    Ok(chains.find(around))
}

/// The directory of one image, locked for writing until this is dropped.
#[derive(Debug)]
pub struct ChainWriter {
    directory: PathBuf,
    image: ImageName,
    catalogue: Catalogue,
    /// What killed runs had left behind.
    removed: Vec<PathBuf>,
    lock: ChainLock,
}

/// What a new layer is going to be.
#[derive(Clone, Copy, Debug)]
pub struct LayerPlan<'a> {
    /// Its point, newer than all others: see [`ChainWriter::next_point`].
    pub point: PointName,
    /// The point to build upon; `None` for a full backup.
    pub parent: Option<&'a Point>,
    /// Bytes of a cluster.
    pub cluster_size: u32,
}

/// A point that was made.
#[derive(Clone, Debug)]
pub struct Committed {
    /// Its layer.
    pub path: PathBuf,
    /// What the layer takes on disk, in bytes.
    pub layer_bytes: u64,
    /// What was recorded.
    pub manifest: Manifest,
}

impl ChainWriter {
    /// Opens the directory of `image` in the destination `dest`, which must exist, for writing:
    /// creates the directory where there is none, locks it, waiting for a moment at most, and removes
    /// what killed runs left behind (see [`removed`](Self::removed)). Files that the program did not
    /// make are never touched.
    ///
    /// # Errors
    /// [`ChainError::DestinationMissing`], [`ChainError::NotADirectory`],
    /// [`ChainError::DestinationNotWritable`], [`ChainError::Locked`], [`ChainError::Io`].
    pub fn open(dest: &Path, image: &ImageName) -> Result<Self, ChainError> {
        check_destination(dest)?;
        let directory = image_directory(dest, image);
        durable::create_directory(&directory, dest)?;
        let metadata = fs::symlink_metadata(&directory).map_err(ChainError::io("look at", &directory))?;
        if !metadata.is_dir() {
            return Err(ChainError::NotADirectory { path: directory });
        }
        let lock = ChainLock::exclusive(&directory)?;
        let catalogue = Catalogue::read(&directory, image)?;
        let mut writer = Self { directory, image: image.clone(), catalogue, removed: Vec::new(), lock };
        writer.settle_merges()?;
        writer.clean()?;
        writer.finish_forgetting()?;
        Ok(writer)
    }

    /// Opens the directory of an `image` that has points, as [`open`](Self::open) does. A directory of
    /// something else gets no lock file, and none is created.
    ///
    /// # Errors
    /// [`ChainError::NoSuchImage`] also when there are no points, not even lost ones, and those of `open`.
    pub fn open_existing(dest: &Path, image: &ImageName) -> Result<Self, ChainError> {
        let path = image_directory(dest, image);
        match Catalogue::read(&path, image) {
            Ok(catalogue) if catalogue.is_empty() => Err(ChainError::NoSuchImage { path }),
            // The destination itself may be what is missing, which has its own words.
            Err(ChainError::NoSuchImage { .. }) if !dest.exists() => {
                Err(ChainError::DestinationMissing { path: dest.to_owned() })
            }
            Err(error) => Err(error),
            Ok(_) => Self::open(dest, image),
        }
    }

    /// Removes the left-overs that the catalogue found, and a note that has served its purpose.
    fn clean(&mut self) -> Result<(), ChainError> {
        if !self.catalogue.leftovers().is_empty() {
            // What makes them superfluous may be a name that a power failure would take back.
            durable::sync_directory(&self.directory)?;
        }
        let is_manifest = |path: &&PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.and_then(PointFile::parse).is_some_and(|file| file.kind == FileKind::Manifest)
        };
        let (manifests, others): (Vec<_>, Vec<_>) =
            self.catalogue.leftovers().iter().cloned().partition(|path| is_manifest(&path));
        // A manifest that has lost what is beside it would be that of a lost point.
        for (files, last) in [(manifests, false), (others, true)] {
            let before = self.removed.len();
            for path in files {
                log::info!("removing {}, left behind by an interrupted run", path.display());
                if durable::remove(&path)? {
                    self.removed.push(path);
                }
            }
            if !last && self.removed.len() > before {
                durable::sync_directory(&self.directory)?;
            }
        }
        if !self.removed.is_empty() {
            durable::sync_directory(&self.directory)?;
            self.refresh()?;
        }
        // The run that made the note may have been killed between its commit and the removal of the
        // note. The snapshot is that of a point then (whose manifest may be damaged by now) and must
        // not be deleted on the note's account.
        if let Ok(Some(Announcement { snapshot, .. })) = self.announced() {
            let begun = self.catalogue.chain_ids().contains(&snapshot.chain);
            if begun || self.catalogue.point(snapshot.point).is_some() {
                self.clear_announcement()?;
            }
        }
        Ok(())
    }

    /// Reads the directory again, after a commit for instance.
    ///
    /// # Errors
    /// Those of [`Catalogue::read`].
    pub fn refresh(&mut self) -> Result<(), ChainError> {
        self.catalogue = Catalogue::read(&self.directory, &self.image)?;
        Ok(())
    }

    /// What the directory held when it was opened, or at the last [`refresh`](Self::refresh).
    #[must_use]
    pub fn catalogue(&self) -> &Catalogue {
        &self.catalogue
    }

    /// The directory of the image.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The numbers of the cluster's clients that earlier runs were, of the last five minutes. They are gone,
    /// though the cluster may take one that was killed for alive.
    #[must_use]
    pub fn earlier_clients(&self) -> Vec<u64> {
        self.lock.earlier_clients()
    }

    /// Notes which of the cluster's clients this run is, for [`earlier_clients`](Self::earlier_clients) of the
    /// next one. Best effort.
    pub fn note_client(&self, number: u64) {
        self.lock.note_client(number);
    }

    /// The files of killed runs that were removed when the directory was opened.
    #[must_use]
    pub fn removed(&self) -> &[PathBuf] {
        &self.removed
    }

    /// The name for a point taken `now`, and whether the clock stands at or before the newest point
    /// (the name is then one second after that point's).
    ///
    /// # Errors
    /// [`ChainError::Name`] when the time cannot be named.
    pub fn next_point(&self, now: jiff::Timestamp) -> Result<(PointName, bool), ChainError> {
        PointName::next_after(self.catalogue.last_name(), now).map_err(|cause| self.name_error(cause))
    }

    fn name_error(&self, cause: NameError) -> ChainError {
        ChainError::Name { path: self.directory.clone(), cause }
    }

    /// Begins a layer: reserves the names of its files and creates the file of digests. Nothing is
    /// visible to readers until [`PendingLayer::commit`].
    ///
    /// # Errors
    /// [`ChainError::NotNewest`], [`ChainError::ParentUnsound`], [`ChainError::Io`],
    /// [`ChainError::Digests`].
    pub fn begin(&self, plan: LayerPlan<'_>) -> Result<PendingLayer<'_>, ChainError> {
        let LayerPlan { point, parent, cluster_size } = plan;
        if let Some(newest) = self.catalogue.last_name()
            && point <= newest
        {
            return Err(ChainError::NotNewest { path: self.directory.clone(), point, newest });
        }
        let parent = parent.map(|parent| parent.name);
        if let Some(parent) = parent {
            self.catalogue.ancestry(parent).map_err(|cause| ChainError::ParentUnsound {
                path: self.directory.clone(),
                point: parent,
                cause: cause.into(),
            })?;
        }
        let paths = Paths::new(self, point);
        let digests = DigestWriter::create(&paths.digests_partial, cluster_size)?;
        let files = vec![paths.layer_partial.clone(), paths.digests_partial.clone()];
        Ok(PendingLayer { writer: self, point, parent, cluster_size, paths, digests: Some(digests), files })
    }

    /// Notes durably that a snapshot is about to be made for a chain that has no point yet. Must
    /// return before the snapshot is made. Replaces an older note, whose snapshot must be gone by
    /// then.
    ///
    /// # Errors
    /// [`ChainError::Io`]; the snapshot must then not be made.
    pub fn announce(&self, announcement: &Announcement) -> Result<(), ChainError> {
        announcement.write(&self.directory, &self.image)
    }

    /// The note of a run that was killed before the first point of its chain was committed. The
    /// snapshot it names may exist, belongs to no point, and may be deleted; then
    /// [`clear_announcement`](Self::clear_announcement).
    ///
    /// # Errors
    /// [`ChainError::AnnouncementDamaged`], [`ChainError::Io`].
    pub fn announced(&self) -> Result<Option<Announcement>, ChainError> {
        self.catalogue.announced()
    }

    /// The ids of all chains that have, or had, points here: those whose snapshots may be removed. That
    /// of the newest point is the last.
    ///
    /// # Errors
    /// [`ChainError::Io`].
    pub fn own_chains(&self) -> Result<Vec<ChainId>, ChainError> {
        let mut ids = retired::read(&self.directory)?;
        let present = self.catalogue.chain_ids();
        ids.retain(|id| !present.contains(id));
        ids.extend(present);
        Ok(ids)
    }

    /// Notes durably that the last points of some chains are about to be removed, so that their snapshots
    /// are known later. Must return before the points go.
    ///
    /// # Errors
    /// [`ChainError::Io`]; the points must then stay.
    pub fn retire(&self, chains: &[ChainId]) -> Result<(), ChainError> {
        retired::add(&self.directory, chains)
    }

    /// Removes the note, durably: after the first commit of the chain, or when the snapshot is gone.
    ///
    /// # Errors
    /// [`ChainError::Io`]; the next run finds the note and clears it.
    pub fn clear_announcement(&self) -> Result<(), ChainError> {
        Announcement::clear(&self.directory)
    }
}

/// Checks that `dest` is a directory in which something can be created.
fn check_destination(dest: &Path) -> Result<(), ChainError> {
    let path = dest.to_owned();
    match fs::metadata(dest) {
        Ok(metadata) if !metadata.is_dir() => return Err(ChainError::NotADirectory { path }),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(ChainError::DestinationMissing { path });
        }
        Err(error) => return Err(ChainError::io("look at the destination", dest)(error)),
    }
    rustix::fs::access(dest, Access::WRITE_OK | Access::EXEC_OK)
        .map_err(|error| ChainError::DestinationNotWritable { path, cause: error.into() })
}

/// Where the files of a point are, and where they are while they are being written.
#[derive(Debug)]
struct Paths {
    layer: PathBuf,
    layer_partial: PathBuf,
    manifest: PathBuf,
    manifest_partial: PathBuf,
    digests: PathBuf,
    digests_partial: PathBuf,
}

impl Paths {
    fn new(writer: &ChainWriter, point: PointName) -> Self {
        let paths = |kind| {
            let file = PointFile { image: writer.image.clone(), point, kind };
            (writer.directory.join(file.file_name()), writer.directory.join(file.partial_name()))
        };
        let (layer, layer_partial) = paths(FileKind::Layer);
        let (manifest, manifest_partial) = paths(FileKind::Manifest);
        let (digests, digests_partial) = paths(FileKind::Digests);
        Self { layer, layer_partial, manifest, manifest_partial, digests, digests_partial }
    }
}

/// A layer that is being written. Dropping it removes whatever was written;
/// [`commit`](Self::commit) makes it a point.
#[derive(Debug)]
#[must_use]
pub struct PendingLayer<'w> {
    writer: &'w ChainWriter,
    point: PointName,
    parent: Option<PointName>,
    cluster_size: u32,
    paths: Paths,
    /// `None` only within [`commit`](Self::commit).
    digests: Option<DigestWriter>,
    /// The files that exist, or may, and go with this unless it is committed. The layer is first: it
    /// is what takes up room.
    files: Vec<PathBuf>,
}

impl PendingLayer<'_> {
    /// Where the layer is to be written. Nothing is there yet.
    #[must_use]
    pub fn layer_path(&self) -> &Path {
        &self.paths.layer_partial
    }

    /// The backing file to name in the layer's header, as it is to stand there: the file name of the
    /// parent's layer, in the same directory. `None` for a full backup.
    #[must_use]
    pub fn backing_name(&self) -> Option<String> {
        let image = self.writer.image.clone();
        self.parent.map(|point| PointFile { image, point, kind: FileKind::Layer }.file_name())
    }

    /// The point that this becomes.
    #[must_use]
    pub fn point(&self) -> PointName {
        self.point
    }

    /// Takes the digests of what the layer provides.
    ///
    /// # Panics
    /// Never: it is there until the commit.
    #[must_use]
    pub fn digests(&self) -> &DigestWriter {
        self.digests.as_ref().expect("only the commit takes it")
    }

    /// Makes the layer a point. The layer's writer must have finished: all data flushed, the file
    /// closed.
    ///
    /// In this order: the digests are completed and synced; the layer's header is read once more and
    /// compared with `record`, the layer is made read-only and synced; the manifest is written aside
    /// and synced, and so is the directory; digests and manifest get their names and the directory is
    /// synced; the layer gets its name, which is the commit; the directory is synced again.
    ///
    /// # Errors
    /// With [`ChainError::CommitUncertain`] the point has its name, but may not survive a power
    /// failure; it must not count as made, nor may it be deleted. After every other error the point
    /// does not exist and its files were removed, or, where even that failed, will be removed by the
    /// next run; all other points are as they were. If the process dies, the same holds: a point
    /// without its layer's name is removed by the next run, and one with it is complete.
    pub fn commit(mut self, record: Record) -> Result<Committed, ChainError> {
        let Some(digests) = self.digests.take() else { unreachable!("only the commit takes it") };
        let digests = digests.finish()?;
        let (file_bytes, layer_bytes) = self.seal_layer(&record)?;
        let manifest = Manifest {
            tool: Manifest::this_tool(),
            image: self.writer.image.clone(),
            point: self.point,
            parent: self.parent,
            base: None,
            record,
            file_bytes,
            layer_bytes,
            digests,
            hold: None,
            unverified: BTreeSet::new(),
        };
        let bytes = manifest.to_bytes();
        let bytes =
            bytes.map_err(|cause| ChainError::Manifest { path: self.paths.manifest.clone(), cause })?;
        durable::write_aside(&self.paths.manifest_partial, &bytes)?;
        self.files.push(self.paths.manifest_partial.clone());
        // The manifest must not get its name where the layer beside it could still lose its own: that is
        // what tells an interrupted run from a lost point.
        durable::sync_directory(&self.writer.directory)?;
        durable::rename_new(&self.paths.digests_partial, &self.paths.digests)?;
        self.files.push(self.paths.digests.clone());
        durable::rename_new(&self.paths.manifest_partial, &self.paths.manifest)?;
        self.files.push(self.paths.manifest.clone());
        // A power failure must not keep the layer's name and lose the manifest's.
        durable::sync_directory(&self.writer.directory)?;
        durable::rename_new(&self.paths.layer_partial, &self.paths.layer)?;
        self.files.clear();
        let path = self.paths.layer.clone();
        match durable::sync_directory(&self.writer.directory) {
            Ok(()) => Ok(Committed { path, layer_bytes, manifest }),
            Err(cause) => Err(ChainError::CommitUncertain { path, cause: cause.into() }),
        }
    }

    fn seal_layer(&self, record: &Record) -> Result<(u64, u64), ChainError> {
        let planned = Planned {
            path: self.layer_path(),
            backing: self.backing_name(),
            virtual_size: record.layer_size(),
            cluster_size: self.cluster_size,
        };
        let sealed = planned.seal(Some(record.extended_l2))?;
        planned.check("recorded cluster size", record.cluster_size, self.cluster_size)?;
        Ok(sealed)
    }
}

impl Drop for PendingLayer<'_> {
    fn drop(&mut self) {
        // The reason for the drop is reported by whoever dropped it.
        let warn = |error| log::warn!("{}; the next run tries again", Causes(&error));
        let manifest = &self.paths.manifest;
        if self.files.contains(manifest) {
            // Without the layer beside it this would be the manifest of a lost point: it goes first, for good.
            let removed = durable::remove(manifest);
            if let Err(error) = removed.and_then(|_| durable::sync_directory(&self.writer.directory)) {
                return warn(error);
            }
        }
        for path in self.files.iter().filter(|path| *path != manifest) {
            if let Err(error) = durable::remove(path) {
                warn(error);
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;

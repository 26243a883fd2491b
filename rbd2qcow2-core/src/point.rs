//! A point and all that it builds upon, open and locked.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::cancel::Cancel;
use crate::chain::lock::ChainLock;
use crate::chain::manifest::Record;
use crate::chain::names::{ImageName, PointName};
use crate::chain::{Catalogue, ChainError, Point, Problem, image_directory};
use crate::files::Shortage;
use crate::qcow2::chain::ChainReader;
use crate::qcow2::error::ReadError;
use crate::source::SourceError;

mod error;

pub use error::PointError;

/// A point that can be read. While this lives, no backup adds to its image's chain, and nothing is
/// removed from it.
#[derive(Debug)]
pub struct OpenPoint {
    catalogue: Catalogue,
    name: PointName,
    chain: ChainReader,
    /// The image's size in bytes.
    size: u64,
    /// Held for its drop, which comes last. `None` on a read-only file system.
    _lock: Option<ChainLock>,
}

impl OpenPoint {
    /// Opens a point of `image` in the destination `dest`, the newest when none is named, and all
    /// layers that it builds upon. Does not wait for a run that writes the chain.
    ///
    /// # Errors
    /// [`PointError::Chain`] (for a chain that is being written:
    /// [`ChainError::Locked`]), [`PointError::UnknownImage`], [`PointError::UnknownPoint`],
    /// [`PointError::Broken`], [`PointError::Damaged`], [`PointError::TooManyFiles`].
    pub fn open(dest: &Path, image: &ImageName, point: Option<PointName>) -> Result<Self, PointError> {
        let directory = image_directory(dest, image);
        let unknown = || PointError::UnknownImage { dest: dest.to_owned(), image: image.clone() };
        match fs::symlink_metadata(&directory) {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => return Err(ChainError::NotADirectory { path: directory }.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !dest.exists() => {
                return Err(ChainError::DestinationMissing { path: dest.to_owned() }.into());
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(unknown()),
            Err(error) => return Err(ChainError::io("look at", &directory)(error).into()),
        }
        // A directory of something else gets no lock file.
        if Catalogue::read(&directory, image)?.is_empty() {
            return Err(unknown());
        }
        let lock = ChainLock::shared(&directory)?;
        let catalogue = Catalogue::read(&directory, image)?;
        // Who wants the newest must not get an older one without a word.
        let lost = point.or(catalogue.newest_lost().map(|lost| lost.name));
        if let Some(name) = lost.filter(|name| catalogue.lost().iter().any(|lost| lost.name == *name)) {
            return Err(broken(&catalogue, name, catalogue.no_such_point(name)));
        }
        let found = match point {
            None => catalogue.newest().ok_or_else(unknown)?,
            Some(name) => catalogue.point(name).ok_or_else(|| PointError::UnknownPoint {
                image: image.clone(),
                point: name,
                known: catalogue.points().iter().map(|point| point.name).collect(),
            })?,
        };
        let name = found.name;
        if let Some(suspicion) = catalogue.suspicion(found) {
            log::warn!("{image}@{name} is suspect: {}", suspicion.describe());
        }
        let chain = open_chain(&catalogue, name)?;
        let size = size(found, &chain);
        Ok(Self { name, chain, size, catalogue, _lock: lock })
    }

    /// The image.
    #[must_use]
    pub fn image(&self) -> &ImageName {
        self.catalogue.image()
    }

    /// The point's name.
    #[must_use]
    pub fn name(&self) -> PointName {
        self.name
    }

    /// What the directory held when the chain was locked.
    #[must_use]
    pub fn catalogue(&self) -> &Catalogue {
        &self.catalogue
    }

    /// What the point's manifest tells of the image, if there is one.
    #[must_use]
    pub fn record(&self) -> Option<&Record> {
        let point = self.catalogue.point(self.name)?;
        point.manifest.as_ref().map(|manifest| &manifest.record)
    }

    /// Reads all tables of all layers, as far as the point shows them, and no data: so that damage there
    /// is found before anything is changed that cannot be brought back. Blocks.
    ///
    /// # Errors
    /// [`PointError::Damaged`], [`PointError::TooManyFiles`]. `Ok(false)` when `cancel` was set meanwhile.
    pub(crate) fn check_tables(&self, cancel: &Cancel) -> Result<bool, PointError> {
        let damaged = |cause: ReadError| damaged(&self.catalogue, self.name, cause.into());
        for piece in self.chain.map(0..self.size).map_err(damaged)? {
            piece.map_err(damaged)?;
            if cancel.is_set() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The layers.
    #[must_use]
    pub fn chain(&self) -> &ChainReader {
        &self.chain
    }

    /// The image's size in bytes: exact where the point has a manifest, else rounded up to 512. No
    /// more than the chain's.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What an error of a source that reads this point means for the image's points.
    ///
    /// # Errors
    /// The error itself, where the chain is not the cause.
    pub(crate) fn explain(&self, error: SourceError) -> Result<PointError, SourceError> {
        match error {
            SourceError::Segments { cause, .. }
            | SourceError::Diff { cause, .. }
            | SourceError::Read { cause, .. }
                if cause.is::<ReadError>() =>
            {
                let cause = cause.downcast().expect("it was asked");
                Ok(damaged(&self.catalogue, self.name, cause))
            }
            error => Err(error),
        }
    }
}

fn open_chain(catalogue: &Catalogue, name: PointName) -> Result<ChainReader, PointError> {
    let paths = catalogue.layers(name).map_err(|problem| {
        let path = problem.path().to_owned();
        match problem.is_denied() {
            true => ChainError::NotAllowed { path, cause: io::ErrorKind::PermissionDenied.into() }.into(),
            false => broken(catalogue, name, problem),
        }
    })?;
    ChainReader::open_to_read_once(&paths).map_err(|cause| damaged(catalogue, name, cause.into()))
}

fn broken(catalogue: &Catalogue, point: PointName, cause: Problem) -> PointError {
    let whole = catalogue.points().iter().filter(|point| point.sound).map(|point| point.name).collect();
    PointError::Broken { image: catalogue.image().clone(), point, whole, cause: cause.into() }
}

fn damaged(catalogue: &Catalogue, point: PointName, cause: Box<ReadError>) -> PointError {
    if Shortage::of(&*cause).is_some() {
        return PointError::TooManyFiles { image: catalogue.image().clone(), point, cause };
    }
    let whole = cause.path().map_or_else(Vec::new, |path| without(catalogue, path));
    PointError::Damaged { image: catalogue.image().clone(), point, whole, cause }
}

/// The points that look whole and do not build upon the layer at `path`.
fn without(catalogue: &Catalogue, path: &Path) -> Vec<PointName> {
    let uses = |paths: &[PathBuf]| paths.iter().any(|layer| layer == path);
    let whole = catalogue.points().iter().map(|point| point.name);
    whole.filter(|name| catalogue.layers(*name).is_ok_and(|paths| !uses(&paths))).collect()
}

fn size(point: &Point, chain: &ChainReader) -> u64 {
    if point.manifest.is_none() && !point.name.is_python() {
        log::warn!(
            "{}: without its manifest the image's exact size is not known; it may be up to 511 bytes smaller \
             than what is read",
            point.path.display()
        );
    }
    point.virtual_size().unwrap_or(u64::MAX).min(chain.virtual_size())
}

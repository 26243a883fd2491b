//! Holding points: a point that is held is not pruned, whatever the rules say.
//!
//! The hold stands in the point's manifest. A new manifest is written aside, brought to stable storage,
//! and renamed over the old one: whoever dies on the way leaves the one or the other.

use std::path::Path;

use super::manifest::{Hold, MANIFEST_MAX, Manifest, ManifestError, read_bounded, with_hold};
use super::names::{FileKind, ImageName, PointFile, PointName};
use super::{Catalogue, ChainError, ChainWriter, Problem, durable};

/// Longest reason, in bytes. It is shown in one line.
pub const REASON_MAX: usize = 1024;

/// Why a point could not be held or released. It is as it was before, unless a variant says otherwise.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HoldError {
    /// The directory of the image failed, or somebody else uses it. When the directory could not be
    /// synced, the change is there, but may not survive a power failure.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// The image has no such point.
    #[error("image {:?} has no point {point}", image.as_str())]
    UnknownPoint {
        /// The image.
        image: ImageName,
        /// The point that was asked for.
        point: PointName,
        /// The points that it has, the oldest first.
        known: Vec<PointName>,
    },
    /// The point's layer is gone.
    #[error("point {point} of image {:?} cannot be held or released", image.as_str())]
    Lost {
        /// The image.
        image: ImageName,
        /// The point.
        point: PointName,
        /// Which file is missing.
        #[source]
        cause: Box<Problem>,
    },
    /// A point of the Python tool has no manifest to write to.
    #[error(
        "point {point} of image {:?} was made by the Python rbd2qcow2: it has no manifest, which is what tells \
         of a hold; restore it to a file to keep it",
        image.as_str()
    )]
    Python {
        /// The image.
        image: ImageName,
        /// The point.
        point: PointName,
    },
    /// The manifest is missing or damaged.
    #[error("cannot change the hold of point {point} of image {:?}", image.as_str())]
    Manifest {
        /// The image.
        image: ImageName,
        /// The point.
        point: PointName,
        /// What is wrong with the manifest.
        #[source]
        cause: ManifestError,
    },
    /// Nobody would know what for.
    #[error("the reason for a hold must not be empty")]
    NoReason,
    /// The reason is longer than [`REASON_MAX`].
    #[error("the reason for a hold has {bytes} bytes; at most {REASON_MAX} fit")]
    LongReason {
        /// Its length.
        bytes: usize,
    },
    /// The point is not held.
    #[error("point {point} of image {:?} is not held", image.as_str())]
    NotHeld {
        /// The image.
        image: ImageName,
        /// The point.
        point: PointName,
    },
}

/// Holds a point of `image` in the destination `dest`. Where it is held already, this reason takes the
/// place of the other. Takes the chain's lock for a moment.
///
/// # Errors
/// All of [`HoldError`], but for [`HoldError::NotHeld`]. For a chain that somebody reads or writes:
/// [`ChainError::Locked`].
pub fn hold(dest: &Path, image: &ImageName, point: PointName, hold: &Hold) -> Result<(), HoldError> {
    match hold.reason.len() {
        _ if hold.reason.trim().is_empty() => return Err(HoldError::NoReason),
        bytes if bytes > REASON_MAX => return Err(HoldError::LongReason { bytes }),
        _ => {}
    }
    let writer = ChainWriter::open_existing(dest, image)?;
    manifest(writer.catalogue(), point)?;
    write(&writer, point, Some(hold))
}

/// Ends the hold of a point, and returns it. Takes the chain's lock for a moment.
///
/// # Errors
/// [`HoldError::Chain`], [`HoldError::UnknownPoint`], [`HoldError::Lost`], [`HoldError::Python`],
/// [`HoldError::Manifest`], [`HoldError::NotHeld`].
pub fn release(dest: &Path, image: &ImageName, point: PointName) -> Result<Hold, HoldError> {
    let writer = ChainWriter::open_existing(dest, image)?;
    let held = manifest(writer.catalogue(), point)?.hold.clone();
    let held = held.ok_or_else(|| HoldError::NotHeld { image: image.clone(), point })?;
    write(&writer, point, None)?;
    Ok(held)
}

/// The manifest of a point, which must have one.
fn manifest(catalogue: &Catalogue, point: PointName) -> Result<Manifest, HoldError> {
    let image = catalogue.image();
    if catalogue.lost().iter().any(|lost| lost.name == point) {
        let cause = catalogue.no_such_point(point).into();
        return Err(HoldError::Lost { image: image.clone(), point, cause });
    }
    let found = catalogue.point(point).ok_or_else(|| HoldError::UnknownPoint {
        image: image.clone(),
        point,
        known: catalogue.points().iter().map(|point| point.name).collect(),
    })?;
    match Manifest::read(&catalogue.path_of(found.name, FileKind::Manifest), image, point) {
        Err(ManifestError::Missing) if point.is_python() => {
            Err(HoldError::Python { image: image.clone(), point })
        }
        result => result.map_err(|cause| HoldError::Manifest { image: image.clone(), point, cause }),
    }
}

/// Exchanges the manifest for one with that hold.
fn write(writer: &ChainWriter, point: PointName, hold: Option<&Hold>) -> Result<(), HoldError> {
    let image = writer.catalogue().image();
    let file = PointFile { image: image.clone(), point, kind: FileKind::Manifest };
    let path = writer.directory().join(file.file_name());
    let partial = writer.directory().join(file.partial_name());
    let bytes = read_bounded(&path, MANIFEST_MAX).and_then(|bytes| with_hold(&bytes, image, point, hold));
    let bytes = bytes.map_err(|cause| HoldError::Manifest { image: image.clone(), point, cause })?;
    durable::write_aside(&partial, &bytes)?;
    durable::take_after(&partial, &path).inspect_err(|_| _ = durable::remove(&partial))?;
    durable::replace(&partial, &path).inspect_err(|_| _ = durable::remove(&partial))?;
    Ok(durable::sync_directory(writer.directory())?)
}

#[cfg(test)]
mod tests;

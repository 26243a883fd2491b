//! Listing directories: what is there by its name.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{PYTHON_ROOT, Problem};
use crate::chain::error::ChainError;
use crate::chain::lock::LOCK_FILE;
use crate::chain::names::{FileKind, ImageName, PointFile, PointName};
use crate::chain::{
    ANNOUNCEMENT_FILE, ANNOUNCEMENT_PARTIAL, FORGET_FILE, FORGET_PARTIAL, RETIRED_FILE, RETIRED_PARTIAL,
    SUSPECT_FILE, SUSPECT_PARTIAL,
};

/// The directories of images in a destination.
#[derive(Clone, Debug, Default)]
pub struct Images {
    /// The images, in the order of their names.
    pub images: Vec<ImageName>,
    /// What else is there.
    pub foreign: Vec<PathBuf>,
}

/// Lists the images that have a directory in the destination `dest`: one whose name is that of an
/// image and that holds a lock file or a file of that image. Reads the directories' names only.
///
/// # Errors
/// [`ChainError::DestinationMissing`], [`ChainError::NotADirectory`], [`ChainError::NotAllowed`], [`ChainError::ImageDirectory`],
/// [`ChainError::Io`].
pub fn images_in(dest: &Path) -> Result<Images, ChainError> {
    let mut found = Images::default();
    for (name, path) in entries(dest, || ChainError::DestinationMissing { path: dest.to_owned() })? {
        let image = name.and_then(|name| ImageName::decode(&name).ok());
        match image {
            Some(image) if is_image_directory(&path, &image)? => found.images.push(image),
            _ => found.foreign.push(path),
        }
    }
    if found.images.is_empty()
        && let Some((above, image)) = image_of(dest)?
    {
        return Err(ChainError::ImageDirectory { path: dest.to_owned(), dest: above, image });
    }
    found.images.sort();
    Ok(found)
}

/// The image whose directory this is, and the destination that it lies in.
fn image_of(path: &Path) -> Result<Option<(PathBuf, ImageName)>, ChainError> {
    // Whatever stands there: `.`, or a link to the directory.
    let path = fs::canonicalize(path).map_err(ChainError::io("look at", path))?;
    let name = path.file_name().and_then(|name| name.to_str());
    let (Some(dest), Some(image)) = (path.parent(), name.and_then(|name| ImageName::decode(name).ok()))
    else {
        return Ok(None);
    };
    let names = entries(&path, || ChainError::DestinationMissing { path: path.clone() })?;
    // A lock file alone says nothing: whoever keeps his runs apart may have made it in a destination.
    let found = names.iter().any(|(name, _)| name.as_deref().is_some_and(|name| is_file_of(name, &image)));
    Ok(found.then(|| (dest.to_owned(), image)))
}

fn is_image_directory(path: &Path, image: &ImageName) -> Result<bool, ChainError> {
    let metadata = fs::symlink_metadata(path).map_err(ChainError::io("look at", path))?;
    if !metadata.is_dir() {
        return Ok(false);
    }
    let names = match entries(path, || ChainError::NoSuchImage { path: path.to_owned() }) {
        Ok(names) => names,
        Err(ChainError::NoSuchImage { .. }) => return Ok(false),
        // One directory that cannot be listed must not hide the others: who reads it is told why.
        Err(_) => return Ok(true),
    };
    let ours = |name: &str| name == LOCK_FILE || is_file_of(name, image);
    Ok(names.iter().any(|(name, _)| name.as_deref().is_some_and(ours)))
}

fn is_file_of(name: &str, image: &ImageName) -> bool {
    PointFile::parse(name).is_some_and(|file| file.image == *image)
}

/// The entries of a directory, sorted: their name where it is text, and their path.
fn entries(
    directory: &Path,
    missing: impl FnOnce() -> ChainError,
) -> Result<Vec<(Option<String>, PathBuf)>, ChainError> {
    let listed = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(missing()),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            return Err(ChainError::NotADirectory { path: directory.to_owned() });
        }
        Err(cause) if cause.kind() == io::ErrorKind::PermissionDenied => {
            return Err(ChainError::NotAllowed { path: directory.to_owned(), cause });
        }
        other => other.map_err(ChainError::io("list the directory", directory))?,
    };
    let mut found = Vec::new();
    for entry in listed {
        let entry = entry.map_err(ChainError::io("list the directory", directory))?;
        found.push((entry.file_name().into_string().ok(), entry.path()));
    }
    found.sort();
    Ok(found)
}

/// What stands at the place of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Presence {
    #[default]
    Nothing,
    /// A regular file.
    File,
    /// Something else, which was reported.
    Other,
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct OfPoint {
    pub(super) layer: Presence,
    pub(super) manifest: Presence,
    pub(super) digests: Presence,
    /// A manifest that waits to replace the other.
    pub(super) merged_manifest: bool,
    /// Digests that wait to replace the others.
    pub(super) merged_digests: bool,
    /// The layer, under the name that it keeps while another's builds upon it.
    pub(super) base_layer: bool,
    /// Its digests.
    pub(super) base_digests: bool,
}

/// The directory's entries by what they are.
#[derive(Debug, Default)]
pub(super) struct Files {
    pub(super) by_point: BTreeMap<PointName, OfPoint>,
    /// Files that were being written.
    pub(super) partial: Vec<PathBuf>,
    /// Whether there is a list of points to forget.
    pub(super) forgetting: bool,
    pub(super) problems: Vec<Problem>,
}

impl Files {
    pub(super) fn sort(directory: &Path, image: &ImageName) -> Result<Self, ChainError> {
        let mut files = Self::default();
        for (name, path) in entries(directory, || ChainError::NoSuchImage { path: directory.to_owned() })? {
            match name {
                Some(name) => files.take(&name, path, image),
                None => files.problems.push(Problem::Foreign { path }),
            }
        }
        Ok(files)
    }

    /// Takes a file that only merges make. Tells whether it is one.
    fn take_of_merge(&mut self, name: &str, path: &Path, image: &ImageName) -> bool {
        let is_file = || path.is_file() && !path.is_symlink();
        let (merged, base) = (PointFile::parse_merged(name), PointFile::parse_base(name));
        let is_base = base.is_some();
        let Some(file) = merged.or(base).filter(|file| file.image == *image && is_file()) else {
            return false;
        };
        let of_point = self.by_point.entry(file.point).or_default();
        let known = match (is_base, file.kind) {
            (false, FileKind::Manifest) => &mut of_point.merged_manifest,
            (false, FileKind::Digests) => &mut of_point.merged_digests,
            (true, FileKind::Layer) => &mut of_point.base_layer,
            (true, FileKind::Digests) => &mut of_point.base_digests,
            (false, FileKind::Layer) | (true, FileKind::Manifest) => return false,
        };
        *known = true;
        true
    }

    fn take(&mut self, name: &str, path: PathBuf, image: &ImageName) {
        self.forgetting |= name == FORGET_FILE;
        if [LOCK_FILE, ANNOUNCEMENT_FILE, FORGET_FILE, RETIRED_FILE, SUSPECT_FILE, PYTHON_ROOT]
            .contains(&name)
        {
            return;
        }
        let partial = PointFile::parse_partial(name).filter(|file| file.image == *image);
        let partials = [ANNOUNCEMENT_PARTIAL, FORGET_PARTIAL, RETIRED_PARTIAL, SUSPECT_PARTIAL];
        if partial.is_some() || partials.contains(&name) {
            // No run makes a directory of that name, so none may remove it.
            if path.is_dir() && !path.is_symlink() {
                self.problems.push(Problem::NotARegularFile { path });
            } else {
                self.partial.push(path);
            }
            return;
        }
        if self.take_of_merge(name, &path, image) {
            return;
        }
        let Some(file) = PointFile::parse(name).filter(|file| file.image == *image) else {
            self.problems.push(Problem::Foreign { path });
            return;
        };
        let presence = match fs::symlink_metadata(&path) {
            // Renamed or removed since the directory was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => {
                self.problems.push(Problem::Unreadable { path, cause: error.into() });
                Presence::Other
            }
            Ok(metadata) if metadata.is_file() => Presence::File,
            Ok(metadata) if metadata.is_symlink() => {
                self.problems.push(Problem::Symlink { path });
                Presence::Other
            }
            Ok(_) => {
                self.problems.push(Problem::NotARegularFile { path });
                Presence::Other
            }
        };
        let of_point = self.by_point.entry(file.point).or_default();
        match file.kind {
            FileKind::Layer => of_point.layer = presence,
            FileKind::Manifest => of_point.manifest = presence,
            FileKind::Digests => of_point.digests = presence,
        }
    }
}

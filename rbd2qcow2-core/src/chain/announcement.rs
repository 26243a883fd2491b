//! The note about a snapshot that is about to be made for a chain without points.
//!
//! A chain's id is in the manifests of its points, so a run that is killed before its first commit
//! would leave a snapshot that nobody may delete: no manifest says whose it is. The note does. It is
//! made durable before the snapshot is.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::durable;
use super::error::ChainError;
use super::manifest::{ManifestError, read_bounded};
use super::names::{ImageName, SnapshotName};
use super::{ANNOUNCEMENT_FILE, ANNOUNCEMENT_PARTIAL};

/// Longest note that is read, in bytes.
const ANNOUNCEMENT_MAX: u64 = 64 << 10;

/// A snapshot that may exist, although no point tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announcement {
    /// The snapshot. Its chain id is that of the chain that was about to begin.
    pub snapshot: SnapshotName,
    /// Identifies the Ceph cluster; empty where the source does not know it.
    pub fsid: String,
    /// The image's pool.
    pub pool: String,
    /// The image's namespace; empty for the default one.
    pub namespace: String,
}

/// A note as it stands in the file. Nothing here was checked.
#[derive(Serialize, Deserialize)]
struct RawAnnouncement {
    format: u64,
    snapshot: String,
    fsid: String,
    pool: String,
    namespace: String,
    image: String,
}

impl Announcement {
    /// Writes the note in `directory`, in place of an older one. Blocks until it is on stable
    /// storage.
    pub(super) fn write(&self, directory: &Path, image: &ImageName) -> Result<(), ChainError> {
        let raw = RawAnnouncement {
            format: 1,
            snapshot: self.snapshot.to_string(),
            fsid: self.fsid.clone(),
            pool: self.pool.clone(),
            namespace: self.namespace.clone(),
            image: image.as_str().to_owned(),
        };
        let (partial, path) = (directory.join(ANNOUNCEMENT_PARTIAL), directory.join(ANNOUNCEMENT_FILE));
        let bytes = serde_json::to_vec_pretty(&raw)
            .map_err(|error| ChainError::io("write", &path)(io::Error::from(error)))?;
        durable::write_aside(&partial, &bytes)?;
        durable::replace(&partial, &path).inspect_err(|_| _ = durable::remove(&partial))?;
        durable::sync_directory(directory)
    }

    /// Reads the note in `directory`; `None` if there is none.
    pub(super) fn read(directory: &Path, image: &ImageName) -> Result<Option<Self>, ChainError> {
        let path = directory.join(ANNOUNCEMENT_FILE);
        let bytes = match read_bounded(&path, ANNOUNCEMENT_MAX) {
            Ok(bytes) => bytes,
            Err(ManifestError::Missing) => return Ok(None),
            Err(ManifestError::Read(cause)) => return Err(ChainError::io("read", &path)(cause)),
            Err(_) => return Err(ChainError::AnnouncementDamaged { path }),
        };
        let raw: Option<RawAnnouncement> = serde_json::from_slice(&bytes).ok();
        match raw.and_then(|raw| Self::validate(raw, image)) {
            Some(announcement) => Ok(Some(announcement)),
            None => Err(ChainError::AnnouncementDamaged { path }),
        }
    }

    fn validate(raw: RawAnnouncement, image: &ImageName) -> Option<Self> {
        let snapshot = SnapshotName::parse(&raw.snapshot).ok()?;
        let ours = raw.format == 1 && raw.image == image.as_str();
        ours.then_some(Self { snapshot, fsid: raw.fsid, pool: raw.pool, namespace: raw.namespace })
    }

    /// Removes the note in `directory`, if there is one.
    pub(super) fn clear(directory: &Path) -> Result<(), ChainError> {
        if durable::remove(&directory.join(ANNOUNCEMENT_FILE))? {
            durable::sync_directory(directory)
        } else {
            Ok(())
        }
    }
}

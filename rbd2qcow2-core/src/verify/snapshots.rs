//! The snapshots of points, in a cluster.

use super::source::{Found, Snapshots};
use crate::chain::manifest::Manifest;
use crate::options::DiffMode;
use crate::rbd::{Cluster, ClusterOptions, Patience, Pool, RbdError};
use crate::source::BoxError;
use crate::source::librbd::LibrbdSource;

/// A cluster in which snapshots are looked for.
#[derive(Debug)]
pub struct ClusterSnapshots {
    cluster: Cluster,
    fsid: String,
}

impl ClusterSnapshots {
    /// Connects to the cluster. Blocks.
    ///
    /// # Errors
    /// [`RbdError`].
    pub fn connect(options: &ClusterOptions, patience: Patience) -> Result<Self, RbdError> {
        let cluster = Cluster::connect(options, patience)?;
        let fsid = cluster.fsid()?;
        Ok(Self { cluster, fsid })
    }

    fn open(&self, manifest: &Manifest) -> Result<Result<LibrbdSource, String>, RbdError> {
        let record = &manifest.record;
        if record.fsid != self.fsid {
            return Ok(Err(format!(
                "it was taken in another cluster ({}, this is {})",
                record.fsid, self.fsid
            )));
        }
        let gone = |what: &str| Ok(Err(format!("{what} is not there any more")));
        let pool: Pool = match self.cluster.pool(&record.pool, &record.namespace) {
            Err(error) if error.is_not_found() => return gone("the image's pool"),
            pool => pool?,
        };
        let image = manifest.image.as_str();
        let head = match pool.open(image, None) {
            Err(error) if error.is_not_found() => return gone("the image"),
            head => head?,
        };
        if head.info()?.id != record.image_id {
            return Ok(Err("there is another image of its name".to_owned()));
        }
        match head.snapshots()?.iter().find(|snapshot| snapshot.name == record.snapshot) {
            Some(found) if found.id == record.snapshot_id => {}
            Some(_) => return Ok(Err("there is another snapshot of its name".to_owned())),
            None => return gone("the snapshot"),
        }
        // The maps may be wrong, and the backup believed them: this is to find out.
        LibrbdSource::open(&pool, image, &record.snapshot, None, DiffMode::Scan).map(Ok)
    }
}

impl Snapshots for ClusterSnapshots {
    fn find(&self, manifest: &Manifest) -> Result<Found, BoxError> {
        Ok(match self.open(manifest)? {
            Ok(source) => Found::Snapshot(Box::new(source)),
            Err(why) => Found::Gone(why),
        })
    }
}

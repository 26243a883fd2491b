//! Many images of one pool, several at once.

use std::path::PathBuf;

use crate::backup::BackupOptions;
use crate::cancel::Cancel;
use crate::progress::{ImageReport, Observer};
use crate::rbd::{self, ClusterOptions, RbdError};

/// Which images of which pool go where.
#[derive(Clone, Debug, Default)]
pub struct PoolBackup {
    /// How to reach the cluster.
    pub cluster: ClusterOptions,
    /// The pool's name.
    pub pool: String,
    /// The RBD namespace within the pool; empty for the default one.
    pub namespace: String,
    /// The directory that holds a directory for each image. Must exist.
    pub dest: PathBuf,
    /// The images by name; none means all of the pool.
    pub images: Vec<String>,
    /// Glob patterns of images that are left out.
    pub exclude: Vec<String>,
    /// Images at once, at least 1.
    pub jobs: usize,
    /// How each is backed up.
    pub options: BackupOptions,
}

/// Why no image could be looked at.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// The cluster or the pool could not be reached.
    #[error("cannot open pool {pool}")]
    Open {
        /// `POOL` or `POOL/NAMESPACE`.
        pool: String,
        /// What librados said.
        #[source]
        cause: RbdError,
    },
    /// A pattern is no glob.
    #[error("bad pattern {pattern:?} to exclude images")]
    Pattern {
        /// The pattern.
        pattern: String,
        /// What is wrong with it.
        #[source]
        cause: globset::Error,
    },
    /// The directory of the backups is unusable.
    #[error("cannot use {} as the directory of the backups", path.display())]
    Dest {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        cause: std::io::Error,
    },
}

impl PoolBackup {
    /// Backs the images up and reports on each, in the order in which they ended. One image's
    /// failure leaves the others alone: look at every report's status.
    ///
    /// Blocks until all are done or, after `cancel` is set, until everything under way has stopped
    /// and what it made is removed. Images that were not begun by then have no report.
    ///
    /// # Errors
    /// [`PoolError`], when no image could be looked at at all.
    pub fn run(&self, observer: &dyn Observer, cancel: &Cancel) -> Result<Vec<ImageReport>, PoolError> {
        let _ = (observer, cancel, rbd::ClusterOptions::default());
        todo!()
    }
}

//! Many images of one pool, several at once.

use std::collections::BTreeSet;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use globset::{Glob, GlobSet, GlobSetBuilder};

use crate::backup::{Backup, BackupError};
use crate::buffer::BufferPool;
use crate::cancel::Cancel;
use crate::files;
use crate::layer::native::Compressors;
use crate::layer::qemu_nbd::{QemuNbdError, QemuTools};
use crate::options::{BackupOptions, Writer};
use crate::progress::{ImageReport, Observer, Status};
use crate::rate::RateLimit;
use crate::rbd::{Cluster, ClusterOptions, Patience, Pool, RbdError};
use crate::turns::Turns;

/// The least memory for image data that a run works with, whatever it was told.
const LEAST_MEMORY: usize = 16 << 20;

/// How many images are under way for each that may copy. A snapshot takes the monitors about a second,
/// and so does removing the one before; that time passes for several images at once.
const UNDER_WAY: usize = 4;

/// Files that the backup of an image has open, at most.
const FILES: usize = 6;

/// The same where qemu-nbd writes the layer: sockets and pipes besides.
const FILES_WITH_SERVER: usize = 16;

/// Files that are left for connections to OSDs, which come with the first reads.
const FILES_SPARE: usize = 16;

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
    /// Images that are copied at once, at least 1. With more than 1, the snapshots of up to three times as
    /// many are taken, or removed, meanwhile.
    pub jobs: usize,
    /// How each is backed up.
    pub options: BackupOptions,
}

/// Why no image could be looked at.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// The cluster or the pool could not be reached.
    #[error("cannot back up pool {pool:?}")]
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
    /// The programs that write layers are missing or too old.
    #[error("cannot write layers")]
    Tools(#[source] QemuNbdError),
    /// The directory of the backups is unusable.
    #[error(
        "cannot use {} as the directory of the backups; create it, or mount the file system that should be there",
        path.display()
    )]
    Dest {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
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
        let exclude = self.exclude()?;
        self.check_dest().map_err(|cause| PoolError::Dest { path: self.dest.clone(), cause })?;
        let tools = QemuTools::new(&self.options.qemu_img, &self.options.qemu_nbd);
        if self.options.writer == Writer::QemuNbd && !self.options.dry_run {
            // Or every image would take a snapshot first, and then fail.
            tools.probe().map_err(PoolError::Tools)?;
        }
        let failed = |cause| PoolError::Open { pool: self.title(), cause };
        let patience = Patience { limit: self.options.patience, cancel: cancel.clone() };
        let cluster = Cluster::connect(&self.cluster, patience).map_err(failed)?;
        let fsid = cluster.fsid().map_err(failed)?;
        let pool = cluster.pool(&self.pool, &self.namespace).map_err(failed)?;
        let images = self.select(&pool, &exclude).map_err(failed)?;
        if images.is_empty() {
            // No failure: a pool may well be empty. But not what somebody expects who asks for a backup.
            log::warn!("pool {:?} has no images to back up, or all are excluded", self.title());
        }
        observer.selected(&images);

        let buffers = BufferPool::new(self.options.memory.max(LEAST_MEMORY));
        let compressors = Compressors::default();
        let rate_limit = self.options.rate_limit.map(RateLimit::new);
        // An embedder may say "all" with the largest number there is.
        let jobs = self.jobs.min(images.len());
        let turns = Turns::new(jobs);
        let backup = |image| Backup {
            pool: &pool,
            fsid: &fsid,
            pool_name: &self.pool,
            namespace: &self.namespace,
            image,
            dest: &self.dest,
            options: &self.options,
            tools: &tools,
            compressors: &compressors,
            buffers: &buffers,
            turns: &turns,
            rate_limit: rate_limit.as_ref(),
            observer,
            cancel,
        };
        let queue = Mutex::new(images.iter());
        let reports = Mutex::new(Vec::new());
        let job = || {
            loop {
                // A statement of its own, or the lock would be held through the backup.
                let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some(image) = next.filter(|_| !cancel.is_set()) else { break };
                let report = run_caught(&backup(image));
                observer.finished(&report);
                reports.lock().unwrap_or_else(PoisonError::into_inner).push(report);
            }
        };
        std::thread::scope(|scope| {
            // Whoever wants one after the other gets that.
            let under_way = if jobs > 1 { jobs * UNDER_WAY } else { 1 };
            for _ in 1..self.affordable(under_way.min(images.len())) {
                // Fewer threads do the same work: the first is this one.
                if let Err(error) = std::thread::Builder::new().name("image".into()).spawn_scoped(scope, job)
                {
                    log::warn!("cannot start a thread for another image at once: {error}");
                    break;
                }
            }
            job();
        });
        Ok(reports.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// How many of `images` at once this process has files for.
    fn affordable(&self, images: usize) -> usize {
        let each = match self.options.writer {
            Writer::Native => FILES,
            Writer::QemuNbd => FILES_WITH_SERVER,
        };
        let affordable = (files::free().saturating_sub(FILES_SPARE) / each).max(1);
        if affordable < images {
            log::warn!(
                "only {affordable} images at once, since this process may not have more files open (`ulimit -n`, \
                 or `LimitNOFILE=` in a unit of systemd)"
            );
        }
        images.min(affordable)
    }

    /// `POOL` or `POOL/NAMESPACE`.
    fn title(&self) -> String {
        if self.namespace.is_empty() {
            self.pool.clone()
        } else {
            format!("{}/{}", self.pool, self.namespace)
        }
    }

    fn exclude(&self) -> Result<GlobSet, PoolError> {
        let mut set = GlobSetBuilder::new();
        let bad = |pattern: &String, cause| PoolError::Pattern { pattern: pattern.clone(), cause };
        for pattern in &self.exclude {
            set.add(Glob::new(pattern).map_err(|cause| bad(pattern, cause))?);
        }
        set.build().map_err(|cause| bad(&self.exclude.join(" "), cause))
    }

    /// Notices what every image would fail of before any snapshot is taken.
    fn check_dest(&self) -> io::Result<()> {
        if !std::fs::metadata(&self.dest)?.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        Ok(())
    }

    fn select(&self, pool: &Pool, exclude: &GlobSet) -> Result<Vec<String>, RbdError> {
        let images = if self.images.is_empty() { pool.images()? } else { self.images.clone() };
        let mut seen = BTreeSet::new();
        Ok(images.into_iter().filter(|name| !exclude.is_match(name) && seen.insert(name.clone())).collect())
    }
}

/// A defect that one image brings to light must not end the backup of the others.
fn run_caught(backup: &Backup<'_>) -> ImageReport {
    catch_unwind(AssertUnwindSafe(|| backup.run())).unwrap_or_else(|_| {
        let mut report = ImageReport::new(backup.image, Status::Failed);
        report.error = Some(BackupError::Panicked.into());
        report
    })
}

//! One image's backup, told as the path of its data.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use crate::buffer::BufferPool;
use crate::cancel::Cancel;

use crate::chain::manifest::{CloneParent, Features, Record};
use crate::chain::names::{ChainId, ImageName, NameError, PointName, SnapshotName};
use crate::chain::{Announcement, ChainError, ChainWriter, LayerPlan, PendingLayer};
use crate::copy::{self, CopyError};
use crate::error::Causes;
use crate::layer::native::{Compressors, NativeLayer};
use crate::layer::qemu_nbd::{QemuNbdLayer, QemuNbdOptions, QemuTools};
use crate::layer::{LayerError, LayerSpec, LayerWriter, SECTOR};
use crate::options::{BackupOptions, DiffMode, Writer};
use crate::progress::{ImageReport, Observer, Progress, Stage, Status};
use crate::prove::ProveError;
use crate::rate::RateLimit;
use crate::rbd::{Patience, Pool, RbdError};
use crate::restore::image::{INCOMPLETE_KEY, describe_incomplete};
use crate::source::SourceError;
use crate::source::librbd::{Distrust, LibrbdSource};
use crate::turns::Turns;

mod changes;
mod plan;
mod snapshots;
mod writers;

pub use plan::Plan;
use snapshots::{NewSnapshot, Taken};
pub use writers::Unheard;
use writers::Writers;

/// The metadata key of an image that is not to be backed up. Its value is shown as the reason.
pub const SKIP_KEY: &[u8] = b"backup-skip";

/// How often a backup is begun whose ground moved. One reason may follow another: a base that cannot be relied on
/// is told only once the image's ancestry held.
const ATTEMPTS: u32 = 3;

/// Why an image has no new point.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackupError {
    /// The image's name cannot be the name of a directory.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The cluster failed.
    #[error(transparent)]
    Rbd(#[from] RbdError),
    /// The directory of the image failed.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// The layer failed.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// The copy failed.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// What was read cannot be relied on.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The image is half of a restore.
    #[error(
        "the image is the unfinished restore of {of}: restore that again to finish it; if what it holds is good \
         after all, remove its metadata key {}",
        String::from_utf8_lossy(INCOMPLETE_KEY)
    )]
    HalfRestored {
        /// The image and point that it was going to be.
        of: String,
    },
    /// Whether changes were lost could not be found out.
    #[error("cannot prove that nothing but what is reported has changed")]
    Prove(#[source] ProveError),
    /// Changes were lost.
    #[error(
        "a change was lost: byte {offset} of the image is not what point {point} holds, and nothing is reported to \
         have changed there since its snapshot ({differing} of {looked_at} pages that were looked at differ). Either \
         that point, or one before it, lacks a change, or its snapshot was written to after it was read. No new point \
         was made; the chain up to {point} is marked suspect, and the next backup compares the whole image with it"
    )]
    ChangeLost {
        /// The point that was to be built upon.
        point: PointName,
        /// First byte of the first page that differs.
        offset: u64,
        /// How many pages differ.
        differing: u64,
        /// How many were looked at.
        looked_at: u64,
    },
    /// Random numbers could not be had.
    #[error("cannot get random numbers")]
    Random(#[source] std::io::Error),
    /// The snapshot that was just taken, or its base, is not listed any more: somebody removed it.
    #[error("snapshot {snapshot:?} disappeared during the backup; is something else removing snapshots?")]
    SnapshotGone {
        /// The snapshot.
        snapshot: String,
    },
    /// Clients that have the image open did not say that they know of the new snapshot.
    #[error(transparent)]
    Unheard(#[from] Unheard),
    /// A stop was asked for.
    #[error("interrupted; nothing of this backup was kept")]
    Cancelled,
    /// The code is wrong.
    #[error("internal error: the backup of this image panicked; the points that existed are as they were")]
    Panicked,
}

/// One image's backup: where it comes from, where it goes, and what it shares with others.
#[derive(Clone, Copy)]
pub struct Backup<'a> {
    /// The image's pool.
    pub pool: &'a Pool,
    /// The cluster's id.
    pub fsid: &'a str,
    /// The pool's name.
    pub pool_name: &'a str,
    /// The pool's namespace; empty for the default one.
    pub namespace: &'a str,
    /// The image's name.
    pub image: &'a str,
    /// The directory that holds a directory for each image.
    pub dest: &'a Path,
    /// How the backup is made.
    pub options: &'a BackupOptions,
    /// The programs that write layers.
    pub tools: &'a QemuTools,
    /// What packs clusters, for all images.
    pub compressors: &'a Compressors,
    /// Where the memory comes from.
    pub buffers: &'a BufferPool,
    /// How many images copy at once.
    pub turns: &'a Turns,
    /// Limits the reads.
    pub rate_limit: Option<&'a RateLimit>,
    /// Is told how it goes.
    pub observer: &'a dyn Observer,
    /// Asks for a stop.
    pub cancel: &'a Cancel,
}

impl Backup<'_> {
    /// Makes a point of the image, and tells how that went. Blocks.
    ///
    /// Whatever fails, points that existed stay as they are, and the report says what happened. When
    /// this process dies meanwhile, the next run removes what it left. Where the cluster's word about the
    /// image turned out to be worth nothing ([`Distrust`]), all is done once more, with another snapshot; the
    /// observer is told of a new start then. Twice at most.
    #[must_use]
    pub fn run(&self) -> ImageReport {
        let start = Instant::now();
        let (mut report, mut distrust) = self.attempt(None);
        for _ in 1..ATTEMPTS {
            let Some(before) = distrust.filter(|_| !self.cancel.is_set()) else { break };
            log::warn!("{}: {before}; trying once more", self.image);
            (report, distrust) = self.attempt(Some(&before));
        }
        report.time = start.elapsed();
        report
    }

    /// One attempt, and why the cluster is not trusted in it. `before` is why it was not the last time.
    fn attempt(&self, before: Option<&Distrust>) -> (ImageReport, Option<Distrust>) {
        let mut report = ImageReport::new(self.image, Status::Failed);
        let mut distrust = None;
        self.observer.started(self.image, &report.progress);
        match self.run_to(before, &mut report) {
            Ok(status) => report.status = status,
            // The point may be there, whatever was asked for meanwhile.
            Err(error @ BackupError::Chain(ChainError::CommitUncertain { .. })) => {
                report.error = Some(error.into());
            }
            Err(error) => {
                // It was named, but there is no such point.
                report.point = None;
                distrust = error.distrust().filter(|distrust| distrust.may_pass()).cloned();
                let error = if self.cancel.is_set() { BackupError::Cancelled } else { error };
                report.error = Some(error.into());
            }
        }
        (report, distrust)
    }

    fn run_to(&self, before: Option<&Distrust>, report: &mut ImageReport) -> Result<Status, BackupError> {
        let name = ImageName::new(self.image)?;
        // Whatever fails first ends the waits of everything else that this image is waiting for.
        let stop = self.cancel.part();
        let patience = Patience { limit: self.options.patience, cancel: stop.clone() };
        let pool = self.pool.with_patience(patience);

        self.stage(Stage::Prepare);
        let head = pool.open(self.image, None)?;
        let metadata = head.metadata()?;
        if let Some(value) = metadata.get(SKIP_KEY) {
            report.reason =
                Some(format!("the image's metadata has backup-skip={}", String::from_utf8_lossy(value)));
            return Ok(Status::Skipped);
        }
        refuse_half_restored(&metadata)?;
        if self.options.dry_run {
            return self.rehearse(&name, &head, report);
        }

        let chain = ChainWriter::open(self.dest, &name)?;
        self.remove_unfinished_snapshots(&pool, &head, &chain)?;
        let plan = self.plan(chain.catalogue(), &head, before)?;
        plan.tell(report);
        let earlier = chain.earlier_clients();
        chain.note_client(pool.cluster().instance_id());
        let writers = Writers::of(&pool, self.image, &head.info()?, earlier, &stop);
        writers.answer()?;
        let snapshot = self.name_snapshot(&chain, &plan)?;
        report.point = Some(snapshot.point.to_string());
        drop(head);

        self.stage(Stage::Snapshot);
        let new_snapshot = NewSnapshot::take(&pool, self.image, snapshot, self.cancel, &chain)?;
        writers.settle()?;
        report.not_excluded = writers.not_excluded();
        let base = plan.base_snapshot();
        let source =
            LibrbdSource::open(&pool, self.image, new_snapshot.name(), base.as_ref(), self.options.diff)?;
        if let Some(why) = source.fallback() {
            log::info!("{}: {why}; all objects are compared instead", self.image);
        }

        // A restore that began meanwhile marks the image before it changes anything.
        refuse_half_restored(&source.image().metadata()?)?;

        self.stage(Stage::Queue);
        let Some(turn) = self.turns.take(&stop) else { return Err(BackupError::Cancelled) };

        self.stage(Stage::Copy);
        let cluster_size = self.options.cluster_size.unwrap_or(LayerSpec::DEFAULT_CLUSTER_SIZE);
        let pending =
            chain.begin(LayerPlan { point: snapshot.point, parent: plan.parent(), cluster_size })?;
        let layer = self.create_layer(&source, &pending, cluster_size)?;
        report.virtual_size = source.info().size;
        self.copy(&source, &*layer, &plan, &chain, &pending, &stop, report)?;
        copy::finish(&*layer, self.cancel)?;

        self.stage(Stage::Commit);
        drop(turn);
        let taken = self.still_true(&pool, &plan, &source, snapshot)?;
        let mut record =
            self.record(&source, cluster_size, layer.grain(), taken, metadata, &report.progress)?;
        if plan.compares() {
            DiffMode::Compare.as_str().clone_into(&mut record.diff_mode);
        }
        if self.cancel.is_set() {
            return Err(BackupError::Cancelled);
        }
        let committed = pending.commit(record).inspect_err(|error| {
            if matches!(error, ChainError::CommitUncertain { .. }) {
                // The point may be there after all, and is then the next one's base.
                new_snapshot.keep();
            }
        })?;
        new_snapshot.keep();
        if plan.compares()
            && let Err(error) = chain.settle_suspicions()
        {
            log::warn!(
                "{}: {}; the point is safe, the next backup compares again",
                self.image,
                Causes(&error)
            );
        }
        report.file = Some(committed.path);
        report.layer_bytes = committed.layer_bytes;
        report.data_bytes = report.progress.data.get();
        report.zero_bytes = report.progress.zero.get();
        report.read_bytes = report.progress.read.get();

        self.stage(Stage::CleanUp);
        self.remove_older_snapshots(&pool, &source, &chain, snapshot);
        Ok(Status::Ok)
    }

    fn stage(&self, stage: Stage) {
        self.observer.stage(self.image, stage);
    }

    fn time(&self) -> jiff::Timestamp {
        self.options.time.unwrap_or_else(jiff::Timestamp::now)
    }

    /// Names the point and its snapshot. A new chain's name is on disk before anything is made of it.
    fn name_snapshot(&self, chain: &ChainWriter, plan: &Plan) -> Result<SnapshotName, BackupError> {
        let (point, clock_went_back) = chain.next_point(self.time())?;
        if clock_went_back {
            log::warn!(
                "{}: the newest point is not older than this machine's clock; the new one is named {point}",
                self.image
            );
        }
        if let Some(chain_id) = plan.chain() {
            return Ok(SnapshotName { chain: chain_id, point });
        }
        let snapshot = SnapshotName { chain: ChainId::draw().map_err(BackupError::Random)?, point };
        chain.announce(&Announcement {
            snapshot,
            fsid: self.fsid.to_owned(),
            pool: self.pool_name.to_owned(),
            namespace: self.namespace.to_owned(),
        })?;
        Ok(snapshot)
    }

    fn create_layer(
        &self,
        source: &LibrbdSource,
        pending: &PendingLayer<'_>,
        cluster_size: u32,
    ) -> Result<Box<dyn LayerWriter>, BackupError> {
        let spec = LayerSpec {
            path: pending.layer_path().to_owned(),
            virtual_size: source.info().size.next_multiple_of(SECTOR),
            backing: pending.backing_name(),
            cluster_size,
            compression: self.options.compression,
            extended_l2: self.options.extended_l2,
        };
        Ok(match self.options.writer {
            Writer::Native => Box::new(NativeLayer::create(&spec, self.compressors.clone())?),
            Writer::QemuNbd => {
                let options = QemuNbdOptions { tools: self.tools.clone(), ..QemuNbdOptions::default() };
                Box::new(QemuNbdLayer::create(&spec, options)?)
            }
        })
    }
}

impl BackupError {
    /// Why the cluster is not trusted; `None` where that is not why it failed.
    fn distrust(&self) -> Option<&Distrust> {
        let (Self::Copy(CopyError::Source(error)) | Self::Source(error)) = self else { return None };
        match error {
            SourceError::Segments { cause, .. }
            | SourceError::Diff { cause, .. }
            | SourceError::Unreliable { cause } => cause.downcast_ref(),
            SourceError::Read { .. } => None,
        }
    }
}

/// Refuses an image whose metadata say that it is not yet what it is to be.
fn refuse_half_restored(metadata: &BTreeMap<Vec<u8>, Vec<u8>>) -> Result<(), BackupError> {
    match metadata.get(INCOMPLETE_KEY) {
        Some(value) => Err(BackupError::HalfRestored { of: describe_incomplete(value) }),
        None => Ok(()),
    }
}

/// What is recorded besides the data.
impl Backup<'_> {
    fn record(
        &self,
        source: &LibrbdSource,
        cluster_size: u32,
        grain: u64,
        taken: Taken,
        metadata: BTreeMap<Vec<u8>, Vec<u8>>,
        progress: &Progress,
    ) -> Result<Record, BackupError> {
        let info = source.info();
        let parent = source.image().parent()?;
        Ok(Record {
            chain: taken.name.chain,
            created: self.time(),
            fsid: self.fsid.to_owned(),
            pool: self.pool_name.to_owned(),
            namespace: self.namespace.to_owned(),
            image_id: info.id.clone(),
            snapshot: taken.name.to_string(),
            snapshot_id: taken.id,
            virtual_size: info.size,
            object_size: info.object_size,
            stripe_unit: info.stripe_unit,
            stripe_count: info.stripe_count,
            features: Features { bits: info.features.0, names: info.features.names() },
            metadata,
            clone_parent: parent.map(|parent| CloneParent {
                pool: parent.pool,
                namespace: parent.namespace,
                image: parent.image,
                image_id: parent.image_id,
                snapshot: parent.snapshot,
                overlap: info.overlap,
            }),
            diff_mode: source.mode().as_str().to_owned(),
            object_map: source.map_digest(),
            objects: source.listed_objects(),
            data_extents: progress.data_extents.get(),
            data_bytes: progress.data.get(),
            zero_extents: progress.zero_extents.get(),
            zero_bytes: progress.zero.get(),
            writer: self.options.writer.as_str().to_owned(),
            compression: self.options.compression.to_string(),
            cluster_size,
            // Only subclusters make a grain smaller than a cluster.
            extended_l2: grain < u64::from(cluster_size),
        })
    }
}

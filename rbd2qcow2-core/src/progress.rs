//! What a run tells while it goes on, and when an image is done.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::chain::catalogue::PointKind;

/// Counters of one image's copy, updated by its threads and read by whoever shows them.
///
/// All are bytes, or nanoseconds summed over the threads that worked, and only ever grow. They are
/// independent of each other: two read one after the other need not fit together exactly.
#[derive(Debug, Default)]
pub struct Progress {
    /// Size of the snapshot. 0 until it is known.
    pub size: Counter,
    /// Bytes of the image that are dealt with: found unchanged, or compared and handed to the copy.
    /// Reaches `size` when nothing is left to compare.
    pub scanned: Counter,
    /// Bytes that the diff reported and that must be read.
    pub to_read: Counter,
    /// Bytes read from the source.
    pub read: Counter,
    /// Bytes that the layer holds as data. With compression more than has changed.
    pub data: Counter,
    /// Bytes that the layer holds as zeroes.
    pub zero: Counter,
    /// Extents of data that the diff reported.
    pub data_extents: Counter,
    /// Extents of zeroes that the diff reported.
    pub zero_extents: Counter,
    /// Time in which threads waited for the diff.
    pub diff_nanos: Counter,
    /// Time in which threads waited for reads.
    pub read_nanos: Counter,
    /// Time in which threads waited for the layer to take data or zeroes.
    pub write_nanos: Counter,
}

/// How much of something is done, in bytes. Both only ever grow.
#[derive(Debug, Default)]
pub struct Amount {
    /// What there is to do, as far as that is known.
    pub total: Counter,
    /// What is done. Reaches the total when nothing is left to do.
    pub done: Counter,
}

/// A number that many threads add to.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to the number.
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// Adds a time, in nanoseconds.
    pub fn add_time(&self, time: Duration) {
        self.add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    /// The number now.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// The number now, taken as nanoseconds.
    #[must_use]
    pub fn time(&self) -> Duration {
        Duration::from_nanos(self.get())
    }
}

/// What a backup, a restore or a merge of one image is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stage {
    /// Looking at the chain and at the image, removing left-overs.
    Prepare,
    /// Taking the snapshot.
    Snapshot,
    /// Waiting until others have copied.
    Queue,
    /// Removing what an existing image holds where the point that is restored has nothing.
    Empty,
    /// Holding layers that are to be merged against their digests.
    Verify,
    /// Comparing, reading and writing.
    Copy,
    /// Having a layer take over in place what the one above it holds.
    TakeOver,
    /// Bringing the point to stable storage.
    Commit,
    /// Removing snapshots that are no longer needed.
    CleanUp,
}

/// How the backup of one image ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// The point is on stable storage (in a dry run: would have been attempted).
    Ok,
    /// The image asks not to be backed up.
    Skipped,
    /// No point was made.
    Failed,
}

impl Status {
    /// The word that stands for it in reports: `ok`, `skipped` or `failed`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Skipped => "skipped",
            Self::Failed => "failed",
        }
    }
}

/// How the backup of one image went.
#[derive(Debug)]
#[non_exhaustive]
pub struct ImageReport {
    /// The image's name.
    pub image: String,
    /// The new point's name, when one was made or, in a dry run, would be.
    pub point: Option<String>,
    /// Full or incremental, once that was decided.
    pub kind: Option<PointKind>,
    /// How it ended.
    pub status: Status,
    /// Why it was skipped, or why a full backup was made where an incremental one would be usual.
    pub reason: Option<String>,
    /// What the point may lack although everything went well, and nobody can find out.
    pub not_excluded: Option<String>,
    /// Why it failed.
    pub error: Option<crate::source::BoxError>,
    /// The new layer.
    pub file: Option<PathBuf>,
    /// Virtual size of the snapshot, in bytes.
    pub virtual_size: u64,
    /// Bytes that the layer holds as data (in a dry run: the estimate of what would be read).
    pub data_bytes: u64,
    /// Bytes that the layer marks as zeroes.
    pub zero_bytes: u64,
    /// Bytes read from the cluster.
    pub read_bytes: u64,
    /// Bytes that were not reported as changed, were read all the same, and are what the chain holds.
    pub proved_bytes: u64,
    /// Bytes that the layer occupies on disk.
    pub layer_bytes: u64,
    /// From the start of the copy until nothing was left to compare.
    pub diff_time: Duration,
    /// From the start to the end of this image.
    pub time: Duration,
    /// The copy's counters, for the rates of its stages.
    pub progress: Arc<Progress>,
}

impl ImageReport {
    /// A report of an image of which nothing is known yet.
    #[must_use]
    pub fn new(image: &str, status: Status) -> Self {
        Self {
            image: image.to_owned(),
            point: None,
            kind: None,
            status,
            reason: None,
            not_excluded: None,
            error: None,
            file: None,
            virtual_size: 0,
            data_bytes: 0,
            zero_bytes: 0,
            read_bytes: 0,
            proved_bytes: 0,
            layer_bytes: 0,
            diff_time: Duration::ZERO,
            time: Duration::ZERO,
            progress: Arc::default(),
        }
    }
}

/// Is told how a run goes. Called from several threads; must not block for long.
pub trait Observer: Sync {
    /// The run will back up these images.
    fn selected(&self, _images: &[String]) {}

    /// Work on an image has begun, or begins anew; `progress` will be counted up from now on.
    fn started(&self, _image: &str, _progress: &Arc<Progress>) {}

    /// Work on an image has reached a stage.
    fn stage(&self, _image: &str, _stage: Stage) {}

    /// Work on an image has ended.
    fn finished(&self, _report: &ImageReport) {}
}

/// An observer that looks away.
impl Observer for () {}

//! How a backup is made.

use std::path::PathBuf;
use std::time::Duration;

use crate::layer::{Compression, ExtendedL2};

/// How the changes between two snapshots are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DiffMode {
    /// Object maps tell which objects exist, each of those is then compared. Never misses a change.
    #[default]
    Exact,
    /// Every object is asked for, no object map is looked at.
    Scan,
    /// The object maps' dirty bits are believed. Misses changes after a rollback, and wherever a
    /// client wrote a wrong map.
    Fast,
    /// Nothing is believed: the whole image is read and compared with what the chain holds. Needs no base
    /// snapshot.
    Compare,
}

/// What to do where the base snapshot is gone: somebody removed it, or made it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum BaseGone {
    /// A new chain begins with a full backup.
    #[default]
    Full,
    /// The whole image is compared with the newest point, and the chain goes on: [`DiffMode::Compare`].
    Compare,
}

impl DiffMode {
    /// The word that stands for it on command lines and in manifests.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Scan => "scan",
            Self::Fast => "fast",
            Self::Compare => "compare",
        }
    }
}

/// What writes the layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Writer {
    /// This program itself.
    #[default]
    Native,
    /// A qemu-nbd process for each layer.
    QemuNbd,
}

impl Writer {
    /// The word that stands for it on command lines and in manifests.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::QemuNbd => "qemu-nbd",
        }
    }
}

/// How a backup is made. `Default` is what the program does without options.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BackupOptions {
    /// Reads in flight for each image, 1 to 256.
    pub parallel: usize,
    /// What writes the layers.
    pub writer: Writer,
    /// How clusters are stored.
    pub compression: Compression,
    /// Cluster size of new layers in bytes, a power of two from 512 to 2 MiB; `None`:
    /// [`LayerSpec::DEFAULT_CLUSTER_SIZE`](crate::layer::LayerSpec::DEFAULT_CLUSTER_SIZE).
    pub cluster_size: Option<u32>,
    /// Whether clusters have subclusters.
    pub extended_l2: ExtendedL2,
    /// How changes are found.
    pub diff: DiffMode,
    /// Pages of 4 KiB that an incremental backup reads where nothing is reported to have changed, and holds
    /// against the chain; 0 believes what is reported.
    pub prove: usize,
    /// What to do where the base snapshot is gone.
    pub when_base_is_gone: BaseGone,
    /// Makes a root even where an incremental backup is possible.
    pub full: bool,
    /// Snapshots of the chain that stay in the cluster after a backup, at least 1: the next
    /// backup's base.
    pub keep_snapshots: usize,
    /// Bytes a second that may be read from the cluster, over all images.
    pub rate_limit: Option<u64>,
    /// Bytes of image data that may be in memory, over all images.
    pub memory: usize,
    /// Finds out what would be done, and changes nothing.
    pub dry_run: bool,
    /// How long the cluster may leave one request unanswered before the image is given up.
    pub patience: Duration,
    /// The time that points are named for, so that those of several images bear one name; `None`: when
    /// each backup begins. A point is newer than all others of its image in any case.
    pub time: Option<jiff::Timestamp>,
    /// The program `qemu-img`. Only [`Writer::QemuNbd`] needs it.
    pub qemu_img: PathBuf,
    /// The program `qemu-nbd`. Only [`Writer::QemuNbd`] needs it.
    pub qemu_nbd: PathBuf,
}

impl Default for BackupOptions {
    fn default() -> Self {
        Self {
            parallel: 16,
            writer: Writer::default(),
            compression: Compression::None,
            cluster_size: None,
            extended_l2: ExtendedL2::Auto,
            diff: DiffMode::Exact,
            prove: 64,
            when_base_is_gone: BaseGone::default(),
            full: false,
            keep_snapshots: 1,
            rate_limit: None,
            memory: 40 << 20,
            dry_run: false,
            patience: Duration::from_secs(300),
            time: None,
            qemu_img: "qemu-img".into(),
            qemu_nbd: "qemu-nbd".into(),
        }
    }
}

//! Directories of backups, made with the library and `qemu-img` where a cluster would be too much.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use jiff::Timestamp;
use rbd2qcow2_core::chain::manifest::Features;
use rbd2qcow2_core::chain::{
    ChainId, ChainWriter, Committed, ImageName, LayerPlan, PointName, Record, SnapshotName, image_directory,
};
use tempfile::TempDir;

/// Cluster size of the layers, in bytes.
const CLUSTER: u32 = 65_536;

/// Virtual size of the images: no multiple of a sector, as images may be.
pub const SIZE: u64 = 1_000_001;

/// A directory of backups that goes with its owner.
#[derive(Debug)]
pub struct Backups(TempDir);

impl Backups {
    /// An empty one.
    pub fn new() -> Self {
        Self(TempDir::new().expect("a temporary directory can be made"))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Where an image's points are.
    pub fn image(&self, image: &str) -> PathBuf {
        image_directory(self.path(), &ImageName::new(image).unwrap())
    }

    /// Adds a point to an image, upon its newest one if there is one.
    pub fn add(&self, image: &str, chain: &str, time: &str) -> Committed {
        let image = ImageName::new(image).unwrap();
        let created: Timestamp = time.parse().unwrap();
        let writer = ChainWriter::open(self.path(), &image).unwrap();
        let point = PointName::at(created).unwrap();
        let parent = writer.catalogue().newest();
        let pending = writer.begin(LayerPlan { point, parent, cluster_size: CLUSTER }).unwrap();
        let record = record(ChainId::parse(chain).unwrap(), point, created, pending.backing_name().is_some());
        create_layer(pending.layer_path(), record.layer_size(), pending.backing_name().as_deref());
        pending.commit(record).unwrap()
    }
}

/// What a run would have known of a point without data.
fn record(chain: ChainId, point: PointName, created: Timestamp, incremental: bool) -> Record {
    Record {
        chain,
        created,
        fsid: "ffffffff-0000-4000-8000-000000000000".into(),
        pool: "rbd".into(),
        namespace: String::new(),
        image_id: "1234".into(),
        snapshot: SnapshotName { chain, point }.to_string(),
        snapshot_id: 5,
        virtual_size: SIZE,
        object_size: 4 << 20,
        stripe_unit: 4 << 20,
        stripe_count: 1,
        features: Features::default(),
        metadata: BTreeMap::new(),
        clone_parent: None,
        diff_mode: if incremental { "exact" } else { "full" }.into(),
        data_extents: 0,
        data_bytes: 0,
        zero_extents: 0,
        zero_bytes: 0,
        writer: "qemu-nbd".into(),
        compression: "none".into(),
        cluster_size: CLUSTER,
        extended_l2: false,
    }
}

/// Makes an empty layer.
pub fn create_layer(path: &Path, size: u64, backing: Option<&str>) {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-o", &format!("cluster_size={CLUSTER}")]);
    if let Some(backing) = backing {
        command.args(["-F", "qcow2", "-b", backing]);
    }
    let status = command.arg(path).arg(size.to_string()).status();
    assert!(status.expect("qemu-img is installed").success(), "qemu-img create {}", path.display());
}

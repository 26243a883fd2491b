//! Points of an image, made as a backup makes them, but of a source that makes its data up.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rbd2qcow2_core::chain::manifest::Features;
use rbd2qcow2_core::chain::{
    Catalogue, ChainId, ChainWriter, ImageName, LayerPlan, PointName, Record, SnapshotName, image_directory,
};
use rbd2qcow2_core::layer::native::{Compressors, NativeLayer};
use rbd2qcow2_core::layer::{Compression, LayerSpec, LayerWriter};
use rbd2qcow2_core::progress::Progress;
use rbd2qcow2_core::source::RbdDiffSource;
use tempfile::TempDir;

/// When the first point was made, as unix time.
const FIRST: i64 = 1_700_000_000;

/// A destination with the points of one image, removed on drop.
#[derive(Debug)]
pub struct Points {
    dest: TempDir,
    image: ImageName,
    compression: Compression,
    /// The oldest first.
    names: Vec<PointName>,
}

impl Points {
    /// An image without points, whose layers will be packed so.
    ///
    /// # Panics
    /// When there is no directory for temporary files. None of this is measured, so errors are panics.
    #[must_use]
    pub fn new(compression: Compression) -> Self {
        let dest = tempfile::tempdir().expect("a temporary directory");
        Self { dest, image: ImageName::new("vm").expect("a name"), compression, names: Vec::new() }
    }

    /// Makes a point of what has changed in `source`.
    ///
    /// # Panics
    /// When that fails.
    pub fn add(&mut self, source: &dyn RbdDiffSource) {
        let writer = ChainWriter::open(self.dest.path(), &self.image).expect("opened");
        let second = (FIRST..).nth(self.names.len()).expect("a second");
        let point = PointName::at(Timestamp::from_second(second).expect("a time")).expect("a name");
        let cluster_size = LayerSpec::DEFAULT_CLUSTER_SIZE;
        let parent = writer.catalogue().newest();
        let pending = writer.begin(LayerPlan { point, parent, cluster_size }).expect("begun");
        let root = super::layer_spec(pending.layer_path(), source.size(), self.compression);
        let spec = LayerSpec { backing: pending.backing_name(), ..root };
        let layer = NativeLayer::create(&spec, Compressors::default()).expect("created");
        let (buffers, parallel) = (super::usual_memory(), super::usual_parallel());
        let copied =
            super::run(source, &layer, &buffers, parallel, parent.is_none(), Some(pending.digests()));
        let record = self.record(point, &spec, &layer, &copied);
        drop(layer);
        pending.commit(record).expect("committed");
        self.names.push(point);
    }

    fn record(&self, point: PointName, spec: &LayerSpec, layer: &NativeLayer, copied: &Progress) -> Record {
        const OBJECT: u64 = 4 << 20;
        let chain = ChainId::parse("00c0ffee").expect("an id");
        Record {
            chain,
            created: point.timestamp(),
            fsid: String::new(),
            pool: "rbd".to_owned(),
            namespace: String::new(),
            image_id: String::new(),
            snapshot: SnapshotName { chain, point }.to_string(),
            snapshot_id: 1,
            virtual_size: spec.virtual_size,
            object_size: OBJECT,
            stripe_unit: OBJECT,
            stripe_count: 1,
            features: Features::default(),
            metadata: BTreeMap::new(),
            clone_parent: None,
            diff_mode: "exact".to_owned(),
            object_map: None,
            objects: None,
            data_extents: copied.data_extents.get(),
            data_bytes: copied.data.get(),
            zero_extents: copied.zero_extents.get(),
            zero_bytes: copied.zero.get(),
            writer: "native".to_owned(),
            compression: self.compression.to_string(),
            cluster_size: spec.cluster_size,
            extended_l2: layer.grain() < u64::from(spec.cluster_size),
        }
    }

    /// The same points in another destination.
    ///
    /// # Panics
    /// When files cannot be copied.
    #[must_use]
    pub fn duplicate(&self) -> Self {
        let mut other = Self::new(self.compression);
        let directory = image_directory(other.dest(), &self.image);
        fs::create_dir(&directory).expect("created");
        for entry in fs::read_dir(image_directory(self.dest(), &self.image)).expect("readable") {
            let entry = entry.expect("readable");
            fs::copy(entry.path(), directory.join(entry.file_name())).expect("copied");
        }
        other.names.clone_from(&self.names);
        other
    }

    /// The destination.
    #[must_use]
    pub fn dest(&self) -> &Path {
        self.dest.path()
    }

    /// The image.
    #[must_use]
    pub fn image(&self) -> &ImageName {
        &self.image
    }

    /// The points, the oldest first.
    #[must_use]
    pub fn names(&self) -> &[PointName] {
        &self.names
    }

    /// The layers of the newest point, the newest first.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn layers(&self) -> Vec<PathBuf> {
        let directory = image_directory(self.dest(), &self.image);
        let catalogue = Catalogue::read(&directory, &self.image).expect("readable");
        let newest = catalogue.newest().expect("a point").name;
        catalogue.layers(newest).expect("a whole chain")
    }
}

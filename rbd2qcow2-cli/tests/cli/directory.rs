//! Directories of backups, made with the library and `qemu-img` where a cluster would be too much.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;

use jiff::Timestamp;
use rbd2qcow2_core::buffer::{Buffer, BufferPool};
use rbd2qcow2_core::cancel::Cancel;
use rbd2qcow2_core::chain::digests::DigestWriter;
use rbd2qcow2_core::chain::manifest::Features;
use rbd2qcow2_core::chain::{
    Catalogue, ChainId, ChainWriter, Committed, ImageName, LayerPlan, PointName, Record, SnapshotName,
    image_directory,
};
use rbd2qcow2_core::copy::Copy;
use rbd2qcow2_core::extent::{Extent, ExtentKind};
use rbd2qcow2_core::layer::native::{Compressors, NativeLayer};
use rbd2qcow2_core::layer::{Compression, ExtendedL2, LayerSpec, LayerWriter};
use rbd2qcow2_core::merge::{Merge, MergeOptions, MergeProgress, Way};
use rbd2qcow2_core::progress::Progress;
use rbd2qcow2_core::source::memory::MemorySource;
use rbd2qcow2_core::source::{RbdDiffSource, SourceError};
use tempfile::TempDir;

/// Cluster size of the layers, in bytes.
const CLUSTER: u32 = 65_536;

/// Virtual size of the images: no multiple of a sector, as images may be.
pub const SIZE: u64 = 1_000_001;

/// What a point builds upon.
enum Base {
    Newest,
    Nothing,
    Point(PointName),
}
use Base::{Newest, Nothing, Point};

/// The form of layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    pub compression: Compression,
    pub extended_l2: ExtendedL2,
}

/// As most tests have them.
const SIMPLE: Form = Form { compression: Compression::None, extended_l2: ExtendedL2::Off };

/// A directory of backups, which goes with its owner if that has made it.
#[derive(Debug)]
pub struct Backups {
    path: PathBuf,
    _temporary: Option<TempDir>,
}

impl Backups {
    /// An empty one.
    pub fn new() -> Self {
        Self::with(TempDir::new().expect("a temporary directory can be made"))
    }

    /// One that takes a temporary directory over.
    pub fn with(directory: TempDir) -> Self {
        Self { path: directory.path().to_owned(), _temporary: Some(directory) }
    }

    /// One that stays.
    pub fn at(path: PathBuf) -> Self {
        Self { path, _temporary: None }
    }

    /// Two images, one of them with two points.
    pub fn of_two_images() -> Self {
        let backups = Self::new();
        backups.add("web/1", "0123abcd", "2026-11-22T17:33:12Z");
        backups.add("web/1", "0123abcd", "2026-11-23T17:33:07Z");
        backups.add("db", "89abcdef", "2026-11-22T17:34:00Z");
        backups
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where an image's points are.
    pub fn image(&self, image: &str) -> PathBuf {
        image_directory(self.path(), &ImageName::new(image).unwrap())
    }

    /// Adds a point to an image, upon its newest one if there is one.
    pub fn add(&self, image: &str, chain: &str, time: &str) -> Committed {
        self.add_sized(image, chain, time, SIZE)
    }

    /// Adds a point to an image that is `size` bytes long now, upon its newest one if there is one.
    pub fn add_sized(&self, image: &str, chain: &str, time: &str, size: u64) -> Committed {
        self.commit(image, chain, time, size, SIMPLE, Newest, |path, backing, _| {
            create_layer(path, size.next_multiple_of(512), backing);
        })
    }

    /// Adds a point to an image, upon the one of the name `parent`, or upon none.
    pub fn add_upon(&self, parent: Option<&str>, image: &str, chain: &str, time: &str) -> Committed {
        let parent = parent.map_or(Nothing, |parent| Point(PointName::parse(parent).unwrap()));
        self.commit(image, chain, time, SIZE, SIMPLE, parent, |path, backing, _| {
            create_layer(path, SIZE.next_multiple_of(512), backing);
        })
    }

    /// Adds a point that holds `content` to an image, upon its newest one, which holds `base`, if there is
    /// one.
    pub fn fill(&self, image: &str, time: &str, content: &[u8], base: Option<&[u8]>) -> Committed {
        self.fill_as(SIMPLE, image, time, content, base)
    }

    /// As [`fill`](Self::fill), in another form.
    pub fn fill_as(
        &self,
        form: Form,
        image: &str,
        time: &str,
        content: &[u8],
        base: Option<&[u8]>,
    ) -> Committed {
        let size = content.len() as u64;
        self.commit(image, "0123abcd", time, size, form, Newest, |path, backing, digests| {
            assert_eq!(backing.is_some(), base.is_some(), "a base is what the newest point holds");
            write_layer(path, form, content, backing, base, digests);
        })
    }

    /// Adds a point to an image as the Python tool does, at a unix time: without manifest and digests, and the
    /// first one upon an image of nothing. It holds `content`, and the newest point `base`, if there is one.
    pub fn fill_as_python(&self, image: &str, second: i64, content: &[u8], base: Option<&[u8]>) {
        let directory = self.image(image);
        std::fs::create_dir_all(&directory).unwrap();
        let file = |point: &dyn std::fmt::Display| format!("{image}@{point}.qcow2");
        let catalogue = Catalogue::read(&directory, &ImageName::new(image).unwrap()).unwrap();
        let backing = match catalogue.newest() {
            Some(newest) => file(&newest.name),
            None => "empty.qcow2".to_owned(),
        };
        assert_eq!(catalogue.newest().is_some(), base.is_some(), "a base is what the newest point holds");
        if base.is_none() {
            create_layer(&directory.join(&backing), content.len() as u64, None);
        }
        let scratch = TempDir::new().unwrap();
        let digests = DigestWriter::create(&scratch.path().join("digests"), CLUSTER).unwrap();
        write_layer(&directory.join(file(&second)), SIMPLE, content, Some(&backing), base, &digests);
    }

    /// Adds a point to an image of `size` bytes: upon the newest one, if there is one, a page has changed at each
    /// of these places. At a unix time.
    pub fn scatter(&self, image: &str, second: i64, size: u64, places: &[u64]) {
        let time = Timestamp::from_second(second).unwrap().to_string();
        let form = Form { compression: Compression::None, extended_l2: ExtendedL2::Off };
        self.commit(image, "0123abcd", &time, size, form, Newest, |path, backing, digests| {
            let source = Scattered { size, places: places.to_vec() };
            write_from(path, form, &source, backing, backing.is_none(), digests);
        });
    }

    /// Leaves an image as a run does that was to forget all points but the newest one, and is killed when the
    /// large layer at the bottom has lost its point and not yet taken over what is above it.
    pub fn half_merge(&self, image: &str) {
        let mut writer = ChainWriter::open(self.path(), &ImageName::new(image).unwrap()).unwrap();
        let mut names: Vec<_> = writer.catalogue().points().iter().map(|point| point.name).collect();
        let child = names.pop().expect("a point");
        let mut options = MergeOptions::default();
        // However small it is.
        options.least_saving = 0;
        let merge = Merge {
            writer: &writer,
            child,
            parent: None,
            options: &options,
            compressors: &Compressors::default(),
            progress: &MergeProgress::default(),
            observer: &(),
            cancel: &Cancel::new(),
        };
        assert_eq!(merge.run().unwrap(), Way::UponBase, "the layer can be reused");
        writer.note_forgetting(&names).unwrap();
        assert_eq!(writer.forget().unwrap().len(), names.len());
    }

    #[allow(clippy::too_many_arguments, reason = "that is what a point is made of")]
    fn commit(
        &self,
        image: &str,
        chain: &str,
        time: &str,
        size: u64,
        form: Form,
        base: Base,
        write: impl FnOnce(&Path, Option<&str>, &DigestWriter),
    ) -> Committed {
        let image = ImageName::new(image).unwrap();
        let created: Timestamp = time.parse().unwrap();
        let writer = ChainWriter::open(self.path(), &image).unwrap();
        let point = PointName::at(created).unwrap();
        let catalogue = writer.catalogue();
        let parent = match base {
            Newest => catalogue.newest(),
            Nothing => None,
            Point(name) => Some(catalogue.point(name).expect("the parent is there")),
        };
        let pending = writer.begin(LayerPlan { point, parent, cluster_size: CLUSTER }).unwrap();
        let incremental = pending.backing_name().is_some();
        let record = record(ChainId::parse(chain).unwrap(), point, created, incremental);
        write(pending.layer_path(), pending.backing_name().as_deref(), pending.digests());
        let record = Record {
            virtual_size: size,
            compression: form.compression.to_string(),
            extended_l2: form.extended_l2 == ExtendedL2::Auto,
            ..record
        };
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
        object_map: None,
        objects: None,
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

/// Makes a layer of the content that the base does not have.
fn write_layer(
    path: &Path,
    form: Form,
    content: &[u8],
    backing: Option<&str>,
    base: Option<&[u8]>,
    digests: &DigestWriter,
) {
    let source = MemorySource {
        content: content.to_vec(),
        base: base.map(<[u8]>::to_vec),
        block: 4096,
        ..MemorySource::default()
    };
    write_from(path, form, &source, backing, base.is_none(), digests);
}

/// An image of which a page has changed at each of some places.
struct Scattered {
    size: u64,
    places: Vec<u64>,
}

/// Length of such a page.
const PAGE: u64 = 4096;

impl RbdDiffSource for Scattered {
    fn size(&self) -> u64 {
        self.size
    }

    fn segments(&self, align: u64) -> Box<dyn Iterator<Item = Result<Range<u64>, SourceError>> + Send + '_> {
        let step = align.max(1 << 30);
        let starts = (0..self.size.div_ceil(step)).map(move |number| number * step);
        Box::new(starts.map(move |start| Ok(start..(start + step).min(self.size))))
    }

    fn diff(&self, segment: Range<u64>, found: &mut Vec<Extent>) -> Result<(), SourceError> {
        let inside = self.places.iter().filter(|place| segment.contains(*place));
        found.extend(inside.filter_map(|&place| Extent::new(place..place + PAGE, ExtentKind::Data)));
        Ok(())
    }

    fn read(&self, offset: u64, buffer: &mut Buffer) -> Result<(), SourceError> {
        for (number, byte) in (offset..).zip(buffer.iter_mut()) {
            *byte = (number / PAGE) as u8 | 1;
        }
        Ok(())
    }
}

/// Makes a layer of what has changed.
fn write_from(
    path: &Path,
    form: Form,
    source: &dyn RbdDiffSource,
    backing: Option<&str>,
    root: bool,
    digests: &DigestWriter,
) {
    let spec = LayerSpec {
        path: path.to_owned(),
        virtual_size: source.size().next_multiple_of(512),
        backing: backing.map(str::to_owned),
        cluster_size: CLUSTER,
        compression: form.compression,
        extended_l2: form.extended_l2,
    };
    let layer = NativeLayer::create(&spec, Compressors::default()).unwrap();
    let cancel = Cancel::new();
    let copy = Copy {
        source,
        layer: &layer,
        root,
        digests: Some(digests),
        buffers: &BufferPool::new(16 << 20),
        rate_limit: None,
        parallel: 4,
        progress: &Progress::default(),
        cancel: &cancel,
        stop: &cancel.part(),
    };
    copy.run().unwrap();
    layer.finish().unwrap();
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

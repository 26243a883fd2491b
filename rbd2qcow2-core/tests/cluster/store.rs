//! A destination of backups, whose points are held against what their snapshots held.
//!
//! Nothing of the library is believed: the second client reads the snapshots, stock QEMU reads the
//! chains, and the manifests are read as the JSON that they are.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use rbd2qcow2_core::cancel::Cancel;
use rbd2qcow2_core::chain::digests::{Content, DigestReader};
use rbd2qcow2_core::chain::{ImageName, SnapshotName};
use rbd2qcow2_core::layer::{Compression, ExtendedL2, LayerSpec};
use rbd2qcow2_core::options::{BackupOptions, Writer};
use rbd2qcow2_core::pool::PoolBackup;
use rbd2qcow2_core::progress::{ImageReport, Status};
use rbd2qcow2_core::rbd::ClusterOptions;
use serde_json::Value;
use tempfile::TempDir;

use crate::cluster::TestCluster;
use crate::driver::{Driver, Layout, Snap, Spec};

mod content;
mod restored;

use content::{Held, compare, merge};
pub use content::{output, read_json};
pub use restored::told;

/// A destination, and what every point in it must hold.
#[derive(Debug)]
pub struct Store {
    pub cluster: TestCluster,
    pub driver: Driver,
    pub options: BackupOptions,
    /// The `qemu-img`s that read what was written.
    pub readers: Vec<PathBuf>,
    dest: TempDir,
    truths: TempDir,
    points: Vec<Made>,
    /// Files that no run may touch, and their contents.
    frozen: BTreeMap<PathBuf, Vec<u8>>,
}

/// A point that was made, and what it must hold.
#[derive(Clone, Debug)]
pub struct Made {
    pub spec: Spec,
    pub point: String,
    /// Its layer.
    pub file: PathBuf,
    pub manifest: Value,
    /// What the report said of why it is full.
    pub reason: Option<String>,
    pub kind: &'static str,
    /// Bytes that were read from the cluster.
    pub read_bytes: u64,
    /// The content of its snapshot, as the second client read it.
    truth: PathBuf,
}

impl Made {
    /// # Panics
    /// Unless the point stands alone, for a reason that holds `reason` (`None`: for no reason).
    pub fn assert_full(&self, reason: Option<&str>) {
        assert_eq!(self.kind, "full", "{self:?}");
        match (reason, &self.reason) {
            (None, None) => {}
            (Some(expected), Some(given)) if given.contains(expected) => {}
            _ => panic!("a full backup because of {:?}, expected {reason:?}", self.reason),
        }
    }

    /// # Panics
    /// Unless the point builds upon `parent`.
    pub fn assert_upon(&self, parent: &Self) {
        assert_eq!(self.reason, None, "{self:?}");
        self.assert_upon_because(parent);
    }

    /// # Panics
    /// Unless the point builds upon `parent`, for whatever reason.
    pub fn assert_upon_because(&self, parent: &Self) {
        assert_eq!(self.kind, "incremental", "{self:?}");
        assert_eq!(self.manifest["parent"], parent.point);
    }

    /// A number of the manifest.
    pub fn number(&self, key: &str) -> u64 {
        self.manifest[key].as_u64().unwrap_or_else(|| panic!("{key} of {}", self.manifest))
    }

    /// Bytes of data and of zeroes that the layer holds.
    pub fn held(&self) -> (u64, u64) {
        (self.number("data_bytes"), self.number("zero_bytes"))
    }
}

impl Store {
    pub fn new(cluster: &TestCluster) -> Self {
        let options = BackupOptions::default();
        Self {
            cluster: cluster.clone(),
            driver: cluster.driver(),
            readers: vec![options.qemu_img.clone()],
            options,
            dest: tempfile::tempdir().expect("a temporary directory"),
            truths: tempfile::tempdir().expect("a temporary directory"),
            points: Vec::new(),
            frozen: BTreeMap::new(),
        }
    }

    /// A destination for each writer.
    pub fn of_each_writer(cluster: &TestCluster) -> impl Iterator<Item = Self> {
        [Writer::Native, Writer::QemuNbd].into_iter().map(|writer| {
            let mut store = Self::new(cluster);
            store.options.writer = writer;
            store
        })
    }

    /// An image that no other test uses.
    pub fn image(&self, name: &str, size: u64, layout: &Layout) -> Spec {
        let spec = crate::cluster::unique_image(name);
        self.driver.create(&spec, size, layout).expect("the image is made");
        spec
    }

    /// The destination.
    pub fn dest(&self) -> &Path {
        self.dest.path()
    }

    /// The directory of an image.
    pub fn directory(&self, spec: &Spec) -> PathBuf {
        self.dest.path().join(encoded(spec))
    }

    /// The points made so far that were not forgotten, of all images.
    pub fn points(&self) -> &[Made] {
        &self.points
    }

    /// A backup of these images, which are of one pool and namespace.
    pub fn pool_backup(&self, specs: &[Spec]) -> PoolBackup {
        PoolBackup {
            cluster: ClusterOptions { conf: Some(self.cluster.conf.clone()), ..ClusterOptions::default() },
            pool: specs[0].pool.clone(),
            namespace: specs[0].namespace.clone(),
            dest: self.dest.path().to_owned(),
            images: specs.iter().map(|spec| spec.image.clone()).collect(),
            exclude: Vec::new(),
            jobs: 2,
            options: self.options.clone(),
        }
    }

    /// Runs a backup of one image and checks nothing.
    pub fn run(&self, spec: &Spec) -> ImageReport {
        let backup = self.pool_backup(std::slice::from_ref(spec));
        let mut reports = backup.run(&(), &Cancel::new()).expect("the pool is there");
        assert_eq!(reports.len(), 1, "{reports:?}");
        reports.pop().expect("one report")
    }

    /// Backs one image up, and checks everything that can be said about the new point.
    ///
    /// # Panics
    /// Where anything is wrong.
    pub fn back_up(&mut self, spec: &Spec) -> Made {
        self.back_up_all(std::slice::from_ref(spec)).pop().expect("one point")
    }

    /// The same for several images at once. The points are in the order of `specs`.
    pub fn back_up_all(&mut self, specs: &[Spec]) -> Vec<Made> {
        let before: Vec<_> = specs.iter().map(|spec| self.driver.snaps(spec).expect("snapshots")).collect();
        let reports = self.pool_backup(specs).run(&(), &Cancel::new()).expect("the pool is there");
        assert_eq!(reports.len(), specs.len(), "{reports:?}");
        let mut made = Vec::new();
        for (spec, before) in specs.iter().zip(before) {
            let report = reports.iter().find(|report| report.image == spec.image).expect("a report");
            made.push(self.take_in(spec, report, &before));
        }
        made
    }

    /// Checks a point that a run has made, and remembers what it must hold. `before`: the image's
    /// snapshots before the run.
    pub fn take_in(&mut self, spec: &Spec, report: &ImageReport, before: &[Snap]) -> Made {
        assert_eq!(report.status, Status::Ok, "{}: {}", spec.image, why(report));
        let point = report.point.clone().expect("a point");
        let file = self.directory(spec).join(format!("{}@{point}.qcow2", encoded(spec)));
        assert_eq!(report.file.as_ref(), Some(&file));
        let made = Made {
            spec: spec.clone(),
            manifest: read_json(&file.with_extension("json")),
            truth: self.truth(),
            reason: report.reason.clone(),
            kind: report.kind.expect("a kind").as_str(),
            read_bytes: report.read_bytes,
            point,
            file,
        };
        let snapshot = made.manifest["snapshot"].as_str().expect("a snapshot");
        self.driver.read_to(spec, Some(snapshot), &made.truth).expect("the snapshot can be read");
        self.points.push(made.clone());
        self.check_content(&made);
        self.check_manifest(&made, report);
        self.check_format(&made);
        self.check_digests(&made);
        self.check_directory(spec);
        self.check_snapshots(&made, before);
        made
    }

    /// Adds a point that something else has made; it must hold what is in the file `truth`.
    pub fn adopt(&mut self, spec: &Spec, point: &str, file: &Path, truth: &Path) {
        let kept = self.truth();
        fs::copy(truth, &kept).expect("a copy");
        self.points.push(Made {
            spec: spec.clone(),
            point: point.to_owned(),
            file: file.to_owned(),
            manifest: Value::Null,
            reason: None,
            kind: "full",
            read_bytes: 0,
            truth: kept,
        });
    }

    /// Compares every point once more with what its snapshot held.
    pub fn check_again(&self) {
        self.points.iter().for_each(|made| self.check_content(made));
    }

    /// A new place for what a point must hold.
    fn truth(&self) -> PathBuf {
        self.truths.path().join(crate::cluster::unique("truth"))
    }

    /// Of the image's points only these are there any more, and may have other parents than they had.
    pub fn keep_only(&mut self, spec: &Spec, points: &[String]) {
        self.points.retain(|made| {
            let stays = made.spec != *spec || points.contains(&made.point);
            if !stays {
                fs::remove_file(&made.truth).expect("removed");
            }
            stays
        });
        // The Python tool's points have no manifest, before and after.
        let ours = |made: &&mut Made| made.spec == *spec && !made.manifest.is_null();
        for made in self.points.iter_mut().filter(ours) {
            made.manifest = read_json(&made.file.with_extension("json"));
        }
    }

    /// What is in the directory of the image now must never change; the points named `damaged` are no
    /// longer expected to hold anything.
    pub fn freeze(&mut self, spec: &Spec, damaged: &[&Made]) {
        for entry in fs::read_dir(self.directory(spec)).expect("a directory") {
            let path = entry.expect("an entry").path();
            if !path.ends_with(".lock") {
                self.frozen.insert(path.clone(), fs::read(&path).expect("a file"));
            }
        }
        self.points.retain(|made| !damaged.iter().any(|damaged| damaged.file == made.file));
    }

    /// A frozen file may change, or shall go: it is a left-over, or a layer that is pruned or merged.
    pub fn expect_removal(&mut self, path: &Path) {
        self.frozen.remove(path).expect("a frozen file");
    }

    /// Removes an image and its snapshots from the cluster.
    pub fn purge(&self, spec: &Spec) {
        self.driver.purge(spec).expect("the image can be removed");
    }

    // --- What is checked

    /// The point read through its chain is the snapshot, the layer is sound, and the chain is the one
    /// that the manifests tell of.
    fn check_content(&self, made: &Made) {
        for qemu_img in &self.readers {
            let raw = self.convert(qemu_img, made);
            compare(&made.truth, raw.path(), made);
            let checked = output(qemu_img, &["check", "--output=json", "-f", "qcow2"], &made.file);
            let checked: Value = serde_json::from_slice(&checked).expect("JSON");
            for (key, found) in checked.as_object().expect("an object") {
                let bad = ["errors", "leaks", "corruptions"].iter().any(|word| key.contains(word));
                assert!(!bad || *found == 0, "{}: {checked}", made.file.display());
            }
            assert_eq!(checked["check-errors"], 0, "{checked}");
            self.check_chain(qemu_img, made);
        }
        restored::check(self.dest.path(), made);
    }

    fn convert(&self, qemu_img: &Path, made: &Made) -> tempfile::NamedTempFile {
        let raw = tempfile::NamedTempFile::new_in(self.truths.path()).expect("a temporary file");
        let done = Command::new(qemu_img)
            .args(["convert", "-f", "qcow2", "-O", "raw"])
            .args([made.file.as_path(), raw.path()])
            .output()
            .expect("qemu-img runs");
        assert!(done.status.success(), "{made:?}: {}", String::from_utf8_lossy(&done.stderr));
        raw
    }

    fn check_chain(&self, qemu_img: &Path, made: &Made) {
        let info = output(qemu_img, &["info", "--backing-chain", "--output=json", "-f", "qcow2"], &made.file);
        let info: Vec<Value> = serde_json::from_slice(&info).expect("JSON");
        let mut manifest = made.manifest.clone();
        let mut file = made.file.clone();
        for (index, layer) in info.iter().enumerate() {
            assert_eq!(layer["filename"].as_str(), file.to_str(), "layer {index} of {made:?}");
            assert_eq!(layer["format"], "qcow2");
            if manifest.is_null() {
                // A layer of the Python tool: no manifest tells what is below.
                return;
            }
            let size = manifest["virtual_size"].as_u64().expect("a size").next_multiple_of(512);
            assert_eq!(layer["virtual-size"], size);
            let Some(parent) = manifest["parent"].as_str() else {
                assert_eq!(layer["backing-filename"], Value::Null);
                assert_eq!(info.len(), index + 1, "{made:?}");
                return;
            };
            let backing = format!("{}@{parent}.qcow2", encoded(&made.spec));
            assert_eq!(layer["backing-filename"], *backing);
            assert_eq!(layer["backing-filename-format"], "qcow2");
            file = made.file.with_file_name(backing);
            let path = file.with_extension("json");
            manifest = if path.exists() { read_json(&path) } else { Value::Null };
        }
        panic!("the chain of {made:?} ends too early: {info:?}");
    }

    /// Every number of the manifest and of the report is true.
    fn check_manifest(&self, made: &Made, report: &ImageReport) {
        let Made { spec, manifest, .. } = made;
        let snapshot = manifest["snapshot"].as_str().expect("a snapshot");
        let info = self.driver.info(spec, Some(snapshot)).expect("the snapshot");
        let snapshots = self.driver.snaps(spec).expect("snapshots");
        let listed = snapshots.iter().find(|listed| listed.name == snapshot).expect("the snapshot is listed");
        let expected = |key: &str, value: Value| assert_eq!(manifest[key], value, "{key} of {made:?}");
        expected("format", 1.into());
        expected("snapshot", format!("rbd2qcow2-{}-{}", text(manifest, "chain"), made.point).into());
        expected("snapshot_id", listed.id.into());
        expected("image", spec.image.clone().into());
        expected("image_id", info.id.into());
        expected("pool", spec.pool.clone().into());
        expected("namespace", spec.namespace.clone().into());
        expected("fsid", self.driver.fsid().expect("an fsid").into());
        expected("point", made.point.clone().into());
        expected("virtual_size", info.size.into());
        expected("object_size", info.object_size.into());
        expected("stripe_unit", info.stripe_unit.into());
        expected("stripe_count", info.stripe_count.into());
        expected("compression", self.options.compression.to_string().into());
        let features: BTreeSet<_> = manifest["features"]["names"]
            .as_array()
            .expect("features")
            .iter()
            .filter_map(Value::as_str)
            .collect();
        assert!(info.features.iter().all(|name| features.contains(&**name)), "{features:?} of {made:?}");
        let parent = info.parent.map(|[pool, image, snapshot]| (pool, image, snapshot));
        let recorded = manifest["clone_parent"].as_object().map(|parent| {
            let text = |key: &str| parent[key].as_str().expect("a text").to_owned();
            assert_eq!(parent["overlap"], info.overlap);
            (text("pool"), text("image"), text("snapshot"))
        });
        assert_eq!(recorded, parent, "{made:?}");
        assert_eq!(made.kind == "full", manifest["parent"].is_null());

        let file = fs::metadata(&made.file).expect("the layer");
        assert_eq!(file.mode() & 0o777, 0o400, "{made:?}");
        expected("file_bytes", file.len().into());
        expected("layer_bytes", (file.blocks() * 512).into());
        assert_eq!(report.layer_bytes, file.blocks() * 512);
        assert_eq!(report.virtual_size, info.size);
        assert_eq!((report.data_bytes, report.zero_bytes), made.held());
        let held = self.map(made);
        let sum = |zero| held.iter().filter(|held| held.zero == zero).map(|held| held.end - held.start).sum();
        assert_eq!(made.held(), (sum(false), sum(true)), "{made:?}: {held:?}");
        // A page more at either end of what it holds, and some clusters of tables.
        let tables = 16 * made.number("cluster_size").max(64 << 10);
        let largest = (made.held().0 + 8192 * held.len() as u64) / 8 * 9 + tables;
        assert!(file.blocks() * 512 <= largest, "more than {largest} bytes: {made:?}");
    }

    /// The file is of the kind that was asked for, and its manifest says so.
    fn check_format(&self, made: &Made) {
        let BackupOptions { writer, compression, extended_l2, cluster_size, .. } = &self.options;
        let cluster_size = cluster_size.unwrap_or(LayerSpec::DEFAULT_CLUSTER_SIZE);
        let zstd = matches!(compression, Compression::Zstd { .. });
        let packs = *compression != Compression::None;
        // A layer of qemu-nbd has either subclusters or compressed clusters; only ours has both.
        let extended = *extended_l2 == ExtendedL2::Auto
            && cluster_size >= 16 << 10
            && (*writer == Writer::Native || !packs);
        for qemu_img in &self.readers {
            let info = output(qemu_img, &["info", "--output=json", "-f", "qcow2"], &made.file);
            let info: Value = serde_json::from_slice(&info).expect("JSON");
            let data = &info["format-specific"]["data"];
            assert_eq!(info["cluster-size"], cluster_size, "{info}");
            assert_eq!(data["compat"], "1.1", "{info}");
            assert_eq!(data["compression-type"], if zstd { "zstd" } else { "zlib" }, "{info}");
            assert_eq!(data["extended-l2"], extended, "{info}");
            assert_eq!((&data["corrupt"], &data["refcount-bits"]), (&false.into(), &16.into()), "{info}");
            assert!(info["dirty-flag"] == false && info["snapshots"].is_null(), "{info}");
        }
        let expected = |key: &str, value: Value| assert_eq!(made.manifest[key], value, "{key} of {made:?}");
        expected("writer", writer.as_str().into());
        expected("cluster_size", cluster_size.into());
        expected("extended_l2", extended.into());
    }

    /// What QEMU says that the layer itself holds, adjacent ranges of a kind as one.
    fn map(&self, made: &Made) -> Vec<Held> {
        let map = output(&self.readers[0], &["map", "--output=json", "-f", "qcow2"], &made.file);
        let map: Vec<Value> = serde_json::from_slice(&map).expect("JSON");
        let own = map.iter().filter(|part| part["depth"] == 0 && part["present"] == true);
        merge(own.map(|part| {
            let start = part["start"].as_u64().expect("a start");
            let end = start + part["length"].as_u64().expect("a length");
            Held { start, end, zero: part["zero"] == true }
        }))
    }

    /// The digests cover exactly what the layer holds, and are those of the content.
    fn check_digests(&self, made: &Made) {
        let path = made.file.with_extension("digests");
        let raw = self.convert(&self.readers[0], made);
        let mut covered = Vec::new();
        for record in DigestReader::open(&path).expect("digests") {
            let record = record.expect("a sound record");
            let mut bytes = vec![0; if record.content == Content::Zero { 0 } else { record.length as usize }];
            raw.as_file().read_exact_at(&mut bytes, record.offset).expect("the record lies in the image");
            match record.content {
                Content::Data(hash) => assert_eq!(blake3::hash(&bytes), hash, "{record:?} of {made:?}"),
                Content::Zero => {}
            }
            let zero = record.content == Content::Zero;
            covered.push(Held { start: record.offset, end: record.end(), zero });
        }
        assert_eq!(merge(covered.into_iter()), self.map(made), "digests and layer of {made:?}");
        let bytes = fs::read(&path).expect("digests");
        assert_eq!(made.manifest["digests"]["bytes"], bytes.len() as u64);
        assert_eq!(made.manifest["digests"]["blake3"], *blake3::hash(&bytes).to_hex());
    }

    /// The directory holds the lock, three files for each point and what was there before, unchanged.
    pub fn check_directory(&self, spec: &Spec) {
        let directory = self.directory(spec);
        let mut expected = BTreeSet::from([directory.join(".lock")]);
        for made in self.points.iter().filter(|made| made.file.starts_with(&directory)) {
            expected.insert(made.file.clone());
            if !made.manifest.is_null() {
                expected.extend(["json", "digests"].map(|suffix| made.file.with_extension(suffix)));
            }
        }
        for (path, bytes) in self.frozen.iter().filter(|(path, _)| path.starts_with(&directory)) {
            assert!(fs::read(path).is_ok_and(|now| now == *bytes), "{} was touched", path.display());
            expected.insert(path.clone());
        }
        let found = fs::read_dir(&directory).expect("a directory");
        let mut found: BTreeSet<_> = found.map(|entry| entry.expect("an entry").path()).collect();
        // There where all points of a chain are gone.
        found.remove(&directory.join(".retired"));
        assert_eq!(found, expected);
    }

    /// The image has the snapshots that it had and the new one, less those of this directory's chains
    /// that belong to no point or no longer need be kept.
    fn check_snapshots(&self, made: &Made, before: &[Snap]) {
        let directory = self.directory(&made.spec);
        let read = |path: &Path| serde_json::from_slice(&fs::read(path).ok()?).ok();
        let (mut manifests, mut lost) = (Vec::<Value>::new(), BTreeSet::new());
        for path in
            fs::read_dir(&directory).expect("a directory").map(|entry| entry.expect("an entry").path())
        {
            let is_manifest = path.extension().is_some_and(|extension| extension == "json")
                && !path.ends_with(".suspect.json");
            let Some(manifest) = is_manifest.then(|| read(&path)).flatten() else { continue };
            if !path.with_extension("qcow2").exists() {
                lost.insert(text(&manifest, "snapshot").to_owned());
            }
            manifests.push(manifest);
        }
        let retired = fs::read_to_string(directory.join(".retired")).unwrap_or_default();
        let mut chains: BTreeSet<_> = manifests.iter().map(|manifest| text(manifest, "chain")).collect();
        chains.extend(retired.lines());
        let used: BTreeSet<_> = manifests.iter().map(|manifest| text(manifest, "snapshot")).collect();
        let mut expected: BTreeSet<String> = before.iter().map(|snap| snap.name.clone()).collect();
        expected.insert(text(&made.manifest, "snapshot").to_owned());
        let own = expected.iter().filter_map(|name| SnapshotName::parse(name).ok());
        let own = own.filter(|name| chains.contains(&*name.chain.to_string()));
        // Those of lost points stay.
        let own = own.filter(|name| !lost.contains(&name.to_string()));
        let (mut own, unfinished): (Vec<_>, Vec<_>) = own.partition(|name| used.contains(&*name.to_string()));
        own.sort_by_key(|name| std::cmp::Reverse(name.point));
        // Where a snapshot may go on changing, one more is there to tell.
        let features = made.manifest["features"]["names"].as_array().expect("features");
        let guards = usize::from(!features.contains(&Value::from("exclusive-lock")));
        for gone in own.iter().skip(self.options.keep_snapshots.max(1) + guards).chain(&unfinished) {
            expected.remove(&gone.to_string());
        }
        assert_eq!(self.snapshot_names(&made.spec), expected);
    }

    pub fn snapshot_names(&self, spec: &Spec) -> BTreeSet<String> {
        self.driver.snaps(spec).expect("snapshots").into_iter().map(|snap| snap.name).collect()
    }
}

/// A report's error, with what caused it.
pub fn why(report: &ImageReport) -> String {
    let mut text = String::new();
    let mut next = report.error.as_deref().map(|error| error as &dyn std::error::Error);
    while let Some(error) = next {
        text += &format!("{error}; ");
        next = error.source();
    }
    if text.is_empty() { format!("{report:?}") } else { text }
}

/// The image's name in file names.
pub fn encoded(spec: &Spec) -> String {
    ImageName::new(&*spec.image).expect("a name").encoded()
}

fn text<'a>(manifest: &'a Value, key: &str) -> &'a str {
    manifest[key].as_str().unwrap_or_else(|| panic!("{key} of {manifest}"))
}

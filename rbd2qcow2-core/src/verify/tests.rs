use std::fs;
use std::ops::Range;
use std::os::unix::fs::{FileExt, PermissionsExt};

use super::*;
use crate::buffer::BufferPool;
use crate::chain::manifest::tests::record;
use crate::chain::{ChainWriter, LayerPlan};
use crate::copy::Copy;
use crate::layer::native::{Compressors, NativeLayer};
use crate::layer::qemu_nbd::testing::Random;
use crate::layer::{Compression, ExtendedL2, LayerSpec, LayerWriter, SECTOR};
use crate::progress::Progress;
use crate::qcow2::chain::ChainReader;
use crate::source::memory::MemorySource;

use crate::chain::names::FileKind;
use std::path::PathBuf;

mod source;

const POINTS: [&str; 4] = ["20261122T173312Z", "20261123T173307Z", "20261124T173307Z", "20261125T173307Z"];

/// A chain of four points, and what each of them holds.
struct Store {
    dest: tempfile::TempDir,
    image: ImageName,
    contents: Vec<Vec<u8>>,
}

fn point(number: usize) -> PointName {
    PointName::parse(POINTS[number]).expect("a point")
}

impl Store {
    /// `cluster_size` and the forms make files of every kind.
    fn new(cluster_size: u32, compression: Compression, extended_l2: ExtendedL2) -> Self {
        let mut random = Random::new(u64::from(cluster_size) + 7);
        let image = ImageName::new("vm/1").expect("a name");
        let mut store = Self { dest: tempfile::tempdir().expect("a directory"), image, contents: Vec::new() };
        let mut content = random.bytes(300_000);
        content[100_000..180_000].fill(0);
        for number in 0..POINTS.len() {
            store.back_up(number, &content, cluster_size, compression, extended_l2);
            store.contents.push(content.clone());
            // Shrinks, grows, changes here and there, and goes to zeroes.
            content.resize([300_000, 200_001, 350_000, 350_000][number], 0);
            for _ in 0..4 {
                let at = usize::try_from(random.below(content.len() as u64 - 9000)).expect("small");
                let change = random.bytes(9000);
                content[at..at + 9000].copy_from_slice(&change);
            }
            content[40_000..60_000].fill(0);
        }
        store
    }

    fn directory(&self) -> PathBuf {
        image_directory(self.dest.path(), &self.image)
    }

    fn file(&self, number: usize, kind: FileKind) -> PathBuf {
        self.directory().join(PointFile { image: self.image.clone(), point: point(number), kind }.file_name())
    }

    fn back_up(
        &self,
        number: usize,
        content: &[u8],
        cluster_size: u32,
        compression: Compression,
        extended_l2: ExtendedL2,
    ) {
        let writer = ChainWriter::open(self.dest.path(), &self.image).expect("opened");
        let parent = writer.catalogue().newest();
        let pending = writer.begin(LayerPlan { point: point(number), parent, cluster_size }).expect("begun");
        let spec = LayerSpec {
            path: pending.layer_path().to_owned(),
            virtual_size: (content.len() as u64).next_multiple_of(SECTOR),
            backing: pending.backing_name(),
            cluster_size,
            compression,
            extended_l2,
        };
        let layer = NativeLayer::create(&spec, Compressors::default()).expect("created");
        let base = self.contents.last().cloned();
        let source = MemorySource { content: content.to_vec(), base, block: 1000, ..MemorySource::default() };
        let (cancel, progress) = (Cancel::new(), Progress::default());
        let copy = Copy {
            source: &source,
            layer: &layer,
            root: source.base.is_none(),
            digests: Some(pending.digests()),
            buffers: &BufferPool::new(4 << 20),
            rate_limit: None,
            parallel: 2,
            progress: &progress,
            cancel: &cancel,
            stop: &cancel.part(),
        };
        copy.run().expect("copied");
        layer.finish().expect("finished");
        let mut record = record(content.len() as u64, point(number));
        record.cluster_size = cluster_size;
        record.extended_l2 = layer.grain() < u64::from(cluster_size);
        pending.commit(record).expect("committed");
    }

    fn verify_points(
        &self,
        points: &[PointName],
        options: &VerifyOptions,
    ) -> Result<Vec<PointReport>, VerifyError> {
        self.verify_against(points, options, None)
    }

    fn verify_against(
        &self,
        points: &[PointName],
        options: &VerifyOptions,
        snapshots: Option<&dyn Snapshots>,
    ) -> Result<Vec<PointReport>, VerifyError> {
        let (progress, cancel) = (VerifyProgress::default(), Cancel::new());
        let reports = VerifyImage {
            dest: self.dest.path(),
            image: &self.image,
            points,
            options,
            snapshots,
            progress: &progress,
            cancel: &cancel,
        }
        .run()?;
        Ok(reports)
    }

    fn verify(&self) -> Vec<PointReport> {
        let options = VerifyOptions { parallel: 2, ..VerifyOptions::default() };
        self.verify_points(&[], &options).expect("looked at")
    }

    /// The points that do not read as they did.
    fn broken(&self) -> Vec<usize> {
        let catalogue = Catalogue::read(&self.directory(), &self.image).expect("read");
        let is_whole = |number: usize| {
            let ancestry = catalogue.ancestry(point(number)).ok()?;
            let paths: Vec<_> = ancestry.iter().map(|point| &point.path).collect();
            let chain = ChainReader::open(&paths).ok()?;
            let mut found = vec![0; self.contents[number].len()];
            chain.read_at(0, &mut found).ok()?;
            (found == self.contents[number]).then_some(())
        };
        (0..POINTS.len()).filter(|number| is_whole(*number).is_none()).collect()
    }

    /// Which layer holds which part of each point, while all is well.
    fn owners(&self) -> Vec<Vec<(Range<u64>, usize)>> {
        let catalogue = Catalogue::read(&self.directory(), &self.image).expect("read");
        let of_point = |number: usize| {
            let ancestry = catalogue.ancestry(point(number)).expect("sound");
            let paths: Vec<_> = ancestry.iter().map(|point| &point.path).collect();
            let chain = ChainReader::open(&paths).expect("readable");
            let pieces = chain.map(0..chain.virtual_size()).expect("in range").map(Result::unwrap);
            pieces.filter_map(|piece| Some((piece.range, number - piece.layer?))).collect()
        };
        (0..POINTS.len()).map(of_point).collect()
    }

    /// Does something to a file, looks, and undoes it.
    fn with_damage<T>(&self, path: &Path, damage: impl FnOnce(&fs::File), look: impl FnOnce() -> T) -> T {
        let before = fs::read(path).expect("readable");
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).expect("allowed");
        damage(&fs::OpenOptions::new().read(true).write(true).open(path).expect("opened"));
        let seen = look();
        fs::write(path, before).expect("written");
        seen
    }
}

fn reports_bytes(reports: &[PointReport]) -> u64 {
    reports.iter().map(|report| report.checked_bytes).sum()
}

fn with_status(reports: &[PointReport], status: VerifyStatus) -> Vec<usize> {
    let numbers = reports.iter().filter(|report| report.status == status);
    numbers
        .map(|report| (0..POINTS.len()).find(|number| point(*number) == report.point).expect("known"))
        .collect()
}

fn stores() -> Vec<Store> {
    let zstd = Compression::Zstd { level: None };
    vec![
        Store::new(16 << 10, Compression::None, ExtendedL2::Auto),
        Store::new(4 << 10, zstd, ExtendedL2::Off),
        Store::new(64 << 10, Compression::Zlib, ExtendedL2::Auto),
    ]
}

/// Turns one bit.
fn flip(offset: u64, bit: u64) -> impl FnOnce(&fs::File) {
    move |file| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).expect("there");
        byte[0] ^= 1 << bit;
        file.write_all_at(&byte, offset).expect("written");
    }
}

#[test]
fn a_whole_chain_is_ok() {
    for store in stores() {
        let reports = store.verify();
        assert_eq!(with_status(&reports, VerifyStatus::Ok), [0, 1, 2, 3], "{reports:?}");
        assert!(reports.iter().all(|report| report.checked_bytes > 20_000 && report.findings.is_empty()));
        assert!(store.broken().is_empty());
    }
}

/// The points that show something of `ranges` from the layer of point `number`.
fn shown_in(owners: &[Vec<(Range<u64>, usize)>], number: usize, ranges: &[Range<u64>]) -> Vec<usize> {
    let overlaps =
        |held: &Range<u64>| ranges.iter().any(|range| held.start < range.end && range.start < held.end);
    let shows = |point: &usize| owners[*point].iter().any(|(held, owner)| *owner == number && overlaps(held));
    (0..owners.len()).filter(shows).collect()
}

/// Where the data of a point's own layer are said to be damaged.
fn damaged_content(report: &PointReport) -> Vec<Range<u64>> {
    let range = |finding: &Finding| match finding {
        Finding::Content { range, .. } | Finding::Read { range, .. } => Some(range.clone()),
        _ => None,
    };
    report.findings.iter().filter_map(range).collect()
}

/// Whatever a reader sees of a turned bit, verify has seen, too. No point is called damaged that is
/// not, but for the one whose file it is, and those that show something of a chunk that is damaged
/// somewhere: a digest does not tell where.
#[test]
fn every_turned_bit_that_shows_is_found_and_traced_to_the_points_it_shows_in() {
    let (mut shown, mut spread, mut silent, mut exact) = (0, 0, 0, 0);
    for store in stores() {
        let owners = store.owners();
        let mut random = Random::new(99);
        for number in 0..POINTS.len() {
            let path = store.file(number, FileKind::Layer);
            let length = fs::metadata(&path).expect("there").len();
            let bytes = fs::read(&path).expect("readable");
            for _ in 0..40 {
                // Holes say nothing; most bytes that are not zero do.
                let at = loop {
                    let at = random.below(length);
                    if bytes[usize::try_from(at).expect("small")] != 0 || random.below(200) == 0 {
                        break at;
                    }
                };
                let (broken, reports) =
                    store.with_damage(&path, flip(at, random.below(8)), || (store.broken(), store.verify()));
                let damaged = with_status(&reports, VerifyStatus::Damaged);
                let mut expected = broken.clone();
                expected.extend(shown_in(&owners, number, &damaged_content(&reports[number])));
                expected.extend(damaged.iter().filter(|point| **point == number));
                expected.sort_unstable();
                expected.dedup();
                assert_eq!(damaged, expected, "byte {at} of layer {number}, {broken:?}: {reports:?}");
                exact += usize::from(damaged == broken);
                shown += usize::from(!broken.is_empty());
                spread += usize::from(broken.len() > 1);
                silent += usize::from(damaged.is_empty());
            }
        }
        assert!(store.broken().is_empty(), "the damage was undone");
    }
    // Otherwise this would show little.
    let told = format!("{shown} shown, in several points {spread}, exact {exact}, silent {silent}");
    assert!(shown > 250 && spread > 50 && exact > 200 && silent < 100, "{told}");
}

#[test]
fn damaged_manifests_and_digests_are_found() {
    let store = Store::new(16 << 10, Compression::None, ExtendedL2::Auto);
    let mut random = Random::new(5);
    for number in 0..POINTS.len() {
        for kind in [FileKind::Manifest, FileKind::Digests] {
            let path = store.file(number, kind);
            let length = fs::metadata(&path).expect("there").len();
            for _ in 0..12 {
                let damage = flip(random.below(length), random.below(8));
                let reports = store.with_damage(&path, damage, || store.verify());
                assert_eq!(with_status(&reports, VerifyStatus::Damaged), [number], "{kind:?} {reports:?}");
                // What builds upon data without digests is not known to be good.
                let unknown = with_status(&reports, VerifyStatus::Unverifiable);
                let above: Vec<_> = (number + 1..POINTS.len()).collect();
                assert!(unknown.is_empty() || unknown == above, "{kind:?} {reports:?}");
                assert!(kind == FileKind::Manifest || unknown == above);
            }
        }
    }
}

#[test]
fn truncated_and_missing_files_are_found() {
    let store = Store::new(16 << 10, Compression::None, ExtendedL2::Auto);
    for number in 0..POINTS.len() {
        for kind in [FileKind::Layer, FileKind::Manifest, FileKind::Digests] {
            let path = store.file(number, kind);
            let length = fs::metadata(&path).expect("there").len();
            for rest in [length - 1, length / 2, 0] {
                let damage = |file: &fs::File| file.set_len(rest).expect("cut off");
                let reports = store.with_damage(&path, damage, || store.verify());
                let damaged = with_status(&reports, VerifyStatus::Damaged);
                let expected: Vec<_> = match kind {
                    FileKind::Layer => (number..POINTS.len()).collect(),
                    _ => vec![number],
                };
                assert_eq!(damaged, expected, "{kind:?} of {number} cut to {rest}: {reports:?}");
            }
        }
        let digests = store.file(number, FileKind::Digests);
        let aside = store.directory().join("aside");
        fs::rename(&digests, &aside).expect("moved");
        assert_eq!(with_status(&store.verify(), VerifyStatus::Damaged), [number]);
        fs::rename(&aside, &digests).expect("moved");
    }
    assert_eq!(with_status(&store.verify(), VerifyStatus::Ok), [0, 1, 2, 3]);
}

#[test]
fn what_was_asked_for_is_reported_and_a_sample_reads_less() {
    let store = Store::new(4 << 10, Compression::None, ExtendedL2::Auto);
    let mut options = VerifyOptions::default();
    let reports = store.verify_points(&[point(2)], &options).expect("looked at");
    assert_eq!(with_status(&reports, VerifyStatus::Ok), [2]);
    let all = reports_bytes(&store.verify());
    for (percent, least, most) in [(0.0, 0, 0), (30.0, all / 10, all / 2), (100.0, all, all)] {
        options.sample = Some(Sample { percent, seed: 3 });
        let reports = store.verify_points(&[], &options).expect("looked at");
        let bytes = reports_bytes(&reports);
        assert!((least..=most).contains(&bytes), "{bytes} of {all} with {percent} %");
    }
    let unknown = PointName::parse("20261122T173313Z").expect("a point");
    assert!(matches!(store.verify_points(&[unknown], &options), Err(VerifyError::NoSuchPoint(_))));
}

#[test]
fn a_chain_that_is_being_written_is_left_alone_and_a_stop_is_heeded() {
    let store = Store::new(16 << 10, Compression::None, ExtendedL2::Auto);
    let writer = ChainWriter::open(store.dest.path(), &store.image).expect("opened");
    let error = store.verify_points(&[], &VerifyOptions::default()).expect_err("locked");
    assert!(matches!(error, VerifyError::Chain(ChainError::Locked { .. })), "{error}");
    drop(writer);
    let cancel = Cancel::new();
    cancel.set();
    let (progress, options) = (VerifyProgress::default(), VerifyOptions::default());
    let (dest, image) = (store.dest.path(), &store.image);
    let run = VerifyImage {
        dest,
        image,
        points: &[],
        options: &options,
        snapshots: None,
        progress: &progress,
        cancel: &cancel,
    };
    assert!(matches!(run.run(), Err(VerifyError::Cancelled)));
}

//! The whole path of a comparison: everything an image and a chain hold, to a layer of what differs.

#![allow(clippy::cast_possible_truncation, reason = "offsets in test data are small")]

use std::fs;

use proptest::prelude::*;

use super::*;
use crate::buffer::BufferPool;
use crate::cancel::Cancel;
use crate::chain::Catalogue;
use crate::chain::digests::{DigestReader, DigestWriter};
use crate::chain::names::FileKind;
use crate::compare::changed::OnlyChanged;
use crate::copy::Copy;
use crate::layer::native::testing::{Form, cases, form, image, next_content, spec_of};
use crate::layer::native::{Compressors, NativeLayer};
use crate::layer::qemu_nbd::testing::qemus;
use crate::layer::qemu_nbd::{QemuNbdLayer, QemuNbdOptions};
use crate::layer::{ExtendedL2, LayerWriter, SECTOR};
use crate::progress::Progress;
use crate::qcow2::layer::LayerReader;
use crate::source::memory::MemorySource;
use crate::testing::{Fixture, plain};

/// What a comparison made, beside the chain.
struct Compared {
    path: std::path::PathBuf,
    progress: Progress,
    grain: u64,
}

/// Copies what differs between `content` and the newest point into a layer.
fn compare(
    fixture: &Fixture,
    form: &Form,
    content: &[u8],
    layer: impl FnOnce(&crate::layer::LayerSpec) -> Box<dyn LayerWriter>,
) -> Compared {
    let directory = fixture.directory();
    let catalogue = Catalogue::read(&directory, &fixture.image).expect("read");
    let newest = catalogue.newest().expect("a point").name;
    let chain = ChainReader::open(&catalogue.layers(newest).expect("sound")).expect("a chain");
    let points = catalogue.ancestry(newest).expect("sound");
    let backing = catalogue.path_of(newest, FileKind::Layer);
    let backing = backing.file_name().expect("a name").to_string_lossy().into_owned();
    let spec = spec_of(&directory, "new", content.len(), Some(backing), form);
    let layer = layer(&spec);
    let digests_path = directory.join("new.digests");
    let digests = DigestWriter::create(&digests_path, spec.cluster_size).expect("created");
    let source = MemorySource { content: content.to_vec(), block: form.block, ..MemorySource::default() };
    let whole = Whole::new(&source, &chain);
    let (cancel, progress) = (Cancel::new(), Progress::default());
    let stop = cancel.part();
    let changed = OnlyChanged::new(&*layer, spec.path.clone(), spec.virtual_size, &chain, &points, &stop);
    let copy = Copy {
        source: &whole,
        layer: &changed,
        root: false,
        digests: Some(&digests),
        buffers: &BufferPool::new(4 << 20),
        rate_limit: None,
        parallel: 3,
        progress: &progress,
        cancel: &cancel,
        stop: &stop,
    };
    copy.run().expect("copied");
    changed.finish().expect("finished");
    digests.finish().expect("finished");
    let mut covered = Vec::new();
    for record in DigestReader::open(&digests_path).expect("digests") {
        let record = record.expect("a record");
        covered.push(record.offset..record.end());
    }
    let held: Vec<_> = LayerReader::open(&spec.path)
        .and_then(|layer| layer.map(0..layer.virtual_size())?.collect::<Result<Vec<_>, _>>())
        .expect("a layer")
        .into_iter()
        .filter(|(_, piece)| *piece != Piece::Absent)
        .map(|(range, _)| range)
        .collect();
    let joined = |ranges: Vec<Range<u64>>| crate::ranges::widened(ranges.into_iter(), 1);
    assert_eq!(joined(covered), joined(held), "the digests cover what the layer holds");
    Compared { path: spec.path, progress, grain: layer.grain() }
}

/// The new layer shows the image, and holds no grain that the chain showed before.
fn check(fixture: &Fixture, form: &Form, content: &[u8], compared: &Compared) {
    let catalogue = Catalogue::read(&fixture.directory(), &fixture.image).expect("read");
    let newest = catalogue.newest().expect("a point").name;
    let mut paths = catalogue.layers(newest).expect("sound");
    paths.insert(0, compared.path.clone());
    let chain = ChainReader::open(&paths).expect("a chain");
    let mut expected = content.to_vec();
    expected.resize(content.len().next_multiple_of(SECTOR as usize), 0);
    let mut read = vec![0xee; expected.len()];
    chain.read_at(0, &mut read).expect("read");
    assert!(read == expected, "the point is not what the image is");
    if form.compression != crate::layer::Compression::None {
        return;
    }
    let mut old = vec![0; expected.len()];
    let known = (chain.layers()[1].virtual_size() as usize).min(old.len());
    ChainReader::open(&paths[1..]).expect("a chain").read_at(0, &mut old[..known]).expect("read");
    let differing = old.chunks(compared.grain as usize).zip(expected.chunks(compared.grain as usize));
    let differing: usize = differing.filter(|(old, new)| old != new).map(|(old, _)| old.len()).sum();
    assert_eq!(compared.progress.data.get() + compared.progress.zero.get(), differing as u64);
}

fn native(spec: &crate::layer::LayerSpec) -> Box<dyn LayerWriter> {
    Box::new(NativeLayer::create(spec, Compressors::default()).expect("created"))
}

proptest! {
    #![proptest_config(cases(40))]

    #[test]
    fn a_compared_point_is_the_image_and_holds_only_what_differs(
        steps in prop::collection::vec((form(), image()), 1..4), last in form(), next in image(),
        without_digests in prop::option::of(0_usize..3), unchanged in prop::bool::weighted(0.2)
    ) {
        let fixture = Fixture::new(&steps);
        if let Some(index) = without_digests.filter(|index| *index < steps.len()) {
            let layer = fixture.layer(index);
            fs::remove_file(layer.with_extension("digests")).expect("removed");
        }
        let old = &fixture.points.last().expect("a point").1;
        let content = if unchanged { old.clone() } else { next_content(old, &next) };
        let compared = compare(&fixture, &last, &content, native);
        check(&fixture, &last, &content, &compared);
        if unchanged {
            prop_assert_eq!(compared.progress.data.get() + compared.progress.zero.get(), 0);
        }
    }

    #[test]
    fn points_of_the_python_tool_are_compared_with(
        first in image(), second in image(), next in image(), last in form()
    ) {
        let mut fixture = Fixture::empty("vm");
        let form = Form { extended_l2: ExtendedL2::Off, ..plain() };
        // Their layers end with sectors.
        let sectors = |mut content: Vec<u8>| { content.resize(content.len().next_multiple_of(512).max(512), 0); content };
        let content = sectors(next_content(&[], &first));
        fixture.back_up_as_python(&form, content.clone());
        fixture.back_up_as_python(&form, sectors(next_content(&content, &second)));
        let content = next_content(&fixture.points[1].1, &next);
        let compared = compare(&fixture, &last, &content, native);
        check(&fixture, &last, &content, &compared);
    }
}

proptest! {
    #![proptest_config(cases(3))]

    /// By stock QEMU, both ways.
    #[test]
    fn qemu_writes_and_reads_a_compared_point(
        steps in prop::collection::vec((form(), image()), 1..3), next in image(), mut last in form()
    ) {
        if let crate::layer::Compression::Zstd { .. } = last.compression {
            last.compression = crate::layer::Compression::Zstd { level: None };
        }
        for tools in qemus() {
            let fixture = Fixture::new(&steps);
            let content = next_content(&fixture.points.last().expect("a point").1, &next);
            let compared = compare(&fixture, &last, &content, |spec| {
                let options = QemuNbdOptions { tools: tools.clone(), ..QemuNbdOptions::default() };
                Box::new(QemuNbdLayer::create(spec, options).expect("created"))
            });
            check(&fixture, &last, &content, &compared);
            let raw = fixture.out.path().join("raw");
            let mut command = std::process::Command::new(tools.qemu_img());
            command.args(["convert", "-O", "raw"]).arg(&compared.path).arg(&raw);
            let output = command.output().expect("qemu-img runs");
            prop_assert!(output.status.success(), "{:?}", output);
            let read = fs::read(&raw).expect("read");
            prop_assert!(read[..content.len()] == content[..]);
        }
    }
}

#[test]
fn an_unchanged_image_is_compared_by_digests_alone() {
    let mut fixture = Fixture::empty("vm");
    let content: Vec<u8> = (0..3_000_000_u32).map(|index| (index >> 8) as u8 ^ index as u8).collect();
    fixture.back_up(&plain(), content.clone());
    // Where the layer is never read, nobody sees that it was damaged.
    let layer = fixture.layer(0);
    let mut bytes = fs::read(&layer).expect("read");
    let at =
        bytes.windows(64).position(|window| window == &content[(1 << 20)..(1 << 20) + 64]).expect("there");
    bytes[at] ^= 1;
    fs::remove_file(&layer).expect("removed");
    fs::write(&layer, bytes).expect("written");
    let compared = compare(&fixture, &plain(), &content, native);
    assert_eq!((compared.progress.data.get(), compared.progress.zero.get()), (0, 0));
    fs::remove_file(&compared.path).expect("removed");
    fs::remove_file(fixture.directory().join("new.digests")).expect("removed");
    // Without digests the bytes decide.
    fs::remove_file(layer.with_extension("digests")).expect("removed");
    let compared = compare(&fixture, &plain(), &content, native);
    assert_eq!((compared.progress.data.get(), compared.progress.zero.get()), (2048, 0));
}

#[test]
fn a_huge_hole_costs_nothing() {
    /// 16 TiB without anything.
    struct Nothing;
    impl RbdDiffSource for Nothing {
        fn size(&self) -> u64 {
            16 << 40
        }
        fn segments(&self, _: u64) -> Box<dyn Iterator<Item = Result<Range<u64>, SourceError>> + Send + '_> {
            Box::new(std::iter::empty())
        }
        fn diff(&self, _: Range<u64>, _: &mut Vec<Extent>) -> Result<(), SourceError> {
            unreachable!("there are no segments")
        }
        fn read(&self, _: u64, _: &mut Buffer) -> Result<(), SourceError> {
            unreachable!("there are no data")
        }
    }
    let directory = tempfile::tempdir().expect("a directory");
    let path = crate::layer::native::testing::empty(directory.path(), 16 << 40);
    let chain = ChainReader::open(&[path]).expect("a chain");
    assert_eq!(Whole::new(&Nothing, &chain).segments(4096).count(), 0);
    let mut fixture = Fixture::empty("vm");
    let mut content = vec![0; 200 << 20];
    content[100 << 20..(100 << 20) + 9000].fill(1);
    fixture.back_up(&plain(), content);
    let chain = ChainReader::open(&[fixture.layer(0)]).expect("a chain");
    let whole = Whole::new(&Nothing, &chain);
    let segments: Vec<_> = whole.segments(1 << 17).map(Result::unwrap).collect();
    assert_eq!(segments, [64 << 20..128 << 20]);
    let mut found = Vec::new();
    whole.diff(segments[0].clone(), &mut found).expect("a diff");
    let zero = Extent { offset: 100 << 20, length: 10_240, kind: ExtentKind::Zero };
    assert_eq!(found, [zero]);
}

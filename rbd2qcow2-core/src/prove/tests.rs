#![allow(clippy::cast_possible_truncation, reason = "offsets in test data are small")]

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::layer::native::testing::{cases, empty, form, image, next_content, spec_of, write_chain};
use crate::source::memory::MemorySource;

/// Reports some parts of an image as changed, in the order that they are given, and has segments of some
/// length, with gaps.
struct Told {
    content: MemorySource,
    reported: Vec<Range<u64>>,
    segments: Vec<Range<u64>>,
}

impl RbdDiffSource for Told {
    fn size(&self) -> u64 {
        self.content.size()
    }

    fn segments(&self, _: u64) -> Box<dyn Iterator<Item = Result<Range<u64>, SourceError>> + Send + '_> {
        Box::new(self.segments.iter().cloned().map(Ok))
    }

    fn diff(&self, segment: Range<u64>, found: &mut Vec<Extent>) -> Result<(), SourceError> {
        for part in intersection(&self.reported, &[segment]).into_iter().rev() {
            found.extend(Extent::new(part, crate::extent::ExtentKind::Data));
        }
        Ok(())
    }

    fn read(&self, offset: u64, buffer: &mut Buffer) -> Result<(), SourceError> {
        self.content.read(offset, buffer)
    }
}

fn ask(watched: &Watched<'_>) {
    for segment in watched.segments(4096) {
        watched.diff(segment.expect("a segment"), &mut Vec::new()).expect("a diff");
    }
}

proptest! {
    #![proptest_config(cases(24))]

    /// Whatever was not reported and differs is found, once every page was chosen; what was reported is
    /// never read, and nothing that is the same is called different.
    #[test]
    fn what_is_not_reported_is_found(
        steps in prop::collection::vec((form(), image()), 1..4), next in image(), last in form(),
        told in prop::collection::vec(prop::bool::weighted(0.6), 1..60), weigh: bool
    ) {
        let directory = tempfile::tempdir().expect("a directory");
        let chain = write_chain(directory.path(), &steps);
        let old = chain[0].1.clone();
        let content = next_content(&old, &next);
        let paths: Vec<_> = chain.iter().map(|(path, _)| path.clone()).collect();
        let reader = ChainReader::open(&paths).expect("a chain");
        let size = content.len() as u64;
        let grain = spec_of(directory.path(), "new", content.len(), None, &last).cluster_size.min(1 << 17);
        // Stretches of 30000 bytes are told of or not.
        let stretches = (0..size).step_by(30_000).zip(told.iter().cycle());
        let reported: Vec<_> =
            stretches.filter(|(_, told)| **told).map(|(start, _)| start..(start + 30_000).min(size)).collect();
        let segments = vec![0..size.min(1 << 20), size.min(1 << 20)..size];
        let segments = segments.into_iter().filter(|range| !range.is_empty()).collect();
        let content_source = MemorySource { content: content.clone(), ..MemorySource::default() };
        let source = Told { content: content_source, reported: reported.clone(), segments };
        let weigh = if weigh { Weigh::Unreported { object: 1 << 16 } } else { Weigh::Nothing };
        let watched = Watched::new(&source, &reader, grain.into(), weigh, 3000, 7);
        ask(&watched);
        let unit = u64::from(grain).max(PAGE);
        let mut expected = BTreeSet::new();
        for start in (0..size).step_by(unit as usize) {
            let end = (start + unit).min(size);
            if reported.iter().any(|range| range.start < end && range.end > start) {
                continue;
            }
            for page in (start..end).step_by(PAGE as usize) {
                let range = page as usize..(page + PAGE).min(end) as usize;
                let mut held = vec![0; range.len()];
                let old = &old[range.start.min(old.len())..range.end.min(old.len())];
                held[..old.len()].copy_from_slice(old);
                if held != content[range] {
                    expected.insert(page);
                }
            }
        }
        let proof = watched.prove(&Cancel::new()).expect("a proof");
        let found: BTreeSet<_> = proof.differing.iter().copied().collect();
        prop_assert!(found.is_subset(&expected), "{:?} are not among {:?}", found, expected);
        // Of up to 400 pages each was chosen once at the least, but for one run in very many.
        if weigh == Weigh::Nothing && size > 0 {
            prop_assert_eq!(found, expected);
        }
    }
}

/// An image of which the chain holds data in one object of eight pages, nothing else.
fn sparse(directory: &std::path::Path) -> (ChainReader, MemorySource) {
    let form = crate::layer::native::testing::Form {
        cluster_bits: 17,
        extended_l2: crate::layer::ExtendedL2::Auto,
        compression: crate::layer::Compression::None,
        block: 4096,
    };
    let mut content = vec![0; 64 << 20];
    content[32 << 20..(32 << 20) + (16 << 10)].fill(7);
    let spec = spec_of(directory, "root", content.len(), None, &form);
    drop(crate::layer::native::testing::write(&spec, &content, None, 4096));
    let chain = ChainReader::open(&[spec.path]).expect("a chain");
    (chain, MemorySource { content: content.clone(), base: Some(content), ..MemorySource::default() })
}

#[test]
fn a_sparse_image_is_not_proved_by_its_holes() {
    let directory = tempfile::tempdir().expect("a directory");
    let (chain, source) = sparse(directory.path());
    let watched = Watched::new(&source, &chain, 4096, Weigh::Unreported { object: 32 << 10 }, 64, 1);
    ask(&watched);
    let chosen = watched.chosen().expect("chosen");
    let within = |range: Range<u64>| chosen.iter().filter(|offset| range.contains(offset)).count();
    let data = 32 << 20..(32 << 20) + (16 << 10);
    // All four pages of data and the four holes beside them; eight of the places are anywhere.
    assert_eq!((within(data.clone()), within(data.end..data.end + (16 << 10))), (4, 4), "{chosen:?}");
    assert!(chosen.len() >= 14 && chosen.len() <= 16, "{chosen:?}");
    assert_eq!(watched.prove(&Cancel::new()).expect("a proof").differing, [0; 0]);
}

#[test]
fn what_is_not_asked_about_is_chosen_from_where_all_counts() {
    let directory = tempfile::tempdir().expect("a directory");
    let (chain, content) = sparse(directory.path());
    let source = Told { content, reported: Vec::new(), segments: vec![0..1 << 20] };
    let watched = Watched::new(&source, &chain, 4096, Weigh::Unreported { object: 32 << 10 }, 64, 1);
    ask(&watched);
    assert!(watched.chosen().expect("chosen").contains(&(32 << 20)));
    let watched = Watched::new(&source, &chain, 4096, Weigh::Nothing, 64, 1);
    ask(&watched);
    assert!(watched.chosen().expect("chosen").iter().all(|offset| *offset < 1 << 20));
}

#[test]
fn of_a_large_image_a_part_is_weighed() {
    let mut random = Random(3);
    let (segment, size) = (1 << 40..(1 << 40) + (512 << 20), 16 << 40);
    let windows: BTreeSet<_> =
        (0..2000).map(|_| window(&segment, 1 << 20, size, &mut random).start).collect();
    // A 256th of it, anywhere.
    assert_eq!(windows.len(), 256);
    let one = window(&segment, 1 << 20, size, &mut random);
    assert!(one.end - one.start == 2 << 20 && segment.contains(&one.start) && one.end <= segment.end);
    assert_eq!(window(&segment, 1 << 20, WEIGHED, &mut random), segment);
    assert_eq!(window(&(0..100), 4096, u64::MAX, &mut random), 0..100);
}

#[test]
fn nothing_is_read_where_everything_is_reported() {
    let directory = tempfile::tempdir().expect("a directory");
    let chain = ChainReader::open(&[empty(directory.path(), 1 << 20)]).expect("a chain");
    let content = MemorySource { content: vec![1; 1 << 20], fail_read: Some(5), ..MemorySource::default() };
    let source = Told { content, reported: vec![0..1 << 20], segments: vec![0..1 << 20] };
    let watched = Watched::new(&source, &chain, 4096, Weigh::Nothing, 64, 1);
    ask(&watched);
    assert_eq!(watched.prove(&Cancel::new()).expect("a proof"), Proof::default());
    // What fails is told.
    let source = Told { reported: Vec::new(), ..source };
    let watched = Watched::new(&source, &chain, 4096, Weigh::Nothing, 3000, 1);
    ask(&watched);
    assert!(matches!(watched.prove(&Cancel::new()), Err(ProveError::Source(_))));
}

#[test]
fn a_chain_that_is_shorter_is_zeroes_behind_its_end() {
    let directory = tempfile::tempdir().expect("a directory");
    let chain = ChainReader::open(&[empty(directory.path(), 5 << 9)]).expect("a chain");
    let mut content = vec![0; 10_000];
    content[9_999] = 1;
    let content = MemorySource { content, ..MemorySource::default() };
    let source = Told { content, reported: Vec::new(), segments: vec![0..10_000] };
    let watched = Watched::new(&source, &chain, 4096, Weigh::Nothing, 100, 1);
    ask(&watched);
    let proof = watched.prove(&Cancel::new()).expect("a proof");
    assert_eq!(proof, Proof { bytes: 10_000, looked_at: 3, differing: vec![8192] });
}

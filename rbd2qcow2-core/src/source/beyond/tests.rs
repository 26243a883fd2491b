#![allow(clippy::cast_possible_truncation, reason = "offsets in test data are small")]

use proptest::prelude::*;

use super::*;
use crate::layer::native::testing::{Stretch, cases, fill, form, image, write_chain};
use crate::source::memory::MemorySource;

proptest! {
    #![proptest_config(cases(32))]
    /// Byte by byte: reported is what the image has and the chain does not.
    #[test]
    fn what_is_reported_is_the_images_and_not_the_chains(
        steps in prop::collection::vec((form(), image()), 1..3), larger in 0_usize..50_000,
        holes in prop::collection::vec((0.0_f64..1.0, 1_usize..40_000), 0..8), block in 1_usize..50_000
    ) {
        let directory = tempfile::tempdir().unwrap();
        let points = write_chain(directory.path(), &steps);
        let paths: Vec<_> = points.iter().map(|(path, _)| path).collect();
        let chain = ChainReader::open(&paths).unwrap();
        let size = points[0].1.len();
        let mut content = vec![0; size + larger];
        fill(&mut content, &[], &Stretch::Noise(7));
        for (at, length) in holes {
            #[allow(clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "a place in the test data")]
            let at = (at * content.len() as f64) as usize;
            let end = (at + length).min(content.len());
            content[at..end].fill(0);
        }
        let mut held = vec![false; content.len().next_multiple_of(512)];
        for piece in chain.map(0..size as u64).unwrap() {
            let piece = piece.unwrap();
            if matches!(piece.piece, Piece::Data | Piece::Compressed) {
                held[piece.range.start as usize..(piece.range.end as usize).next_multiple_of(512)].fill(true);
            }
        }
        let image = MemorySource { content: content.clone(), block, ..MemorySource::default() };
        let beyond = Beyond { image: &image, chain: &chain, size: size as u64 };
        let mut reported = vec![false; content.len()];
        for segment in beyond.segments(4096) {
            let segment = segment.unwrap();
            let mut found = Vec::new();
            beyond.diff(segment.clone(), &mut found).unwrap();
            for extent in found {
                prop_assert_eq!(extent.kind, ExtentKind::Data);
                prop_assert!(segment.start <= extent.offset && extent.end() <= segment.end);
                for at in extent.offset..extent.end() {
                    prop_assert!(!std::mem::replace(&mut reported[at as usize], true), "{} twice", at);
                }
            }
        }
        for (at, byte) in content.iter().enumerate() {
            let must = *byte != 0 && !held[at];
            prop_assert!(!must || reported[at], "byte {} is not reported", at);
            prop_assert!(!reported[at] || !held[at], "byte {} is the chain's", at);
        }
    }
}

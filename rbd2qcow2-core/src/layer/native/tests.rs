use std::path::PathBuf;

use proptest::prelude::*;

use super::testing::{Form, Stretch, cases, fill, form, image, spec_of, write, write_chain};
use super::{Compressors, NativeLayer};
use crate::cancel::Cancel;
use crate::layer::qemu_nbd::testing::{contents, qemu_img, qemus};
use crate::layer::{Compression, ExtendedL2, LayerError, LayerWriter};
use crate::qcow2::chain::ChainReader;
use crate::qcow2::check::check;
use crate::qcow2::layer::{LayerReader, Piece};

fn padded(content: &[u8]) -> Vec<u8> {
    let mut padded = content.to_vec();
    padded.resize(content.len().next_multiple_of(512), 0);
    padded
}

/// What a layer does not hold must be what the layers below hold; what it holds, the content.
fn check_with_our_reader(points: &[(PathBuf, Vec<u8>)]) {
    for (index, (_, content)) in points.iter().enumerate() {
        let paths: Vec<_> = points[index..].iter().map(|(path, _)| path.clone()).collect();
        let chain = ChainReader::open(&paths).expect("a chain");
        let mut found = vec![0xee; content.len().next_multiple_of(512)];
        chain.read_at(0, &mut found).expect("readable");
        let expected = padded(content);
        let wrong = found.iter().zip(&expected).position(|(found, expected)| found != expected);
        assert_eq!(wrong, None, "layer {index} from the top");
        let layer = LayerReader::open(&points[index].0).expect("a layer");
        let structure = check(&layer, &Cancel::new(), &mut |_| {}).expect("checked");
        assert!(structure.is_clean(), "layer {index} from the top: {structure:?}");
    }
}

/// What `qemu-img map` calls zeroes are zeroes, and it speaks of the whole image.
fn check_map(map: &str, content: &[u8]) {
    let extents: Vec<serde_json::Value> = serde_json::from_str(map).expect("JSON");
    let number =
        |value: &serde_json::Value| usize::try_from(value.as_u64().expect("a number")).expect("small");
    let mut end = 0;
    for extent in &extents {
        let (start, length) = (number(&extent["start"]), number(&extent["length"]));
        assert_eq!(start, end, "{extent}");
        end = start + length;
        assert!(extent["zero"] == false || content[start..end].iter().all(|byte| *byte == 0), "{extent}");
    }
    assert_eq!(end, content.len());
}

proptest! {
    #![proptest_config(cases(96))]
    #[test]
    fn chains_read_as_they_were_written(steps in prop::collection::vec((form(), image()), 1..5)) {
        let directory = tempfile::tempdir().unwrap();
        check_with_our_reader(&write_chain(directory.path(), &steps));
    }
}

proptest! {
    #![proptest_config(cases(12))]
    /// Stock QEMU finds nothing wrong with the files, and reads from them what was written.
    #[test]
    fn qemu_reads_what_was_written(steps in prop::collection::vec((form(), image()), 1..=10)) {
        for tools in qemus() {
            let directory = tempfile::tempdir().unwrap();
            let points = write_chain(directory.path(), &steps);
            check_with_our_reader(&points);
            for (path, content) in &points {
                let name = path.file_name().and_then(|name| name.to_str()).expect("UTF-8");
                // Ends with another status for leaks, too.
                qemu_img(&tools, directory.path(), &["check", "-q", "-f", "qcow2", name]);
                prop_assert!(contents(&tools, directory.path(), name) == padded(content), "{}", name);
                std::fs::write(directory.path().join("raw"), padded(content)).unwrap();
                qemu_img(&tools, directory.path(), &["compare", "-q", "-f", "qcow2", "-F", "raw", name, "raw"]);
                let map = qemu_img(&tools, directory.path(), &["map", "--output=json", "-f", "qcow2", name]);
                check_map(&map, &padded(content));
            }
        }
    }
}

/// Of a cluster only a page changes. It is packed whole where that is smaller than the page, and only there.
#[test]
fn little_that_changed_is_stored_in_the_smaller_form() {
    let form = Form {
        cluster_bits: 17,
        extended_l2: ExtendedL2::Auto,
        compression: Compression::Zstd { level: None },
        block: 4096,
    };
    let kinds = [Stretch::Constant(7), Stretch::Text(1), Stretch::Noise(2)];
    for (around, cluster) in kinds.iter().enumerate() {
        for (inside, page) in kinds.iter().enumerate() {
            let mut old = vec![0; 1 << 17];
            fill(&mut old, &[], cluster);
            let mut content = old.clone();
            let page = if inside == around { &Stretch::Text(9) } else { page };
            fill(&mut content[81_920..86_016], &[], page);
            let directory = tempfile::tempdir().expect("a temporary directory");
            let below = spec_of(directory.path(), "below", old.len(), None, &form);
            write(&below, &old, None, form.block);
            let spec = spec_of(directory.path(), "layer", old.len(), Some("below".to_owned()), &form);
            write(&spec, &content, Some(&old), form.block);
            let layer = LayerReader::open(&spec.path).expect("a layer");
            let held: Vec<_> = layer.map(0..1 << 17).expect("in range").map(Result::unwrap).collect();
            // Only noise does not pack, and only what is constant packs to next to nothing.
            if around == 0 && inside < 2 {
                assert_eq!(held, [(0..1 << 17, Piece::Compressed)], "{page:?} in {cluster:?}");
            } else {
                assert_eq!(held[1], (81_920..86_016, Piece::Data), "{page:?} in {cluster:?}");
            }
            check_with_our_reader(&[(spec.path, content), (below.path, old)]);
        }
    }
}

/// A cluster's beginning may pack badly, as long as there is hope for all of it.
#[test]
fn a_beginning_that_hardly_packs_is_no_reason_to_give_up() {
    let form = Form {
        cluster_bits: 17,
        extended_l2: ExtendedL2::Auto,
        compression: Compression::Zstd { level: None },
        block: 4096,
    };
    // Of 4 KiB that change, 3 KiB are what the cluster takes when it is packed.
    let mut old = vec![7; 1 << 17];
    fill(&mut old[..3072], &[], &Stretch::Noise(1));
    let mut content = old.clone();
    content[81_920..86_016].fill(8);
    let directory = tempfile::tempdir().expect("a temporary directory");
    let below = spec_of(directory.path(), "below", old.len(), None, &form);
    write(&below, &old, None, form.block);
    let spec = spec_of(directory.path(), "layer", old.len(), Some("below".to_owned()), &form);
    write(&spec, &content, Some(&old), form.block);
    let layer = LayerReader::open(&spec.path).expect("a layer");
    let held: Vec<_> = layer.map(0..1 << 17).expect("in range").map(Result::unwrap).collect();
    assert_eq!(held, [(0..1 << 17, Piece::Compressed)]);
    check_with_our_reader(&[(spec.path, content), (below.path, old)]);
}

/// Tables are written at the end: a disk that is full then is no matter of flushing.
#[test]
fn what_cannot_be_written_at_the_end_is_told_as_such() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let form =
        Form { cluster_bits: 16, extended_l2: ExtendedL2::Auto, compression: Compression::None, block: 1 };
    let spec = spec_of(directory.path(), "layer", 1 << 20, None, &form);
    let layer = NativeLayer::create(&spec, Compressors::default()).expect("created");
    layer.abort();
    let error = layer.finish().expect_err("aborted");
    assert!(matches!(error, LayerError::Write { .. }), "{error}");
}

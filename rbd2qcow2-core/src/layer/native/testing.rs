//! Chains of random forms and contents, and what they must read as.

#![allow(clippy::cast_possible_truncation, reason = "offsets in test data are small")]

use std::ops::Range;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::{Compressors, NativeLayer};
use crate::buffer::BufferPool;
use crate::cancel::Cancel;
use crate::chain::digests::{Content, DigestReader, DigestWriter};
use crate::copy::Copy;
use crate::layer::{Compression, ExtendedL2, LayerSpec, LayerWriter, SECTOR};
use crate::progress::Progress;
use crate::qcow2::layer::{LayerReader, Piece};
use crate::source::memory::MemorySource;

/// How a layer of a test is written.
#[derive(Clone, Debug)]
pub(crate) struct Form {
    pub(crate) cluster_bits: u32,
    pub(crate) extended_l2: ExtendedL2,
    pub(crate) compression: Compression,
    /// Bytes that the source compares and reports together.
    pub(crate) block: usize,
}

/// What an image holds: stretches of one kind each.
#[derive(Clone, Debug)]
pub(crate) enum Stretch {
    Zeroes,
    Constant(u8),
    /// Compresses to about a third.
    Text(u64),
    Noise(u64),
    /// What was there before, if anything.
    Old,
}

pub(crate) fn fill(bytes: &mut [u8], old: &[u8], stretch: &Stretch) {
    let mut state = match stretch {
        Stretch::Zeroes => return bytes.fill(0),
        Stretch::Constant(byte) => return bytes.fill(*byte),
        Stretch::Old => {
            let known = old.len().min(bytes.len());
            bytes[..known].copy_from_slice(&old[..known]);
            return bytes[known..].fill(0);
        }
        Stretch::Text(seed) | Stretch::Noise(seed) => seed | 1,
    };
    for chunk in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let word = match stretch {
            Stretch::Text(_) => {
                *[b"snapshot", b"  extent", b"--layer\n", b"\x01\x02chain\n"][state as usize % 4]
            }
            _ => state.to_le_bytes(),
        };
        chunk.copy_from_slice(&word[..chunk.len()]);
    }
}

pub(crate) fn form() -> impl Strategy<Value = Form> {
    let compression = prop_oneof![
        2 => Just(Compression::None),
        1 => Just(Compression::Zlib),
        2 => prop::option::of(1_u8..=4).prop_map(|level| Compression::Zstd { level }),
    ];
    let extended_l2 = prop_oneof![3 => Just(ExtendedL2::Auto), 1 => Just(ExtendedL2::Off)];
    let bits = prop_oneof![9_u32..=21, Just(16), Just(17)];
    (bits, extended_l2, compression, 1_usize..100_000).prop_map(
        |(cluster_bits, extended_l2, compression, block)| Form {
            cluster_bits,
            extended_l2,
            compression,
            block,
        },
    )
}

/// An image as it changes: stretches of up to some length, until the size is reached.
pub(crate) fn image() -> impl Strategy<Value = (usize, Vec<(usize, Stretch)>)> {
    let stretch = prop_oneof![
        1 => Just(Stretch::Zeroes),
        1 => any::<u8>().prop_map(Stretch::Constant),
        2 => any::<u64>().prop_map(Stretch::Text),
        2 => any::<u64>().prop_map(Stretch::Noise),
        3 => Just(Stretch::Old),
    ];
    let length = prop_oneof![1_usize..2000, 1_usize..40_000, 1_usize..400_000];
    let size = prop_oneof![0_usize..5000, 0_usize..300_000, 0_usize..1_500_000, Just(1 << 20)];
    (size, prop::collection::vec((length, stretch), 1..24))
}

pub(crate) fn next_content(old: &[u8], (size, stretches): &(usize, Vec<(usize, Stretch)>)) -> Vec<u8> {
    let mut content = vec![0; *size];
    let mut start = 0;
    for (length, stretch) in stretches.iter().cycle().take(200) {
        // Grains are often met in the middle, but not always.
        let end = if length % 3 == 0 { (start + length).next_multiple_of(4096) } else { start + length };
        let end = end.min(*size);
        fill(&mut content[start..end], old.get(start..).unwrap_or_default(), stretch);
        start = end;
    }
    content
}

/// A layer's form, and what the image is at its point.
pub(crate) type Step = (Form, (usize, Vec<(usize, Stretch)>));

/// Writes a layer that makes `content` out of what `base` says.
pub(crate) fn write(spec: &LayerSpec, content: &[u8], base: Option<&[u8]>, block: usize) -> NativeLayer {
    let digests_path = spec.path.with_extension("digests");
    let digests = DigestWriter::create(&digests_path, spec.cluster_size).expect("created");
    let layer = write_with(spec, content, base, block, &digests);
    digests.finish().expect("finished");
    check_digests(&spec.path, &digests_path);
    std::fs::remove_file(digests_path).expect("removed");
    layer
}

/// As [`write`], and hands over the digests.
pub(crate) fn write_with(
    spec: &LayerSpec,
    content: &[u8],
    base: Option<&[u8]>,
    block: usize,
    digests: &DigestWriter,
) -> NativeLayer {
    let layer = NativeLayer::create(spec, Compressors::default()).expect("created");
    fill_layer(&layer, content, base, block, digests);
    layer
}

/// Has a layer of any kind written, which makes `content` out of what `base` says.
pub(crate) fn fill_layer(
    layer: &dyn LayerWriter,
    content: &[u8],
    base: Option<&[u8]>,
    block: usize,
    digests: &DigestWriter,
) {
    let source = MemorySource {
        content: content.to_vec(),
        base: base.map(<[u8]>::to_vec),
        block,
        ..MemorySource::default()
    };
    let (cancel, progress) = (Cancel::new(), Progress::default());
    let copy = Copy {
        source: &source,
        layer,
        root: base.is_none(),
        digests: Some(digests),
        buffers: &BufferPool::new(4 << 20),
        rate_limit: None,
        parallel: 3,
        progress: &progress,
        cancel: &cancel,
        stop: &cancel.part(),
    };
    copy.run().expect("copied");
    layer.finish().expect("finished");
}

/// The digests cover what the layer holds, no more and no less.
fn check_digests(layer: &Path, digests: &Path) {
    let layer = LayerReader::open(layer).expect("a layer");
    let mut covered: Vec<(Range<u64>, bool)> = Vec::new();
    let add = |covered: &mut Vec<(Range<u64>, bool)>, range: Range<u64>, zero| match covered.last_mut() {
        Some((last, kind)) if last.end == range.start && *kind == zero => last.end = range.end,
        _ => covered.push((range, zero)),
    };
    for record in DigestReader::open(digests).expect("digests") {
        let record = record.expect("a record");
        let mut bytes = vec![0xee; record.length as usize];
        assert_eq!(layer.read_at(record.offset, &mut bytes).expect("readable"), []);
        match record.content {
            Content::Data(hash) => assert_eq!(blake3::hash(&bytes), hash, "{record:?}"),
            Content::Zero => assert!(bytes.iter().all(|byte| *byte == 0), "{record:?}"),
        }
        add(&mut covered, record.offset..record.end(), record.content == Content::Zero);
    }
    let mut held = Vec::new();
    for piece in layer.map(0..layer.virtual_size()).expect("in range") {
        let (range, piece) = piece.expect("readable");
        if piece != Piece::Absent {
            add(&mut held, range, piece == Piece::Zero);
        }
    }
    assert_eq!(covered, held);
}

pub(crate) fn spec_of(
    directory: &Path,
    name: &str,
    size: usize,
    backing: Option<String>,
    form: &Form,
) -> LayerSpec {
    LayerSpec {
        path: directory.join(name),
        virtual_size: (size as u64).next_multiple_of(SECTOR),
        backing,
        cluster_size: 1 << form.cluster_bits,
        compression: form.compression,
        extended_l2: form.extended_l2,
    }
}

/// Writes a chain, and gives its files, the newest first, with what each point holds.
pub(crate) fn write_chain(directory: &Path, steps: &[Step]) -> Vec<(PathBuf, Vec<u8>)> {
    let mut points: Vec<(PathBuf, Vec<u8>)> = Vec::new();
    for (number, (form, image)) in steps.iter().enumerate() {
        let old = points.first().map(|(_, content)| content.as_slice());
        let content = next_content(old.unwrap_or_default(), image);
        let name = format!("layer{number}");
        let backing = number.checked_sub(1).map(|below| format!("layer{below}"));
        let spec = spec_of(directory, &name, content.len(), backing, form);
        write(&spec, &content, old, form.block);
        points.insert(0, (spec.path, content));
    }
    points
}

/// More of them with `RBD2QCOW2_LONG=1`.
pub(crate) fn cases(usual: u32) -> ProptestConfig {
    let long = std::env::var("RBD2QCOW2_LONG").as_deref() == Ok("1");
    let cases = if long { 20 * usual } else { usual };
    ProptestConfig { max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::with_cases(cases) }
}

/// Writes a layer of no data.
pub(crate) fn empty(directory: &Path, size: u64) -> PathBuf {
    let path = directory.join("empty");
    let spec = LayerSpec {
        path: path.clone(),
        virtual_size: size,
        backing: None,
        cluster_size: LayerSpec::DEFAULT_CLUSTER_SIZE,
        compression: Compression::None,
        extended_l2: ExtendedL2::Auto,
    };
    NativeLayer::create(&spec, Compressors::default()).expect("created").finish().expect("finished");
    path
}

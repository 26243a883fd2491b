use std::io::Write;

use bytes::Bytes;

use super::*;
use crate::error::Causes;
use crate::extent::{Extent, ExtentKind};
use crate::layer::native::testing::{Stretch, fill};
use crate::layer::native::{Compressors, index};
use crate::layer::{Compression, ExtendedL2, LayerError, LayerSpec, LayerWriter, Patch};
use crate::qcow2::compressor::Compressor;
use crate::qcow2::layer::{LayerReader, Piece};

const CLUSTER: usize = 65536;

/// Two clusters, and a half.
const SIZE: usize = 2 * CLUSTER + CLUSTER / 2;

/// Has the same packed data for every cluster, or cannot read any.
#[derive(Debug)]
struct Always(Option<Vec<u8>>);

impl PackedClusters for Always {
    fn find(
        &self,
        range: Range<u64>,
        cluster_size: u64,
        _: CompressionType,
    ) -> Result<Option<PackedCluster>, ReadError> {
        assert_eq!(cluster_size, CLUSTER as u64);
        assert!(range.end - range.start == cluster_size || range.end == SIZE as u64, "{range:?}");
        let bytes = self.0.clone().ok_or(ReadError::NoLayers)?;
        Ok(Some(PackedCluster { bytes, layer: "elsewhere".into() }))
    }
}

const BOTH: [(CompressionType, Compression); 2] = [
    (CompressionType::Zlib, Compression::Zlib),
    (CompressionType::Zstd, Compression::Zstd { level: Some(1) }),
];

fn text() -> Vec<u8> {
    let mut cluster = vec![0; CLUSTER];
    fill(&mut cluster, &[], &Stretch::Text(5));
    cluster
}

/// As somebody else packs, at other levels than the layer's.
fn pack(kind: CompressionType, cluster: &[u8]) -> Vec<u8> {
    match kind {
        CompressionType::Zlib => {
            let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::new(1));
            encoder.write_all(cluster).expect("memory");
            encoder.finish().expect("memory")
        }
        CompressionType::Zstd => {
            let mut compressor = Compressor::new(kind, 19, CLUSTER).expect("made");
            compressor.pack(cluster, CLUSTER).expect("packed").expect("smaller").to_vec()
        }
    }
}

fn spec(directory: &tempfile::TempDir, compression: Compression) -> LayerSpec {
    LayerSpec {
        path: directory.path().join("layer"),
        virtual_size: SIZE as u64,
        backing: None,
        cluster_size: 65536,
        compression,
        extended_l2: ExtendedL2::Auto,
    }
}

/// Writes `content` as the cluster `number` of a layer that knows of `packed`, and reads it back: what the
/// file has for it, and whether anything was packed for that.
fn store(
    compression: Compression,
    number: u64,
    content: &[u8],
    packed: Option<Vec<u8>>,
) -> Result<(Option<Vec<u8>>, bool), LayerError> {
    let directory = tempfile::tempdir().expect("a directory");
    let spec = spec(&directory, compression);
    let compressors = Compressors::default();
    let layer = NativeLayer::create(&spec, compressors.clone())?.with_packed(Arc::new(Always(packed)));
    let offset = number * CLUSTER as u64;
    // Not all has changed.
    let piece = Extent { offset, length: 3 * layer.grain(), kind: ExtentKind::Data };
    let held = layer.write(Patch { offset, data: Bytes::copy_from_slice(content), pieces: vec![piece] })?;
    layer.finish()?;
    let reader = LayerReader::open(&spec.path).expect("a layer");
    let mut found = vec![0; content.len()];
    reader.read_at(offset, &mut found).expect("readable");
    for held in &held {
        let start = index(held.offset - offset);
        let range = start..start + index(held.length);
        assert!(found[range.clone()] == content[range], "the digests are those of the content");
    }
    let packed = reader.read_packed(offset).expect("readable");
    let pieces: Vec<_> = reader.map(offset..offset + content.len() as u64).expect("in range").collect();
    assert_eq!(packed.is_some(), matches!(pieces[..], [Ok((_, Piece::Compressed))]), "{pieces:?}");
    let whole = Extent { offset, length: content.len() as u64, kind: ExtentKind::Data };
    assert_eq!(held, [if packed.is_some() { whole } else { piece }]);
    Ok((packed, compressors.were_used()))
}

/// Whether that is what the file has for a cluster, whose length it does not tell.
fn same(found: &[u8], stream: &[u8]) -> bool {
    found.strip_prefix(stream).is_some_and(|rest| rest.iter().all(|byte| *byte == 0))
}

#[test]
fn what_is_packed_is_stored_as_it_is_without_what_follows() {
    for (kind, compression) in BOTH {
        let stream = pack(kind, &text());
        let packed = [&stream[..], &[0xa5; 700]].concat();
        let (found, compressed) = store(compression, 1, &text(), Some(packed)).expect("stored");
        assert!(same(&found.expect("packed"), &stream), "{kind:?}");
        assert!(!compressed);
    }
}

#[test]
fn the_last_cluster_is_cut_short_by_the_end_of_the_image() {
    for (kind, compression) in BOTH {
        let mut cluster = text();
        let is_copied = |cluster: &[u8]| {
            let stream = pack(kind, cluster);
            let stored = store(compression, 2, &text()[..CLUSTER / 2], Some(stream.clone()));
            let (found, compressed) = stored.expect("stored");
            assert_ne!(same(&found.expect("packed"), &stream), compressed, "{kind:?}");
            !compressed
        };
        // What was cut off must not come back.
        assert!(!is_copied(&cluster));
        cluster[CLUSTER / 2..].fill(0);
        assert!(is_copied(&cluster));
        cluster[CLUSTER - 1] = 1;
        assert!(!is_copied(&cluster));
    }
}

#[test]
fn what_holds_something_else_is_not_stored() {
    for (kind, compression) in BOTH {
        // Also where nothing has changed, for the whole cluster would be stored.
        let mut other = text();
        other[CLUSTER / 2] ^= 1;
        let stream = pack(kind, &other);
        let refused = |packed: Option<&[u8]>, reason: &str| {
            let error = store(compression, 0, &text(), packed.map(<[u8]>::to_vec)).expect_err("refused");
            let found = Causes(&error).to_string();
            assert!(found.contains(reason), "{kind:?}: {found}");
        };
        refused(Some(&stream), "elsewhere are not copied: they hold something else");
        for cut in [0, 1, stream.len() / 2, stream.len() - 1] {
            refused(Some(&stream[..cut]), "elsewhere cannot be copied (guest offset");
        }
        refused(None, "cannot read packed data");
    }
}

#[test]
fn after_something_else_there_is_no_way_to_finish_the_layer() {
    let directory = tempfile::tempdir().expect("a directory");
    let spec = spec(&directory, Compression::Zlib);
    let known = Arc::new(Always(Some(pack(CompressionType::Zlib, &[1; CLUSTER]))));
    let layer = NativeLayer::create(&spec, Compressors::default()).expect("created").with_packed(known);
    let pieces = vec![Extent { offset: 0, length: CLUSTER as u64, kind: ExtentKind::Data }];
    layer.write(Patch { offset: 0, data: text().into(), pieces }).expect_err("something else");
    layer.finish().expect_err("unusable");
    assert!(LayerReader::open(&spec.path).is_err());
}

#[test]
fn what_takes_a_cluster_or_more_is_packed_anew() {
    // Frames of nothing, and then one of everything.
    let stream = pack(CompressionType::Zstd, &text());
    let nothing = zstd::bulk::compress(&[], 1).expect("memory");
    let mut packed = nothing.repeat((CLUSTER - stream.len()).div_ceil(nothing.len()));
    packed.extend(&stream);
    assert!(packed.len() >= CLUSTER);
    let compression = Compression::Zstd { level: Some(1) };
    let (found, compressed) = store(compression, 0, &text(), Some(packed)).expect("stored");
    assert!(compressed && found.expect("packed").len() < CLUSTER);
}

#[test]
fn a_layer_that_is_not_packed_has_no_use_for_it() {
    let (found, compressed) = store(Compression::None, 0, &text(), None).expect("stored");
    assert!(found.is_none() && !compressed);
}

//! Packed clusters are copied, not packed once more.

use std::path::Path;

use super::*;
use crate::chain::PointName;
use crate::layer::ExtendedL2;
use crate::layer::native::PackedClusters;
use crate::layer::native::testing::{Form, Stretch, fill, write_chain};
use crate::layer::qemu_nbd::testing::{contents, qemu_img};
use crate::qcow2::compressed::unpack_stream;
use crate::qcow2::header::CompressionType;
use crate::qcow2::layer::Piece;
use crate::qcow2::testing::{qemu, qemu_io};
use crate::testing::plain;

const CLUSTER: usize = 65536;

fn merge(
    writer: &ChainWriter,
    child: PointName,
    parent: Option<PointName>,
    compressors: &Compressors,
) -> Result<(), MergeError> {
    let (options, progress, cancel) = (&MergeOptions::default(), &MergeProgress::default(), &Cancel::new());
    Merge { writer, child, parent, options, compressors, progress, observer: &(), cancel }.run().map(drop)
}

fn zstd(level: u8) -> Compression {
    Compression::Zstd { level: Some(level) }
}

fn form_of(compression: Compression) -> Form {
    Form { compression, ..plain() }
}

/// Clusters that all get smaller.
fn text(clusters: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; clusters * CLUSTER];
    for (number, cluster) in (seed..).zip(bytes.chunks_mut(CLUSTER)) {
        fill(cluster, &[], &Stretch::Text(number.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    }
    bytes
}

/// The packed data of the cluster at an offset, without what follows, and what they hold.
fn stream(layer: &LayerReader, offset: u64) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut packed = layer.read_packed(offset).expect("readable")?;
    let mut cluster = vec![0; layer.header().cluster_bits.size() as usize];
    let length = unpack_stream(layer.header().compression_type, &packed, &mut cluster).expect("a cluster");
    packed.truncate(length);
    Some((packed, cluster))
}

/// The packed data that a merge of `layers`, the newest first, has for each of its clusters, if it is packed
/// as `kind`. Layer by layer.
fn expected(layers: &[LayerReader], kind: CompressionType) -> Vec<Option<Vec<u8>>> {
    let (cluster, size) = (layers[0].header().cluster_bits.size(), layers[0].virtual_size());
    let of = |start: u64| {
        let range = start..(start + cluster).min(size);
        let holds = |layer: &LayerReader| {
            layer.map(range.clone()).expect("in range").map(|piece| piece.expect("readable").1).collect()
        };
        for layer in layers {
            let header = layer.header();
            let pieces: Vec<_> = if layer.virtual_size() < range.end { Vec::new() } else { holds(layer) };
            return match pieces[..] {
                [Piece::Absent] => continue,
                [Piece::Compressed]
                    if (header.cluster_bits.size(), header.compression_type) == (cluster, kind) =>
                {
                    let (packed, content) = stream(layer, start).expect("packed");
                    // Zeroes need no packed data, and what is behind the image's end must be some.
                    let (before, behind) = content.split_at((range.end - start) as usize);
                    let zeroes = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
                    (!zeroes(before) && zeroes(behind)).then_some(packed)
                }
                _ => None,
            };
        }
        None
    };
    (0..size.div_ceil(cluster)).map(|number| of(number * cluster)).collect()
}

fn open(paths: &[PathBuf]) -> Vec<LayerReader> {
    paths.iter().map(|path| LayerReader::open(path).expect("a layer")).collect()
}

/// Files of a chain as they are before a merge, which replaces one of them.
fn layers(fixture: &Fixture, points: std::ops::RangeInclusive<usize>) -> Vec<LayerReader> {
    open(&points.rev().map(|index| fixture.layer(index)).collect::<Vec<_>>())
}

/// Holds a merged layer against what is expected, and tells how many clusters were copied.
fn check_copied(merged: &Path, before: &[LayerReader]) -> usize {
    let merged = LayerReader::open(merged).expect("a layer");
    let (cluster, kind) = (merged.header().cluster_bits.size(), merged.header().compression_type);
    let mut copied = 0;
    for (number, expected) in (0..).zip(expected(before, kind)) {
        if let Some(expected) = expected {
            let (found, _) = stream(&merged, number * cluster).expect("packed");
            assert!(found == expected, "cluster {number}: {} bytes of {}", found.len(), expected.len());
            // The rest of a sector follows, and nothing of what followed before.
            let room = merged.read_packed(number * cluster).expect("readable").expect("packed").len();
            assert!(room < found.len() + 512, "cluster {number}: {} bytes in {room}", found.len());
            copied += 1;
        }
    }
    copied
}

/// Forms that are alike, mostly.
fn forms() -> impl Strategy<Value = Vec<Form>> {
    (9_u32..=17, any::<bool>()).prop_flat_map(|(bits, zlib)| {
        let level = prop::option::of(1_u8..=9).prop_map(|level| Compression::Zstd { level });
        let (usual, other) = if zlib {
            (Just(Compression::Zlib).boxed(), level.boxed())
        } else {
            (level.boxed(), Just(Compression::Zlib).boxed())
        };
        let compression = prop_oneof![6 => usual, 1 => other, 1 => Just(Compression::None)];
        let bits = prop_oneof![6 => Just(bits), 1 => 9_u32..=17];
        let extended_l2 = prop_oneof![Just(ExtendedL2::Auto), Just(ExtendedL2::Off)];
        let form = (bits, extended_l2, compression, 1_usize..100_000).prop_map(
            |(cluster_bits, extended_l2, compression, block)| Form {
                cluster_bits,
                extended_l2,
                compression,
                block,
            },
        );
        prop::collection::vec(form, 6)
    })
}

proptest! {
    #![proptest_config(cases(24))]
    /// Of whole packed clusters not a byte changes, whatever they come from.
    #[test]
    fn packed_clusters_are_copied_as_they_are(
        forms in forms(),
        images in prop::collection::vec(image(), 3..=6),
        which in any::<Index>(),
        count in 1_usize..4,
        reuse in reuse()
    ) {
        let steps: Vec<_> = forms.into_iter().zip(images).collect();
        let mut fixture = Fixture::new(&steps);
        let mut there = fixture.names();
        let start = which.index(there.len() - 1);
        let end = (start + count).min(there.len() - 1);
        let before = layers(&fixture, start..=end);
        let gone: BTreeSet<_> = there.drain(start..end).collect();
        fixture.forget(&gone, reuse).unwrap();
        fixture.check_all(&there);
        check_copied(&fixture.layer(end), &before);
        let (name, content) = &fixture.points[end];
        let layer = format!("{}@{name}.qcow2", fixture.image.encoded());
        for tools in qemus() {
            qemu_img(&tools, &fixture.directory(), &["check", "-q", "-f", "qcow2", &layer]);
            let found = contents(&tools, &fixture.directory(), &layer);
            prop_assert!(found.starts_with(content) && found.len() == content.len().next_multiple_of(512));
        }
    }
}

/// Where all lies packed already, nothing is packed, and copies of copies do not grow.
#[test]
fn nothing_is_packed_that_is_packed_already() {
    for (old, new) in [(Compression::Zlib, Compression::Zlib), (zstd(9), zstd(1))] {
        let mut fixture = Fixture::empty("vm");
        let mut content = text(24, 1);
        fixture.back_up(&form_of(old), content.clone());
        let bytes = |index| fs::metadata(fixture.layer(index)).expect("there").len();
        let first = bytes(0);
        for number in 1..5 {
            content[number * CLUSTER..][..CLUSTER].copy_from_slice(&text(1, 100 + number as u64));
            fixture.back_up(&form_of(if number == 4 { new } else { old }), content.clone());
        }
        let names = fixture.names();
        for index in 1..5 {
            let before = layers(&fixture, index - 1..=index);
            let compressors = Compressors::default();
            let mut writer = fixture.writer();
            writer.note_forgetting(&names[index - 1..index]).expect("noted");
            merge(&writer, names[index], None, &compressors).expect("merged");
            assert!(!compressors.were_used());
            writer.forget().expect("forgotten");
            drop(writer);
            fixture.check_all(&names[index..]);
            assert_eq!(check_copied(&fixture.layer(index), &before), 24);
        }
        let last = fs::metadata(fixture.layer(4)).expect("there").len();
        assert!(last < first + 2 * CLUSTER as u64, "{last} bytes after {first}");
        let manifest = fixture.writer().catalogue().points()[0].manifest.clone().expect("a manifest");
        assert_eq!(manifest.record.compression, new.to_string());
    }
}

/// A file has one compression type: what is of the other is packed anew, and so is what was not packed, or
/// has changed in part.
#[test]
fn all_else_is_packed_anew() {
    for (forms, copied, used) in [
        ([Compression::Zlib, zstd(2), Compression::None], 3, true),
        ([zstd(2), Compression::None, Compression::None], 20, true),
        ([Compression::None, Compression::None, Compression::Zlib], 1, true),
        ([Compression::None, Compression::None, Compression::None], 0, false),
    ] {
        let mut fixture = Fixture::empty("vm");
        let mut content = text(24, 1);
        fixture.back_up(&form_of(forms[0]), content.clone());
        content[..3 * CLUSTER].copy_from_slice(&text(3, 77));
        fixture.back_up(&form_of(forms[1]), content.clone());
        // A part of one cluster, which a packed layer makes whole.
        content[5 * CLUSTER + 5000..][..20_000].fill(0x5a);
        fixture.back_up(&form_of(forms[2]), content);
        let (names, before) = (fixture.names(), layers(&fixture, 0..=2));
        let compressors = Compressors::default();
        let mut writer = fixture.writer();
        writer.note_forgetting(&names[..2]).expect("noted");
        merge(&writer, names[2], None, &compressors).expect("merged");
        writer.forget().expect("forgotten");
        drop(writer);
        fixture.check_all(&names[2..]);
        assert_eq!(check_copied(&fixture.layer(2), &before), copied, "{forms:?}");
        assert_eq!(compressors.were_used(), used, "{forms:?}");
        let merged = LayerReader::open(&fixture.layer(2)).expect("a layer");
        let packed = (0..24).filter(|number| stream(&merged, number * CLUSTER as u64).is_some()).count();
        assert_eq!(packed, if used { 24 } else { 0 }, "{forms:?}");
    }
}

/// Only whole clusters of the layers that are merged, of the size and type that is asked for.
#[test]
fn a_chain_knows_which_clusters_are_whole() {
    let directory = tempfile::tempdir().expect("a directory");
    let image = |stretches: &[(usize, Stretch)]| (8 * CLUSTER - 512, stretches.to_vec());
    let (old, new) = (|count| (count * CLUSTER, Stretch::Old), Stretch::Text(3));
    // The length decides whether a stretch ends at a page: these do in any case.
    let steps = [
        (form_of(zstd(3)), image(&[(8 * CLUSTER, Stretch::Text(1))])),
        (form_of(zstd(3)), image(&[old(2), (2 * CLUSTER, Stretch::Text(2)), old(4)])),
        (form_of(Compression::None), image(&[old(3), (4096, new), (CLUSTER - 4096, Stretch::Old), old(4)])),
    ];
    let chain = write_chain(directory.path(), &steps);
    let content = &chain[0].1;
    let paths: Vec<_> = chain.iter().map(|(path, _)| path).collect();
    let chain = Arc::new(ChainReader::open(&paths).expect("a chain"));
    let find = |merged, range: std::ops::Range<usize>, cluster: usize, kind| {
        let known = MergedClusters { chain: chain.clone(), merged };
        let found = known.find(range.start as u64..range.end as u64, cluster as u64, kind).expect("readable");
        found.map(|found| {
            let mut unpacked = vec![0; cluster];
            let length = unpack_stream(kind, &found.bytes, &mut unpacked).expect("a cluster");
            assert!(length <= found.bytes.len() && unpacked.starts_with(&content[range]));
            found.layer
        })
    };
    let cluster = |number: usize| number * CLUSTER..((number + 1) * CLUSTER).min(8 * CLUSTER - 512);
    for number in 0..8 {
        for merged in 1..=3 {
            let owner = match number {
                2 => 1,
                3 => usize::MAX,
                _ => 2,
            };
            let found = find(merged, cluster(number), CLUSTER, CompressionType::Zstd);
            assert_eq!(found.as_ref(), paths.get(owner).copied().filter(|_| owner < merged), "{number}");
            assert_eq!(find(merged, cluster(number), CLUSTER, CompressionType::Zlib), None);
        }
    }
    for (range, size) in [(0..2 * CLUSTER, 2 * CLUSTER), (0..CLUSTER / 2, CLUSTER / 2)] {
        assert_eq!(find(3, range, size, CompressionType::Zstd), None);
    }
    let known = MergedClusters { chain: chain.clone(), merged: 3 };
    assert!(known.find(0..9 * CLUSTER as u64, CLUSTER as u64, CompressionType::Zstd).is_err());
}

/// Points as the Python tool lays them out, which QEMU has packed, or not.
fn python_chain(
    fixture: &Fixture,
    tools: &crate::layer::qemu_nbd::QemuTools,
    kind: Option<&str>,
) -> Vec<PointName> {
    let directory = fixture.directory();
    fs::create_dir(&directory).expect("created");
    fs::write(fixture.out.path().join("raw"), text(16, 9)).expect("written");
    let raw = fixture.out.path().join("raw");
    let options = kind.map_or(String::new(), |kind| format!("compression_type={kind},"));
    let options = format!("{options}cluster_size=64k");
    qemu_img(tools, &directory, &["create", "-q", "-f", "qcow2", "empty.qcow2", "1M"]);
    let mut convert = vec!["convert", "-q", "-f", "raw", "-O", "qcow2", "-o", &options];
    convert.extend(kind.map(|_| "-c"));
    convert.extend(["-B", "empty.qcow2", "-F", "qcow2", raw.to_str().expect("text"), "vm@1700000000.qcow2"]);
    qemu_img(tools, &directory, &convert);
    for number in 1..3 {
        let (name, below) = (format!("vm@{}.qcow2", 1_700_000_000 + number), 1_700_000_000 + number - 1);
        let below = format!("vm@{below}.qcow2");
        let create =
            ["create", "-q", "-f", "qcow2", "-o", &options, "-F", "qcow2", "-b", &below, &name, "1M"];
        qemu_img(tools, &directory, &create);
        let packed = if kind.is_some() { "-c" } else { "" };
        let write = |cluster| format!("write -q {packed} -P {} {}k 64k", 16 * number + cluster, 64 * cluster);
        qemu_io(&directory, &name, &[write(2 * number), write(2 * number + 1)]);
    }
    fixture.writer().catalogue().points().iter().map(|point| point.name).collect()
}

#[test]
fn chains_that_qemu_has_packed_stay_packed() {
    if qemu().is_none() {
        return;
    }
    for tools in qemus() {
        for kind in [Some("zlib"), Some("zstd"), None] {
            for parent in [None, Some(0)] {
                let fixture = Fixture::empty("vm");
                let names = python_chain(&fixture, &tools, kind);
                let files: Vec<_> = names.iter().map(|name| format!("vm@{name}.qcow2")).collect();
                let wanted = contents(&tools, &fixture.directory(), &files[2]);
                let first = parent.map_or(0, |parent| parent + 1);
                let paths: Vec<_> =
                    files[first..].iter().rev().map(|file| fixture.directory().join(file)).collect();
                let before = open(&paths);
                let compressors = Compressors::default();
                let writer = fixture.writer();
                merge(&writer, names[2], parent.map(|parent| names[parent]), &compressors).expect("merged");
                drop(writer);
                qemu_img(&tools, &fixture.directory(), &["check", "-q", "-f", "qcow2", &files[2]]);
                assert!(contents(&tools, &fixture.directory(), &files[2]) == wanted, "{kind:?}");
                let copied = check_copied(&paths[0], &before);
                let all = if parent.is_none() { 16 } else { 4 };
                assert_eq!(copied, if kind.is_some() { all } else { 0 }, "{kind:?}");
                assert!(!compressors.were_used());
                let merged = LayerReader::open(&paths[0]).expect("a layer");
                let expected =
                    if kind == Some("zstd") { CompressionType::Zstd } else { CompressionType::Zlib };
                assert_eq!(merged.header().compression_type, expected);
                // What is read without the points that went.
                let gone = if parent.is_none() { &files[..2] } else { &files[1..2] };
                for file in gone {
                    fs::remove_file(fixture.directory().join(file)).expect("removed");
                }
                assert!(contents(&tools, &fixture.directory(), &files[2]) == wanted, "{kind:?}");
            }
        }
    }
}

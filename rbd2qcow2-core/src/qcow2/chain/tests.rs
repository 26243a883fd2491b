use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use serde_json::Value;

use super::*;
use crate::layer::native::testing::{Form, Stretch, fill, spec_of, write};
use crate::layer::qemu_nbd::QemuTools;
use crate::layer::qemu_nbd::testing::{Random, contents, qemu_img};
use crate::layer::{Compression, ExtendedL2};
use crate::qcow2::file::ReadAt;
use crate::qcow2::testing::{VARIANTS, make, qemu, qemu_io};

mod on_demand;

/// A chain that QEMU made, and what QEMU reads from it.
struct Sample {
    directory: tempfile::TempDir,
    /// The newest first.
    paths: Vec<PathBuf>,
    expected: Vec<u8>,
}

impl Sample {
    /// A chain of up to five layers of any kind and size.
    fn random(tools: &QemuTools, random: &mut Random, newest: usize) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let count = 1 + random.below(5);
        let mut names: Vec<String> = Vec::new();
        for index in 0..count {
            let mut variant = VARIANTS[usize::try_from(random.below(VARIANTS.len() as u64)).expect("small")];
            if index == count - 1 {
                variant = VARIANTS[newest];
            }
            // Ragged, from far shorter than the others to longer.
            let size = (1 + random.below(3 * 4096)) * 512;
            let name = format!("layer{index}");
            let backing = names.last().map(String::as_str);
            make(tools, directory.path(), &name, backing, variant, size, random);
            names.push(name);
        }
        let expected = contents(tools, directory.path(), names.last().expect("one or more"));
        let paths = names.iter().rev().map(|name| directory.path().join(name)).collect();
        Self { directory, paths, expected }
    }
}

/// Reads ranges of random places and lengths and compares.
fn read_at_random(chain: &ChainReader, expected: &[u8], seed: u64) {
    let mut random = Random::new(seed);
    for _ in 0..60 {
        let offset = random.below(expected.len() as u64);
        let most = (expected.len() as u64 - offset).min(if random.below(3) == 0 { 1 << 20 } else { 5000 });
        let length = random.below(most + 1);
        let mut buf = vec![0xee; in_memory(length)];
        chain.read_at(offset, &mut buf).expect("readable");
        let range = in_memory(offset)..in_memory(offset + length);
        assert!(buf == expected[range], "{length} bytes at {offset}");
    }
}

/// Compares our map of a chain with that of `qemu-img`, as far as that tells. Returns ours.
fn compare_maps(tools: &QemuTools, sample: &Sample, chain: &ChainReader) -> Vec<ChainPiece> {
    let image = sample.paths[0].to_str().expect("UTF-8");
    let text = qemu_img(tools, sample.directory.path(), &["map", "-f", "qcow2", "--output=json", image]);
    let theirs: Vec<Value> = serde_json::from_str(&text).expect("JSON");
    let pieces: Vec<ChainPiece> =
        chain.map(0..chain.virtual_size()).expect("in range").collect::<Result<_, _>>().expect("readable");
    // QEMU before 8.2 does not tell of any piece whether it is compressed.
    let tells = theirs.iter().any(|entry| !entry["compressed"].is_null());
    let mut end = 0;
    for pair in pieces.windows(2) {
        assert!((pair[0].piece, pair[0].layer) != (pair[1].piece, pair[1].layer), "{pair:?} are one");
    }
    for piece in &pieces {
        assert!(piece.range.start == end && piece.range.end > end, "{piece:?} after {end}");
        end = piece.range.end;
        for entry in overlapping(&theirs, &piece.range) {
            let flag = |name: &str| entry[name].as_bool().unwrap_or(false);
            match piece.piece {
                Piece::Data => assert!(flag("data") && !flag("compressed"), "{piece:?}: {entry}"),
                Piece::Compressed => {
                    assert!(flag("data") && flag("compressed") == tells, "{piece:?}: {entry}");
                }
                Piece::Zero | Piece::Absent => assert!(flag("zero") && !flag("data"), "{piece:?}: {entry}"),
            }
            if let (true, Some(layer)) = (flag("data"), piece.layer) {
                assert_eq!(entry["depth"].as_u64(), Some(layer as u64), "{piece:?}: {entry}");
            }
        }
    }
    assert_eq!(end, chain.virtual_size());
    pieces
}

fn overlapping<'a>(entries: &'a [Value], range: &Range<u64>) -> impl Iterator<Item = &'a Value> {
    let range = range.clone();
    entries.iter().filter(move |entry| {
        let number = |name: &str| entry[name].as_u64().expect("a number");
        number("start") < range.end && range.start < number("start") + number("length")
    })
}

#[test]
fn chains_of_every_kind_read_as_in_qemu() {
    let Some(tools) = qemu() else {
        return;
    };
    let mut seen = Vec::new();
    for round in 0..2 * VARIANTS.len() {
        let seed = 0x5eed + round as u64;
        let newest = round % VARIANTS.len();
        let sample = Sample::random(&tools, &mut Random::new(seed), newest);
        let chain = ChainReader::open(&sample.paths).expect("valid");
        assert_eq!(chain.virtual_size(), sample.expected.len() as u64);
        let mut all = vec![0xee; sample.expected.len()];
        chain.read_at(0, &mut all).expect("readable");
        let wrong = all.iter().zip(&sample.expected).position(|(ours, theirs)| ours != theirs);
        assert_eq!(wrong, None, "seed {seed:#x}, {:?}", VARIANTS[newest]);
        seen.append(&mut compare_maps(&tools, &sample, &chain));
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (chain, expected) = (&chain, &sample.expected);
                scope.spawn(move || read_at_random(chain, expected, seed * 7 + thread));
            }
        });
    }
    // Otherwise the rounds would show little.
    for piece in [Piece::Data, Piece::Zero, Piece::Compressed] {
        for (layer, least) in [10, 10, 3].into_iter().enumerate() {
            let is_one = |seen: &&ChainPiece| (seen.piece, seen.layer) == (piece, Some(layer));
            assert!(seen.iter().filter(is_one).count() >= least, "{piece:?} in layer {layer}");
        }
    }
    assert!(seen.iter().any(|seen| seen.piece == Piece::Absent));
}

#[test]
fn a_short_layer_hides_what_lies_behind_its_end() {
    let Some(tools) = qemu() else {
        return;
    };
    let directory = tempfile::tempdir().expect("a directory");
    let create = |image: &str, backing: &[&str], size: &str| {
        let head = ["create", "-q", "-f", "qcow2"];
        qemu_img(&tools, directory.path(), &[&head[..], backing, &[image, size]].concat());
    };
    create("long", &[], "1M");
    qemu_io(directory.path(), "long", &["write -q -P 7 0 1M".to_owned()]);
    create("short", &["-b", "long", "-F", "qcow2"], "66048");
    create("grown", &["-b", "short", "-F", "qcow2"], "1M");
    let paths = ["grown", "short", "long"].map(|name| directory.path().join(name));
    let chain = ChainReader::open(&paths).expect("valid");
    let mut all = vec![1; 1 << 20];
    chain.read_at(0, &mut all).expect("readable");
    assert!(all == contents(&tools, directory.path(), "grown"));
    assert!(all[..66048].iter().all(|byte| *byte == 7) && all[66048..].iter().all(|byte| *byte == 0));
    // Also where nothing of the range lies in the short layer.
    let mut tail = [1; 100];
    chain.read_at(500_000, &mut tail).expect("readable");
    assert_eq!(tail, [0; 100]);
    let pieces: Vec<_> = chain.map(0..1 << 20).expect("in range").map(Result::unwrap).collect();
    let data = ChainPiece { range: 0..66048, piece: Piece::Data, layer: Some(2) };
    let nothing = ChainPiece { range: 66048..1 << 20, piece: Piece::Absent, layer: None };
    assert_eq!(pieces, [data, nothing]);
}

#[test]
fn only_the_chain_that_was_given_is_read() {
    let Some(tools) = qemu() else {
        return;
    };
    let directory = tempfile::tempdir().expect("a directory");
    let create = |arguments: &[&str]| {
        qemu_img(&tools, directory.path(), &[&["create", "-q", "-f", "qcow2"][..], arguments].concat());
    };
    create(&["a", "1M"]);
    create(&["b", "-b", "a", "-F", "qcow2"]);
    create(&["c", "-b", "b", "-F", "qcow2"]);
    create(&["loop", "1M"]);
    qemu_img(&tools, directory.path(), &["rebase", "-u", "-b", "loop", "-F", "qcow2", "loop"]);
    let open = |names: &[&str]| {
        ChainReader::open(&names.iter().map(|name| directory.path().join(name)).collect::<Vec<_>>())
    };
    let chain = open(&["c", "b", "a"]).expect("valid");
    assert!(matches!(chain.read_at(1 << 20, &mut [0]), Err(ReadError::OutOfRange { .. })));
    assert!(matches!(chain.read_at(u64::MAX, &mut [0]), Err(ReadError::OutOfRange { .. })));
    assert!(matches!(chain.map(5..(1 << 20) + 1), Err(ReadError::OutOfRange { .. })));
    assert!(chain.read_at(1 << 20, &mut []).is_ok());
    assert_eq!(chain.map(7..7).expect("in range").count(), 0);
    for wrong in [&["c", "a"][..], &["c", "b"], &["b", "a", "a"], &["loop", "loop"], &["a", "b"], &["loop"]] {
        assert!(matches!(open(wrong), Err(ReadError::Backing { .. })), "{wrong:?}");
    }
    let error = open(&["c", "b"]).expect_err("too few").to_string();
    assert!(error.ends_with("/b builds upon a, but the chain goes on with nothing"), "{error}");
    assert!(matches!(open(&[]), Err(ReadError::NoLayers)));
    assert!(matches!(open(&["missing"]), Err(ReadError::Header { .. })));
}

/// Remembers where it was read.
struct Watched {
    file: File,
    places: Arc<Mutex<Vec<u64>>>,
}

impl ReadAt for Watched {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<usize> {
        self.places.lock().expect("no panic").push(offset);
        self.file.read_at(buf, offset)
    }
}

/// A cluster was read and unpacked anew for each part of it that newer layers leave open.
#[test]
fn a_read_unpacks_a_cluster_once() {
    let directory = tempfile::tempdir().expect("a directory");
    let form =
        |compression| Form { cluster_bits: 17, extended_l2: ExtendedL2::Auto, compression, block: 4096 };
    let mut old = vec![0; 2 << 17];
    fill(&mut old, &[], &Stretch::Text(1));
    let packed = form(Compression::Zstd { level: None });
    let below = spec_of(directory.path(), "below", old.len(), None, &packed);
    write(&below, &old, None, packed.block);
    let mut content = old.clone();
    for page in content.chunks_mut(16 << 10) {
        fill(&mut page[..4096], &[], &Stretch::Noise(3));
    }
    let plain = form(Compression::None);
    let above = spec_of(directory.path(), "above", old.len(), Some("below".to_owned()), &plain);
    write(&above, &content, Some(&old), plain.block);

    let places = Arc::new(Mutex::default());
    let file = File::open(&below.path).expect("a file");
    let bytes = file.metadata().expect("a file").len();
    let source = Watched { file, places: Arc::clone(&places) };
    let layers = vec![
        LayerReader::open(&above.path).expect("a layer"),
        LayerReader::from_source(&below.path, source, bytes).expect("a layer"),
    ];
    let chain = ChainReader::from_layers(layers).expect("a chain");
    let held: Vec<_> = chain.layers()[1].map(0..2 << 17).expect("in range").map(Result::unwrap).collect();
    assert_eq!(held, [(0..2 << 17, Piece::Compressed)]);
    // The tables are known now: what is read from here on is packed data.
    places.lock().expect("no panic").clear();
    let mut found = vec![0; content.len()];
    chain.read_at(0, &mut found).expect("readable");
    assert!(found == content);
    let places = places.lock().expect("no panic");
    assert!(places.len() == 2 && places[0] != places[1], "read at {places:?}");
}

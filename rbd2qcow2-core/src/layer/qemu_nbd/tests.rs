use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::testing::{self, Random, contents, qemu_img, qemus};
use super::*;

mod failures;

fn spec(directory: &Path, name: &str, virtual_size: u64) -> LayerSpec {
    LayerSpec {
        path: directory.join(name),
        virtual_size,
        backing: None,
        cluster_size: 64 << 10,
        compression: Compression::None,
        extended_l2: ExtendedL2::Auto,
    }
}

fn options(tools: &QemuTools) -> QemuNbdOptions {
    QemuNbdOptions { tools: tools.clone(), ..QemuNbdOptions::default() }
}

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// Writes random grains of data and zeroes, in random order and from two threads, into `layer`, and
/// the same into `model`.
fn write_randomly(layer: &QemuNbdLayer, model: &mut [u8], random: &mut Random) {
    let grain = layer.grain();
    let size = model.len() as u64;
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < size {
        let end = (at + grain * (1 + random.below(40))).min(size);
        let (from, to) = (usize::try_from(at).expect("small"), usize::try_from(end).expect("small"));
        match random.below(4) {
            0 => {
                model[from..to].fill(0);
                pieces.push((at..end, None));
            }
            1 => {}
            _ => {
                model[from..to].copy_from_slice(&random.bytes(to - from));
                pieces.push((at..end, Some(Bytes::copy_from_slice(&model[from..to]))));
            }
        }
        at = end;
    }
    for last in (1..pieces.len()).rev() {
        pieces.swap(last, usize::try_from(random.below(last as u64 + 1)).expect("small"));
    }
    let (first, second) = pieces.split_at(pieces.len() / 2);
    std::thread::scope(|scope| {
        for half in [first, second] {
            scope.spawn(move || {
                for (range, data) in half {
                    match data {
                        Some(data) => layer.write_data(range.start, data.clone()).expect("written"),
                        None => layer.write_zeroes(range.clone()).expect("zeroed"),
                    }
                }
            });
        }
    });
}

/// Writes a chain of three layers of different sizes and compares each with the model.
fn chain_like_the_model(tools: &QemuTools, base: &LayerSpec, options: &QemuNbdOptions, seed: u64) {
    let directory = directory();
    let mut random = Random::new(seed);
    let mut model = Vec::new();
    let mut backing: Option<String> = None;
    for layer in 0..3 {
        let clusters = 1 + random.below(24);
        let size = clusters * u64::from(base.cluster_size) + 512 * random.below(128);
        model.resize(usize::try_from(size).expect("small"), 0);
        let name = format!("layer,{layer}.qcow2");
        let spec = LayerSpec {
            path: directory.path().join(&name),
            virtual_size: size,
            backing: backing.replace(name.clone()),
            ..base.clone()
        };
        let writer = QemuNbdLayer::create(&spec, options.clone()).expect("created");
        write_randomly(&writer, &mut model, &mut random);
        writer.finish().expect("finished");
        assert!(contents(tools, directory.path(), &name) == model, "seed {seed}: layer {layer} differs");
        qemu_img(tools, directory.path(), &["check", "-q", "-f", "qcow2", &name]);
    }
}

fn chains_like_the_model(forms: &[(u32, Compression, ExtendedL2)]) {
    for tools in qemus() {
        for (seed, (cluster_size, compression, extended_l2)) in (1..).zip(forms.iter().copied()) {
            let base = LayerSpec {
                cluster_size,
                compression,
                extended_l2,
                ..spec(Path::new("unused"), "unused", 0)
            };
            chain_like_the_model(&tools, &base, &options(&tools), seed);
        }
    }
}

#[test]
fn plain_chains_equal_the_model() {
    chains_like_the_model(&[
        (64 << 10, Compression::None, ExtendedL2::Off),
        (512, Compression::None, ExtendedL2::Auto),
        (2 << 20, Compression::None, ExtendedL2::Off),
    ]);
}

#[test]
fn extended_chains_equal_the_model() {
    chains_like_the_model(&[
        (64 << 10, Compression::None, ExtendedL2::Auto),
        (16 << 10, Compression::None, ExtendedL2::Auto),
        (2 << 20, Compression::None, ExtendedL2::Auto),
    ]);
}

#[test]
fn compressed_chains_equal_the_model() {
    let zstd = Compression::Zstd { level: None };
    chains_like_the_model(&[
        (64 << 10, zstd, ExtendedL2::Auto),
        (64 << 10, Compression::Zlib, ExtendedL2::Auto),
        (4 << 10, zstd, ExtendedL2::Auto),
        (1 << 20, zstd, ExtendedL2::Auto),
    ]);
}

#[test]
fn the_grain_is_as_fine_as_the_format_allows() {
    for tools in qemus() {
        let directory = directory();
        let zstd = Compression::Zstd { level: None };
        for (number, (cluster_size, compression, extended_l2, grain)) in [
            (64 << 10, Compression::None, ExtendedL2::Auto, 2 << 10),
            (64 << 10, Compression::None, ExtendedL2::Off, 64 << 10),
            (64 << 10, zstd, ExtendedL2::Auto, 64 << 10),
            (16 << 10, Compression::None, ExtendedL2::Auto, 512),
            (8 << 10, Compression::None, ExtendedL2::Auto, 8 << 10),
        ]
        .into_iter()
        .enumerate()
        {
            let name = number.to_string();
            let spec = spec(directory.path(), &name, 1 << 20);
            let spec = LayerSpec { cluster_size, compression, extended_l2, ..spec };
            let layer = QemuNbdLayer::create(&spec, options(&tools)).expect("created");
            assert_eq!(layer.grain(), grain);
            let info = qemu_img(&tools, directory.path(), &["info", "-f", "qcow2", &name]);
            assert_eq!(info.contains("extended l2: true"), grain < u64::from(cluster_size), "{info}");
            assert_eq!(info.contains("compression type: zstd"), compression == zstd, "{info}");
        }
    }
}

/// Where the guest's bytes come from: (offset, length, layers below the top, zeroes?, data?).
fn map(tools: &QemuTools, directory: &Path, image: &str) -> Vec<(u64, u64, u64, bool, bool)> {
    let json = qemu_img(tools, directory, &["map", "--output=json", "-f", "qcow2", image]);
    let extents: Vec<serde_json::Value> = serde_json::from_str(&json).expect("JSON");
    let number = |value: &serde_json::Value| value.as_u64().expect("a number");
    let flag = |value: &serde_json::Value| value.as_bool().expect("a flag");
    let extent = |e: &serde_json::Value| {
        (number(&e["start"]), number(&e["length"]), number(&e["depth"]), flag(&e["zero"]), flag(&e["data"]))
    };
    extents.iter().map(extent).collect()
}

#[test]
fn zeroes_hide_the_backing_file_and_nothing_else_does() {
    for tools in qemus() {
        for compression in [Compression::None, Compression::Zlib] {
            let directory = directory();
            let base = LayerSpec { compression, ..spec(directory.path(), "base", 4 << 20) };
            let layer = QemuNbdLayer::create(&base, options(&tools)).expect("created");
            layer.write_data(0, Bytes::from(vec![0xaa; 4 << 20])).expect("written");
            layer.finish().expect("finished");
            // One that ends in the middle of a grain of the longer base.
            let size = (3 << 20) - 512;
            let top = LayerSpec {
                backing: Some("base".into()),
                compression,
                ..spec(directory.path(), "top", size)
            };
            let layer = QemuNbdLayer::create(&top, options(&tools)).expect("created");
            layer.write_zeroes(1 << 20..2 << 20).expect("zeroed");
            layer.write_zeroes((2 << 20) + (512 << 10)..size).expect("zeroed");
            layer.finish().expect("finished");
            let found = map(&tools, directory.path(), "top");
            let (mib, half) = (1 << 20, 512 << 10);
            assert_eq!(found[0], (0, mib, 1, false, true));
            assert_eq!(found[1], (mib, mib, 0, true, false));
            assert_eq!(found[2], (2 * mib, half, 1, false, true));
            assert_eq!(found[3], (2 * mib + half, half - 512, 0, true, false));
            qemu_img(&tools, directory.path(), &["check", "-q", "-f", "qcow2", "top"]);
        }
    }
}

#[test]
fn a_layer_of_nothing_needs_no_server_and_no_backing_file() {
    for tools in qemus() {
        // A server that is called would fail.
        let directory = directory();
        let qemu_nbd = testing::script(directory.path(), "nbd", "[ \"$1\" = --version ]");
        let tools = QemuTools::new(tools.qemu_img(), qemu_nbd);
        for (name, size) in [("empty", 0), ("sector", 512), ("ragged", (1 << 20) + 512), ("whole", 1 << 20)] {
            let spec = LayerSpec { backing: Some("absent".into()), ..spec(directory.path(), name, size) };
            let layer = QemuNbdLayer::create(&spec, options(&tools)).expect("created");
            layer.write_data(0, Bytes::new()).expect("nothing to do");
            layer.write_zeroes(0..0).expect("nothing to do");
            layer.finish().expect("finished");
            let info = qemu_img(&tools, directory.path(), &["info", "-f", "qcow2", "--output=json", name]);
            let info: serde_json::Value = serde_json::from_str(&info).expect("JSON");
            assert_eq!(info["virtual-size"], size);
            assert_eq!(info["backing-filename"], "absent");
            assert_eq!(info["backing-filename-format"], "qcow2");
        }
    }
}

#[test]
fn the_smallest_layer_is_written_without_its_backing_file() {
    for tools in qemus() {
        for compression in [Compression::None, Compression::Zlib] {
            let directory = directory();
            let spec = LayerSpec {
                backing: Some("later".into()),
                compression,
                ..spec(directory.path(), "top", 512)
            };
            let layer = QemuNbdLayer::create(&spec, options(&tools)).expect("created");
            layer.write_data(0, Bytes::from(vec![7; 512])).expect("written");
            layer.finish().expect("finished");
            qemu_img(&tools, directory.path(), &["create", "-q", "-f", "qcow2", "later", "1M"]);
            assert_eq!(contents(&tools, directory.path(), "top"), [7; 512]);
        }
    }
}

#[test]
fn directories_may_have_any_name() {
    for tools in qemus() {
        let directory = directory();
        for name in [&b"a,b=c:d{}\"'$x"[..], b"nbd:host:80", b"no\xffutf8", b"new\nline"] {
            let inside = directory.path().join(OsStr::from_bytes(name));
            fs::create_dir(&inside).expect("made");
            let layer = QemuNbdLayer::create(&spec(&inside, "a,b@c%3A", 1 << 20), options(&tools));
            let layer = layer.expect("created");
            layer.write_data(0, Bytes::from(vec![7; 1 << 20])).expect("written");
            layer.finish().expect("finished");
            assert!(contents(&tools, &inside, "a,b@c%3A") == vec![7; 1 << 20]);
        }
    }
}

#[test]
fn sixteen_tebibytes_pass() {
    const SIZE: u64 = 16 << 40;
    for tools in qemus() {
        let directory = directory();
        let layer = QemuNbdLayer::create(&spec(directory.path(), "huge", SIZE), options(&tools));
        let layer = layer.expect("created");
        for offset in [0, SIZE / 2, SIZE - 2048] {
            layer.write_data(offset, Bytes::from(vec![1; 2048])).expect("written");
        }
        layer.write_zeroes(1 << 40..(1 << 40) + (40 << 30)).expect("zeroed");
        layer.finish().expect("finished");
        let found = map(&tools, directory.path(), "huge");
        let data: Vec<_> = found.iter().filter(|e| e.4).map(|e| (e.0, e.1)).collect();
        assert_eq!(data, [(0, 2048), (SIZE / 2, 2048), (SIZE - 2048, 2048)]);
        assert!(fs::metadata(directory.path().join("huge")).expect("there").len() < 16 << 20);
    }
}

use std::path::Path;

use super::testing::{Random, contents, qemu_img, qemus};
use super::*;

fn spec(directory: &Path, name: &str, virtual_size: u64) -> LayerSpec {
    LayerSpec {
        path: directory.join(name),
        virtual_size,
        backing: None,
        cluster_size: 64 << 10,
        compression: Compression::None,
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
                        Some(data) => layer.write(range.start, data.clone()).expect("written"),
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

#[test]
fn chains_equal_the_model_in_every_form() {
    for tools in qemus() {
        let base = spec(Path::new("unused"), "unused", 0);
        let zstd = Compression::Zstd { level: None };
        let forms = [
            (64 << 10, Compression::None, ExtendedL2::Auto),
            (64 << 10, Compression::None, ExtendedL2::Off),
            (16 << 10, Compression::None, ExtendedL2::Auto),
            (512, Compression::None, ExtendedL2::Auto),
            (2 << 20, Compression::None, ExtendedL2::Auto),
            (64 << 10, zstd, ExtendedL2::Auto),
            (64 << 10, Compression::Zlib, ExtendedL2::Auto),
            (4 << 10, zstd, ExtendedL2::Auto),
            (1 << 20, zstd, ExtendedL2::Auto),
        ];
        for (seed, (cluster_size, compression, extended_l2)) in (1..).zip(forms) {
            let base = LayerSpec { cluster_size, compression, ..base.clone() };
            let options = QemuNbdOptions { extended_l2, ..options(&tools) };
            chain_like_the_model(&tools, &base, &options, seed);
        }
    }
}

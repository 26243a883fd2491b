//! What the options make of the files, as stock QEMU tells it.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::cluster::unique_image;
use crate::cluster_or_skip;
use crate::driver::{FULL_FEATURES, Spec};
use crate::faults::Scene;
use crate::rig::{MIB, Rig, Running, assert_point};

/// Size of the images in MiB.
const SIZE: u64 = 8;

/// What a layer is to be.
struct Expected {
    arguments: &'static [&'static str],
    cluster_size: u64,
    /// As QEMU has it, to which an image that is not compressed is one of zlib.
    compression: &'static str,
    extended_l2: bool,
}

const fn expect(
    arguments: &'static [&'static str],
    cluster_size: u64,
    compression: &'static str,
    extended_l2: bool,
) -> Expected {
    Expected { arguments, cluster_size, compression, extended_l2 }
}

const EXPECTED: &[Expected] = &[
    expect(&[], 128 << 10, "zlib", true),
    expect(&["--writer", "native", "--no-extended-l2"], 128 << 10, "zlib", false),
    expect(&["--cluster-size", "2M"], 2 << 20, "zlib", true),
    // Too small for subclusters.
    expect(&["--cluster-size", "512"], 512, "zlib", false),
    expect(&["--compression", "zlib", "--cluster-size", "64K"], 64 << 10, "zlib", true),
    expect(&["--compression", "zstd"], 128 << 10, "zstd", true),
    expect(&["--compression", "zstd:22", "--no-extended-l2"], 128 << 10, "zstd", false),
    expect(&["--writer", "qemu-nbd"], 128 << 10, "zlib", true),
    expect(&["--writer", "qemu-nbd", "--no-extended-l2", "--cluster-size", "64K"], 64 << 10, "zlib", false),
    expect(&["--writer", "qemu-nbd", "--compression", "zlib"], 128 << 10, "zlib", false),
    expect(&["--writer", "qemu-nbd", "--compression", "zstd"], 128 << 10, "zstd", false),
];

/// An image of which some can be packed, some cannot, and some holds nothing.
fn image(rig: &Rig) -> Spec {
    let image = unique_image("writers");
    rig.image(&image, SIZE, FULL_FEATURES);
    rig.driver.fill(&image, MIB, MIB / 2, 7).expect("filled");
    rig.driver.close(&image).expect("closed");
    image
}

fn qemu_img(arguments: &[&str], file: &Path) -> Value {
    let mut command = Command::new("qemu-img");
    command.args(arguments).args(["--output=json", "-f", "qcow2"]).arg(file);
    let output = command.output().expect("qemu-img is installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn files_are_what_was_asked_for() {
    let cluster = cluster_or_skip!("writers::files_are_what_was_asked_for");
    let rig = Rig::new(&cluster);
    let image = image(&rig);
    for (number, expected) in EXPECTED.iter().enumerate() {
        let Expected { arguments, cluster_size, compression, extended_l2 } = expected;
        // Whatever the layers below are like, they can be built upon.
        rig.change(&image, 2 * MIB + 5000, 2 * MIB, number as u64);
        rig.driver.fill(&image, MIB, MIB / 2, number as u8 + 8).expect("filled");
        rig.driver.close(&image).expect("closed");
        let truth = rig.truth(&image, number);
        rig.back_up(&image, arguments);
        let layer = rig.layers(&image).pop().expect("a point");
        assert_point(&layer, &truth);
        let info = qemu_img(&["info"], &layer);
        let data = &info["format-specific"]["data"];
        assert_eq!(info["cluster-size"], *cluster_size, "{arguments:?}: {info}");
        assert_eq!(data["compression-type"], *compression, "{arguments:?}: {info}");
        assert_eq!(data["extended-l2"], *extended_l2, "{arguments:?}: {info}");
        assert_eq!(data["compat"], "1.1", "{arguments:?}: {info}");
        let check = qemu_img(&["check"], &layer);
        let packed = check["compressed-clusters"].as_u64().unwrap_or(0);
        assert_eq!(packed > 0, arguments.contains(&"--compression"), "{arguments:?}: {check}");
        let manifest = std::fs::read(layer.with_extension("json")).expect("a manifest");
        let manifest: Value = serde_json::from_slice(&manifest).expect("JSON");
        let option = |name: &str, default| {
            let place = arguments.iter().position(|argument| *argument == name);
            place.map_or(default, |place| arguments[place + 1])
        };
        assert_eq!(manifest["writer"], option("--writer", "native"), "{arguments:?}");
        assert_eq!(manifest["compression"], option("--compression", "none"), "{arguments:?}");
        assert_eq!(manifest["cluster_size"], *cluster_size, "{arguments:?}");
        assert_eq!(manifest["extended_l2"], *extended_l2, "{arguments:?}");
    }
    rig.driver.purge(&image).expect("removed");
}

#[test]
fn the_native_writer_needs_no_other_program() {
    let cluster = cluster_or_skip!("writers::the_native_writer_needs_no_other_program");
    let scene = Scene::new(&cluster, "alone");
    for (number, compression) in [(1, "none"), (2, "zstd:3")] {
        let truth = scene.change(number);
        let nowhere = "/nonexistent/program";
        let arguments = ["--compression", compression, "--qemu-img", nowhere, "--qemu-nbd", nowhere];
        let mut command = scene.rig.backup(&scene.image, &arguments);
        command.env("PATH", "/nonexistent");
        let run = Running::start(command).wait();
        assert_eq!(run.status, Some(0), "{run:?}");
        assert_point(scene.rig.layers(&scene.image).last().expect("a point"), &truth);
    }
}

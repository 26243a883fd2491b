//! Images that stock QEMU makes, and what it reads from them.

use std::path::Path;
use std::process::Command;

use crate::layer::qemu_nbd::QemuTools;
use crate::layer::qemu_nbd::testing::{Random, qemu_img, qemus, skip};

/// The QEMU that is installed; `None`, with a word to the tester, where `qemu-img` or `qemu-io` is
/// missing.
pub(crate) fn qemu() -> Option<QemuTools> {
    let tools = qemus().into_iter().next()?;
    if Command::new("qemu-io").arg("--version").output().is_err() {
        skip("no qemu-io");
        return None;
    }
    Some(tools)
}

/// Runs `commands` of `qemu-io` on `image`.
pub(crate) fn qemu_io(directory: &Path, image: &str, commands: &[String]) {
    let mut qemu_io = Command::new("qemu-io");
    qemu_io.current_dir(directory).args(["-f", "qcow2", "-d", "unmap"]);
    for command in commands {
        qemu_io.args(["-c", command]);
    }
    let output = qemu_io.arg(image).output().expect("qemu-io runs");
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "qemu-io {commands:?}: {stdout}");
    assert!(!stdout.contains("failed"), "qemu-io {commands:?}: {stdout}");
}

/// What a file is to be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Variant {
    /// Cluster size in bytes.
    pub(crate) cluster: u64,
    /// `,name=value` for `qemu-img create -o`.
    pub(crate) options: &'static str,
}

/// Every kind of file, small clusters and large.
pub(crate) const VARIANTS: [Variant; 12] = [
    Variant { cluster: 512, options: "compat=0.10" },
    Variant { cluster: 65536, options: "compat=0.10" },
    Variant { cluster: 2 << 20, options: "compat=0.10" },
    Variant { cluster: 512, options: "compat=1.1,refcount_bits=1" },
    Variant { cluster: 4096, options: "compat=1.1,compression_type=zstd" },
    Variant { cluster: 65536, options: "compat=1.1,refcount_bits=64" },
    Variant { cluster: 65536, options: "compat=1.1,compression_type=zstd,lazy_refcounts=on" },
    Variant { cluster: 2 << 20, options: "compat=1.1,compression_type=zstd" },
    Variant { cluster: 16384, options: "compat=1.1,extended_l2=on" },
    Variant { cluster: 65536, options: "compat=1.1,extended_l2=on,compression_type=zstd" },
    Variant { cluster: 131_072, options: "compat=1.1,extended_l2=on" },
    Variant { cluster: 2 << 20, options: "compat=1.1,extended_l2=on" },
];

/// Makes `image`, upon `backing` if any, and writes to it at random.
pub(crate) fn make(
    tools: &QemuTools,
    directory: &Path,
    image: &str,
    backing: Option<&str>,
    variant: Variant,
    size: u64,
    random: &mut Random,
) {
    let options = format!("{},cluster_size={}", variant.options, variant.cluster);
    let size_text = size.to_string();
    let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", &options];
    if let Some(backing) = backing {
        arguments.extend(["-F", "qcow2", "-b", backing]);
    }
    arguments.extend([image, &size_text]);
    qemu_img(tools, directory, &arguments);
    let mut commands = Vec::new();
    // Whole clusters first: those that are compressed must not have been written before.
    let clusters = size / variant.cluster;
    let mut untouched: Vec<u64> =
        (0..clusters.min(200)).map(|index| index * clusters / clusters.min(200)).collect();
    untouched.dedup();
    for _ in 0..untouched.len().min(6) {
        let index =
            untouched.swap_remove(usize::try_from(random.below(untouched.len() as u64)).expect("small"));
        let pattern = random.below(256);
        commands.push(format!("write -q -c -P {pattern} {} {}", index * variant.cluster, variant.cluster));
    }
    for _ in 0..12 {
        let pattern = random.below(256);
        let verb = match random.below(6) {
            0 => "write -q -z".to_owned(),
            1 => "write -q -z -u".to_owned(),
            2 => "discard -q".to_owned(),
            _ => format!("write -q -P {pattern}"),
        };
        let offset = random.below(size / 512) * 512;
        // Some a few sectors, some many clusters.
        let most = if random.below(2) == 0 { 16 } else { (variant.cluster * 5 / 512).min(4096) };
        let length = ((1 + random.below(most)) * 512).min(size - offset);
        commands.push(format!("{verb} {offset} {length}"));
    }
    qemu_io(directory, image, &commands);
}

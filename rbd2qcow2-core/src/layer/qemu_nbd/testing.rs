//! The QEMU programs that tests run with.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::QemuTools;

/// Directory with the `qemu-img` and `qemu-nbd` of a second version to test with.
const OLD_QEMU: &str = "RBD2QCOW2_TEST_QEMU_OLD";

/// Set to 1 where a missing tool must fail the tests, not skip them.
const REQUIRE_TOOLS: &str = "RBD2QCOW2_REQUIRE_TOOLS";

/// The QEMUs to test with; empty, with a word to the tester, when there is none.
pub(crate) fn qemus() -> Vec<QemuTools> {
    let mut found = Vec::new();
    let installed = QemuTools::default();
    match installed.probe() {
        Ok(()) => found.push(installed),
        Err(error) => skip(&format!("no QEMU: {error}")),
    }
    if let Some(old) = std::env::var_os(OLD_QEMU).map(PathBuf::from) {
        let old = QemuTools::new(old.join("qemu-img"), old.join("qemu-nbd"));
        old.probe().expect("the second QEMU works");
        found.push(old);
    }
    found
}

/// Says that a test does not run here, unless it has to.
pub(crate) fn skip(reason: &str) {
    assert!(std::env::var(REQUIRE_TOOLS).as_deref() != Ok("1"), "{REQUIRE_TOOLS} is set: {reason}");
    // Not by a macro, whose output a passing test would hide.
    let _ = writeln!(std::io::stderr(), "SKIPPED: {reason}");
}

/// Makes a program for the shell. A process of its own writes it: a file that any process has open
/// for writing cannot be executed, and other tests fork all the time.
pub(crate) fn script(directory: &Path, name: &str, body: &str) -> PathBuf {
    let path = directory.join(name);
    let write = r#"printf '#!/bin/sh\n%s\n' "$2" > "$1" && chmod 755 "$1""#;
    let status = Command::new("sh").args(["-c", write, "sh"]).arg(&path).arg(body).status();
    assert!(status.expect("sh runs").success());
    path
}

/// Runs `qemu-img` and returns what it prints.
pub(crate) fn qemu_img(tools: &QemuTools, directory: &Path, arguments: &[&str]) -> String {
    let output = Command::new(tools.qemu_img()).args(arguments).current_dir(directory).output();
    let output = output.expect("qemu-img runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {arguments:?}: {}: {stderr}", output.status);
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// What a guest reads from an image.
pub(crate) fn contents(tools: &QemuTools, directory: &Path, image: &str) -> Vec<u8> {
    let raw = format!("{image}.raw");
    qemu_img(tools, directory, &["convert", "-f", "qcow2", "-O", "raw", image, &raw]);
    let bytes = std::fs::read(directory.join(&raw)).expect("readable");
    std::fs::remove_file(directory.join(&raw)).expect("removable");
    bytes
}

/// A small source of numbers that are the same in every run (xorshift64*).
pub(crate) struct Random(u64);

impl Random {
    /// `seed` must not be 0.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `limit`.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % limit
    }

    /// Bytes that compress a little.
    pub(crate) fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length + 8);
        while bytes.len() < length {
            bytes.extend((self.below(1 << 40) | 1).to_le_bytes());
        }
        bytes.truncate(length);
        bytes
    }
}

//! What layers hold, and whether it is what they should.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::Made;

/// Compared at a time.
const PIECE: u64 = 1 << 20;

/// Something that a layer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    pub start: u64,
    pub end: u64,
    pub zero: bool,
}

/// Adjacent ranges of a kind become one.
pub fn merge(parts: impl Iterator<Item = Held>) -> Vec<Held> {
    let mut merged: Vec<Held> = Vec::new();
    for part in parts {
        match merged.last_mut() {
            Some(last) if last.end == part.start && last.zero == part.zero => last.end = part.end,
            _ => merged.push(part),
        }
    }
    merged
}

/// The point holds the truth, and zeroes up to the next sector.
pub fn compare(truth: &Path, raw: &Path, made: &Made) {
    let (truth, raw) = (File::open(truth).expect("the truth"), File::open(raw).expect("the point"));
    let length = |file: &File| file.metadata().expect("a length").len();
    let (size, padded) = (length(&truth), length(&raw));
    assert_eq!(padded, size.next_multiple_of(512), "{made:?}");
    let (mut expected, mut found) = (vec![0; PIECE as usize], vec![0; PIECE as usize]);
    for offset in (0..padded).step_by(PIECE as usize) {
        let length = PIECE.min(padded - offset) as usize;
        let known = PIECE.min(size - offset) as usize;
        truth.read_exact_at(&mut expected[..known], offset).expect("the truth");
        expected[known..length].fill(0);
        raw.read_exact_at(&mut found[..length], offset).expect("the point");
        if expected[..length] != found[..length] {
            let first = (0..length).find(|&index| expected[index] != found[index]).unwrap_or_default();
            let count = (0..length).filter(|&index| expected[index] != found[index]).count();
            panic!("{made:?} differs from its snapshot at {}, {count} bytes", offset + first as u64);
        }
    }
}

/// Runs `qemu-img` and gives what it prints.
///
/// # Panics
/// When it fails, as `qemu-img check` does for leaks too.
pub fn output(qemu_img: &Path, arguments: &[&str], file: &Path) -> Vec<u8> {
    let done = Command::new(qemu_img).args(arguments).arg(file).output().expect("qemu-img runs");
    let said = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "qemu-img {arguments:?} {}: {said}", file.display());
    done.stdout
}

pub fn read_json(path: &Path) -> Value {
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&bytes).expect("JSON")
}

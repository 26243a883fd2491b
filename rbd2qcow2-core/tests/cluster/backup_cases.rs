//! Backups end to end, a test for each kind of image, of change and of mishap.

mod ancestors;
pub mod bases;
mod changes;
mod damage;
mod images;
mod late_writes;
mod lost_changes;
mod maps;
mod migrations;
mod runs;

use crate::driver::{FULL_FEATURES, Layout};

/// One mebibyte.
const MIB: u64 = 1 << 20;

/// What a layer holds at least for a change, with default options: a subcluster.
const GRAIN: u64 = 4096;

/// Objects of 64 KiB with object maps: several of them in an image of some MiB.
fn small_objects() -> Layout {
    Layout::new(16, FULL_FEATURES)
}

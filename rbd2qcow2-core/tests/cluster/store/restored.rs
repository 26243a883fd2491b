//! Points that are restored to files by the library.

use std::fs::{self, File};
use std::path::Path;

use rbd2qcow2_core::cancel::Cancel;
use rbd2qcow2_core::chain::PointName;
use rbd2qcow2_core::restore::{FileFormat, Restore, RestoreOptions};
use tempfile::TempDir;

use super::{Made, compare};

/// A point comes back as it was, to the byte.
pub fn check(dest: &Path, made: &Made) {
    let directory = TempDir::new_in(made.truth.parent().expect("a directory")).expect("a directory");
    let restore = Restore {
        dest: dest.to_owned(),
        image: made.spec.image.clone(),
        point: Some(PointName::parse(&made.point).expect("a point")),
        options: RestoreOptions::default(),
    };
    let raw = directory.path().join("raw");
    let report = restore.to_file(&raw, &FileFormat::Raw, &(), &Cancel::new()).expect("restored");
    let size = fs::metadata(&made.truth).expect("the truth").len();
    // Without a manifest nobody knows the exact size.
    let known = made.file.with_extension("json").exists();
    assert_eq!(report.virtual_size, if known { size } else { size.next_multiple_of(512) }, "{made:?}");
    let file = File::options().write(true).open(&raw).expect("it was restored");
    assert_eq!(file.metadata().expect("a length").len(), report.virtual_size, "{made:?}");
    file.set_len(size.next_multiple_of(512)).expect("padded");
    compare(&made.truth, &raw, made);
}

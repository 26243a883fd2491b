//! Merges that must not be.

use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;

use super::*;
use crate::chain::ChainError;
use crate::layer::native::testing::Form;
use crate::layer::{Compression, ExtendedL2};
use crate::testing::plain;

/// Writes into a file that is read-only.
pub(super) fn write_at(path: &Path, bytes: &[u8], offset: u64) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).expect("writable");
    let file = fs::File::options().write(true).open(path).expect("opened");
    file.write_all_at(bytes, offset).expect("written");
    fs::set_permissions(path, fs::Permissions::from_mode(0o400)).expect("read-only");
}

pub(super) fn merge(
    fixture: &Fixture,
    child: PointName,
    parent: Option<PointName>,
) -> Result<(), MergeError> {
    let merge = Merge {
        writer: &fixture.writer(),
        child,
        parent,
        options: &MergeOptions::default(),
        compressors: &Compressors::default(),
        progress: &MergeProgress::default(),
        observer: &(),
        cancel: &Cancel::new(),
    };
    merge.run().map(drop)
}

pub(super) fn contents(directory: &Path) -> Vec<(std::ffi::OsString, Vec<u8>)> {
    let entries = fs::read_dir(directory).expect("listed").map(|entry| entry.expect("an entry"));
    let mut files: Vec<_> =
        entries.map(|entry| (entry.file_name(), fs::read(entry.path()).expect("read"))).collect();
    files.sort();
    files
}

/// Flips a bit of some data that the file holds once.
pub(super) fn rot(path: &Path, data: &[u8]) {
    let bytes = fs::read(path).expect("read");
    let at = bytes.windows(data.len()).position(|window| window == data).expect("stored as it is");
    write_at(path, &[data[7] ^ 1], at as u64 + 7);
}

pub(super) fn noise(seed: u32) -> Vec<u8> {
    (0..1_u32 << 16).map(|index| (index.wrapping_add(seed).wrapping_mul(2_654_435_761) >> 11) as u8).collect()
}

#[test]
fn damage_is_not_made_official() {
    let mut fixture = Fixture::of_sizes(&[1 << 20]);
    let mut content = fixture.points[0].1.clone();
    content[2 << 18..][..1 << 16].copy_from_slice(&noise(0));
    fixture.back_up(&plain(), content.clone());
    content[3 << 18] = 7;
    fixture.back_up(&plain(), content);
    let names = fixture.names();
    rot(&fixture.layer(1), &noise(0)[..4096]);
    let before = contents(&fixture.directory());
    let error = merge(&fixture, names[2], Some(names[0])).expect_err("damaged");
    assert!(matches!(&error, MergeError::Damaged { from, .. } if *from == names[1]), "{error:?}");
    assert_eq!(contents(&fixture.directory()), before);
    // What is not merged, nor read, may be damaged.
    merge(&fixture, names[1], None).expect_err("its own layer");
}

/// With larger clusters than those below, what surrounds the merged data is copied, too.
#[test]
fn damage_below_that_would_be_copied_is_not_made_official() {
    let small = Form { cluster_bits: 12, extended_l2: ExtendedL2::Off, ..plain() };
    let large =
        Form { cluster_bits: 16, extended_l2: ExtendedL2::Off, compression: Compression::None, ..plain() };
    for (form, refused) in [(&small, false), (&large, true)] {
        let mut fixture = Fixture::empty("vm");
        let mut content = [noise(1), noise(1 << 20)].concat();
        fixture.back_up(&small, content.clone());
        content[1 << 16..][..4096].fill(3);
        fixture.back_up(&small, content.clone());
        content[..4096].fill(4);
        fixture.back_up(form, content);
        let names = fixture.names();
        rot(&fixture.layer(0), &noise(1 << 20)[40_960..45_056]);
        let result = merge(&fixture, names[2], Some(names[0]));
        assert_eq!(matches!(result, Err(MergeError::Damaged { .. })), refused, "{result:?}");
        assert_eq!(result.is_err(), refused);
    }
}

#[test]
fn data_without_digests_get_none() {
    let fixture = Fixture::of_sizes(&[300_000, 250_000, 300_000]);
    let names = fixture.names();
    fs::remove_file(fixture.layer(1).with_extension("digests")).expect("removed");
    let before = contents(&fixture.directory());
    let error = merge(&fixture, names[2], Some(names[0])).expect_err("no digests");
    assert!(matches!(&error, MergeError::NoDigests { from, .. } if *from == names[1]), "{error:?}");
    assert_eq!(contents(&fixture.directory()), before);
}

#[test]
fn a_manifest_that_is_not_understood_stays_and_so_does_its_layer() {
    let fixture = Fixture::of_sizes(&[300_000, 250_000, 300_000]);
    let names = fixture.names();
    let path = fixture.layer(2).with_extension("json");
    fs::remove_file(&path).expect("removed");
    fs::write(&path, b"{ \"format\": 2 }").expect("written");
    let before = contents(&fixture.directory());
    let error = merge(&fixture, names[2], Some(names[0])).expect_err("the manifest");
    assert!(matches!(&error, MergeError::Chain(ChainError::ManifestUnusable { .. })), "{error:?}");
    assert_eq!(contents(&fixture.directory()), before);
}

#[test]
fn a_merge_that_changes_no_parent_is_none() {
    let fixture = Fixture::of_sizes(&[300_000, 250_000]);
    let names = fixture.names();
    for (child, parent) in [(names[1], Some(names[0])), (names[0], None)] {
        let error = merge(&fixture, child, parent).expect_err("nothing to do");
        assert!(matches!(&error, MergeError::Chain(ChainError::NothingToMerge { .. })), "{error:?}");
    }
    fixture.check_all(&names);
}

#[test]
fn owner_and_mode_stay() {
    let fixture = Fixture::of_sizes(&[300_000, 250_000]);
    let names = fixture.names();
    let files = ["qcow2", "json", "digests"].map(|suffix| fixture.layer(1).with_extension(suffix));
    // Nobody but root gives files away.
    let owner = rustix::process::getuid().is_root().then_some(12_345);
    for file in &files[..2] {
        fs::set_permissions(file, fs::Permissions::from_mode(0o640)).expect("changed");
        std::os::unix::fs::chown(file, owner, owner).expect("changed");
    }
    merge(&fixture, names[1], None).expect("merged");
    for file in &files[..2] {
        let metadata = fs::metadata(file).expect("there");
        assert_eq!(metadata.mode() & 0o7777, 0o440, "{}", file.display());
        assert!(owner.is_none_or(|owner| (metadata.uid(), metadata.gid()) == (owner, owner)));
    }
    fixture.check_all(&names);
}

//! A chain that is damaged: the image that was to be restored stays marked, and can be made good with
//! another point.

use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};

use rbd2qcow2_core::layer::Compression;
use rbd2qcow2_core::progress::Status;
use rbd2qcow2_core::restore::RestoreError;
use rbd2qcow2_core::restore::image::ImageError;

use super::{MIB, elsewhere, small_objects};
use crate::cluster_or_skip;
use crate::driver::Spec;
use crate::store::{Made, Store, told, why};

/// An image with three points, each upon the one before.
fn chain_of_three(store: &mut Store, name: &str) -> (Spec, [Made; 3]) {
    let spec = store.image(name, 8 * MIB, &small_objects());
    store.driver.metadata_set(&spec, "owner", "me").expect("metadata");
    let made = [1, 2, 3].map(|seed| {
        let offset = 2 * MIB * (seed - 1);
        match store.options.compression {
            Compression::None => store.driver.write(&spec, offset, 3 * MIB, seed).expect("a write"),
            _ => store.driver.fill(&spec, offset, 3 * MIB, seed as u8).expect("a write"),
        }
        store.back_up(&spec)
    });
    made[2].assert_upon(&made[1]);
    store.driver.close(&spec).expect("closed");
    (spec, made)
}

/// A layer's file, and the place and the value of its table entry of the cluster at `offset`.
fn entry_of(made: &Made, offset: u64) -> (File, u64, u64) {
    fs::set_permissions(&made.file, Permissions::from_mode(0o600)).expect("permissions");
    let file = OpenOptions::new().read(true).write(true).open(&made.file).expect("the layer");
    let number = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).expect("within the file");
        u64::from_be_bytes(bytes)
    };
    let table = number(number(40)) & 0x00ff_ffff_ffff_fe00;
    // Entries of 16 bytes, for clusters of 128 KiB.
    let entry = table + offset / (128 << 10) * 16;
    let value = number(entry);
    (file, entry, value)
}

/// Sets a bit that must be 0 in the entry of a cluster that the layer holds.
fn damage_table(made: &Made, offset: u64) {
    let (file, entry, value) = entry_of(made, offset);
    assert_eq!(value >> 56, 0x80, "no data at {offset} of {made:?}");
    file.write_all_at(&[0x81], entry).expect("written");
}

/// Makes a packed cluster one that cannot be unpacked.
fn damage_data(made: &Made, offset: u64) {
    let (file, _, value) = entry_of(made, offset);
    assert_eq!(value >> 62, 1, "nothing packed at {offset} of {made:?}");
    file.write_all_at(&[0; 8], value & ((1 << 53) - 1)).expect("written");
}

/// Damage that the tables show is found before anything is changed.
#[test]
fn a_table_in_the_middle() {
    let cluster = cluster_or_skip!("a_table_in_the_middle");
    let mut store = Store::new(&cluster);
    let (spec, [first, second, third]) = chain_of_three(&mut store, "damaged");
    damage_table(&second, 7 * MIB / 2);
    let (new, old) = (elsewhere(), store.image("old", 8 * MIB, &small_objects()));
    store.driver.write(&old, 0, 8 * MIB, 9).expect("a write");
    store.driver.close(&old).expect("closed");
    let before = store.driver.sha256(&old, None).expect("read");
    for wanted in [store.target(&new), store.overwriting(&old)] {
        let text = told(&store.restore(&third, &wanted).expect_err("it is damaged"));
        let file = second.file.to_str().expect("a path");
        for word in [file, "L2 table", &format!("not affected: {}", first.point)] {
            assert!(text.contains(word), "{text:?} does not say {word:?}");
        }
    }
    assert!(super::is_absent(&store, &new));
    assert_eq!(store.driver.sha256(&old, None).expect("read"), before);
    assert!(store.driver.metadata(&old).expect("metadata").is_empty());
    store.purge(&old);
    store.purge(&spec);
}

#[test]
fn a_layer_in_the_middle() {
    let cluster = cluster_or_skip!("a_layer_in_the_middle");
    let mut store = Store::new(&cluster);
    store.options.compression = Compression::Zstd { level: None };
    let (spec, [first, second, third]) = chain_of_three(&mut store, "damaged");
    // Before the third one's own data.
    damage_data(&second, 7 * MIB / 2);
    let (new, old) = (elsewhere(), store.image("old", 8 * MIB, &small_objects()));
    store.driver.write(&old, 0, 8 * MIB, 9).expect("a write");
    store.driver.metadata_set(&old, "owner", "you").expect("metadata");
    store.driver.close(&old).expect("closed");
    for (target, owner) in [(&new, "me"), (&old, "you")] {
        let wanted = if target == &new { store.target(target) } else { store.overwriting(target) };
        // The same command again is no better, and may be given again.
        for wanted in [&wanted, &wanted] {
            let error = store.restore(&third, wanted).expect_err("it is damaged");
            let text = told(&error);
            let file = second.file.to_str().expect("a path");
            let whole = format!("not affected: {}", first.point);
            for word in [&target.image, "left incomplete", file, "compressed", &whole] {
                assert!(text.contains(word), "{text:?} does not say {word:?}");
            }
            assert!(
                matches!(error, RestoreError::Image(ImageError::Incomplete { .. })),
                "another kind of error: {error:?}"
            );
            let metadata = store.driver.metadata(target).expect("metadata");
            assert!(metadata["rbd2qcow2-incomplete"].contains(&third.point), "{metadata:?}");
        }
        // It is neither backed up nor taken for another point's.
        let report = store.run(target);
        assert_eq!(report.status, Status::Failed);
        let (said, of) = (why(&report), format!("{}@{}", spec.image, third.point));
        assert!(said.contains("unfinished restore of") && said.contains(&of), "{said}");
        assert!(!store.directory(target).exists());
        let error = store.restore(&first, &store.target(target)).expect_err("it is another point's");
        assert!(error.to_string().contains(&format!("unfinished restore of {of}")), "{error}");

        store.restore_to(&first, &store.overwriting(target));
        assert_eq!(store.driver.metadata(target).expect("metadata")["owner"], owner);
        store.back_up(target).assert_full(None);
        store.purge(target);
    }
    store.purge(&spec);
}

/// Found before anything is changed.
#[test]
fn a_layer_that_is_gone() {
    let cluster = cluster_or_skip!("a_layer_that_is_gone");
    let mut store = Store::new(&cluster);
    let (spec, [first, second, third]) = chain_of_three(&mut store, "gone");
    fs::remove_file(&second.file).expect("removed");
    let target = elsewhere();
    let error = store.restore(&third, &store.target(&target)).expect_err("a layer is gone");
    let text = told(&error);
    for word in [&*second.point, &format!("not affected: {}", first.point)] {
        assert!(text.contains(word), "{text:?} does not say {word:?}");
    }
    assert!(super::is_absent(&store, &target));
    store.restore_to(&first, &store.target(&target));
    store.purge(&target);
    store.purge(&spec);
}

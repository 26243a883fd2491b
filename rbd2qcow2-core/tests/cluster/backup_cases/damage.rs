//! Damaged chains: a new one begins, says why, and leaves the files of the old one as they are.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use super::{MIB, small_objects};
use crate::cluster_or_skip;
use crate::driver::Spec;
use crate::store::{Made, Store};

/// An image with a chain of three points.
fn chain_of_three(store: &mut Store, name: &str) -> (Spec, [Made; 3]) {
    let spec = store.image(name, 2 * MIB, &small_objects());
    let made = [1, 2, 3].map(|seed| {
        store.driver.write(&spec, 200_000 * seed, 400_000, seed).expect("a write");
        store.back_up(&spec)
    });
    made[2].assert_upon(&made[1]);
    (spec, made)
}

/// The next backups begin a new chain and go on with it; what remains of the old one is untouched.
fn begins_anew(store: &mut Store, spec: &Spec, reason: &str) {
    store.driver.write(spec, 0, 5000, 4).expect("a write");
    let root = store.back_up(spec);
    root.assert_full(Some(reason));
    store.driver.write(spec, 5000, 5000, 5).expect("a write");
    store.back_up(spec).assert_upon(&root);
    store.check_again();
    store.purge(spec);
}

fn writable(path: &Path) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).expect("permissions");
}

#[test]
fn the_newest_layer_is_missing() {
    let cluster = cluster_or_skip!("the_newest_layer_is_missing");
    let mut store = Store::new(&cluster);
    let (spec, [.., newest]) = chain_of_three(&mut store, "newest-missing");
    fs::remove_file(&newest.file).expect("a removal");
    // What is left of the point, and its snapshot, are nobody's left-overs.
    store.freeze(&spec, &[&newest]);
    let snapshot = newest.manifest["snapshot"].as_str().expect("a name").to_owned();
    let is_there = |store: &Store| {
        let snapshots = store.driver.snaps(&spec).expect("snapshots");
        snapshots.iter().any(|found| found.name == snapshot)
    };
    store.driver.write(&spec, 0, 5000, 4).expect("a write");
    let root = store.back_up(&spec);
    root.assert_full(Some(&format!("point {}, the newest, is lost: ", newest.point)));
    root.assert_full(Some("gone from the cluster"));
    assert!(is_there(&store));
    store.driver.write(&spec, 5000, 5000, 5).expect("a write");
    store.back_up(&spec).assert_upon(&root);
    assert!(is_there(&store));
    store.check_again();
    // The snapshot goes when nothing tells of the point any more.
    for suffix in ["json", "digests"] {
        let path = newest.file.with_extension(suffix);
        store.expect_removal(&path);
        fs::remove_file(path).expect("a removal");
    }
    store.back_up(&spec);
    assert!(!is_there(&store));
    store.check_again();
    store.purge(&spec);
}

/// Nor is the only point that there was.
#[test]
fn the_only_layer_is_missing() {
    let cluster = cluster_or_skip!("the_only_layer_is_missing");
    let mut store = Store::new(&cluster);
    let spec = store.image("only-missing", 2 * MIB, &small_objects());
    store.driver.write(&spec, 0, 400_000, 1).expect("a write");
    let only = store.back_up(&spec);
    fs::remove_file(&only.file).expect("a removal");
    store.freeze(&spec, &[&only]);
    let root = store.back_up(&spec);
    root.assert_full(Some(&format!("point {}, the newest, is lost: ", only.point)));
    assert_eq!(store.driver.snaps(&spec).expect("snapshots").len(), 2);
    store.check_again();
    // Its chain has no point and no manifest then, and is remembered all the same.
    for suffix in ["json", "digests"] {
        let path = only.file.with_extension(suffix);
        store.expect_removal(&path);
        fs::remove_file(path).expect("a removal");
    }
    store.back_up(&spec).assert_upon(&root);
    assert_eq!(store.driver.snaps(&spec).expect("snapshots").len(), 1);
    store.purge(&spec);
}

/// The point before it still has its snapshot, and is as good a base as any.
#[test]
fn the_newest_layer_is_missing_and_an_older_base_is_there() {
    let cluster = cluster_or_skip!("the_newest_layer_is_missing_and_an_older_base_is_there");
    let mut store = Store::new(&cluster);
    store.options.keep_snapshots = 3;
    let (spec, [_, middle, newest]) = chain_of_three(&mut store, "older-base");
    fs::remove_file(&newest.file).expect("a removal");
    store.freeze(&spec, &[&newest]);
    store.driver.write(&spec, 0, 5000, 4).expect("a write");
    let made = store.back_up(&spec);
    made.assert_upon_because(&middle);
    let reason = made.reason.as_deref().expect("a reason");
    let told = [&newest.point, &newest.file.display().to_string(), &format!("builds upon {}", middle.point)]
        .map(|words| reason.contains(words));
    assert_eq!(told, [true; 3], "{reason}");
    store.back_up(&spec).assert_upon(&made);
    store.check_again();
    store.purge(&spec);
}

#[test]
fn the_newest_layer_is_cut_off() {
    let cluster = cluster_or_skip!("the_newest_layer_is_cut_off");
    let mut store = Store::new(&cluster);
    let (spec, [.., newest]) = chain_of_three(&mut store, "newest-cut");
    writable(&newest.file);
    let file = OpenOptions::new().write(true).open(&newest.file).expect("the layer");
    file.set_len(newest.number("file_bytes") - 1).expect("a shorter file");
    store.freeze(&spec, &[&newest]);
    begins_anew(&mut store, &spec, "damaged");
}

#[test]
fn the_newest_layer_is_garbage() {
    let cluster = cluster_or_skip!("the_newest_layer_is_garbage");
    let mut store = Store::new(&cluster);
    let (spec, [.., newest]) = chain_of_three(&mut store, "newest-garbage");
    writable(&newest.file);
    fs::write(&newest.file, vec![0xa5; newest.number("file_bytes") as usize]).expect("a write");
    store.freeze(&spec, &[&newest]);
    begins_anew(&mut store, &spec, "damaged");
}

#[test]
fn an_ancestor_is_missing() {
    let cluster = cluster_or_skip!("an_ancestor_is_missing");
    for lost in [0, 1] {
        let mut store = Store::new(&cluster);
        let (spec, made) = chain_of_three(&mut store, "ancestor-missing");
        fs::remove_file(&made[lost].file).expect("a removal");
        let damaged: Vec<_> = made[lost..].iter().collect();
        // What is known of the lost layer stays: it may be found again.
        store.freeze(&spec, &damaged);
        begins_anew(&mut store, &spec, "damaged");
    }
}

#[test]
fn the_newest_manifest_is_missing() {
    let cluster = cluster_or_skip!("the_newest_manifest_is_missing");
    let mut store = Store::new(&cluster);
    let (spec, [.., newest]) = chain_of_three(&mut store, "manifest-missing");
    fs::remove_file(newest.file.with_extension("json")).expect("a removal");
    store.freeze(&spec, &[&newest]);
    begins_anew(&mut store, &spec, "manifest");
}

#[test]
fn the_newest_manifest_is_damaged() {
    let cluster = cluster_or_skip!("the_newest_manifest_is_damaged");
    let mut store = Store::new(&cluster);
    let (spec, [.., newest]) = chain_of_three(&mut store, "manifest-damaged");
    let path = newest.file.with_extension("json");
    writable(&path);
    let text = fs::read_to_string(&path).expect("the manifest");
    // One digit of the snapshot's id.
    let id = format!("\"snapshot_id\": {}", newest.number("snapshot_id"));
    assert!(text.contains(&id), "{text}");
    fs::write(&path, text.replace(&id, &format!("{id}1"))).expect("a write");
    store.freeze(&spec, &[&newest]);
    begins_anew(&mut store, &spec, "manifest");
}

#[test]
fn layer_and_manifest_disagree() {
    let cluster = cluster_or_skip!("layer_and_manifest_disagree");
    let mut store = Store::new(&cluster);
    let (spec, [oldest, middle, newest]) = chain_of_three(&mut store, "disagreement");
    // As `qemu-img rebase -u` to the wrong layer does it.
    writable(&newest.file);
    let file = OpenOptions::new().read(true).write(true).open(&newest.file).expect("the layer");
    let mut header = vec![0; 4096];
    file.read_exact_at(&mut header, 0).expect("a header");
    let backing = middle.file.file_name().and_then(|name| name.to_str()).expect("a name");
    let at = header.windows(backing.len()).position(|part| part == backing.as_bytes()).expect("the link");
    let other = oldest.file.file_name().and_then(|name| name.to_str()).expect("a name");
    assert_eq!(other.len(), backing.len());
    file.write_all_at(other.as_bytes(), at as u64).expect("a write");
    store.freeze(&spec, &[&newest]);
    begins_anew(&mut store, &spec, "manifest says");
}

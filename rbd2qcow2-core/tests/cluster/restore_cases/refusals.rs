//! What is refused, and changes nothing.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use rbd2qcow2_core::cancel::Cancel;
use rbd2qcow2_core::progress::{Observer, Stage, Status};
use rbd2qcow2_core::rbd::Features;
use rbd2qcow2_core::restore::image::{ImageTarget, Overrides};
use serde_json::json;

use super::{MIB, elsewhere, image_with_point, is_absent, small_objects};
use crate::cluster::{POOL, unique};
use crate::cluster_or_skip;
use crate::driver::{FULL_FEATURES, Info, Layout, Snap, Spec};
use crate::store::{Made, Store, told, why};

/// All that can be said about an image.
fn state(store: &Store, spec: &Spec) -> (Info, Vec<Snap>, BTreeMap<String, String>, String) {
    let driver = &store.driver;
    (
        driver.info(spec, None).expect("there is an image"),
        driver.snaps(spec).expect("snapshots"),
        driver.metadata(spec).expect("metadata"),
        driver.sha256(spec, None).expect("the content"),
    )
}

/// The restore must fail and say all of `words`.
fn refused(store: &Store, made: &Made, target: &ImageTarget, words: &[&str]) {
    let error = store.restore(made, target).expect_err("it should be refused");
    let text = told(&error);
    assert!(words.iter().all(|word| text.contains(word)), "{text:?} does not say {words:?}");
}

#[test]
fn an_image_that_exists_is_left_alone() {
    let cluster = cluster_or_skip!("an_image_that_exists_is_left_alone");
    let mut store = Store::new(&cluster);
    let (spec, made) = image_with_point(&mut store, "refused");
    let target = store.image("there", MIB, &Layout::new(16, FULL_FEATURES));
    store.driver.write(&target, 0, MIB, 9).expect("a write");
    store.driver.close(&target).expect("closed");
    let before = state(&store, &target);
    let name = format!("{POOL}/{}", target.image);
    refused(&store, &made, &store.target(&target), &[&name, "exists; --overwrite"]);
    let small = [&*name, "would have 1048576 bytes", "needs 2097152", "rbd resize"];
    refused(&store, &made, &store.overwriting(&target), &small);
    let mut wanted = store.overwriting(&target);
    wanted.overrides.size = Some(2 * MIB - 1);
    refused(&store, &made, &wanted, &["would have 2097151 bytes"]);
    let size = Some(2 * MIB);
    let layouts = [
        (Overrides { object_size: Some(MIB), ..Overrides::default() }, "objects of 65536, not 1048576"),
        (
            Overrides { stripe_unit: Some(4096), stripe_count: Some(2), ..Overrides::default() },
            "a stripe unit of 65536, not 4096",
        ),
        (Overrides { features: Some(Features(1)), ..Overrides::default() }, "deep-flatten, not layering"),
        (
            Overrides { data_pool: Some("fast".to_owned()), ..Overrides::default() },
            "its data in pool rbd, not fast",
        ),
    ];
    for (overrides, words) in layouts {
        wanted.overrides = Overrides { size, ..overrides };
        refused(&store, &made, &wanted, &[&name, "exists with", words, "does not change that"]);
    }
    // Held by somebody who may write at any moment.
    for features in [FULL_FEATURES, &["layering"]] {
        let used = store.image("used", 2 * MIB, &Layout::new(16, features));
        store.driver.write(&used, 0, MIB, 9).expect("a write");
        let in_use = [&*used.image, "in use by 127.0.0.1:", "stop the virtual machine"];
        refused(&store, &made, &store.overwriting(&used), &in_use);
        assert!(!store.driver.metadata(&used).expect("metadata").contains_key("rbd2qcow2-incomplete"));
        // It still can write.
        store.driver.write(&used, MIB, 1000, 10).expect("a write");
        store.driver.close(&used).expect("closed");
        store.restore_to(&made, &store.overwriting(&used));
        store.purge(&used);
    }
    assert_eq!(state(&store, &target), before);
    store.purge(&target);
    store.purge(&spec);
}

#[test]
fn a_place_that_is_not_there() {
    let cluster = cluster_or_skip!("a_place_that_is_not_there");
    let mut store = Store::new(&cluster);
    let (spec, made) = image_with_point(&mut store, "nowhere");
    let target = store.target(&elsewhere());
    let no_pool = ImageTarget { pool: unique("no-pool"), ..target.clone() };
    let shown = no_pool.to_string();
    refused(&store, &made, &no_pool, &[&format!("cannot restore to image {shown}"), "does not exist"]);
    let no_namespace = ImageTarget { namespace: unique("no-namespace"), ..target.clone() };
    refused(&store, &made, &no_namespace, &[&no_namespace.to_string(), "namespace", "does not exist"]);
    let mut no_data = target.clone();
    no_data.overrides.data_pool = Some("no-data-pool".to_owned());
    refused(&store, &made, &no_data, &[&target.image, "does not exist"]);
    let mut small = target.clone();
    small.overrides.size = Some(MIB);
    refused(&store, &made, &small, &["would have 1048576 bytes, and the point needs 2097152"]);
    let mut impossible = target.clone();
    // It needs the exclusive lock.
    impossible.overrides.features = Some(Features::named("object-map").expect("a feature"));
    refused(&store, &made, &impossible, &["create image", &target.image]);
    for target in [&target, &no_data, &small, &impossible] {
        assert!(is_absent(&store, &Spec::new(POOL, &target.image)), "{target:?}");
    }
    store.purge(&spec);
}

/// Whoever is killed while it creates an image leaves a name without one.
#[test]
fn an_image_that_is_half_made() {
    let cluster = cluster_or_skip!("an_image_that_is_half_made");
    let mut store = Store::new(&cluster);
    let (spec, made) = image_with_point(&mut store, "half");
    let target = store.image("made", MIB, &small_objects());
    let id = store.driver.info(&target, None).expect("there is an image").id;
    let run = |program: &str, arguments: &[&str]| {
        let conf = cluster.conf.to_str().expect("a path");
        let done = Command::new(program).args(["-c", conf, "-p", POOL]).args(arguments).output();
        let done = done.expect("it is installed");
        assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    };
    run("rados", &["rm", &format!("rbd_header.{id}")]);
    for target in [store.target(&target), store.overwriting(&target)] {
        refused(&store, &made, &target, &[&target.image, "is listed", "not made to the end", "rbd rm"]);
    }
    run("rbd", &["rm", "--no-progress", &target.image]);
    store.restore_to(&made, &store.target(&target));
    store.purge(&target);
    store.purge(&spec);
}

#[test]
fn a_client_that_may_only_read() {
    let cluster = cluster_or_skip!("a_client_that_may_only_read");
    let mut store = Store::new(&cluster);
    let (spec, made) = image_with_point(&mut store, "reader");
    let client = format!("client.{}", unique("reader"));
    let caps = ["mon", "profile rbd-read-only", "osd", "profile rbd-read-only"];
    let key = json!({"prefix": "auth get-or-create", "entity": client, "caps": caps});
    let key = store.driver.mon_command(&key).expect("a key");
    let directory = tempfile::tempdir().expect("a directory");
    let keyring: PathBuf = directory.path().join("keyring");
    let text = format!("[{client}]\n\tkey = {}\n", key[0]["key"].as_str().expect("a key"));
    std::fs::write(&keyring, text).expect("written");
    let as_reader = |mut target: ImageTarget| {
        target.cluster.name = Some(client.clone());
        target.cluster.keyring = Some(keyring.clone());
        target
    };
    let target = elsewhere();
    refused(&store, &made, &as_reader(store.target(&target)), &[&target.image, "permission denied"]);
    assert!(is_absent(&store, &target));
    let there = store.image("there", 2 * MIB, &small_objects());
    store.driver.write(&there, 0, MIB, 9).expect("a write");
    store.driver.close(&there).expect("closed");
    let before = state(&store, &there);
    refused(&store, &made, &as_reader(store.overwriting(&there)), &[&there.image, "permission denied"]);
    assert_eq!(state(&store, &there), before);
    store.driver.mon_command(&json!({"prefix": "auth del", "entity": client})).expect("removed");
    store.purge(&there);
    store.purge(&spec);
}

/// A restore that was cut short right after it had marked an image has changed nothing in it, and whoever
/// owns it may have gone on to use it.
#[test]
fn a_mark_on_an_image_that_was_there_is_no_leave_to_overwrite_it() {
    let cluster = cluster_or_skip!("a_mark_on_an_image_that_was_there_is_no_leave_to_overwrite_it");
    let mut store = Store::new(&cluster);
    let (spec, made) = image_with_point(&mut store, "marked");
    store.driver.write(&spec, 0, MIB, 7).expect("a write");
    let mark = json!({ "image": spec.image, "point": made.point, "created": false }).to_string();
    store.driver.metadata_set(&spec, "rbd2qcow2-incomplete", &mark).expect("metadata");
    store.driver.close(&spec).expect("closed");
    let before = state(&store, &spec);
    let of = format!("unfinished restore of {}@{}", spec.image, made.point);
    refused(&store, &made, &store.target(&spec), &[&of, "--overwrite"]);
    assert_eq!(state(&store, &spec), before);
    store.restore_to(&made, &store.overwriting(&spec));
    assert!(!store.driver.metadata(&spec).expect("metadata").contains_key("rbd2qcow2-incomplete"));
    store.purge(&spec);
}

/// Marks an image when its backup is about to take the snapshot, as a restore would.
struct Marking<'a>(&'a Store, &'a Spec);

impl Observer for Marking<'_> {
    fn stage(&self, _: &str, stage: Stage) {
        if stage == Stage::Snapshot {
            let Self(store, spec) = self;
            store.driver.metadata_set(spec, "rbd2qcow2-incomplete", "by hand").expect("metadata");
            store.driver.close(spec).expect("closed");
        }
    }
}

/// Its snapshot may hold the half of what the image is going to be.
#[test]
fn a_restore_that_begins_during_a_backup_is_noticed() {
    let cluster = cluster_or_skip!("a_restore_that_begins_during_a_backup_is_noticed");
    let mut store = Store::new(&cluster);
    let (spec, made) = image_with_point(&mut store, "overtaken");
    let snapshots = store.snapshot_names(&spec);
    let backup = store.pool_backup(std::slice::from_ref(&spec));
    let reports = backup.run(&Marking(&store, &spec), &Cancel::new()).expect("the pool is there");
    assert_eq!(reports[0].status, Status::Failed, "{:?}", reports[0]);
    assert!(why(&reports[0]).contains("unfinished restore of \"by hand\""), "{}", why(&reports[0]));
    assert_eq!(store.snapshot_names(&spec), snapshots);
    store.check_directory(&spec);
    store.driver.metadata_remove(&spec, "rbd2qcow2-incomplete").expect("metadata");
    store.back_up(&spec).assert_upon(&made);
    store.purge(&spec);
}

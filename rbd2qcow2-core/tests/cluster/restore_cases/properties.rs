//! A restored image is what the original was, apart from its content, too.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::process::Command;

use rbd2qcow2_core::chain::manifest::Manifest;
use rbd2qcow2_core::chain::{ImageName, PointName};
use rbd2qcow2_core::rbd::Features;
use rbd2qcow2_core::restore::image::Overrides;

use super::{MIB, elsewhere, image_with_point, small_objects};
use crate::backup_cases::bases::python_chain;
use crate::cluster::{POOL, TestCluster, unique, unique_image};
use crate::cluster_or_skip;
use crate::driver::{FULL_FEATURES, Info, Layout, NO_OBJECT_MAP, Spec};
use crate::store::Store;

/// Like [`FULL_FEATURES`], with a journal of all writes.
const JOURNALING: &[&str] = &["layering", "exclusive-lock", "object-map", "fast-diff", "journaling"];

/// What a restored image shares with the original, but for its size: object size, striping, features.
fn layout(info: &Info) -> (u64, u64, u64, Vec<String>) {
    (info.object_size, info.stripe_unit, info.stripe_count, info.features.clone())
}

fn info(store: &Store, spec: &Spec) -> Info {
    store.driver.info(spec, None).expect("there is an image")
}

/// Runs `rbd image-meta` with raw bytes, which python3-rbd does not take, and gives what it prints.
fn image_meta(cluster: &TestCluster, arguments: &[&[u8]]) -> Vec<u8> {
    let done = Command::new("rbd")
        .arg("-c")
        .arg(&cluster.conf)
        .arg("image-meta")
        .args(arguments.iter().map(|argument| OsStr::from_bytes(argument)))
        .output()
        .expect("rbd runs");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    done.stdout
}

#[test]
fn an_image_of_each_kind_comes_back_as_it_was() {
    let cluster = cluster_or_skip!("an_image_of_each_kind_comes_back_as_it_was");
    let mut store = Store::new(&cluster);
    let namespace = unique("restored");
    store.driver.namespace_create(POOL, &namespace).expect("a namespace");
    let layouts = [
        Layout::default(),
        small_objects(),
        Layout::new(12, FULL_FEATURES),
        Layout::new(16, FULL_FEATURES).striped(4096, 5),
        Layout::new(22, NO_OBJECT_MAP).striped(65_536, 3),
        Layout::new(25, &["layering"]),
        Layout::new(20, &[]),
        Layout::new(20, JOURNALING),
    ];
    for (number, layout_of) in (0..).zip(&layouts) {
        // No multiple of anything.
        let spec = store.image("kind", 2 * MIB + 1000 * number + 1, layout_of);
        store.driver.write(&spec, 300_001 * number % MIB, 500_000, number).expect("a write");
        store.driver.metadata_set(&spec, "owner", "Zoë\n& co").expect("metadata");
        store.driver.metadata_set(&spec, "conf_rbd_cache", "false").expect("metadata");
        let made = store.back_up(&spec);
        for target in [elsewhere(), Spec::in_namespace(POOL, &namespace, &spec.image)] {
            store.restore_to(&made, &store.target(&target));
            let (was, is) = (info(&store, &spec), info(&store, &target));
            assert_eq!((layout(&is), is.size, is.parent), (layout(&was), was.size, None), "{layout_of:?}");
            assert!(!is.object_map_invalid && !is.fast_diff_invalid, "{layout_of:?}");
            assert_eq!(store.driver.metadata(&target).unwrap(), store.driver.metadata(&spec).unwrap());
            store.purge(&target);
        }
        store.purge(&spec);
    }
    store.driver.namespace_remove(POOL, &namespace).expect("it is empty");
}

#[test]
fn metadata_that_is_no_text_comes_back() {
    let cluster = cluster_or_skip!("metadata_that_is_no_text_comes_back");
    let mut store = Store::new(&cluster);
    let spec = store.image("meta", MIB, &small_objects());
    let image = spec.image.clone();
    let pairs: [(&[u8], &[u8]); 3] =
        [(b"binary", b"\x01\xff\xfe\x80"), (b"\xf0\xffkey", b"value"), (b"hex:00", b"hex:ff")];
    for (key, value) in pairs {
        image_meta(&cluster, &[b"set", image.as_bytes(), key, value]);
    }
    // `rbd` does not take it, and python3-rbd does not list it.
    store.driver.metadata_set(&spec, "empty", "").expect("metadata");
    // Many, and long: more than fit into the first answer.
    for number in 0..70 {
        store.driver.metadata_set(&spec, &format!("key {number}"), &"v".repeat(2000)).expect("metadata");
    }
    let made = store.back_up(&spec);
    let target = elsewhere();
    let mut wanted = store.target(&target);
    wanted.overrides.metadata = [(b"key 7".to_vec(), b"\xff7".to_vec()), (b"new".to_vec(), vec![])].into();
    store.restore_to(&made, &wanted);
    let get = |key: &[u8]| image_meta(&cluster, &[b"get", target.image.as_bytes(), key]);
    for (key, value) in pairs {
        assert_eq!(get(key).strip_suffix(b"\n"), Some(value));
    }
    assert_eq!(get(b"empty"), b"\n");
    assert_eq!(get(b"key 69"), [&[b'v'; 2000][..], b"\n"].concat());
    assert_eq!((get(b"key 7"), get(b"new")), (b"\xff7\n".to_vec(), b"\n".to_vec()));
    store.purge(&target);

    wanted.overrides.no_metadata = true;
    wanted.overrides.metadata.remove(&b"key 7"[..]);
    store.restore_to(&made, &wanted);
    let listed = image_meta(&cluster, &[b"list", b"--format", b"json", target.image.as_bytes()]);
    assert_eq!(String::from_utf8_lossy(&listed), "{\"new\":\"\"}\n");
    store.purge(&target);
    store.purge(&spec);
}

#[test]
fn a_clone_comes_back_as_an_image_that_stands_alone() {
    let cluster = cluster_or_skip!("a_clone_comes_back_as_an_image_that_stands_alone");
    let mut store = Store::new(&cluster);
    let parent = store.image("parent", 2 * MIB, &small_objects());
    store.driver.write(&parent, 0, 2 * MIB, 1).expect("a write");
    store.driver.snap_create(&parent, "base").expect("a snapshot");
    let clone = unique_image("clone");
    store.driver.clone(&parent, "base", &clone, &small_objects()).expect("a clone");
    store.driver.write(&clone, 70_000, 200_000, 2).expect("a write");
    store.driver.discard(&clone, MIB, 3 * super::OBJECT).expect("a discard");
    let made = store.back_up(&clone);
    assert!(!made.manifest["clone_parent"].is_null());
    let target = elsewhere();
    store.restore_to(&made, &store.target(&target));
    assert_eq!(info(&store, &target).parent, None);
    // Which tells that it has a parent of a certain kind.
    let mut was = layout(&info(&store, &clone));
    was.3.retain(|feature| feature != "operations");
    assert_eq!(layout(&info(&store, &target)), was);
    for spec in [&target, &clone, &parent] {
        store.purge(spec);
    }
}

#[test]
fn an_image_is_made_as_it_was_told() {
    let cluster = cluster_or_skip!("an_image_is_made_as_it_was_told");
    let mut store = Store::new(&cluster);
    let (spec, made) = image_with_point(&mut store, "told");
    let data = unique("data");
    store.driver.pool_create(&data).expect("a pool");
    let was = layout(&info(&store, &spec));
    let full = was.3.clone();
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let features = |names: &[&str]| {
        let one = |name: &&str| Features::named(name).expect("a feature");
        Some(names.iter().map(one).fold(Features::default(), Features::with))
    };
    let plain = Overrides::default;
    let cases = [
        (Overrides { size: Some(3 * MIB + 7), ..plain() }, was.clone()),
        (Overrides { object_size: Some(MIB), ..plain() }, (MIB, MIB, 1, full.clone())),
        (
            Overrides { stripe_unit: Some(8192), stripe_count: Some(4), ..plain() },
            (was.0, 8192, 4, [&full[..1], &names(&["striping"]), &full[1..]].concat()),
        ),
        (
            Overrides { features: features(&["layering", "exclusive-lock"]), ..plain() },
            (was.0, was.1, was.2, names(&["layering", "exclusive-lock"])),
        ),
        (
            Overrides { data_pool: Some(data.clone()), ..plain() },
            (was.0, was.1, was.2, [full.clone(), names(&["data-pool"])].concat()),
        ),
    ];
    for (overrides, expected) in cases {
        let target = elsewhere();
        let mut wanted = store.target(&target);
        wanted.overrides = overrides.clone();
        store.restore_to(&made, &wanted);
        let is = info(&store, &target);
        assert_eq!(layout(&is), expected, "{overrides:?}");
        assert_eq!(is.size, overrides.size.unwrap_or(2 * MIB));
        if overrides.data_pool.is_none() {
            store.purge(&target);
            continue;
        }
        // A backup does not tell the pool of the data: without the option they go to the image's own.
        let made = store.back_up(&target);
        let second = elsewhere();
        store.restore_to(&made, &store.target(&second));
        assert_eq!(layout(&info(&store, &second)), was);
        store.purge(&second);
        store.purge(&target);
    }
    store.driver.pool_remove(&data).expect("removed");
    store.purge(&spec);
}

/// A backup that a later Ceph made may have features that nobody knows here.
#[test]
fn features_that_nobody_knows_are_left_out() {
    let cluster = cluster_or_skip!("features_that_nobody_knows_are_left_out");
    let mut store = Store::new(&cluster);
    let (spec, made) = image_with_point(&mut store, "later");
    let path = made.file.with_extension("json");
    let name = ImageName::new(&*spec.image).expect("a name");
    let point = PointName::parse(&made.point).expect("a point");
    let mut manifest = Manifest::read(&path, &name, point).expect("a manifest");
    // A state (operations), one that may come, and one that is far away.
    manifest.record.features.bits |= 1 << 8 | 1 << 12 | 1 << 60;
    std::fs::remove_file(&path).expect("removed");
    std::fs::write(&path, manifest.to_bytes().expect("a manifest")).expect("written");
    let target = elsewhere();
    store.restore_to(&made, &store.target(&target));
    assert_eq!(layout(&info(&store, &target)), layout(&info(&store, &spec)));
    store.purge(&target);
    store.purge(&spec);
}

/// Without a manifest nobody knows more than the size, rounded up.
#[test]
fn a_point_of_the_python_tool_gets_what_ceph_gives() {
    let cluster = cluster_or_skip!("a_point_of_the_python_tool_gets_what_ceph_gives");
    let mut store = Store::new(&cluster);
    let spec = python_chain(&mut store, "python-restored", ["1700000000", "1700086400"]);
    let usual = store.image("usual", MIB, &Layout::default());
    let target = elsewhere();
    for made in store.points() {
        store.restore_to(made, &store.target(&target));
        let (is, expected) = (info(&store, &target), info(&store, &usual));
        assert_eq!(layout(&is), layout(&expected));
        assert_eq!(is.size, made.size().next_multiple_of(512));
        assert!(store.driver.metadata(&target).expect("metadata").is_empty());
        store.purge(&target);
    }
    store.purge(&usual);
    store.purge(&spec);
}

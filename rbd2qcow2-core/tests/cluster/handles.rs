//! The handles over librbd: what they tell, how they fail, and that nobody waits for ever.

use std::thread;
use std::time::{Duration, Instant};

use rbd2qcow2_core::buffer::BufferPool;
use rbd2qcow2_core::cancel::Cancel;
use rbd2qcow2_core::rbd::{Cluster, ClusterOptions, Granularity, Image, Patience, Pool, RbdError};

use crate::cluster::{OwnCluster, POOL, TestCluster, unique, unique_image};
use crate::cluster_or_skip;
use crate::driver::{Driver, FULL_FEATURES, Layout, NO_OBJECT_MAP, Spec};

const MIB: u64 = 1 << 20;

/// More than any call takes on a cluster that answers, however busy the machine.
const LIMIT: Duration = Duration::from_secs(60);

fn layout() -> Layout {
    Layout::new(16, FULL_FEATURES)
}

fn open_pool(cluster: &TestCluster) -> Pool {
    cluster.connect(LIMIT).pool(POOL, "").unwrap()
}

fn read(image: &Image, offset: u64, length: usize) -> Result<Vec<u8>, RbdError> {
    let mut buffer = BufferPool::new(length.next_power_of_two()).get(length, &Cancel::new()).unwrap();
    image.read(offset, &mut buffer).map(|()| buffer.to_vec())
}

// --- What they tell

#[test]
fn images_are_told_as_another_client_tells_them() {
    let cluster = cluster_or_skip!("images_are_told_as_another_client_tells_them");
    let (driver, pool) = (cluster.driver(), open_pool(&cluster));
    let (parent, clone) = (unique_image("pa rent%:"), unique_image("clöne"));
    driver.create(&parent, 2 * MIB + 1, &layout()).unwrap();
    driver.write(&parent, 0, MIB, 1).unwrap();
    driver.snap_create(&parent, "ba se").unwrap();
    driver.clone(&parent, "ba se", &clone, &Layout::new(15, NO_OBJECT_MAP).striped(4096, 3)).unwrap();
    driver.snap_create(&clone, "one").unwrap();
    driver.resize(&clone, MIB).unwrap();
    driver.metadata_set(&clone, "clé", "naïve\nvalue").unwrap();

    for (spec, snapshot) in [(&parent, None), (&parent, Some("ba se")), (&clone, Some("one")), (&clone, None)]
    {
        let image = pool.open(&spec.image, snapshot).unwrap();
        let (info, told) = (image.info().unwrap(), driver.info(spec, snapshot).unwrap());
        assert_eq!(
            (&info.id, info.size, info.object_size, info.stripe_unit, info.stripe_count, info.overlap),
            (&told.id, told.size, told.object_size, told.stripe_unit, told.stripe_count, told.overlap)
        );
        assert_eq!(info.features.names().join(" "), told.features.join(" "));
        assert_eq!(info.object_map_valid, spec == &parent);
        let parent = image.parent().unwrap().map(|parent| [parent.pool, parent.image, parent.snapshot]);
        assert_eq!(parent, told.parent);
    }
    let image = pool.open(&clone.image, None).unwrap();
    let metadata = image.metadata().unwrap();
    assert_eq!(metadata["clé".as_bytes()], "naïve\nvalue".as_bytes());
    assert_eq!(metadata.len(), 1);
    assert_eq!(pool.open(&parent.image, None).unwrap().metadata().unwrap().len(), 0);
    assert_eq!(pool.cluster().fsid().unwrap(), driver.fsid().unwrap());
    let images = pool.images().unwrap();
    assert!(images.contains(&clone.image) && images.contains(&parent.image), "{images:?}");
    assert!(!images.contains(&String::new()), "{images:?}");
    driver.purge(&clone).unwrap();
    driver.purge(&parent).unwrap();
}

/// librbd fills lists into buffers that may be too small at first.
#[test]
fn long_lists_are_told_whole() {
    let cluster = cluster_or_skip!("long_lists_are_told_whole");
    let driver = cluster.driver();
    let namespace = unique("long");
    driver.namespace_create(POOL, &namespace).unwrap();
    let pool = cluster.connect(LIMIT).pool(POOL, &namespace).unwrap();
    assert!(pool.images().unwrap().is_empty());
    let mut names: Vec<_> = (0..50).map(|number| format!("{number:0>90}")).collect();
    for name in &names {
        driver.create(&Spec::in_namespace(POOL, &namespace, name), 0, &Layout::default()).unwrap();
    }
    names.sort();
    assert_eq!(pool.images().unwrap(), names);

    let spec = Spec::in_namespace(POOL, &namespace, &names[0]);
    for number in 0..70 {
        driver.snap_create(&spec, &format!("snapshot {number}")).unwrap();
        driver.metadata_set(&spec, &format!("key {number}"), &"v".repeat(2000)).unwrap();
    }
    let image = pool.open(&spec.image, None).unwrap();
    let told: Vec<_> =
        driver.snaps(&spec).unwrap().into_iter().map(|snap| (snap.id, snap.size, snap.name)).collect();
    let snapshots = image.snapshots().unwrap();
    assert_eq!(snapshots.len(), 70);
    assert!(snapshots.into_iter().map(|snap| (snap.id, snap.size, snap.name)).eq(told));
    let metadata = image.metadata().unwrap();
    assert_eq!(metadata.len(), 70);
    assert!(metadata.values().all(|value| *value == "v".repeat(2000).into_bytes()));
}

#[test]
fn snapshots_are_made_and_removed_while_another_client_holds_the_lock() {
    let cluster = cluster_or_skip!("snapshots_are_made_and_removed_while_another_client_holds_the_lock");
    let (driver, pool) = (cluster.driver(), open_pool(&cluster));
    let spec = unique_image("locked");
    driver.create(&spec, MIB, &layout()).unwrap();
    driver.write(&spec, 0, 100, 1).unwrap();
    pool.create_snapshot(&spec.image, "one").unwrap();
    driver.write(&spec, 0, 100, 2).unwrap();
    pool.create_snapshot(&spec.image, "a: ü%@,/").unwrap();
    let names: Vec<_> = driver.snaps(&spec).unwrap().into_iter().map(|snap| snap.name).collect();
    assert_eq!(names, ["one", "a: ü%@,/"]);
    assert!(driver.read(&spec, Some("one")).unwrap() != driver.read(&spec, None).unwrap());
    assert!(driver.read(&spec, Some("a: ü%@,/")).unwrap() == driver.read(&spec, None).unwrap());

    let error = pool.create_snapshot(&spec.image, "one").unwrap_err();
    assert!(error.to_string().contains("exists already"), "{error}");
    driver.snap_protect(&spec, "one").unwrap();
    let error = pool.remove_snapshot(&spec.image, "one").unwrap_err();
    assert!(error.to_string().contains("busy"), "{error}");
    driver.snap_unprotect(&spec, "one").unwrap();
    pool.remove_snapshot(&spec.image, "one").unwrap();
    pool.remove_snapshot(&spec.image, "one").unwrap();
    pool.remove_snapshot(&spec.image, "a: ü%@,/").unwrap();
    assert_eq!(driver.snaps(&spec).unwrap(), []);
    // The second client can still write: its lock was not taken for good.
    driver.write(&spec, 0, 100, 3).unwrap();
    driver.purge(&spec).unwrap();
}

#[test]
fn reads_are_whole_or_an_error() {
    let cluster = cluster_or_skip!("reads_are_whole_or_an_error");
    let (driver, pool) = (cluster.driver(), open_pool(&cluster));
    let spec = unique_image("read");
    driver.create(&spec, MIB + 100, &layout()).unwrap();
    driver.write(&spec, MIB - 1000, 1100, 1).unwrap();
    driver.snap_create(&spec, "one").unwrap();
    let content = driver.read(&spec, Some("one")).unwrap();
    driver.write(&spec, 0, MIB, 2).unwrap();
    let image = pool.open(&spec.image, Some("one")).unwrap();
    assert!(read(&image, 0, content.len()).unwrap() == content);
    assert!(read(&image, MIB - 5, 105).unwrap() == content[MIB as usize - 5..]);
    match read(&image, MIB, 101).unwrap_err() {
        RbdError::ShortRead { got: 100, what } => assert!(what.contains(&spec.image), "{what}"),
        RbdError::Failed { .. } => {}
        error => panic!("{error}"),
    }
    assert!(read(&image, MIB + 101, 1).is_err());
    // Many at once, on one handle.
    thread::scope(|scope| {
        for start in 0..16_usize {
            let (image, content) = (&image, &content);
            scope.spawn(move || {
                assert!(
                    read(image, start as u64 * 65_536 + 7, 60_000).unwrap()
                        == content[start * 65_536 + 7..][..60_000]
                );
            });
        }
    });
    driver.purge(&spec).unwrap();
}

// --- How they fail

/// The error, which must come soon and say all of `words`.
fn soon<T>(words: &[&str], call: impl FnOnce() -> Result<T, RbdError>) -> RbdError {
    let start = Instant::now();
    let Err(error) = call() else { panic!("there was no error, where {words:?} was to be expected") };
    let text = error.to_string();
    assert!(words.iter().all(|word| text.contains(word)), "{text:?} does not say {words:?}");
    assert!(start.elapsed() < Duration::from_secs(35), "{text:?} came after {:?}", start.elapsed());
    error
}

#[test]
fn what_is_not_there_is_told_by_name() {
    let cluster = cluster_or_skip!("what_is_not_there_is_told_by_name");
    let driver = cluster.driver();
    let spec = unique_image("there");
    driver.create(&spec, MIB, &layout()).unwrap();
    driver.snap_create(&spec, "one").unwrap();
    let (client, pool) = (cluster.connect(LIMIT), open_pool(&cluster));
    let errors = [
        soon(&["no pool", "does not exist"], || client.pool("no pool", "")),
        soon(&["no namespace", POOL, "does not exist"], || client.pool(POOL, "no namespace")),
        soon(&["no image", "does not exist"], || pool.open("no image", None)),
        soon(&["no image", "does not exist"], || pool.create_snapshot("no image", "one")),
        soon(&[&spec.image, "no snapshot", "does not exist"], || pool.open(&spec.image, Some("no snapshot"))),
        soon(&["no base", &spec.image, "does not exist"], || {
            let image = pool.open(&spec.image, Some("one"))?;
            image.diff(Some("no base"), 0..MIB, Granularity::Bytes, false, (), |(), _| {})
        }),
    ];
    for error in errors {
        assert!(error.is_not_found(), "{error:?}");
    }
    soon(&["NUL"], || pool.open("a\0b", None));
    driver.purge(&spec).unwrap();
}

#[test]
fn a_cluster_that_cannot_be_reached_is_an_error_and_no_hang() {
    let cluster = cluster_or_skip!("a_cluster_that_cannot_be_reached_is_an_error_and_no_hang");
    let dir = tempfile::tempdir().unwrap();
    let good = || ClusterOptions { conf: Some(cluster.conf.clone()), ..ClusterOptions::default() };
    let connect = |options: ClusterOptions| {
        let patience = Patience { limit: Duration::from_secs(3), cancel: Cancel::new() };
        Cluster::connect(&options, patience)
    };
    connect(good()).unwrap();

    let absent = dir.path().join("absent");
    let shown = absent.display().to_string();
    soon(&["configuration file", &shown], || {
        connect(ClusterOptions { conf: Some(absent.clone()), ..good() })
    });
    let broken = dir.path().join("broken.conf");
    std::fs::write(&broken, "[global\nthis is no configuration").unwrap();
    soon(&["broken.conf"], || connect(ClusterOptions { conf: Some(broken.clone()), ..good() }));

    soon(&["connect"], || connect(ClusterOptions { keyring: Some(absent.clone()), ..good() }));
    let wrong = dir.path().join("wrong.keyring");
    std::fs::write(&wrong, "[client.admin]\n\tkey = AQAAAAAAAAAAEAAAAAAAAAAAAAAAAAAAAAAAAA==\n").unwrap();
    soon(&["connect", "permission"], || connect(ClusterOptions { keyring: Some(wrong.clone()), ..good() }));
    let nobody = "client.nobody".to_owned();
    soon(&["connect"], || connect(ClusterOptions { name: Some(nobody.clone()), ..good() }));

    // Nobody listens, and nobody answers (an address for documentation, RFC 5737).
    for hosts in ["127.0.0.1:1", "192.0.2.1"] {
        let options = ClusterOptions { mon_host: Some(hosts.to_owned()), ..good() };
        let start = Instant::now();
        soon(&["connect", hosts], || connect(options));
        assert!(start.elapsed() < Duration::from_secs(10), "{hosts}: {:?}", start.elapsed());
    }
}

#[test]
fn connecting_can_be_cancelled() {
    let cluster = cluster_or_skip!("connecting_can_be_cancelled");
    let cancel = Cancel::new();
    let patience = Patience { limit: LIMIT, cancel: cancel.clone() };
    let options = ClusterOptions {
        conf: Some(cluster.conf.clone()),
        mon_host: Some("127.0.0.1:1".to_owned()),
        ..ClusterOptions::default()
    };
    let error = cancelled_after("connecting", &cancel, || Cluster::connect(&options, patience));
    assert!(matches!(error, RbdError::Cancelled), "{error}");
}

/// Sets the flag while `call` is under way; its error, which must come within a second.
fn cancelled_after<T>(what: &str, cancel: &Cancel, call: impl FnOnce() -> Result<T, RbdError>) -> RbdError {
    thread::scope(|scope| {
        let set = scope.spawn(|| {
            thread::sleep(Duration::from_millis(500));
            cancel.set();
            Instant::now()
        });
        let Err(error) = call() else { panic!("{what} ended, though nobody could answer") };
        let end = Instant::now();
        let waited = end.saturating_duration_since(set.join().unwrap());
        assert!(waited < Duration::from_secs(1), "{what} took {waited:?} to stop");
        error
    })
}

// --- Nobody waits for ever

/// One test, because each cluster takes seconds to start.
#[test]
fn a_cluster_that_freezes() {
    let _ = cluster_or_skip!("a_cluster_that_freezes");
    let own = OwnCluster::start();
    let driver = own.cluster.driver();
    let spec = unique_image("frozen");
    driver.create(&spec, 4 * MIB, &layout()).unwrap();
    driver.write(&spec, 0, 4 * MIB, 1).unwrap();
    driver.snap_create(&spec, "one").unwrap();
    let content = driver.read(&spec, Some("one")).unwrap();

    a_read_goes_on_when_its_osd_does(&own, &spec, &content);
    a_hung_call_can_be_cancelled(&own, &spec);
    patience_ends(&own, &spec, &driver);
    monitors_that_are_frozen(&own);
}

fn a_read_goes_on_when_its_osd_does(own: &OwnCluster, spec: &Spec, content: &[u8]) {
    let image = open_pool(&own.cluster).open(&spec.image, Some("one")).unwrap();
    own.pause_osd();
    thread::scope(|scope| {
        let reader = scope.spawn(|| read(&image, 0, content.len()));
        thread::sleep(Duration::from_secs(2));
        assert!(!reader.is_finished(), "a frozen OSD answered");
        own.resume_osd();
        assert!(reader.join().unwrap().unwrap() == content);
    });
}

fn a_hung_call_can_be_cancelled(own: &OwnCluster, spec: &Spec) {
    type Call = fn(&Image) -> Result<(), RbdError>;
    let calls: [(&str, Call); 2] = [
        ("a read", |image| read(image, 0, 4096).map(drop)),
        ("a diff", |image| image.diff(None, 0..4 * MIB, Granularity::Bytes, false, (), |(), _| {})),
    ];
    for (what, call) in calls {
        let cancel = Cancel::new();
        let pool = open_pool(&own.cluster).with_patience(Patience { limit: LIMIT, cancel: cancel.clone() });
        let image = pool.open(&spec.image, Some("one")).unwrap();
        own.pause_osd();
        let error = cancelled_after(what, &cancel, || call(&image));
        assert!(matches!(error, RbdError::Cancelled), "{error}");
        let start = Instant::now();
        drop((image, pool));
        // Closing waits for requests under way; whoever cancelled must not.
        assert!(start.elapsed() < Duration::from_secs(6), "it took {:?} to let go", start.elapsed());
        own.resume_osd();
    }
}

fn patience_ends(own: &OwnCluster, spec: &Spec, driver: &Driver) {
    let limit = Duration::from_secs(2);
    let pool = open_pool(&own.cluster).with_patience(Patience { limit, cancel: Cancel::new() });
    let image = pool.open(&spec.image, Some("one")).unwrap();
    own.pause_osd();
    let within = |what: &str, call: &dyn Fn() -> Result<(), RbdError>| {
        let start = Instant::now();
        match call() {
            Err(RbdError::NoAnswer { waited, .. }) => assert_eq!(waited, limit),
            other => panic!("{what}: {other:?}"),
        }
        assert!(start.elapsed() < limit * 2, "{what} took {:?}", start.elapsed());
    };
    within("a read", &|| read(&image, 0, 4096).map(drop));
    within("a diff", &|| image.diff(None, 0..MIB, Granularity::Bytes, false, (), |(), _| {}));
    within("opening", &|| pool.open(&spec.image, None).map(drop));
    own.resume_osd();
    // Other handles are as good as ever.
    let other = open_pool(&own.cluster).open(&spec.image, Some("one")).unwrap();
    assert_eq!(read(&other, 5, 100).unwrap(), driver.read(spec, Some("one")).unwrap()[5..105]);
}

fn monitors_that_are_frozen(own: &OwnCluster) {
    own.pause_mon();
    let patience = Patience { limit: Duration::from_secs(3), cancel: Cancel::new() };
    let options = ClusterOptions { conf: Some(own.cluster.conf.clone()), ..ClusterOptions::default() };
    let start = Instant::now();
    let error = Cluster::connect(&options, patience).unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(12), "{error} came after {:?}", start.elapsed());
    own.resume_mon();
    open_pool(&own.cluster).images().unwrap();
}

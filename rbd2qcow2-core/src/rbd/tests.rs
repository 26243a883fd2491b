//! What holds without a cluster. Everything else is tested on a real one, in `tests/`.

use super::*;

#[test]
fn handles_cross_threads() {
    fn pinned<T: Send + Sync>() {}
    pinned::<Cluster>();
    pinned::<Pool>();
    pinned::<Image>();
}

#[test]
fn an_abandoned_call_is_reported_in_time() {
    let patience =
        Patience { limit: std::time::Duration::from_millis(1), cancel: crate::cancel::Cancel::new() };
    let (hold, held) = crossbeam::channel::bounded::<()>(0);
    let error = patience.call(|| "wait".to_owned(), move || held.recv()).unwrap_err();
    assert!(matches!(error, RbdError::NoAnswer { .. }), "{error}");
    patience.cancel.set();
    drop(hold);
}

#[test]
fn requests_under_way_are_waited_for() {
    use std::time::Duration;

    let requests = std::sync::Arc::new(super::image::Requests::default());
    assert!(requests.settle(Duration::ZERO));
    requests.begin();
    requests.begin();
    assert!(!requests.settle(Duration::from_millis(1)));
    let answers = requests.clone();
    let answering = std::thread::spawn(move || [answers.end(), answers.end()]);
    assert!(requests.settle(Duration::from_secs(60)));
    answering.join().expect("no panic");
}

#[test]
fn the_client_is_found_in_ceph_args() {
    let client = |arguments| super::cluster::client_in(arguments);
    assert_eq!(client(""), None);
    assert_eq!(client("--keyring /k -m 1.2.3.4"), None);
    assert_eq!(client("-m host --id backup").as_deref(), Some("client.backup"));
    assert_eq!(client("--id=backup --debug-ms=1").as_deref(), Some("client.backup"));
    assert_eq!(client("-n client.vm").as_deref(), Some("client.vm"));
    assert_eq!(client("--name"), None);
}

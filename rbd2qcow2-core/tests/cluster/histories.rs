//! Random histories, in which more than the image changes: its ancestors, its object maps, its features, its
//! place, and the snapshots of backups, between the backups and during them; and in which a writer has not
//! heard of the newest snapshot. No point may be wrong without the run having failed.
//!
//! A seed makes the same history again:
//! `RBD2QCOW2_SEED=1234 cargo test -p rbd2qcow2-core --test cluster no_point_is_wrong`.
//!
//! Each history is played in a process of its own: librbd takes its process down now and then, with some of
//! these steps more often.

use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::cluster::{TestCluster, say};
use crate::cluster_or_skip;

mod play;
mod steps;
mod tally;
mod world;

use tally::Tally;

/// The variable that tells a child which history it plays.
const CHILD: &str = "RBD2QCOW2_TEST_HISTORY";

/// No history begins after this in CI.
const LIMIT: Duration = Duration::from_secs(180);

/// Points of the long suite.
const LONG_POINTS: u64 = 10_000;

/// The longest that a history takes. One that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(240);

/// Histories that are played at once.
const AT_ONCE: usize = 2;

fn number(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{variable} is {value:?}, not a number")))
}

/// How a history ended.
enum Ended {
    Well(Tally, String),
    /// Somebody else's code broke; nothing can be said.
    Broke(String),
    /// A point was wrong, or a run failed without need. What was told.
    Badly(String),
}

/// Plays a history in a child.
fn play_apart(seed: u64) -> Ended {
    let output = tempfile::NamedTempFile::new().expect("a temporary file");
    let file = || output.reopen().expect("the temporary file");
    let append = || std::fs::File::options().append(true).open(output.path()).expect("the temporary file");
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args(["histories::one_history", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .env(CHILD, seed.to_string())
        .stdin(Stdio::null())
        .stdout(append())
        .stderr(append())
        .spawn()
        .expect("a child");
    let start = Instant::now();
    let status = loop {
        match child.try_wait().expect("a child") {
            Some(status) => break Some(status),
            None if start.elapsed() > PATIENCE => {
                let _ = child.kill();
                let _ = child.wait();
                break None;
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let text = std::io::read_to_string(file()).unwrap_or_default();
    match (status, Tally::from_output(&text)) {
        (Some(status), Some(tally)) if status.success() => Ended::Well(tally, text),
        (Some(status), _) if status.code() == Some(101) => Ended::Badly(text),
        (status, _) => Ended::Broke(format!("{status:?} after {:?}: {}", start.elapsed(), tail(&text))),
    }
}

fn tail(text: &str) -> &str {
    let start = text.len().saturating_sub(1500);
    let start = (start..text.len()).find(|index| text.is_char_boundary(*index)).unwrap_or(start);
    &text[start..]
}

/// What a child runs.
#[test]
#[ignore = "plays one history, for no_point_is_wrong"]
fn one_history() {
    let Some(seed) = number(CHILD) else { return };
    let cluster = TestCluster::find("one_history").expect("a cluster");
    let mut tally = match play::play(&cluster, seed) {
        Ok(tally) => tally,
        Err(error) => {
            let mut tally = Tally::default();
            println!("broke: {error}");
            tally.count(if error.is_breakdown() { "broke" } else { "ended early" });
            tally
        }
    };
    tally.count("histories");
    println!("\n{}", tally.to_line());
}

/// Where CI begins, and how many it plays however long that takes: as many as it takes for each kind of step.
const FIRST: u64 = 20_000;
const LEAST: u64 = 50;

#[test]
fn no_point_is_wrong() {
    let _cluster = cluster_or_skip!("no_point_is_wrong");
    let long = number("RBD2QCOW2_LONG") == Some(1);
    let given = number("RBD2QCOW2_SEED");
    let rounds = number("RBD2QCOW2_HISTORIES");
    // CI plays the same ones every time, so that a change is told by what it changed; the long suite draws.
    let first = given.unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
        if long { u64::from(now.subsec_nanos()) } else { FIRST }
    });
    // A seed alone is one history; with a number of histories, the first of them.
    let count = rounds.or(given.filter(|_| !long).map(|_| 1));
    say(&format!("no_point_is_wrong: from RBD2QCOW2_SEED={first}"));
    let (start, next, stop) = (Instant::now(), AtomicU64::new(0), AtomicBool::new(false));
    let total = Mutex::new(Tally::default());
    let bad = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let points = total.lock().expect("no panic").get("points");
                    let is_enough = match count {
                        Some(count) => index >= count,
                        None if long => points >= LONG_POINTS,
                        None => index >= LEAST && start.elapsed() > LIMIT,
                    };
                    if is_enough {
                        return;
                    }
                    let seed = first.wrapping_add(index);
                    match play_apart(seed) {
                        Ended::Well(tally, text) => {
                            if count == Some(1) {
                                say(&text);
                            }
                            total.lock().expect("no panic").add(&tally);
                        }
                        Ended::Broke(why) => {
                            say(&format!("RBD2QCOW2_SEED={seed} broke: {why}"));
                            total.lock().expect("no panic").count("broke");
                        }
                        Ended::Badly(text) => {
                            say(&format!("RBD2QCOW2_SEED={seed} ended badly\n{text}"));
                            bad.lock().expect("no panic").push(seed);
                            // All of them are of interest where they are counted.
                            stop.fetch_or(count.is_none(), Ordering::Relaxed);
                        }
                    }
                }
            });
        }
    });
    let (total, bad) = (total.into_inner().expect("no panic"), bad.into_inner().expect("no panic"));
    say(&format!("no_point_is_wrong: {:?}\n{total}", start.elapsed()));
    assert!(bad.is_empty(), "these seeds ended badly: {bad:?}");
    if count.is_none() {
        check_share(&total);
    }
}

/// A test that plays nothing proves nothing.
fn check_share(total: &Tally) {
    let (points, failed, broke) = (total.get("points"), total.sum("failed/"), total.get("broke"));
    assert!(points > 3 * failed, "{points} points, {failed} runs failed");
    assert!(20 * broke <= total.get("histories") + 40, "{broke} histories broke");
    for step in steps::all() {
        assert!(total.sum(&format!("steps/{step:?}/")) > 0, "{step:?} was never played");
    }
    for stage in ["between", "Prepare", "Snapshot", "Queue", "Copy", "Copying", "Commit", "CleanUp"] {
        assert!(total.sum_ending(&format!("/{stage}")) > 0, "nothing was played at {stage}");
    }
}

//! Runs that are held at each of their stages while something else happens to the image.

use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rbd2qcow2_core::cancel::Cancel;
use rbd2qcow2_core::progress::{ImageReport, Observer, Progress, Stage, Status};

use crate::driver::Spec;
use crate::store::{Store, read_json, why};

/// The longest wait for the first bytes of a copy.
const FIRST_BYTES: Duration = Duration::from_millis(300);

/// When something may happen to the image of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The run stands still at the beginning of the stage.
    At(Stage),
    /// The copy has read something, if there is anything to read, and goes on. It stands still at its end.
    Copying,
}

/// Tells of each stage, and waits until it may begin.
struct Gate {
    progress: Mutex<Option<Arc<Progress>>>,
    arrived: Sender<Stage>,
    go: Mutex<Receiver<()>>,
}

impl Observer for Gate {
    fn started(&self, _image: &str, progress: &Arc<Progress>) {
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(progress));
    }

    fn stage(&self, _image: &str, stage: Stage) {
        if self.arrived.send(stage).is_ok() {
            // Where the other side is gone, the test has failed, and the run shall end.
            let _ = self.go.lock().unwrap_or_else(PoisonError::into_inner).recv();
        }
    }
}

impl Gate {
    /// Waits until the copy has read something.
    fn wait_for_bytes(&self) {
        let progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let start = Instant::now();
        while progress.as_ref().is_none_or(|progress| progress.read.get() == 0)
            && start.elapsed() < FIRST_BYTES
        {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Has `run` go on with an observer, from stage to stage; calls `at` in between, in this thread.
pub fn held<T: Send>(run: impl FnOnce(&dyn Observer) -> T + Send, mut at: impl FnMut(Moment)) -> T {
    let (arrived, arrivals) = channel();
    let (leave, go) = channel();
    let gate = Gate { progress: Mutex::new(None), arrived, go: Mutex::new(go) };
    let gate = &gate;
    std::thread::scope(move |scope| {
        // They are dropped when `at` panics, so that the run is not held for ever.
        let (arrivals, leave) = (arrivals, leave);
        let running = scope.spawn(move || run(gate));
        loop {
            match arrivals.recv_timeout(Duration::from_millis(20)) {
                Ok(stage) => {
                    at(Moment::At(stage));
                    let _ = leave.send(());
                    if stage == Stage::Copy {
                        gate.wait_for_bytes();
                        at(Moment::Copying);
                    }
                }
                Err(_) if running.is_finished() && arrivals.try_recv().is_err() => break,
                Err(_) => {}
            }
        }
        running.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Backs one image up, from stage to stage.
pub fn back_up_held(store: &Store, spec: &Spec, at: impl FnMut(Moment)) -> ImageReport {
    let backup = store.pool_backup(std::slice::from_ref(spec));
    let mut reports = held(|observer| backup.run(observer, &Cancel::new()).expect("the pool is there"), at);
    assert_eq!(reports.len(), 1, "{reports:?}");
    reports.pop().expect("one report")
}

/// The same; `play` is called once, when the run has come to `moment`.
///
/// # Panics
/// When it never came there.
pub fn back_up_meanwhile(store: &Store, spec: &Spec, moment: Moment, play: impl FnOnce()) -> ImageReport {
    let mut play = Some(play);
    let report = back_up_held(store, spec, |now| {
        if now == moment {
            // A run may begin once more by itself.
            play.take().into_iter().for_each(|play| play());
        }
    });
    assert!(play.is_none(), "the run never came to {moment:?}: {}", why(&report));
    report
}

/// What a point holds, as stock QEMU reads it through its chain.
pub fn content(file: &Path) -> Vec<u8> {
    let raw = tempfile::NamedTempFile::new().expect("a temporary file");
    let done = Command::new("qemu-img")
        .args(["convert", "-f", "qcow2", "-O", "raw"])
        .args([file, raw.path()])
        .output()
        .expect("qemu-img runs");
    assert!(done.status.success(), "{}: {}", file.display(), String::from_utf8_lossy(&done.stderr));
    std::fs::read(raw.path()).expect("what it wrote")
}

/// Where two contents differ, `None` where they do not; both are zeroes up to the next sector.
pub fn difference(point: &[u8], truth: &[u8]) -> Option<String> {
    let length = point.len().max(truth.len().next_multiple_of(512));
    let byte = |bytes: &[u8], index: usize| bytes.get(index).copied().unwrap_or(0);
    if point.len() == length && point[..truth.len()] == *truth && point[truth.len()..].iter().all(|b| *b == 0)
    {
        return None;
    }
    let differing =
        (0..length).filter(|index| byte(point, *index) != byte(truth, *index)).collect::<Vec<_>>();
    match (differing.first(), differing.last()) {
        (Some(first), Some(last)) => {
            let zero = differing.iter().filter(|index| byte(point, **index) == 0).count();
            Some(format!(
                "{} bytes differ, from {first} to {last}, {zero} of them zero in the point",
                differing.len()
            ))
        }
        _ => Some(format!("{} bytes, not {}", point.len(), truth.len())),
    }
}

/// What a run came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Night {
    /// There is a point, and it is right.
    Right,
    /// There is none, for this reason.
    Refused(String),
}

impl Night {
    /// # Panics
    /// Where there is no point.
    pub fn assert_right(&self, what: &str) {
        assert_eq!(*self, Self::Right, "{what}");
    }

    /// # Panics
    /// Where there is no point for a reason that none of `words` is in.
    pub fn assert_right_or_because(&self, what: &str, words: &[&str]) {
        if let Self::Refused(why) = self {
            assert!(words.iter().any(|word| why.contains(word)), "{what}: {why}");
        }
    }
}

/// The point that a run has made must be what the objects of its snapshot hold, now that it is over. Its
/// object maps and what librbd makes of them are not asked.
///
/// # Panics
/// Where it is not.
pub fn judge(store: &Store, spec: &Spec, report: &ImageReport, what: &str) -> Night {
    if report.status != Status::Ok {
        assert!(report.error.is_some() && report.point.is_none(), "{what}: {report:?}");
        return Night::Refused(why(report));
    }
    let file = report.file.as_ref().expect("a layer");
    let manifest = read_json(&file.with_extension("json"));
    let snapshot = manifest["snapshot"].as_str().expect("a snapshot");
    let truth = store.driver.read_objects(spec, Some(snapshot)).expect("the snapshot can be read");
    if let Some(difference) = difference(&content(file), &truth) {
        panic!("{what}: {} is not its snapshot: {difference}", file.display());
    }
    Night::Right
}

/// Backs one image up and judges the point.
pub fn night(store: &Store, spec: &Spec, what: &str) -> Night {
    judge(store, spec, &store.run(spec), what)
}

//! What a backup tells while it runs and when it ends.

use std::collections::HashMap;
use std::fmt::{self, Display, Write};
use std::io::{self, Stdout};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::Scope;
use std::time::{Duration, Instant};

use indicatif::HumanBytes;
use rbd2qcow2_core::chain::PointKind;
use rbd2qcow2_core::progress::{ImageReport, Observer, Progress, Stage, Status};

use crate::args::OutputArgs;
use crate::bars::Bars;
use crate::console::Console;
use crate::human;
use crate::json::{BackupLine, JsonLines};
use crate::stages::{self, StageClock};

/// How often the counters are looked at for the bars.
const TICK: Duration = Duration::from_millis(100);

/// Tells people, and programs that asked for it, how a run goes.
#[derive(Debug)]
pub struct Reporter<'a> {
    /// Standard error.
    console: &'a Console,
    /// Whether lines about what went well are left out.
    quiet: bool,
    /// Whether stages and their rates are told.
    verbose: bool,
    /// Whether the run changes nothing.
    dry_run: bool,
    /// The bars, where there are some.
    bars: Option<Bars>,
    /// What changes as the run goes on.
    state: Mutex<State>,
}

/// What a reporter has heard.
#[derive(Debug)]
struct State {
    /// Standard output, when programs listen, until it fails.
    json: Option<JsonLines<Stdout>>,
    /// Why it failed.
    json_error: Option<io::Error>,
    /// Images that the run is about.
    selected: usize,
    /// The stages of the images under way.
    clocks: HashMap<String, StageClock>,
}

impl<'a> Reporter<'a> {
    /// A reporter of one run.
    pub fn new(console: &'a Console, output: &OutputArgs, dry_run: bool) -> Self {
        let state = State {
            json: output.json.then(|| JsonLines::new(io::stdout())),
            json_error: None,
            selected: 0,
            clocks: HashMap::new(),
        };
        Self {
            console,
            quiet: output.quiet,
            verbose: output.verbose > 0,
            dry_run,
            bars: console.bars().map(Bars::new),
            state: Mutex::new(state),
        }
    }

    /// Keeps the bars up to date on a thread of `scope`, until what this returns is dropped.
    ///
    /// # Errors
    /// No thread could be made.
    pub fn start_ticker<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) -> io::Result<Ticker> {
        Ticker::start(self.bars.as_ref(), scope)
    }

    /// Tells how the run went, and returns why standard output failed if it did.
    ///
    /// # Errors
    /// Programs did not get the whole report.
    pub fn finish(self, reports: &[ImageReport], time: Duration) -> Result<Summary, io::Error> {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        let summary = Summary::new(reports, state.selected, self.dry_run, time);
        if !self.quiet {
            self.console.line(&summary.to_string());
        }
        match state.json_error {
            None => Ok(summary),
            Some(error) => Err(error),
        }
    }

    /// What was heard. A panic elsewhere leaves it whole: no step of a change depends on another.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells programs about an image. A reader who left does not stop backups.
    fn write_json(&self, report: &ImageReport) {
        let mut state = self.state();
        if let Some(json) = &mut state.json
            && let Err(error) = json.write(&BackupLine::new(report, self.dry_run))
        {
            state.json = None;
            state.json_error = Some(error);
        }
    }
}

/// Keeps the bars moving while it lives. Dropping it, by a panic too, takes them away soon.
#[derive(Debug)]
pub struct Ticker(
    /// Never sent on: the ticking thread waits for its end.
    #[expect(dead_code, reason = "held for its drop")]
    Sender<()>,
);

impl Ticker {
    /// Keeps `bars`, if there are some, up to date on a thread of `scope`.
    ///
    /// # Errors
    /// No thread could be made.
    pub fn start<'scope>(bars: Option<&'scope Bars>, scope: &'scope Scope<'scope, '_>) -> io::Result<Self> {
        let (sender, stopped) = mpsc::channel();
        if let Some(bars) = bars {
            std::thread::Builder::new().name("bars".into()).spawn_scoped(scope, move || {
                while stopped.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                    bars.tick();
                }
                bars.clear();
            })?;
        }
        Ok(Self(sender))
    }
}

impl Observer for Reporter<'_> {
    fn selected(&self, images: &[String]) {
        self.state().selected = images.len();
        if let Some(bars) = &self.bars {
            bars.selected(images.len());
        }
    }

    fn started(&self, image: &str, progress: &Arc<Progress>) {
        if let Some(bars) = &self.bars {
            bars.started(image, progress);
        }
    }

    fn stage(&self, image: &str, stage: Stage) {
        self.state().clocks.entry(image.to_owned()).or_default().reached(stage, Instant::now());
        if let Some(bars) = &self.bars {
            bars.stage(image, stage);
        }
    }

    fn finished(&self, report: &ImageReport) {
        if let Some(bars) = &self.bars {
            bars.finished(&report.image);
        }
        self.write_json(report);
        let clock = self.state().clocks.remove(&report.image).unwrap_or_default();
        if report.status == Status::Failed || !self.quiet {
            let mut text = image_line(report, self.dry_run);
            if self.verbose && report.status != Status::Skipped {
                text = format!("{text}\n{}", stages::describe(report, &clock, Instant::now()));
            }
            self.console.line(&text);
        }
    }
}

/// The line about an image that ended; for a failure a block with its causes.
fn image_line(report: &ImageReport, dry_run: bool) -> String {
    let image = human::name(&report.image);
    let reason = report.reason.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default();
    match report.status {
        Status::Ok if dry_run => {
            let kind = report.kind.map_or("backup", PointKind::as_str);
            format!("{image}: would be {kind}{reason}, about {} to read", HumanBytes(report.data_bytes))
        }
        Status::Ok => made_line(&image, &reason, report),
        Status::Skipped => format!("{image}: skipped{reason}"),
        Status::Failed => {
            let time = human::duration(report.time);
            match report.error.as_deref() {
                Some(error) => format!("{image}: failed after {time}: {}", human::causes_block(error)),
                None => format!("{image}: failed after {time}{reason}"),
            }
        }
    }
}

/// The line about a point that was made.
fn made_line(image: &str, reason: &str, report: &ImageReport) -> String {
    let mut line = image.to_owned();
    // Writing to a string cannot fail.
    if let Some(point) = &report.point {
        let _ = write!(line, "@{point}");
    }
    let _ = write!(
        line,
        ": {}{reason}, {} of data, {} of zeroes, file of {}, {} read in {}",
        report.kind.map_or("done", PointKind::as_str),
        HumanBytes(report.data_bytes),
        HumanBytes(report.zero_bytes),
        HumanBytes(report.layer_bytes),
        HumanBytes(report.read_bytes),
        human::duration(report.time),
    );
    if let Some(what) = &report.not_excluded {
        let _ = write!(line, "\n  not excluded: {what}");
    }
    line
}

/// How a run went. Its text is the summary's line.
#[derive(Debug, PartialEq, Eq)]
pub struct Summary {
    /// Images that were backed up.
    pub ok: usize,
    /// Images that asked not to be.
    pub skipped: usize,
    /// Images that could not be.
    pub failed: usize,
    /// Images that the run stopped before.
    pub not_begun: usize,
    /// Bytes read from the cluster; in a dry run the estimate of what would be.
    read: u64,
    /// Bytes that the new layers occupy.
    written: u64,
    /// Whether the run changed nothing.
    dry_run: bool,
    /// How long it took.
    time: Duration,
}

impl Summary {
    /// Sums up the reports of a run that was about `selected` images.
    fn new(reports: &[ImageReport], selected: usize, dry_run: bool, time: Duration) -> Self {
        let count = |status| reports.iter().filter(|report| report.status == status).count();
        let sum = |bytes: fn(&ImageReport) -> u64| reports.iter().map(bytes).sum();
        Self {
            ok: count(Status::Ok),
            skipped: count(Status::Skipped),
            failed: count(Status::Failed),
            not_begun: selected.saturating_sub(reports.len()),
            read: if dry_run { sum(|report| report.data_bytes) } else { sum(|report| report.read_bytes) },
            written: sum(|report| report.layer_bytes),
            dry_run,
            time,
        }
    }

    /// Whether every image was done or asked not to be.
    pub fn is_complete(&self) -> bool {
        self.failed == 0 && self.not_begun == 0
    }
}

impl Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.dry_run {
            f.write_str("dry run: ")?;
        }
        write!(f, "{} ok, {} skipped, {} failed", self.ok, self.skipped, self.failed)?;
        if self.not_begun > 0 {
            write!(f, ", {} not begun", self.not_begun)?;
        }
        if self.dry_run {
            write!(f, "; about {} to read", HumanBytes(self.read))?;
        } else {
            write!(f, "; {} read, files of {}", HumanBytes(self.read), HumanBytes(self.written))?;
        }
        write!(f, " in {}", human::duration(self.time))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A report of a point that was made.
    fn made(image: &str) -> ImageReport {
        let mut report = ImageReport::new(image, Status::Ok);
        report.point = Some("20261122T173312Z".into());
        report.kind = Some(PointKind::Incremental);
        report.data_bytes = 1 << 30;
        report.zero_bytes = 4096;
        report.read_bytes = 2 << 30;
        report.layer_bytes = 3 << 29;
        report.time = Duration::from_millis(2_340);
        report
    }

    #[test]
    fn one_line_for_each_image() {
        let mut report = made("vm 1");
        assert_eq!(
            image_line(&report, false),
            "vm 1@20261122T173312Z: incremental, 1.00 GiB of data, 4.00 KiB of zeroes, file of 1.50 GiB, \
             2.00 GiB read in 2.3s"
        );
        report.kind = Some(PointKind::Full);
        report.reason = Some("the base snapshot is gone".into());
        assert!(image_line(&report, false).contains(": full (the base snapshot is gone), 1.00 GiB"));
        assert_eq!(
            image_line(&report, true),
            "vm 1: would be full (the base snapshot is gone), about 1.00 GiB to read"
        );
        let mut report = ImageReport::new("vm", Status::Skipped);
        report.reason = Some("its metadata has backup-skip".into());
        assert_eq!(image_line(&report, false), "vm: skipped (its metadata has backup-skip)");
    }

    #[test]
    fn a_failure_tells_its_causes_in_a_block() {
        let mut report = ImageReport::new("vm\u{1b}[2J", Status::Failed);
        report.error = Some(Box::new(crate::outcome::CommandError::Output(io::Error::other("full"))));
        assert_eq!(
            image_line(&report, false),
            "vm\\u{1b}[2J: failed after 0.0s: cannot write to standard output\n  caused by: full"
        );
    }

    #[test]
    fn the_summary_counts() {
        let reports = [
            made("a"),
            made("b"),
            ImageReport::new("c", Status::Skipped),
            ImageReport::new("d", Status::Failed),
        ];
        let summary = Summary::new(&reports, 7, false, Duration::from_secs(61));
        assert_eq!(
            summary.to_string(),
            "2 ok, 1 skipped, 1 failed, 3 not begun; 4.00 GiB read, files of 3.00 GiB in 1m 1.0s"
        );
        assert!(!summary.is_complete());
        let summary = Summary::new(&reports[..3], 3, true, Duration::ZERO);
        assert_eq!(summary.to_string(), "dry run: 2 ok, 1 skipped, 0 failed; about 2.00 GiB to read in 0.0s");
        assert!(summary.is_complete());
    }
}

//! `verify`: tells whether points hold what was backed up.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use indicatif::ProgressBar;
use rbd2qcow2_core::cancel::Cancel;
use rbd2qcow2_core::chain::{self, ImageName, PointName};
use rbd2qcow2_core::error::Causes;
use rbd2qcow2_core::rbd::{ClusterOptions, Patience, RbdError};
use rbd2qcow2_core::verify::{
    self, ClusterSnapshots, PointReport, Sample, Snapshots, SourceStatus, VerifyError, VerifyImage,
    VerifyOptions, VerifyProgress, VerifyStatus,
};
use serde::Serialize;

use crate::args::{OutputArgs, VerifyArgs};
use crate::bars::{self, Moving};
use crate::console::Console;
use crate::json::JsonLines;
use crate::outcome::{CommandError, Outcome};
use crate::points::{Named, NotFound};
use crate::{human, points, signals};

/// Why an image could not be verified. The others are.
#[derive(Debug, thiserror::Error)]
enum ImageError {
    /// There is no such image, or no such point.
    #[error(transparent)]
    NotFound(#[from] NotFound),
    /// The library could not look at the image.
    #[error("cannot verify image {image:?}")]
    Verify {
        /// The image.
        image: String,
        /// Why not.
        #[source]
        cause: VerifyError,
    },
}

/// The points to verify, by image; no points means all of them.
type Wanted = BTreeMap<ImageName, BTreeSet<PointName>>;

/// One object of `verify --json`: the keys and their order are a contract with other programs.
#[derive(Debug, Serialize)]
struct Line<'a> {
    image: &'a str,
    point: String,
    status: &'static str,
    checked_bytes: u64,
    errors: Vec<String>,
    /// Only with `--source`.
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<&'a str>,
}

/// Verifies points until all are done or a signal comes.
///
/// # Errors
/// The directory could not be read, or standard output failed; damage is no error here.
pub fn run(
    args: &VerifyArgs,
    cluster: &ClusterOptions,
    output: &OutputArgs,
    console: &Console,
) -> Result<Outcome, CommandError> {
    let cancel = signals::stop().map_err(CommandError::Signals)?;
    let there = chain::images_in(&args.dest).map_err(CommandError::Destination)?.images;
    let (wanted, mut failures) = select(args, &there);
    let snapshots = match connect(args, cluster, &cancel) {
        Err(RbdError::Cancelled) => return Ok(Outcome::Interrupted),
        snapshots => snapshots.map_err(CommandError::Cluster)?,
    };
    let mut outcome = Outcome::Done;
    for (image, points) in &wanted {
        let reports = match verify(args, image, points, snapshots.as_ref(), console, &cancel) {
            Ok(reports) => reports,
            Err(VerifyError::Cancelled) => {
                console.line("interrupted; what was not reported was not looked at");
                return Ok(Outcome::Interrupted);
            }
            Err(cause) => {
                failures.push(ImageError::Verify { image: image.as_str().to_owned(), cause });
                continue;
            }
        };
        warn_of_nothing_compared(image, &reports);
        for report in &reports {
            if matches!(report.status, VerifyStatus::Damaged | VerifyStatus::Suspect) {
                outcome = Outcome::Failed;
            }
            if let Some(SourceStatus::Failed(why)) = &report.source {
                outcome = Outcome::Failed;
                let (image, point) = (human::name(image.as_str()), report.point);
                console.line(&format!("error: cannot compare {image}@{point} with its snapshot: {why}"));
            }
            match console.apart(|| tell(image, report, output)) {
                // The reader has seen enough, as `head` has.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                result => result.map_err(CommandError::Output)?,
            }
        }
    }
    for failure in &failures {
        outcome = Outcome::Failed;
        console.line(&format!("error: {}", human::causes_block(failure)));
    }
    Ok(outcome)
}

/// What was asked for, among what is there.
fn select(args: &VerifyArgs, there: &[ImageName]) -> (Wanted, Vec<ImageError>) {
    if args.points.is_empty() {
        return (there.iter().map(|image| (image.clone(), BTreeSet::new())).collect(), Vec::new());
    }
    let (found, failures) = points::select(&args.dest, &args.points, there);
    // All points of a whole image, although one of them was named, too.
    let wanted = found
        .into_iter()
        .map(|(image, Named { whole, points })| (image, if whole { BTreeSet::new() } else { points }));
    (wanted.collect(), failures.into_iter().map(ImageError::from).collect())
}

fn verify(
    args: &VerifyArgs,
    image: &ImageName,
    points: &BTreeSet<PointName>,
    snapshots: Option<&ClusterSnapshots>,
    console: &Console,
    cancel: &Cancel,
) -> Result<Vec<PointReport>, VerifyError> {
    let mut options = VerifyOptions::default();
    // Other data every time, so that a sample a day sees all of them in the end.
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| u64::from(now.subsec_nanos()));
    options.source_reads = args.parallel.into();
    options.sample = args.sample.map(|percent| Sample { percent, seed });
    let points: Vec<_> = points.iter().copied().collect();
    let progress = VerifyProgress::default();
    let verify = VerifyImage {
        dest: &args.dest,
        image,
        points: &points,
        options: &options,
        snapshots: snapshots.map(|snapshots| snapshots as &dyn Snapshots),
        progress: &progress,
        cancel,
    };
    let bar = console.bars().map(|bars| bars::image_bar(bars, image.as_str()));
    std::thread::scope(|scope| {
        let tick = |bar: &ProgressBar| bars::tick_amount(bar, "verify", &progress);
        let _bar = Moving::start(bar.as_ref(), scope, tick).map_err(VerifyError::Thread)?;
        verify.run()
    })
}

/// A proof that nobody made must not look like one, even to those who want to hear little.
fn warn_of_nothing_compared(image: &ImageName, reports: &[PointReport]) {
    let why = |report: &PointReport| match &report.source {
        Some(SourceStatus::NotCompared(why)) => Some(why.clone()),
        _ => None,
    };
    let all: Option<Vec<_>> = reports.iter().map(why).collect();
    if let Some(newest) = all.and_then(|mut all| all.pop()) {
        log::warn!(
            "{}: no point was compared with its snapshot; of the newest: {newest}",
            human::name(image.as_str())
        );
    }
}

/// The cluster, where points are compared with their snapshots.
fn connect(
    args: &VerifyArgs,
    cluster: &ClusterOptions,
    cancel: &Cancel,
) -> Result<Option<ClusterSnapshots>, RbdError> {
    let patience = Patience { limit: Duration::from_secs(args.timeout), cancel: cancel.clone() };
    args.source.then(|| ClusterSnapshots::connect(cluster, patience)).transpose()
}

/// Tells about a point on standard output.
fn tell(image: &ImageName, report: &PointReport, output: &OutputArgs) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    let mut errors: Vec<_> = report.findings.iter().map(|finding| Causes(finding).to_string()).collect();
    if report.more > 0 {
        errors.push(format!("and {} more", report.more));
    }
    let status = report.status.as_str();
    if output.json {
        let (image, point) = (image.as_str(), report.point.to_string());
        let source = report.source.as_ref().map(|source| match source {
            SourceStatus::Same => "same",
            SourceStatus::Different => "different",
            SourceStatus::NotCompared(_) => "not compared",
            SourceStatus::Failed(_) => "failed",
        });
        let line = Line { image, point, status, checked_bytes: report.checked_bytes, errors, source };
        return JsonLines::new(stdout).write(&line);
    }
    if output.quiet && report.status == VerifyStatus::Ok {
        return Ok(());
    }
    let checked = indicatif::HumanBytes(report.checked_bytes);
    let reason = match report.status {
        VerifyStatus::Unverifiable => {
            format!(": {}; the structure is sound", verify::reason(&report.unverified))
        }
        VerifyStatus::Suspect => {
            format!(": {}", report.suspicion.as_deref().unwrap_or("it may lack changes"))
        }
        VerifyStatus::Ok | VerifyStatus::Damaged => String::new(),
    };
    let source = match &report.source {
        None => String::new(),
        Some(SourceStatus::Same) => ", the same as its snapshot".to_owned(),
        Some(SourceStatus::Different) => ", different from its snapshot".to_owned(),
        Some(SourceStatus::NotCompared(why)) => format!(", not compared with its snapshot ({why})"),
        Some(SourceStatus::Failed(_)) => ", could not be compared with its snapshot".to_owned(),
    };
    writeln!(
        stdout,
        "{}@{}: {status}, {checked} of data checked{source}{reason}",
        human::name(image.as_str()),
        report.point
    )?;
    for error in errors {
        writeln!(stdout, "    {}", human::printable(&error))?;
    }
    stdout.flush()
}

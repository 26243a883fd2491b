//! `restore`: brings a point back.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::Arc;

use indicatif::HumanBytes;
use rbd2qcow2_core::progress::{Observer, Progress, Stage};
use rbd2qcow2_core::rbd::ClusterOptions;
use rbd2qcow2_core::restore::image::ImageError;
use rbd2qcow2_core::restore::{RestoreError, RestoreReport};

use crate::args::{Destination, OutputArgs, RestoreArgs};
use crate::bars::Bars;
use crate::console::Console;
use crate::json::{JsonLines, RestoreLine};
use crate::outcome::{CommandError, Outcome};
use crate::report::Ticker;
use crate::{human, names, signals};

/// Restores a point until it is done or a signal comes.
///
/// # Errors
/// The point could not be restored, or standard output failed.
pub fn run(
    args: &RestoreArgs,
    cluster: ClusterOptions,
    output: &OutputArgs,
    console: &Console,
) -> Result<Outcome, CommandError> {
    let destination = args.destination();
    let to_stdout = matches!(destination, Destination::Stdout);
    if to_stdout && io::stdout().is_terminal() {
        return Err(CommandError::Terminal);
    }
    let cancel = if to_stdout { signals::end() } else { signals::stop() };
    let cancel = cancel.map_err(CommandError::Signals)?;
    let restore = args.to_restore();
    let bars = console.bars().map(Bars::new);
    let watch = Watch(bars.as_ref());
    let result = std::thread::scope(|scope| {
        let _ticker = Ticker::start(bars.as_ref(), scope).map_err(CommandError::Threads)?;
        let result = match destination {
            Destination::File(path) => restore.to_file(path, &args.format(), &watch, &cancel),
            Destination::Stdout => {
                let mut stdout = Stdout::new().map_err(CommandError::Output)?;
                restore.to_stream(&mut stdout, &watch, &cancel)
            }
            Destination::Image(spec) => restore.to_image(&args.image(spec, cluster), &watch, &cancel),
        };
        result.map_err(|error| match error {
            RestoreError::Point(error) => names::explain(error, &restore.dest),
            error => error.into(),
        })
    });
    let report = match result {
        Err(CommandError::Restore(RestoreError::Cancelled)) => {
            console.line("interrupted");
            return Ok(Outcome::Interrupted);
        }
        Err(CommandError::Restore(RestoreError::Image(error @ ImageError::Interrupted { .. }))) => {
            console.line(&error.to_string());
            return Ok(Outcome::Interrupted);
        }
        result => result?,
    };
    if output.json {
        let line = RestoreLine::new(&report, name(destination));
        JsonLines::new(io::stdout()).write(&line).map_err(CommandError::Output)?;
    }
    if !output.quiet {
        console.line(&restored_line(&report, destination));
    }
    Ok(Outcome::Done)
}

/// A destination as the command line names it.
fn name(destination: Destination<'_>) -> String {
    match destination {
        Destination::File(path) => path.to_string_lossy().into_owned(),
        Destination::Stdout => "-".to_owned(),
        Destination::Image(image) => image.to_string(),
    }
}

/// The line about a point that was restored.
fn restored_line(report: &RestoreReport, destination: Destination<'_>) -> String {
    let target = match destination {
        Destination::Stdout => "standard output".to_owned(),
        other => human::name(&name(other)),
    };
    let bytes = |bytes| HumanBytes(bytes).to_string();
    let done = match (report.zero_bytes, report.unchanged_bytes) {
        (zeroes, Some(same)) => {
            let emptied = if zeroes == 0 { String::new() } else { format!("{} emptied, ", bytes(zeroes)) };
            format!("{} written, {emptied}{} as they were", bytes(report.bytes_written), bytes(same))
        }
        (0, None) => format!("{} written", bytes(report.bytes_written)),
        (zeroes, None) => {
            format!("{} written, {} of zeroes left out", bytes(report.bytes_written), bytes(zeroes))
        }
    };
    format!(
        "{}@{}: restored to {target}, {done} in {}",
        human::name(report.image.as_str()),
        report.point,
        human::duration(report.time),
    )
}

/// Shows the restore as a run of one image.
struct Watch<'a>(Option<&'a Bars>);

impl Observer for Watch<'_> {
    fn started(&self, image: &str, progress: &Arc<Progress>) {
        if let Some(bars) = self.0 {
            bars.selected(1);
            bars.started(image, progress);
        }
    }

    fn stage(&self, image: &str, stage: Stage) {
        if let Some(bars) = self.0 {
            bars.stage(image, stage);
        }
    }
}

/// Standard output as a file: unbuffered, and flushed to the disk where it leads to one.
struct Stdout(File);

impl Stdout {
    fn new() -> io::Result<Self> {
        Ok(Self(io::stdout().as_fd().try_clone_to_owned()?.into()))
    }
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        match self.0.sync_all() {
            // Pipes and the like.
            Err(error)
                if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) =>
            {
                Ok(())
            }
            other => other,
        }
    }
}

//! `restore`: brings a point back.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use indicatif::HumanBytes;
use rbd2qcow2_core::progress::{Observer, Progress, Stage};
use rbd2qcow2_core::restore::{RestoreError, RestoreReport};

use crate::args::{OutputArgs, RestoreArgs};
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
pub fn run(args: &RestoreArgs, output: &OutputArgs, console: &Console) -> Result<Outcome, CommandError> {
    let file = args.file();
    if file.is_none() && io::stdout().is_terminal() {
        return Err(CommandError::Terminal);
    }
    let cancel = if file.is_some() { signals::stop() } else { signals::end() };
    let cancel = cancel.map_err(CommandError::Signals)?;
    let restore = args.to_restore();
    let bars = console.bars().map(Bars::new);
    let watch = Watch(bars.as_ref());
    let result = std::thread::scope(|scope| {
        let _ticker = Ticker::start(bars.as_ref(), scope).map_err(CommandError::Threads)?;
        let result = match file {
            Some(path) => restore.to_file(path, &args.format(), &watch, &cancel),
            None => Stdout::new()
                .map_err(CommandError::Output)
                .map(|mut stdout| restore.to_stream(&mut stdout, &watch, &cancel))?,
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
        result => result?,
    };
    let target = file.unwrap_or(Path::new("-"));
    if output.json {
        let line = RestoreLine::new(&report, target);
        JsonLines::new(io::stdout()).write(&line).map_err(CommandError::Output)?;
    }
    if !output.quiet {
        console.line(&restored_line(&report, file));
    }
    Ok(Outcome::Done)
}

/// The line about a point that was restored.
fn restored_line(report: &RestoreReport, file: Option<&Path>) -> String {
    let target = file.map_or("standard output".to_owned(), |path| human::name(&path.to_string_lossy()));
    let zeroes = match report.zero_bytes {
        0 => String::new(),
        bytes => format!(", {} of zeroes left out", HumanBytes(bytes)),
    };
    format!(
        "{}@{}: restored to {target}, {} written{zeroes} in {}",
        human::name(report.image.as_str()),
        report.point,
        HumanBytes(report.bytes_written),
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

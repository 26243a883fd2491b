//! `restore`: brings a point back.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use indicatif::HumanBytes;
use rbd2qcow2_core::chain::{self, PointName};
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
        result.map_err(|error| explain(error, &restore.dest))
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

/// Tells which names may have been meant, where one is unknown.
fn explain(error: RestoreError, dest: &Path) -> CommandError {
    let hint = match &error {
        RestoreError::UnknownImage { image, .. } => nearest_image(image.as_str(), dest),
        RestoreError::UnknownPoint { point, known, .. } => nearest_point(*point, known),
        _ => String::new(),
    };
    if hint.is_empty() { error.into() } else { CommandError::Unknown { error: error.into(), hint } }
}

fn nearest_image(asked: &str, dest: &Path) -> String {
    let Ok(found) = chain::images_in(dest) else { return String::new() };
    // What stands behind the last @ was no point, or it would not be in the image's name.
    if let Some((image, point)) = asked.rsplit_once('@')
        && let Some(image) = found.images.iter().find(|there| there.as_str() == image)
        && let Ok(catalogue) = chain::Catalogue::read(&chain::image_directory(dest, image), image)
    {
        let points: Vec<_> = catalogue.points().iter().rev().map(|point| point.name.to_string()).collect();
        let points = names::alike(point, points.iter().map(String::as_str));
        return format!(": {point:?} names no point of image {:?}{points}", image.as_str());
    }
    names::alike(asked, found.images.iter().map(|image| image.as_str()))
}

/// The points nearest in time.
fn nearest_point(asked: PointName, known: &[PointName]) -> String {
    let distance = |point: &PointName| point.timestamp().as_second().abs_diff(asked.timestamp().as_second());
    let mut near = known.to_vec();
    near.sort_by_key(distance);
    let near: Vec<_> = near.iter().map(ToString::to_string).collect();
    names::suggest(near.iter().map(String::as_str))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_points_nearest_in_time_are_suggested() {
        let point = |text: &str| PointName::parse(text).unwrap();
        let known =
            ["20261120T020000Z", "20261121T020000Z", "20261122T020000Z", "20261123T020000Z"].map(point);
        assert_eq!(
            nearest_point(point("20261122T000000Z"), &known),
            r#"; did you mean "20261122T020000Z" or "20261121T020000Z" or "20261123T020000Z"?"#
        );
        assert_eq!(nearest_point(point("20261122T000000Z"), &[]), "");
    }
}

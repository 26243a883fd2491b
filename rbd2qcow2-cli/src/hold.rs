//! `hold` and `release`: what is never pruned.

use std::io;
use std::path::Path;

use jiff::Timestamp;
use rbd2qcow2_core::chain::hold::{self, HoldError};
use rbd2qcow2_core::chain::manifest::Hold;
use rbd2qcow2_core::chain::{self, ImageName, PointName};
use serde::Serialize;

use crate::args::{HoldArgs, OutputArgs, ReleaseArgs};
use crate::console::Console;
use crate::json::JsonLines;
use crate::outcome::{CommandError, Outcome};
use crate::{human, names, points};

/// What became of a point, as an object of `--json`.
#[derive(Debug, Serialize)]
struct Line<'a> {
    image: &'a str,
    point: String,
    held: bool,
    /// Why it is held, or was.
    reason: &'a str,
    /// Since when.
    since: String,
}

/// Holds a point.
///
/// # Errors
/// There is no such point, its image is in use, it cannot be held, or standard output failed.
pub fn hold(args: &HoldArgs, output: &OutputArgs, console: &Console) -> Result<Outcome, CommandError> {
    let (image, point) = find(&args.dest, &args.point)?;
    let held = Hold { reason: args.reason.clone(), since: Timestamp::now() };
    hold::hold(&args.dest, &image, point, &held).map_err(explain)?;
    tell(&image, point, &held, true, output, console)
}

/// Releases a point.
///
/// # Errors
/// There is no such point, its image is in use, it is not held, or standard output failed.
pub fn release(args: &ReleaseArgs, output: &OutputArgs, console: &Console) -> Result<Outcome, CommandError> {
    let (image, point) = find(&args.dest, &args.point)?;
    let held = hold::release(&args.dest, &image, point).map_err(explain)?;
    tell(&image, point, &held, false, output, console)
}

fn find(dest: &Path, asked: &str) -> Result<(ImageName, PointName), CommandError> {
    let there = chain::images_in(dest).map_err(CommandError::Destination)?.images;
    match points::find(dest, asked, &there)? {
        (image, Some(point)) => Ok((image, point)),
        (image, None) => Err(CommandError::NoPoint { image }),
    }
}

/// Tells which point may have been meant, where it is unknown.
fn explain(error: HoldError) -> CommandError {
    match &error {
        HoldError::UnknownPoint { point, known, .. } => {
            let hint = names::nearest_point(*point, known);
            CommandError::HoldUnknown { error: error.into(), hint }
        }
        _ => error.into(),
    }
}

fn tell(
    image: &ImageName,
    point: PointName,
    hold: &Hold,
    held: bool,
    output: &OutputArgs,
    console: &Console,
) -> Result<Outcome, CommandError> {
    if output.json {
        let (since, reason) = (hold.since.to_string(), hold.reason.as_str());
        let line = Line { image: image.as_str(), point: point.to_string(), held, reason, since };
        JsonLines::new(io::stdout()).write(&line).map_err(CommandError::Output)?;
    }
    if !output.quiet {
        let (image, reason) = (human::name(image.as_str()), human::name(&hold.reason));
        console.line(&match held {
            true => format!("{image}@{point}: held ({reason})"),
            false => format!("{image}@{point}: released (was held: {reason})"),
        });
    }
    Ok(Outcome::Done)
}

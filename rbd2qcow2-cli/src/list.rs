//! `list`: tells which points a directory holds.

use std::io::{self, Write};

use jiff::Timestamp;
use rbd2qcow2_core::chain::{self, ChainError, ImageName};

use crate::args::{ListArgs, OutputArgs};
use crate::console::Console;
use crate::json::JsonLines;
use crate::outcome::{CommandError, Outcome};
use crate::{human, names};

mod listing;
mod people;
mod row;
mod tree;
mod warnings;

use listing::Listing;
use row::Row;

/// Why an image could not be listed. The others are.
#[derive(Debug, thiserror::Error)]
enum ListError {
    /// There is no such image.
    #[error("{} holds no backups of image {image:?}{hint}", dest.display())]
    UnknownImage {
        /// The directory of all images.
        dest: std::path::PathBuf,
        /// The image that was asked for.
        image: String,
        /// What may have been meant.
        hint: String,
    },
    /// The image's directory could not be read.
    #[error("cannot list image {image:?}")]
    Read {
        /// The image.
        image: String,
        /// Why not.
        #[source]
        cause: ChainError,
    },
}

/// Lists points. Damage is told on standard error and changes nothing about the outcome; an image
/// that could not be listed at all does.
///
/// # Errors
/// The directory could not be read, or standard output failed.
pub fn run(args: &ListArgs, output: &OutputArgs, console: &Console) -> Result<Outcome, CommandError> {
    let found = chain::images_in(&args.dest).map_err(explain)?;
    for path in &found.foreign {
        log::debug!("{} is no directory of an image", path.display());
    }
    let (images, mut failures) = select(args, found.images);
    let mut listings = Vec::new();
    for image in images {
        match Listing::read(&args.dest, &image) {
            Ok(listing) => listings.push(listing),
            Err(cause) => failures.push(ListError::Read { image: image.as_str().to_owned(), cause }),
        }
    }
    let now = Timestamp::now();
    match write(&listings, output, now) {
        // The reader has seen enough, as `head` has.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        result => result.map_err(CommandError::Output)?,
    }
    // Behind the listing, where a terminal shows them.
    for warning in listings.iter().flat_map(|listing| warnings::of(listing, now)) {
        console.line(&format!("warning: {warning}"));
    }
    for failure in &failures {
        console.line(&format!("error: {}", human::causes_block(failure)));
    }
    Ok(if failures.is_empty() { Outcome::Done } else { Outcome::Failed })
}

/// The images that were asked for among those that are there, each once.
fn select(args: &ListArgs, there: Vec<ImageName>) -> (Vec<ImageName>, Vec<ListError>) {
    if args.images.is_empty() {
        return (there, Vec::new());
    }
    let unknown = args.images.iter().filter(|asked| !there.iter().any(|image| image.as_str() == *asked));
    let unknown = unknown.map(|asked| ListError::UnknownImage {
        dest: args.dest.clone(),
        image: asked.clone(),
        hint: names::alike(asked, there.iter().map(ImageName::as_str)),
    });
    let failures = unknown.collect();
    let asked = there.into_iter().filter(|image| args.images.iter().any(|asked| image.as_str() == asked));
    (asked.collect(), failures)
}

/// What to do about a destination that cannot be listed.
fn explain(error: ChainError) -> CommandError {
    match &error {
        ChainError::ImageDirectory { dest, image, .. } => {
            let [dest, image] = [&dest.to_string_lossy(), image.as_str()].map(human::shell_word);
            let command = format!("rbd2qcow2 list {dest} {image}");
            CommandError::ImageDirectory { error: Box::new(error), command }
        }
        _ => CommandError::Destination(error),
    }
}

/// Writes the points for whoever reads them.
fn write(listings: &[Listing], output: &OutputArgs, now: Timestamp) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    if !output.json {
        people::write(&mut stdout, listings, now)?;
        return stdout.flush();
    }
    let mut lines = JsonLines::new(stdout);
    for Listing { catalogue, .. } in listings {
        for point in catalogue.points() {
            lines.write(&Row::new(catalogue, point))?;
        }
    }
    Ok(())
}

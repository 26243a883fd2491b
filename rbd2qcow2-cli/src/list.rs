//! `list`: tells which points a directory holds.

use std::io::{self, Write};

use jiff::Timestamp;
use rbd2qcow2_core::chain::{self, Catalogue, ChainError, ImageName};

use crate::args::{ListArgs, OutputArgs};
use crate::console::Console;
use crate::json::JsonLines;
use crate::outcome::{CommandError, Outcome};
use crate::{human, names};

mod row;

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
    let found = chain::images_in(&args.dest).map_err(CommandError::Destination)?;
    for path in &found.foreign {
        log::debug!("{} is no directory of an image", path.display());
    }
    let (images, mut failures) = select(args, found.images);
    let mut rows = Vec::new();
    for image in &images {
        match read(args, image, console) {
            Ok(found) => rows.extend(found),
            Err(failure) => failures.push(failure),
        }
    }
    match write(&rows, output) {
        // The reader has seen enough, as `head` has.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        result => result.map_err(CommandError::Output)?,
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

/// The points of one image, the oldest first. Warns of what is wrong with them.
fn read(args: &ListArgs, image: &ImageName, console: &Console) -> Result<Vec<Row>, ListError> {
    let directory = chain::image_directory(&args.dest, image);
    let catalogue = Catalogue::read(&directory, image)
        .map_err(|cause| ListError::Read { image: image.as_str().to_owned(), cause })?;
    for problem in catalogue.problems() {
        console.line(&format!("warning: {}", human::causes_block(problem)));
    }
    for path in catalogue.leftovers() {
        log::debug!("{} is left over from a run that did not end, or is being written", path.display());
    }
    Ok(catalogue.points().iter().map(|point| Row::new(image, point)).collect())
}

/// Writes the rows for whoever reads them.
fn write(rows: &[Row], output: &OutputArgs) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    if output.json {
        let mut lines = JsonLines::new(stdout);
        rows.iter().try_for_each(|row| lines.write(row))
    } else {
        row::write_table(&mut stdout, rows, Timestamp::now())?;
        stdout.flush()
    }
}

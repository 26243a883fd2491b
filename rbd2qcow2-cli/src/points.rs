//! Images and points as the command line names them, found among what is there.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use rbd2qcow2_core::chain::catalogue::Images;
use rbd2qcow2_core::chain::names::NameError;
use rbd2qcow2_core::chain::{ImageName, PointName};

use crate::names;

/// What was named of one image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Named {
    /// Whether the image was, as a whole.
    pub whole: bool,
    /// Its points that were.
    pub points: BTreeSet<PointName>,
}

/// Why a name means nothing. The others do.
#[derive(Debug, thiserror::Error)]
pub enum NotFound {
    /// There is no such image.
    #[error("{} holds no backups of image {image:?}{hint}", dest.display())]
    Image {
        /// The directory of all images.
        dest: PathBuf,
        /// The image that was asked for.
        image: String,
        /// What may have been meant.
        hint: String,
    },
    /// What stands behind the `@` is no point.
    #[error("{asked:?} is no point")]
    Point {
        /// What was asked for.
        asked: String,
        /// What is wrong with it.
        #[source]
        cause: NameError,
    },
}

/// What `asked` means, where the destination `dest` holds the images `there`. Whether an image has a
/// point that is named is not looked at.
pub fn select(
    dest: &Path,
    asked: &[String],
    there: &[ImageName],
) -> (BTreeMap<ImageName, Named>, Vec<NotFound>) {
    let mut found: BTreeMap<_, Named> = BTreeMap::new();
    let mut failures = Vec::new();
    for asked in asked {
        match find(dest, asked, there) {
            Ok((image, Some(point))) => _ = found.entry(image).or_default().points.insert(point),
            Ok((image, None)) => found.entry(image).or_default().whole = true,
            Err(error) => failures.push(error),
        }
    }
    (found, failures)
}

/// The image and point that `asked` names. Names of images may hold an `@`; RBD knows none in those that
/// it makes, so that the last one begins the point's name.
pub fn find(
    dest: &Path,
    asked: &str,
    there: &[ImageName],
) -> Result<(ImageName, Option<PointName>), NotFound> {
    let known = |name: &str| there.iter().find(|image| image.as_str() == name).cloned();
    if let Some(image) = known(asked) {
        return Ok((image, None));
    }
    let named = asked.rsplit_once('@').and_then(|(image, point)| Some((known(image)?, point)));
    let Some((image, point)) = named else {
        let image = asked.split_once('@').map_or(asked, |(image, _)| image);
        let hint = names::alike(image, there.iter().map(ImageName::as_str));
        return Err(NotFound::Image { dest: dest.to_owned(), image: asked.to_owned(), hint });
    };
    match PointName::parse(point) {
        Ok(point) => Ok((image, Some(point))),
        Err(cause) => Err(NotFound::Point { asked: asked.to_owned(), cause }),
    }
}

/// Says of the destination `dest`, which holds no image, what was found there, and what to check.
pub fn nothing_in(dest: &Path, found: &Images) -> String {
    let others = match &found.foreign[..] {
        [] => "is empty".to_owned(),
        [only] => format!("holds no image's backups, only {}", only.display()),
        [first, ..] => format!("holds no image's backups, only {} and the like", first.display()),
    };
    format!(
        "{} {others}; is the file system mounted that should be there, and is this the directory that \
         `backup` was given?",
        dest.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn there() -> [ImageName; 3] {
        ["vm", "v@m", "a@20261122T173312Z"].map(|name| ImageName::new(name).unwrap())
    }

    #[test]
    fn points_are_told_from_images() {
        let there = there();
        let find = |asked| find(Path::new("/b"), asked, &there);
        let point = PointName::parse("20261122T173312Z").unwrap();
        assert_eq!(find("vm").unwrap(), (there[0].clone(), None));
        assert_eq!(find("vm@20261122T173312Z").unwrap(), (there[0].clone(), Some(point)));
        assert_eq!(find("v@m").unwrap(), (there[1].clone(), None));
        assert_eq!(find("v@m@20261122T173312Z").unwrap(), (there[1].clone(), Some(point)));
        assert_eq!(find("a@20261122T173312Z").unwrap(), (there[2].clone(), None));
        assert!(matches!(find("a"), Err(NotFound::Image { .. })));
        assert!(matches!(find("vm@yesterday"), Err(NotFound::Point { .. })));
    }

    #[test]
    fn names_of_one_image_are_taken_together() {
        let asked = ["vm@20261122T173312Z", "x", "vm", "vm@20261122T173312Z"].map(str::to_owned);
        let (found, failures) = select(Path::new("/b"), &asked, &there());
        let points = BTreeSet::from([PointName::parse("20261122T173312Z").unwrap()]);
        assert_eq!(found, BTreeMap::from([(there()[0].clone(), Named { whole: true, points })]));
        assert_eq!(failures.len(), 1);
    }
}

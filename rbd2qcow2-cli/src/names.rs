//! Names that were perhaps meant by one that does not exist.

use std::path::Path;

use rbd2qcow2_core::chain::{self, PointName};
use rbd2qcow2_core::point::PointError;

use crate::outcome::CommandError;

/// Names alike less than this (1 is the same name) are not worth a suggestion.
const LIKENESS: f64 = 0.75;

/// How many names are suggested.
const SUGGESTIONS: usize = 3;

/// Those of the names `there` that are most like `asked`, as the end of a sentence; empty where none
/// is.
pub fn alike<'a>(asked: &str, there: impl IntoIterator<Item = &'a str>) -> String {
    let mut near: Vec<_> = there.into_iter().map(|name| (strsim::jaro_winkler(asked, name), name)).collect();
    near.retain(|&(likeness, _)| likeness >= LIKENESS);
    near.sort_by(|(left, _), (right, _)| right.total_cmp(left));
    suggest(near.into_iter().map(|(_, name)| name))
}

/// The first few of `names`, which come best first, as the end of a sentence; empty where there are
/// none.
pub fn suggest<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let names: Vec<_> = names.into_iter().take(SUGGESTIONS).map(|name| format!("{name:?}")).collect();
    if names.is_empty() { String::new() } else { format!("; did you mean {}?", names.join(" or ")) }
}

/// Tells which names may have been meant, where one is unknown.
pub fn explain(error: PointError, dest: &Path) -> CommandError {
    let hint = match &error {
        PointError::UnknownImage { image, .. } => nearest_image(image.as_str(), dest),
        PointError::UnknownPoint { point, known, .. } => nearest_point(*point, known),
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
        let points = alike(point, points.iter().map(String::as_str));
        return format!(": {point:?} names no point of image {:?}{points}", image.as_str());
    }
    alike(asked, found.images.iter().map(|image| image.as_str()))
}

/// The points nearest in time, as the end of a sentence; empty where there are none.
pub fn nearest_point(asked: PointName, known: &[PointName]) -> String {
    let distance = |point: &PointName| point.timestamp().as_second().abs_diff(asked.timestamp().as_second());
    let mut near = known.to_vec();
    near.sort_by_key(distance);
    let near: Vec<_> = near.iter().map(ToString::to_string).collect();
    suggest(near.iter().map(String::as_str))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_suggested_nearest_first() {
        let there = ["vm-web-1", "vm-web-2", "database", "vm"];
        assert_eq!(alike("vm-wbe-1", there), r#"; did you mean "vm-web-1" or "vm-web-2" or "vm"?"#);
        assert_eq!(alike("databse", there), r#"; did you mean "database"?"#);
        assert_eq!(alike("zzz", there), "");
    }

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

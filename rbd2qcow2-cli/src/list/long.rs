//! Chains that are longer than is good for them.

use super::listing::Listing;

/// Layers of a point that nobody needs to be told of. Dozens are comfortable; every one costs at each opening,
/// and with more than a thousand, other programs have no more files to open.
const COMFORTABLE: usize = 200;

/// What to tell of the image's longest chain, where it is too long.
pub fn warning(listing: &Listing) -> Option<String> {
    let points = listing.catalogue.points();
    let mut layers: Vec<usize> = Vec::with_capacity(points.len());
    for (number, point) in points.iter().enumerate() {
        // Parents are older, so they were counted before.
        let parent = point
            .parent
            .and_then(|parent| points[..number].binary_search_by_key(&parent, |point| point.name).ok());
        layers.push(parent.map_or(1, |parent| layers[parent] + 1));
    }
    let most = layers.iter().copied().max().filter(|layers| *layers > COMFORTABLE)?;
    let newest = points.iter().zip(&layers).rfind(|(_, layers)| **layers == most)?.0.name;
    Some(format!(
        "point {newest} lies on a long chain of {most} layers, each of which is a file that everybody who reads the \
         point has to open; `prune` puts layers together"
    ))
}

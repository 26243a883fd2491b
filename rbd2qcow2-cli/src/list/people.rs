//! The listing for people: a tree for each image, in one table.
//!
//! Its lines are 80 columns wide as long as nothing branches. Names of images may be of any length,
//! so they have lines of their own. The tree is drawn with box characters whatever the locale says:
//! names are UTF-8, too, and a service's locale says nothing about who reads its log.

use std::cmp::Ordering;
use std::io::{self, Write};
use std::time::Duration;

use console::Alignment;
use indicatif::{HumanBytes, HumanDuration};
use jiff::Timestamp;
use rbd2qcow2_core::chain::{Point, PointKind};

use super::listing::Listing;
use super::row::created;
use crate::human::{self, count};
use crate::table::{self, Column, Line};

/// What is told of a point. The last column is there for few of them.
const COLUMNS: [Column; 8] = [
    ("POINT", Alignment::Left),
    ("KIND", Alignment::Left),
    ("CREATED (UTC)", Alignment::Left),
    ("AGE", Alignment::Right),
    ("SIZE", Alignment::Right),
    ("ON DISK", Alignment::Right),
    ("NEEDED BY", Alignment::Right),
    ("", Alignment::Left),
];

/// Writes all images and totals, with ages as of `now`.
///
/// # Errors
/// What writing met.
pub fn write(output: &mut impl Write, listings: &[Listing], now: Timestamp) -> io::Result<()> {
    let mut lines = Vec::new();
    let (mut points, mut bytes) = (0, 0_u64);
    for listing in listings {
        let all: Vec<_> = (0..listing.catalogue.points().len()).collect();
        points += all.len();
        bytes = bytes.saturating_add(listing.bytes(&all));
        lines.push(Line::Text(heading(listing, &all)));
        draw(listing, now, &mut lines);
        lines.push(Line::Text(String::new()));
    }
    if points > 0 {
        table::write(output, &COLUMNS, &lines)?;
    } else {
        // Nothing stands in columns.
        for line in &lines {
            if let Line::Text(text) = line {
                writeln!(output, "{text}")?;
            }
        }
    }
    let images = count(listings.len(), "image");
    writeln!(output, "{images}, {}, files of {}", count(points, "point"), HumanBytes(bytes))
}

/// What is told of an image as a whole.
fn heading(listing: &Listing, points: &[usize]) -> String {
    let chains = match listing.forest.trees().len() {
        0 | 1 => String::new(),
        several => format!(" in {several} chains"),
    };
    let pools = listing.pools();
    let from =
        if pools.is_empty() { String::new() } else { format!(", from {}", human::name(&pools.join(", "))) };
    let image = human::name(listing.catalogue.image().as_str());
    format!("{image}: {}{from}", held(listing, points, &chains))
}

/// How many points there are, and what they take.
fn held(listing: &Listing, points: &[usize], chains: &str) -> String {
    format!("{}{chains}, files of {}", count(points.len(), "point"), HumanBytes(listing.bytes(points)))
}

/// Draws the chains of an image.
fn draw(listing: &Listing, now: Timestamp, lines: &mut Vec<Line<{ COLUMNS.len() }>>) {
    let (forest, needed_by) = (&listing.forest, listing.forest.needed_by());
    for (number, tree) in forest.trees().iter().enumerate() {
        let (stem, drawn) = forest.draw(tree, number + 1 == forest.trees().len());
        let held = held(listing, &forest.members(tree), "");
        lines.push(Line::Text(format!("{stem}{}: {held}", listing.chain_name(tree))));
        lines.extend(drawn.iter().map(|line| {
            let point = &listing.catalogue.points()[line.point];
            let created = created(point);
            Line::Cells([
                format!("{}{}", line.stem, point.name),
                kind(point).to_owned(),
                created.strftime("%F %H:%M").to_string(),
                age(created, now),
                virtual_size(point, listing.parent(point)),
                human::size(point.layer_bytes),
                needed_by[line.point].to_string(),
                marks(listing, point),
            ])
        }));
    }
}

/// What is special about a point.
fn marks(listing: &Listing, point: &Point) -> String {
    let held = point.manifest.as_ref().is_some_and(|manifest| manifest.hold.is_some());
    let suspect = listing.catalogue.suspicion(point).is_some();
    let marks = [(!point.sound, "broken"), (suspect, "suspect"), (held, "held")];
    let marks: Vec<_> = marks.into_iter().filter_map(|(is_so, mark)| is_so.then_some(mark)).collect();
    marks.join(", ")
}

fn kind(point: &Point) -> &'static str {
    match point.kind {
        Some(PointKind::Full) => "full",
        // In full it would not leave enough of the 80 columns.
        Some(PointKind::Incremental) => "incr",
        None => "?",
    }
}

/// The time since `created`, roughly. Nothing for a time to come, which a wrong clock wrote.
fn age(created: Timestamp, now: Timestamp) -> String {
    let age = Duration::try_from(now.duration_since(created));
    age.map_or_else(|_| String::new(), |age| format!("{:#}", HumanDuration(age)))
}

/// The size that a guest sees, with an arrow where the image had grown or shrunk.
fn virtual_size(point: &Point, parent: Option<&Point>) -> String {
    let Some(bytes) = point.virtual_size() else { return "?".to_owned() };
    // Without a manifest there is the layer's header, which tells whole sectors.
    let exact = parent.is_none_or(|parent| parent.manifest.is_some()) && point.manifest.is_some();
    let units = |bytes: u64| bytes.div_ceil(if exact { 1 } else { 512 });
    let before = parent.and_then(Point::virtual_size);
    let arrow = match before.map(|before| units(bytes).cmp(&units(before))) {
        Some(Ordering::Greater) => "↑",
        Some(Ordering::Less) => "↓",
        Some(Ordering::Equal) | None => "",
    };
    format!("{arrow}{}", human::size(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_said_to_be_nothing() {
        let mut text = Vec::new();
        write(&mut text, &[], Timestamp::UNIX_EPOCH).unwrap();
        assert_eq!(String::from_utf8(text).unwrap(), "0 images, 0 points, files of 0 B\n");
    }

    #[test]
    fn a_point_from_the_future_has_no_age() {
        let now: Timestamp = "2026-11-22T17:33:12Z".parse().unwrap();
        assert_eq!(age(now + Duration::from_secs(5), now), "");
        assert_eq!(age(now - Duration::from_secs(50), now), "50s");
    }
}

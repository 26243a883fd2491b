//! What is not as it should be with an image.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use indicatif::HumanBytes;
use jiff::Timestamp;

use super::listing::{Activity, Listing};
use crate::human::{self, count};

/// So far may the clocks of two machines differ without a word.
const SKEW: Duration = Duration::from_secs(60);

/// All of it, as texts of one or several lines. `now` tells which points are named in the future.
pub fn of(listing: &Listing, now: Timestamp) -> Vec<String> {
    let problems = listing.catalogue.problems().iter();
    let mut found: Vec<_> = problems.map(|problem| human::causes_block(problem)).collect();
    let image = format!("image {:?}", listing.catalogue.image().as_str());
    let mut about = |text: Option<String>| found.extend(text.map(|text| format!("{image}: {text}")));
    match listing.activity {
        Activity::Writing(run) => about(Some(format!("{run}; what it makes is not listed yet"))),
        // What seems to be left over may be in use.
        Activity::Unknown => {}
        Activity::Idle => {
            about(left_over(listing));
            about(announced(listing));
            about(half_merged(listing));
        }
    }
    if listing.catalogue.points().is_empty() && !matches!(listing.activity, Activity::Writing(_)) {
        about(Some("no backup of it was completed yet".to_owned()));
    }
    for suspicion in listing.catalogue.suspicions() {
        about(Some(suspicion.describe()));
    }
    about(in_the_future(listing, now));
    for old in old_chains(listing) {
        about(Some(old));
    }
    found
}

/// Files that only the next backup has a use for: to remove them. Each is named in the log.
fn left_over(listing: &Listing) -> Option<String> {
    let files = listing.catalogue.leftovers();
    let first = files.first()?;
    for path in files {
        log::debug!("{} is left over from a run that did not end", path.display());
    }
    // One that is gone meanwhile takes nothing.
    let bytes =
        files.iter().filter_map(|path| Some(fs::symlink_metadata(path).ok()?.blocks().saturating_mul(512)));
    let bytes = bytes.fold(0, u64::saturating_add);
    let more = if files.len() > 1 { ", ..." } else { "" };
    Some(format!(
        "{} of a run that did not end, {} on disk ({}{more}); the next backup of the image removes what it left",
        count(files.len(), "file"),
        HumanBytes(bytes),
        first.display()
    ))
}

/// A snapshot in the cluster that no point tells of.
fn announced(listing: &Listing) -> Option<String> {
    let catalogue = &listing.catalogue;
    match catalogue.announced() {
        Ok(None) => None,
        // The run was stopped behind the commit: the snapshot is that of a point.
        Ok(Some(note)) if catalogue.chain_ids().contains(&note.snapshot.chain) => None,
        Ok(Some(note)) => Some(format!(
            "a run did not reach the first point of its chain; the snapshot {}, if it is there, goes with the next \
             backup of the image",
            note.snapshot
        )),
        Err(error) => Some(human::causes_block(&error)),
    }
}

/// Points whose layers a merge has still to put into those that they build upon.
fn half_merged(listing: &Listing) -> Option<String> {
    let points: Vec<_> = listing.catalogue.half_merged().map(|point| point.name.to_string()).collect();
    let (points, are, them) = match points.len() {
        0 => return None,
        1 => (format!("point {}", points[0]), "is", "it"),
        _ => (format!("points {}", points.join(", ")), "are", "them"),
    };
    Some(format!(
        "{points} {are} whole, but a run that was cut short has left the layer of another point, which is gone, \
         below {them}; the next `prune` of the image completes that"
    ))
}

/// Points that a clock which was wrong has named, or so it seems to one which is wrong now.
fn in_the_future(listing: &Listing, now: Timestamp) -> Option<String> {
    let limit = now.saturating_add(SKEW).unwrap_or(Timestamp::MAX);
    let points = listing.catalogue.points().iter().map(|point| point.name);
    let later: Vec<_> = points.filter(|point| point.timestamp() > limit).collect();
    let newest = later.last()?;
    Some(format!(
        "{} named in the future, the newest {newest}; the clock was wrong then, or is now (the next points are \
         numbered on from there)",
        match later.len() {
            1 => "a point is".to_owned(),
            several => format!("{several} points are"),
        }
    ))
}

/// Chains other than that of the newest point, which the next backup does not build upon.
fn old_chains(listing: &Listing) -> Vec<String> {
    let points = listing.catalogue.points();
    let mut old = Vec::new();
    for tree in listing.forest.trees() {
        let members = listing.forest.members(tree);
        let Some(&newest) = members.last() else { continue };
        if newest + 1 == points.len() {
            continue;
        }
        old.push(format!(
            "{} is not continued since {}; it holds {}, files of {}",
            listing.chain_name(tree),
            points[newest].name,
            count(members.len(), "point"),
            HumanBytes(listing.bytes(&members))
        ));
    }
    old
}

//! The note about points that may lack something.
//!
//! When a backup finds that what its base point holds is not what the image holds where nothing is reported
//! to have changed, some change was lost on the way: on that night or on one before. All points of that chain up
//! to the base are suspect then, and no later one may be built upon them by asking what changed since. One that
//! compares the whole image with them is right again, and is not concerned.
//!
//! The note stays as long as a point is there that it concerns.
//!
//! On disk: JSON, spelled and with a checksum as manifests are: `format` (1), `image`, and `suspicions`, each with
//! `chain` (its id; `null` for the points of the Python tool alone), `upon_python` (whether the chain begins
//! with points of that tool), `point` (the newest that is concerned), `found` (RFC 3339), `why` (`differs` or
//! `unreadable`) and `offsets` (the first bytes of the pages that were found to differ, some of them). A note that
//! cannot be read concerns all points.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::catalogue::Point;
use super::error::ChainError;
use super::manifest::{ManifestError, read_bounded, signed, unsigned};
use super::names::{ChainId, ImageName, PointName};
use super::{ChainWriter, SUSPECT_FILE, SUSPECT_PARTIAL, durable};

/// Longest note that is read, in bytes.
const SUSPECT_MAX: u64 = 1 << 20;

/// How many offsets are noted, at most.
const OFFSETS_KEPT: usize = 64;

/// What is wrong with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Doubt {
    /// It lacks a change, or holds what never was.
    Differs,
    /// It cannot be read, so nothing can be held against it.
    Unreadable,
}

/// Points that may not be what their snapshots were.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suspicion {
    /// Whose.
    concerned: Concerned,
    /// The newest of them.
    pub point: PointName,
    /// When that was found.
    pub found: Timestamp,
    /// What is wrong.
    pub doubt: Doubt,
    /// Where, in bytes of the image: some of the pages.
    pub offsets: Vec<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Concerned {
    /// A chain, with the points of the Python tool that it may begin with.
    Chain { chain: Option<ChainId>, upon_python: bool },
    /// All points: the note is damaged.
    All,
}

/// A note as it stands in the file. Nothing here was checked.
#[derive(Serialize, Deserialize)]
struct RawNote {
    format: u64,
    image: String,
    suspicions: Vec<RawSuspicion>,
}

#[derive(Serialize, Deserialize)]
struct RawSuspicion {
    chain: Option<String>,
    upon_python: bool,
    point: String,
    found: String,
    why: Doubt,
    offsets: Vec<u64>,
}

impl Suspicion {
    /// Whether a point is among those.
    #[must_use]
    pub fn concerns(&self, point: &Point) -> bool {
        let chain = point.manifest.as_ref().map(|manifest| manifest.record.chain);
        let member = match (self.concerned, chain) {
            (Concerned::All, _) => true,
            (Concerned::Chain { chain: ours, .. }, Some(chain)) => ours == Some(chain),
            // Nobody can tell whose it is, unless the Python tool made it.
            (Concerned::Chain { upon_python, .. }, None) => upon_python || !point.name.is_python(),
        };
        member && point.name <= self.point
    }

    /// What was found, in words, with what to do about it.
    #[must_use]
    pub fn describe(&self) -> String {
        match (self.concerned, self.doubt) {
            (Concerned::All, _) => format!(
                "the note {SUSPECT_FILE} about suspect points cannot be read, so that all points up to {} are \
                 taken for suspect; the next backup compares the image with them",
                self.point
            ),
            (_, Doubt::Differs) => format!(
                "points up to {} may lack changes: on {} a backup found that point to differ from the image where \
                 nothing is reported to have changed since ({}); later points were compared with the whole image, \
                 and so will be the next",
                self.point,
                self.found.strftime("%F"),
                match &self.offsets[..] {
                    [] => "somewhere".to_owned(),
                    [only] => format!("in the page at byte {only}"),
                    [first, ..] => format!("in {} pages, the first at byte {first}", self.offsets.len()),
                }
            ),
            (_, Doubt::Unreadable) => format!(
                "point {} could not be read by a backup on {}; run `verify`; the next backup begins a new chain",
                self.point,
                self.found.strftime("%F"),
            ),
        }
    }
}

/// Reads the note in `directory`, whose newest point is `newest`. No note, no suspicion.
pub(super) fn read(directory: &Path, image: &ImageName, newest: Option<PointName>) -> Vec<Suspicion> {
    let bytes = match read_bounded(&directory.join(SUSPECT_FILE), SUSPECT_MAX) {
        Err(ManifestError::Missing) => return Vec::new(),
        bytes => bytes.ok(),
    };
    let raw = bytes.and_then(|bytes| serde_json::from_value::<RawNote>(unsigned(&bytes)?).ok());
    let note = raw.filter(|raw| raw.format == 1 && raw.image == image.as_str());
    let parsed = note.and_then(|note| note.suspicions.into_iter().map(parse).collect::<Option<Vec<_>>>());
    parsed.unwrap_or_else(|| {
        let all = |point| Suspicion {
            concerned: Concerned::All,
            point,
            found: Timestamp::UNIX_EPOCH,
            doubt: Doubt::Differs,
            offsets: Vec::new(),
        };
        newest.map(all).into_iter().collect()
    })
}

fn parse(raw: RawSuspicion) -> Option<Suspicion> {
    let chain = raw.chain.map(|chain| ChainId::parse(&chain)).transpose().ok()?;
    Some(Suspicion {
        concerned: Concerned::Chain { chain, upon_python: raw.upon_python },
        point: PointName::parse(&raw.point).ok()?,
        found: raw.found.parse().ok()?,
        doubt: raw.why,
        offsets: raw.offsets,
    })
}

fn spell(suspicion: &Suspicion) -> Option<RawSuspicion> {
    let Concerned::Chain { chain, upon_python } = suspicion.concerned else { return None };
    Some(RawSuspicion {
        chain: chain.map(|chain| chain.to_string()),
        upon_python,
        point: suspicion.point.to_string(),
        found: suspicion.found.to_string(),
        why: suspicion.doubt,
        offsets: suspicion.offsets.clone(),
    })
}

impl ChainWriter {
    /// Notes durably that `point` and those below it are suspect, with some of the `offsets` where it was
    /// found to differ. Known to the catalogue when it is read again.
    ///
    /// # Errors
    /// [`ChainError::Io`]; whether the note is there is uncertain then.
    pub fn suspect(&self, point: &Point, doubt: Doubt, offsets: &[u64]) -> Result<(), ChainError> {
        let chain_of = |point: &Point| point.manifest.as_ref().map(|manifest| manifest.record.chain);
        // Whatever cannot be told is concerned.
        let upon_python = self
            .catalogue
            .ancestry(point.name)
            .map_or(true, |points| points.iter().any(|point| point.name.is_python()));
        let suspicion = |chain| Suspicion {
            concerned: Concerned::Chain { chain, upon_python },
            point: point.name,
            found: Timestamp::now(),
            doubt,
            offsets: offsets.iter().copied().take(OFFSETS_KEPT).collect(),
        };
        let mut all = self.legible_suspicions();
        let new = suspicion(chain_of(point));
        all.retain(|old| old.concerned != new.concerned || old.point > new.point);
        all.push(new);
        self.write_suspicions(&all)
    }

    /// Removes from the note what concerns no point any more: after points were forgotten. A note that could
    /// not be read is replaced by one about all points of the catalogue; so that a point which was compared with
    /// them is no longer concerned, this is to be called before the catalogue is read again.
    ///
    /// # Errors
    /// [`ChainError::Io`]; the next run tries again.
    pub fn settle_suspicions(&self) -> Result<(), ChainError> {
        let before = self.catalogue.suspicions();
        let mut after = self.legible_suspicions();
        after.retain(|suspicion| self.catalogue.points().iter().any(|point| suspicion.concerns(point)));
        if after == before { Ok(()) } else { self.write_suspicions(&after) }
    }

    /// The suspicions, with one for each chain in place of a note that cannot be read.
    fn legible_suspicions(&self) -> Vec<Suspicion> {
        let mut legible = Vec::new();
        for suspicion in self.catalogue.suspicions() {
            if suspicion.concerned != Concerned::All {
                legible.push(suspicion.clone());
                continue;
            }
            let chains = self.catalogue.chain_ids().into_iter().map(Some).chain([None]);
            legible.extend(chains.map(|chain| Suspicion {
                concerned: Concerned::Chain { chain, upon_python: chain.is_none() },
                found: Timestamp::now(),
                ..suspicion.clone()
            }));
        }
        legible
    }

    fn write_suspicions(&self, suspicions: &[Suspicion]) -> Result<(), ChainError> {
        let (partial, path) = (self.directory.join(SUSPECT_PARTIAL), self.suspect_note());
        if suspicions.is_empty() {
            return if durable::remove(&path)? { durable::sync_directory(&self.directory) } else { Ok(()) };
        }
        let note = RawNote {
            format: 1,
            image: self.image.as_str().to_owned(),
            suspicions: suspicions.iter().filter_map(spell).collect(),
        };
        let value = serde_json::to_value(note);
        let value = value.map_err(|error| ChainError::io("write", &path)(std::io::Error::from(error)))?;
        durable::write_aside(&partial, &signed(value))?;
        durable::replace(&partial, &path).inspect_err(|_| _ = durable::remove(&partial))?;
        durable::sync_directory(&self.directory)
    }

    fn suspect_note(&self) -> PathBuf {
        self.directory.join(SUSPECT_FILE)
    }
}

#[cfg(test)]
mod tests;

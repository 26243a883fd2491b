//! Whether points hold what was backed up, by the directory alone; or by their snapshots, too.
//!
//! Of each layer three things are looked at: what the catalogue has to say of its files (the *links*
//! between manifest, header and parent), its tables and refcounts (the *structure*), and every piece of
//! data against its digest (the *content*). A layer holds what its digests say, no less and no more.
//!
//! Damage is found in a layer, but it is points that people restore. So each damaged range is
//! followed upwards through the chain: a point is affected unless a newer layer holds the range itself.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::cancel::Cancel;
use crate::chain::lock::ChainLock;
use crate::chain::names::PointFile;
use crate::chain::{
    Catalogue, ChainError, Doubt, ImageName, Point, PointName, Problem, Suspicion, image_directory,
};
use crate::progress::Amount;

mod affected;
mod coverage;
mod damage;
mod finding;
mod layer;
#[cfg(feature = "rbd")]
mod snapshots;
mod source;
mod unverified;

use affected::affected;
pub use finding::Finding;
use layer::Verdict;
#[cfg(feature = "rbd")]
pub use snapshots::ClusterSnapshots;
use source::SourceVerdict;
pub use source::{Found, Snapshots, SourceStatus};
pub use unverified::{Unverified, reason};

#[cfg(test)]
mod tests;

/// How many findings a point's report lists at most. The rest is counted.
pub const FINDINGS_KEPT: usize = 100;

/// Which data are looked at.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// How much of them, from 0 to 100.
    pub percent: f64,
    /// Another one chooses other data.
    pub seed: u64,
}

/// How points are verified. `Default` is all of it, with a thread for each processor.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct VerifyOptions {
    /// The content that is looked at; `None` is all. Links and structure are always looked at.
    pub sample: Option<Sample>,
    /// Threads that read and hash, at least 1.
    pub parallel: usize,
    /// Reads in flight where points are compared with their snapshots, at least 1.
    pub source_reads: usize,
}

impl Default for VerifyOptions {
    fn default() -> Self {
        let parallel = std::thread::available_parallelism().map_or(1, usize::from);
        Self { sample: None, parallel, source_reads: 16 }
    }
}

/// What is known of a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VerifyStatus {
    /// It holds what was backed up, as far as that was looked at.
    Ok,
    /// Something is not as it was.
    Damaged,
    /// Nothing wrong was found, but some data, of its layer or of one below, cannot be held against what was
    /// backed up: see [`PointReport::unverified`].
    Unverifiable,
    /// Nothing is wrong with its files, but a later backup found that changes were lost on the way to it, or
    /// to a point above it: see [`PointReport::suspicion`].
    Suspect,
}

impl VerifyStatus {
    /// The word that stands for it in reports.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Damaged => "damaged",
            Self::Unverifiable => "unverifiable",
            Self::Suspect => "suspect",
        }
    }
}

/// What was found out about a point.
#[derive(Debug)]
#[non_exhaustive]
pub struct PointReport {
    /// The point.
    pub point: PointName,
    /// What is known of it.
    pub status: VerifyStatus,
    /// Bytes of data of its own layer that were held against their digests.
    pub checked_bytes: u64,
    /// What is wrong, the first [`FINDINGS_KEPT`] of it.
    pub findings: Vec<Finding>,
    /// How many more findings there are.
    pub more: u64,
    /// Why it is not known whether its data are what was backed up; empty where that is known. The oldest
    /// layer comes first.
    pub unverified: Vec<Unverified>,
    /// Why it may lack changes, in words; `None` where nothing is known against it.
    pub suspicion: Option<String>,
    /// How it compares with the snapshot that it was taken from; `None` where that was not asked.
    pub source: Option<SourceStatus>,
}

/// Why an image could not be looked at.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// The directory could not be read or locked.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// There is no such point.
    #[error(transparent)]
    NoSuchPoint(Problem),
    /// A thread could not be started.
    #[error("cannot start a thread")]
    Thread(#[source] std::io::Error),
    /// A stop was asked for.
    #[error("interrupted; what was not looked at is not known to be good")]
    Cancelled,
}

/// How far a verification has come, in bytes of data: what there is to be read, as far as layers have been
/// opened, and what was read.
pub type VerifyProgress = Amount;

/// Points of one image to be verified.
#[derive(Clone, Copy)]
pub struct VerifyImage<'a> {
    /// The directory that holds a directory for each image.
    pub dest: &'a Path,
    /// The image.
    pub image: &'a ImageName,
    /// Its points; none means all.
    pub points: &'a [PointName],
    /// How.
    pub options: &'a VerifyOptions,
    /// Where the snapshots are that the points are compared with, bit for bit; `None` for not at all.
    pub snapshots: Option<&'a dyn Snapshots>,
    /// Is counted up.
    pub progress: &'a VerifyProgress,
    /// Asks for a stop.
    pub cancel: &'a Cancel,
}

impl VerifyImage<'_> {
    /// Verifies the points and, once each, all layers that they build upon. Reports on the points
    /// that were asked for, the oldest first.
    ///
    /// Holds the chain's lock with other readers until the end. Blocks while it reads all data, or a
    /// sample; takes some 40 MiB, and 3 clusters for each thread.
    ///
    /// # Errors
    /// [`VerifyError`], when nothing can be said. Whatever is wrong with points is in their reports.
    pub fn run(&self) -> Result<Vec<PointReport>, VerifyError> {
        let directory = image_directory(self.dest, self.image);
        // Before anything is created: the lock would make a file.
        Catalogue::read(&directory, self.image)?;
        let _lock = ChainLock::shared(&directory)?;
        let catalogue = Catalogue::read(&directory, self.image)?;
        let wanted = self.wanted(&catalogue)?;
        let needed = with_ancestors(&catalogue, &wanted);
        let mut verdicts = BTreeMap::new();
        // What a base has lost is told of the point that builds upon it.
        let mut of_bases: BTreeMap<PointName, Vec<Finding>> = BTreeMap::new();
        for point in needed.iter().filter_map(|name| catalogue.layer(*name)) {
            let mut based = catalogue.points().iter().filter(|above| above.base == Some(point.name));
            let above = if catalogue.point(point.name).is_none() { based.next() } else { None };
            let verdict = layer::verify(point, above, self)?;
            if let Some(above) = above {
                let lost =
                    verdict.findings.iter().filter(|finding| matches!(finding, Finding::Digests { .. }));
                of_bases.entry(above.name).or_default().extend(lost.cloned());
            }
            verdicts.insert(point.name, verdict);
        }
        let mut sources = self.compare_with_snapshots(&catalogue, &wanted)?;
        let mut damage = BTreeMap::new();
        let mut differing = BTreeMap::new();
        for (name, verdict) in &mut verdicts {
            damage.insert(*name, std::mem::take(&mut verdict.damage).into_ranges());
            differing.insert(*name, sources.get(name).map_or_else(Vec::new, |source| source.ranges.clone()));
        }
        let mut inherited = affected(&catalogue, &needed, damage);
        for (name, findings) in affected(&catalogue, &needed, differing) {
            // What was changed back since, without a trace, is right again: it was compared.
            if sources.get(&name).is_none_or(|source| source.status != SourceStatus::Same) {
                inherited.entry(name).or_default().extend(findings);
            }
        }
        for (name, findings) in of_bases {
            inherited.entry(name).or_default().extend(findings);
        }
        let gaps: BTreeMap<_, _> = needed
            .iter()
            .filter_map(|name| Some((*name, unverified::of(&catalogue, *name, verdicts.get(name)?)?)))
            .collect();
        let report = |name| {
            let inherited = inherited.get(&name).map_or(&[][..], Vec::as_slice);
            let below = with_ancestors(&catalogue, &[name]);
            let unverified = below.iter().filter_map(|name| gaps.get(name)).cloned().collect();
            let verdict = verdicts.remove(&name).unwrap_or_default();
            report(&catalogue, name, verdict, sources.remove(&name), inherited, unverified)
        };
        Ok(wanted.into_iter().map(report).collect())
    }

    fn compare_with_snapshots(
        &self,
        catalogue: &Catalogue,
        wanted: &[PointName],
    ) -> Result<BTreeMap<PointName, SourceVerdict>, VerifyError> {
        let Some(snapshots) = self.snapshots else { return Ok(BTreeMap::new()) };
        let compare = |name: &PointName| Ok((*name, source::compare(snapshots, catalogue, *name, self)?));
        wanted.iter().map(compare).collect()
    }

    fn wanted(&self, catalogue: &Catalogue) -> Result<Vec<PointName>, VerifyError> {
        if self.points.is_empty() {
            return Ok(catalogue.points().iter().map(|point| point.name).collect());
        }
        for name in self.points {
            if let (None, Err(problem)) = (catalogue.point(*name), catalogue.ancestry(*name)) {
                return Err(VerifyError::NoSuchPoint(problem));
            }
        }
        Ok(self.points.iter().copied().collect::<BTreeSet<_>>().into_iter().collect())
    }
}

/// What was found out about a single layer.
pub(crate) struct LayerReport {
    /// The first thing that is wrong.
    pub(crate) finding: Option<Finding>,
    /// Whether there were digests to hold the content against, and a manifest that tells what these are
    /// worth.
    pub(crate) has_digests: bool,
}

/// Verifies all content of the layers of some points of an image, whose lock the caller holds: those of a
/// chain, the newest first, with their bases. Reports on them in this order, and ends with the first layer
/// that is damaged. What the catalogue has found is not repeated. `progress` is counted up.
///
/// # Errors
/// [`VerifyError::Cancelled`], [`VerifyError::Thread`].
pub(crate) fn verify_layers(
    image: &ImageName,
    points: &[&Point],
    progress: &VerifyProgress,
    cancel: &Cancel,
) -> Result<Vec<LayerReport>, VerifyError> {
    let run = VerifyImage {
        dest: Path::new(""),
        image,
        points: &[],
        options: &VerifyOptions::default(),
        snapshots: None,
        progress,
        cancel,
    };
    let mut reports = Vec::new();
    let mut last = None;
    for point in points {
        let above = last.filter(|above: &&Point| above.base == Some(point.name));
        let verdict = layer::verify(point, above, &run)?;
        let mut finding = verdict.findings.into_iter().next();
        let mut has_digests = verdict.verifiable && point.manifest.is_some();
        if above.is_some() {
            // Its manifest is gone, and that of the point above tells what it took over.
            has_digests = verdict.verifiable;
            finding = finding.filter(|_| !verdict.damage.is_empty());
        }
        last = Some(point);
        let damaged = finding.is_some();
        reports.push(LayerReport { finding, has_digests });
        if damaged {
            break;
        }
    }
    Ok(reports)
}

/// The points and whatever they build upon, as far as it is there.
fn with_ancestors(catalogue: &Catalogue, points: &[PointName]) -> BTreeSet<PointName> {
    let mut needed = BTreeSet::new();
    for name in points {
        let mut next = Some(*name);
        while let Some(point) = next.and_then(|name| catalogue.layer(name))
            && needed.insert(point.name)
        {
            next = point.below();
        }
    }
    needed
}

/// Puts together what is known of a point: of its files, its layer, and the layers below.
fn report(
    catalogue: &Catalogue,
    point: PointName,
    verdict: Verdict,
    source: Option<SourceVerdict>,
    inherited: &[Finding],
    unverified: Vec<Unverified>,
) -> PointReport {
    let mut findings: Vec<Finding> = problems_of(catalogue, point).map(Finding::from).collect();
    if let (Err(problem), true) = (catalogue.ancestry(point), findings.is_empty()) {
        findings.push(problem.into());
    }
    findings.extend(verdict.findings);
    let mut more = verdict.more;
    let source = source.map(|source| {
        findings.extend(source.findings);
        more += source.more;
        source.status
    });
    findings.extend_from_slice(inherited);
    // What is the same as its snapshot lacks nothing.
    let suspicion = catalogue
        .point(point)
        .and_then(|point| catalogue.suspicion(point))
        .filter(|suspicion| suspicion.doubt == Doubt::Differs && source != Some(SourceStatus::Same))
        .map(Suspicion::describe);
    let status = match (findings.is_empty(), &suspicion, unverified.is_empty()) {
        (false, _, _) => VerifyStatus::Damaged,
        (true, Some(_), _) => VerifyStatus::Suspect,
        (true, None, true) => VerifyStatus::Ok,
        (true, None, false) => VerifyStatus::Unverifiable,
    };
    more += findings.len().saturating_sub(FINDINGS_KEPT) as u64;
    findings.truncate(FINDINGS_KEPT);
    PointReport {
        point,
        status,
        checked_bytes: verdict.checked,
        findings,
        more,
        unverified,
        suspicion,
        source,
    }
}

/// What the catalogue has found wrong with the files of a point.
fn problems_of(catalogue: &Catalogue, point: PointName) -> impl Iterator<Item = Problem> {
    let of_point = move |problem: &&Problem| {
        let name = problem.path().file_name().and_then(|name| name.to_str());
        name.and_then(PointFile::parse).is_some_and(|file| file.point == point)
    };
    catalogue.problems().iter().filter(of_point).cloned()
}

//! Whether a point is what its snapshot is: the proof that the comparison told the truth.
//!
//! All bytes of the snapshot are held against the point's, in two passes like those that mend an image
//! ([`restore::block`](crate::restore::block)): what the point has data for is compared with the
//! snapshot, and what the snapshot holds besides must be zeroes.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::damage::Damage;
use super::{FINDINGS_KEPT, Finding, VerifyError, VerifyImage};
use crate::buffer::BufferPool;
use crate::cancel::Cancel;
use crate::chain::manifest::Manifest;
use crate::chain::{Catalogue, PointName};
use crate::compare::{Comparison, GRAIN};
use crate::copy::{Copy, CopyError};
use crate::error::Causes;
use crate::extent::Extent;
use crate::layer::{LayerError, LayerWriter, Patch, SECTOR};
use crate::progress::Progress;
use crate::qcow2::chain::ChainReader;
use crate::qcow2::error::ReadError;
use crate::qcow2::layer::Piece;
use crate::source::beyond::Beyond;
use crate::source::chain::ChainSource;
use crate::source::{BoxError, RbdDiffSource, SourceError};

/// Memory for what is read of a point, and for what is read of its snapshot, in bytes each.
const MEMORY: usize = 24 << 20;

/// Pieces that touch one unit come together, in bytes.
const UNIT: u64 = 64 << 10;

/// Where the snapshots are that points were taken from. `verify::snapshots::ClusterSnapshots` is the
/// real one; an embedder with another source has another.
pub trait Snapshots: Sync {
    /// Looks for the snapshot that a point was taken from. Blocks.
    ///
    /// # Errors
    /// Nobody can tell, or it is there and cannot be opened.
    fn find(&self, manifest: &Manifest) -> Result<Found, BoxError>;
}

/// What became of a snapshot.
pub enum Found {
    /// It is there, beyond doubt: compared with nothing.
    Snapshot(Box<dyn RbdDiffSource>),
    /// It is gone, or cannot be told from another; and why.
    Gone(String),
}

/// How a point and its snapshot compare.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceStatus {
    /// They are the same, bit for bit.
    Same,
    /// They differ; the findings tell where.
    Different,
    /// They were not compared, and why. No fault of the point: snapshots are removed in time.
    NotCompared(String),
    /// They could not be compared, and why: what failed, with all its causes. Nothing is known of the
    /// point on that account, good or bad.
    Failed(String),
}

/// The outcome for one point.
#[derive(Debug)]
pub(super) struct SourceVerdict {
    pub(super) status: SourceStatus,
    /// Where they differ.
    pub(super) ranges: Vec<Range<u64>>,
    pub(super) findings: Vec<Finding>,
    pub(super) more: u64,
}

impl SourceVerdict {
    fn not_compared(why: impl Into<String>) -> Self {
        let status = SourceStatus::NotCompared(why.into());
        Self { status, ranges: Vec::new(), findings: Vec::new(), more: 0 }
    }

    fn failed(cause: &(dyn std::error::Error + 'static)) -> Self {
        Self { status: SourceStatus::Failed(Causes(cause).to_string()), ..Self::not_compared("") }
    }

    fn of(ranges: Vec<Range<u64>>, snapshot: &str) -> Self {
        let status = if ranges.is_empty() { SourceStatus::Same } else { SourceStatus::Different };
        let finding =
            |range: &Range<u64>| Finding::Source { snapshot: snapshot.to_owned(), range: range.clone() };
        let findings: Vec<_> = ranges.iter().take(FINDINGS_KEPT).map(finding).collect();
        let more = (ranges.len() - findings.len()) as u64;
        Self { status, ranges, findings, more }
    }
}

/// Compares a point with its snapshot.
pub(super) fn compare(
    snapshots: &dyn Snapshots,
    catalogue: &Catalogue,
    point: PointName,
    run: &VerifyImage<'_>,
) -> Result<SourceVerdict, VerifyError> {
    let Some(manifest) = catalogue.point(point).and_then(|point| point.manifest.as_ref()) else {
        return Ok(SourceVerdict::not_compared("the point has no manifest, which would name its snapshot"));
    };
    // What is wrong with its files is told.
    let Ok(paths) = catalogue.layers(point) else {
        return Ok(SourceVerdict::not_compared("the point's files are not whole"));
    };
    let chain = match ChainReader::open(&paths) {
        Ok(chain) => chain,
        Err(cause) => return Ok(SourceVerdict::failed(&cause)),
    };
    let snapshot = match snapshots.find(manifest) {
        Ok(Found::Snapshot(snapshot)) => snapshot,
        Ok(Found::Gone(why)) => return Ok(SourceVerdict::not_compared(why)),
        Err(_) if run.cancel.is_set() => return Err(VerifyError::Cancelled),
        Err(cause) => return Ok(SourceVerdict::failed(&*cause)),
    };
    let size = manifest.record.virtual_size;
    if snapshot.size() != size {
        let range = snapshot.size().min(size)..snapshot.size().max(size);
        return Ok(SourceVerdict::of(vec![range], &manifest.record.snapshot));
    }
    let difference = Difference { chain: &chain, snapshot: &*snapshot, size, run, stop: run.cancel.part() };
    match difference.find() {
        Ok(ranges) => Ok(SourceVerdict::of(ranges, &manifest.record.snapshot)),
        Err(_) if run.cancel.is_set() => Err(VerifyError::Cancelled),
        Err(CopyError::Source(
            SourceError::Segments { cause, .. }
            | SourceError::Diff { cause, .. }
            | SourceError::Read { cause, .. },
        )) if cause.is::<ReadError>() => {
            let cause: Box<ReadError> = cause.downcast().expect("it was asked");
            let failed = SourceVerdict::failed(&*cause);
            Ok(SourceVerdict {
                findings: vec![Finding::Read { range: 0..size, cause: Arc::new(*cause) }],
                ..failed
            })
        }
        Err(CopyError::Layer(LayerError::Write { cause, .. })) => Ok(SourceVerdict::failed(&*cause)),
        Err(error) => Ok(SourceVerdict::failed(&error)),
    }
}

/// All that takes part in a comparison.
struct Difference<'a> {
    chain: &'a ChainReader,
    snapshot: &'a dyn RbdDiffSource,
    size: u64,
    run: &'a VerifyImage<'a>,
    stop: Cancel,
}

impl Difference<'_> {
    fn find(&self) -> Result<Vec<Range<u64>>, CopyError> {
        let source = ChainSource::new(self.chain, self.size);
        self.count()?;
        let buffers = BufferPool::new(MEMORY);
        let comparison =
            Comparison { image: self.snapshot, buffers: &buffers, stop: &self.stop, grain: GRAIN };
        let held = Differing { comparison: Some(comparison), run: self.run, found: Mutex::default() };
        self.copy(&source, &held, false)?;
        let beyond = Beyond { image: self.snapshot, chain: self.chain, size: self.size };
        let besides = Differing { comparison: None, run: self.run, found: Mutex::default() };
        self.copy(&beyond, &besides, true)?;
        self.snapshot.confirm()?;
        let mut all = held.found.into_inner().unwrap_or_else(PoisonError::into_inner);
        all.extend(besides.found.into_inner().unwrap_or_else(PoisonError::into_inner).into_ranges());
        Ok(all.into_ranges())
    }

    /// Tells how much there is to compare.
    fn count(&self) -> Result<(), CopyError> {
        let failed = |cause| SourceError::Diff { range: 0..self.size, cause: Box::new(cause) };
        for piece in self.chain.map(0..self.size).map_err(failed)? {
            let piece = piece.map_err(failed)?;
            if matches!(piece.piece, Piece::Data | Piece::Compressed) {
                self.run.progress.total.add(piece.range.end - piece.range.start);
            }
        }
        Ok(())
    }

    fn copy(&self, source: &dyn RbdDiffSource, layer: &Differing<'_>, root: bool) -> Result<(), CopyError> {
        let copy = Copy {
            source,
            layer,
            root,
            digests: None,
            buffers: &BufferPool::new(MEMORY),
            rate_limit: None,
            parallel: self.run.options.source_reads,
            progress: &Progress::default(),
            cancel: self.run.cancel,
            stop: &self.stop,
        };
        copy.run().map(drop)
    }
}

/// A layer that is not written, but compared: with a snapshot, or with zeroes.
struct Differing<'a> {
    comparison: Option<Comparison<'a>>,
    run: &'a VerifyImage<'a>,
    found: Mutex<Damage>,
}

impl Differing<'_> {
    fn differences(&self, patch: &Patch) -> Result<Vec<Extent>, SourceError> {
        let Some(comparison) = &self.comparison else { return Ok(patch.pieces.clone()) };
        self.run.progress.done.add(patch.data.len() as u64);
        // A run that is to stop takes nothing for the same.
        Ok(comparison.differences(patch)?.unwrap_or_default())
    }
}

impl LayerWriter for Differing<'_> {
    fn grain(&self) -> u64 {
        // No grain of what lies besides is partly the chain's, whose clusters are whole sectors.
        if self.comparison.is_some() { GRAIN as u64 } else { SECTOR }
    }

    fn unit(&self) -> u64 {
        UNIT
    }

    fn wants_whole_units(&self) -> bool {
        false
    }

    fn write(&self, patch: Patch) -> Result<Vec<Extent>, LayerError> {
        let differences = self
            .differences(&patch)
            .map_err(|cause| LayerError::Write { path: "the snapshot".into(), cause: cause.into() })?;
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.extend(differences.iter().map(Extent::range));
        Ok(patch.pieces)
    }

    fn abort(&self) {}

    fn finish(&self) -> Result<(), LayerError> {
        Ok(())
    }
}

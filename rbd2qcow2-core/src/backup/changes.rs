//! Finding and copying what changed: what is reported is proved, or nothing is asked and all is compared.

use std::time::{Duration, Instant};

use crate::cancel::Cancel;
use crate::chain::{ChainError, ChainWriter, Doubt, PendingLayer, Point, Problem};
use crate::compare::{OnlyChanged, Whole};
use crate::copy::Copy;
use crate::error::Causes;
use crate::layer::{LayerWriter, SECTOR};
use crate::options::DiffMode;
use crate::progress::ImageReport;
use crate::prove::{ProveError, Watched, Weigh};
use crate::qcow2::chain::ChainReader;
use crate::qcow2::error::ReadError;
use crate::source::RbdDiffSource;
use crate::source::librbd::LibrbdSource;

use super::{Backup, BackupError, Plan};

impl Backup<'_> {
    /// Copies what changed: either what is reported, and proves by samples that nothing else has; or what is
    /// found to differ from the chain. The layer has yet to be finished.
    #[allow(clippy::too_many_arguments, reason = "all that takes part in a copy")]
    pub(super) fn copy(
        &self,
        source: &LibrbdSource,
        layer: &dyn LayerWriter,
        plan: &Plan,
        chain: &ChainWriter,
        pending: &PendingLayer<'_>,
        stop: &Cancel,
        report: &mut ImageReport,
    ) -> Result<(), BackupError> {
        let progress = report.progress.clone();
        let copy = Copy {
            source,
            layer,
            root: plan.parent().is_none(),
            digests: Some(pending.digests()),
            buffers: self.buffers,
            rate_limit: self.rate_limit,
            parallel: self.options.parallel,
            progress: &progress,
            cancel: self.cancel,
            stop,
        };
        let Some(parent) = plan.parent() else {
            report.diff_time = copy.run()?;
            return Ok(());
        };
        if plan.compares() {
            report.diff_time = self.copy_differences(&copy, chain, pending, parent)?;
            return Ok(());
        }
        if self.options.prove == 0 && !source.reports_whole_objects() {
            report.diff_time = copy.run()?;
            return Ok(());
        }
        let below = self.open_chain(chain, parent)?;
        let changed;
        let copy = match source.reports_whole_objects() {
            true => {
                changed = only_changed(&copy, chain, pending, parent, &below)?;
                Copy { layer: &changed, ..copy }
            }
            false => copy,
        };
        if self.options.prove == 0 {
            report.diff_time = copy.run()?;
            return Ok(());
        }
        let weigh = match source.mode() {
            DiffMode::Exact => Weigh::Nothing,
            _ => Weigh::Unreported { object: source.period() },
        };
        let watched = Watched::new(
            source,
            &below,
            layer.grain(),
            weigh,
            self.options.prove,
            random().map_err(BackupError::Random)?,
        );
        report.diff_time = Copy { source: &watched, ..copy }.run()?;
        let asked = Instant::now();
        let proof = watched.prove(stop).map_err(|error| match error {
            ProveError::Cancelled => BackupError::Cancelled,
            ProveError::Chain(cause) => self.unreadable(chain, parent, cause),
            error => BackupError::Prove(error),
        })?;
        log::debug!("{}: {} pages were looked at in {:?}", self.image, proof.looked_at, asked.elapsed());
        report.proved_bytes = proof.bytes;
        let Some(&offset) = proof.differing.first() else { return Ok(()) };
        // What was read may be what is wrong, and not the chain.
        source.confirm()?;
        self.mark(chain, parent, Doubt::Differs, &proof.differing);
        Err(BackupError::ChangeLost {
            point: parent.name,
            offset,
            differing: proof.differing.len() as u64,
            looked_at: proof.looked_at,
        })
    }

    /// Compares all that the source, which is compared with nothing, and the chain hold, and copies what
    /// differs.
    fn copy_differences(
        &self,
        copy: &Copy<'_>,
        chain: &ChainWriter,
        pending: &PendingLayer<'_>,
        parent: &Point,
    ) -> Result<Duration, BackupError> {
        let below = self.open_chain(chain, parent)?;
        let whole = Whole::new(copy.source, &below);
        let changed = only_changed(copy, chain, pending, parent, &below)?;
        Copy { source: &whole, layer: &changed, ..*copy }.run().map_err(|error| {
            if read_error(&error).is_some_and(ReadError::is_damage) {
                self.mark(chain, parent, Doubt::Unreadable, &[]);
            }
            error.into()
        })
    }

    /// Opens the layers of the point that is built upon.
    fn open_chain(&self, chain: &ChainWriter, parent: &Point) -> Result<ChainReader, BackupError> {
        let paths = chain.catalogue().layers(parent.name).map_err(|cause| unsound(chain, parent, cause))?;
        ChainReader::open(&paths).map_err(|cause| self.unreadable(chain, parent, cause))
    }

    /// The error of a chain that cannot be read. Where that is its own fault, not that of the disk or of a
    /// limit of this process, no later backup builds upon it.
    fn unreadable(&self, chain: &ChainWriter, parent: &Point, cause: ReadError) -> BackupError {
        if cause.is_damage() {
            self.mark(chain, parent, Doubt::Unreadable, &[]);
        }
        BackupError::Prove(ProveError::Chain(cause))
    }

    fn mark(&self, chain: &ChainWriter, parent: &Point, doubt: Doubt, offsets: &[u64]) {
        if let Err(error) = chain.suspect(parent, doubt, offsets) {
            // The run fails anyway, and says why.
            log::error!(
                "{}: cannot mark the chain as suspect: {}; make the next backup with --diff compare, or --full",
                self.image,
                Causes(&error)
            );
        }
    }
}

/// The copy's layer, so that it gets only what the chain does not hold.
fn only_changed<'a>(
    copy: &Copy<'a>,
    chain: &ChainWriter,
    pending: &PendingLayer<'_>,
    parent: &Point,
    below: &'a ChainReader,
) -> Result<OnlyChanged<'a>, BackupError> {
    let points = chain.catalogue().ancestry(parent.name).map_err(|cause| unsound(chain, parent, cause))?;
    let path = pending.layer_path().to_owned();
    let virtual_size = copy.source.size().next_multiple_of(SECTOR);
    Ok(OnlyChanged::new(copy.layer, path, virtual_size, below, &points, copy.stop))
}

fn unsound(chain: &ChainWriter, parent: &Point, cause: Problem) -> ChainError {
    ChainError::ParentUnsound { path: chain.directory().to_owned(), point: parent.name, cause: cause.into() }
}

/// The fault of a layer among the causes of an error.
fn read_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a ReadError> {
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    causes.find_map(|cause| cause.downcast_ref())
}

/// A number that nobody can tell beforehand.
fn random() -> std::io::Result<u64> {
    let mut bytes = [0; 8];
    // Requests of up to 256 bytes are never cut short.
    rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())?;
    Ok(u64::from_ne_bytes(bytes))
}

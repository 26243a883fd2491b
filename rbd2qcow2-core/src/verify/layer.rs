//! Verifying one layer.

use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam::channel::{self, Receiver, SendTimeoutError, Sender};

use super::coverage::{Coverage, Difference};
use super::damage::Damage;
use super::{FINDINGS_KEPT, Finding, Sample, VerifyError, VerifyImage};
use crate::cancel::Cancel;
use crate::chain::Point;
use crate::chain::digests::{Content, DigestReader, DigestRecord, DigestsError};
use crate::files::Shortage;
use crate::qcow2::check::{CheckError, check};
use crate::qcow2::error::ReadError;
use crate::qcow2::layer::LayerReader;

/// What was found out about a layer.
#[derive(Debug, Default)]
pub(super) struct Verdict {
    /// What is wrong with it, not with the layers below.
    pub(super) findings: Vec<Finding>,
    /// How many more findings there are.
    pub(super) more: u64,
    /// Where its content is not what was backed up.
    pub(super) damage: Damage,
    /// Bytes of data that were held against their digests.
    pub(super) checked: u64,
    /// Whether there were digests to hold the content against.
    pub(super) verifiable: bool,
    /// Why something could not be looked at, whatever that looks like.
    shortage: Option<Shortage>,
}

impl Verdict {
    pub(super) fn find(&mut self, finding: Finding) {
        self.shortage = self.shortage.or_else(|| Shortage::of(&finding));
        if self.findings.len() < FINDINGS_KEPT { self.findings.push(finding) } else { self.more += 1 }
    }
}

/// Verifies the layer of `point`. What the catalogue has found is not
/// repeated.
///
/// Of a base, `above` is the point that builds upon it. Where it has begun to take over what is above, it
/// differs from its digests, and from its refcounts, in ways that nobody sees: only what is seen counts as
/// damage.
pub(super) fn verify(
    point: &Point,
    above: Option<&Point>,
    run: &VerifyImage<'_>,
) -> Result<Verdict, VerifyError> {
    let verdict = examine(point, above, run)?;
    verdict.shortage.map_or(Ok(verdict), |cause| Err(VerifyError::TooManyFiles(cause)))
}

fn examine(point: &Point, above: Option<&Point>, run: &VerifyImage<'_>) -> Result<Verdict, VerifyError> {
    let digests = point.digests.as_path();
    let mut verdict = Verdict::default();
    match above.map(|above| LayerReader::open(&above.path)) {
        None => {}
        Some(Ok(above)) => verdict.damage = Damage::below(Arc::new(above)),
        // A layer that cannot be opened is damage of its own point, and hides nothing.
        Some(Err(cause)) => verdict.shortage = Shortage::of(&cause),
    }
    let layer = match LayerReader::open(&point.path) {
        Ok(layer) => layer,
        Err(cause) => {
            // The catalogue says so, too, and of all points above.
            if point.header.as_ref().is_some_and(|header| header.check_restore_point().is_ok()) {
                let range = 0..point.virtual_size().unwrap_or(0);
                verdict.damage.add(range.clone());
                verdict.find(Finding::Read { range, cause: Arc::new(cause) });
            }
            return Ok(verdict);
        }
    };
    check_structure(&layer, run.cancel, &mut verdict)?;
    if point.name.is_python() {
        return Ok(verdict);
    }
    match examine_digests(point, digests, run.options.sample) {
        // The catalogue tells that of points.
        Err(DigestsError::Read(error)) if error.kind() == std::io::ErrorKind::NotFound && above.is_none() => {
        }
        Err(cause) => {
            verdict.find(Finding::Digests { path: digests.to_owned(), cause: Arc::new(cause) });
        }
        Ok(data_bytes) => {
            verdict.verifiable = true;
            run.progress.total.add(data_bytes);
            check_coverage(&layer, digests, run.cancel, &mut verdict)?;
            verdict = ContentCheck { layer: &layer, run, verdict: Mutex::new(verdict) }.check(digests)?;
        }
    }
    Ok(verdict)
}

/// Looks at the tables and refcounts.
fn check_structure(layer: &LayerReader, cancel: &Cancel, verdict: &mut Verdict) -> Result<(), VerifyError> {
    let structure = match check(layer, cancel, &mut |_| {}) {
        Ok(structure) => structure,
        Err(CheckError::Cancelled) => return Err(VerifyError::Cancelled),
        Err(CheckError::Read(cause)) => {
            verdict.find(Finding::Read { range: 0..layer.virtual_size(), cause: Arc::new(cause) });
            return Ok(());
        }
    };
    let kept = structure.errors.len() + structure.leaks.len();
    for cause in structure.errors.into_iter().chain(structure.leaks) {
        verdict.find(Finding::Structure { path: layer.path().to_owned(), cause });
    }
    verdict.more += structure.error_count + structure.leak_count - kept as u64;
    Ok(())
}

/// Reads the digests through, so that they can be believed afterwards, and returns how many bytes of
/// data they ask to be read.
fn examine_digests(point: &Point, digests: &Path, sample: Option<Sample>) -> Result<u64, DigestsError> {
    // Without a manifest, which is damage of its own, the checksum within the file must do.
    if let Some(manifest) = &point.manifest {
        manifest.digests.check_file(digests)?;
    }
    let mut bytes = 0;
    for record in DigestReader::open(digests)? {
        let record = record?;
        if is_chosen(&record, sample) {
            bytes += record.length;
        }
    }
    Ok(bytes)
}

/// Whether the data of a record are to be read.
fn is_chosen(record: &DigestRecord, sample: Option<Sample>) -> bool {
    let Some(Sample { percent, seed }) = sample else { return matches!(record.content, Content::Data(_)) };
    // splitmix64: spreads neighbours evenly.
    let mut mixed = (record.offset ^ seed).wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^= mixed >> 31;
    #[allow(clippy::cast_precision_loss, reason = "a share, not a number")]
    let share = mixed as f64 / u64::MAX as f64 * 100.0;
    matches!(record.content, Content::Data(_)) && share < percent
}

/// Compares what the layer holds with what the digests say it holds.
fn check_coverage(
    layer: &LayerReader,
    digests: &Path,
    cancel: &Cancel,
    verdict: &mut Verdict,
) -> Result<(), VerifyError> {
    let path = layer.path();
    let records = DigestReader::open(digests).into_iter().flatten().map_while(Result::ok);
    let mut coverage = Coverage::new(records);
    let size = layer.virtual_size();
    let mut at = 0;
    while at < size {
        let failed = {
            let mut tell = |difference, range| tell(verdict, path, difference, range);
            pass(layer, at..size, &mut coverage, &mut at, cancel, &mut tell)?
        };
        let Some(cause) = failed else { continue };
        // What comes before the fault is told once more, what the entry describes is skipped.
        let fault = faulty(&cause, layer, at);
        let mut tell = |difference, range| tell(verdict, path, difference, range);
        pass(layer, at..fault.start, &mut coverage, &mut at, cancel, &mut tell)?;
        at = fault.end;
        coverage.skip(at);
        verdict.damage.add(fault.clone());
        verdict.find(Finding::Read { range: fault, cause: Arc::new(cause) });
    }
    coverage.finish(size, &mut |difference, range| tell(verdict, path, difference, range));
    Ok(())
}

/// Compares a range, up to the first entry that cannot be read. `at` follows.
fn pass<R: Iterator<Item = DigestRecord>>(
    layer: &LayerReader,
    range: Range<u64>,
    coverage: &mut Coverage<R>,
    at: &mut u64,
    cancel: &Cancel,
    tell: &mut impl FnMut(Difference, Range<u64>),
) -> Result<Option<ReadError>, VerifyError> {
    let pieces = match layer.map(range) {
        Ok(pieces) => pieces,
        Err(cause) => return Ok(Some(cause)),
    };
    for piece in pieces {
        if cancel.is_set() {
            return Err(VerifyError::Cancelled);
        }
        match piece {
            Ok((range, piece)) => {
                *at = range.end;
                coverage.piece(range, piece, tell);
            }
            Err(cause) => return Ok(Some(cause)),
        }
    }
    Ok(None)
}

/// What an entry that cannot be read describes, from `at` on.
fn faulty(cause: &ReadError, layer: &LayerReader, at: u64) -> Range<u64> {
    let (start, length) = match cause {
        ReadError::L1Entry { guest, .. } => (guest.0, layer.table_coverage()),
        ReadError::L2Entry { guest, .. } => (guest.0, layer.header().cluster_bits.size()),
        // The file itself cannot be read: nothing more is to be had.
        _ => (at, u64::MAX),
    };
    let size = layer.virtual_size();
    let end = start.saturating_add(length).min(size);
    start.clamp(at, size)..end.max(at + 1)
}

fn tell(verdict: &mut Verdict, path: &Path, difference: Difference, range: Range<u64>) {
    verdict.damage.add(range.clone());
    let path = path.to_owned();
    verdict.find(match difference {
        Difference::Missing => Finding::Missing { path, range },
        Difference::Extra => Finding::Extra { path, range },
        Difference::NotZero => Finding::Content { path, range },
    });
}

/// Holds data against their digests.
struct ContentCheck<'a> {
    layer: &'a LayerReader,
    run: &'a VerifyImage<'a>,
    verdict: Mutex<Verdict>,
}

impl ContentCheck<'_> {
    fn check(self, digests: &Path) -> Result<Verdict, VerifyError> {
        let options = self.run.options;
        let parallel = options.parallel.max(1);
        let (sender, receiver) = channel::bounded::<DigestRecord>(4 * parallel);
        std::thread::scope(|scope| {
            // Owned here, so that whatever happens the threads see its end.
            let sender = sender;
            for _ in 0..parallel {
                let (receiver, check) = (receiver.clone(), &self);
                let thread = std::thread::Builder::new().name("verify".into());
                thread
                    .spawn_scoped(scope, move || check.compare_all(&receiver))
                    .map_err(VerifyError::Thread)?;
            }
            drop(receiver);
            match DigestReader::open(digests) {
                Ok(records) => self.feed(records, &sender, digests),
                Err(cause) => self.digests_failed(digests, cause),
            }
            Ok::<(), VerifyError>(())
        })?;
        if self.run.cancel.is_set() {
            return Err(VerifyError::Cancelled);
        }
        Ok(self.verdict.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    fn feed(
        &self,
        records: impl Iterator<Item = Result<DigestRecord, DigestsError>>,
        sender: &Sender<DigestRecord>,
        digests: &Path,
    ) {
        for record in records {
            let mut record = match record {
                Ok(record) if is_chosen(&record, self.run.options.sample) => record,
                Ok(_) => continue,
                Err(cause) => return self.digests_failed(digests, cause),
            };
            loop {
                match sender.send_timeout(record, Cancel::POLL) {
                    Ok(()) => break,
                    Err(SendTimeoutError::Timeout(back)) if !self.run.cancel.is_set() => record = back,
                    Err(_) => return,
                }
            }
        }
    }

    /// They were read a moment ago.
    fn digests_failed(&self, digests: &Path, cause: DigestsError) {
        let mut verdict = self.lock();
        verdict.verifiable = false;
        verdict.find(Finding::Digests { path: digests.to_owned(), cause: Arc::new(cause) });
    }

    fn compare_all(&self, records: &Receiver<DigestRecord>) {
        let mut buffer = Vec::new();
        for record in records {
            if self.run.cancel.is_set() {
                return;
            }
            self.compare(&record, &mut buffer);
            self.run.progress.done.add(record.length);
        }
    }

    fn compare(&self, record: &DigestRecord, buffer: &mut Vec<u8>) {
        let Content::Data(hash) = record.content else { return };
        let range = record.offset..record.end();
        if range.end > self.layer.virtual_size() {
            return;
        }
        // A record is no longer than a chunk.
        buffer.resize(usize::try_from(record.length).unwrap_or(0), 0);
        let finding = match self.layer.read_at(record.offset, buffer) {
            // What the layer does not hold was found before.
            Ok(absent) if !absent.is_empty() => return,
            Ok(_) if blake3::hash(buffer) == hash => None,
            Ok(_) => Some(Finding::Content { path: self.layer.path().to_owned(), range: range.clone() }),
            Err(cause) => Some(Finding::Read { range: range.clone(), cause: Arc::new(cause) }),
        };
        let mut verdict = self.lock();
        verdict.checked += record.length;
        if let Some(finding) = finding {
            verdict.damage.add(range);
            verdict.find(finding);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Verdict> {
        self.verdict.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

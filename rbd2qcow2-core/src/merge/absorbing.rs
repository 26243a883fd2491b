//! The second half of a merge upon a base: the base takes over what the layer above it holds, and takes its
//! place. See [`chain::base`](crate::chain) for the steps.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Merge, MergeError, Way};
use crate::chain::digests::combine::{CombineError, combine};
use crate::chain::digests::{Content, DigestReader, DigestRecord, DigestsError};
use crate::chain::{MergedLayer, PendingMerge, Point, Record};
use crate::progress::Stage;
use crate::qcow2::absorb::{Absorb, AbsorbError};
use crate::qcow2::error::ReadError;
use crate::qcow2::layer::LayerReader;
use crate::verify::Finding;

/// What a layer holds, by its digests.
#[derive(Debug, Default)]
struct Sums {
    data: (u64, u64),
    zero: (u64, u64),
    last: Option<(u64, bool)>,
}

impl Sums {
    fn add(&mut self, record: &DigestRecord) {
        let is_data = matches!(record.content, Content::Data(_));
        let (extents, bytes) = if is_data { &mut self.data } else { &mut self.zero };
        *bytes += record.length;
        if self.last.replace((record.end(), is_data)) != Some((record.offset, is_data)) {
            *extents += 1;
        }
    }
}

impl Merge<'_> {
    /// Has the base of the child take over what the child's layer holds. Tells how; `None` where it did not,
    /// because somebody else has it open. All points read as before in either case.
    ///
    /// # Errors
    /// [`MergeError`].
    pub(super) fn absorb(&self, child: &Point) -> Result<Option<Way>, MergeError> {
        let catalogue = self.writer.catalogue();
        let base = child.base.and_then(|base| catalogue.base(base)).expect("the caller has seen it");
        let Some((mut pending, file)) = self.writer.begin_absorb(self.child)? else { return Ok(None) };
        self.observer.stage(Stage::TakeOver);
        let reader = || -> Result<LayerReader, MergeError> {
            let (file, bytes) = file.handle()?;
            LayerReader::from_source(&base.path, file, bytes).map_err(|cause| self.unreadable(cause))
        };
        let above = LayerReader::open(&child.path).map_err(|cause| self.unreadable(cause))?;
        let below = reader()?;
        let taken_over = &self.progress.take_over;
        let mut absorb = match Absorb::new(&file, &below, &above, taken_over, self.cancel) {
            Ok(absorb) => absorb,
            // Nothing was changed. A copy tells what is wrong, if anything is.
            Err(AbsorbError::Unfit { .. } | AbsorbError::UsedTwice { .. }) => return Ok(None),
            Err(cause) => return Err(self.not_absorbed(cause)),
        };
        let record = match pending.manifest().cloned() {
            Some(manifest) => {
                let sums = self.combine_digests(&mut pending, base, child, &below)?;
                Some(Record {
                    data_extents: sums.data.0,
                    data_bytes: sums.data.1,
                    zero_extents: sums.zero.0,
                    zero_bytes: sums.zero.1,
                    ..manifest.record
                })
            }
            None => None,
        };
        let failed = |cause| self.not_absorbed(cause);
        if let Err(cause) = absorb.copy() {
            absorb.abandon();
            return Err(failed(cause));
        }
        // A copy is seen by nobody, and has no other name.
        let way = if pending.layer_path() == base.path {
            let Some(lease) = file.lease() else { return Ok(None) };
            absorb.switch().map_err(failed)?;
            // Who has come in between, after all, may have read the old table: nothing of what that leads to is
            // given back then.
            if !file.end_lease(lease) {
                return Ok(None);
            }
            Way::InPlace
        } else {
            absorb.switch().map_err(failed)?;
            Way::Shared
        };
        match absorb.finish(&reader()?) {
            // It reads as it should, and is copied.
            Err(AbsorbError::Unfit { .. }) => return Ok(None),
            result => result.map_err(failed)?,
        }
        if self.cancel.is_set() {
            return Err(MergeError::Cancelled);
        }
        self.observer.stage(Stage::Commit);
        let (virtual_size, extended_l2) = (below.virtual_size(), below.header().extended_l2);
        // What is unverified of the base the child's manifest tells already.
        let unverified = BTreeSet::new();
        pending.commit(MergedLayer { virtual_size, extended_l2, record, unverified })?;
        self.writer.drop_base(base.name)?;
        Ok(Some(way))
    }

    /// Puts the digests of both layers together, as those of the base.
    fn combine_digests(
        &self,
        pending: &mut PendingMerge<'_>,
        base: &Point,
        child: &Point,
        below: &LayerReader,
    ) -> Result<Sums, MergeError> {
        let unusable = |point: &Point, cause: DigestsError| MergeError::Damaged {
            point: self.child,
            from: point.name,
            cause: Finding::Digests { path: point.digests.clone(), cause: Arc::new(cause) },
        };
        if let Some(manifest) = pending.manifest() {
            manifest.digests.check_file(&child.digests).map_err(|cause| unusable(child, cause))?;
        }
        let records =
            |point: &Point| DigestReader::open(&point.digests).map_err(|cause| unusable(point, cause));
        let (old, new) = (records(base)?, records(child)?);
        let digests = pending.begin_base_digests()?;
        let mut sums = Sums::default();
        let read = |offset, buffer: &mut [u8]| below.read_at(offset, buffer).map(drop);
        let push = |record| {
            sums.add(&record);
            digests.push(record) && !self.cancel.is_set()
        };
        match combine(old, new, read, push) {
            _ if self.cancel.is_set() => return Err(MergeError::Cancelled),
            // Where writing has failed, the end of it tells.
            Ok(()) | Err(CombineError::Stopped) => {}
            Err(CombineError::Digests(cause)) => return Err(unusable(base, cause)),
            Err(CombineError::Read(cause)) => return Err(self.unreadable(cause)),
            Err(CombineError::Content(range)) => {
                let cause = Finding::Content { path: base.path.clone(), range };
                return Err(MergeError::Damaged { point: self.child, from: base.name, cause });
            }
        }
        pending.keep_base_digests(digests, &base.digests)?;
        Ok(sums)
    }

    fn unreadable(&self, cause: ReadError) -> MergeError {
        MergeError::Read { point: self.child, cause }
    }

    fn not_absorbed(&self, cause: AbsorbError) -> MergeError {
        match cause {
            AbsorbError::Cancelled => MergeError::Cancelled,
            cause => MergeError::Absorb { point: self.child, cause },
        }
    }
}

//! Compressed data, packed one behind the other.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::refcounts::Refcounts;
use super::{Qcow2Writer, WriteError, index};
use crate::buffer::Buffer;
use crate::qcow2::header::{ClusterBits, Table};
use crate::qcow2::table::HostOffset;

/// What is written at once, in bytes. In unit tests little, so that they meet full buffers.
const BUFFER_BYTES: usize = if cfg!(test) { 8 << 10 } else { 1 << 20 };

/// Clusters are taken for so many bytes at a time, at least: what does not fit the rest of a run
/// that others have taken the space behind of is lost.
const RUN_BYTES: u64 = if cfg!(test) { 32 << 10 } else { 4 << 20 };

/// And so many clusters, at least.
const RUN_CLUSTERS: u64 = if cfg!(test) { 1 } else { 8 };

/// Puts compressed data into the file.
#[derive(Debug)]
pub(super) struct Packing {
    cluster_bits: ClusterBits,
    /// Bytes of the clusters that are taken at once.
    run_bytes: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    run: Option<Run>,
    refcounts: Refcounts,
}

/// Clusters that are being filled.
#[derive(Debug)]
struct Run {
    /// Holds what is not written yet.
    buffer: Buffer,
    /// Where that goes.
    written: u64,
    /// Where the next piece goes: within the buffer's room, or at its end.
    next: u64,
    /// Where the clusters end.
    end: u64,
}

/// A buffer, and where it is to be written.
type Full = (HostOffset, Buffer);

impl Run {
    fn begin(start: u64, bytes: u64, file: &Qcow2Writer) -> Result<Self, WriteError> {
        Ok(Self { buffer: file.scratch(BUFFER_BYTES)?, written: start, next: start, end: start + bytes })
    }

    /// Appends `packed`, for which there is room in the run, and gives the buffers that were filled.
    fn append(&mut self, mut packed: &[u8], file: &Qcow2Writer) -> Result<Vec<Full>, WriteError> {
        let mut full = Vec::new();
        while !packed.is_empty() {
            let at = index(self.next - self.written);
            let count = packed.len().min(BUFFER_BYTES - at);
            let (now, later) = packed.split_at(count);
            self.buffer[at..at + count].copy_from_slice(now);
            self.next += count as u64;
            packed = later;
            if at + count == BUFFER_BYTES {
                let empty = file.scratch(BUFFER_BYTES)?;
                full.push((HostOffset(self.written), std::mem::replace(&mut self.buffer, empty)));
                self.written = self.next;
            }
        }
        Ok(full)
    }

    /// What is left to be written, with zeroes up to the next page or the run's end.
    fn rest(mut self) -> Option<Full> {
        let used = index(self.next - self.written);
        let most = index(self.end - self.written).min(BUFFER_BYTES);
        let padded = used.next_multiple_of(crate::buffer::ALIGNMENT).min(most);
        self.buffer.resize(used);
        self.buffer.resize(padded);
        (used > 0).then_some((HostOffset(self.written), self.buffer))
    }
}

impl Packing {
    pub(super) fn new(cluster_bits: ClusterBits) -> Self {
        let state = State { run: None, refcounts: Refcounts::new(cluster_bits) };
        // A piece takes a cluster at most, and what is lost at a run's end is less than one.
        let run_bytes = RUN_BYTES.max(RUN_CLUSTERS * cluster_bits.size());
        Self { cluster_bits, run_bytes, state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds a place for `packed`, which is not empty and no more than a cluster. Returns it with the
    /// buffers that are full now and that the caller must write.
    pub(super) fn put(
        &self,
        packed: &[u8],
        file: &Qcow2Writer,
    ) -> Result<(HostOffset, Vec<Full>), WriteError> {
        let length = packed.len() as u64;
        let mut state = self.lock();
        let State { run, refcounts } = &mut *state;
        let mut full = Vec::new();
        // The space goes on where the run ends, unless somebody else has taken it.
        if let Some(run) = run
            && run.next + length > run.end
            && file.space.extend(HostOffset(run.end), self.run_bytes >> self.cluster_bits.bits())?
        {
            refcounts.begin_packed(run.end..run.end + self.run_bytes);
            run.end += self.run_bytes;
            refcounts.write_before(HostOffset(run.next), file)?;
        }
        let fits = |run: &Run, refcounts: &mut Refcounts| {
            let bytes = run.next..run.next + length;
            bytes.end <= run.end && refcounts.can_add(&bytes)
        };
        let run = match run {
            Some(run) if fits(run, refcounts) => run,
            run => {
                full.extend(run.take().and_then(Run::rest));
                let start = file.space.take(self.run_bytes >> self.cluster_bits.bits())?;
                refcounts.begin_packed(start.0..start.0 + self.run_bytes);
                refcounts.write_before(start, file)?;
                run.insert(Run::begin(start.0, self.run_bytes, file)?)
            }
        };
        let host = HostOffset(run.next);
        refcounts.add_packed(&(run.next..run.next + length));
        full.extend(run.append(packed, file)?);
        Ok((host, full))
    }

    /// Writes what is still in memory. Nothing can be put afterwards.
    pub(super) fn finish(&self, file: &Qcow2Writer) -> Result<(), WriteError> {
        let mut state = self.lock();
        let State { run, refcounts } = &mut *state;
        let Some(run) = run.take() else { return Ok(()) };
        // Clusters that were taken in vain are left to the tables that follow.
        let unused = run.next.next_multiple_of(self.cluster_bits.size())..run.end;
        if file.space.give_back(HostOffset(unused.start), HostOffset(unused.end)) {
            refcounts.end_packed(unused);
        }
        drop(state);
        if let Some((host, buffer)) = run.rest() {
            file.write(host, &buffer)?;
        }
        Ok(())
    }

    /// Writes the refcounts of the whole file, and tells where their table is. The last of all that
    /// takes space in the file.
    pub(super) fn write_refcounts(&self, file: &Qcow2Writer) -> Result<Table, WriteError> {
        self.lock().refcounts.finish(file)
    }
}

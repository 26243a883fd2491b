//! Compressors that threads share.

use std::fmt;
use std::ops::{Deref, DerefMut};

use crossbeam::channel::{self, Receiver, RecvTimeoutError, Sender};

use super::NativeError;
use crate::cancel::Cancel;
use crate::qcow2::compressor::Compressor;
use crate::qcow2::header::CompressionType;
use crate::qcow2::writer::WriteError;

/// Most compressors, whatever the number of processors.
const MOST: usize = 64;

/// Packing keeps a processor busy, so more compressors than twice the processors would only take
/// memory: those that are handing over what they packed do not compute.
#[derive(Debug)]
pub(super) struct Compressors {
    kind: CompressionType,
    level: u8,
    cluster_size: usize,
    idle: Receiver<Slot>,
    back: Sender<Slot>,
}

/// A compressor, once it is needed.
struct Slot(Option<Compressor>);

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Slot(compressor)" } else { "Slot" })
    }
}

impl Compressors {
    pub(super) fn new(kind: CompressionType, level: u8, cluster_size: usize) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let count = (2 * processors).min(MOST);
        let (back, idle) = channel::bounded(count);
        for _ in 0..count {
            // There is room for all.
            let _ = back.send(Slot(None));
        }
        Self { kind, level, cluster_size, idle, back }
    }

    /// A compressor. Waits until one is idle, or `aborted` says that there is no use in waiting.
    pub(super) fn get(&self, aborted: impl Fn() -> bool) -> Result<Lease<'_>, NativeError> {
        let slot = loop {
            match self.idle.recv_timeout(Cancel::POLL) {
                Ok(slot) => break slot,
                Err(RecvTimeoutError::Timeout) if !aborted() => {}
                Err(_) => return Err(WriteError::Aborted.into()),
            }
        };
        let mut lease = Lease { slot, compressors: self };
        if lease.slot.0.is_none() {
            let compressor = Compressor::new(self.kind, self.level, self.cluster_size);
            lease.slot.0 = Some(compressor.map_err(NativeError::Compress)?);
        }
        Ok(lease)
    }
}

/// A compressor that is in use. Goes back on drop.
pub(super) struct Lease<'a> {
    slot: Slot,
    compressors: &'a Compressors,
}

impl Deref for Lease<'_> {
    type Target = Compressor;

    fn deref(&self) -> &Compressor {
        self.slot.0.as_ref().expect("made before it is leased")
    }
}

impl DerefMut for Lease<'_> {
    fn deref_mut(&mut self) -> &mut Compressor {
        self.slot.0.as_mut().expect("made before it is leased")
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        let _ = self.compressors.back.send(Slot(self.slot.0.take()));
    }
}

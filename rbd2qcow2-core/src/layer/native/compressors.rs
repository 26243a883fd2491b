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

/// The compressors of all layers that are written at once; clones share them.
///
/// Packing keeps a processor busy, so more compressors than twice the processors would only take
/// memory, up to 34 MiB each: those that are handing over what they packed do not compute.
#[derive(Clone, Debug)]
pub struct Compressors {
    idle: Receiver<Slot>,
    back: Sender<Slot>,
}

/// What a compressor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Form {
    pub(super) kind: CompressionType,
    pub(super) level: u8,
    pub(super) cluster_size: usize,
}

/// A compressor, once it is needed.
struct Slot(Option<(Form, Compressor)>);

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Slot").field(&self.0.as_ref().map(|(form, _)| form)).finish()
    }
}

impl Default for Compressors {
    fn default() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let count = (2 * processors).min(MOST);
        let (back, idle) = channel::bounded(count);
        for _ in 0..count {
            // There is room for all.
            let _ = back.send(Slot(None));
        }
        Self { idle, back }
    }
}

impl Compressors {
    /// A compressor. Waits until one is idle, or `aborted` says that there is no use in waiting.
    pub(super) fn get(&self, form: Form, aborted: impl Fn() -> bool) -> Result<Lease<'_>, NativeError> {
        let slot = loop {
            match self.idle.recv_timeout(Cancel::POLL) {
                Ok(slot) => break slot,
                Err(RecvTimeoutError::Timeout) if !aborted() => {}
                Err(_) => return Err(WriteError::Aborted.into()),
            }
        };
        let mut lease = Lease { slot, compressors: self };
        if !matches!(&lease.slot.0, Some((known, _)) if *known == form) {
            // The old one goes first: there is memory for so many.
            lease.slot.0 = None;
            let compressor = Compressor::new(form.kind, form.level, form.cluster_size);
            lease.slot.0 = Some((form, compressor.map_err(NativeError::Compress)?));
        }
        Ok(lease)
    }

    /// Whether any of them has been used. To be asked when none is in use.
    #[cfg(test)]
    pub(crate) fn were_used(&self) -> bool {
        let slots: Vec<_> = self.idle.try_iter().collect();
        let used = slots.iter().any(|slot| slot.0.is_some());
        for slot in slots {
            let _ = self.back.send(slot);
        }
        used
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
        &self.slot.0.as_ref().expect("made before it is leased").1
    }
}

impl DerefMut for Lease<'_> {
    fn deref_mut(&mut self) -> &mut Compressor {
        &mut self.slot.0.as_mut().expect("made before it is leased").1
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        let _ = self.compressors.back.send(Slot(self.slot.0.take()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each layer had its own once: with many images at once they took gigabytes.
    #[test]
    fn layers_share_compressors_whatever_they_pack() {
        let all = Compressors::default();
        let (count, other) = (all.idle.len(), all.clone());
        let zstd = Form { kind: CompressionType::Zstd, level: 3, cluster_size: 65536 };
        let mut leases: Vec<_> = (0..count).map(|_| all.get(zstd, || false).expect("idle")).collect();
        assert!(other.get(zstd, || true).is_err(), "there is one more");
        leases.pop();
        let zlib = Form { kind: CompressionType::Zlib, level: 0, cluster_size: 512 };
        for form in [zlib, zstd] {
            let mut lease = other.get(form, || true).expect("idle");
            let cluster = vec![7; form.cluster_size];
            let packed =
                lease.pack(&cluster, form.cluster_size - 1).expect("packed").expect("smaller").to_vec();
            let mut unpacked = vec![0; form.cluster_size];
            crate::qcow2::compressed::unpack(form.kind, &packed, &mut unpacked).expect("unpacked");
            assert!(unpacked == cluster);
        }
        drop(leases);
        assert!(all.were_used() && all.were_used() && !Compressors::default().were_used());
    }
}

//! A layer that takes everything, and holds only what differs from the chain below it.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Comparison;
use crate::buffer::BufferPool;
use crate::cancel::Cancel;
use crate::chain::Point;
use crate::chain::digests::{Content, DigestIndex, DigestsInfo};
use crate::extent::{Extent, ExtentKind, align_down, align_up};
use crate::layer::{LayerError, LayerWriter, Patch};
use crate::qcow2::chain::ChainReader;
use crate::qcow2::error::ReadError;
use crate::qcow2::layer::Piece;
use crate::ranges::remainder;
use crate::source::chain::ChainSource;
use crate::source::{BoxError, SourceError};

/// Bytes of the chain that are read and compared together, at most: the largest grain.
const CHUNK: u64 = 2 << 20;

/// The longest gap between two pieces that are read together, in bytes.
const GAP: u64 = 64 << 10;

/// Memory for what is read of the chain, in bytes.
const MEMORY: usize = 16 << 20;

/// Files of digests that are open at the same time, at most. Layers beyond that are read.
const DIGESTS_OPEN: usize = 64;

/// Why the image could not be compared with the chain.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CompareError {
    /// The chain could not be read.
    #[error("cannot read what the chain holds, to compare the image with it")]
    Chain(#[from] SourceError),
    /// Its tables could not be read.
    #[error("cannot read what the chain holds, to compare the image with it")]
    Map(#[from] ReadError),
    /// A stop was asked for.
    #[error("the image is no longer compared with the chain")]
    Stopped,
}

/// Hands to a layer only what the chain below it does not hold already, in whole grains.
///
/// Data are first held against the digests of the layer that shows there; where these are the same, the
/// chain is not read. That needs digests that are beyond doubt: of a point with a manifest, which names them.
pub(crate) struct OnlyChanged<'a> {
    layer: &'a dyn LayerWriter,
    /// The new layer's file, for errors.
    path: PathBuf,
    chain: &'a ChainReader,
    below: ChainSource<'a>,
    buffers: BufferPool,
    /// For each layer of the chain.
    digests: Vec<Mutex<Digests>>,
    open: AtomicUsize,
    stop: &'a Cancel,
}

/// The digests of a layer.
enum Digests {
    /// They have not been asked for.
    Closed(PathBuf, DigestsInfo),
    /// They are what the manifest says.
    Open(std::sync::Arc<DigestIndex>),
    /// There are none, or they are not beyond doubt, or too many are open.
    None,
}

impl<'a> OnlyChanged<'a> {
    /// Writes to `layer`, which becomes the file at `path` of `virtual_size` bytes, what differs from
    /// `chain`, whose layers are those of `points`, in the same order. Takes 16 MiB more.
    pub(crate) fn new(
        layer: &'a dyn LayerWriter,
        path: PathBuf,
        virtual_size: u64,
        chain: &'a ChainReader,
        points: &[&Point],
        stop: &'a Cancel,
    ) -> Self {
        let digests = |point: &&Point| match &point.manifest {
            // A layer that has a base below may hold things that its digests do not tell of.
            Some(manifest) if point.base.is_none() => {
                Digests::Closed(point.digests.clone(), manifest.digests.clone())
            }
            _ => Digests::None,
        };
        Self {
            layer,
            path,
            chain,
            below: ChainSource::below(chain, virtual_size),
            buffers: BufferPool::new(MEMORY),
            digests: points.iter().map(|point| Mutex::new(digests(point))).collect(),
            open: AtomicUsize::new(0),
            stop,
        }
    }

    /// The parts of a patch's pieces that the chain does not hold: ascending, disjoint, whole grains.
    fn differences(&self, patch: &Patch) -> Result<Vec<Extent>, CompareError> {
        let mut rest = Vec::new();
        for piece in &patch.pieces {
            match piece.kind {
                ExtentKind::Zero => rest.push(*piece),
                ExtentKind::Data => {
                    let unknown = remainder(&[piece.range()], &self.known(patch, piece)?);
                    rest.extend(unknown.into_iter().filter_map(|range| Extent::new(range, piece.kind)));
                }
            }
        }
        let mut differing: Vec<Extent> = Vec::new();
        let mut parts = rest.into_iter().flat_map(|piece| piece.split(CHUNK)).peekable();
        while let Some(first) = parts.next() {
            let mut together = vec![first];
            let mut end = first.end();
            while let Some(next) = parts.next_if(|next| {
                next.offset - end < GAP && align_down(next.offset, CHUNK) == align_down(first.offset, CHUNK)
            }) {
                end = next.end();
                together.push(next);
            }
            let part = Patch { offset: patch.offset, data: patch.data.clone(), pieces: together };
            for extent in self.comparison().differences(&part)?.ok_or(CompareError::Stopped)? {
                match differing.last_mut() {
                    Some(last) if last.end() == extent.offset && last.kind == extent.kind => {
                        last.length += extent.length;
                    }
                    _ => differing.push(extent),
                }
            }
        }
        Ok(differing)
    }

    fn comparison(&self) -> Comparison<'_> {
        let grain = usize::try_from(self.layer.grain()).expect("a cluster at most");
        Comparison { image: &self.below, buffers: &self.buffers, stop: self.stop, grain }
    }

    /// What of a piece of data is the same as in the chain, by the digests: whole grains, ascending.
    fn known(&self, patch: &Patch, piece: &Extent) -> Result<Vec<Range<u64>>, CompareError> {
        let end = self.chain.virtual_size();
        let mut known: Vec<Range<u64>> = Vec::new();
        let mut held: Option<(usize, Range<u64>)> = None;
        for found in self.chain.map(piece.offset.min(end)..piece.end().min(end))? {
            let found = found?;
            let layer = found.layer.filter(|_| matches!(found.piece, Piece::Data | Piece::Compressed));
            match (&mut held, layer) {
                // Packed or not, it is the same layer's.
                (Some((last, range)), Some(layer)) if *last == layer => range.end = found.range.end,
                _ => {
                    let before = std::mem::replace(&mut held, layer.map(|layer| (layer, found.range)));
                    self.known_of(patch, before, &mut known);
                }
            }
        }
        self.known_of(patch, held, &mut known);
        let grain = self.layer.grain();
        let whole = |range: Range<u64>| {
            let end = if range.end == piece.end() { range.end } else { align_down(range.end, grain) };
            align_up(range.start, grain)..end
        };
        Ok(known.into_iter().map(whole).filter(|range| range.start < range.end).collect())
    }

    /// Adds what of a range that one layer shows is the same. Neighbours are joined.
    fn known_of(&self, patch: &Patch, held: Option<(usize, Range<u64>)>, known: &mut Vec<Range<u64>>) {
        let Some((layer, range)) = held else { return };
        // What cannot be told by digests is told by the bytes.
        let records = self.digests(layer).and_then(|digests| digests.within(&range).ok());
        for record in records.into_iter().flatten() {
            let Content::Data(hash) = record.content else { continue };
            let extent = Extent { offset: record.offset, length: record.length, kind: ExtentKind::Data };
            if blake3::hash(&patch.bytes(&extent)) != hash {
                continue;
            }
            match known.last_mut() {
                Some(last) if last.end == record.offset => last.end = record.end(),
                _ => known.push(extent.range()),
            }
        }
    }

    fn digests(&self, layer: usize) -> Option<std::sync::Arc<DigestIndex>> {
        // What the Python tool's chains begin with is no point's.
        let mut digests = self.digests.get(layer)?.lock().unwrap_or_else(PoisonError::into_inner);
        if let Digests::Closed(path, info) = &*digests {
            let may_open = self.open.fetch_add(1, Ordering::Relaxed) < DIGESTS_OPEN;
            let opened = may_open.then(|| DigestIndex::open(path, info));
            if let Some(Err(error)) = &opened {
                log::debug!("{}: {error}; the layer is read instead", path.display());
            }
            *digests = opened.and_then(Result::ok).map_or(Digests::None, |index| Digests::Open(index.into()));
        }
        match &*digests {
            Digests::Open(index) => Some(std::sync::Arc::clone(index)),
            Digests::Closed(..) | Digests::None => None,
        }
    }
}

impl LayerWriter for OnlyChanged<'_> {
    fn grain(&self) -> u64 {
        self.layer.grain()
    }

    fn unit(&self) -> u64 {
        self.layer.unit()
    }

    fn wants_whole_units(&self) -> bool {
        self.layer.wants_whole_units()
    }

    fn write(&self, patch: Patch) -> Result<Vec<Extent>, LayerError> {
        let pieces = self
            .differences(&patch)
            .map_err(|cause| LayerError::Write { path: self.path.clone(), cause: BoxError::from(cause) })?;
        if pieces.is_empty() { Ok(pieces) } else { self.layer.write(Patch { pieces, ..patch }) }
    }

    fn abort(&self) {
        self.layer.abort();
    }

    fn finish(&self) -> Result<(), LayerError> {
        self.layer.finish()
    }
}

//! What lies packed in the layers that are put into one.

use std::ops::Range;
use std::sync::Arc;

use super::{Merge, MergeError};
use crate::chain::Point;
use crate::layer::Compression;
use crate::layer::native::{PackedCluster, PackedClusters};
use crate::qcow2::chain::{ChainPiece, ChainReader};
use crate::qcow2::error::ReadError;
use crate::qcow2::header::CompressionType;
use crate::qcow2::layer::{LayerReader, Piece};

/// Bytes of the image whose tables are looked at between two looks at the cancel flag.
const STEP: u64 = 1 << 30;

/// The packed clusters of the newest layers of a chain. Holds none of them in memory.
#[derive(Debug)]
pub(super) struct MergedClusters {
    pub(super) chain: Arc<ChainReader>,
    /// How many layers are put into one. What those below hold is not copied on purpose.
    pub(super) merged: usize,
}

impl PackedClusters for MergedClusters {
    fn find(
        &self,
        range: Range<u64>,
        cluster_size: u64,
        kind: CompressionType,
    ) -> Result<Option<PackedCluster>, ReadError> {
        // All of it must be one layer's: what a newer one has changed of it, or an older, shorter one has
        // cut off, is not in the packed data.
        let owner = match self.chain.map(range.clone())?.next().transpose()? {
            Some(ChainPiece { range: found, piece: Piece::Compressed, layer: Some(layer) })
                if found == range && layer < self.merged =>
            {
                &self.chain.layers()[layer]
            }
            _ => return Ok(None),
        };
        let header = owner.header();
        if header.cluster_bits.size() != cluster_size || header.compression_type != kind {
            return Ok(None);
        }
        let bytes = owner.read_packed(range.start)?;
        Ok(bytes.map(|bytes| PackedCluster { bytes, layer: owner.path().to_owned() }))
    }
}

impl Merge<'_> {
    /// How the newest of these points that is packed is; they are the newest of the chain.
    pub(super) fn compression(
        &self,
        points: &[&Point],
        chain: &ChainReader,
    ) -> Result<Compression, MergeError> {
        for (point, layer) in points.iter().zip(chain.layers()) {
            let recorded = point.manifest.as_ref().map(|manifest| manifest.record.compression.parse());
            let found = match recorded {
                Some(Ok(recorded)) => recorded,
                // Points of the Python tool have no manifest: QEMU packed them, or not.
                _ => self.compression_of(layer)?,
            };
            if found != Compression::None {
                return Ok(found);
            }
        }
        Ok(Compression::None)
    }

    /// How a layer is packed, by what it holds: every header names a compression.
    fn compression_of(&self, layer: &LayerReader) -> Result<Compression, MergeError> {
        let failed = |cause| MergeError::Read { point: self.child, cause };
        let size = layer.virtual_size();
        for number in 0..size.div_ceil(STEP) {
            if self.cancel.is_set() {
                return Err(MergeError::Cancelled);
            }
            let start = number * STEP;
            for piece in layer.map(start..size.min(start.saturating_add(STEP))).map_err(failed)? {
                if piece.map_err(failed)?.1 == Piece::Compressed {
                    return Ok(match layer.header().compression_type {
                        CompressionType::Zlib => Compression::Zlib,
                        CompressionType::Zstd => Compression::Zstd { level: None },
                    });
                }
            }
        }
        Ok(Compression::None)
    }
}

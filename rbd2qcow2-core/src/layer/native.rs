//! A layer written by this program itself, from many threads at once.
//!
//! What a patch calls changed goes to the file as it is: runs of whole clusters in one write, parts
//! of a cluster as subclusters. With compression, each cluster of which something changed is packed
//! whole, and stored so if that is smaller than what changed of it; where that is little, the
//! cluster's beginning tells first whether there is hope. For that the layer wants the whole content
//! of such clusters, and may come to hold more than has changed: the same bytes as the layers below,
//! or else they would have changed. Where layers are put into one, a cluster that lies packed in one
//! of them already is copied instead.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::{Compression, ExtendedL2, LayerError, LayerSpec, LayerWriter, Patch, SMALLEST_EXTENDED};
use crate::extent::{Extent, ExtentKind};
use crate::qcow2::header::{ClusterBits, CompressionType};
use crate::qcow2::table::SUBCLUSTERS;
use crate::qcow2::writer::{FileSpec, Qcow2Writer, SubclusterData, WriteError};

mod clusters;
mod compressors;
mod error;
mod packed;

use clusters::{Changed, Held, Shape};
pub use compressors::Compressors;
use compressors::Form;
pub use error::NativeError;
pub(crate) use packed::{PackedCluster, PackedClusters};

/// The level of Zstandard where none is asked for: files are as small as QEMU's, which uses 3 on
/// clusters of 64 KiB, for half the work.
const ZSTD_LEVEL: u8 = 2;

/// Where little of a cluster has changed, so many times its length of the cluster's beginning are packed first,
/// up to half of the cluster: if they do not get smaller than what has changed, all of the cluster hardly
/// will, and most of the work of a scattered increment was to find that out.
const BEGINNING: usize = 4;

/// A [`LayerWriter`] that writes the file itself. See the [module](self).
#[derive(Debug)]
pub struct NativeLayer {
    file: Qcow2Writer,
    shape: Shape,
    /// How clusters are packed; `None` where they are stored as they are.
    packed: Option<Form>,
    compressors: Compressors,
    /// What need not be packed.
    known: Option<Arc<dyn PackedClusters>>,
}

impl NativeLayer {
    /// Creates the file. The backing file is not opened and need not exist. The file is no qcow2
    /// image before [`LayerWriter::finish`]. Layers that are written at once should have clones of the
    /// same `compressors`.
    ///
    /// # Errors
    /// [`LayerError::Create`]: the file exists, cannot be made, or the spec is none of a qcow2 file.
    pub fn create(spec: &LayerSpec, compressors: Compressors) -> Result<Self, LayerError> {
        Self::try_create(spec, compressors)
            .map_err(|cause| LayerError::Create { path: spec.path.clone(), cause: cause.into() })
    }

    fn try_create(spec: &LayerSpec, compressors: Compressors) -> Result<Self, NativeError> {
        let cluster_bits = ClusterBits::from_size(spec.cluster_size.into())
            .ok_or(NativeError::ClusterSize { size: spec.cluster_size })?;
        let extended_l2 = spec.extended_l2 == ExtendedL2::Auto && spec.cluster_size >= SMALLEST_EXTENDED;
        let (compression_type, level) = match spec.compression {
            Compression::None => (CompressionType::Zlib, None),
            Compression::Zlib => (CompressionType::Zlib, Some(0)),
            Compression::Zstd { level } => (CompressionType::Zstd, Some(level.unwrap_or(ZSTD_LEVEL))),
        };
        let file = Qcow2Writer::create(FileSpec {
            path: spec.path.clone(),
            virtual_size: spec.virtual_size,
            backing: spec.backing.clone(),
            cluster_bits,
            extended_l2,
            compression_type,
        })?;
        let cluster_size = cluster_bits.size();
        let grain = if extended_l2 { cluster_size / SUBCLUSTERS } else { cluster_size };
        Ok(Self {
            file,
            shape: Shape { grain, cluster_size, virtual_size: spec.virtual_size },
            packed: level.map(|level| Form {
                kind: compression_type,
                level,
                cluster_size: index(cluster_size),
            }),
            compressors,
            known: None,
        })
    }

    fn try_write(&self, patch: &Patch) -> Result<Vec<Extent>, NativeError> {
        let mut held = Held::new(self.shape);
        // Whole clusters that are stored as they are, in one write.
        let mut plain = 0..0;
        for changed in self.shape.clusters(&patch.pieces)? {
            if changed != Changed::Whole(plain.end) {
                self.write_plain(std::mem::take(&mut plain), patch)?;
            }
            match changed {
                Changed::Zeroes(range) => {
                    self.file.write_zeroes(range.clone())?;
                    held.clusters(range, ExtentKind::Zero);
                }
                Changed::Whole(cluster) => {
                    if !self.write_packed(cluster, self.shape.cluster_size, patch)? {
                        let start = if plain.is_empty() { cluster } else { plain.start };
                        plain = start..cluster + 1;
                    }
                    held.clusters(cluster..cluster + 1, ExtentKind::Data);
                }
                Changed::Parts(cluster, parts) => {
                    if self.write_packed(cluster, parts.data_count() * self.shape.grain, patch)? {
                        held.clusters(cluster..cluster + 1, ExtentKind::Data);
                    } else {
                        let data = SubclusterData { offset: patch.offset, bytes: &patch.data };
                        self.file.write_subclusters(cluster, parts, data)?;
                        held.parts(cluster, parts);
                    }
                }
            }
        }
        self.write_plain(plain, patch)?;
        Ok(held.extents)
    }

    /// Writes whole clusters as they are.
    fn write_plain(&self, clusters: Range<u64>, patch: &Patch) -> Result<(), NativeError> {
        if clusters.is_empty() {
            return Ok(());
        }
        let first = clusters.start;
        Ok(self.file.write_clusters(first, &self.content(clusters, patch))?)
    }

    /// Writes a cluster packed: as it lies packed elsewhere, or else if that is seen to take less than `plain`
    /// bytes. Tells whether it did.
    fn write_packed(&self, cluster: u64, plain: u64, patch: &Patch) -> Result<bool, NativeError> {
        let Some(form) = self.packed.filter(|_| plain > 0) else { return Ok(false) };
        let mut content = self.content(cluster..cluster + 1, patch);
        if self.copy_packed(cluster, form, &content)? {
            return Ok(true);
        }
        if content.len() < form.cluster_size {
            let mut padded = content.to_vec();
            padded.resize(form.cluster_size, 0);
            content = padded.into();
        }
        let mut compressor = self.compressors.get(form, || self.file.is_aborted())?;
        let (most, beginning) = (index(plain - 1), index(plain) * BEGINNING);
        if beginning <= content.len() / 2 {
            let tried = compressor.pack(&content[..beginning], most).map_err(NativeError::Compress)?;
            if tried.is_none() {
                return Ok(false);
            }
        }
        let packed = compressor.pack(&content, most).map_err(NativeError::Compress)?;
        let Some(packed) = packed else { return Ok(false) };
        self.file.write_compressed(cluster, packed)?;
        Ok(true)
    }

    /// The bytes of whole clusters, to the end of the image at most.
    fn content(&self, clusters: Range<u64>, patch: &Patch) -> Bytes {
        let range = self.shape.range(clusters);
        patch.bytes(&Extent { offset: range.start, length: range.end - range.start, kind: ExtentKind::Data })
    }
}

impl LayerWriter for NativeLayer {
    fn grain(&self) -> u64 {
        self.shape.grain
    }

    fn unit(&self) -> u64 {
        self.shape.cluster_size
    }

    fn wants_whole_units(&self) -> bool {
        self.packed.is_some()
    }

    fn write(&self, patch: Patch) -> Result<Vec<Extent>, LayerError> {
        self.try_write(&patch)
            .inspect_err(|_| self.file.give_up())
            .map_err(|cause| LayerError::Write { path: self.file.path().to_owned(), cause: cause.into() })
    }

    fn abort(&self) {
        self.file.abort();
    }

    fn finish(&self) -> Result<(), LayerError> {
        self.file.finish().map_err(|cause| {
            let path = self.file.path().to_owned();
            match cause {
                WriteError::Sync(_) => LayerError::Finish { path, cause: cause.into() },
                _ => LayerError::Write { path, cause: cause.into() },
            }
        })
    }
}

/// Lengths of patches and clusters, which are in memory.
fn index(length: u64) -> usize {
    usize::try_from(length).expect("in memory")
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

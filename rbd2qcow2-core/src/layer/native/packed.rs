//! Clusters that lie packed elsewhere already, and are stored as they are.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use super::compressors::Form;
use super::{NativeError, NativeLayer};
use crate::qcow2::compressed::unpack_stream;
use crate::qcow2::error::ReadError;
use crate::qcow2::header::CompressionType;
use crate::qcow2::table::GuestOffset;

/// Knows of clusters that lie packed elsewhere already, so that they need not be packed once more.
pub(crate) trait PackedClusters: fmt::Debug + Send + Sync {
    /// The packed data of a cluster, if there are any that hold just that: `range` in bytes of the guest's
    /// image, a cluster of `cluster_size` bytes that is cut short by nothing but the image's end, packed
    /// as `kind`. Blocks while it reads.
    ///
    /// # Errors
    /// Where it cannot be found out whether there are any, or they cannot be read.
    fn find(
        &self,
        range: Range<u64>,
        cluster_size: u64,
        kind: CompressionType,
    ) -> Result<Option<PackedCluster>, ReadError>;
}

/// Packed data of a cluster, from a layer.
#[derive(Debug)]
pub(crate) struct PackedCluster {
    /// Begin with the packed data. How long these are is recorded nowhere; anything may follow.
    pub(crate) bytes: Vec<u8>,
    /// The layer's file, to be named in errors.
    pub(crate) layer: PathBuf,
}

impl PackedCluster {
    /// The packed data alone: what follows them would make the file grow with each copy of a copy.
    ///
    /// `content` is what they must hold, from `guest` on in the guest's image: a cluster, or what of it lies
    /// before the image's end. `None` where they are not to be stored: they take no less than a cluster, or
    /// there is something but zeroes behind the image's end, as where a longer image was cut, which would
    /// come to light if the image grew.
    ///
    /// # Errors
    /// [`NativeError::PackedDamaged`], [`NativeError::PackedDiffers`].
    pub(super) fn stream(
        &self,
        form: Form,
        guest: u64,
        content: &[u8],
    ) -> Result<Option<&[u8]>, NativeError> {
        let (layer, guest) = (|| self.layer.clone(), GuestOffset(guest));
        let mut cluster = vec![0; form.cluster_size];
        let length = unpack_stream(form.kind, &self.bytes, &mut cluster)
            .map_err(|cause| NativeError::PackedDamaged { layer: layer(), guest, cause })?;
        // The digests tell of the content. Nothing else must be stored, whoever is to blame.
        let behind = cluster.strip_prefix(content);
        let behind = behind.ok_or_else(|| NativeError::PackedDiffers { layer: layer(), guest })?;
        let fit = length < form.cluster_size && behind.iter().all(|byte| *byte == 0);
        Ok(fit.then_some(&self.bytes[..length]))
    }
}

impl NativeLayer {
    /// Has clusters that `packed` knows stored as it has them.
    pub(crate) fn with_packed(self, packed: Arc<dyn PackedClusters>) -> Self {
        Self { known: Some(packed), ..self }
    }

    /// Stores a cluster as it lies packed elsewhere, if it does. Tells whether it did.
    pub(super) fn copy_packed(&self, cluster: u64, form: Form, content: &[u8]) -> Result<bool, NativeError> {
        let Some(known) = &self.known else { return Ok(false) };
        let range = self.shape.range(cluster..cluster + 1);
        let start = range.start;
        let found = known.find(range, self.shape.cluster_size, form.kind);
        let Some(found) = found.map_err(NativeError::ReadPacked)? else { return Ok(false) };
        let Some(stream) = found.stream(form, start, content)? else { return Ok(false) };
        self.file.write_compressed(cluster, stream)?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests;

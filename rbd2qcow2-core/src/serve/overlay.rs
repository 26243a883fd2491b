//! What clients write to: a file that holds nothing but what they wrote.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::ServeError;
use crate::chain::image_directory_around;
use crate::layer::native::{Compressors, NativeLayer};
use crate::layer::{Compression, ExtendedL2, LayerSpec, LayerWriter};
use crate::point::{OpenPoint, PointError};

/// An empty qcow2 file of a point's size, alone in a private directory. Dropping it removes both; who has
/// the file open keeps it.
#[derive(Debug)]
pub(super) struct Overlay {
    path: PathBuf,
    /// Held for its drop.
    _directory: TempDir,
}

impl Overlay {
    /// Makes the file in `directory`, or in the one for temporary files. It names no backing file: the
    /// server is told which layer lies below.
    pub(super) fn create(
        directory: Option<&Path>,
        dest: &Path,
        point: &OpenPoint,
    ) -> Result<Self, ServeError> {
        let named = directory.map_or_else(std::env::temp_dir, Path::to_owned);
        let unusable = |cause| ServeError::OverlayDirectory { path: named.clone(), cause };
        let real = named.canonicalize().map_err(unusable)?;
        if let Some(directory) = image_directory_around(dest, &real).map_err(PointError::from)? {
            return Err(ServeError::WithinChain { path: named, directory });
        }
        let private = tempfile::Builder::new().prefix("rbd2qcow2-").tempdir_in(&real).map_err(unusable)?;
        let path = private.path().join("overlay.qcow2");
        let spec = LayerSpec {
            path: path.clone(),
            virtual_size: point.chain().virtual_size(),
            backing: None,
            cluster_size: LayerSpec::DEFAULT_CLUSTER_SIZE,
            compression: Compression::None,
            extended_l2: ExtendedL2::Auto,
        };
        NativeLayer::create(&spec, Compressors::default())
            .and_then(|layer| layer.finish())
            .map_err(|cause| ServeError::Overlay { directory: named, cause })?;
        Ok(Self { path, _directory: private })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

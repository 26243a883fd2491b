//! A raw image as a file: data at the places that they have in the image, holes for the rest.

use std::io;
use std::path::{Path, PathBuf};

use super::{LayerError, LayerWriter, Patch};
use crate::cancel::Cancel;
use crate::extent::{Extent, ExtentKind};
use crate::output::Output;

/// The smallest piece that is written or left a hole, in bytes: a block of most file systems, and a
/// page, which can be written past the page cache.
const GRAIN: u64 = 4096;

/// What is written in one go where data lie scattered, in bytes: less than this between two pieces is
/// cheaper to read, and to find zero, than to ask for piece by piece.
const UNIT: u64 = 64 << 10;

/// A [`LayerWriter`] whose file is the image itself, sparse.
///
/// It must be a root: nothing lies below, so zeroes are not written. The file has its full length from
/// the start, and exactly the image's, which need not be a multiple of anything.
#[derive(Debug)]
pub struct RawFile {
    path: PathBuf,
    output: Output,
    /// Length in bytes.
    size: u64,
    aborted: Cancel,
}

/// Why a raw file could not be written. Its path is told by the [`LayerError`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RawError {
    /// The file could not be created, or not be made as long as the image.
    #[error("cannot make a file of {size} bytes")]
    Create {
        /// The image's size in bytes.
        size: u64,
        /// What the system says.
        #[source]
        cause: io::Error,
    },
    /// Data could not be written.
    #[error("cannot write {length} bytes at offset {offset}")]
    Write {
        /// Where, in bytes from the start.
        offset: u64,
        /// How much, in bytes.
        length: usize,
        /// What the system says.
        #[source]
        cause: io::Error,
    },
    /// The file could not be brought to stable storage.
    #[error("cannot sync")]
    Sync(#[source] io::Error),
    /// [`LayerWriter::abort`] was called, or the file is finished.
    #[error("the file is no longer written to")]
    Aborted,
}

impl RawFile {
    /// Creates the file, which must not exist, of mode 0600 and `size` bytes, all of them a hole.
    ///
    /// # Errors
    /// [`LayerError::Create`]: the file exists, cannot be made, or cannot be so long (on a file system
    /// with shorter files, or under a limit). Nothing is left of it then.
    pub fn create(path: &Path, size: u64) -> Result<Self, LayerError> {
        let failed = |cause| {
            let cause = RawError::Create { size, cause };
            LayerError::Create { path: path.to_owned(), cause: cause.into() }
        };
        let output = Output::create(path, GRAIN).map_err(failed)?;
        output.set_length(size).map_err(|error| {
            // The error to report is the one at hand.
            let _ = std::fs::remove_file(path);
            failed(error)
        })?;
        Ok(Self { path: path.to_owned(), output, size, aborted: Cancel::new() })
    }

    /// Returns what was written. What the copy pads the image's last sector with is not.
    fn try_write(&self, patch: &Patch) -> Result<Vec<Extent>, RawError> {
        let ours = |piece: &Extent| Extent::new(piece.offset..piece.end().min(self.size), piece.kind);
        let held: Vec<_> = patch.pieces.iter().filter_map(ours).collect();
        for piece in held.iter().filter(|piece| piece.kind == ExtentKind::Data) {
            if self.aborted.is_set() {
                return Err(RawError::Aborted);
            }
            let bytes = patch.bytes(piece);
            self.output.write_at(piece.offset, &bytes).map_err(|cause| RawError::Write {
                offset: piece.offset,
                length: bytes.len(),
                cause,
            })?;
        }
        Ok(held)
    }

    fn try_finish(&self) -> Result<(), RawError> {
        if self.aborted.is_set() {
            return Err(RawError::Aborted);
        }
        self.output.finish(self.size).map_err(RawError::Sync)?;
        // Whatever comes now comes too late.
        self.aborted.set();
        Ok(())
    }
}

impl LayerWriter for RawFile {
    fn grain(&self) -> u64 {
        GRAIN
    }

    fn unit(&self) -> u64 {
        UNIT
    }

    fn wants_whole_units(&self) -> bool {
        false
    }

    fn write(&self, patch: Patch) -> Result<Vec<Extent>, LayerError> {
        self.try_write(&patch)
            .map_err(|cause| LayerError::Write { path: self.path.clone(), cause: cause.into() })
    }

    fn abort(&self) {
        self.aborted.set();
    }

    fn finish(&self) -> Result<(), LayerError> {
        self.try_finish().map_err(|cause| LayerError::Finish { path: self.path.clone(), cause: cause.into() })
    }
}

#[cfg(test)]
mod tests;

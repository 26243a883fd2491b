//! Where the bytes come from: a snapshot, and what changed in it since an older one.

use std::ops::Range;

use crate::buffer::Buffer;
use crate::extent::Extent;

pub(crate) mod beyond;
pub mod chain;
#[cfg(feature = "rbd")]
pub mod librbd;
pub mod memory;
pub(crate) mod merged;
pub mod pattern;

/// An error of an implementation underneath a trait of this crate.
pub type BoxError = Box<dyn std::error::Error + Send + Sync + 'static>;

/// Why a source could not deliver.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The parts of the image that may have changed could not be found out.
    #[error("cannot find out which parts of the image to look at in bytes {}..{}", range.start, range.end)]
    Segments {
        /// The bytes of the image that were being looked at.
        range: Range<u64>,
        /// What the source said.
        #[source]
        cause: BoxError,
    },
    /// The changes in a part of the image could not be listed.
    #[error("cannot list what changed in bytes {}..{} of the image", range.start, range.end)]
    Diff {
        /// The bytes of the image that were being compared.
        range: Range<u64>,
        /// What the source said.
        #[source]
        cause: BoxError,
    },
    /// Everything was read, and cannot be relied on.
    #[error("what was read of the image cannot be relied on")]
    Unreliable {
        /// Why.
        #[source]
        cause: BoxError,
    },
    /// Bytes of the snapshot could not be read. A short read is this error too.
    #[error("cannot read {length} bytes at offset {offset} of the snapshot")]
    Read {
        /// Where the read began, in bytes from the image's start.
        offset: u64,
        /// How many bytes were asked for.
        length: usize,
        /// What the source said.
        #[source]
        cause: BoxError,
    },
}

/// A snapshot that can be read, and compared with the base of an incremental backup.
///
/// An embedder implements this to back up something else than an RBD image. All methods are called
/// from several threads at once, for ranges that do not overlap. What they return must not change
/// while the source lives: it is a snapshot.
pub trait RbdDiffSource: Sync {
    /// Size of the snapshot, in bytes. Any value: need not be a multiple of anything.
    fn size(&self) -> u64;

    /// The parts of the image that [`diff`](Self::diff) must be asked about, in ascending order and
    /// disjoint. What lies outside is known to be unchanged since the base (without a base: known
    /// to read as zeroes).
    ///
    /// Starts are multiples of `align` (a power of two, in bytes), ends are too or are the size.
    /// A segment should take [`diff`](Self::diff) a short time and yield few enough extents to hold
    /// in memory; the iterator itself may block, and yields nothing more after an error.
    fn segments(&self, align: u64) -> Box<dyn Iterator<Item = Result<Range<u64>, SourceError>> + Send + '_>;

    /// Appends to `found` every extent of `segment` whose bytes may differ from the base's
    /// (without a base: from zeroes), in any order, disjoint, clipped to `segment`.
    ///
    /// To report too much is allowed, to omit a change is not. [`ExtentKind::Zero`] promises that
    /// the snapshot reads as zeroes there; it is not read again.
    ///
    /// Where the base was larger and the size is no multiple of 512, the bytes behind the last such
    /// multiple count as changed: a layer's size is rounded up to 512, and what it does not hold there
    /// itself would be the base's bytes behind the snapshot's end.
    ///
    /// # Errors
    /// [`SourceError::Diff`]. `found` is then meaningless.
    ///
    /// [`ExtentKind::Zero`]: crate::extent::ExtentKind::Zero
    fn diff(&self, segment: Range<u64>, found: &mut Vec<Extent>) -> Result<(), SourceError>;

    /// Fills the whole of `buffer` with the snapshot's bytes from `offset` on. The range lies within
    /// the size. Blocks until the bytes are there.
    ///
    /// # Errors
    /// [`SourceError::Read`]; also when fewer bytes than asked came. The buffer's content and even
    /// its length are then meaningless.
    fn read(&self, offset: u64, buffer: &mut Buffer) -> Result<(), SourceError>;

    /// Asked once everything was compared and read: whether that can be relied on. A source whose ground may
    /// move while it is read looks whether it did.
    ///
    /// # Errors
    /// [`SourceError::Unreliable`]: what the source told before is worth nothing.
    fn confirm(&self) -> Result<(), SourceError> {
        Ok(())
    }
}

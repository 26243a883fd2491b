//! A check of one layer's structure: what `qemu-img check` does, and somewhat more.
//!
//! [`LayerReader`] checks every entry on its own, when it follows it. Here all of them are looked at
//! together, with what reading never needs: the refcounts. Data are not read,
//! compressed or not: digests tell about those.
//!
//! Source of the format: `docs/interop/qcow2` of QEMU. Of what counts as a use of a cluster: QEMU's
//! check, as its `qemu-img` shows it.

use super::error::ReadError;
use super::layer::LayerReader;
use super::table::HostOffset;
use crate::cancel::Cancel;

mod finding;
pub(super) mod source;
mod walk;
mod window;

pub use finding::{Finding, Place};

use walk::Walk;

/// How many errors, and how many leaks, are kept. The others are counted.
pub const FINDINGS_KEPT: usize = 100;

/// What bounds the work.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// How many clusters of the file are looked at in one pass through the tables: a multiple of 8.
    window_clusters: u64,
    /// How many passes there are, at most, besides those that what the file uses is worth.
    passes: u64,
}

/// Windows of 18 bits for each cluster take 27 MiB, and one does for 1.5 TiB of the default clusters of
/// 128 KiB. Files that a backup wrote need one pass for each 12 million clusters that they use. So many
/// more do for whatever else has holes: a sparse file that needs them all was made to take long.
const LIMITS: Limits = Limits { window_clusters: 12 << 20, passes: 64 };

/// How many windows there may be for each that what is used would fill, if it lay together.
const WINDOWS_FOR_ONE: u64 = 4;

/// Why a file could not be checked to the end. Says nothing of the file's structure.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckError {
    /// The file could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A stop was asked for.
    #[error("the check was stopped")]
    Cancelled,
}

/// How far a check has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// L2 tables that were looked at, in all passes.
    pub done: u64,
    /// How many that will have been at the end, at most.
    pub total: u64,
}

/// What a layer consists of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Figures {
    /// Clusters of the guest's image that have a cluster of the file for themselves: data, but also
    /// zeroes that keep the place of former data.
    pub data: u64,
    /// Clusters of the guest's image that are compressed.
    pub compressed: u64,
    /// Clusters of the guest's image that are zeroes, or have subclusters of zeroes, and take no place
    /// in the file.
    pub zero: u64,
    /// Clusters of the file that hold the header and tables of all kinds.
    pub tables: u64,
    /// Where the last cluster of the file ends that is used, or has a refcount, in bytes.
    pub end: u64,
}

/// What a check has found out about a layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Structure {
    /// The first [`FINDINGS_KEPT`] errors, each with its place.
    pub errors: Vec<Finding>,
    /// How many errors there are.
    pub error_count: u64,
    /// The first [`FINDINGS_KEPT`] clusters whose refcount is too large.
    pub leaks: Vec<Finding>,
    /// How many of these there are.
    pub leak_count: u64,
    /// What the layer consists of, as far as no error stood in the way.
    pub figures: Figures,
}

impl Structure {
    /// Whether there are neither errors nor leaks.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.error_count == 0 && self.leak_count == 0
    }

    fn add(&mut self, finding: Finding) {
        let (kept, count) = if finding.is_leak() {
            (&mut self.leaks, &mut self.leak_count)
        } else {
            (&mut self.errors, &mut self.error_count)
        };
        *count += 1;
        if kept.len() < FINDINGS_KEPT {
            kept.push(finding);
        }
    }
}

/// Checks the structure of `layer`. Looks at every entry of the L1 table, the L2 tables, the refcount
/// table, and at all refcounts of clusters that the file reaches to:
///
/// - whether entries are valid, also those behind the image's end, which are never read;
/// - whether the refcount of each cluster is the number of its uses. Too small is an error, too large
///   a leak. Compressed data use every cluster that a sector of theirs lies in;
/// - whether anything shares a cluster with something else. That is an error even where the refcount
///   agrees, since without internal snapshots nothing needs it; only compressed data may share
///   clusters, among themselves. Whether they overlap within a cluster is not looked at;
/// - whether bit 63 of the entries, by which QEMU knows where it may write in place, is set exactly
///   where the refcount in the file is 1. Compressed and unused clusters must not have it.
///
/// What is wrong is no error of the call, but among what it returns. `progress` is called after each
/// L2 table.
///
/// Blocks while it reads the tables, mostly one after the other, and looks at `cancel` every 64 KiB.
/// Takes some 30 MiB of memory, and 8 bytes for each L2 table: 32 MiB where the L1 table is as large as
/// it may be. Files of more than 12 million clusters take several passes: one for each 12 million, except
/// where nothing is used. In each pass every L2 table in the file is read once, however many entries name
/// it, and of the refcount blocks what describes clusters of the file. There are 64 passes at most, and four
/// more for each 12 million clusters that are used ([`Finding::Scattered`]). So the work is bounded by the
/// file's length, whatever its tables claim; but a sparse file may be long.
///
/// # Errors
/// [`CheckError::Read`] when the file cannot be read ([`ReadError::Io`], [`ReadError::Shrunk`]),
/// [`CheckError::Cancelled`].
pub fn check(
    layer: &LayerReader,
    cancel: &Cancel,
    progress: &mut dyn FnMut(Progress),
) -> Result<Structure, CheckError> {
    Walk::new(layer, cancel, progress, LIMITS).run()
}

#[cfg(test)]
mod tests;

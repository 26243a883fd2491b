//! What a check finds, and where.

use std::fmt;

use crate::qcow2::table::{EntryFault, GuestOffset, HostOffset};

/// What uses, or would use, a cluster of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The header.
    Header,
    /// The L1 table.
    L1Table,
    /// The refcount table.
    RefcountTable,
    /// An entry of the refcount table.
    RefcountEntry {
        /// Which entry.
        index: u64,
        /// The first cluster of the file that its block describes.
        first: HostOffset,
    },
    /// An entry of the L1 table.
    L1Entry {
        /// Which entry.
        index: u64,
        /// First byte that the entry describes.
        guest: GuestOffset,
    },
    /// An entry of an L2 table.
    L2Entry {
        /// Where the table lies in the file.
        table: HostOffset,
        /// Which entry.
        index: u64,
        /// First byte that the entry describes: through the first entry of the L1 table that names
        /// the table.
        guest: GuestOffset,
    },
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header => write!(f, "the header"),
            Self::L1Table => write!(f, "the L1 table"),
            Self::RefcountTable => write!(f, "the refcount table"),
            Self::RefcountEntry { index, first } => {
                write!(f, "entry {index} of the refcount table (for clusters from {first} on)")
            }
            Self::L1Entry { index, guest } => {
                write!(f, "entry {index} of the L1 table (guest offset {guest})")
            }
            Self::L2Entry { table, index, guest } => {
                write!(f, "entry {index} of the L2 table at {table} (guest offset {guest})")
            }
        }
    }
}

/// One thing that is wrong with the structure of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Finding {
    /// An entry of a table is invalid. It was not followed, so whatever only it leads to may be
    /// reported as a leak.
    #[error("{place} is invalid")]
    Entry {
        /// The entry.
        place: Place,
        /// What is wrong with it.
        #[source]
        fault: EntryFault,
    },
    /// Two things use one cluster, and are not both compressed data.
    #[error("{place} uses the cluster at {host}, which something else uses already")]
    Shared {
        /// The one that came second.
        place: Place,
        /// The cluster.
        host: HostOffset,
    },
    /// Compressed data go on behind the cluster in which the file ends.
    #[error("{place} leads to compressed data up to {end} of the file, which ends at {file_bytes:#x}")]
    BehindEnd {
        /// The entry.
        place: Place,
        /// First byte behind the data.
        end: HostOffset,
        /// Length of the file.
        file_bytes: u64,
    },
    /// The flag for a refcount of one is set although the refcount is another one. QEMU would write
    /// in place over what something else may use.
    #[error("{place} says that the cluster at {host} has a refcount of 1, which it has not")]
    CopiedSet {
        /// The entry.
        place: Place,
        /// The cluster.
        host: HostOffset,
    },
    /// The flag for a refcount of one is not set although that is the refcount.
    #[error("{place} does not say that the cluster at {host} has a refcount of 1, which it has")]
    CopiedClear {
        /// The entry.
        place: Place,
        /// The cluster.
        host: HostOffset,
    },
    /// The flag for a refcount of one is set where it has no meaning: of compressed data, or without
    /// a cluster.
    #[error("{place} says that its cluster has a refcount of 1, but has no cluster of its own")]
    CopiedAstray {
        /// The entry.
        place: Place,
    },
    /// The refcount of a cluster is too small: QEMU may give it to something else.
    #[error("the cluster at {host} has a refcount of {stored}, but is used {counted} times")]
    RefcountTooSmall {
        /// The cluster.
        host: HostOffset,
        /// The refcount in the file.
        stored: u64,
        /// How often the cluster is used.
        counted: u64,
    },
    /// A cluster is used so often that nobody counts: 32767 times or more. Not even the smallest
    /// compressed data that there can be are so many in a cluster.
    #[error("the cluster at {host} is used 32767 times or more")]
    TooManyUses {
        /// The cluster.
        host: HostOffset,
    },
    /// What the file uses is so scattered that it would take too long to look at all of it.
    #[error("clusters from {host} on were not looked at: the file is too large for what it holds")]
    Scattered {
        /// The first of these clusters.
        host: HostOffset,
    },
    /// The file says that it has dirty bitmaps, which no backup leaves behind. Their clusters are
    /// taken for leaks.
    #[error("the file has bitmaps, which were not looked at")]
    Bitmaps,
    /// The refcount of a cluster is too large. The cluster, if nothing uses it, is lost space, but
    /// nothing is damaged.
    #[error("the cluster at {host} has a refcount of {stored}, but is used {counted} times")]
    Leak {
        /// The cluster.
        host: HostOffset,
        /// The refcount in the file.
        stored: u64,
        /// How often the cluster is used.
        counted: u64,
    },
}

impl Finding {
    /// Whether it is lost space only, and no error.
    #[must_use]
    pub fn is_leak(&self) -> bool {
        matches!(self, Self::Leak { .. })
    }
}

//! Why a file could not be written.

use std::io;

use crate::qcow2::table::{GuestOffset, HostOffset};

/// Why a qcow2 file could not be written. It is of no use then. The path is told by whoever reports
/// this.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The file could not be created.
    #[error("cannot create the file")]
    Create(#[source] io::Error),
    /// The virtual size is no multiple of 512, or too large for the cluster size.
    #[error(
        "a virtual size of {size} bytes does not go with clusters of {cluster_size} bytes: larger clusters \
         allow larger images"
    )]
    VirtualSize {
        /// The size in bytes.
        size: u64,
        /// The cluster size in bytes.
        cluster_size: u64,
    },
    /// Subclusters were asked for of clusters that are too small for them.
    #[error("clusters of {cluster_size} bytes cannot have subclusters: 16384 are needed")]
    Subclusters {
        /// The cluster size in bytes.
        cluster_size: u64,
    },
    /// QEMU would take the backing file's name for something else.
    #[error("{name:?} cannot be the name of a backing file in the same directory")]
    BackingName {
        /// The name.
        name: String,
    },
    /// The backing file's name is too long for the cluster size.
    #[error("the header does not fit a cluster: larger clusters have room for longer names")]
    Header,
    /// The system refused a write, or reading back what was written.
    #[error("cannot write at {host} of the file")]
    Io {
        /// Where, in the file.
        host: HostOffset,
        /// What the system says.
        #[source]
        cause: io::Error,
    },
    /// The file would become larger than its cluster size allows.
    #[error("the file would be larger than {limit} bytes, the most with this cluster size")]
    FileTooLarge {
        /// The limit in bytes.
        limit: u64,
    },
    /// A cluster was written for the second time, or lies behind the image's end: a defect of the
    /// caller's.
    #[error("internal error: the cluster at {guest} was written twice, or is none of the image")]
    Twice {
        /// The cluster's first byte, as the guest sees it.
        guest: GuestOffset,
    },
    /// The file could not be brought to stable storage.
    #[error("cannot bring the file to stable storage")]
    Sync(#[source] io::Error),
    /// [`abort`](super::Qcow2Writer::abort) was called, or the file is finished, or is to be although
    /// a write has failed.
    #[error("the file is not to be written any more")]
    Aborted,
}

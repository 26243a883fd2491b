//! What can be wrong with a layer or a chain that is read.

use std::io;
use std::path::{Path, PathBuf};

use super::compressed::UnpackError;
use super::header::HeaderError;
use super::table::{EntryFault, GuestOffset, HostOffset};

/// Why a layer or chain could not be read. Whatever was read meanwhile must not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The header was not accepted, or speaks against reading the file.
    #[error("cannot open the layer {}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        cause: HeaderError,
    },
    /// The file could not be read.
    #[error("cannot read the layer {} at {host}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Where, in the file.
        host: HostOffset,
        /// What the system says.
        #[source]
        cause: io::Error,
    },
    /// The file of a long chain was closed meanwhile, and is another one now, or is gone. What was read of it
    /// before may not fit what is there.
    #[error(
        "the layer {} was replaced, changed or removed while its chain was read: leave the chain alone and try \
         again",
        path.display()
    )]
    Replaced {
        /// The file.
        path: PathBuf,
    },
    /// The file has become shorter since it was opened.
    #[error("the layer {} became shorter while it was read: nothing is left at {host}", path.display())]
    Shrunk {
        /// The file.
        path: PathBuf,
        /// Where something was missing.
        host: HostOffset,
    },
    /// An entry of the L1 table is invalid.
    #[error("the layer {} is damaged: entry {index} of its L1 table (guest offset {guest})", path.display())]
    L1Entry {
        /// The file.
        path: PathBuf,
        /// Which entry.
        index: u64,
        /// First byte that the entry describes.
        guest: GuestOffset,
        /// What is wrong with it.
        #[source]
        fault: EntryFault,
    },
    /// An entry of an L2 table is invalid.
    #[error(
        "the layer {} is damaged: entry {index} of the L2 table at {table} (guest offset {guest})",
        path.display()
    )]
    L2Entry {
        /// The file.
        path: PathBuf,
        /// Where the table lies in the file.
        table: HostOffset,
        /// Which entry.
        index: u64,
        /// First byte that the entry describes.
        guest: GuestOffset,
        /// What is wrong with it.
        #[source]
        fault: EntryFault,
    },
    /// A compressed cluster cannot be unpacked.
    #[error(
        "the layer {} is damaged: its compressed cluster at {host} (guest offset {guest})",
        path.display()
    )]
    Compressed {
        /// The file.
        path: PathBuf,
        /// First byte of the cluster, as the guest sees it.
        guest: GuestOffset,
        /// Where the packed data lie in the file.
        host: HostOffset,
        /// What is wrong with them.
        #[source]
        cause: UnpackError,
    },
    /// More was asked for than the image has. An error of the caller.
    #[error("{length} bytes at {offset} of an image of {virtual_size} bytes")]
    OutOfRange {
        /// First byte that was asked for.
        offset: GuestOffset,
        /// How many bytes were asked for.
        length: u64,
        /// What the image has.
        virtual_size: u64,
    },
    /// The chain's files do not build upon each other as they were given.
    #[error(
        "the layer {} builds upon {}, but the chain goes on with {}",
        path.display(),
        named.as_deref().unwrap_or("nothing"),
        given.as_deref().unwrap_or("nothing")
    )]
    Backing {
        /// The file.
        path: PathBuf,
        /// The name in its header, if any.
        named: Option<String>,
        /// The name of the file that was given as the one below, if any.
        given: Option<String>,
    },
    /// A chain of no files. An error of the caller.
    #[error("a chain needs at least one layer")]
    NoLayers,
}

impl ReadError {
    /// The layer that it is about; `None` for errors of the caller.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Header { path, .. }
            | Self::Io { path, .. }
            | Self::Replaced { path }
            | Self::Shrunk { path, .. }
            | Self::L1Entry { path, .. }
            | Self::L2Entry { path, .. }
            | Self::Compressed { path, .. }
            | Self::Backing { path, .. } => Some(path),
            Self::OutOfRange { .. } | Self::NoLayers => None,
        }
    }

    /// Whether a file is not what it was when it was written. Otherwise it is the disk, a limit or right of
    /// this process, or the caller, that is at fault, and another try may succeed.
    #[must_use]
    pub fn is_damage(&self) -> bool {
        !matches!(
            self,
            Self::Header { cause: HeaderError::Read(_), .. }
                | Self::Io { .. }
                | Self::Replaced { .. }
                | Self::OutOfRange { .. }
                | Self::NoLayers
        )
    }
}

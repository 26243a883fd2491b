//! Why a layer could not be written through qemu-nbd.

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::nbd::NbdError;
use crate::nbd::server_process::{ServerExit, StartError};

/// What [`QemuNbdLayer`](super::QemuNbdLayer) gives as the cause of a
/// [`LayerError`](crate::layer::LayerError), which names the file.
///
/// Cloneable, because a server that could not be started is the answer to every call.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QemuNbdError {
    /// A program is missing.
    #[error(
        "{} was not found: install QEMU's disk tools, 5.2 or later (package qemu-utils on Debian and \
         Ubuntu, qemu-img on Fedora, RHEL and SUSE)",
        program.display()
    )]
    NotFound {
        /// The program.
        program: PathBuf,
    },
    /// A program could not be run.
    #[error("cannot run {}: is it an executable file?", program.display())]
    Run {
        /// The program.
        program: PathBuf,
        /// What the system said.
        #[source]
        source: Arc<io::Error>,
    },
    /// A program is there, but lacks what is needed.
    #[error("{} is too old: {feature} is missing, which QEMU has since 5.2", program.display())]
    TooOld {
        /// The program.
        program: PathBuf,
        /// What it lacks.
        feature: &'static str,
    },
    /// A program failed.
    #[error("{} failed ({status}): {stderr}", program.display())]
    Failed {
        /// The program.
        program: PathBuf,
        /// How it ended.
        status: String,
        /// What it wrote to standard error.
        stderr: String,
    },
    /// A program did not end.
    #[error(
        "{} did not end within {} s and was killed; does the file system of the backups answer?",
        program.display(), limit.as_secs_f64()
    )]
    Hung {
        /// The program.
        program: PathBuf,
        /// How long it had.
        limit: Duration,
    },
    /// The new file could not be made.
    #[error("cannot make the file")]
    NewFile(
        /// What the system said.
        #[source]
        Arc<io::Error>,
    ),
    /// The file's name cannot be handed to QEMU.
    #[error("the name of the file is empty or not UTF-8")]
    BadName,
    /// The name of the backing file is no plain file name.
    #[error("{name:?} cannot be the name of a backing file: it must not be empty nor hold '/' or ':'")]
    BadBackingName {
        /// The name.
        name: String,
    },
    /// The virtual size is not possible.
    #[error("a virtual size of {size} bytes is not possible: it must be a multiple of 512 below 2^63")]
    BadVirtualSize {
        /// The size, in bytes.
        size: u64,
    },
    /// The cluster size is not possible.
    #[error("clusters of {size} bytes are not possible: a power of two from 512 to 2 MiB is needed")]
    BadClusterSize {
        /// The size, in bytes.
        size: u32,
    },
    /// A level of compression was asked for.
    #[error(
        "qemu-nbd cannot be told the compression level {level}: leave the level out or use the native writer"
    )]
    CompressionLevel {
        /// The level.
        level: u8,
    },
    /// A range that is not made of whole grains, or leaves the layer.
    #[error(
        "bytes {}..{} do not consist of whole grains of {grain} bytes within the layer's {size} bytes",
        range.start, range.end
    )]
    BadRange {
        /// The range, in bytes.
        range: Range<u64>,
        /// The layer's grain, in bytes.
        grain: u64,
        /// The layer's virtual size, in bytes.
        size: u64,
    },
    /// The server could not be started.
    #[error("cannot start {}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// The reason.
        #[source]
        source: Arc<StartError>,
    },
    /// The server ended too early.
    #[error("{} {exit}", program.display())]
    ServerDied {
        /// The program.
        program: PathBuf,
        /// How it ended.
        exit: ServerExit,
        /// What its end led to.
        #[source]
        source: NbdError,
    },
    /// The server was told to leave, and ended with an error.
    #[error("{} {exit} after everything was written", program.display())]
    BadExit {
        /// The program.
        program: PathBuf,
        /// How it ended.
        exit: ServerExit,
    },
    /// The server was told to leave, and stayed.
    #[error(
        "{} did not end within {} s after everything was written, and was killed",
        program.display(), limit.as_secs_f64()
    )]
    Stuck {
        /// The program.
        program: PathBuf,
        /// How long it had.
        limit: Duration,
    },
    /// A request to the server failed.
    #[error("qemu-nbd could not do what it was asked")]
    Nbd(
        /// The reason.
        #[source]
        NbdError,
    ),
    /// The written file could not be opened.
    #[error("cannot open the written file")]
    Open(
        /// What the system said.
        #[source]
        Arc<io::Error>,
    ),
    /// The header of the written file could not be read or written.
    #[error("cannot set the virtual size in the header of the written file")]
    Header(
        /// What the system said.
        #[source]
        Arc<io::Error>,
    ),
    /// The header of the written file is not the one expected.
    #[error("the header of the written file is not as expected; did something else write to it?")]
    UnexpectedHeader,
    /// The written file could not be synced.
    #[error("cannot sync the written file")]
    Sync(
        /// What the system said.
        #[source]
        Arc<io::Error>,
    ),
    /// [`abort`](crate::layer::LayerWriter::abort) was called.
    #[error("the layer was aborted")]
    Aborted,
    /// The layer was finished before.
    #[error("the layer is finished already")]
    Finished,
}

impl QemuNbdError {
    pub(super) fn new_file(source: io::Error) -> Self {
        Self::NewFile(Arc::new(source))
    }
}

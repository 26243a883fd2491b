//! How the program ends.

use std::io;

use rbd2qcow2_core::chain::ChainError;
use rbd2qcow2_core::pool::PoolError;

/// How a command that could begin has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All done.
    Done,
    /// At least one image failed, the others were done.
    Failed,
    /// A signal stopped the command before all was done.
    Interrupted,
}

impl Outcome {
    /// The documented exit status.
    pub fn status(self) -> i32 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            // What a shell reports for a program that SIGINT ended.
            Self::Interrupted => 130,
        }
    }
}

/// Why a command could not be carried out as a whole. Exit status 1.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// No image could be looked at.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The directory of the backups could not be read.
    #[error(transparent)]
    Destination(ChainError),
    /// The handlers that stop a run could not be set up.
    #[error("cannot prepare for signals")]
    Signals(#[source] io::Error),
    /// A thread could not be made.
    #[error("cannot start a thread")]
    Threads(#[source] io::Error),
    /// What the command found out or did could not be told.
    #[error("cannot write to standard output")]
    Output(#[source] io::Error),
}

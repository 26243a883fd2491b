//! How the program ends.

use std::io;

use rbd2qcow2_core::chain::hold::HoldError;
use rbd2qcow2_core::chain::{ChainError, ImageName};
use rbd2qcow2_core::point::PointError;
use rbd2qcow2_core::pool::PoolError;
use rbd2qcow2_core::rbd::RbdError;
use rbd2qcow2_core::restore::RestoreError;
use rbd2qcow2_core::serve::ServeError;

use crate::points::NotFound;

/// How a command that could begin has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All done.
    Done,
    /// At least one image failed, the others were done; or the command could not begin, or could not
    /// write its output.
    Failed,
    /// The arguments make no sense, which only the library could tell.
    WrongUsage,
    /// A signal stopped the command before all was done.
    Interrupted,
}

impl Outcome {
    /// The documented exit status.
    pub fn status(self) -> i32 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::WrongUsage => 2,
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
    /// There is nothing to verify.
    #[error("nothing was verified: {nothing}")]
    NothingThere {
        /// What was looked at, and what to check.
        nothing: String,
    },
    /// The directory of one image was named instead of the directory of all.
    #[error("{error}; say `{command}`")]
    ImageDirectory {
        /// Which image, and which directory it should be. Has no cause.
        error: Box<ChainError>,
        /// The command that was perhaps meant.
        command: String,
    },
    /// A point could not be restored.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// The cluster cannot be reached.
    #[error(transparent)]
    Cluster(RbdError),
    /// A point could not be served, or not any longer.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// A point cannot be read.
    #[error(transparent)]
    Point(#[from] PointError),
    /// A point cannot be read because its image, or itself, is unknown.
    #[error("{error}{hint}")]
    Unknown {
        /// What is unknown. Has no cause.
        error: Box<PointError>,
        /// What may have been meant, as the end of the sentence.
        hint: String,
    },
    /// What was named means nothing.
    #[error(transparent)]
    NotFound(#[from] NotFound),
    /// A point could not be held or released.
    #[error(transparent)]
    Hold(#[from] HoldError),
    /// A point could not be held or released because it is unknown.
    #[error("{error}{hint}")]
    HoldUnknown {
        /// What is unknown. Has no cause.
        error: Box<HoldError>,
        /// What may have been meant, as the end of the sentence.
        hint: String,
    },
    /// An image is named where a point is needed.
    #[error("{:?} is an image; name one of its points, as `list` shows them: IMAGE@POINT", image.as_str())]
    NoPoint {
        /// The image.
        image: ImageName,
    },
    /// An image is to be pruned, and nothing tells what of it.
    #[error(
        "nothing tells which points of image {:?} to keep: give at least one rule above 0, `--keep-daily 14` for \
         instance, or name the points to remove as IMAGE@POINT", image.as_str()
    )]
    NoRule {
        /// The image.
        image: ImageName,
    },
    /// Rules are given, and no image that they are for.
    #[error(
        "rules are for images, and only single points are named: name the images, too, or leave out the rules"
    )]
    RulesForPoints,
    /// Standard output is to get an image, and is a terminal.
    #[error("standard output is a terminal, which an image would not do good; redirect it, or name a file")]
    Terminal,
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

impl CommandError {
    /// How the program ends with it.
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::Pool(PoolError::Pattern { .. })
            | Self::Restore(RestoreError::NoFile { .. })
            | Self::Point(PointError::Name(_))
            | Self::NoPoint { .. }
            | Self::NoRule { .. }
            | Self::RulesForPoints
            | Self::Terminal => Outcome::WrongUsage,
            _ => Outcome::Failed,
        }
    }
}

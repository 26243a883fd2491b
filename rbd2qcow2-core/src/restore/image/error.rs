//! Why a point could not be restored into an RBD image.

use crate::rbd::RbdError;
use crate::source::BoxError;

/// Why an RBD image is not what the point is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The cluster, the pool or the image failed, and nothing was changed in the image.
    #[error("cannot restore to image {image}")]
    Rbd {
        /// The image, as `POOL[/NAMESPACE]/IMAGE`.
        image: String,
        /// What librbd says.
        #[source]
        cause: RbdError,
    },
    /// There is such an image.
    #[error(
        "image {image} exists; --overwrite makes it what the point is, or choose another name \
         (its snapshots stay in both cases)"
    )]
    Exists {
        /// The image.
        image: String,
    },
    /// There is something of that name, and it is no image: `rbd_create` was cut short.
    #[error(
        "image {image} is listed, but cannot be opened: it was not made to the end, or is being made right now, or \
         its parent is gone (see `rbd info`); if nobody is at it and nobody needs it, `rbd rm {image}` removes what \
         there is, and the same command goes on"
    )]
    HalfMade {
        /// The image.
        image: String,
    },
    /// The image is half of another restore.
    #[error(
        "image {image} is the unfinished restore of {of}: restore that in the same way to finish it, or say --overwrite"
    )]
    Unfinished {
        /// The image.
        image: String,
        /// The image and point that it was going to be.
        of: String,
    },
    /// Somebody has the image open.
    #[error(
        "image {image} is in use by {}: stop the virtual machine, or unmap the image, and try again \
         (a client that died counts for 30 s)", clients.join(", ")
    )]
    InUse {
        /// The image.
        image: String,
        /// The clients' addresses.
        clients: Vec<String>,
    },
    /// librbd cannot tell whether somebody has the image open, and it was not made just now.
    #[error(
        "cannot find out whether image {image} is in use: the librbd on this machine is too old, Mimic (13.2) or \
         later is needed to write to an image that exists"
    )]
    UsersUnknown {
        /// The image.
        image: String,
    },
    /// The point does not fit.
    #[error(
        "image {image} would have {size} bytes, and the point needs {needed}: \
         choose a larger size, or `rbd resize` the image"
    )]
    TooSmall {
        /// The image.
        image: String,
        /// Its size in bytes.
        size: u64,
        /// The point's size in bytes.
        needed: u64,
    },
    /// The image exists with another layout than the one that was asked for.
    #[error("image {image} exists with {what} {has}, not {wanted}: a restore does not change that")]
    Layout {
        /// The image.
        image: String,
        /// Of what.
        what: &'static str,
        /// As it is.
        has: String,
        /// As it was to be.
        wanted: String,
    },
    /// The restore failed on the way. What the image holds is no image of anything.
    #[error(
        "cannot restore to image {image}, which is left incomplete, and marked so in its metadata; \
         the same command again finishes it"
    )]
    Incomplete {
        /// The image.
        image: String,
        /// Why.
        #[source]
        cause: BoxError,
    },
    /// A stop was asked for. What the image holds is no image of anything.
    #[error(
        "interrupted; image {image} is incomplete, and marked so in its metadata; the same command again finishes it"
    )]
    Interrupted {
        /// The image.
        image: String,
    },
}

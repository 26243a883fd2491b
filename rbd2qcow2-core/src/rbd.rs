//! Safe handles over librados and librbd. The only room with unsafe code.
//!
//! [`Cluster`] opens a [`Pool`], which opens an [`Image`]. Each holds what it was opened from, so
//! that the order in which C wants them closed is the only possible one.
//!
//! Every call that talks to the cluster is bounded by a [`Patience`]: where librbd does not come
//! back, the call is abandoned together with its handle, and the caller gets
//! [`RbdError::NoAnswer`] or, soon after its cancel flag is set, [`RbdError::Cancelled`]. An
//! abandoned handle is never closed (closing waits for the very answer that does not come), so a
//! process in which that happened keeps a few threads of librbd's until it exits.
#![allow(unsafe_code)]

mod ancestry;
mod cluster;
mod create;
mod diff;
mod error;
mod features;
mod image;
mod notify;
mod object_map;
mod patience;
mod read;
mod request;
mod trash;
mod watchers;
mod write;

#[cfg(test)]
mod tests;

pub use ancestry::Ancestry;
pub use cluster::{Cluster, ClusterOptions, Pool};
pub use create::NewImage;
pub use diff::Granularity;
pub use error::RbdError;
pub use features::Features;
pub use image::{Image, ImageInfo, Parent, Snapshot};
pub use notify::Answers;
pub use patience::Patience;

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

mod cluster;
mod diff;
mod error;
mod image;
mod patience;
mod read;
mod trash;

#[cfg(test)]
mod tests;

pub use cluster::{Cluster, ClusterOptions, Pool};
pub use diff::Granularity;
pub use error::RbdError;
pub use image::{Image, ImageInfo, Parent, Snapshot};
pub use patience::Patience;

//! Forgetting points without breaking the chains.

pub mod policy;
mod reason;

pub use reason::{Reason, Rule};

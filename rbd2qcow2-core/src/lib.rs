//! Backs up Ceph RBD images into chains of qcow2 files.
//!
//! Each backup of an image is one qcow2 file whose backing file is the backup before it: at once a
//! restore point that QEMU boots and the difference to its predecessor. `ARCHITECTURE.md` in the
//! repository is the map of this crate and owns the description of the files on disk.
//!
//! The data flows in one line, and the modules follow it:
//!
//! snapshot -> changed extents ([`source`]) -> aligned to the layer's grain ([`extent`]) -> read,
//! zero-detected and written by a pipeline of threads ([`copy`]) -> a layer ([`layer`]) -> flushed,
//! synced and renamed into the chain ([`chain`]).
//!
//! The way back is [`restore`]: the layers of a point, read as one image, are copied to a file by the same
//! pipeline. Or it is not brought anywhere: [`serve`] has QEMU show a point as a disk.
//!
//! The library never prints, never exits the process, keeps no global state, logs only through
//! [`log`], reports progress through [`progress::Observer`] and [`merge::MergeObserver`], and stops soon
//! after a [`cancel::Cancel`] is set.
//!
//! # Features
//! `rbd` (default): what needs librbd. Without it the crate still reads and writes chains, restores
//! to files, serves points, and prunes.

#![deny(unsafe_code)]

#[cfg(feature = "rbd")]
pub mod backup;
pub mod buffer;
pub mod cancel;
pub mod chain;
mod compare;
pub mod copy;
mod direct;
pub mod error;
pub mod extent;
pub mod layer;
pub mod merge;
pub mod nbd;
pub mod options;
mod output;
pub mod point;
#[cfg(feature = "rbd")]
pub mod pool;
pub mod progress;
pub mod prove;
pub mod prune;
pub mod qcow2;
mod ranges;
pub mod rate;
#[cfg(feature = "rbd")]
pub mod rbd;
pub mod restore;
pub mod serve;
pub mod source;
#[cfg(test)]
mod testing;
#[cfg(feature = "rbd")]
pub mod turns;
pub mod verify;

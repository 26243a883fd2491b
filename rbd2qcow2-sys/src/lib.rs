//! Raw bindings to librbd, generated from the system's `rbd/librbd.h` by bindgen. No policy.
//!
//! # librbd versions
//! Builds against the headers of any librbd since Jewel (10.2). Everything that Jewel has may be
//! called directly. Functions that came later must not be: a program that names one does not start
//! where librbd lacks it. They are looked up at run time instead, in [`newer`].
//!
//! librados's part (clusters, I/O contexts) is the crate `rados-sys`; the types here are its types.

#![allow(non_camel_case_types, non_snake_case, non_upper_case_globals)]
#![allow(clippy::all, clippy::undocumented_unsafe_blocks, rustdoc::all, unsafe_op_in_unsafe_fn)]

pub mod newer;

include!(concat!(env!("OUT_DIR"), "/bindings.rs"));

//! The directory of one image: its points, their files and how they come to be.

pub mod names;

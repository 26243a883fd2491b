//! What several fuzz targets share: a second opinion on qcow2 files, and files to have it on.

pub mod compare;
pub mod image;
pub mod naive;

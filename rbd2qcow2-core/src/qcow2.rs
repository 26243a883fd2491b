//! The qcow2 file format.

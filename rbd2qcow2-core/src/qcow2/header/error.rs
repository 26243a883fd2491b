//! What can be wrong with a header.

use std::io;

/// Why a file's header was not accepted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// The file could not be opened or read.
    #[error("cannot read the qcow2 header")]
    Read(#[source] io::Error),
    /// The path leads to a directory, a device, a pipe or a symbolic link.
    #[error("not a regular file")]
    NotARegularFile,
    /// The magic number is another one.
    #[error("not a qcow2 file")]
    NotQcow2,
    /// Neither version 2 nor 3.
    #[error("qcow2 version {0}, which is neither 2 nor 3")]
    Version(u32),
    /// The file ends where something must stand that the header promises.
    #[error("the file is cut off: {what} would reach to byte {needed}, the file has {file_bytes}")]
    Truncated {
        /// What does not fit.
        what: &'static str,
        /// First byte behind it.
        needed: u64,
        /// Length of the file.
        file_bytes: u64,
    },
    /// A number that the format, or QEMU, does not allow.
    #[error("the header's {field} is {value}, which is not allowed: {rule}")]
    Field {
        /// Which number.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What it must be.
        rule: &'static str,
    },
    /// Incompatible features that this program does not know. It must not guess at the data.
    #[error("unknown incompatible features {bits:#x} (written by a newer QEMU?)")]
    UnknownFeatures {
        /// The unknown bits.
        bits: u64,
    },
    /// The backing file name, or the name of its format, is not text.
    #[error("the header's {0} is not valid text")]
    NotText(&'static str),
    /// The file can be parsed, but must not serve as a restore point.
    #[error("the file cannot be a restore point: {reason}")]
    Unfit {
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The backing file is not a file beside this one.
    #[error("the backing file {name:?} is not the name of a file in the same directory")]
    ForeignBacking {
        /// The name in the header.
        name: String,
    },
    /// The format of the backing file is missing, so QEMU would guess it from the guest's data, or
    /// it is another one.
    #[error("the backing file's format is recorded as {format:?}, not as qcow2")]
    BackingFormat {
        /// What the header says; `None` when it says nothing.
        format: Option<String>,
    },
}

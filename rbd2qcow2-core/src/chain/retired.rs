//! The ids of chains that have no points here any more.
//!
//! A chain's id stands in the manifests of its points, and only snapshots that carry the id of a chain of
//! this directory are ever removed from the cluster. When the last point of a chain is pruned, a snapshot
//! of it may still be there (`--keep-snapshots` keeps some, and removing one may have failed); without
//! this list nobody would know whose it is.
//!
//! On disk: one id a line. The list only grows, by 9 bytes for each chain.

use std::path::Path;

use super::error::ChainError;
use super::manifest::{ManifestError, read_bounded};
use super::names::ChainId;
use super::{RETIRED_FILE, RETIRED_PARTIAL, durable};

/// Longest list that is read, in bytes: far more chains than anybody begins.
const RETIRED_MAX: u64 = 1 << 20;

/// Reads the list in `directory`. Lines that are no ids are left out, with a warning.
pub(super) fn read(directory: &Path) -> Result<Vec<ChainId>, ChainError> {
    let path = directory.join(RETIRED_FILE);
    let bytes = match read_bounded(&path, RETIRED_MAX) {
        Ok(bytes) => bytes,
        Err(ManifestError::Missing) => return Ok(Vec::new()),
        Err(ManifestError::Read(cause)) => return Err(ChainError::io("read", &path)(cause)),
        Err(_) => {
            log::warn!("{} is no list of chains; snapshots of theirs may stay", path.display());
            return Ok(Vec::new());
        }
    };
    let text = String::from_utf8_lossy(&bytes);
    let ids = text.lines().filter_map(|line| {
        let id = ChainId::parse(line);
        let id = id.inspect_err(|error| log::warn!("{}: {error}; it is left out", path.display()));
        id.ok()
    });
    Ok(ids.collect())
}

/// Adds ids to the list in `directory`. Blocks until it is on stable storage.
pub(super) fn add(directory: &Path, ids: &[ChainId]) -> Result<(), ChainError> {
    let mut all = read(directory)?;
    let before = all.len();
    for id in ids {
        if !all.contains(id) {
            all.push(*id);
        }
    }
    if all.len() == before {
        return Ok(());
    }
    let text: String = all.iter().map(|id| format!("{id}\n")).collect();
    let (partial, path) = (directory.join(RETIRED_PARTIAL), directory.join(RETIRED_FILE));
    durable::write_aside(&partial, text.as_bytes())?;
    durable::replace(&partial, &path).inspect_err(|_| _ = durable::remove(&partial))?;
    durable::sync_directory(directory)
}

//! A finished layer, before it counts.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::durable;
use super::error::ChainError;
use crate::qcow2::header::{Header, HeaderError};
use crate::qcow2::open_regular;

/// What a layer that was written aside must be.
pub(super) struct Planned<'a> {
    pub(super) path: &'a Path,
    /// As it stands in the header.
    pub(super) backing: Option<String>,
    pub(super) virtual_size: u64,
    pub(super) cluster_size: u32,
}

impl Planned<'_> {
    /// Reads the finished layer's header and compares it, makes the file read-only and brings it to
    /// stable storage. Returns the length of the file and what it takes on disk, in bytes.
    ///
    /// # Errors
    /// [`ChainError::LayerUnusable`], [`ChainError::LayerNotAsPlanned`], [`ChainError::Io`].
    pub(super) fn seal(&self, extended_l2: Option<bool>) -> Result<(u64, u64), ChainError> {
        let path = self.path;
        let unusable = |cause| ChainError::LayerUnusable { path: path.to_owned(), cause };
        let opened = open_regular(path).map_err(ChainError::io("open the layer", path))?;
        let (file, metadata) = opened.ok_or_else(|| unusable(HeaderError::NotARegularFile))?;
        let header = Header::read_from(&file, metadata.len()).map_err(unusable)?;
        header.check_restore_point().map_err(unusable)?;
        let backing = |name: Option<&str>| name.unwrap_or("none").to_owned();
        let found = backing(header.chain_backing().map_err(unusable)?);
        self.check("backing file", found, backing(self.backing.as_deref()))?;
        self.check("virtual size", header.virtual_size, self.virtual_size)?;
        self.check("cluster size", header.cluster_bits.size(), self.cluster_size.into())?;
        if let Some(extended_l2) = extended_l2 {
            self.check("use of extended L2", header.extended_l2, extended_l2)?;
        }
        // The writer synced it; what that missed is written, or fails, here.
        durable::seal(&file, path)?;
        let metadata = file.metadata().map_err(ChainError::io("look at", path))?;
        Ok((metadata.len(), metadata.blocks().saturating_mul(512)))
    }

    /// # Errors
    /// [`ChainError::LayerNotAsPlanned`].
    pub(super) fn check<T: PartialEq + ToString>(
        &self,
        what: &'static str,
        found: T,
        planned: T,
    ) -> Result<(), ChainError> {
        if found == planned {
            return Ok(());
        }
        let path = self.path.to_owned();
        Err(ChainError::LayerNotAsPlanned {
            path,
            what,
            found: found.to_string(),
            planned: planned.to_string(),
        })
    }
}

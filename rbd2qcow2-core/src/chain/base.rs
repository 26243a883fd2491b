//! Layers that outlive their point, to be reused for that of the point above.
//!
//! Where a point goes that others build upon, the one above takes over what it holds. When that is much, and
//! what the one above holds itself is little, the large layer is better not copied:
//!
//! 1. The layer gets a second name, the one of a base ([`ChainWriter::keep_base`]).
//! 2. The one above is merged onto that name. From then on the point's own name is needed by nobody.
//! 3. The point is removed, like any other.
//! 4. What the layer above holds is put into the base, in place ([`absorb`](crate::qcow2::absorb)), or into a
//!    copy that shares the base's data. Nobody reads the base but through the layer above.
//! 5. The base is renamed over the layer above ([`PendingMerge::commit`]).
//!
//! After each step, and at any time within them, all points read as they should. Steps 4 and 5 may be left for
//! any later run that prunes; meanwhile backups go on.

use std::path::Path;

use super::digests::DigestWriter;
use super::durable::{self, InPlace};
use super::error::ChainError;
use super::merge::{Digests, PendingMerge};
use super::names::{FileKind, PointName};
use super::{ChainWriter, Paths};
use crate::chain::catalogue::Link;

/// The files that a base has.
const KINDS: [FileKind; 2] = [FileKind::Digests, FileKind::Layer];

impl ChainWriter {
    /// Whether the layer of `point` could take over in place what `child`, above it, holds: it can share its
    /// data with a copy, or else nobody has it open. That may be otherwise later.
    ///
    /// # Errors
    /// [`ChainError::Io`].
    pub(crate) fn can_absorb(&self, point: PointName, child: PointName) -> Result<bool, ChainError> {
        let path = self.catalogue.path_of(point, FileKind::Layer);
        let aside = Paths::new(self, child).layer_partial;
        if InPlace::share(&path, &aside)?.is_some() {
            durable::remove(&aside)?;
            return Ok(true);
        }
        Ok(InPlace::exclusive(&path)?.is_some())
    }

    /// Gives the layer of `point`, and its digests, the names of a base, besides their own. What is not used
    /// then the next run removes.
    ///
    /// # Errors
    /// [`ChainError::Io`]; also on a file system without hard links.
    pub(crate) fn keep_base(&self, point: PointName) -> Result<(), ChainError> {
        for kind in KINDS {
            let path = self.catalogue.path_of(point, kind);
            // Points of the Python tool have no digests.
            if kind == FileKind::Layer || path.exists() {
                durable::link(&path, &self.catalogue.base_path(point, kind))?;
            }
        }
        durable::sync_directory(&self.directory)
    }

    /// Removes the names of a base that nothing builds upon.
    ///
    /// # Errors
    /// [`ChainError::Io`]; the next run removes them.
    pub(crate) fn drop_base(&self, point: PointName) -> Result<(), ChainError> {
        for kind in KINDS {
            durable::remove(&self.catalogue.base_path(point, kind))?;
        }
        durable::sync_directory(&self.directory)
    }

    /// Begins to have the base of `child` take over what the child's layer holds, and become the child's
    /// layer: gives the file that is to be changed. `None` where that is not possible now, because somebody
    /// has the base open, or its point is still there.
    ///
    /// # Errors
    /// [`ChainError::ManifestUnusable`], [`ChainError::Io`].
    ///
    /// # Panics
    /// Where the child has no base, or its layer cannot be read.
    pub(crate) fn begin_absorb(
        &self,
        child: PointName,
    ) -> Result<Option<(PendingMerge<'_>, InPlace)>, ChainError> {
        let point = self.catalogue.point(child).expect("it is there");
        let base = point.base.expect("it has a base");
        if self.catalogue.point(base).is_some() {
            return Ok(None);
        }
        let paths = Paths::new(self, child);
        let path = self.catalogue.base_path(base, FileKind::Layer);
        let (file, layer, files) = match InPlace::share(&path, &paths.layer_partial)? {
            Some(file) => (file, paths.layer_partial.clone(), vec![paths.layer_partial.clone()]),
            None => match InPlace::exclusive(&path)? {
                Some(file) => (file, path, Vec::new()),
                None => return Ok(None),
            },
        };
        let cluster_bits = point.header.as_ref().expect("it can be read").cluster_bits;
        let pending = PendingMerge {
            writer: self,
            child,
            below: Link { parent: point.parent, base: None },
            cluster_size: u32::try_from(cluster_bits.size()).expect("at most 2 MiB"),
            paths,
            layer,
            manifest: self.manifest_to_replace(point)?,
            digests: None,
            files,
        };
        Ok(Some((pending, file)))
    }
}

impl PendingMerge<'_> {
    /// Begins new digests for a base: those of what it holds when it has taken over the child's layer.
    ///
    /// # Errors
    /// [`ChainError::Io`], [`ChainError::Digests`].
    pub(crate) fn begin_base_digests(&mut self) -> Result<DigestWriter, ChainError> {
        self.files.push(self.paths.digests_partial.clone());
        DigestWriter::create(&self.paths.digests_partial, self.cluster_size)
    }

    /// Gives the base its new digests, durably. Until it has taken over everything, they do not agree with
    /// what it holds where the child's layer holds something itself, which nobody sees. So the hashes of what
    /// is left of data that are overwritten in part are not lost with those data.
    ///
    /// # Errors
    /// [`ChainError::Io`], [`ChainError::Digests`].
    pub(crate) fn keep_base_digests(
        &mut self,
        digests: DigestWriter,
        place: &Path,
    ) -> Result<(), ChainError> {
        let info = digests.finish()?;
        durable::replace(&self.paths.digests_partial, place)?;
        durable::sync_directory(&self.writer.directory)?;
        self.files.retain(|path| *path != self.paths.digests_partial);
        self.digests = Some(Digests::OfBase(place.to_owned(), info));
        Ok(())
    }
}

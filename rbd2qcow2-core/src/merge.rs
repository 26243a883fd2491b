//! Putting the layers of several points into one, so that points can be forgotten without those that
//! build upon them.
//!
//! When the points between a point that stays and one of its ancestors go, it takes over what they hold:
//! a new layer is written aside by the same pipeline that makes backups, with the newest layers of the
//! chain as the source, and replaces the point's ([`chain::PendingMerge`](crate::chain::PendingMerge)).
//! Nothing here decides which points go.
//!
//! The new layer gets digests of its own, which say that its content is what was backed up. So all that
//! goes into it is held against the old digests first. Points of the Python tool never had any: what a
//! point takes over from them is noted in its manifest, for the digests cannot say more of it than that it
//! has not changed since.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;

use crate::buffer::BufferPool;
use crate::cancel::Cancel;
use crate::chain::names::FileKind;
use crate::chain::{ChainError, ChainWriter, MergedLayer, Point, PointName, Record};
use crate::copy::{self, Copy, CopyError};
use crate::extent::{Extent, ExtentKind, align};
use crate::layer::native::{Compressors, NativeLayer};
use crate::layer::{Compression, ExtendedL2, LayerError, LayerSpec, LayerWriter};
use crate::progress::Progress;
use crate::qcow2::chain::ChainReader;
use crate::qcow2::error::ReadError;
use crate::qcow2::table::SUBCLUSTERS;
use crate::source::RbdDiffSource;
use crate::source::merged::MergedSource;
use crate::verify::{Finding, LayerReport, VerifyError, verify_layers};

/// The least memory for image data that a merge works with, whatever it was told.
const LEAST_MEMORY: usize = 16 << 20;

/// Room that is left on the file system besides, in bytes: manifests, digests, and what others write.
const SPARE: u64 = 16 << 20;

/// Why layers were not put into one. The chain is as it was, unless a variant says otherwise.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// The chain could not be read or changed; see there for what it means for the chain.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// A layer is damaged.
    #[error("cannot read the chain of point {point}")]
    Read {
        /// The point that was to take over.
        point: PointName,
        /// What is wrong, with which file.
        #[source]
        cause: ReadError,
    },
    /// The new layer may need more room than there is.
    #[error(
        "merging into point {point} may take {needed} bytes in {}, and {free} are free; nothing was changed",
        path.display()
    )]
    NoSpace {
        /// The point that was to take over.
        point: PointName,
        /// The directory of the image.
        path: PathBuf,
        /// What it may take, in bytes, and some room to spare.
        needed: u64,
        /// What is free, in bytes.
        free: u64,
    },
    /// How much is free could not be found out.
    #[error("cannot find out how much space is free in {}", path.display())]
    Free {
        /// The directory of the image.
        path: PathBuf,
        /// What the system says.
        #[source]
        cause: io::Error,
    },
    /// The new layer could not be written.
    #[error("cannot write what point {point} takes over")]
    Layer {
        /// The point.
        point: PointName,
        /// Why.
        #[source]
        cause: LayerError,
    },
    /// The copy failed.
    #[error("cannot copy what point {point} takes over")]
    Copy {
        /// The point.
        point: PointName,
        /// Why.
        #[source]
        cause: CopyError,
    },
    /// A layer that would go into the new one is damaged. The new one's digests would hide that.
    #[error(
        "point {from} is damaged, so point {point} does not take over what it holds; nothing was changed"
    )]
    Damaged {
        /// The point that was to take over.
        point: PointName,
        /// The point whose layer is damaged.
        from: PointName,
        /// The first thing that is wrong.
        #[source]
        cause: Finding,
    },
    /// A layer that would go into the new one has lost its digests, or the manifest that tells what they are
    /// worth. The new one's digests would say of its data that they are what was backed up.
    #[error(
        "point {from} has no digests that tell whether it is as it was, so point {point}, which has some, does \
         not take over what it holds; nothing was changed"
    )]
    NoDigests {
        /// The point that was to take over.
        point: PointName,
        /// The point that has lost them.
        from: PointName,
    },
    /// The layers could not be verified.
    #[error("cannot verify what point {point} is to take over")]
    Verify {
        /// The point.
        point: PointName,
        /// Why.
        #[source]
        cause: VerifyError,
    },
    /// A stop was asked for. Nothing of this merge was kept.
    #[error("interrupted")]
    Cancelled,
}

/// How layers are put into one. `Default` is what the program does.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct MergeOptions {
    /// Reads in flight, at least 1.
    pub parallel: usize,
    /// Bytes of image data that may be in memory.
    pub memory: usize,
}

impl Default for MergeOptions {
    fn default() -> Self {
        Self { parallel: 8, memory: 48 << 20 }
    }
}

/// A merge: the point `child` takes over what the points below it hold, down to `parent`, which it builds
/// upon from then on.
#[derive(Clone, Copy)]
pub struct Merge<'a> {
    /// The image's directory.
    pub writer: &'a ChainWriter,
    /// The point that takes over.
    pub child: PointName,
    /// One of those below it; `None` for all, so that the child stands alone.
    pub parent: Option<PointName>,
    /// How.
    pub options: &'a MergeOptions,
    /// What packs clusters.
    pub compressors: &'a Compressors,
    /// Is counted up, from 0.
    pub progress: &'a Progress,
    /// Asks for a stop.
    pub cancel: &'a Cancel,
}

/// What a merge has before it.
struct Survey {
    /// What the clusters take that hold data, in bytes, if none is packed.
    bytes: u64,
    /// Whether what is merged has edges within what is copied as one, so that it is filled up with what
    /// the layers below hold.
    edges: bool,
}

impl Merge<'_> {
    /// Verifies what it is made of, writes the new layer and puts it into the old one's place. Blocks.
    ///
    /// All points read the same before and after, and at every moment between, also where this process
    /// dies. The points that the child has taken over are still there: they are removed by
    /// [`ChainWriter::forget`].
    ///
    /// # Errors
    /// [`MergeError`]. Damage in what would be copied is one.
    pub fn run(&self) -> Result<(), MergeError> {
        let points = self.points()?;
        let merged = match self.parent {
            None => points.len(),
            Some(parent) => points.iter().position(|point| point.name == parent).unwrap_or(points.len()),
        };
        let paths = self.writer.catalogue().layers(self.child).map_err(|problem| self.unsound(problem))?;
        let chain =
            ChainReader::open(&paths).map_err(|cause| MergeError::Read { point: self.child, cause })?;
        let spec = self.spec(&points, &chain);
        // What the first layer of a Python chain builds upon is empty.
        let layers = if self.parent.is_none() { paths.len() } else { merged };
        let source = MergedSource::new(&chain, layers);
        let survey = self.survey(&source, &spec)?;
        self.check_space(survey.bytes)?;
        let pending = self.writer.begin_merge(self.child, self.parent, spec.cluster_size)?;
        // Of the layers below only what shares a grain with what is merged is copied.
        let read = if survey.edges { points.len() } else { merged };
        let unverified = self.verify(&points[..read], pending.manifest().is_some())?;
        let spec =
            LayerSpec { path: pending.layer_path().to_owned(), backing: pending.backing_name(), ..spec };
        let failed = |cause| MergeError::Layer { point: self.child, cause };
        let layer = NativeLayer::create(&spec, self.compressors.clone()).map_err(failed)?;
        self.copy(&source, &layer, pending.digests())?;
        let extended_l2 = layer.grain() < u64::from(spec.cluster_size);
        drop(layer);
        if self.cancel.is_set() {
            return Err(MergeError::Cancelled);
        }
        let record = pending.manifest().map(|manifest| Record {
            data_extents: self.progress.data_extents.get(),
            data_bytes: self.progress.data.get(),
            zero_extents: self.progress.zero_extents.get(),
            zero_bytes: self.progress.zero.get(),
            writer: "native".to_owned(),
            compression: spec.compression.to_string(),
            cluster_size: spec.cluster_size,
            extended_l2,
            ..manifest.record.clone()
        });
        let virtual_size = spec.virtual_size;
        Ok(pending.commit(MergedLayer { virtual_size, extended_l2, record, unverified })?)
    }

    /// The child and all that it builds upon.
    fn points(&self) -> Result<Vec<&Point>, MergeError> {
        self.writer.catalogue().ancestry(self.child).map_err(|problem| self.unsound(problem))
    }

    fn unsound(&self, cause: crate::chain::Problem) -> MergeError {
        let path = self.writer.directory().to_owned();
        ChainError::ParentUnsound { path, point: self.child, cause: cause.into() }.into()
    }

    /// The new layer has the form of the one that it replaces, and is packed if any of those that are
    /// put into it was.
    fn spec(&self, points: &[&Point], chain: &ChainReader) -> LayerSpec {
        let header = chain.layers()[0].header();
        let packed = points.iter().take_while(|point| Some(point.name) != self.parent).filter_map(|point| {
            let recorded = point.manifest.as_ref()?.record.compression.parse().ok()?;
            (recorded != Compression::None).then_some(recorded)
        });
        LayerSpec {
            path: PathBuf::new(),
            virtual_size: header.virtual_size,
            backing: None,
            cluster_size: u32::try_from(header.cluster_bits.size()).expect("at most 2 MiB"),
            compression: packed.into_iter().next().unwrap_or_default(),
            extended_l2: if header.extended_l2 { ExtendedL2::Auto } else { ExtendedL2::Off },
        }
    }

    /// Looks at what is to be copied, without reading any of it.
    fn survey(&self, source: &MergedSource<'_>, spec: &LayerSpec) -> Result<Survey, MergeError> {
        let cluster = u64::from(spec.cluster_size);
        // What is packed, or might be, is read in whole clusters.
        let step = match spec.extended_l2 {
            ExtendedL2::Auto if spec.compression == Compression::None => cluster / SUBCLUSTERS,
            _ => cluster,
        };
        let size = source.size();
        let length = |extents: &[Extent]| extents.iter().map(|extent| extent.length).sum::<u64>();
        let mut survey = Survey { bytes: 0, edges: false };
        for segment in source.segments(cluster) {
            let failed = |cause| MergeError::Copy { point: self.child, cause: CopyError::Source(cause) };
            if self.cancel.is_set() {
                return Err(MergeError::Cancelled);
            }
            let mut found = Vec::new();
            source.diff(segment.map_err(failed)?, &mut found).map_err(failed)?;
            survey.edges |= length(&align(found.clone(), step, size)) != length(&found);
            found.retain(|extent| extent.kind == ExtentKind::Data);
            survey.bytes += length(&align(found, cluster, size));
        }
        Ok(survey)
    }

    /// Holds the layers of these points against their digests, and looks at the structure of those that
    /// never had any. Returns the points whose data nobody could ever verify: these, and what any of the
    /// points has taken over from such.
    fn verify(&self, points: &[&Point], with_digests: bool) -> Result<BTreeSet<PointName>, MergeError> {
        let image = self.writer.catalogue().image();
        let reports = verify_layers(image, points, self.cancel).map_err(|cause| match cause {
            VerifyError::Cancelled => MergeError::Cancelled,
            cause => MergeError::Verify { point: self.child, cause },
        })?;
        let mut unverified = BTreeSet::new();
        for (point, LayerReport { finding, has_digests }) in points.iter().zip(reports) {
            let from = point.name;
            if let Some(cause) = finding {
                return Err(MergeError::Damaged { point: self.child, from, cause });
            }
            if self.never_had_digests(point) {
                unverified.insert(from);
            } else if with_digests && !has_digests {
                return Err(MergeError::NoDigests { point: self.child, from });
            }
            unverified.extend(point.manifest.iter().flat_map(|manifest| &manifest.unverified));
        }
        Ok(unverified)
    }

    /// Whether a point is as the Python tool makes them. Where there is anything of a manifest or of digests,
    /// in whatever state, they may have been lost instead, which is damage.
    fn never_had_digests(&self, point: &Point) -> bool {
        let is_absent = |kind| {
            let path = self.writer.catalogue().path_of(point.name, kind);
            std::fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
        };
        point.name.is_python() && is_absent(FileKind::Manifest) && is_absent(FileKind::Digests)
    }

    /// Looks whether there is room for so many bytes of clusters, and what tells where they are.
    fn check_space(&self, bytes: u64) -> Result<(), MergeError> {
        let path = self.writer.directory();
        // Tables, refcounts and digests take less than this.
        let needed = bytes.saturating_add(bytes / 32).saturating_add(SPARE);
        let found = rustix::fs::statvfs(path)
            .map_err(|cause| MergeError::Free { path: path.to_owned(), cause: cause.into() })?;
        let free = found.f_bavail.saturating_mul(found.f_frsize);
        if free < needed {
            return Err(MergeError::NoSpace { point: self.child, path: path.to_owned(), needed, free });
        }
        Ok(())
    }

    fn copy(
        &self,
        source: &MergedSource<'_>,
        layer: &NativeLayer,
        digests: Option<&crate::chain::digests::DigestWriter>,
    ) -> Result<(), MergeError> {
        let copy = Copy {
            source,
            layer,
            root: self.parent.is_none(),
            digests,
            buffers: &BufferPool::new(self.options.memory.max(LEAST_MEMORY)),
            rate_limit: None,
            parallel: self.options.parallel,
            progress: self.progress,
            cancel: self.cancel,
            stop: &self.cancel.part(),
        };
        let copied = copy.run().and_then(|_| copy::finish(layer, self.cancel));
        copied.map_err(|cause| match cause {
            _ if self.cancel.is_set() => MergeError::Cancelled,
            CopyError::Layer(cause) => MergeError::Layer { point: self.child, cause },
            cause => MergeError::Copy { point: self.child, cause },
        })
    }
}

#[cfg(test)]
mod tests;

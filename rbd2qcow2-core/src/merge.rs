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
//!
//! Where it is packed, clusters that lie packed in one of the old layers are copied as they are (`packed`).
//! All others are packed as those of a backup, whether they were before or not.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::buffer::BufferPool;
use crate::cancel::Cancel;
use crate::chain::names::FileKind;
use crate::chain::{ChainError, ChainWriter, MergedLayer, Onto, Point, PointName, Record};
use crate::copy::{self, Copy, CopyError};
use crate::extent::{Extent, ExtentKind, align};
use crate::layer::native::{Compressors, NativeLayer};
use crate::layer::{Compression, ExtendedL2, LayerSpec, LayerWriter};
use crate::progress::Stage;
use crate::qcow2::absorb;
use crate::qcow2::chain::ChainReader;
use crate::qcow2::header::CompressionType;
use crate::qcow2::table::SUBCLUSTERS;
use crate::source::RbdDiffSource;
use crate::source::merged::MergedSource;
use crate::verify::{LayerReport, VerifyError, verify_layers};

mod absorbing;
mod error;
mod packed;
mod progress;

pub use error::MergeError;
use packed::MergedClusters;
pub use progress::{MergeObserver, MergeProgress, Turn, Way};

/// The least memory for image data that a merge works with, whatever it was told.
const LEAST_MEMORY: usize = 16 << 20;

/// Room that is left on the file system besides, in bytes: manifests, digests, and what others write.
const SPARE: u64 = 16 << 20;

/// How layers are put into one. `Default` is what the program does.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct MergeOptions {
    /// Reads in flight, at least 1.
    pub parallel: usize,
    /// Bytes of image data that may be in memory.
    pub memory: usize,
    /// A large layer is reused in place where that saves writing so many bytes.
    pub least_saving: u64,
}

impl Default for MergeOptions {
    fn default() -> Self {
        Self { parallel: 8, memory: 48 << 20, least_saving: 64 << 20 }
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
    pub progress: &'a MergeProgress,
    /// Is told of the stages.
    pub observer: &'a dyn MergeObserver,
    /// Asks for a stop.
    pub cancel: &'a Cancel,
}

/// What a merge has before it.
struct Survey {
    /// What the clusters take that hold data, in bytes, if none is packed.
    bytes: u64,
    /// What there is to be written of them.
    written: u64,
    /// Whether what is merged has edges within what is copied as one, so that it is filled up with what
    /// the layers below hold.
    edges: bool,
}

/// How a merge is done.
struct Method {
    /// How many of the chain's newest layers are put into one.
    layers: usize,
    /// How many of the newest points that is.
    points: usize,
    /// What the new layer builds upon.
    onto: Onto,
    /// What the new layer is to be.
    spec: LayerSpec,
    survey: Survey,
}

impl Merge<'_> {
    /// Verifies what it is made of, writes the new layer and puts it into the old one's place; and tells how
    /// that was done. Blocks.
    ///
    /// Where the oldest layer of those that are to be one is large, and the others are small, it is not
    /// copied: the others are put into one above it, and it becomes the child's *base*, which keeps its
    /// layer when the point is [forgotten](ChainWriter::forget). After that, this merge again has the base
    /// take over what is above, in place, as far as nobody else has it open; else both are copied into one
    /// after all.
    ///
    /// All points read the same before and after, and at every moment between, also where this process
    /// dies. The points that the child has taken over are still there: they are removed by
    /// [`ChainWriter::forget`].
    ///
    /// # Errors
    /// [`MergeError`]. Damage in what would be copied is one.
    pub fn run(&self) -> Result<Way, MergeError> {
        let points = self.points()?;
        let child = points[0];
        if child.base.is_some()
            && child.parent == self.parent
            && let Some(way) = self.absorb(child)?
        {
            return Ok(way);
        }
        self.observer.stage(Stage::Prepare);
        let merged = match self.parent {
            None => points.len(),
            Some(parent) => points.iter().position(|point| point.name == parent).unwrap_or(points.len()),
        };
        // Before the files are opened here.
        let can_absorb = self.may_be_base(&points[..merged])?;
        let paths = self.writer.catalogue().layers(self.child).map_err(|problem| self.unsound(problem))?;
        let chain =
            ChainReader::open(&paths).map_err(|cause| MergeError::Read { point: self.child, cause })?;
        let chain = Arc::new(chain);
        // What the first layer of a Python chain builds upon is empty.
        let layers = if self.parent.is_none() { paths.len() } else { merged };
        let spec = self.spec(&points[..merged], &chain, 0)?;
        let survey = self.survey(&MergedSource::new(&chain, layers), &spec)?;
        let whole = Method { layers, points: merged, onto: Onto::Point(self.parent), spec, survey };
        if can_absorb && let Some(method) = self.onto_base(&points, &chain, &whole)? {
            self.write(&points, &chain, &method)?;
            return Ok(Way::UponBase);
        }
        self.write(&points, &chain, &whole)?;
        Ok(Way::Copied)
    }

    /// Whether the oldest of these points can be reused, as far as that is told without its layer.
    fn may_be_base(&self, points: &[&Point]) -> Result<bool, MergeError> {
        let [child, .., oldest] = points else { return Ok(false) };
        // Nor may it be one already, for another point.
        let has_base = points.iter().any(|point| point.base.is_some())
            || self.writer.catalogue().base(oldest.name).is_some();
        let Some(header) = &oldest.header else { return Ok(false) };
        // Its digests are put together with others, so there must be some; unless the child has none.
        let digests = child.manifest.is_none() || (oldest.manifest.is_some() && oldest.digests.exists());
        // The first of a Python chain builds upon something that is no point.
        let root = oldest.parent.is_some() || header.backing.is_none();
        let size =
            child.header.as_ref().is_some_and(|header_of| header_of.virtual_size == header.virtual_size);
        if has_base || !digests || !root || !size || absorb::unfit(header, header).is_some() {
            return Ok(false);
        }
        Ok(self.writer.can_absorb(oldest.name, self.child)?)
    }

    /// What is to be written where the oldest layer is reused; `None` where that is not worthwhile.
    fn onto_base(
        &self,
        points: &[&Point],
        chain: &ChainReader,
        whole: &Method,
    ) -> Result<Option<Method>, MergeError> {
        let base = whole.points - 1;
        let spec = self.spec(&points[..whole.points], chain, base)?;
        let kind = match spec.compression {
            Compression::None => None,
            Compression::Zlib => Some(CompressionType::Zlib),
            Compression::Zstd { .. } => Some(CompressionType::Zstd),
        };
        if kind.is_some_and(|kind| kind != chain.layers()[base].header().compression_type) {
            return Ok(None);
        }
        let survey = self.survey(&MergedSource::new(chain, base), &spec)?;
        // It is written twice: above the base, and into it.
        let saved = whole.survey.written.saturating_sub(survey.written.saturating_mul(2));
        let onto = Onto::Base(points[base].name);
        Ok((saved >= self.options.least_saving.max(1)).then_some(Method {
            layers: base,
            points: base,
            onto,
            spec,
            survey,
        }))
    }

    fn write(&self, points: &[&Point], chain: &Arc<ChainReader>, method: &Method) -> Result<(), MergeError> {
        let source = MergedSource::new(chain, method.layers);
        let spec = &method.spec;
        let times = if matches!(method.onto, Onto::Base(_)) { 2 } else { 1 };
        self.check_space(method.survey.bytes.saturating_mul(times))?;
        let pending = self.writer.begin_merge(self.child, method.onto, spec.cluster_size)?;
        // Of the layers below only what shares a grain with what is merged is copied.
        let read = if method.survey.edges { points.len() } else { method.points };
        self.observer.stage(Stage::Verify);
        let mut unverified = self.verify(&points[..read], pending.manifest().is_some())?;
        if let Onto::Base(_) = method.onto {
            // Its manifest will be gone.
            let base = points[method.points].manifest.as_ref();
            unverified.extend(base.into_iter().flat_map(|manifest| &manifest.unverified));
        }
        let spec = LayerSpec {
            path: pending.layer_path().to_owned(),
            backing: pending.backing_name(),
            ..spec.clone()
        };
        let failed = |cause| MergeError::Layer { point: self.child, cause };
        let layer = NativeLayer::create(&spec, self.compressors.clone()).map_err(failed)?;
        let packed = MergedClusters { chain: chain.clone(), merged: method.layers };
        let layer = layer.with_packed(Arc::new(packed));
        self.observer.stage(Stage::Copy);
        self.copy(&source, &layer, method.onto == Onto::Point(None), pending.digests())?;
        let extended_l2 = layer.grain() < u64::from(spec.cluster_size);
        drop(layer);
        if self.cancel.is_set() {
            return Err(MergeError::Cancelled);
        }
        self.observer.stage(Stage::Commit);
        let copied = &self.progress.copy;
        let record = pending.manifest().map(|manifest| Record {
            data_extents: copied.data_extents.get(),
            data_bytes: copied.data.get(),
            zero_extents: copied.zero_extents.get(),
            zero_bytes: copied.zero.get(),
            writer: "native".to_owned(),
            compression: spec.compression.to_string(),
            cluster_size: spec.cluster_size,
            extended_l2,
            ..manifest.record.clone()
        });
        if let Onto::Base(base) = method.onto {
            // Where what follows fails, the next run removes the name, unless the new layer is in place and
            // needs it.
            self.writer.keep_base(base)?;
        }
        let virtual_size = spec.virtual_size;
        pending.commit(MergedLayer { virtual_size, extended_l2, record, unverified })?;
        let old = points[0].base.filter(|base| method.onto != Onto::Base(*base));
        old.map_or(Ok(()), |base| Ok(self.writer.drop_base(base)?))
    }

    /// The child and all that it builds upon.
    fn points(&self) -> Result<Vec<&Point>, MergeError> {
        self.writer.catalogue().ancestry(self.child).map_err(|problem| self.unsound(problem))
    }

    fn unsound(&self, cause: crate::chain::Problem) -> MergeError {
        let path = self.writer.directory().to_owned();
        ChainError::ParentUnsound { path, point: self.child, cause: cause.into() }.into()
    }

    /// The new layer has the form of one of those that it replaces, number `like`, and is packed if any of
    /// `points`, which are put into it, was: as the newest of those.
    fn spec(&self, points: &[&Point], chain: &ChainReader, like: usize) -> Result<LayerSpec, MergeError> {
        let header = chain.layers()[like].header();
        Ok(LayerSpec {
            path: PathBuf::new(),
            virtual_size: chain.virtual_size(),
            backing: None,
            cluster_size: u32::try_from(header.cluster_bits.size()).expect("at most 2 MiB"),
            compression: self.compression(points, chain)?,
            extended_l2: if header.extended_l2 { ExtendedL2::Auto } else { ExtendedL2::Off },
        })
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
        let mut survey = Survey { bytes: 0, written: 0, edges: false };
        for segment in source.segments(cluster) {
            let failed = |cause| MergeError::Copy { point: self.child, cause: CopyError::Source(cause) };
            if self.cancel.is_set() {
                return Err(MergeError::Cancelled);
            }
            let mut found = Vec::new();
            source.diff(segment.map_err(failed)?, &mut found).map_err(failed)?;
            let aligned = align(found.clone(), step, size);
            survey.edges |= length(&aligned) != length(&found);
            let is_data = |extent: &Extent| extent.kind == ExtentKind::Data;
            survey.written +=
                aligned.iter().filter(|extent| is_data(extent)).map(|extent| extent.length).sum::<u64>();
            found.retain(is_data);
            survey.bytes += length(&align(found, cluster, size));
        }
        Ok(survey)
    }

    /// Holds the layers of these points against their digests, and looks at the structure of those that
    /// never had any. Returns the points whose data nobody could ever verify: these, and what any of the
    /// points has taken over from such.
    fn verify(&self, points: &[&Point], with_digests: bool) -> Result<BTreeSet<PointName>, MergeError> {
        let image = self.writer.catalogue().image();
        let reports = verify_layers(image, points, &self.progress.verify, self.cancel);
        let reports = reports.map_err(|cause| match cause {
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
        #[cfg(test)]
        if tests::SPACE_IS_NOT_CHECKED.get() {
            return Ok(());
        }
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
        root: bool,
        digests: Option<&crate::chain::digests::DigestWriter>,
    ) -> Result<(), MergeError> {
        let copy = Copy {
            source,
            layer,
            root,
            digests,
            buffers: &BufferPool::new(self.options.memory.max(LEAST_MEMORY)),
            rate_limit: None,
            parallel: self.options.parallel,
            progress: &self.progress.copy,
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

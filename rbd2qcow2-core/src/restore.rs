//! Bringing a point back: into a file, as a stream, or into an RBD image.
//!
//! A point is opened with its whole chain, which stays locked against changes until the end
//! ([`OpenPoint`]), and is copied by the same pipeline that makes backups: the chain is the source
//! ([`source::chain`](crate::source::chain)), a file or an
//! RBD image is the layer. Only the latter ([`image`]) needs Ceph.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::buffer::BufferPool;
use crate::cancel::Cancel;
use crate::chain::names::{ImageName, PointName};
use crate::copy::{self, Copy, CopyError};
use crate::layer::native::{Compressors, NativeLayer};
use crate::layer::raw::RawFile;
use crate::layer::{Compression, ExtendedL2, LayerError, LayerSpec, LayerWriter};
use crate::point::{OpenPoint, PointError};
use crate::progress::{Observer, Progress, Stage};
use crate::source::chain::ChainSource;

pub mod block;
mod error;
#[cfg(feature = "rbd")]
pub mod image;
mod stream;
mod target;

pub use error::RestoreError;
use target::Target;

/// The least memory for image data that a restore works with, whatever it was told.
const LEAST_MEMORY: usize = 16 << 20;

/// Which point is restored, and how. What it is restored to, a method says.
#[derive(Clone, Debug)]
pub struct Restore {
    /// The directory that holds a directory for each image.
    pub dest: PathBuf,
    /// The image's name, as Ceph knows it.
    pub image: String,
    /// The point; `None` for the newest.
    pub point: Option<PointName>,
    /// How it is restored.
    pub options: RestoreOptions,
}

/// How a point is restored. `Default` is what the program does without options.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RestoreOptions {
    /// Reads in flight, at least 1.
    pub parallel: usize,
    /// Bytes of image data that may be in memory.
    pub memory: usize,
}

impl Default for RestoreOptions {
    fn default() -> Self {
        Self { parallel: 16, memory: 48 << 20 }
    }
}

/// What a restored file is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FileFormat {
    /// The image itself, with holes where it is zeroes, of exactly the image's size.
    #[default]
    Raw,
    /// One qcow2 file without a backing file. Its size is the image's rounded up to 512.
    Qcow2(Qcow2Options),
}

/// How a restored qcow2 file is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Qcow2Options {
    /// How clusters are stored.
    pub compression: Compression,
    /// Cluster size in bytes, a power of two from 512 to 2 MiB.
    pub cluster_size: u32,
    /// Whether clusters have subclusters.
    pub extended_l2: ExtendedL2,
}

impl Default for Qcow2Options {
    fn default() -> Self {
        Self {
            compression: Compression::None,
            cluster_size: LayerSpec::DEFAULT_CLUSTER_SIZE,
            extended_l2: ExtendedL2::Auto,
        }
    }
}

/// How a restore went.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RestoreReport {
    /// The image.
    pub image: ImageName,
    /// The point that was restored.
    pub point: PointName,
    /// The image's size, in bytes.
    pub virtual_size: u64,
    /// Bytes of the image that were written. Into a stream that is all of them, into an RBD image that
    /// existed what was not there yet.
    pub bytes_written: u64,
    /// Bytes of the image that are zeroes and were not written: the rest. In an RBD image that existed
    /// these are only the bytes that had to be made zeroes.
    pub zero_bytes: u64,
    /// Bytes of the image that were there already; `None` where nothing was compared.
    pub unchanged_bytes: Option<u64>,
    /// From the start until everything was on stable storage.
    pub time: Duration,
}

/// What is wanted of one restore: who is told, and who may stop it.
struct Run<'a> {
    restore: &'a Restore,
    start: Instant,
    progress: Arc<Progress>,
    observer: &'a dyn Observer,
    cancel: &'a Cancel,
}

impl Restore {
    /// Restores the point to a new file at `path`. Blocks.
    ///
    /// The file is written aside, in the directory where it is going to be, under a hidden name that
    /// begins as its own; brought to stable storage; and renamed without replacing anything: it is
    /// there whole or not at all. Its mode is 0600. Left-overs of killed restores to the same path are
    /// removed first, those of restores under way are not.
    ///
    /// # Errors
    /// [`RestoreError`]. Nothing of the file is left then, but after [`RestoreError::Uncertain`].
    pub fn to_file(
        &self,
        path: &Path,
        format: &FileFormat,
        observer: &dyn Observer,
        cancel: &Cancel,
    ) -> Result<RestoreReport, RestoreError> {
        let run = self.begin(observer, cancel);
        let mut target = Target::new(path, &self.dest)?;
        let point = run.open()?;
        target.remove_stale();
        let failed = |cause| RestoreError::Write { path: path.to_owned(), cause };
        let layer = create(target.partial(), format, point.size()).map_err(failed)?;
        target.created();
        run.copy(&point, &*layer, path)?;
        // Before anything has the name: the file may be looked at as soon as it is there.
        drop(layer);
        if cancel.is_set() {
            return Err(RestoreError::Cancelled);
        }
        target.commit()?;
        Ok(run.report(&point, run.progress.data.get()))
    }

    /// Writes the point's image to `stream`, from its first byte to its last, zeroes too. Blocks, also
    /// for as long as the stream takes nothing: a cancel is noticed between blocks.
    ///
    /// # Errors
    /// [`RestoreError`]. The stream then got a part of the image, or all of it but not safely: what was
    /// made of it must not be used.
    pub fn to_stream(
        &self,
        stream: &mut dyn Write,
        observer: &dyn Observer,
        cancel: &Cancel,
    ) -> Result<RestoreReport, RestoreError> {
        let run = self.begin(observer, cancel);
        let point = run.open()?;
        observer.stage(&self.image, Stage::Copy);
        let source = ChainSource::new(point.chain(), point.size());
        let memory = self.options.memory.max(LEAST_MEMORY);
        stream::copy(&source, stream, self.options.parallel, memory, &run.progress, cancel)
            .map_err(|error| error.explain(&point))?;
        Ok(run.report(&point, point.size()))
    }

    fn begin<'a>(&'a self, observer: &'a dyn Observer, cancel: &'a Cancel) -> Run<'a> {
        let run = Run { restore: self, start: Instant::now(), progress: Arc::default(), observer, cancel };
        observer.started(&self.image, &run.progress);
        observer.stage(&self.image, Stage::Prepare);
        run
    }
}

impl Run<'_> {
    fn stage(&self, stage: Stage) {
        self.observer.stage(&self.restore.image, stage);
    }

    fn open(&self) -> Result<OpenPoint, PointError> {
        let Restore { dest, image, point, .. } = self.restore;
        OpenPoint::open(dest, &ImageName::new(image)?, *point)
    }

    /// Copies everything that is not zeroes, and has it brought to stable storage. `path` is where the
    /// file is going to be, for errors.
    fn copy(&self, point: &OpenPoint, layer: &dyn LayerWriter, path: &Path) -> Result<(), RestoreError> {
        self.stage(Stage::Copy);
        let options = &self.restore.options;
        let copy = Copy {
            source: &ChainSource::new(point.chain(), point.size()),
            layer,
            root: true,
            digests: None,
            buffers: &BufferPool::new(options.memory.max(LEAST_MEMORY)),
            rate_limit: None,
            parallel: options.parallel,
            progress: &self.progress,
            cancel: self.cancel,
            stop: &self.cancel.part(),
        };
        let copied = copy.run().and_then(|_| {
            self.stage(Stage::Commit);
            copy::finish(layer, self.cancel)
        });
        copied.map_err(|error| match error {
            _ if self.cancel.is_set() => RestoreError::Cancelled,
            CopyError::Source(cause) => RestoreError::of_source(point, cause),
            CopyError::Layer(cause) => RestoreError::Write { path: path.to_owned(), cause },
            error => RestoreError::Copy(error),
        })
    }

    /// `written` may count what pads the image's last sector or cluster.
    fn report(&self, point: &OpenPoint, written: u64) -> RestoreReport {
        let bytes_written = written.min(point.size());
        RestoreReport {
            image: point.image().clone(),
            point: point.name(),
            virtual_size: point.size(),
            bytes_written,
            zero_bytes: point.size() - bytes_written,
            unchanged_bytes: None,
            time: self.start.elapsed(),
        }
    }
}

/// Creates the file that a point of `size` bytes is copied to.
fn create(path: &Path, format: &FileFormat, size: u64) -> Result<Box<dyn LayerWriter>, LayerError> {
    Ok(match format {
        FileFormat::Raw => Box::new(RawFile::create(path, size)?),
        FileFormat::Qcow2(options) => {
            let spec = LayerSpec {
                path: path.to_owned(),
                virtual_size: size.next_multiple_of(crate::layer::SECTOR),
                backing: None,
                cluster_size: options.cluster_size,
                compression: options.compression,
                extended_l2: options.extended_l2,
            };
            Box::new(NativeLayer::create(&spec, Compressors::default())?)
        }
    })
}

#[cfg(test)]
mod tests;

//! A layer written through qemu-nbd.
//!
//! QEMU's own qcow2 code makes the file; this side talks NBD to it. Two decisions keep it from ever
//! looking at older layers, which would cost a copy and make a layer depend on them being right:
//!
//! - The server opens the layer without its backing file. Whole grains need none; a request that is
//!   no whole grain is refused here.
//! - While it is written, the layer's virtual size is rounded up to the grain, and the last, ragged
//!   grain is padded with zeroes. The true size is put into the header at the end. QEMU's compress
//!   filter does not open an image whose size is not a multiple of the cluster at all.
//!
//! The server starts at the first write, so that a layer of an unchanged image costs none.

mod error;
mod header;
mod server;
mod tools;

use std::fs::{self, File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use bytes::Bytes;

pub use self::error::QemuNbdError;
pub use self::server::{Aio, IoMode};
use self::server::{Running, Stop};
pub use self::tools::QemuTools;
use super::{Compression, ExtendedL2, LayerError, LayerSpec, LayerWriter, Patch, SECTOR, SMALLEST_EXTENDED};
use crate::extent::{Extent, ExtentKind};
use crate::nbd::NbdError;
use crate::nbd::client::{Client, ZeroOptions};

/// Subclusters of a cluster in an image with extended L2 entries.
const SUBCLUSTERS: u32 = 32;

/// The largest virtual size that can be rounded up to any grain and still be a file offset.
const LARGEST_SIZE: u64 = (1 << 63) - (2 << 20);

/// How to write layers. Clones share what was found out about the programs.
#[derive(Clone, Debug)]
pub struct QemuNbdOptions {
    /// The programs to use.
    pub tools: QemuTools,
    /// Connections to the server, 1 or more.
    pub connections: usize,
    /// How the server writes the file.
    pub io: IoMode,
    /// How long the server may take to start and to negotiate.
    pub start_limit: Duration,
    /// How long the server may take to leave once everything is flushed.
    pub exit_limit: Duration,
}

impl Default for QemuNbdOptions {
    fn default() -> Self {
        Self {
            tools: QemuTools::default(),
            connections: 2,
            io: IoMode::Auto,
            start_limit: Duration::from_secs(30),
            exit_limit: Duration::from_secs(60),
        }
    }
}

/// What becomes of a layer.
#[derive(Debug)]
enum Phase {
    /// Created, nothing written.
    Idle,
    /// A server is at work.
    Running(Box<Running>),
    /// The server could not be started.
    Failed(QemuNbdError),
    /// [`LayerWriter::finish`] was called.
    Finished,
}

/// A [`LayerWriter`] that has qemu-nbd write the file. See the [module](self).
#[derive(Debug)]
pub struct QemuNbdLayer {
    /// Absolute, its directory without symbolic links.
    path: PathBuf,
    virtual_size: u64,
    /// `virtual_size`, rounded up to the grain: the file's until it is finished.
    padded_size: u64,
    grain: u64,
    compressed: bool,
    options: QemuNbdOptions,
    /// Read-locked while the server is used, write-locked to start and to end it.
    phase: RwLock<Phase>,
    /// Not under the lock of `phase`, which [`LayerWriter::abort`] must not wait for.
    stop: Stop,
}

impl QemuNbdLayer {
    /// Creates the file, a qcow2 image that holds nothing yet. The backing file is not opened and
    /// need not exist. Nothing is on stable storage before [`LayerWriter::finish`].
    ///
    /// # Errors
    /// [`LayerError::Create`]: the file exists, cannot be made, the spec is one that QEMU cannot
    /// write (a level of compression, for instance), or the programs are missing, too old or fail.
    /// The file is then removed, unless it existed before.
    pub fn create(spec: &LayerSpec, options: QemuNbdOptions) -> Result<Self, LayerError> {
        Self::try_create(spec, options)
            .map_err(|cause| LayerError::Create { path: spec.path.clone(), cause: cause.into() })
    }

    fn try_create(spec: &LayerSpec, options: QemuNbdOptions) -> Result<Self, QemuNbdError> {
        let path = absolute(&spec.path)?;
        check(spec)?;
        options.tools.probe()?;
        let compressed = spec.compression != Compression::None;
        let extended =
            spec.extended_l2 == ExtendedL2::Auto && spec.cluster_size >= SMALLEST_EXTENDED && !compressed;
        let grain = if extended { spec.cluster_size / SUBCLUSTERS } else { spec.cluster_size };
        let padded_size = spec.virtual_size.next_multiple_of(grain.into());
        // The file is made here, as qemu-img would overwrite one that exists, and keeps its mode.
        let mut open = OpenOptions::new();
        open.write(true).create_new(true).mode(0o600).open(&path).map_err(QemuNbdError::new_file)?;
        if let Err(error) = options.tools.create(&path, spec, extended, padded_size) {
            // The error to report is the one at hand.
            let _ = fs::remove_file(&path);
            return Err(error);
        }
        Ok(Self {
            path,
            virtual_size: spec.virtual_size,
            padded_size,
            grain: grain.into(),
            compressed,
            options,
            phase: RwLock::new(Phase::Idle),
            stop: Stop::default(),
        })
    }

    /// Calls `act` with the client, once the server runs.
    fn run(&self, act: impl Fn(&Client) -> Result<(), NbdError>) -> Result<(), LayerError> {
        self.try_run(act).map_err(|cause| self.write_error(cause))
    }

    fn try_run(&self, act: impl Fn(&Client) -> Result<(), NbdError>) -> Result<(), QemuNbdError> {
        self.stop.check()?;
        // Not an `if let`, which would hold the lock while the server starts.
        let idle = matches!(*self.read_phase(), Phase::Idle);
        if idle {
            self.start();
        }
        match &*self.read_phase() {
            Phase::Running(running) => act(&running.client).map_err(|e| self.explain(running, e)),
            Phase::Failed(error) => Err(error.clone()),
            Phase::Idle | Phase::Finished => Err(QemuNbdError::Finished),
        }
    }

    /// Starts the server unless somebody else was quicker.
    fn start(&self) {
        let mut phase = self.write_phase();
        if let Phase::Idle = *phase {
            *phase = match Running::start(self) {
                Ok(running) => Phase::Running(Box::new(running)),
                Err(error) => Phase::Failed(error),
            };
        }
    }

    /// Finds out why a client's call failed.
    fn explain(&self, running: &Running, error: NbdError) -> QemuNbdError {
        match self.stop.check() {
            Err(aborted) => aborted,
            Ok(()) => running.explain(&self.options.tools, error),
        }
    }

    /// Has everything written and flushed, and the server leave.
    fn end(&self, running: Running) -> Result<(), LayerError> {
        let finish_error = |e| self.finish_error(self.explain(&running, e));
        running.client.drain().map_err(|e| self.write_error(self.explain(&running, e)))?;
        // The server's exit status does not tell of errors at closing: this reply is what counts.
        running.client.flush().map_err(finish_error)?;
        running.leave(self).map_err(|e| self.finish_error(e))
    }

    /// Puts the true size into the header, and the file on stable storage.
    fn settle(&self) -> Result<(), QemuNbdError> {
        let file = OpenOptions::new().read(true).write(true).open(&self.path);
        let file: File = file.map_err(|e| QemuNbdError::Open(Arc::new(e)))?;
        if self.padded_size != self.virtual_size {
            header::set_virtual_size(&file, self.padded_size, self.virtual_size)?;
        }
        file.sync_all().map_err(|e| QemuNbdError::Sync(Arc::new(e)))
    }

    /// Only whole grains may pass: the server would fill up a part of one with zeroes.
    fn check_range(&self, range: &Range<u64>) -> Result<(), LayerError> {
        let whole = range.start.is_multiple_of(self.grain)
            && (range.end.is_multiple_of(self.grain) || range.end == self.virtual_size);
        if whole && range.start <= range.end && range.end <= self.virtual_size {
            return Ok(());
        }
        let (grain, size) = (self.grain, self.virtual_size);
        Err(self.write_error(QemuNbdError::BadRange { range: range.clone(), grain, size }))
    }

    fn write_error(&self, cause: QemuNbdError) -> LayerError {
        LayerError::Write { path: self.path.clone(), cause: cause.into() }
    }

    fn finish_error(&self, cause: QemuNbdError) -> LayerError {
        LayerError::Finish { path: self.path.clone(), cause: cause.into() }
    }

    fn read_phase(&self) -> RwLockReadGuard<'_, Phase> {
        self.phase.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_phase(&self) -> RwLockWriteGuard<'_, Phase> {
        self.phase.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl QemuNbdLayer {
    fn write_data(&self, offset: u64, mut data: Bytes) -> Result<(), LayerError> {
        self.check_range(&(offset..offset.saturating_add(data.len() as u64)))?;
        let ragged = data.len() % usize::try_from(self.grain).expect("at most 2 MiB");
        let tail = data.split_off(data.len() - ragged);
        let tail_offset = offset + data.len() as u64;
        if !data.is_empty() {
            self.run(|client| client.write(offset, data.clone()))?;
        }
        if !tail.is_empty() {
            let mut padded = tail.to_vec();
            padded.resize(usize::try_from(self.grain).expect("at most 2 MiB"), 0);
            let padded = Bytes::from(padded);
            self.run(|client| client.write(tail_offset, padded.clone()))?;
        }
        Ok(())
    }

    fn write_zeroes(&self, range: Range<u64>) -> Result<(), LayerError> {
        self.check_range(&range)?;
        let length = range.end.next_multiple_of(self.grain) - range.start;
        if range.is_empty() {
            return Ok(());
        }
        self.run(|client| client.write_zeroes(range.start, length, ZeroOptions::default()))
    }
}

impl LayerWriter for QemuNbdLayer {
    fn grain(&self) -> u64 {
        self.grain
    }

    /// Requests of one grain each would do: the server puts a cluster together.
    fn unit(&self) -> u64 {
        self.grain
    }

    fn wants_whole_units(&self) -> bool {
        false
    }

    fn write(&self, patch: Patch) -> Result<Vec<Extent>, LayerError> {
        for piece in &patch.pieces {
            match piece.kind {
                ExtentKind::Data => self.write_data(piece.offset, patch.bytes(piece))?,
                ExtentKind::Zero => self.write_zeroes(piece.offset..piece.end())?,
            }
        }
        Ok(patch.pieces)
    }

    fn abort(&self) {
        self.stop.stop();
    }

    fn finish(&self) -> Result<(), LayerError> {
        let mut phase = self.write_phase();
        match std::mem::replace(&mut *phase, Phase::Finished) {
            Phase::Idle => {}
            Phase::Running(running) => self.end(*running)?,
            Phase::Failed(error) => return Err(self.write_error(error)),
            Phase::Finished => return Err(self.finish_error(QemuNbdError::Finished)),
        }
        self.stop.check().and_then(|()| self.settle()).map_err(|cause| self.finish_error(cause))
    }
}

/// The file with its directory resolved: the server opens it from there.
fn absolute(path: &Path) -> Result<PathBuf, QemuNbdError> {
    let name = path.file_name().ok_or(QemuNbdError::BadName)?;
    if name.to_str().is_none() {
        // The server gets the name within JSON.
        return Err(QemuNbdError::BadName);
    }
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let directory = directory.unwrap_or(Path::new("."));
    Ok(directory.canonicalize().map_err(QemuNbdError::new_file)?.join(name))
}

/// Refuses what QEMU would refuse less clearly, or take for something else.
fn check(spec: &LayerSpec) -> Result<(), QemuNbdError> {
    if let Compression::Zstd { level: Some(level) } = spec.compression {
        return Err(QemuNbdError::CompressionLevel { level });
    }
    if !spec.virtual_size.is_multiple_of(SECTOR) || spec.virtual_size > LARGEST_SIZE {
        return Err(QemuNbdError::BadVirtualSize { size: spec.virtual_size });
    }
    if !spec.cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&spec.cluster_size) {
        return Err(QemuNbdError::BadClusterSize { size: spec.cluster_size });
    }
    match &spec.backing {
        // A colon would make QEMU see a protocol.
        Some(name) if name.is_empty() || name.contains(['/', ':', '\0']) => {
            Err(QemuNbdError::BadBackingName { name: name.clone() })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

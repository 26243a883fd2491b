//! What the benchmarks of rbd2qcow2-core share: those in `benches/`, one file for each subject.
//!
//! `cargo bench -p rbd2qcow2-benches` measures, and leaves reports with plots in `target/criterion`.
//! `cargo test -p rbd2qcow2-benches --benches` runs each benchmark once, on less data, to see that it works.
//! Files go to the directory for temporary files, so `TMPDIR` chooses the disk that is measured along.

use std::hint::black_box;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rbd2qcow2_core::buffer::BufferPool;
use rbd2qcow2_core::cancel::Cancel;
use rbd2qcow2_core::chain::digests::DigestWriter;
use rbd2qcow2_core::copy::Copy;
use rbd2qcow2_core::extent::{Extent, ExtentKind};
use rbd2qcow2_core::layer::{Compression, ExtendedL2, LayerError, LayerSpec, LayerWriter, Patch};
use rbd2qcow2_core::options::BackupOptions;
use rbd2qcow2_core::progress::Progress;
use rbd2qcow2_core::source::RbdDiffSource;
use rbd2qcow2_core::source::pattern::PatternSource;

pub mod points;

/// Bytes of a KiB.
pub const KIB: u64 = 1 << 10;

/// Bytes of a MiB.
pub const MIB: u64 = 1 << 20;

/// The longest read of a copy into a layer with smaller units, in bytes.
pub const LONGEST_READ: u64 = 2 * MIB;

/// Of 16 bytes how many are random in data that do not compress.
pub const NOISE: usize = 16;

/// Of 16 bytes how many are random in data that compress well.
pub const TEXT: usize = 4;

/// Makes `main` of functions that take a [`Criterion`], with the settings of all benchmarks here: a whole run
/// is to take minutes, and most of what is measured takes long enough itself.
///
/// [`Criterion`]: https://docs.rs/criterion/latest/criterion/struct.Criterion.html
#[macro_export]
macro_rules! benchmarks {
    ($($target:path),+ $(,)?) => {
        ::criterion::criterion_group! {
            name = benches;
            config = ::criterion::Criterion::default()
                .sample_size(10)
                .nresamples(10_000)
                .warm_up_time(::std::time::Duration::from_millis(300))
                .measurement_time(::std::time::Duration::from_secs(1));
            targets = $($target),+
        }
        ::criterion::criterion_main!(benches);
    };
}

/// Whether benchmarks are only to show that they work. Agrees with what criterion makes of the arguments.
#[must_use]
pub fn is_test() -> bool {
    let has = |wanted: &str| std::env::args().any(|argument| argument == wanted);
    has("--test") || !has("--bench")
}

/// An amount that time is measured with, or a 16th where no time is measured.
#[must_use]
pub fn sized(amount: u64) -> u64 {
    if is_test() { amount / 16 } else { amount }
}

/// Lengths of what is in memory.
///
/// # Panics
/// When it is not.
#[must_use]
pub fn index(length: u64) -> usize {
    usize::try_from(length).expect("in memory")
}

/// A snapshot in which `length` bytes have changed in each `every`, from `shift` on. `every` is a power of two.
/// What `random` is tells [`PatternSource::new`].
#[must_use]
pub fn scattered(size: u64, every: u64, shift: u64, length: u64, random: usize) -> PatternSource {
    const SEGMENT: u64 = 128 * MIB;
    let changed = (0..SEGMENT / every).map(|number| number * every + shift);
    let changed = changed.map(|offset| Extent { offset, length, kind: ExtentKind::Data });
    PatternSource::new(size, SEGMENT, changed.collect(), random)
}

/// A root layer at `path`, as the program makes it without other options.
#[must_use]
pub fn layer_spec(path: &Path, virtual_size: u64, compression: Compression) -> LayerSpec {
    LayerSpec {
        path: path.to_owned(),
        virtual_size,
        backing: None,
        cluster_size: LayerSpec::DEFAULT_CLUSTER_SIZE,
        compression,
        extended_l2: ExtendedL2::Auto,
    }
}

/// A layer that drops everything.
#[derive(Debug)]
pub struct Null {
    unit: u64,
    patches: AtomicU64,
}

impl Default for Null {
    fn default() -> Self {
        Self::new(Self::GRAIN)
    }
}

impl Null {
    /// Its grain, in bytes.
    pub const GRAIN: u64 = 4 * KIB;

    /// A layer of this unit, in bytes: a power of two.
    #[must_use]
    pub fn new(unit: u64) -> Self {
        Self { unit, patches: AtomicU64::new(0) }
    }

    /// How many patches it was given.
    #[must_use]
    pub fn patches(&self) -> u64 {
        self.patches.load(Ordering::Relaxed)
    }
}

impl LayerWriter for Null {
    fn grain(&self) -> u64 {
        Self::GRAIN
    }

    fn unit(&self) -> u64 {
        self.unit
    }

    fn wants_whole_units(&self) -> bool {
        false
    }

    fn write(&self, patch: Patch) -> Result<Vec<Extent>, LayerError> {
        self.patches.fetch_add(1, Ordering::Relaxed);
        drop(black_box(patch.data));
        Ok(patch.pieces)
    }

    fn abort(&self) {}

    fn finish(&self) -> Result<(), LayerError> {
        Ok(())
    }
}

/// Memory for image data, as much as the program takes.
#[must_use]
pub fn usual_memory() -> BufferPool {
    BufferPool::new(BackupOptions::default().memory)
}

/// Reads in flight, as many as the program has.
#[must_use]
pub fn usual_parallel() -> usize {
    BackupOptions::default().parallel
}

/// Copies a source into a layer that builds upon nothing, and finishes that.
pub fn copy(
    source: &dyn RbdDiffSource,
    layer: &dyn LayerWriter,
    buffers: &BufferPool,
    parallel: usize,
) -> Progress {
    run(source, layer, buffers, parallel, true, None)
}

/// As [`copy`], for whatever layer, and takes digests of what that holds.
fn run(
    source: &dyn RbdDiffSource,
    layer: &dyn LayerWriter,
    buffers: &BufferPool,
    parallel: usize,
    root: bool,
    digests: Option<&DigestWriter>,
) -> Progress {
    let (cancel, progress) = (Cancel::new(), Progress::default());
    let stop = cancel.part();
    let copy = Copy {
        source,
        layer,
        root,
        digests,
        buffers,
        rate_limit: None,
        parallel,
        progress: &progress,
        cancel: &cancel,
        stop: &stop,
    };
    copy.run().expect("nothing can fail here");
    layer.finish().expect("the layer is finished");
    progress
}

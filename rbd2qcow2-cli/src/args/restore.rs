//! The command line of `restore`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{ArgGroup, Args, ValueEnum};
use rbd2qcow2_core::layer::{Compression, ExtendedL2};
use rbd2qcow2_core::rbd::{ClusterOptions, Features};
use rbd2qcow2_core::restore::image::{ImageTarget, Overrides};
use rbd2qcow2_core::restore::{FileFormat, Qcow2Options, Restore, RestoreOptions};

use super::values::{self, ImageSpec, PointSpec};

pub(super) const EXAMPLES: &str = "\
Examples:
  rbd2qcow2 restore /backups vm-1 --to-rbd rbd/vm-1-restored
  rbd2qcow2 restore /backups vm-1@20261122T173312Z --to-rbd rbd/vm-1 --overwrite
  rbd2qcow2 restore /backups vm-1 --to-file vm-1.raw
  rbd2qcow2 restore /backups vm-1@20261122T173312Z --to-file vm-1.qcow2 --format qcow2
  rbd2qcow2 restore /backups vm-1 --to-file vm-1.qcow2 --format qcow2 --compression zstd
  rbd2qcow2 restore /backups vm-1 --to-file - | ssh host 'dd of=/dev/vg/vm-1 bs=1M'

An RBD image is made as it was: size, object size, striping, features and metadata. One that exists is
refused, unless --overwrite is given: then only what differs is written, and its snapshots, features
and metadata stay, but for the keys that --metadata sets. The image must not be in use. Until it is
whole its metadata has the key `rbd2qcow2-incomplete`; the same command again finishes what was
interrupted.

Restoring to a file needs no cluster. Nothing is overwritten: the file is written aside under a hidden
name, brought to stable storage, and gets its name last; only its owner can read it.

No backup of the image can run meanwhile.";

/// What stands for standard output.
const STDOUT: &str = "-";

/// Heading of the options that are for an RBD image.
const IMAGE_OPTIONS: &str = "Options of `--to-rbd`";

/// Heading of the options that are for a file.
const FILE_OPTIONS: &str = "Options of `--to-file`";

/// The arguments of `restore`.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("target").required(true).args(["to_rbd", "to_file"]))]
pub struct RestoreArgs {
    /// Directory that holds a directory for each image
    #[arg(value_name = "DEST")]
    dest: PathBuf,
    /// The image, and the point as `list` shows it; the newest when none is named
    #[arg(value_name = "IMAGE[@POINT]")]
    point: PointSpec,
    /// The RBD image to make
    #[arg(long, value_name = "POOL[/NAMESPACE]/IMAGE")]
    to_rbd: Option<ImageSpec>,
    /// The file to make, which must not exist; `-` writes a raw image to standard output
    #[arg(long, value_name = "PATH")]
    to_file: Option<PathBuf>,
    /// Reads, and writes, in flight
    #[arg(short, long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=256))]
    parallel: u16,
    /// What `--to-rbd` needs to know besides.
    #[command(flatten)]
    image: ImageArgs,
    /// What `--to-file` needs to know besides.
    #[command(flatten)]
    file: FileArgs,
}

/// How an RBD image is made.
#[derive(Debug, Args)]
#[command(next_help_heading = IMAGE_OPTIONS)]
struct ImageArgs {
    /// Make an image that exists what the point is. Only what differs is written
    #[arg(long, conflicts_with = "to_file")]
    overwrite: bool,
    /// Size of the image, at least the point's; an image that exists gets it too, even if that removes
    /// its end. K, M, G, T are powers of 1024 [default: the point's; an image that exists keeps its own]
    #[arg(long, value_name = "BYTES", conflicts_with = "to_file", value_parser = values::bytes)]
    size: Option<u64>,
    /// Size of the objects: a power of two from 4K to 32M [default: as it was]
    #[arg(long, value_name = "BYTES", conflicts_with = "to_file", value_parser = values::object_size)]
    object_size: Option<u64>,
    /// Bytes in a row in one object [default: as it was]
    #[arg(long, value_name = "BYTES", conflicts_with = "to_file", requires = "stripe_count", value_parser = values::bytes)]
    stripe_unit: Option<u64>,
    /// Objects over which rows are spread [default: as it was]
    #[arg(long, value_name = "N", conflicts_with = "to_file", requires = "stripe_unit", value_parser = clap::value_parser!(u64).range(1..))]
    stripe_count: Option<u64>,
    /// A feature of the image; may be given several times, and they are then all that it has
    /// [default: as they were, as far as the cluster knows them]
    #[arg(long, value_name = "FEATURE", conflicts_with = "to_file", value_delimiter = ',', value_parser = values::feature)]
    image_feature: Vec<Features>,
    /// The pool for the image's data. Backups do not tell which one it was
    #[arg(long, value_name = "POOL", conflicts_with = "to_file", value_parser = values::non_empty)]
    data_pool: Option<String>,
    /// Leave out the metadata that the image had
    #[arg(long, conflicts_with = "to_file")]
    no_metadata: bool,
    /// Set a metadata key, whatever it was; may be given several times
    #[arg(long, value_name = "KEY=VALUE", conflicts_with = "to_file", value_parser = values::key_value)]
    metadata: Vec<(String, String)>,
    /// Give up when the cluster leaves a request unanswered for so long
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
}

/// What a file is to be.
#[derive(Debug, Args)]
#[command(next_help_heading = FILE_OPTIONS)]
struct FileArgs {
    /// What kind of file
    #[arg(long, value_name = "FORMAT", default_value = "raw")]
    format: FormatArg,
    /// How clusters of a qcow2 file are stored: none, zlib or zstd (needs QEMU 5.1 to read), with a level
    /// from 1 (fast) to 22 (small) [default: none]
    #[arg(long, value_name = "none|zlib|zstd[:LEVEL]", conflicts_with = "to_rbd", value_parser = values::compression)]
    compression: Option<Compression>,
    /// Cluster size of a qcow2 file: a power of two from 512 to 2M [default: 128K]
    #[arg(long, value_name = "SIZE", conflicts_with = "to_rbd", value_parser = values::cluster_size)]
    cluster_size: Option<u32>,
    /// Do without subclusters in a qcow2 file, so that QEMU older than 5.2 can read it
    #[arg(long, conflicts_with = "to_rbd")]
    no_extended_l2: bool,
}

/// Where a point is restored to.
#[derive(Clone, Copy, Debug)]
pub enum Destination<'a> {
    /// A file.
    File(&'a Path),
    /// Standard output.
    Stdout,
    /// An RBD image, and what the command line calls it.
    Image(&'a ImageSpec),
}

/// The kind of a restored file, as the command line names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FormatArg {
    /// The image itself, byte for byte, with holes where it is zeroes
    Raw,
    /// One qcow2 file that stands alone
    Qcow2,
}

impl RestoreArgs {
    /// Refuses what each option allows, but not together.
    pub(super) fn check(&self, json: bool) -> Result<(), (ErrorKind, &'static str)> {
        let conflict = |text| Err((ErrorKind::ArgumentConflict, text));
        let FileArgs { format, compression, cluster_size, no_extended_l2 } = &self.file;
        let qcow2_only = compression.is_some() || cluster_size.is_some() || *no_extended_l2;
        match (self.destination(), format) {
            (Destination::Image(_), FormatArg::Raw) => Ok(()),
            (Destination::Image(_), FormatArg::Qcow2) => conflict("--format is for `--to-file`"),
            (_, FormatArg::Raw) if qcow2_only => {
                conflict("--compression, --cluster-size and --no-extended-l2 are for `--format qcow2`")
            }
            (Destination::Stdout, FormatArg::Qcow2) => conflict(
                "a qcow2 file cannot be written to standard output: `--to-file -` is for `--format raw`",
            ),
            (Destination::Stdout, _) if json => {
                conflict("--json and `--to-file -` would both write to standard output")
            }
            _ => Ok(()),
        }
    }

    /// Where to.
    pub fn destination(&self) -> Destination<'_> {
        match (&self.to_rbd, &self.to_file) {
            (Some(image), _) => Destination::Image(image),
            (None, Some(path)) if path.as_os_str() != STDOUT => Destination::File(path),
            _ => Destination::Stdout,
        }
    }

    /// What the file is to be.
    pub fn format(&self) -> FileFormat {
        match self.file.format {
            FormatArg::Raw => FileFormat::Raw,
            FormatArg::Qcow2 => {
                let usual = Qcow2Options::default();
                FileFormat::Qcow2(Qcow2Options {
                    compression: self.file.compression.unwrap_or(usual.compression),
                    cluster_size: self.file.cluster_size.unwrap_or(usual.cluster_size),
                    extended_l2: if self.file.no_extended_l2 { ExtendedL2::Off } else { usual.extended_l2 },
                })
            }
        }
    }

    /// The RBD image to be made.
    pub fn image(&self, spec: &ImageSpec, cluster: ClusterOptions) -> ImageTarget {
        let args = &self.image;
        let all =
            |features: &[Features]| features.iter().fold(Features::default(), |all, one| all.with(*one));
        let metadata: BTreeMap<_, _> =
            args.metadata.iter().map(|(key, value)| (key.clone().into(), value.clone().into())).collect();
        ImageTarget {
            cluster,
            pool: spec.pool.pool.clone(),
            namespace: spec.pool.namespace.clone(),
            image: spec.image.clone(),
            overwrite: args.overwrite,
            overrides: Overrides {
                size: args.size,
                object_size: args.object_size,
                stripe_unit: args.stripe_unit,
                stripe_count: args.stripe_count,
                features: (!args.image_feature.is_empty()).then(|| all(&args.image_feature)),
                data_pool: args.data_pool.clone(),
                no_metadata: args.no_metadata,
                metadata,
            },
            patience: Duration::from_secs(args.timeout),
        }
    }

    /// The restore that these arguments ask for.
    pub fn to_restore(&self) -> Restore {
        let mut options = RestoreOptions::default();
        options.parallel = self.parallel.into();
        Restore { dest: self.dest.clone(), image: self.point.image.clone(), point: self.point.point, options }
    }
}

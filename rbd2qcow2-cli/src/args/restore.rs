//! The command line of `restore`.

use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::{Args, ValueEnum};
use rbd2qcow2_core::layer::{Compression, ExtendedL2};
use rbd2qcow2_core::restore::{FileFormat, Qcow2Options, Restore, RestoreOptions};

use super::values::{self, PointSpec};

pub(super) const EXAMPLES: &str = "\
Examples:
  rbd2qcow2 restore /backups vm-1 --to-file vm-1.raw
  rbd2qcow2 restore /backups vm-1@20261122T173312Z --to-file vm-1.qcow2 --format qcow2
  rbd2qcow2 restore /backups vm-1 --to-file vm-1.qcow2 --format qcow2 --compression zstd
  rbd2qcow2 restore /backups vm-1 --to-file - | ssh host 'dd of=/dev/vg/vm-1 bs=1M'

Needs no cluster. Nothing is overwritten: the file is written aside under a hidden name, brought to
stable storage, and gets its name last; only its owner can read it. No backup of the image can run
meanwhile.";

/// What stands for standard output.
const STDOUT: &str = "-";

/// The arguments of `restore`.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// Directory that holds a directory for each image
    #[arg(value_name = "DEST")]
    dest: PathBuf,
    /// The image, and the point as `list` shows it; the newest when none is named
    #[arg(value_name = "IMAGE[@POINT]")]
    point: PointSpec,
    /// The file to make, which must not exist; `-` writes a raw image to standard output
    #[arg(long, value_name = "PATH", required = true)]
    to_file: PathBuf,
    /// What kind of file
    #[arg(long, value_name = "FORMAT", default_value = "raw")]
    format: FormatArg,
    /// How clusters of a qcow2 file are stored: none, zlib or zstd (needs QEMU 5.1 to read), with a level
    /// from 1 (fast) to 22 (small) [default: none]
    #[arg(long, value_name = "none|zlib|zstd[:LEVEL]", value_parser = values::compression)]
    compression: Option<Compression>,
    /// Cluster size of a qcow2 file: a power of two from 512 to 2M [default: 128K]
    #[arg(long, value_name = "SIZE", value_parser = values::cluster_size)]
    cluster_size: Option<u32>,
    /// Do without subclusters in a qcow2 file, so that QEMU older than 5.2 can read it
    #[arg(long)]
    no_extended_l2: bool,
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
        let qcow2_only = self.compression.is_some() || self.cluster_size.is_some() || self.no_extended_l2;
        match self.format {
            FormatArg::Raw if qcow2_only => {
                conflict("--compression, --cluster-size and --no-extended-l2 are for `--format qcow2`")
            }
            FormatArg::Qcow2 if self.file().is_none() => conflict(
                "a qcow2 file cannot be written to standard output: `--to-file -` is for `--format raw`",
            ),
            _ if json && self.file().is_none() => {
                conflict("--json and `--to-file -` would both write to standard output")
            }
            _ => Ok(()),
        }
    }

    /// The file to make; `None` for standard output.
    pub fn file(&self) -> Option<&Path> {
        (self.to_file.as_os_str() != STDOUT).then_some(self.to_file.as_path())
    }

    /// What the file is to be.
    pub fn format(&self) -> FileFormat {
        match self.format {
            FormatArg::Raw => FileFormat::Raw,
            FormatArg::Qcow2 => {
                let usual = Qcow2Options::default();
                FileFormat::Qcow2(Qcow2Options {
                    compression: self.compression.unwrap_or(usual.compression),
                    cluster_size: self.cluster_size.unwrap_or(usual.cluster_size),
                    extended_l2: if self.no_extended_l2 { ExtendedL2::Off } else { usual.extended_l2 },
                })
            }
        }
    }

    /// The restore that these arguments ask for.
    pub fn to_restore(&self) -> Restore {
        Restore {
            dest: self.dest.clone(),
            image: self.point.image.clone(),
            point: self.point.point,
            options: RestoreOptions::default(),
        }
    }
}

//! The command line: its options, and what they mean to the library.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use rbd2qcow2_core::layer::{Compression, ExtendedL2};
use rbd2qcow2_core::options::{BackupOptions, BaseGone, DiffMode, Writer};
use rbd2qcow2_core::pool::PoolBackup;
use rbd2qcow2_core::rbd::ClusterOptions;

mod prune;
mod restore;
mod serve;
mod values;

pub use prune::{HoldArgs, PruneArgs, ReleaseArgs};
pub use restore::{Destination, RestoreArgs};
pub use serve::ServeArgs;
use values::PoolSpec;

#[cfg(test)]
mod tests;

const EXIT_STATUS: &str = "\
Exit status:
  0    all done
  1    at least one image failed (the others were still done), or the program could not
       begin or could not write its output
  2    wrong usage
  130  interrupted by SIGINT, SIGTERM or SIGHUP; what was under way is removed, nothing else
       is touched. A second SIGINT or SIGTERM ends the program at once.";

const EXAMPLES: &str = "\
Examples:
  rbd2qcow2 backup rbd /backups              all images of the pool `rbd`
  rbd2qcow2 --id backup backup rbd/tenant1 /backups vm-1 vm-2
  rbd2qcow2 list /backups
  rbd2qcow2 restore /backups vm-1 --to-rbd rbd/vm-1-restored
  rbd2qcow2 serve /backups vm-1              the newest point, as a disk for QEMU
  rbd2qcow2 prune /backups --keep-daily 14 --keep-weekly 8 --dry-run
  qemu-img info --backing-chain /backups/vm-1/vm-1@20261122T173312Z.qcow2";

const BACKUP_EXAMPLES: &str = "\
Examples:
  rbd2qcow2 backup rbd /backups                       all images of the pool `rbd`
  rbd2qcow2 backup rbd/tenant1 /backups vm-1 vm-2     two images of a namespace
  rbd2qcow2 backup rbd /backups --exclude 'tmp-*' --rate-limit 200M
  rbd2qcow2 backup rbd /backups --dry-run             what would be done, and how much
  rbd2qcow2 backup rbd /backups --json -q             a report for programs

An image whose metadata has the key `backup-skip` is skipped.";

const LIST_EXAMPLES: &str = "\
Examples:
  rbd2qcow2 list /backups
  rbd2qcow2 list /backups vm-1 --json

For each image a tree of its points, the oldest first: what stands below another in the same column
builds upon it, and only where several build upon one do they move to the right. NEEDED BY is how
many points would be lost with this one. An arrow tells that the image had grown or shrunk.

Needs no cluster. Whatever is not as it should be (damage, files left over, chains that are not
continued) is a warning on standard error and does not change the exit status; the points that can
still be made out are listed. A file that may not be read does: 1.";

const VERIFY_EXAMPLES: &str = "\
Examples:
  rbd2qcow2 verify /backups                             all points of all images
  rbd2qcow2 verify /backups vm-1 db@20261122T173312Z    an image, and a single point
  rbd2qcow2 verify /backups --sample 5                  a daily look: 5 % of the data, others each time
  rbd2qcow2 verify /backups --source                    the newest points against their snapshots, too

Looks at the files' links, the structure of each qcow2 file, and all data against their BLAKE3
digests. A damaged range is traced to each point that shows it. Points of the Python rbd2qcow2 have
no digests: of them only the structure is known, and they are `unverifiable`. So is every point that
builds upon them, or took over their data when they were pruned. Needs no cluster.

A point is `suspect` when its files are as they were written, but a later backup found it, or one above
it, to lack a change; such points read as well as ever, and may be wrong in places. With --source a
point that is the same as its snapshot is `ok`.

With --source points are also compared with the RBD snapshots that they were taken from, bit for bit:
the proof that the backups lack nothing. Usually only the newest point of an image still has one.
The exit status is 1 when anything is damaged or suspect, or when there was nothing to verify.";

/// Back up Ceph RBD images into chains of qcow2 files.
///
/// Each backup of an image is one qcow2 file whose backing file is the backup before it: at once a
/// restore point that QEMU boots and the difference to its predecessor.
#[derive(Debug, Parser)]
#[command(name = "rbd2qcow2", version, after_help = format!("{EXAMPLES}\n\n{EXIT_STATUS}"))]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// How to reach the cluster.
    #[command(flatten)]
    cluster: ClusterArgs,
    /// What to tell.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// What the program can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Back up images of a pool
    #[command(after_help = format!("{BACKUP_EXAMPLES}\n\n{EXIT_STATUS}"))]
    Backup(BackupArgs),
    /// List the backups in a directory
    #[command(after_help = format!("{LIST_EXAMPLES}\n\n{EXIT_STATUS}"))]
    List(ListArgs),
    /// Check that backups hold what was backed up
    #[command(after_help = format!("{VERIFY_EXAMPLES}\n\n{EXIT_STATUS}"))]
    Verify(VerifyArgs),
    /// Restore a point to an RBD image or a file
    #[command(after_help = format!("{}\n\n{EXIT_STATUS}", restore::EXAMPLES))]
    Restore(RestoreArgs),
    /// Serve a point as a disk, over NBD
    #[command(after_help = format!("{}\n\n{EXIT_STATUS}", serve::EXAMPLES))]
    Serve(ServeArgs),
    /// Remove points that no rule keeps, or that are named
    #[command(after_help = format!("{}\n\n{EXIT_STATUS}", prune::PRUNE_EXAMPLES))]
    Prune(PruneArgs),
    /// Hold a point, so that it is not pruned
    #[command(after_help = format!("{}\n\n{EXIT_STATUS}", prune::HOLD_EXAMPLES))]
    Hold(HoldArgs),
    /// Release a point that is held
    #[command(after_help = format!("{}\n\n{EXIT_STATUS}", prune::HOLD_EXAMPLES))]
    Release(ReleaseArgs),
}

/// How to reach the cluster: the options of `rbd`.
#[derive(Debug, Args)]
#[command(next_help_heading = "Cluster options (as in `rbd`)")]
struct ClusterArgs {
    /// Ceph's configuration file [default: as in `rbd`: CEPH_CONF, /etc/ceph/ceph.conf, ...]
    #[arg(short, long, value_name = "FILE", global = true)]
    conf: Option<PathBuf>,
    /// The client's name without its type: `--id admin` is `--name client.admin`
    #[arg(long, value_name = "ID", global = true, value_parser = values::non_empty)]
    id: Option<String>,
    /// The client's full name
    #[arg(short, long, value_name = "NAME", global = true, value_parser = values::entity)]
    name: Option<String>,
    /// The client's keyring
    #[arg(short, long, value_name = "FILE", global = true)]
    keyring: Option<PathBuf>,
    /// The monitors' addresses
    #[arg(short, long, value_name = "HOSTS", global = true, value_parser = values::non_empty)]
    mon_host: Option<String>,
}

/// What to tell, and how.
#[derive(Debug, Args)]
#[command(next_help_heading = "Output options")]
pub struct OutputArgs {
    /// Print JSON Lines on standard output, and nothing else there
    #[arg(long, global = true)]
    pub json: bool,
    /// Tell more, the stages of each image and their rates for instance; twice for traces. The
    /// environment's RUST_LOG chooses the log messages in detail
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Tell only warnings and errors, and show no progress
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// When to show progress bars on standard error
    #[arg(long, value_name = "WHEN", global = true, default_value = "auto")]
    pub progress: ProgressWhen,
}

/// When to show progress bars.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ProgressWhen {
    /// On a terminal
    Auto,
    /// Even where standard error is no terminal
    Always,
    /// Not at all
    Never,
}

/// The arguments of `backup`.
#[derive(Debug, Args)]
pub struct BackupArgs {
    /// The pool, and the RBD namespace within it
    #[arg(value_name = "POOL[/NAMESPACE]")]
    pool: PoolSpec,
    /// Existing directory that holds a directory for each image
    #[arg(value_name = "DEST")]
    dest: PathBuf,
    /// Images to back up; all of the pool when none is named
    #[arg(value_name = "IMAGE", value_parser = values::non_empty)]
    images: Vec<String>,
    /// Leave out images whose name matches; may be given several times
    #[arg(long, value_name = "GLOB")]
    exclude: Vec<String>,
    /// Images that are copied at once. With more than 1, the snapshots of up to three times as many are
    /// taken or removed meanwhile, since the cluster takes its time for that. All share one budget of
    /// memory for what is read; each file that is being written takes up to 32 MiB besides
    #[arg(short, long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
    jobs: u16,
    /// Reads in flight for each image
    #[arg(short, long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=256))]
    parallel: u16,
    /// What writes the qcow2 files
    #[arg(long, value_name = "WRITER", default_value = "native")]
    writer: WriterArg,
    /// How clusters are stored: none, zlib or zstd (needs QEMU 5.1 to read). With the native writer,
    /// zstd has levels from 1 (fast) to 22 (small), 2 unless told. What does not get smaller is stored
    /// as it is
    #[arg(long, value_name = "none|zlib|zstd[:LEVEL]", default_value = "none", value_parser = values::compression)]
    compression: Compression,
    /// Cluster size of new files: a power of two from 512 to 2M. Small ones do not go with large images:
    /// 512 bytes with 128 GiB at most, 4K with 8 TiB [default: 128K]
    #[arg(long, value_name = "SIZE", value_parser = values::cluster_size)]
    cluster_size: Option<u32>,
    /// Do without subclusters, so that QEMU older than 5.2 can read the files. Small scattered changes
    /// then take a whole cluster each
    #[arg(long)]
    no_extended_l2: bool,
    /// How changes are found
    #[arg(long, value_name = "MODE", default_value = "exact")]
    diff: DiffArg,
    /// Pages of 4 KiB that an incremental backup reads where nothing is reported to have changed, others
    /// each time, and compares with the chain: where one differs, no backup is made, and the next one
    /// compares the whole image; 0 for none
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    prove: u32,
    /// What to do where the snapshot of the last backup is gone from the cluster, or was made again
    #[arg(long, value_name = "ACTION", default_value = "full")]
    when_base_is_gone: BaseGoneArg,
    /// Make a full backup even where an incremental one is possible
    #[arg(long)]
    full: bool,
    /// Newest snapshots of the backups to keep in the cluster; the last is the next backup's base. Of an image
    /// without exclusive-lock one more stays
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    keep_snapshots: u16,
    /// Read at most so many bytes a second from the cluster, over all images; K, M, G, T are powers
    /// of 1024
    #[arg(long, value_name = "BYTES/s", value_parser = values::bytes)]
    rate_limit: Option<u64>,
    /// Say what would be done and how much, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Give an image up when the cluster leaves a request unanswered for so long
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    /// The program `qemu-img`, for the writer qemu-nbd
    #[arg(long, value_name = "PATH", default_value = "qemu-img", env = "RBD2QCOW2_QEMU_IMG")]
    qemu_img: PathBuf,
    /// The program `qemu-nbd`, for the writer of this name
    #[arg(long, value_name = "PATH", default_value = "qemu-nbd", env = "RBD2QCOW2_QEMU_NBD")]
    qemu_nbd: PathBuf,
}

/// What writes the layers, as the command line names it.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum WriterArg {
    /// This program itself
    Native,
    /// A qemu-nbd process for each file; compresses with QEMU's level, on four processors at most
    QemuNbd,
}

/// How changes are found, as the command line names it.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum DiffArg {
    /// Compare every object that exists in one of the two snapshots; never misses a change. Without
    /// valid object maps the same as scan
    Exact,
    /// Compare every object, without object maps; never misses a change
    Scan,
    /// Believe the object maps. MISSES CHANGES after a rollback to a snapshot, after an image was
    /// shrunk and grown again, and wherever a client wrote a wrong object map
    Fast,
    /// Believe nothing: read the whole image, compare it with the chain, and store what differs. Needs no
    /// snapshot of the last backup; reads as much as a full backup
    Compare,
}

/// What to do without the base snapshot, as the command line names it.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum BaseGoneArg {
    /// Begin a new chain with a full backup
    Full,
    /// Compare the whole image with the newest backup, store what differs, and go on with the chain
    Compare,
}

/// The arguments of `list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Directory that holds a directory for each image
    #[arg(value_name = "DEST")]
    pub dest: PathBuf,
    /// Images to list; all when none is named
    #[arg(value_name = "IMAGE", value_parser = values::non_empty)]
    pub images: Vec<String>,
}

/// The arguments of `verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Directory that holds a directory for each image
    #[arg(value_name = "DEST")]
    pub dest: PathBuf,
    /// Images or single points to verify; all when none is named
    #[arg(value_name = "IMAGE[@POINT]", value_parser = values::non_empty)]
    pub points: Vec<String>,
    /// Hold only so much of the data against their digests, chosen anew each time; the links and the
    /// structure are always looked at in full
    #[arg(long, value_name = "PERCENT", value_parser = values::percent)]
    pub sample: Option<f64>,
    /// Compare points with the RBD snapshots that they were taken from, bit for bit, where those are
    /// still there
    #[arg(long)]
    pub source: bool,
    /// Reads from the cluster in flight
    #[arg(short, long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub parallel: u16,
    /// Give up when the cluster leaves a request unanswered for so long
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout: u64,
}

impl Cli {
    /// Parses the arguments (the first is the program's name) and checks them against each other.
    ///
    /// # Errors
    /// Wrong usage, and also a call for help or the version: `exit_code` tells them apart.
    pub fn from_args(args: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let cli = Self::try_parse_from(args)?;
        cli.check().map_err(|(kind, text)| Self::command().error(kind, text))?;
        Ok(cli)
    }

    /// What clap cannot check: it looks for conflicts only among options on the same side of the
    /// subcommand, and these may stand on both.
    fn check(&self) -> Result<(), (ErrorKind, &'static str)> {
        if self.cluster.id.is_some() && self.cluster.name.is_some() {
            return Err((ErrorKind::ArgumentConflict, "--id and --name cannot be used together"));
        }
        if self.output.quiet && self.output.verbose > 0 {
            return Err((ErrorKind::ArgumentConflict, "--quiet and --verbose cannot be used together"));
        }
        match &self.command {
            Command::Backup(args) => args.check(),
            Command::List(_)
            | Command::Verify(_)
            | Command::Serve(_)
            | Command::Hold(_)
            | Command::Release(_) => Ok(()),
            Command::Prune(args) => args.check(),
            Command::Restore(args) => args.check(self.output.json),
        }
    }

    /// How to reach the cluster, for the library.
    pub fn cluster(&self) -> ClusterOptions {
        let args = &self.cluster;
        let mut options = ClusterOptions::default();
        options.conf.clone_from(&args.conf);
        options.name = args.name.clone().or_else(|| args.id.as_ref().map(|id| format!("client.{id}")));
        options.keyring.clone_from(&args.keyring);
        options.mon_host.clone_from(&args.mon_host);
        options
    }
}

impl BackupArgs {
    /// Refuses what each option allows, but not together.
    fn check(&self) -> Result<(), (ErrorKind, &'static str)> {
        match (self.writer, self.compression) {
            (WriterArg::QemuNbd, Compression::Zstd { level: Some(_) }) => Err((
                ErrorKind::ArgumentConflict,
                "the writer qemu-nbd cannot set a level of compression: say `--compression zstd`",
            )),
            _ => Ok(()),
        }
    }

    /// The run that these arguments ask for.
    pub fn to_run(&self, cluster: ClusterOptions) -> PoolBackup {
        PoolBackup {
            cluster,
            pool: self.pool.pool.clone(),
            namespace: self.pool.namespace.clone(),
            dest: self.dest.clone(),
            images: self.images.clone(),
            exclude: self.exclude.clone(),
            jobs: self.jobs.into(),
            options: self.options(),
        }
    }

    /// How each image is backed up.
    fn options(&self) -> BackupOptions {
        let mut options = BackupOptions::default();
        options.parallel = self.parallel.into();
        options.writer = match self.writer {
            WriterArg::Native => Writer::Native,
            WriterArg::QemuNbd => Writer::QemuNbd,
        };
        options.compression = self.compression;
        options.cluster_size = self.cluster_size;
        options.extended_l2 = if self.no_extended_l2 { ExtendedL2::Off } else { ExtendedL2::Auto };
        options.diff = match self.diff {
            DiffArg::Exact => DiffMode::Exact,
            DiffArg::Scan => DiffMode::Scan,
            DiffArg::Fast => DiffMode::Fast,
            DiffArg::Compare => DiffMode::Compare,
        };
        options.when_base_is_gone = match self.when_base_is_gone {
            BaseGoneArg::Full => BaseGone::Full,
            BaseGoneArg::Compare => BaseGone::Compare,
        };
        options.prove = usize::try_from(self.prove).unwrap_or(usize::MAX);
        options.full = self.full;
        options.keep_snapshots = self.keep_snapshots.into();
        options.rate_limit = self.rate_limit;
        options.dry_run = self.dry_run;
        options.patience = Duration::from_secs(self.timeout);
        options.qemu_img.clone_from(&self.qemu_img);
        options.qemu_nbd.clone_from(&self.qemu_nbd);
        options
    }
}

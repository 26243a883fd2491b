//! The programs `qemu-img` and `qemu-nbd`.

use std::ffi::OsStr;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use super::QemuNbdError;
use super::server::Aio;
use crate::layer::{Compression, LayerSpec};

/// The option of `qemu-img create` that tells a QEMU of 5.2 or later, and with it everything else
/// that is needed: structured replies, socket activation, zstd.
const NEEDED_FEATURE: &str = "extended_l2";

/// Where the programs are, and what is known of them. Clones share what was found out, so that it
/// is found out once.
#[derive(Clone, Debug)]
pub struct QemuTools(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    qemu_img: PathBuf,
    qemu_nbd: PathBuf,
    /// Set once the programs were found to be usable.
    probed: OnceLock<()>,
    /// The kind of asynchronous I/O that has worked with O_DIRECT.
    direct_aio: OnceLock<Aio>,
}

impl Default for QemuTools {
    /// `qemu-img` and `qemu-nbd` from `PATH`.
    fn default() -> Self {
        Self::new("qemu-img", "qemu-nbd")
    }
}

impl QemuTools {
    /// The programs at these paths, relative to this process's directory; names without a slash are looked for in `PATH`. They should be
    /// of one version. Runs nothing.
    pub fn new(qemu_img: impl Into<PathBuf>, qemu_nbd: impl Into<PathBuf>) -> Self {
        Self(Arc::new(Inner {
            qemu_img: qemu_img.into(),
            qemu_nbd: qemu_nbd.into(),
            probed: OnceLock::new(),
            direct_aio: OnceLock::new(),
        }))
    }

    /// The path of `qemu-img`.
    #[must_use]
    pub fn qemu_img(&self) -> &Path {
        &self.0.qemu_img
    }

    /// The path of `qemu-nbd`.
    #[must_use]
    pub fn qemu_nbd(&self) -> &Path {
        &self.0.qemu_nbd
    }

    /// Checks that the programs are there and new enough. Blocks while it runs them, the first time.
    ///
    /// # Errors
    /// [`QemuNbdError::NotFound`], [`QemuNbdError::Run`], [`QemuNbdError::Failed`] and
    /// [`QemuNbdError::TooOld`].
    pub fn probe(&self) -> Result<(), QemuNbdError> {
        if self.0.probed.get().is_some() {
            return Ok(());
        }
        let help = run(self.qemu_img(), ["create", "-f", "qcow2", "-o", "help"])?;
        if !String::from_utf8_lossy(&help.stdout).contains(NEEDED_FEATURE) {
            return Err(QemuNbdError::TooOld {
                program: self.qemu_img().to_owned(),
                feature: NEEDED_FEATURE,
            });
        }
        run(self.qemu_nbd(), ["--version"])?;
        // Somebody else may have found out the same meanwhile.
        let _ = self.0.probed.set(());
        Ok(())
    }

    /// Makes a qcow2 image of `spec` in the existing file `path`, with the virtual size `size`.
    pub(super) fn create(
        &self,
        path: &Path,
        spec: &LayerSpec,
        extended_l2: bool,
        size: u64,
    ) -> Result<(), QemuNbdError> {
        let mut options = format!("cluster_size={}", spec.cluster_size);
        if extended_l2 {
            options += ",extended_l2=on";
        }
        options += match spec.compression {
            Compression::None | Compression::Zlib => ",compression_type=zlib",
            Compression::Zstd { .. } => ",compression_type=zstd",
        };
        let size = size.to_string();
        let mut arguments: Vec<&OsStr> =
            ["create", "-q", "-f", "qcow2", "-o", &options].map(OsStr::new).into();
        if let Some(backing) = &spec.backing {
            // -u: the backing file is not opened. Its format is given, as probing it would let a
            // guest choose.
            arguments.extend(["-u", "-F", "qcow2", "-b", backing].map(OsStr::new));
        }
        arguments.extend([OsStr::new("--"), path.as_os_str(), OsStr::new(&size)]);
        run(self.qemu_img(), arguments).map(|_| ())
    }

    pub(super) fn direct_aio(&self) -> Option<Aio> {
        self.0.direct_aio.get().copied()
    }

    pub(super) fn remember_direct_aio(&self, aio: Aio) {
        let _ = self.0.direct_aio.set(aio);
    }
}

/// How long qemu-img may take, which only makes an empty file; a destination that hangs hangs it.
const RUN_LIMIT: Duration = Duration::from_secs(60);

/// How often it is looked at whether a program has ended.
const POLL: Duration = Duration::from_millis(2);

/// Runs a program to its end, without a shell and without input. Its output must be short: nobody
/// reads it before that end.
fn run<A: AsRef<OsStr>>(
    program: &Path,
    arguments: impl IntoIterator<Item = A>,
) -> Result<Output, QemuNbdError> {
    run_within(RUN_LIMIT, program, arguments)
}

fn run_within<A: AsRef<OsStr>>(
    limit: Duration,
    program: &Path,
    arguments: impl IntoIterator<Item = A>,
) -> Result<Output, QemuNbdError> {
    let start_error = |e: std::io::Error| match e.kind() {
        ErrorKind::NotFound => QemuNbdError::NotFound { program: program.to_owned() },
        _ => run_error(program, e),
    };
    let mut command = Command::new(program);
    command.args(arguments).env("LC_ALL", "C");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(start_error)?;
    let start = Instant::now();
    while child.try_wait().map_err(|e| run_error(program, e))?.is_none() {
        if start.elapsed() >= limit {
            // Not waited for: one that hangs in the kernel does not die before the kernel lets it.
            let _ = child.kill();
            return Err(QemuNbdError::Hung { program: program.to_owned(), limit });
        }
        thread::sleep(POLL);
    }
    let output = child.wait_with_output().map_err(|e| run_error(program, e))?;
    if output.status.success() {
        return Ok(output);
    }
    let stderr = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
    Err(QemuNbdError::Failed { program: program.to_owned(), status: output.status.to_string(), stderr })
}

fn run_error(program: &Path, error: std::io::Error) -> QemuNbdError {
    QemuNbdError::Run { program: program.to_owned(), source: Arc::new(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_hangs_is_given_up() {
        let error = run_within(Duration::from_millis(50), Path::new("sleep"), ["1000"]).unwrap_err();
        assert!(error.to_string().starts_with("sleep did not end within 0.05 s"), "{error}");
        let output = run_within(RUN_LIMIT, Path::new("echo"), ["words"]).unwrap();
        assert_eq!(output.stdout, b"words\n");
    }
}

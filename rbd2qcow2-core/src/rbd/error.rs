//! What librados and librbd can answer instead of success.

use std::ffi::c_int;
use std::time::Duration;

use rustix::io::Errno;

/// Why librados or librbd could not do something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RbdError {
    /// The library reported an error.
    #[error("cannot {what}: {}", describe(*errno))]
    Failed {
        /// What was asked for, with the names of what it was asked of.
        what: String,
        /// The system's error number.
        errno: Errno,
    },
    /// The client's key was not found.
    #[error(
        "cannot connect to the cluster: no keyring with a key of {client} was found (searched: {searched})"
    )]
    NoKeyring {
        /// The client's full name.
        client: String,
        /// The files that were searched.
        searched: String,
    },
    /// The configuration names no monitors.
    #[error(
        "cannot connect to the cluster: no monitors are configured (`mon host` in ceph.conf, or --mon-host)"
    )]
    NoMonitors,
    /// The library did not come back. Its handle was abandoned.
    #[error("cannot {what}: the cluster gave no answer for {} s (are its monitors and OSDs up?)", waited.as_secs())]
    NoAnswer {
        /// What was asked for.
        what: String,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The run was asked to stop while the library was at work.
    #[error("interrupted")]
    Cancelled,
    /// Fewer bytes were read than asked for.
    #[error("cannot {what}: only {got} bytes came")]
    ShortRead {
        /// What was asked for.
        what: String,
        /// How many bytes came.
        got: usize,
    },
    /// A name that C cannot take.
    #[error("cannot {what}: a name must not hold a NUL byte")]
    NulByte {
        /// What was asked for.
        what: String,
    },
    /// The library answered with text that is not UTF-8.
    #[error("cannot {what}: the answer is not valid UTF-8")]
    NotUtf8 {
        /// What was asked for.
        what: String,
    },
    /// The library answered with something that has not the form it should have.
    #[error("cannot {what}: the answer has an unknown form")]
    NotUnderstood {
        /// What was asked for.
        what: String,
    },
    /// The loaded librbd is too old.
    #[error("cannot {what}: the librbd on this machine is too old, {since} or later is needed")]
    TooOld {
        /// What was asked for.
        what: String,
        /// The first release that can do it.
        since: &'static str,
    },
    /// No thread could be started for the call.
    #[error("cannot {what}: no thread can be started")]
    Thread {
        /// What was asked for.
        what: String,
        /// Why.
        #[source]
        cause: std::io::Error,
    },
}

impl RbdError {
    /// The error for a negative return value of the C libraries.
    pub(super) fn failed(what: impl Into<String>, code: c_int) -> Self {
        Self::Failed { what: what.into(), errno: Errno::from_raw_os_error(code.wrapping_neg()) }
    }

    /// Whether what was asked for does not exist.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Failed { errno: Errno::NOENT, .. })
    }

    /// Whether what was to be made exists already.
    #[must_use]
    pub fn is_already_there(&self) -> bool {
        matches!(self, Self::Failed { errno: Errno::EXIST, .. })
    }

    /// Whether librbd or the cluster does not know a feature of the image that was to be created.
    #[must_use]
    pub(crate) fn is_unknown_feature(&self) -> bool {
        matches!(self, Self::Failed { errno: Errno::NOSYS, .. })
    }
}

/// What an error number means where it comes from Ceph, in the words of whoever has to mend it.
fn describe(errno: Errno) -> String {
    let meaning = match errno {
        Errno::NOENT => "it does not exist",
        Errno::ACCESS | Errno::PERM => {
            "permission denied (check the client's name, keyring and capabilities)"
        }
        Errno::TIMEDOUT => "timed out (are the monitors reachable?)",
        Errno::ROFS => "read-only (another client holds the image's exclusive lock)",
        Errno::BUSY => "busy (in use by another client, or protected)",
        Errno::EXIST => "it exists already",
        Errno::DQUOT => "the quota is used up",
        Errno::NOSPC => "no space is left",
        Errno::SHUTDOWN => "this client was blocklisted by the cluster",
        _ => return std::io::Error::from(errno).to_string(),
    };
    format!("{meaning} (errno {})", errno.raw_os_error())
}

/// The value of a C call, or the error that a negative one stands for.
pub(super) fn check(code: c_int, what: impl FnOnce() -> String) -> Result<c_int, RbdError> {
    if code < 0 { Err(RbdError::failed(what(), code)) } else { Ok(code) }
}

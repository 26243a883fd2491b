//! How many files this process may have open at once, and what it means that there are too many.

use std::error::Error;
use std::fmt;
use std::fs;
use std::io;

#[cfg(feature = "rbd")]
use crate::rbd::RbdError;
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

/// Descriptors that no layer gets: for connections to the cluster, for threads, and for what is written.
const RESERVE: usize = 128;

/// Files of a chain that are open at once, at least.
const LEAST: usize = 8;

/// No more files can be opened, neither by a program nor by the library that it uses. Says nothing of the file
/// that was to be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shortage {
    /// The process has as many open as it may.
    Process {
        /// How many that is; `None` for no limit.
        limit: Option<u64>,
    },
    /// The system has.
    System,
}

impl Shortage {
    /// The shortage that an error is due to, by itself or by any of its causes.
    #[must_use]
    pub fn of(error: &(dyn Error + 'static)) -> Option<Self> {
        std::iter::successors(Some(error), |&error| error.source()).find_map(Self::told_by)
    }

    /// As [`of`](Self::of), where the text of the error and its causes does not say what to do about it:
    /// to be told along with them.
    #[must_use]
    pub fn untold(error: &(dyn Error + 'static)) -> Option<Self> {
        let mut causes = std::iter::successors(Some(error), |&error| error.source());
        if causes.any(|cause| cause.is::<Self>()) { None } else { Self::of(error) }
    }

    fn told_by(error: &(dyn Error + 'static)) -> Option<Self> {
        if let Some(shortage) = error.downcast_ref() {
            return Some(*shortage);
        }
        #[cfg(feature = "rbd")]
        if let Some(RbdError::Failed { errno, .. }) = error.downcast_ref() {
            return Self::of_number(*errno);
        }
        error.downcast_ref().and_then(Self::of_io)
    }

    /// The shortage that the system tells of.
    pub(crate) fn of_io(error: &io::Error) -> Option<Self> {
        Self::of_number(Errno::from_io_error(error)?)
    }

    fn of_number(errno: Errno) -> Option<Self> {
        match errno {
            Errno::MFILE => Some(Self::process()),
            Errno::NFILE => Some(Self::System),
            _ => None,
        }
    }

    /// That of this process, as things are.
    fn process() -> Self {
        Self::Process { limit: getrlimit(Resource::Nofile).current }
    }
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { limit: Some(limit) } => write!(
                f,
                "too many open files: this process may have {limit}; raise that limit (`ulimit -n`, or \
                 `LimitNOFILE=` in a unit of systemd)"
            ),
            Self::Process { limit: None } => f.write_str("too many open files"),
            Self::System => f.write_str(
                "too many open files: all processes of this system have as many as it allows (`sysctl fs.file-max`)",
            ),
        }
    }
}

impl Error for Shortage {}

/// How many files of a chain may be kept open: half of what this process may open, but for a reserve. So several
/// chains, opened one after the other, leave something for each other. At least 8.
pub(crate) fn room() -> usize {
    free().saturating_sub(RESERVE).div_euclid(2).max(LEAST)
}

/// How many more files this process may open now.
pub(crate) fn free() -> usize {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    match fs::read_dir("/proc/self/fd") {
        // The directory itself is among them.
        Ok(open) => limit.saturating_sub(open.count().saturating_sub(1)),
        Err(error) if Shortage::of_io(&error).is_some() => 0,
        // Nobody can tell: those of a program that has just begun.
        Err(_) => limit.saturating_sub(RESERVE),
    }
}

/// Whether `needed` more files can be opened.
///
/// # Errors
/// [`Shortage`] where they cannot.
#[cfg(feature = "rbd")]
pub(crate) fn expect(needed: usize) -> Result<(), Shortage> {
    if free() >= needed { Ok(()) } else { Err(Shortage::process()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::ChainError;
    use crate::error::Causes;
    use std::path::Path;

    #[test]
    fn a_shortage_is_found_among_the_causes_and_told_once() {
        let error = |errno: Errno| ChainError::io("open", Path::new("/b/vm/x"))(errno);
        assert!(matches!(Shortage::of(&error(Errno::MFILE)), Some(Shortage::Process { limit: Some(_) })));
        assert_eq!(Shortage::of(&error(Errno::NFILE)), Some(Shortage::System));
        assert_eq!(Shortage::of(&error(Errno::NOENT)), None);
        let text = Causes(&error(Errno::MFILE)).to_string();
        assert_eq!(text.matches("ulimit -n").count(), 1, "{text}");
        let shortage = Shortage::process();
        assert_eq!((Shortage::of(&shortage), Shortage::untold(&shortage)), (Some(shortage), None));
        assert_eq!(Causes(&shortage).to_string().matches("ulimit -n").count(), 1);
    }

    #[test]
    #[cfg(feature = "rbd")]
    fn librados_may_be_short_of_files_too() {
        let error = RbdError::Failed { what: "connect".into(), errno: Errno::MFILE };
        assert!(Shortage::of(&error).is_some());
        let error = RbdError::Failed { what: "connect".into(), errno: Errno::IO };
        assert!(Shortage::of(&error).is_none());
    }

    #[test]
    fn what_is_open_is_not_free() {
        // Other tests open and close files meanwhile.
        let limit =
            getrlimit(Resource::Nofile).current.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap());
        assert!(free() < limit);
        assert!(room() >= LEAST && room() <= limit / 2);
    }
}

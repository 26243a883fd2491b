//! What the system grants this process.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Lets this process, and what it starts, have as many files open as it may at all: the soft limit, usually 1024,
/// is meant for programs that cannot deal with more (`select`). Where that fails, the old limit stays.
pub fn raise_open_files() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current == maximum {
        return;
    }
    match setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        Ok(()) => log::debug!("files that may be open: {}, raised from {}", told(maximum), told(current)),
        Err(error) => log::debug!("cannot raise the limit of open files from {}: {error}", told(current)),
    }
}

fn told(limit: Option<u64>) -> String {
    limit.map_or("any number".to_owned(), |limit| limit.to_string())
}

//! Signals that stop a command.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rbd2qcow2_core::cancel::Cancel;
use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;

use crate::outcome::Outcome;

/// A flag that SIGINT and SIGTERM set. The second signal ends the process at once.
///
/// # Errors
/// A handler could not be set up.
pub fn stop() -> io::Result<Cancel> {
    handle(false)
}

/// As [`stop`] for a command that leaves nothing behind, and that nobody may be waiting for at the other
/// end of a pipe: the first signal ends the process at once.
///
/// # Errors
/// A handler could not be set up.
pub fn end() -> io::Result<Cancel> {
    handle(true)
}

fn handle(at_once: bool) -> io::Result<Cancel> {
    let flag = Arc::new(AtomicBool::new(false));
    // Whether a signal ends the process.
    let armed = if at_once { Arc::new(AtomicBool::new(true)) } else { Arc::clone(&flag) };
    for signal in [SIGINT, SIGTERM] {
        // In this order: actions run as registered, and the first signal must find the flag unset.
        flag::register_conditional_shutdown(signal, Outcome::Interrupted.status(), Arc::clone(&armed))?;
        flag::register(signal, Arc::clone(&flag))?;
    }
    // Where there is a limit on the size of files, the write that meets it shall fail, not end the
    // process; and a file that stays below may be made longer than that for a while.
    flag::register(SIGXFSZ, Arc::default())?;
    Ok(Cancel::from_flag(flag))
}

//! Signals that stop a command.

use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rbd2qcow2_core::cancel::Cancel;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;

use crate::outcome::Outcome;

/// A flag that SIGINT, SIGTERM and SIGHUP set. The second signal ends the process at once, unless it is a
/// SIGHUP: a terminal that is closed may send several. Where SIGHUP is ignored, as under nohup, it stays so.
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
    // Of a command that ends at once, the system's own way with it is as good.
    if !at_once && !is_hangup_ignored() {
        flag::register(SIGHUP, Arc::clone(&flag))?;
    }
    // Where there is a limit on the size of files, the write that meets it shall fail, not end the
    // process; and a file that stays below may be made longer than that for a while.
    flag::register(SIGXFSZ, Arc::default())?;
    Ok(Cancel::from_flag(flag))
}

/// Whether SIGHUP is ignored, or that cannot be known.
fn is_hangup_ignored() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    // A mask in hexadecimal, whose lowest bit is signal 1.
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    ignored.is_none_or(|mask| mask & (1 << (SIGHUP - 1)) != 0)
}

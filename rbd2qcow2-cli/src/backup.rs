//! `backup`: backs images of a pool up.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use rbd2qcow2_core::cancel::Cancel;
use rbd2qcow2_core::rbd::ClusterOptions;
use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;

use crate::args::{BackupArgs, OutputArgs};
use crate::console::Console;
use crate::outcome::{CommandError, Outcome};
use crate::report::Reporter;

/// Backs images up until all are done or a signal comes.
///
/// # Errors
/// No image could be looked at, or standard output failed; images that failed are no error here.
pub fn run(
    args: &BackupArgs,
    cluster: ClusterOptions,
    output: &OutputArgs,
    console: &Console,
) -> Result<Outcome, CommandError> {
    let cancel = stop_on_signals().map_err(CommandError::Signals)?;
    let run = args.to_run(cluster);
    let reporter = Reporter::new(console, output, run.options.dry_run);
    let start = Instant::now();
    let reports = std::thread::scope(|scope| {
        let _ticker = reporter.start_ticker(scope).map_err(CommandError::Threads)?;
        run.run(&reporter, &cancel).map_err(CommandError::Pool)
    });
    let reports = match reports {
        // What could not be opened because of the signal is no error.
        Err(CommandError::Pool(error)) if cancel.is_set() => {
            log::debug!("stopped while opening the pool: {error}");
            console.line("interrupted");
            return Ok(Outcome::Interrupted);
        }
        reports => reports?,
    };
    let summary = reporter.finish(&reports, start.elapsed()).map_err(CommandError::Output)?;
    Ok(match (summary.is_complete(), cancel.is_set()) {
        // A signal that came too late to stop anything has interrupted nothing.
        (true, _) => Outcome::Done,
        (false, true) => {
            console.line("interrupted");
            Outcome::Interrupted
        }
        (false, false) => Outcome::Failed,
    })
}

/// A flag that SIGINT and SIGTERM set. The second signal ends the process at once.
pub fn stop_on_signals() -> std::io::Result<Cancel> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // In this order: actions run as registered, and the first signal must find the flag unset.
        flag::register_conditional_shutdown(signal, Outcome::Interrupted.status(), Arc::clone(&flag))?;
        flag::register(signal, Arc::clone(&flag))?;
    }
    // Where there is a limit on the size of files, the write that meets it shall fail, not end the
    // process; and a file that stays below may be made longer than that for a while.
    flag::register(SIGXFSZ, Arc::default())?;
    Ok(Cancel::from_flag(flag))
}

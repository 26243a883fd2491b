//! `backup`: backs images of a pool up.

use std::time::Instant;

use rbd2qcow2_core::rbd::ClusterOptions;

use crate::args::{BackupArgs, OutputArgs};
use crate::console::Console;
use crate::outcome::{CommandError, Outcome};
use crate::report::Reporter;
use crate::signals;

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
    let cancel = signals::stop().map_err(CommandError::Signals)?;
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

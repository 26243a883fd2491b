//! The program `rbd2qcow2`: a thin wrapper around the library of the same name.
//!
//! It parses arguments, shows what the library reports and maps results to exit statuses. All
//! decisions about backups are the library's.

use std::io::{self, Write};
use std::panic::{self, AssertUnwindSafe};

use signal_hook::low_level;

use crate::args::{Cli, Command};
use crate::console::Console;
use crate::outcome::Outcome;

mod args;
mod backup;
mod bars;
mod console;
mod hold;
mod human;
mod json;
mod limits;
mod list;
mod names;
mod outcome;
mod points;
mod prune;
mod report;
mod restore;
mod serve;
mod signals;
mod stages;
mod table;
mod verify;

fn main() {
    let status = match Cli::from_args(std::env::args_os()) {
        // A bug must end the process in the same way as everything else; the panic was told already.
        Ok(cli) => panic::catch_unwind(AssertUnwindSafe(|| run(&cli))).unwrap_or(Outcome::Failed).status(),
        Err(error) => {
            // Help goes to standard output, wrong usage to standard error; who closed either does
            // not want to read it.
            let _ = error.print();
            error.exit_code()
        }
    };
    leave(status)
}

/// Carries a command out and says what went wrong with it.
fn run(cli: &Cli) -> Outcome {
    let console = Console::new(&cli.output);
    console.start_log(&cli.output);
    limits::raise_open_files();
    let result = match &cli.command {
        Command::Backup(args) => backup::run(args, cli.cluster(), &cli.output, &console),
        Command::List(args) => list::run(args, &cli.output, &console),
        Command::Verify(args) => verify::run(args, &cli.cluster(), &cli.output, &console),
        Command::Restore(args) => restore::run(args, cli.cluster(), &cli.output, &console),
        Command::Serve(args) => serve::run(args, &cli.output, &console),
        Command::Prune(args) => prune::run(args, &cli.output, &console),
        Command::Hold(args) => hold::hold(args, &cli.output, &console),
        Command::Release(args) => hold::release(args, &cli.output, &console),
    };
    match result {
        Ok(outcome) => outcome,
        Err(error) => {
            console.line(&format!("error: {}", human::causes_block(&error)));
            error.outcome()
        }
    }
}

/// Ends the process without running destructors of static objects.
///
/// A librbd call that did not return in time was abandoned on its thread. C++ destructors of static
/// objects, run by an ordinary exit, would pull Ceph's objects from under that thread: the process
/// could crash or hang after its work is done and reported.
fn leave(status: i32) -> ! {
    // Nothing is lost if these fail: whatever matters was flushed and checked when it was written.
    let _ = io::stdout().flush();
    let _ = io::stderr().flush();
    low_level::exit(status)
}

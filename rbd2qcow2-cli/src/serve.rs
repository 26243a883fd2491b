//! `serve`: shows a point as a disk.

use std::io::{self, Write};

use indicatif::HumanBytes;
use rbd2qcow2_core::cancel::Cancel;
use rbd2qcow2_core::serve::{Serve, ServeError, Served};

use crate::args::{OutputArgs, ServeArgs};
use crate::console::Console;
use crate::json::{JsonLines, ServeLine};
use crate::outcome::{CommandError, Outcome};
use crate::{human, names, signals};

/// Serves a point until a signal comes.
///
/// # Errors
/// The point could not be served, or not any longer; or standard output failed.
pub fn run(args: &ServeArgs, output: &OutputArgs, console: &Console) -> Result<Outcome, CommandError> {
    let cancel = signals::stop().map_err(CommandError::Signals)?;
    match serve(&args.to_serve(), output, console, &cancel) {
        Ok(()) | Err(CommandError::Serve(ServeError::Cancelled)) => {
            if !output.quiet {
                console.line("interrupted; the point is not served any more");
            }
            Ok(Outcome::Interrupted)
        }
        Err(CommandError::Serve(ServeError::Point(error))) => Err(names::explain(error, &args.dest)),
        Err(error) => Err(error),
    }
}

fn serve(serve: &Serve, output: &OutputArgs, console: &Console, cancel: &Cancel) -> Result<(), CommandError> {
    let served = serve.start(cancel)?;
    announce(&served, output).map_err(CommandError::Output)?;
    if !output.quiet {
        console.line(&served_lines(&served));
    }
    Ok(served.wait(cancel)?)
}

/// Tells programs where the disk is, at once: they wait for this line.
fn announce(served: &Served, output: &OutputArgs) -> io::Result<()> {
    if output.json {
        return JsonLines::new(io::stdout()).write(&ServeLine::new(served));
    }
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{}", served.uri())?;
    stdout.flush()
}

/// What people are told: what it is, what to do with it, how to end it.
fn served_lines(served: &Served) -> String {
    let uri = served.uri();
    let (access, snapshot, read_only) = if served.is_writable() {
        ("writable; what is written is thrown away in the end", "", "")
    } else {
        ("read-only", "-snapshot ", "-r ")
    };
    format!(
        "{}@{}: served, {}, {access}\n  \
         boot it:    qemu-system-x86_64 -m 2G {snapshot}-drive 'file={uri},format=raw,if=virtio'\n  \
         attach it:  qemu-nbd {read_only}-f raw -c /dev/nbd0 '{uri}'\n  \
         copy it:    qemu-img convert -p -f raw -O qcow2 '{uri}' FILE\n\
         Ctrl-C or SIGTERM ends it",
        human::name(served.image().as_str()),
        served.point(),
        HumanBytes(served.size()),
    )
}

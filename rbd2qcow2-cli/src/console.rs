//! Standard error: lines for people and the log, above the progress bars where there are some.

use std::io::{self, IsTerminal, Write};

use console::Term;
use env_logger::{Builder, Target, TimestampPrecision};
use indicatif::{MultiProgress, ProgressDrawTarget};
use log::LevelFilter;

use crate::args::{OutputArgs, ProgressWhen};
use crate::human;

/// How often bars are drawn, a second. More is not readable, and costs.
const DRAWS_PER_SECOND: u8 = 10;

/// Standard error, shared by all who tell something there.
#[derive(Clone, Debug)]
pub struct Console {
    /// Where bars are drawn; draws nothing where none are wanted.
    bars: MultiProgress,
}

impl Console {
    /// Standard error with bars where `output` asks for them.
    pub fn new(output: &OutputArgs) -> Self {
        let target = match output.progress {
            _ if output.quiet => ProgressDrawTarget::hidden(),
            ProgressWhen::Never => ProgressDrawTarget::hidden(),
            // Draws nothing unless standard error is a terminal.
            ProgressWhen::Auto => ProgressDrawTarget::stderr_with_hz(DRAWS_PER_SECOND),
            // As any terminal: of its own kind indicatif would find out that it is none.
            ProgressWhen::Always => {
                ProgressDrawTarget::term_like_with_hz(Box::new(Term::buffered_stderr()), DRAWS_PER_SECOND)
            }
        };
        Self { bars: MultiProgress::with_draw_target(target) }
    }

    /// Where to draw bars, if they are to be drawn.
    pub fn bars(&self) -> Option<&MultiProgress> {
        (!self.bars.is_hidden()).then_some(&self.bars)
    }

    /// Writes a line, or several that stay together.
    pub fn line(&self, text: &str) {
        let text = format!("{}\n", human::printable(text));
        // There is nowhere to tell that standard error is gone, and the work goes on without.
        let _ = self.bars.suspend(|| io::stderr().lock().write_all(text.as_bytes()));
    }

    /// Does something while no bars are on the terminal: writes to standard output, for instance.
    pub fn apart<T>(&self, act: impl FnOnce() -> T) -> T {
        self.bars.suspend(act)
    }

    /// Sends the log here. To be called once.
    pub fn start_log(&self, output: &OutputArgs) {
        let level = match output.verbose {
            _ if output.quiet => LevelFilter::Warn,
            0 => LevelFilter::Info,
            1 => LevelFilter::Debug,
            _ => LevelFilter::Trace,
        };
        // Who reads a terminal knows the time.
        let timestamp = (!io::stderr().is_terminal()).then_some(TimestampPrecision::Seconds);
        Builder::new()
            .filter_level(level)
            .parse_default_env()
            .format_target(output.verbose > 0)
            .format_timestamp(timestamp)
            .target(Target::Pipe(Box::new(LogLines(self.clone()))))
            .init();
    }
}

/// Takes the log's records, each in one call.
struct LogLines(Console);

impl Write for LogLines {
    fn write(&mut self, record: &[u8]) -> io::Result<usize> {
        self.0.line(String::from_utf8_lossy(record).trim_end());
        Ok(record.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

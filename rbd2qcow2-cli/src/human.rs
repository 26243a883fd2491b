//! Numbers, names and errors as people read them.

use std::error::Error;
use std::fmt::Write;
use std::time::Duration;

use indicatif::HumanBytes;
use jiff::fmt::friendly::{FractionalUnit, SpanPrinter};
use rbd2qcow2_core::files::Shortage;

/// A time, to a tenth of a second: `2.3s`, `1h 2m 3.4s`.
pub fn duration(time: Duration) -> String {
    const PRINTER: SpanPrinter =
        SpanPrinter::new().fractional(Some(FractionalUnit::Second)).precision(Some(1));
    PRINTER.unsigned_duration_to_string(&time)
}

/// Bytes a second, on the average over `time`.
pub fn rate(bytes: u64, time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds > 0.0 { speed(approximate(bytes) / seconds) } else { speed(0.0) }
}

/// Bytes a second.
pub fn speed(bytes_per_second: f64) -> String {
    // A cast of a float saturates, and a fraction of a byte is of no interest.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let whole = bytes_per_second as u64;
    format!("{}/s", HumanBytes(whole))
}

/// A number of bytes in three digits, for columns: at most 8 characters.
pub fn size(bytes: u64) -> String {
    let (mut number, mut units) =
        (approximate(bytes), ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"].into_iter());
    let mut unit = "B";
    // What would be rounded to four digits is told in the next unit.
    while number >= 999.5
        && let Some(next) = units.next()
    {
        (number, unit) = (number / 1024.0, next);
    }
    let decimals = match number {
        _ if unit == "B" => 0,
        ..9.995 => 2,
        ..99.95 => 1,
        _ => 0,
    };
    format!("{number:.decimals$} {unit}")
}

/// A count of things, with the word for one of them.
pub fn count(number: usize, word: &str) -> String {
    format!("{number} {word}{}", if number == 1 { "" } else { "s" })
}

/// A word of a command line, as a shell takes it.
pub fn shell_word(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-+,:@%".contains(&byte);
    if !text.is_empty() && text.bytes().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// The number as a float, for ratios that people look at.
pub fn approximate(number: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "nobody sees the sixteenth digit")]
    let float = number as f64;
    float
}

/// The text with control characters made visible, line ends and tabs apart.
///
/// Image names hold anything: one with escape sequences must not play with a terminal.
pub fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() && !matches!(character, '\n' | '\t') {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
    }
    shown
}

/// A name on one line, with all its control characters made visible.
pub fn name(text: &str) -> String {
    printable(text).replace('\n', "\\n").replace('\t', "\\t")
}

/// The error and its causes, outermost first.
fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = String> + use<'a> {
    std::iter::successors(Some(error), |&error| error.source()).map(ToString::to_string)
}

/// The error and its causes, one a line.
pub fn causes_block(error: &(dyn Error + 'static)) -> String {
    let mut block = String::new();
    for (depth, cause) in causes(error).enumerate() {
        if depth > 0 {
            block.push_str("\n  caused by: ");
        }
        // What another program said may take several lines.
        let _ = write!(block, "{}", cause.trim_end().replace('\n', "\n    "));
    }
    if let Some(shortage) = Shortage::untold(error) {
        let _ = write!(block, "\n  caused by: {shortage}");
    }
    block
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot write the layer")]
    struct Outer(#[source] io::Error);

    #[test]
    fn durations_have_tenths() {
        assert_eq!(duration(Duration::ZERO), "0.0s");
        assert_eq!(duration(Duration::from_millis(2_345)), "2.3s");
        assert_eq!(duration(Duration::from_secs(3_723)), "1h 2m 3.0s");
    }

    #[test]
    fn a_rate_over_no_time_is_none() {
        assert_eq!(rate(1 << 20, Duration::ZERO), "0 B/s");
        assert_eq!(rate(3 << 20, Duration::from_secs(2)), "1.50 MiB/s");
    }

    #[test]
    fn sizes_have_three_digits() {
        let told = [0, 999, 1000, 1_000_001, 8 << 30, 10_234_567, 1023 << 20, 100 << 30, 16 << 40, u64::MAX];
        assert_eq!(
            told.map(size),
            [
                "0 B", "999 B", "0.98 KiB", "977 KiB", "8.00 GiB", "9.76 MiB", "1.00 GiB", "100 GiB",
                "16.0 TiB", "16.0 EiB"
            ]
        );
    }

    #[test]
    fn a_shell_takes_any_word() {
        let words = ["/backups/vm-1", "a b", "", "it's", "$(x)"];
        assert_eq!(words.map(shell_word), ["/backups/vm-1", "'a b'", "''", r"'it'\''s'", "'$(x)'"]);
    }

    #[test]
    fn names_cannot_play_with_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\nü"), "a\\u{1b}[2Jb\nü");
        assert_eq!(name("a\r\n\tb"), "a\\r\\n\\tb");
    }

    #[test]
    fn causes_are_told_once() {
        let error = Outer(io::Error::other("qemu-nbd said:\nno space\n"));
        assert_eq!(causes_block(&error), "cannot write the layer\n  caused by: qemu-nbd said:\n    no space");
    }
}

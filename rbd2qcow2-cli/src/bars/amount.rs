//! A bar that shows how much of something is done.

use std::fmt::Write;

use indicatif::{HumanBytes, ProgressBar};
use rbd2qcow2_core::progress::Amount;

use super::remaining;
use crate::human;

/// Brings a bar up to date that shows how much of something is done. `word` tells of what; it stands alone
/// as long as nothing is known to be done.
pub fn tick_amount(bar: &ProgressBar, word: &str, amount: &Amount) {
    let (total, done) = (amount.total.get(), amount.done.get());
    // A bar of no length would look full while the total is still unknown.
    bar.set_length(total.max(1));
    bar.set_position(done);
    let mut message = word.to_owned();
    if total > 0 {
        let speed = human::speed(bar.per_sec());
        let (done, total) = (HumanBytes(done), HumanBytes(total));
        // Writing to a string cannot fail.
        let _ = write!(message, " {done} of {total}, {speed}{}", remaining(bar));
    }
    bar.set_message(message);
    bar.tick();
}

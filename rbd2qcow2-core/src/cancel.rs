//! The flag that asks a run to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A request to stop, shared by everyone who takes part in a run.
///
/// Clones share the flag. Once set it stays set. Everything that blocks looks at it at least every
/// [`Cancel::POLL`].
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<Flag>);

#[derive(Debug, Default)]
struct Flag {
    set: Arc<AtomicBool>,
    /// The flag of the larger piece of work that this is a part of.
    whole: Option<Cancel>,
}

impl Cancel {
    /// The longest a blocking operation goes without looking at the flag. Short enough that a run
    /// stops well within a second, long enough to cost nothing.
    pub const POLL: Duration = Duration::from_millis(50);

    /// A flag that is not set.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Wraps a flag that somebody else sets, a signal handler for instance.
    #[must_use]
    pub fn from_flag(set: Arc<AtomicBool>) -> Self {
        Self(Arc::new(Flag { set, whole: None }))
    }

    /// A flag for a part of the work: set when this one is, and can be set without it.
    #[must_use]
    pub fn part(&self) -> Self {
        Self(Arc::new(Flag { set: Arc::default(), whole: Some(self.clone()) }))
    }

    /// Asks everyone who shares the flag, or has a part of it, to stop.
    pub fn set(&self) {
        self.0.set.store(true, Ordering::Release);
    }

    /// Whether a stop was asked for.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.0.set.load(Ordering::Acquire) || self.0.whole.as_ref().is_some_and(Self::is_set)
    }

    /// Sleeps, but not much longer than until a stop is asked for.
    pub fn sleep(&self, mut time: Duration) {
        while !time.is_zero() && !self.is_set() {
            let nap = time.min(Self::POLL);
            std::thread::sleep(nap);
            time -= nap;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_stops_with_the_whole_and_not_the_other_way_round() {
        let whole = Cancel::new();
        let (one, other) = (whole.part(), whole.part());
        one.set();
        assert!(one.is_set() && !other.is_set() && !whole.is_set());
        whole.set();
        assert!(other.is_set());
    }
}

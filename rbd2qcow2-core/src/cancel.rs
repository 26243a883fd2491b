//! The flag that asks a run to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A request to stop, shared by everyone who takes part in a run.
///
/// Clones share the flag. Once set it stays set. Everything that blocks looks at it at least every
/// [`Cancel::POLL`].
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// The longest a blocking operation goes without looking at the flag. Short enough that a run
    /// stops well within a second, long enough to cost nothing.
    pub const POLL: std::time::Duration = std::time::Duration::from_millis(50);

    /// A flag that is not set.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Wraps a flag that somebody else sets, a signal handler for instance.
    #[must_use]
    pub fn from_flag(flag: Arc<AtomicBool>) -> Self {
        Self(flag)
    }

    /// Asks everyone who shares the flag to stop.
    pub fn set(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether a stop was asked for.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

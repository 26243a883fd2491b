//! A limit on bytes per second.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::cancel::Cancel;

/// Spreads bytes over time, for everyone who shares it.
#[derive(Debug)]
pub struct RateLimit {
    bytes_per_second: u64,
    /// When the bytes handed out so far are used up.
    free_at: Mutex<Instant>,
}

impl RateLimit {
    /// A limit of `bytes_per_second`; 0 counts as 1.
    #[must_use]
    pub fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), free_at: Mutex::new(Instant::now()) }
    }

    /// Waits until `bytes` may be moved, or until soon after `cancel` is set.
    pub fn take(&self, bytes: u64, cancel: &Cancel) {
        cancel.sleep(self.book(bytes, Instant::now()));
    }

    /// Books time for `bytes`, and says how long it is until it begins.
    fn book(&self, bytes: u64, now: Instant) -> Duration {
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        // Time that nobody used is not saved up.
        let begin = (*free_at).max(now);
        *free_at = begin + cost;
        begin - now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_spread_over_time_and_idle_time_is_lost() {
        let limit = RateLimit::new(1000);
        let now = Instant::now() + Duration::from_secs(1);
        assert_eq!(limit.book(500, now), Duration::ZERO);
        assert_eq!(limit.book(250, now), Duration::from_millis(500));
        assert_eq!(limit.book(1000, now), Duration::from_millis(750));
        assert_eq!(limit.book(1, now + Duration::from_secs(60)), Duration::ZERO);
    }

    #[test]
    fn cancel_ends_the_wait() {
        let limit = RateLimit::new(1);
        let cancel = Cancel::new();
        cancel.set();
        limit.take(1 << 40, &cancel);
        limit.take(1 << 40, &cancel);
    }
}

//! Who may copy now.

use crossbeam::channel::{self, Receiver, RecvTimeoutError, Sender};

use crate::cancel::Cancel;

/// Lets a number of images copy at once. The others have done what only the cluster takes its time for,
/// and wait.
#[derive(Debug)]
pub struct Turns {
    /// One token for each image that may begin.
    free: Receiver<()>,
    back: Sender<()>,
}

/// The right to copy, which ends on drop.
#[derive(Debug)]
pub struct Turn(Sender<()>);

impl Turns {
    /// So many at once, at least 1. Takes some memory for each.
    #[must_use]
    pub fn new(at_once: usize) -> Self {
        let (back, free) = channel::bounded(at_once.max(1));
        while back.try_send(()).is_ok() {}
        Self { free, back }
    }

    /// Waits until it is the caller's turn. `None` when `cancel` was set meanwhile.
    #[must_use]
    pub fn take(&self, cancel: &Cancel) -> Option<Turn> {
        while !cancel.is_set() {
            match self.free.recv_timeout(Cancel::POLL) {
                Ok(()) => return Some(Turn(self.back.clone())),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => unreachable!("this holds the other end"),
            }
        }
        None
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        // There is room for all tokens; and where nobody waits any more, none is missed.
        let _ = self.0.try_send(());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn no_more_than_that_at_once_and_everybody_in_the_end() {
        let (turns, cancel) = (Turns::new(3), Cancel::new());
        let (now, most, done) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..12 {
                scope.spawn(|| {
                    let turn = turns.take(&cancel).expect("not cancelled");
                    most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    std::thread::sleep(Cancel::POLL / 10);
                    now.fetch_sub(1, Ordering::SeqCst);
                    done.fetch_add(1, Ordering::SeqCst);
                    drop(turn);
                });
            }
        });
        assert_eq!(done.into_inner(), 12);
        assert!((1..=3).contains(&most.into_inner()));
    }

    #[test]
    fn a_panic_gives_the_turn_back_and_cancel_ends_the_wait() {
        let (turns, cancel) = (Turns::new(1), Cancel::new());
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _turn = turns.take(&cancel);
            panic!("as a defect would");
        }));
        assert!(panicked.is_err());
        let turn = turns.take(&cancel);
        assert!(turn.is_some());
        let stop = cancel.part();
        stop.set();
        assert!(turns.take(&stop).is_none());
    }
}

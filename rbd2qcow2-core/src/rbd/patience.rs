//! Waiting for a library that may never come back.

use std::time::{Duration, Instant};

use crossbeam::channel::{self, RecvTimeoutError};

use super::error::RbdError;
use crate::cancel::Cancel;

/// How long one call may go unanswered, and the flag that ends the wait at once.
#[derive(Clone, Debug)]
pub struct Patience {
    /// The longest wait for one answer.
    pub limit: Duration,
    /// Ends every wait soon after it is set.
    pub cancel: Cancel,
}

impl Patience {
    /// Runs `call` in a thread of its own and waits for its result.
    ///
    /// `call` must own whatever it touches: when the wait ends first, it goes on alone.
    pub(super) fn call<T: Send + 'static>(
        &self,
        what: impl Fn() -> String,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, RbdError> {
        let (send, receive) = channel::bounded(1);
        std::thread::Builder::new()
            .name("librbd-call".into())
            .spawn(move || {
                // Nobody may be waiting any more.
                let _ = send.send(call());
            })
            .map_err(|cause| RbdError::Thread { what: what(), cause })?;
        let start = Instant::now();
        loop {
            match receive.recv_timeout(Cancel::POLL) {
                Ok(result) => return Ok(result),
                Err(RecvTimeoutError::Disconnected) => panic!("the call to {} panicked", what()),
                Err(RecvTimeoutError::Timeout) => self.check(start, &what)?,
            }
        }
    }

    /// An error once it is time to give up on an answer awaited since `start`.
    pub(super) fn check(&self, start: Instant, what: impl Fn() -> String) -> Result<(), RbdError> {
        if self.cancel.is_set() {
            return Err(RbdError::Cancelled);
        }
        if start.elapsed() >= self.limit {
            return Err(RbdError::NoAnswer { what: what(), waited: self.limit });
        }
        Ok(())
    }
}

/// How long closing a handle may take: it is local work, unless the cluster is gone.
const TEARDOWN_LIMIT: Duration = Duration::from_secs(5);

/// Runs `close` in a thread of its own and waits a while for it, so that a drop never hangs.
pub(super) fn teardown(what: &str, close: impl FnOnce() + Send + 'static) {
    let patience = Patience { limit: TEARDOWN_LIMIT, cancel: Cancel::new() };
    if let Err(error) = patience.call(|| what.to_owned(), close) {
        log::warn!("{error}; its resources stay in use until this process ends");
    }
}

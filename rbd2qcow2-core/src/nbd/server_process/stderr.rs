//! The last words of a server.

use std::collections::VecDeque;
use std::io::Read;
use std::process::ChildStderr;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How much is kept, in bytes. A screen full of text.
const KEPT: usize = 4096;

/// The end of what a process wrote to its standard error.
#[derive(Debug, Default)]
pub(super) struct StderrTail {
    state: Mutex<State>,
    /// Signalled when the process has closed its standard error.
    end: Condvar,
}

#[derive(Debug, Default)]
struct State {
    bytes: VecDeque<u8>,
    /// Whether something was dropped from the front.
    cut: bool,
    ended: bool,
}

impl StderrTail {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads until the last writer is gone.
    pub(super) fn collect(&self, mut pipe: ChildStderr) {
        let mut buffer = [0; 1024];
        loop {
            match pipe.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => self.push(&buffer[..length]),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        self.lock().ended = true;
        self.end.notify_all();
    }

    fn push(&self, bytes: &[u8]) {
        let mut state = self.lock();
        state.bytes.extend(bytes);
        if let Some(excess) = state.bytes.len().checked_sub(KEPT).filter(|excess| *excess > 0) {
            state.bytes.drain(..excess);
            state.cut = true;
        }
    }

    /// Waits for the end; `false` when it did not come within `limit`.
    pub(super) fn ended_within(&self, limit: Duration) -> bool {
        let waiting = |state: &mut State| !state.ended;
        let (state, _) =
            self.end.wait_timeout_while(self.lock(), limit, waiting).unwrap_or_else(PoisonError::into_inner);
        state.ended
    }

    /// What was kept, on one line.
    pub(super) fn text(&self) -> String {
        let state = self.lock();
        let bytes: Vec<u8> = state.bytes.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let start = if state.cut { "... " } else { "" };
        start.to_owned() + &lines.join("; ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_is_kept() {
        let tail = StderrTail::default();
        tail.push(b"first\n");
        assert_eq!(tail.text(), "first");
        tail.push(&[b'x'; KEPT - 6]);
        tail.push(b"\n last \n\n");
        assert_eq!(tail.lock().bytes.len(), KEPT);
        assert!(tail.text().starts_with("... xxx") && tail.text().ends_with("xxx; last"));
    }
}

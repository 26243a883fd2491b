//! A bar that moves while something goes on.

use std::io;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::Scope;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar};

use super::style;
use crate::human;

/// How often the bar is brought up to date.
const TICK: Duration = Duration::from_millis(200);

/// The bar of `image`, to be moved by a [`Moving`]; it is not drawn before.
pub fn image_bar(bars: &MultiProgress, image: &str) -> ProgressBar {
    bars.add(ProgressBar::new(1).with_style(style()).with_prefix(human::name(image)))
}

/// Keeps a bar moving while this lives; the bar goes soon after the drop.
#[derive(Debug)]
pub struct Moving(
    /// Never sent on: the ticking thread waits for its end.
    #[expect(dead_code, reason = "held for its drop")]
    Sender<()>,
);

impl Moving {
    /// Has `tick` bring `bar`, if there is one, up to date some times a second, on a thread of `scope`.
    ///
    /// # Errors
    /// No thread could be made.
    pub fn start<'scope>(
        bar: Option<&ProgressBar>,
        scope: &'scope Scope<'scope, '_>,
        tick: impl Fn(&ProgressBar) + Send + 'scope,
    ) -> io::Result<Self> {
        let (sender, stopped) = mpsc::channel();
        if let Some(bar) = bar.cloned() {
            std::thread::Builder::new().name("bars".into()).spawn_scoped(scope, move || {
                while stopped.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                    tick(&bar);
                }
                bar.finish_and_clear();
            })?;
        }
        Ok(Self(sender))
    }
}

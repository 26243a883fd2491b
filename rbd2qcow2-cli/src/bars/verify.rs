//! The bar of an image that is verified.

use std::io;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::Scope;
use std::time::Duration;

use indicatif::{HumanBytes, MultiProgress, ProgressBar};
use rbd2qcow2_core::verify::VerifyProgress;

use super::{remaining, style};
use crate::human;

/// How often the bar is brought up to date.
const TICK: Duration = Duration::from_millis(200);

/// Shows how far a verification is while this lives; the bar goes soon after the drop.
#[derive(Debug)]
pub struct VerifyBar(
    /// Never sent on: the ticking thread waits for its end.
    #[expect(dead_code, reason = "held for its drop")]
    Sender<()>,
);

impl VerifyBar {
    /// Draws the bar of `image`, if bars are drawn at all, on a thread of `scope`.
    ///
    /// # Errors
    /// No thread could be made.
    pub fn start<'scope>(
        bars: Option<&MultiProgress>,
        image: &str,
        progress: &'scope VerifyProgress,
        scope: &'scope Scope<'scope, '_>,
    ) -> io::Result<Self> {
        let (sender, stopped) = mpsc::channel();
        if let Some(bars) = bars {
            let bar = bars.add(ProgressBar::new(1).with_style(style()).with_prefix(human::name(image)));
            std::thread::Builder::new().name("bars".into()).spawn_scoped(scope, move || {
                while stopped.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                    let (total, done) = (progress.total.get(), progress.done.get());
                    bar.set_length(total.max(1));
                    bar.set_position(done);
                    let speed = human::speed(bar.per_sec());
                    let (done, total) = (HumanBytes(done), HumanBytes(total));
                    bar.set_message(format!("verify {done} of {total}, {speed}{}", remaining(&bar)));
                    bar.tick();
                }
                bar.finish_and_clear();
            })?;
        }
        Ok(Self(sender))
    }
}

//! Progress bars: one for each image under way and one for the whole run.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanDuration, MultiProgress, ProgressBar, ProgressStyle};
use rbd2qcow2_core::progress::{Progress, Stage};

use crate::{human, stages};

mod amount;
mod merge;
mod moving;

pub use amount::tick_amount;
pub use merge::MergeTicks;
pub use moving::{Moving, image_bar};

/// How long an image may do something else than copy before its bar is shown. What takes only a moment is
/// done for many images at once, and their bars would fill the screen.
const MOMENT: Duration = Duration::from_secs(5);

/// Steps of the total's bar for each image. Sizes of images that were not begun are unknown, so the
/// total counts images, each in so many parts.
const PARTS: u64 = 1000;

/// A remaining time beyond this is a guess from too little.
const LONGEST_GUESS: Duration = Duration::from_secs(30 * 24 * 3600);

/// The bars of a run.
#[derive(Debug)]
pub struct Bars {
    /// Draws them.
    multi: MultiProgress,
    /// The bar of the whole run.
    total: ProgressBar,
    /// Never drawn: keeps the rate of the whole run's reads.
    total_reads: ProgressBar,
    /// What is known at the moment.
    state: Mutex<State>,
}

/// What the bars show.
#[derive(Debug, Default)]
struct State {
    /// Images of the run.
    images: u64,
    /// Images that ended.
    ended: u64,
    /// Bytes that those read.
    ended_read: u64,
    /// Images under way.
    running: Vec<Running>,
}

/// An image under way.
#[derive(Debug)]
struct Running {
    /// The image's name.
    image: String,
    /// What it is doing.
    stage: Stage,
    /// Since when.
    since: Instant,
    /// Its counters.
    progress: Arc<Progress>,
    /// Its bar: bytes done, of its size.
    bar: ProgressBar,
    /// Whether the bar is drawn.
    shown: bool,
    /// Never drawn: keeps the rate of its reads.
    reads: ProgressBar,
}

impl Bars {
    /// Bars that `multi` draws.
    pub fn new(multi: &MultiProgress) -> Self {
        let total = multi.add(ProgressBar::new(1).with_style(style()).with_prefix("total"));
        Self { multi: multi.clone(), total, total_reads: ProgressBar::hidden(), state: Mutex::default() }
    }

    /// The run has so many images.
    pub fn selected(&self, images: usize) {
        let images = u64::try_from(images).unwrap_or(u64::MAX);
        self.state().images = images;
        self.total.set_length(images.saturating_mul(PARTS));
    }

    /// An image has begun.
    pub fn started(&self, image: &str, progress: &Arc<Progress>) {
        let running = Running {
            image: image.to_owned(),
            stage: Stage::Prepare,
            since: Instant::now(),
            progress: Arc::clone(progress),
            bar: ProgressBar::hidden().with_style(style()).with_prefix(human::name(image)),
            shown: false,
            reads: ProgressBar::hidden(),
        };
        let mut state = self.state();
        // Begun again.
        state.running.retain(|running| running.image != image);
        state.running.push(running);
    }

    /// An image has reached a stage.
    pub fn stage(&self, image: &str, stage: Stage) {
        if let Some(running) = self.state().running.iter_mut().find(|running| running.image == image) {
            (running.stage, running.since) = (stage, Instant::now());
        }
    }

    /// An image has ended; its bar goes.
    pub fn finished(&self, image: &str) {
        let mut state = self.state();
        state.ended += 1;
        if let Some(index) = state.running.iter().position(|running| running.image == image) {
            let running = state.running.swap_remove(index);
            state.ended_read += running.progress.read.get();
            running.bar.finish_and_clear();
            self.multi.remove(&running.bar);
        }
    }

    /// Brings all bars up to date. To be called some times a second.
    pub fn tick(&self) {
        let mut state = self.state();
        for running in state.running.iter_mut().filter(|running| running.is_to_show()) {
            running.bar = self.multi.insert_before(&self.total, running.bar.clone());
            running.shown = true;
        }
        let (mut parts, mut read) = (state.ended.saturating_mul(PARTS), state.ended_read);
        for running in &state.running {
            running.tick();
            parts += running.parts();
            read += running.progress.read.get();
        }
        self.total_reads.set_position(read);
        self.total_reads.tick();
        self.total.set_position(parts);
        self.total.set_message(format!(
            "{}/{} images, {} read, {}{}",
            state.ended,
            state.images,
            HumanBytes(read),
            human::speed(self.total_reads.per_sec()),
            remaining(&self.total),
        ));
        self.total.tick();
    }

    /// Takes all bars away.
    pub fn clear(&self) {
        for running in self.state().running.drain(..) {
            running.bar.finish_and_clear();
        }
        self.total.finish_and_clear();
    }

    /// What is shown. A panic elsewhere leaves it whole: no step of a change depends on another.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Running {
    /// Whether a bar that is not drawn is to be drawn from now on.
    fn is_to_show(&self) -> bool {
        let long = || self.stage != Stage::Queue && self.since.elapsed() >= MOMENT;
        !self.shown && (self.stage == Stage::Copy || long())
    }

    /// Brings the image's bar up to date.
    fn tick(&self) {
        let word = stages::word(self.stage);
        if self.stage == Stage::Copy {
            tick_copy(&self.bar, &self.reads, word, &self.progress);
        } else {
            advance(&self.bar, &self.reads, &self.progress);
            self.bar.set_message(word);
            self.bar.tick();
        }
    }

    /// How much of the image is done, in [`PARTS`].
    fn parts(&self) -> u64 {
        let done = u128::from(done(&self.progress));
        let parts = done * u128::from(PARTS) / u128::from(self.progress.size.get().max(1));
        u64::try_from(parts).unwrap_or(PARTS)
    }
}

/// Brings a bar up to date that shows a copy, whose reads have their rate in `reads`. `word` tells what it
/// is.
fn tick_copy(bar: &ProgressBar, reads: &ProgressBar, word: &str, progress: &Progress) {
    advance(bar, reads, progress);
    bar.set_message(format!(
        "{word} {} read, {}{}; at {} of {}",
        HumanBytes(progress.read.get()),
        human::speed(reads.per_sec()),
        remaining(bar),
        HumanBytes(done(progress)),
        HumanBytes(progress.size.get()),
    ));
    bar.tick();
}

fn advance(bar: &ProgressBar, reads: &ProgressBar, progress: &Progress) {
    reads.set_position(progress.read.get());
    reads.tick();
    // A bar of no length would look full while the size is still unknown.
    bar.set_length(progress.size.get().max(1));
    bar.set_position(done(progress));
}

/// Bytes of the image that nothing is left to do for: compared, and read where they must be. The
/// comparison runs ahead of the reads, so it alone would show an end that is far off.
fn done(progress: &Progress) -> u64 {
    let waiting = progress.to_read.get().saturating_sub(progress.read.get());
    progress.scanned.get().saturating_sub(waiting).min(progress.size.get())
}

/// What a bar looks like. The message is cut where the terminal ends: on 80 columns an image's message
/// keeps its first 39 characters.
fn style() -> ProgressStyle {
    ProgressStyle::with_template("{prefix:16!} [{bar:16}] {percent:>3}% {wide_msg}")
        .expect("a constant template is well-formed")
        .progress_chars("=> ")
}

/// How long the bar will still take, where that can be guessed.
fn remaining(bar: &ProgressBar) -> String {
    let eta = bar.eta();
    let known = bar.position() > 0 && bar.length().is_some_and(|length| bar.position() < length);
    if known && !eta.is_zero() && eta < LONGEST_GUESS {
        format!(", {:#} left", HumanDuration(eta))
    } else {
        String::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_total_counts_ended_images_and_parts_of_running_ones() {
        let bars = Bars::new(&MultiProgress::with_draw_target(indicatif::ProgressDrawTarget::hidden()));
        bars.selected(4);
        let [first, second] = [Arc::<Progress>::default(), Arc::<Progress>::default()];
        bars.started("a", &first);
        bars.started("b", &second);
        first.read.add(1 << 30);
        bars.finished("a");
        bars.stage("b", Stage::Copy);
        second.size.add(16 << 40);
        second.scanned.add(8 << 40);
        second.to_read.add(1 << 30);
        second.read.add(1 << 30);
        bars.tick();
        assert_eq!(bars.total.position(), 1500);
        assert_eq!(bars.total.length(), Some(4000));
        assert!(bars.total.message().starts_with("1/4 images, 2.00 GiB read"), "{}", bars.total.message());
        let message = bars.state().running[0].bar.message();
        assert!(message.starts_with("copy 1.00 GiB read, "), "{message}");
        assert!(message.ends_with("; at 8.00 TiB of 16.00 TiB"), "{message}");
    }

    #[test]
    fn bars_are_drawn_of_images_that_copy_or_that_are_stuck() {
        let bars = Bars::new(&MultiProgress::with_draw_target(indicatif::ProgressDrawTarget::hidden()));
        bars.selected(1);
        bars.started("a", &Arc::default());
        let shown = |stage, since: Duration| {
            bars.stage("a", stage);
            bars.state().running[0].since = Instant::now().checked_sub(since).expect("the machine is up");
            bars.tick();
            bars.state().running[0].shown
        };
        assert!(!shown(Stage::Prepare, Duration::ZERO));
        assert!(!shown(Stage::Queue, 2 * MOMENT));
        assert!(shown(Stage::Snapshot, 2 * MOMENT));
        bars.state().running[0].shown = false;
        assert!(shown(Stage::Copy, Duration::ZERO));
        // Once drawn, it stays to the end.
        assert!(shown(Stage::CleanUp, Duration::ZERO));
    }

    #[test]
    fn what_waits_to_be_read_is_not_done() {
        let bars = Bars::new(&MultiProgress::with_draw_target(indicatif::ProgressDrawTarget::hidden()));
        bars.selected(1);
        let progress = Arc::<Progress>::default();
        bars.started("a", &progress);
        progress.size.add(8 << 30);
        progress.scanned.add(8 << 30);
        progress.to_read.add(4 << 30);
        progress.read.add(2 << 30);
        bars.tick();
        assert_eq!(bars.total.position(), 750);
    }

    #[test]
    fn an_image_of_no_size_is_no_division_by_zero() {
        let bars = Bars::new(&MultiProgress::with_draw_target(indicatif::ProgressDrawTarget::hidden()));
        bars.selected(1);
        bars.started("empty", &Arc::default());
        bars.tick();
        assert_eq!(bars.total.position(), 0);
        bars.clear();
    }
}

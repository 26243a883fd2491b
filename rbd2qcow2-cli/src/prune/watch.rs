//! What is told of the merges of an image while they go on, and when each is done.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use indicatif::{HumanBytes, ProgressBar};
use rbd2qcow2_core::chain::ImageName;
use rbd2qcow2_core::merge::{MergeObserver, MergeProgress, Turn, Way};
use rbd2qcow2_core::progress::Stage;

use crate::args::OutputArgs;
use crate::bars::{self, MergeTicks};
use crate::console::Console;
use crate::human;
use crate::stages::{self, StageClock};

/// Tells people how the merges of one image go.
#[derive(Debug)]
pub struct Watch<'a> {
    /// Standard error.
    console: &'a Console,
    /// The image, as people read it.
    image: String,
    /// Whether stages and their rates are told.
    verbose: bool,
    /// The image's bar, where there are bars.
    bar: Option<ProgressBar>,
    /// The merge under way.
    running: Mutex<Option<Running>>,
}

/// A merge under way.
#[derive(Debug)]
struct Running {
    /// Which one it is.
    turn: Turn,
    /// When it began.
    start: Instant,
    /// What it is doing.
    stage: Stage,
    /// When it reached its stages.
    clock: StageClock,
    /// Its counters.
    progress: Arc<MergeProgress>,
    /// What its bar shows.
    ticks: MergeTicks,
}

impl<'a> Watch<'a> {
    /// Of an image of which nothing is merged yet.
    pub fn new(console: &'a Console, output: &OutputArgs, image: &ImageName) -> Self {
        let bar = console.bars().map(|bars| bars::image_bar(bars, image.as_str()));
        let verbose = output.verbose > 0 && !output.quiet;
        let image = human::name(image.as_str());
        Self { console, image, verbose, bar, running: Mutex::default() }
    }

    /// The image's bar, where there are bars.
    pub fn bar(&self) -> Option<&ProgressBar> {
        self.bar.as_ref()
    }

    /// Brings the bar up to date.
    pub fn tick(&self, bar: &ProgressBar) {
        if let Some(running) = &*self.running() {
            running.ticks.tick(bar, running.stage);
        }
    }

    /// What was heard. A panic elsewhere leaves it whole: no step of a change depends on another.
    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MergeObserver for Watch<'_> {
    fn started(&self, turn: Turn, progress: &Arc<MergeProgress>) {
        *self.running() = Some(Running {
            turn,
            start: Instant::now(),
            stage: Stage::Prepare,
            clock: StageClock::default(),
            progress: Arc::clone(progress),
            ticks: MergeTicks::new(turn, progress),
        });
    }

    fn stage(&self, stage: Stage) {
        if let Some(running) = &mut *self.running() {
            running.stage = stage;
            running.clock.reached(stage, Instant::now());
        }
        // What is over soon is to be seen, too.
        if let Some(bar) = &self.bar {
            self.tick(bar);
        }
    }

    fn finished(&self, way: Way) {
        let Some(Running { turn, start, clock, progress, .. }) = self.running().take() else { return };
        let end = Instant::now();
        let (image, time) = (&self.image, human::duration(end.saturating_duration_since(start)));
        log::info!(
            "{image}: merged into point {}: {}, {} of data written in {time}",
            turn.child,
            told(way),
            HumanBytes(progress.written()),
        );
        if self.verbose {
            let point = format!("{image}@{}", turn.child);
            self.console.line(&stages::describe_merge(&point, &progress, &clock, end));
        }
    }
}

/// How a merge was done.
fn told(way: Way) -> &'static str {
    match way {
        Way::Copied => "copied",
        Way::UponBase => "copied upon the large layer below, which is to be reused",
        Way::InPlace => "the large layer below reused in place",
        Way::Shared => "the large layer below reused, its data shared",
        _ => "done",
    }
}

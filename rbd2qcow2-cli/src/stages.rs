//! The stages of one image's backup, or of a merge, and their rates, so that a slow one can be named.

use std::fmt::Write;
use std::time::{Duration, Instant};

use indicatif::HumanBytes;
use rbd2qcow2_core::merge::MergeProgress;
use rbd2qcow2_core::progress::{Amount, ImageReport, Progress, Stage};

use crate::human;

/// The word for a stage.
pub fn word(stage: Stage) -> &'static str {
    match stage {
        Stage::Prepare => "prepare",
        Stage::Snapshot => "snapshot",
        Stage::Queue => "queue",
        Stage::Empty => "empty",
        Stage::Verify => "verify",
        Stage::Copy => "copy",
        Stage::TakeOver => "take over",
        Stage::Commit => "commit",
        Stage::CleanUp => "clean up",
        _ => "other",
    }
}

/// When an image, or a merge, reached its stages.
#[derive(Debug, Default)]
pub struct StageClock(Vec<(Stage, Instant)>);

impl StageClock {
    /// It has reached a stage.
    pub fn reached(&mut self, stage: Stage, now: Instant) {
        self.0.push((stage, now));
    }

    /// How long each stage took, in their order, when the last ended at `end`.
    fn times(&self, end: Instant) -> impl Iterator<Item = (Stage, Duration)> + '_ {
        let ends = self.0.iter().skip(1).map(|&(_, start)| start).chain([end]);
        self.0.iter().zip(ends).map(|(&(stage, start), end)| (stage, end.saturating_duration_since(start)))
    }

    /// How long a stage took in all, when the last ended at `end`.
    fn time_of(&self, wanted: Stage, end: Instant) -> Duration {
        self.times(end).filter(|(stage, _)| *stage == wanted).map(|(_, time)| time).sum()
    }
}

/// Tells how long each stage took, and what the threads of the copy waited for.
pub fn describe(report: &ImageReport, clock: &StageClock, end: Instant) -> String {
    let mut text = times_told(&human::name(&report.image), clock, end);
    describe_copy(&mut text, &report.progress, clock.time_of(Stage::Copy, end));
    if report.proved_bytes > 0 {
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "\n  proved  {} that were not reported as changed, and are not",
            HumanBytes(report.proved_bytes)
        );
    }
    text
}

/// Tells how long each stage of a merge into `point` took, and how fast it was.
pub fn describe_merge(point: &str, progress: &MergeProgress, clock: &StageClock, end: Instant) -> String {
    let mut text = times_told(point, clock, end);
    describe_amount(&mut text, "verify ", &progress.verify, clock.time_of(Stage::Verify, end));
    describe_copy(&mut text, &progress.copy, clock.time_of(Stage::Copy, end));
    describe_amount(&mut text, "take over", &progress.take_over, clock.time_of(Stage::TakeOver, end));
    text
}

/// Tells how long each stage took.
fn times_told(name: &str, clock: &StageClock, end: Instant) -> String {
    let told = |(stage, time)| format!("{} {}", word(stage), human::duration(time));
    let words: Vec<_> = clock.times(end).map(told).collect();
    format!("{name}: {}", words.join(", "))
}

/// Tells how much was done, and how fast.
fn describe_amount(text: &mut String, word: &str, amount: &Amount, wall: Duration) {
    let done = amount.done.get();
    if done > 0 {
        // Writing to a string cannot fail.
        let _ = write!(text, "\n  {word} {} at {}", HumanBytes(done), human::rate(done, wall));
    }
}

/// Tells what went through the copy, how fast, and which step kept its threads busy.
fn describe_copy(text: &mut String, counters: &Progress, wall: Duration) {
    if wall.is_zero() {
        return;
    }
    let waits = [counters.diff_nanos.time(), counters.read_nanos.time(), counters.write_nanos.time()];
    let all: Duration = waits.iter().sum();
    let busy = waits.map(|wait| {
        let threads = wait.as_secs_f64() / wall.as_secs_f64();
        let share = if all.is_zero() { 0.0 } else { 100.0 * wait.as_secs_f64() / all.as_secs_f64() };
        format!("{threads:.1} threads busy, {share:.0}% of all")
    });
    let (scanned, read) = (counters.scanned.get(), counters.read.get());
    let (data, zero) = (counters.data.get(), counters.zero.get());
    // Writing to a string cannot fail.
    let _ = write!(
        text,
        "\n  diff    {} at {}, {} extents of data and {} of zeroes; {}",
        HumanBytes(scanned),
        human::rate(scanned, wall),
        counters.data_extents.get(),
        counters.zero_extents.get(),
        busy[0],
    );
    let _ = write!(text, "\n  reads   {} at {}; {}", HumanBytes(read), human::rate(read, wall), busy[1]);
    let _ = write!(
        text,
        "\n  writes  {} of data at {}, {} of zeroes; {}",
        HumanBytes(data),
        human::rate(data, wall),
        HumanBytes(zero),
        busy[2],
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use rbd2qcow2_core::progress::Status;

    #[test]
    fn the_slow_stage_can_be_named() {
        let mut report = ImageReport::new("vm", Status::Ok);
        report.time = Duration::from_secs(4);
        let counters = &report.progress;
        counters.scanned.add(8 << 30);
        counters.read.add(2 << 30);
        counters.data.add(1 << 30);
        counters.zero.add(4096);
        counters.data_extents.add(3);
        counters.diff_nanos.add_time(Duration::from_secs(1));
        counters.read_nanos.add_time(Duration::from_secs(18));
        counters.write_nanos.add_time(Duration::from_secs(1));
        let start = Instant::now();
        let mut clock = StageClock::default();
        clock.reached(Stage::Prepare, start);
        clock.reached(Stage::Copy, start + Duration::from_secs(1));
        clock.reached(Stage::Commit, start + Duration::from_secs(3));
        assert_eq!(
            describe(&report, &clock, start + Duration::from_millis(3_500)),
            "vm: prepare 1.0s, copy 2.0s, commit 0.5s\n  \
             diff    8.00 GiB at 4.00 GiB/s, 3 extents of data and 0 of zeroes; 0.5 threads busy, 5% of all\n  \
             reads   2.00 GiB at 1.00 GiB/s; 9.0 threads busy, 90% of all\n  \
             writes  1.00 GiB of data at 512.00 MiB/s, 4.00 KiB of zeroes; 0.5 threads busy, 5% of all"
        );
    }

    #[test]
    fn the_slow_stage_of_a_merge_can_be_named() {
        let progress = MergeProgress::default();
        let start = Instant::now();
        let mut clock = StageClock::default();
        clock.reached(Stage::Prepare, start);
        clock.reached(Stage::Verify, start);
        clock.reached(Stage::Copy, start + Duration::from_secs(2));
        clock.reached(Stage::Commit, start + Duration::from_secs(3));
        progress.verify.done.add(1 << 30);
        progress.copy.read.add(1 << 20);
        progress.copy.data.add(1 << 20);
        let told = describe_merge("vm@20261122T173312Z", &progress, &clock, start + Duration::from_secs(3));
        let begin = "vm@20261122T173312Z: prepare 0.0s, verify 2.0s, copy 1.0s, commit 0.0s\n  \
                     verify  1.00 GiB at 512.00 MiB/s\n  diff ";
        assert!(told.starts_with(begin) && !told.contains("take over"), "{told}");
        assert!(told.contains("\n  writes  1.00 MiB of data at 1.00 MiB/s"), "{told}");

        let mut clock = StageClock::default();
        let progress = MergeProgress::default();
        clock.reached(Stage::TakeOver, start);
        progress.take_over.done.add(4 << 20);
        assert_eq!(
            describe_merge("vm", &progress, &clock, start + Duration::from_secs(2)),
            "vm: take over 2.0s\n  take over 4.00 MiB at 2.00 MiB/s"
        );
    }

    #[test]
    fn an_image_that_failed_early_has_no_copy() {
        let report = ImageReport::new("vm", Status::Failed);
        let start = Instant::now();
        let mut clock = StageClock::default();
        clock.reached(Stage::Prepare, start);
        assert_eq!(describe(&report, &clock, start), "vm: prepare 0.0s");
    }
}

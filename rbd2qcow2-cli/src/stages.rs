//! The stages of one image's backup and their rates, so that a slow one can be named.

use std::fmt::Write;
use std::time::{Duration, Instant};

use indicatif::HumanBytes;
use rbd2qcow2_core::progress::{ImageReport, Stage};

use crate::human;

/// The word for a stage.
pub fn word(stage: Stage) -> &'static str {
    match stage {
        Stage::Prepare => "prepare",
        Stage::Snapshot => "snapshot",
        Stage::Empty => "empty",
        Stage::Copy => "copy",
        Stage::Commit => "commit",
        Stage::CleanUp => "clean up",
        _ => "other",
    }
}

/// When an image reached its stages.
#[derive(Debug, Default)]
pub struct StageClock(Vec<(Stage, Instant)>);

impl StageClock {
    /// The image has reached a stage.
    pub fn reached(&mut self, stage: Stage, now: Instant) {
        self.0.push((stage, now));
    }

    /// How long each stage took, in their order, when the last ended at `end`.
    fn times(&self, end: Instant) -> impl Iterator<Item = (Stage, Duration)> + '_ {
        let ends = self.0.iter().skip(1).map(|&(_, start)| start).chain([end]);
        self.0.iter().zip(ends).map(|(&(stage, start), end)| (stage, end.saturating_duration_since(start)))
    }
}

/// Tells how long each stage took, and what the threads of the copy waited for.
pub fn describe(report: &ImageReport, clock: &StageClock, end: Instant) -> String {
    let times: Vec<_> = clock.times(end).collect();
    let mut text = format!("{}: ", human::name(&report.image));
    let words: Vec<_> =
        times.iter().map(|&(stage, time)| format!("{} {}", word(stage), human::duration(time))).collect();
    text.push_str(&words.join(", "));
    let copy = times.iter().filter(|(stage, _)| *stage == Stage::Copy).map(|(_, time)| *time).sum();
    if copy > Duration::ZERO {
        describe_copy(&mut text, report, copy);
    }
    text
}

/// Tells what went through the copy, how fast, and which step kept its threads busy.
fn describe_copy(text: &mut String, report: &ImageReport, wall: Duration) {
    let counters = &report.progress;
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
    fn an_image_that_failed_early_has_no_copy() {
        let report = ImageReport::new("vm", Status::Failed);
        let start = Instant::now();
        let mut clock = StageClock::default();
        clock.reached(Stage::Prepare, start);
        assert_eq!(describe(&report, &clock, start), "vm: prepare 0.0s");
    }
}

//! What a merge tells while it goes on.

use std::sync::Mutex;

use super::*;

/// The stages that were reached.
#[derive(Default)]
struct Stages(Mutex<Vec<Stage>>);

impl MergeObserver for Stages {
    fn stage(&self, stage: Stage) {
        self.0.lock().expect("no panic").push(stage);
    }
}

fn merge(fixture: &Fixture, child: PointName, reuse: Reuse) -> (Way, Vec<Stage>, MergeProgress) {
    let (progress, stages) = (MergeProgress::default(), Stages::default());
    let merge = Merge {
        writer: &fixture.writer(),
        child,
        parent: None,
        options: &options(reuse),
        compressors: &Compressors::default(),
        progress: &progress,
        observer: &stages,
        cancel: &Cancel::new(),
    };
    (merge.run().expect("merged"), stages.0.into_inner().expect("no panic"), progress)
}

fn assert_copied(progress: &MergeProgress) {
    let MergeProgress { verify, copy, .. } = progress;
    assert!(verify.total.get() > 0 && copy.size.get() > 0 && copy.read.get() > 0, "{progress:?}");
    assert_eq!(verify.done.get(), verify.total.get());
    assert_eq!((copy.scanned.get(), copy.read.get()), (copy.size.get(), copy.to_read.get()));
    assert_eq!(progress.written(), copy.data.get());
}

const COPIED: [Stage; 4] = [Stage::Prepare, Stage::Verify, Stage::Copy, Stage::Commit];

#[test]
fn counters_of_a_copy_reach_their_totals() {
    let fixture = Fixture::of_sizes(&[300_000, 250_000]);
    let (way, stages, progress) = merge(&fixture, fixture.names()[1], Reuse::Never);
    assert_eq!((way, &stages[..]), (Way::Copied, &COPIED[..]));
    assert_copied(&progress);
    assert_eq!(progress.take_over.total.get(), 0);
}

#[test]
fn counters_of_a_layer_that_is_reused_reach_their_totals() {
    let fixture = Fixture::of_small_changes(3);
    let names = fixture.names();
    let (way, stages, progress) = merge(&fixture, names[2], Reuse::Always);
    assert_eq!((way, &stages[..]), (Way::UponBase, &COPIED[..]));
    assert_copied(&progress);
    // The large layer is not read.
    assert!(progress.verify.total.get() < 300_000, "{progress:?}");
    let copied = progress.copy.data.get();

    assert_eq!(fixture.catalogue().half_merged().count(), 0, "the point of the large layer is there");
    let mut writer = fixture.writer();
    writer.note_forgetting(&names[..2]).expect("noted");
    writer.forget().expect("forgotten");
    drop(writer);
    let waiting: Vec<_> = fixture.catalogue().half_merged().map(|point| point.name).collect();
    assert_eq!(waiting, [names[2]]);
    let (way, stages, progress) = merge(&fixture, names[2], Reuse::Always);
    assert!(matches!(way, Way::InPlace | Way::Shared), "{way:?}");
    assert_eq!(stages, [Stage::TakeOver, Stage::Commit]);
    let taken_over = &progress.take_over;
    assert_eq!((taken_over.done.get(), taken_over.total.get()), (copied, copied));
    assert_eq!((progress.written(), progress.copy.read.get()), (copied, 0));
    fixture.check_all(&names[2..]);
    assert!(!fixture.catalogue().is_unfinished());
}

//! Points that have lost their layer, and interrupted runs that must not be taken for such.

use super::*;

fn assert_nothing_lost(dest: &Path, what: &str) {
    let catalogue = Catalogue::read(&image_directory(dest, &image()), &image()).expect("read");
    assert!(catalogue.lost().is_empty(), "{what}: {:?}", names(catalogue.directory()));
    assert!(catalogue.problems().is_empty(), "{what}: {:?}", catalogue.problems());
}

fn steps_of(run: impl FnOnce()) -> Vec<String> {
    fault::plan(None);
    run();
    fault::steps()
}

/// The first step of a run that gives a file of the second point its name.
fn first_rename() -> usize {
    let dest = destination();
    let steps = steps_of(|| run(dest.path()).expect("nothing is in the way"));
    let at = steps.iter().position(|step| step.starts_with("rename "));
    at.expect("digests get their name")
}

/// A step fails, and the process dies while it clears up.
#[test]
fn a_crash_while_a_failed_run_clears_up_loses_no_point() {
    if !qemu_img_is_there() {
        return;
    }
    for at in first_rename()..number_of_steps() - 1 {
        for later in 0..8 {
            let dest = destination();
            let before = untouchable(dest.path());
            fault::plan(Some((at, Fault::FailThenCrash(later))));
            run(dest.path()).expect_err("the failure is reported");
            fault::plan(None);
            assert_nothing_lost(dest.path(), &format!("step {at} and {later} more"));
            check_recovery(dest.path(), at, &before);
        }
    }
}

/// The run after an interrupted one dies as well.
#[test]
fn a_crash_while_left_overs_are_removed_loses_no_point() {
    if !qemu_img_is_there() {
        return;
    }
    for at in first_rename()..number_of_steps() - 1 {
        for later in 0..12 {
            let dest = destination();
            let before = untouchable(dest.path());
            fault::plan(Some((at, Fault::Crash)));
            run(dest.path()).expect_err("the crash is noticed");
            fault::plan(Some((later, Fault::Crash)));
            let _ = ChainWriter::open(dest.path(), &image());
            fault::plan(None);
            assert_nothing_lost(dest.path(), &format!("step {at} and step {later} of the next run"));
            check_recovery(dest.path(), at, &before);
        }
    }
}

/// Removes the newer one of two points.
fn removing(dest: &Path) -> Result<(), ChainError> {
    let writer = ChainWriter::open(dest, &image())?;
    writer.remove_point(point(SECOND))
}

fn two_points() -> tempfile::TempDir {
    let dest = tempfile::tempdir().expect("a directory");
    let mut writer = ChainWriter::open(dest.path(), &image()).expect("opened");
    back_up(&mut writer, point(FIRST)).expect("committed");
    back_up(&mut writer, point(SECOND)).expect("committed");
    dest
}

#[test]
fn a_crash_while_a_point_is_removed_loses_no_point() {
    if !qemu_img_is_there() {
        return;
    }
    let dest = two_points();
    let steps = steps_of(|| removing(dest.path()).expect("nothing is in the way"));
    let expected = [
        "replace .vm%2F1@20261123T173307Z.qcow2.partial",
        "sync directory vm%2F1",
        "remove vm%2F1@20261123T173307Z.json",
        "sync directory vm%2F1",
        "remove .vm%2F1@20261123T173307Z.qcow2.partial",
        "remove vm%2F1@20261123T173307Z.digests",
    ];
    assert_eq!(steps[steps.len() - expected.len()..], expected);
    for fault in [Fault::Crash, Fault::Fail] {
        for at in 0..steps.len() {
            let dest = two_points();
            fault::plan(Some((at, fault)));
            removing(dest.path()).expect_err("the fault is noticed");
            fault::plan(None);
            assert_nothing_lost(dest.path(), &format!("{fault:?} at step {at}"));
            let writer = ChainWriter::open(dest.path(), &image()).expect("the next run opens the chain");
            let there: Vec<_> = writer.catalogue().points().iter().map(|found| found.name).collect();
            let whole = there.contains(&point(SECOND));
            let files = if whole { files_of(&[FIRST, SECOND]) } else { files_of(&[FIRST]) };
            assert_eq!(names(writer.directory()), files, "{fault:?} at step {at}");
        }
    }
}

#[test]
fn nothing_of_a_lost_point_is_removed() {
    if !qemu_img_is_there() {
        return;
    }
    let dest = two_points();
    let directory = dest.path().join("vm%2F1");
    let layer = directory.join(format!("vm%2F1@{SECOND}.qcow2"));
    let content = fs::read(&layer).expect("there");
    fs::remove_file(&layer).expect("removed");
    let left = names(&directory);
    let mut writer = ChainWriter::open(dest.path(), &image()).expect("opened");
    assert!(writer.removed().is_empty());
    assert_eq!(names(&directory), left);
    // The name is not given away, and the next point is made upon what is there.
    let (name, back) = writer.next_point(point(FIRST).timestamp()).expect("a point");
    assert_eq!((name.to_string().as_str(), back), ("20261123T173308Z", true));
    let made = back_up(&mut writer, name).expect("committed");
    assert_eq!(made.manifest.parent, Some(point(FIRST)));
    assert_eq!(writer.catalogue().lost().len(), 1);
    // The file is found again.
    fs::write(&layer, content).expect("written");
    writer.refresh().expect("read");
    assert!(writer.catalogue().problems().is_empty(), "{:?}", writer.catalogue().problems());
    assert_eq!(writer.catalogue().points().len(), 3);
}

#[test]
fn an_image_with_nothing_but_a_lost_point_is_no_stranger() {
    if !qemu_img_is_there() {
        return;
    }
    let dest = tempfile::tempdir().expect("a directory");
    let mut writer = ChainWriter::open(dest.path(), &image()).expect("opened");
    let made = back_up(&mut writer, point(FIRST)).expect("committed");
    let chain = made.manifest.record.chain;
    fs::remove_file(&made.path).expect("removed");
    drop(writer);
    let writer = ChainWriter::open_existing(dest.path(), &image()).expect("there was one");
    assert_eq!(writer.own_chains().expect("readable"), [chain]);
    assert!(writer.catalogue().is_missed(point(FIRST)) && !writer.catalogue().is_empty());
}

/// What a merge has left under the name of the lost layer is not that layer.
#[test]
fn another_layer_aside_makes_no_lost_point_a_left_over() {
    if !qemu_img_is_there() {
        return;
    }
    let size = VIRTUAL_SIZE.next_multiple_of(512);
    let make_whole = |path: &Path| create_layer(path, size, None);
    let make_half: fn(&Path) = |path| fs::write(path, vec![0; 1 << 16]).expect("written");
    for make in [&make_whole as &dyn Fn(&Path), &make_half] {
        let dest = two_points();
        let directory = dest.path().join("vm%2F1");
        fs::remove_file(directory.join(format!("vm%2F1@{SECOND}.qcow2"))).expect("removed");
        make(&directory.join(format!(".vm%2F1@{SECOND}.qcow2.partial")));
        let left = names(&directory);
        let writer = ChainWriter::open(dest.path(), &image()).expect("opened");
        assert_eq!(writer.catalogue().lost().len(), 1);
        // It may be of use to somebody who mends the chain, and goes with the manifest.
        assert_eq!(names(&directory), left);
        drop(writer);
        fs::remove_file(directory.join(format!("vm%2F1@{SECOND}.json"))).expect("removed");
        let writer = ChainWriter::open(dest.path(), &image()).expect("opened");
        assert_eq!((writer.removed().len(), names(&directory)), (2, files_of(&[FIRST])));
    }
}

/// What a run of an older version has left that was to remove the point, and has said so.
#[test]
fn a_lost_point_that_was_to_be_forgotten_is() {
    if !qemu_img_is_there() {
        return;
    }
    let dest = two_points();
    let writer = ChainWriter::open(dest.path(), &image()).expect("opened");
    writer.note_forgetting(&[point(SECOND)]).expect("noted");
    fs::remove_file(writer.directory().join(format!("vm%2F1@{SECOND}.qcow2"))).expect("removed");
    drop(writer);
    let writer = ChainWriter::open(dest.path(), &image()).expect("opened");
    assert_eq!(names(writer.directory()), files_of(&[FIRST]));
}

//! Power failures. Of what was done to the names of a directory since it was synced, any part may be on the
//! disk, in any order: every such state is made, and looked at.

use std::collections::BTreeSet;

use super::*;

/// What happens to a directory.
#[derive(Clone, Debug)]
enum Event {
    /// A file gets a name.
    Create(String),
    /// A file gets another name.
    Rename(String, String),
    /// A name goes.
    Remove(String),
    /// All that was done so far stays.
    Sync,
}
use Event::{Create, Remove, Rename, Sync};

/// The events behind the steps of a run; those of another directory, and of files' content, are none.
fn events(steps: &[String]) -> Vec<Event> {
    let mut events = Vec::new();
    for step in steps {
        let (operation, name) = step.rsplit_once(' ').expect("an operation and a name");
        let (name, partial) = (name.to_owned(), format!(".{name}.partial"));
        match operation {
            "create" => {
                events.push(Create(name.clone()));
                // The layer is made by its writer.
                if let Some(stem) = name.strip_suffix(".digests.partial") {
                    events.push(Create(format!("{stem}.qcow2.partial")));
                }
            }
            "rename" => events.push(Rename(partial, name)),
            // Only the removal of a point does that: the reverse of the commit.
            "replace" => {
                let layer = name.strip_prefix('.').and_then(|name| name.strip_suffix(".partial"));
                events.push(Rename(layer.expect("a partial file").to_owned(), name));
            }
            "remove" => events.push(Remove(name)),
            "sync directory" if name == "vm%2F1" => events.push(Sync),
            _ => {}
        }
    }
    events
}

fn happen(names: &mut BTreeSet<String>, event: &Event) {
    match event {
        Create(name) => _ = names.insert(name.clone()),
        Rename(from, to) if names.remove(from) => _ = names.insert(to.clone()),
        Remove(name) => _ = names.remove(name),
        Rename(..) | Sync => {}
    }
}

/// All names that a power failure can leave.
fn states(before: &BTreeSet<String>, events: &[Event]) -> BTreeSet<BTreeSet<String>> {
    let (mut synced, mut found) = (before.clone(), BTreeSet::from([before.clone()]));
    let mut pending: Vec<&Event> = Vec::new();
    for event in events {
        if let Sync = event {
            for event in pending.drain(..) {
                happen(&mut synced, event);
            }
        } else {
            pending.push(event);
        }
        assert!(pending.len() < 10, "too many at once to try all parts");
        for part in 0..1_u32 << pending.len() {
            let mut names = synced.clone();
            for (_, event) in pending.iter().enumerate().filter(|(number, _)| part >> number & 1 == 1) {
                happen(&mut names, event);
            }
            found.insert(names);
        }
    }
    found
}

/// Makes each state of two points' files, and checks that no point looks lost, that what is left of the second
/// one goes, and that the first is as it was.
fn check(states: &BTreeSet<BTreeSet<String>>) {
    let dest = two_points_apart();
    let directory = dest.path().join("vm%2F1");
    let whole = content(&directory);
    let plain = |name: &str| name.trim_start_matches('.').trim_end_matches(".partial").to_owned();
    for names in states {
        for name in content(&directory).keys() {
            fs::remove_file(directory.join(name)).expect("removed");
        }
        for name in names {
            fs::write(directory.join(name), &whole[&plain(name)]).expect("written");
        }
        let catalogue = Catalogue::read(&directory, &image()).expect("read");
        assert!(catalogue.problems().is_empty(), "{names:?}: {:?}", catalogue.problems());
        let writer = ChainWriter::open(dest.path(), &image()).expect("opened");
        let is_there = writer.catalogue().point(point(SECOND)).is_some();
        let files = if is_there { files_of(&[FIRST, SECOND]) } else { files_of(&[FIRST]) };
        assert_eq!(super::names(&directory), files, "{names:?}");
    }
}

fn two_points_apart() -> tempfile::TempDir {
    let dest = tempfile::tempdir().expect("a directory");
    let mut writer = ChainWriter::open(dest.path(), &image()).expect("opened");
    back_up(&mut writer, point(FIRST)).expect("committed");
    back_up(&mut writer, point(SECOND)).expect("committed");
    dest
}

fn files(points: &[&str]) -> BTreeSet<String> {
    files_of(points).into_iter().collect()
}

/// The steps of a second backup, with a failure at the first step that begins so, or without.
fn steps_of_a_backup(failure: Option<&str>) -> Vec<String> {
    let dest = tempfile::tempdir().expect("a directory");
    let mut writer = ChainWriter::open(dest.path(), &image()).expect("opened");
    back_up(&mut writer, point(FIRST)).expect("committed");
    fault::plan(None);
    back_up(&mut writer, point(SECOND)).expect("committed");
    let steps = fault::steps();
    let Some(failure) = failure else { return steps };
    let at = steps.iter().position(|step| step.starts_with(failure)).expect("such a step");
    writer.remove_point(point(SECOND)).expect("removed");
    writer.refresh().expect("read");
    fault::plan(Some((at, Fault::Fail)));
    back_up(&mut writer, point(SECOND)).expect_err("the failure is told");
    let mut steps = fault::steps();
    steps.remove(at);
    steps
}

#[test]
fn a_commit_that_loses_power_leaves_no_lost_point() {
    if !qemu_img_is_there() {
        return;
    }
    let states = states(&files(&[FIRST]), &events(&steps_of_a_backup(None)));
    assert!(states.len() >= 12 && states.contains(&files(&[FIRST, SECOND])), "{states:?}");
    check(&states);
}

#[test]
fn a_failed_commit_that_loses_power_leaves_no_lost_point() {
    if !qemu_img_is_there() {
        return;
    }
    let layer = format!("rename vm%2F1@{SECOND}.qcow2");
    let manifest = format!("rename vm%2F1@{SECOND}.json");
    for failure in [&layer, &manifest] {
        let states = states(&files(&[FIRST]), &events(&steps_of_a_backup(Some(failure))));
        assert!(states.len() >= 12 && states.contains(&files(&[FIRST])), "{states:?}");
        check(&states);
    }
}

#[test]
fn a_removal_that_loses_power_leaves_no_lost_point() {
    if !qemu_img_is_there() {
        return;
    }
    let dest = two_points_apart();
    let writer = ChainWriter::open(dest.path(), &image()).expect("opened");
    fault::plan(None);
    writer.remove_point(point(SECOND)).expect("removed");
    let states = states(&files(&[FIRST, SECOND]), &events(&fault::steps()));
    assert!(states.len() > 5 && states.contains(&files(&[FIRST])), "{states:?}");
    check(&states);
}

/// The next run removes what one has left that lost power behind its manifest's name.
#[test]
fn left_overs_whose_removal_loses_power_are_no_lost_point() {
    if !qemu_img_is_there() {
        return;
    }
    let dest = two_points_apart();
    let directory = dest.path().join("vm%2F1");
    let layer = format!("vm%2F1@{SECOND}.qcow2");
    fs::rename(directory.join(&layer), directory.join(format!(".{layer}.partial"))).expect("renamed");
    let before = names(&directory).into_iter().collect();
    fault::plan(None);
    drop(ChainWriter::open(dest.path(), &image()).expect("opened"));
    let states = states(&before, &events(&fault::steps()));
    assert!(states.len() > 4 && states.contains(&files(&[FIRST])), "{states:?}");
    check(&states);
}

use std::fs;

use super::*;
use crate::chain::Catalogue;
use crate::chain::durable::fault::{self, Fault};
use crate::testing::Fixture;

fn writer(fixture: &Fixture) -> ChainWriter {
    ChainWriter::open(fixture.dest.path(), &fixture.image).expect("opened")
}

fn catalogue(fixture: &Fixture) -> Catalogue {
    Catalogue::read(&fixture.directory(), &fixture.image).expect("read")
}

/// Which points are suspect, the oldest first.
fn suspects(fixture: &Fixture) -> Vec<bool> {
    let catalogue = catalogue(fixture);
    assert!(catalogue.problems().is_empty(), "{:?}", catalogue.problems());
    catalogue.points().iter().map(|point| catalogue.suspicion(point).is_some()).collect()
}

fn suspect(fixture: &Fixture, index: usize, offsets: &[u64]) -> Result<(), ChainError> {
    let writer = writer(fixture);
    writer.suspect(&writer.catalogue().points()[index], Doubt::Differs, offsets)
}

#[test]
fn points_up_to_the_one_that_was_found_are_suspect() {
    let fixture = Fixture::of_sizes(&[1 << 20, 1 << 20, 1 << 20, 1 << 20]);
    assert_eq!(suspects(&fixture), [false; 4]);
    suspect(&fixture, 2, &[4096, 8192]).expect("noted");
    assert_eq!(suspects(&fixture), [true, true, true, false]);
    let before = catalogue(&fixture).suspicions().to_vec();
    assert_eq!(
        (before.len(), &before[0].offsets[..], before[0].doubt),
        (1, &[4096, 8192][..], Doubt::Differs)
    );
    // A later finding takes the place of the one before; an older one adds nothing.
    suspect(&fixture, 3, &[]).expect("noted");
    suspect(&fixture, 1, &[]).expect("noted");
    assert_eq!(suspects(&fixture), [true; 4]);
    // It is not cleared away with what killed runs leave.
    drop(writer(&fixture));
    assert_eq!(suspects(&fixture), [true; 4]);
}

#[test]
fn points_of_the_python_tool_are_suspect_with_the_chain_upon_them() {
    let fixture = Fixture::begun_by_python(2, &[1 << 20, 1 << 20, 1 << 20, 1 << 20]);
    suspect(&fixture, 2, &[0]).expect("noted");
    assert_eq!(suspects(&fixture), [true, true, true, false]);
    let fixture = Fixture::begun_by_python(2, &[1 << 20, 1 << 20, 1 << 20]);
    suspect(&fixture, 1, &[0]).expect("noted");
    assert_eq!(suspects(&fixture), [true, true, false]);
}

#[test]
fn a_note_that_concerns_nobody_goes() {
    let fixture = Fixture::of_sizes(&[1 << 20, 1 << 20, 1 << 20]);
    suspect(&fixture, 0, &[0]).expect("noted");
    let mut writer = writer(&fixture);
    writer.settle_suspicions().expect("settled");
    assert_eq!(suspects(&fixture), [true, false, false]);
    for kind in ["qcow2", "json", "digests"] {
        let name = fixture.points[0].0;
        fs::remove_file(fixture.directory().join(format!("vm@{name}.{kind}"))).expect("removed");
    }
    writer.refresh().expect("read");
    writer.settle_suspicions().expect("settled");
    assert!(!fixture.directory().join(SUSPECT_FILE).exists());
}

#[test]
fn a_note_that_cannot_be_read_concerns_all_points_until_one_was_compared() {
    let mut fixture = Fixture::of_sizes(&[1 << 20, 1 << 20]);
    suspect(&fixture, 0, &[0]).expect("noted");
    let path = fixture.directory().join(SUSPECT_FILE);
    let text = fs::read_to_string(&path).expect("read").replace("differs", "Differs");
    fs::remove_file(&path).expect("removed");
    fs::write(&path, text).expect("written");
    assert_eq!(suspects(&fixture), [true, true]);
    let described = catalogue(&fixture).suspicions()[0].describe();
    assert!(described.contains("cannot be read"), "{described}");
    let writer = writer(&fixture);
    writer.settle_suspicions().expect("settled");
    drop(writer);
    fixture.back_up(&crate::testing::plain(), vec![5; 1 << 20]);
    assert_eq!(suspects(&fixture), [true, true, false]);
}

#[test]
fn a_failure_at_any_step_leaves_a_note_that_can_be_read() {
    for at in 0.. {
        let fixture = Fixture::of_sizes(&[1 << 20, 1 << 20]);
        suspect(&fixture, 0, &[0]).expect("noted");
        let writer = writer(&fixture);
        fault::plan(Some((at, Fault::Fail)));
        let noted = writer.suspect(&writer.catalogue().points()[1], Doubt::Differs, &[1]);
        fault::plan(None);
        drop(writer);
        assert!(suspects(&fixture)[0], "step {at}");
        if noted.is_ok() {
            assert!(at >= 4, "{at} steps");
            assert_eq!(suspects(&fixture), [true, true]);
            return;
        }
    }
}

#[test]
fn what_is_said_names_point_and_place() {
    let fixture = Fixture::of_sizes(&[1 << 20]);
    suspect(&fixture, 0, &[12288, 16384]).expect("noted");
    let text = catalogue(&fixture).suspicions()[0].describe();
    let name = fixture.points[0].0.to_string();
    assert!(text.contains(&name) && text.contains("in 2 pages, the first at byte 12288"), "{text}");
}

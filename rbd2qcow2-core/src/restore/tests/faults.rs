//! What keeps a point from being restored.

use super::*;
use crate::chain::durable::fault::{self, Fault};

/// Nothing is left where the file should have been.
fn refused(fixture: &Fixture, result: Result<RestoreReport, RestoreError>) -> RestoreError {
    let error = result.expect_err("not restored");
    assert_eq!(names_in(fixture.out.path()), [""; 0], "{error:?}");
    error
}

/// Writes into a layer, which is read-only.
fn flip(path: &Path, offset: u64, bytes: &[u8]) {
    let mut permissions = fs::metadata(path).expect("there").permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o600);
    fs::set_permissions(path, permissions).expect("changed");
    let file = fs::File::options().write(true).open(path).expect("writable");
    file.write_all_at(bytes, offset).expect("written");
}

/// Where the first L2 table of a layer lies.
fn l2_table(path: &Path) -> u64 {
    let bytes = fs::read(path).expect("readable");
    let number = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    number(number(40) as usize) & 0x00ff_ffff_ffff_fe00
}

#[test]
fn a_damaged_table_is_named_with_the_points_that_do_without() {
    let fixture = Fixture::of_sizes(&[1 << 20, 1 << 20, 1 << 20]);
    let damaged = fixture.layer(1);
    // A bit above all offsets, in the entry of a cluster that the newest layer does not hold.
    flip(&damaged, l2_table(&damaged) + 16, &[0x81]);
    for format in [FileFormat::Raw, FileFormat::Qcow2(Qcow2Options::default())] {
        match refused(&fixture, fixture.to_file(None, &format)) {
            RestoreError::Point(PointError::Damaged { whole, point, cause, .. }) => {
                assert_eq!((cause.path(), point), (Some(&*damaged), fixture.points[2].0));
                assert_eq!(whole, [fixture.points[0].0]);
            }
            other => panic!("{other:?}"),
        }
    }
    let mut stream = Vec::new();
    let error = fixture.restore(None).to_stream(&mut stream, &(), &Cancel::new()).expect_err("damaged");
    let text = Causes(&error).to_string();
    assert!(text.contains(&format!("not affected: {}", fixture.points[0].0)), "{text}");
    assert!(text.contains("of the L2 table"), "{text}");
    fixture.file(Some(fixture.points[0].0), &FileFormat::Raw);
}

#[test]
fn a_layer_that_was_cut_off_or_is_missing_is_named() {
    for remove in [false, true] {
        let fixture = Fixture::of_sizes(&[1 << 20, 1 << 20, 1 << 20]);
        let path = fixture.layer(1);
        if remove {
            fs::remove_file(&path).expect("removed");
        } else {
            flip(&path, 0, b"");
            fs::File::options().write(true).open(&path).expect("writable").set_len(1000).expect("cut off");
        }
        let error = refused(&fixture, fixture.to_file(None, &FileFormat::Raw));
        let text = Causes(&error).to_string();
        assert!(
            matches!(&error, RestoreError::Point(PointError::Broken { whole, .. }) if *whole == [fixture.points[0].0]),
            "{text}"
        );
        let named = if remove { fixture.points[1].0.to_string() } else { path.display().to_string() };
        assert!(text.contains(&named), "{text}");
    }
}

#[test]
fn what_is_not_there_is_told() {
    let fixture = Fixture::of_sizes(&[1 << 20]);
    let mut restore = fixture.restore(None);
    let out = fixture.out.path().join("out");
    let mut run = |change: &dyn Fn(&mut Restore)| {
        change(&mut restore);
        refused(&fixture, restore.to_file(&out, &FileFormat::Raw, &(), &Cancel::new()))
    };
    let point = PointName::parse("20261122T173312Z").expect("a point");
    let error = run(&|restore| restore.point = Some(point));
    assert!(
        matches!(&error, RestoreError::Point(PointError::UnknownPoint { known, .. }) if known.len() == 1),
        "{error:?}"
    );
    assert_eq!(error.to_string(), "image \"vm\" has no point 20261122T173312Z");
    let error = run(&|restore| restore.image = "vm2".into());
    assert!(matches!(error, RestoreError::Point(PointError::UnknownImage { .. })), "{error:?}");
    let error = run(&|restore| restore.image = String::new());
    assert!(matches!(error, RestoreError::Point(PointError::Name(_))), "{error:?}");
    let error = run(&|restore| restore.dest.push("not-mounted"));
    assert!(
        matches!(error, RestoreError::Point(PointError::Chain(ChainError::DestinationMissing { .. }))),
        "{error:?}"
    );
}

/// Also where it looks like an image's.
#[test]
fn a_directory_of_something_else_is_left_alone() {
    let fixture = Fixture::empty("vm");
    fs::create_dir(fixture.directory()).expect("created");
    let error = refused(&fixture, fixture.to_file(None, &FileFormat::Raw));
    assert!(matches!(error, RestoreError::Point(PointError::UnknownImage { .. })), "{error:?}");
    assert_eq!(names_in(&fixture.directory()), [""; 0]);
}

#[test]
fn a_target_is_a_new_file_outside_of_chains() {
    let fixture = Fixture::of_sizes(&[1 << 20]);
    let out = fixture.out.path();
    let to = |path: &Path| fixture.restore(None).to_file(path, &FileFormat::Raw, &(), &Cancel::new());
    let existing = out.join("existing");
    fs::write(&existing, "precious").expect("written");
    assert!(matches!(to(&existing), Err(RestoreError::Exists { .. })));
    assert!(matches!(to(out), Err(RestoreError::Exists { .. })));
    let dangling = out.join("dangling");
    std::os::unix::fs::symlink("nowhere", &dangling).expect("a link");
    assert!(matches!(to(&dangling), Err(RestoreError::Exists { .. })));
    assert!(matches!(to(&out.join("missing/file")), Err(RestoreError::Directory { .. })));
    assert!(matches!(to(&existing.join("file")), Err(RestoreError::Directory { .. })));
    for none in ["", "..", "/", "new/"] {
        assert!(matches!(to(Path::new(none)), Err(RestoreError::NoFile { .. })), "{none}");
    }
    let link = out.join("link");
    std::os::unix::fs::symlink(fixture.directory(), &link).expect("a link");
    let dotted = fixture.dest.path().join("vm").join("..").join("vm").join("file");
    for within in [fixture.directory().join("file"), link.join("file"), dotted] {
        let error = to(&within).expect_err("refused");
        assert!(matches!(error, RestoreError::WithinChain { .. }), "{error:?}");
    }
    assert_eq!(fs::read(&existing).expect("readable"), b"precious");
    assert_eq!(names_in(out).len(), 3);
    assert!(Catalogue::read(&fixture.directory(), &fixture.image).expect("read").problems().is_empty());
    // Beside the images' directories there is no harm.
    to(&fixture.dest.path().join("file")).expect("restored");
}

/// Does something when a stage is reached.
struct At<F>(Stage, F);

impl<F: Fn() + Sync> Observer for At<F> {
    fn stage(&self, _: &str, stage: Stage) {
        if stage == self.0 {
            self.1();
        }
    }
}

#[test]
fn a_stop_leaves_nothing() {
    let fixture = Fixture::of_sizes(&[8 << 20, 8 << 20]);
    let out = fixture.out.path().join("out");
    for stage in [Stage::Prepare, Stage::Copy, Stage::Commit] {
        for format in [FileFormat::Raw, FileFormat::Qcow2(Qcow2Options::default())] {
            let cancel = Cancel::new();
            let observer = At(stage, || cancel.set());
            let result = fixture.restore(None).to_file(&out, &format, &observer, &cancel);
            let error = refused(&fixture, result);
            assert!(matches!(error, RestoreError::Cancelled), "{stage:?}: {error:?}");
        }
    }
    fixture.file(None, &FileFormat::Raw);
}

#[test]
fn the_chain_is_held_until_the_end() {
    let fixture = Fixture::of_sizes(&[1 << 20]);
    let writer = ChainWriter::open(fixture.dest.path(), &fixture.image).expect("opened");
    let error = refused(&fixture, fixture.to_file(None, &FileFormat::Raw));
    assert!(matches!(error, RestoreError::Point(PointError::Chain(ChainError::Locked { .. }))), "{error:?}");
    drop(writer);
    let out = fixture.out.path().join("out");
    let try_to_write = || {
        let error = ChainLock::exclusive(&fixture.directory()).expect_err("held");
        assert!(matches!(error, ChainError::Locked { .. }), "{error:?}");
    };
    let observer = At(Stage::Commit, try_to_write);
    fixture.restore(None).to_file(&out, &FileFormat::Raw, &observer, &Cancel::new()).expect("restored");
    _ = ChainLock::exclusive(&fixture.directory()).expect("free");
}

#[test]
fn a_hostile_backing_file_is_not_followed() {
    let fixture = Fixture::of_sizes(&[1 << 20]);
    let path = fixture.layer(0);
    // Where the header names its backing file: somewhere in itself, of two bytes.
    flip(&path, 8, &[104_u64.to_be_bytes().as_slice(), &2_u32.to_be_bytes()].concat());
    let error = refused(&fixture, fixture.to_file(None, &FileFormat::Raw));
    assert!(
        matches!(&error, RestoreError::Point(PointError::Broken { cause, .. }) if !matches!(**cause, Problem::NoSuchPoint { .. }))
    );
}

#[test]
fn the_name_comes_last_and_is_synced() {
    let fixture = Fixture::of_sizes(&[1 << 20]);
    fault::plan(None);
    let (_, path) = fixture.file(None, &FileFormat::Raw);
    let steps = fault::steps();
    let synced = format!("sync directory {}", fixture.out.path().file_name().expect("a name").display());
    assert_eq!(steps, ["rename out".to_owned(), synced]);
    fs::remove_file(&path).expect("removed");

    fault::plan(Some((0, Fault::Fail)));
    let result = fixture.to_file(None, &FileFormat::Raw);
    fault::plan(None);
    assert!(matches!(refused(&fixture, result), RestoreError::Rename { .. }));

    // The file is whole, but may not be there after a power failure: no success, and nothing to remove.
    fault::plan(Some((1, Fault::Fail)));
    let result = fixture.to_file(None, &FileFormat::Raw);
    fault::plan(None);
    assert!(matches!(result, Err(RestoreError::Uncertain { .. })), "{result:?}");
    assert!(fs::read(&path).expect("there") == fixture.points[0].1);
    assert_eq!(names_in(fixture.out.path()), ["out"]);
}

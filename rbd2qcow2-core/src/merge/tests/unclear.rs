//! What is left where it is not clear, or not possible, what to do with it.

use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;

use super::*;
use crate::chain::ChainError;

/// Three points, of which the middle one was being forgotten when the run died before the first step
/// that `at` names.
fn cut_short(at: impl Fn(&str) -> bool) -> Fixture {
    let sizes = [300_000, 250_000, 300_000];
    let mut clean = Fixture::of_sizes(&sizes);
    let gone = BTreeSet::from([clean.names()[1]]);
    fault::plan(None);
    clean.forget(&gone, Reuse::Never).expect("forgotten");
    let at = fault::steps().iter().rposition(|step| at(step)).expect("such a step");
    let mut fixture = Fixture::of_sizes(&sizes);
    fault::plan(Some((at, Fault::Crash)));
    fixture.forget(&gone, Reuse::Never).expect_err("cut short");
    fault::steps();
    fixture
}

/// Dies when the layer has its name, and nothing else.
fn committed() -> Fixture {
    cut_short(|step| step.starts_with("replace") && step.ends_with(".digests"))
}

impl Fixture {
    /// Overwrites the magic number of a layer's header.
    fn magic(&self, index: usize, magic: &[u8]) {
        let path = self.layer(index);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("writable");
        let file = fs::File::options().write(true).open(&path).expect("opened");
        file.write_all_at(magic, 0).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).expect("read-only");
    }

    fn beside(&self, suffix: &str) -> PathBuf {
        let name = format!(".{}@{}.{suffix}.merged", self.image.encoded(), self.points[2].0);
        self.directory().join(name)
    }

    fn refused(&self) -> ChainError {
        ChainWriter::open(self.dest.path(), &self.image).map(drop).expect_err("refused")
    }

    fn note(&self) -> PathBuf {
        self.directory().join(".forget.json")
    }
}

#[test]
fn what_a_header_cannot_tell_is_left_until_it_can() {
    let fixture = committed();
    fixture.magic(2, &[0; 4]);
    let error = fixture.refused();
    assert!(
        matches!(&error, ChainError::MergeUnclear { path, .. } if *path == fixture.beside("json")),
        "{error}"
    );
    assert!(fixture.beside("json").exists() && fixture.beside("digests").exists());
    fixture.magic(2, b"QFI\xfb");
    drop(fixture.writer());
    fixture.check_all(&[fixture.names()[0], fixture.names()[2]]);
}

#[test]
fn a_manifest_that_no_layer_fits_is_left() {
    let fixture = committed();
    let whole = fs::read(fixture.beside("json")).expect("read");
    let write = |bytes: &[u8]| {
        fs::remove_file(fixture.beside("json")).expect("removed");
        fs::write(fixture.beside("json"), bytes).expect("written");
    };
    write(b"{");
    let error = fixture.refused();
    assert!(error.to_string().contains("no manifest that can be read names"), "{error}");
    write(&whole);
    drop(fixture.writer());
    fixture.check_all(&[fixture.names()[0], fixture.names()[2]]);
}

/// A power failure may keep the later rename and lose the earlier one.
#[test]
fn digests_that_the_manifest_names_are_put_in_place() {
    let fixture = committed();
    fs::rename(fixture.beside("json"), fixture.layer(2).with_extension("json")).expect("renamed");
    drop(fixture.writer());
    fixture.check_all(&[fixture.names()[0], fixture.names()[2]]);
}

/// Of digests that no manifest can be found for, nobody knows whether they are the only ones.
#[test]
fn digests_without_a_manifest_are_left() {
    let fixture = committed();
    let aside = fixture.out.path().join("manifest");
    fs::rename(fixture.beside("json"), &aside).expect("renamed");
    fs::rename(fixture.layer(2).with_extension("json"), fixture.out.path().join("old")).expect("renamed");
    let error = fixture.refused();
    assert!(
        matches!(&error, ChainError::MergeUnclear { path, .. } if *path == fixture.beside("digests")),
        "{error}"
    );
    assert!(fixture.beside("digests").exists());
    fs::rename(&aside, fixture.beside("json")).expect("renamed");
    drop(fixture.writer());
    fixture.check_all(&[fixture.names()[0], fixture.names()[2]]);
}

#[test]
fn nothing_goes_that_a_layer_may_need_whose_parent_is_unknown() {
    let fixture = Fixture::of_sizes(&[300_000, 250_000, 300_000]);
    let names = fixture.names();
    let manifest = fixture.layer(2).with_extension("json");
    let bytes = fs::read(&manifest).expect("read");
    fs::remove_file(&manifest).expect("removed");
    fixture.writer().note_forgetting(&[names[1]]).expect("noted");
    fixture.magic(2, &[0; 4]);
    drop(fixture.writer());
    assert!(fixture.layer(1).exists() && fixture.note().exists());
    // Something at the layer's place that is no file.
    let aside = fixture.out.path().join("layer");
    fs::rename(fixture.layer(2), &aside).expect("renamed");
    std::os::unix::fs::symlink(&aside, fixture.layer(2)).expect("a link");
    drop(fixture.writer());
    assert!(fixture.layer(1).exists() && fixture.note().exists());
    fs::rename(&aside, fixture.layer(2)).expect("renamed");
    fixture.magic(2, b"QFI\xfb");
    fs::write(&manifest, bytes).expect("written");
    // It builds upon the point, which stays; the note has had its say.
    drop(fixture.writer());
    fixture.check_all(&names);
}

#[test]
fn a_note_that_is_not_ours_asks_for_nothing() {
    let other = Fixture::of_sizes(&[100_000, 100_000]);
    other.writer().note_forgetting(&other.names()[1..]).expect("noted");
    let bytes = fs::read(other.note()).expect("read");
    let text = String::from_utf8(bytes.clone()).expect("text");
    let mut others = vec![text.replacen("20231114", "20231115", 1).into_bytes(), b"{}".to_vec(), Vec::new()];
    others.push(text.replace("  ", " ").into_bytes());
    for bytes in others {
        fs::remove_file(other.note()).expect("removed");
        fs::write(other.note(), bytes).expect("written");
        assert!(other.writer().forget().expect("nothing to do").is_empty());
        assert!(other.layer(1).exists());
    }
    // That of another image.
    let mut fixture = Fixture::empty("vm2");
    fixture.back_up(&plain(), vec![1; 5000]);
    fixture.back_up(&plain(), vec![2; 5000]);
    fs::write(fixture.note(), &bytes).expect("written");
    drop(fixture.writer());
    assert!(fixture.layer(1).exists());
    fs::remove_file(fixture.note()).expect("removed");
    fixture.writer().note_forgetting(&fixture.names()[1..]).expect("noted");
    fixture.writer().withdraw_forgetting().expect("nothing is left to withdraw");
    assert!(!fixture.layer(1).exists());
}

#[test]
fn a_note_can_be_withdrawn() {
    let fixture = Fixture::of_sizes(&[100_000, 100_000]);
    let writer = fixture.writer();
    writer.note_forgetting(&fixture.names()[1..]).expect("noted");
    assert!(Catalogue::read(&fixture.directory(), &fixture.image).expect("read").is_unfinished());
    writer.withdraw_forgetting().expect("withdrawn");
    drop(writer);
    drop(fixture.writer());
    fixture.check_all(&fixture.names());
}

#[test]
fn what_cannot_be_removed_stops_no_backup() {
    let mut fixture = Fixture::of_sizes(&[100_000, 100_000, 100_000]);
    let names = fixture.names();
    let gone = BTreeSet::from([names[1]]);
    let mut writer = fixture.writer();
    writer.note_forgetting(&[names[1]]).expect("noted");
    merge_around(&mut writer, &gone, Reuse::Never).expect("merged");
    drop(writer);
    let layer = fixture.layer(1);
    let name = layer.file_name().expect("a name").to_string_lossy();
    let removes = (0..20).any(|at| {
        fault::plan(Some((at, Fault::Fail)));
        let opened = ChainWriter::open(fixture.dest.path(), &fixture.image);
        let removes = fault::steps().get(at) == Some(&format!("replace .{name}.partial"));
        assert!(!removes || opened.is_ok() && layer.exists() && fixture.note().exists(), "{opened:?}");
        removes
    });
    assert!(removes);
    fixture.back_up(&plain(), vec![1; 5000]);
    let there = [names[0], names[2], fixture.points[3].0];
    fixture.check_all(&there);
}

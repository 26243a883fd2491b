//! Points of the Python tool, which never had digests.

use std::os::unix::fs::PermissionsExt;

use super::refused::{contents, merge, noise, rot, write_at};
use super::*;
use crate::chain::catalogue::PYTHON_ROOT;
use crate::chain::hold;
use crate::chain::manifest::Hold;
use crate::layer::native::testing::Form;
use crate::layer::{Compression, ExtendedL2};
use crate::testing::plain;
use crate::verify::{Unverified, reason};

const SIZES: [usize; 4] = [300_000, 250_000, 300_000, 350_000];

#[test]
fn crashes_at_every_step_harm_no_chain_of_the_python_tool() {
    for gone in [&[1, 2][..], &[0]] {
        crash_at_every_step_of_a_chain_begun_by_python(4, gone, Reuse::Never);
    }
}

#[test]
fn crashes_at_every_step_harm_no_chain_that_the_python_tool_began() {
    for gone in [&[0, 1][..], &[1], &[1, 2]] {
        crash_at_every_step_of_a_chain_begun_by_python(2, gone, Reuse::Never);
    }
}

fn unverified(fixture: &Fixture, name: PointName) -> Vec<PointName> {
    let catalogue = fixture.catalogue();
    let manifest = catalogue.point(name).expect("there").manifest.clone().expect("a manifest");
    manifest.unverified.into_iter().collect()
}

fn status(fixture: &Fixture, name: PointName) -> VerifyStatus {
    fixture.verify().into_iter().find(|report| report.point == name).expect("there").status
}

/// The everyday case: a chain that the Python tool began is continued, and its points go, one by one.
#[test]
fn what_was_taken_over_is_remembered_as_long_as_it_may_be_there() {
    let mut fixture = Fixture::begun_by_python(2, &SIZES);
    let names = fixture.names();
    let mut there = names.clone();
    fixture.check_all(&there);
    // A point of the Python tool takes over another, and becomes a full one.
    fixture.forget(&[there.remove(0)].into(), Reuse::Never).expect("forgotten");
    fixture.check_all(&there);
    let first = fixture.catalogue().points()[0].clone();
    assert!(first.manifest.is_none() && first.header.expect("readable").backing.is_none());
    // Its own layer is what the next one takes over.
    fixture.forget(&[there.remove(0)].into(), Reuse::Never).expect("forgotten");
    fixture.check_all(&there);
    assert_eq!(unverified(&fixture, names[2]), [names[1]]);
    assert!(unverified(&fixture, names[3]).is_empty());
    let reports = fixture.verify();
    let gap = Unverified::TakenOver { point: names[2], from: vec![names[1]] };
    for report in &reports {
        assert_eq!(report.unverified, std::slice::from_ref(&gap));
        let words = reason(&report.unverified);
        let expected = format!("{} took over data of {}, which never had digests", names[2], names[1]);
        assert_eq!(words, expected);
    }
    // All of its data are held against the digests of the merge nevertheless.
    assert!(reports[0].checked_bytes > 100_000, "{reports:?}");
    // A hold, and its end, leave that as it is; and so does the next merge.
    let held = Hold { reason: "the audit".to_owned(), since: jiff::Timestamp::UNIX_EPOCH };
    hold::hold(fixture.dest.path(), &fixture.image, names[2], &held).expect("held");
    assert_eq!(unverified(&fixture, names[2]), [names[1]]);
    hold::release(fixture.dest.path(), &fixture.image, names[2]).expect("released");
    fixture.check_all(&there);
    fixture.forget(&[there.remove(0)].into(), Reuse::Never).expect("forgotten");
    fixture.check_all(&there);
    assert_eq!(unverified(&fixture, names[3]), [names[1]]);
    // What builds upon it shows some of that.
    fixture.back_up(&plain(), vec![1; 5000]);
    assert_eq!(status(&fixture, fixture.points[4].0), VerifyStatus::Unverifiable);
}

#[test]
fn damage_since_the_merge_is_found() {
    let mut fixture = Fixture::empty("vm");
    let mut content = [noise(1), noise(1 << 20)].concat();
    fixture.back_up_as_python(&plain(), content.clone());
    content[..4096].fill(4);
    fixture.back_up(&plain(), content.clone());
    content[4096..8192].fill(5);
    fixture.back_up(&plain(), content);
    let names = fixture.names();
    fixture.forget(&[names[0]].into(), Reuse::Never).expect("forgotten");
    fixture.check_all(&names[1..]);
    rot(&fixture.layer(1), &noise(1 << 20)[40_960..45_056]);
    for name in &names[1..] {
        assert_eq!(status(&fixture, *name), VerifyStatus::Damaged);
    }
    let error = merge(&fixture, names[2], None).expect_err("damaged");
    assert!(matches!(&error, MergeError::Damaged { from, .. } if *from == names[1]), "{error:?}");
}

/// Clusters that are filled up with what the layers below hold: that is copied, too.
#[test]
fn what_surrounds_the_merged_data_counts_as_well() {
    let small = Form { cluster_bits: 12, extended_l2: ExtendedL2::Off, ..plain() };
    let large =
        Form { cluster_bits: 16, extended_l2: ExtendedL2::Off, compression: Compression::None, ..plain() };
    for (form, python) in [(&small, false), (&large, true)] {
        let mut fixture = Fixture::empty("vm");
        let mut content = [noise(1), noise(1 << 20)].concat();
        fixture.back_up_as_python(&small, content.clone());
        for (at, form) in [(1 << 16, &small), (0, form)] {
            content[at..at + 4096].fill(3);
            fixture.back_up(form, content.clone());
        }
        let names = fixture.names();
        fixture.forget(&[names[1]].into(), Reuse::Never).expect("forgotten");
        fixture.check_all(&[names[0], names[2]]);
        let expected: &[PointName] = if python { &names[..1] } else { &[] };
        assert_eq!(unverified(&fixture, names[2]), expected);
    }
}

/// Changes what a table of the layer says of its clusters, not where they are.
fn damage_structure(fixture: &Fixture, index: usize) {
    let path = fixture.layer(index);
    let bytes = fs::read(&path).expect("read");
    let number = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    let offset = |entry: u64| (entry & 0x00ff_ffff_ffff_fe00) as usize;
    let l1 = number(40) as usize;
    let l2 = offset(number(l1));
    let entry = (l2..).step_by(8).find(|at| number(*at) >> 63 == 1).expect("a cluster");
    write_at(&path, &[bytes[entry] & 0x7f], entry as u64);
}

#[test]
fn a_layer_whose_structure_is_damaged_is_merged_into_nothing() {
    for python in [2, 4] {
        let fixture = Fixture::begun_by_python(python, &SIZES);
        let names = fixture.names();
        damage_structure(&fixture, 1);
        drop(fixture.writer());
        let before = contents(&fixture.directory());
        let error = merge(&fixture, names[2], Some(names[0])).expect_err("damaged");
        assert!(matches!(&error, MergeError::Damaged { from, .. } if *from == names[1]), "{error:?}");
        assert!(contents(&fixture.directory()) == before);
        assert_eq!(status(&fixture, names[1]), VerifyStatus::Damaged);
    }
}

/// That is damage, and no other point's lack of digests excuses it.
#[test]
fn digests_that_were_lost_are_no_python_points() {
    let lost = |suffix: &str| {
        let fixture = Fixture::begun_by_python(1, &SIZES);
        fs::remove_file(fixture.layer(2).with_extension(suffix)).expect("removed");
        fixture
    };
    for suffix in ["digests", "json"] {
        let fixture = lost(suffix);
        let names = fixture.names();
        for parent in [Some(names[1]), Some(names[0]), None] {
            let before = contents(&fixture.directory());
            let error = merge(&fixture, names[3], parent).expect_err("nothing to verify by");
            assert!(matches!(&error, MergeError::NoDigests { from, .. } if *from == names[2]), "{error:?}");
            assert!(contents(&fixture.directory()) == before);
        }
        // Of points above, too, nobody knows.
        assert_eq!(status(&fixture, names[2]), VerifyStatus::Damaged);
        assert_eq!(status(&fixture, names[3]), VerifyStatus::Unverifiable);
    }
    // Something that bears a manifest's or digests' name once was, or is to be, more than that tool's point.
    for suffix in ["digests", "json"] {
        let fixture = Fixture::begun_by_python(1, &SIZES);
        let names = fixture.names();
        fs::write(fixture.layer(0).with_extension(suffix), b"{}").expect("written");
        let error = merge(&fixture, names[1], None).expect_err("nothing to verify by");
        assert!(matches!(&error, MergeError::NoDigests { from, .. } if *from == names[0]), "{error:?}");
    }
}

/// Only the manifest tells that data were taken over.
#[test]
fn a_lost_manifest_makes_no_point_above_ok() {
    let mut fixture = Fixture::begun_by_python(1, &SIZES);
    let names = fixture.names();
    fixture.forget(&[names[0]].into(), Reuse::Never).expect("forgotten");
    fs::remove_file(fixture.layer(1).with_extension("json")).expect("removed");
    let reports = fixture.verify();
    let statuses: Vec<_> = reports.iter().map(|report| report.status).collect();
    assert_eq!(statuses, [VerifyStatus::Damaged, VerifyStatus::Unverifiable, VerifyStatus::Unverifiable]);
    assert_eq!(reports[2].unverified, [Unverified::NoManifest { point: names[1] }]);
}

/// The Python tool's files belong to whoever made them; the root is not ours to remove.
#[test]
fn owner_mode_and_root_stay() {
    let mut fixture = Fixture::begun_by_python(3, &SIZES[..3]);
    let names = fixture.names();
    let root = fixture.directory().join(PYTHON_ROOT);
    let before = fs::read(&root).expect("there");
    fs::set_permissions(fixture.layer(2), fs::Permissions::from_mode(0o644)).expect("changed");
    fixture.forget(&names[..2].iter().copied().collect(), Reuse::Never).expect("forgotten");
    fixture.check_all(&names[2..]);
    let mode = fs::metadata(fixture.layer(2)).expect("there").permissions().mode();
    assert_eq!(mode & 0o7777, 0o444);
    assert_eq!(fs::read(&root).expect("there"), before);
    // It is not needed any more, and may go.
    fs::remove_file(&root).expect("removed");
    assert!(fixture.catalogue().problems().is_empty());
    fixture.check_content();
}

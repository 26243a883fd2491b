//! Merges that do not copy the oldest layer.

use std::cell::Cell;
use std::os::unix::fs::MetadataExt;

use proptest::test_runner::TestRunner;

use super::refused::rot;
use super::*;
use crate::layer::native::testing::{Form, Stretch, next_content};
use crate::layer::{Compression, ExtendedL2};
use crate::testing::plain;

/// What distinguishes a file from all others, whatever its name.
fn file_of(fixture: &Fixture, index: usize) -> u64 {
    fs::metadata(fixture.layer(index)).expect("there").ino()
}

/// Forms of layers that are alike: only how they are packed, and what the source reports, differ.
fn forms() -> impl Strategy<Value = Vec<Form>> {
    let zstd = || Just(Compression::Zstd { level: None });
    let kind = prop_oneof![
        Just(vec![Compression::None; 6]),
        prop::collection::vec(zstd(), 6),
        // An unpacked file counts as one of zlib.
        prop::collection::vec(prop_oneof![Just(Compression::Zlib), Just(Compression::None)], 6),
    ];
    let extended_l2 = prop_oneof![3 => Just(ExtendedL2::Auto), 1 => Just(ExtendedL2::Off)];
    (12_u32..=17, extended_l2, kind, 1_usize..100_000).prop_map(
        |(cluster_bits, extended_l2, kinds, block)| {
            kinds
                .into_iter()
                .map(|compression| Form { cluster_bits, extended_l2, compression, block })
                .collect()
        },
    )
}

type Changes = Vec<(usize, Stretch)>;

/// Forms of the layers, size of the image, changes, which points go, and what is backed up in between.
type History = (Vec<Form>, usize, Vec<Changes>, Vec<(Option<Index>, usize)>, Changes);

/// Small changes, far apart.
fn changes() -> impl Strategy<Value = Changes> {
    let stretch = prop_oneof![
        1 => Just(Stretch::Zeroes),
        2 => any::<u64>().prop_map(Stretch::Text),
        2 => any::<u64>().prop_map(Stretch::Noise),
    ];
    let change = (1_usize..200_000, 1_usize..20_000, stretch);
    prop::collection::vec(change, 1..8).prop_map(|changes| {
        let changes = changes
            .into_iter()
            .flat_map(|(gap, length, stretch)| [(gap, Stretch::Old), (length, stretch)])
            .chain([(usize::MAX / 4, Stretch::Old)]);
        changes.collect()
    })
}

/// Points go in any order, several at once, and backups go on in between.
#[test]
fn what_stays_reads_the_same_whatever_takes_over_in_place() {
    let (reused, all) = (Cell::new(0), Cell::new(0));
    // The oldest first, half of the time: that is what goes night after night, and what can be reused.
    let which = prop_oneof![Just(None), any::<Index>().prop_map(Some)];
    let going = prop::collection::vec((which, 1_usize..4), 1..5);
    let strategy = (forms(), 1_usize..1_500_000, prop::collection::vec(changes(), 5), going, changes());
    let run = |(forms, size, changes, going, next): History| {
        let mut fixture = Fixture::empty("vm/1");
        let root = vec![(90_000, Stretch::Text(3)), (50_000, Stretch::Noise(5)), (30_000, Stretch::Zeroes)];
        for (form, stretches) in forms.iter().zip([root].into_iter().chain(changes)) {
            let old = fixture.points.last().map_or(&[][..], |(_, content)| content);
            fixture.back_up(form, next_content(old, &(size, stretches)));
        }
        let mut there = fixture.names();
        for (number, (which, count)) in going.into_iter().enumerate() {
            if there.len() < 2 {
                break;
            }
            let start = which.map_or(0, |which| which.index(there.len() - 1));
            let end = (start + count).min(there.len() - 1);
            let gone: BTreeSet<_> = there.drain(start..end).collect();
            fault::plan(None);
            fixture.forget(&gone, Reuse::Always).expect("forgotten");
            let steps = fault::steps();
            all.set(all.get() + 1);
            reused.set(reused.get() + usize::from(steps.iter().any(|step| step.starts_with("write to"))));
            fixture.check_all(&there);
            if number == 1 {
                let old = &fixture.points.last().expect("some").1;
                let content = next_content(old, &(size, next.clone()));
                fixture.back_up(&forms[0], content);
                there.push(fixture.points.last().expect("some").0);
                fixture.check_all(&there);
            }
        }
        Ok(())
    };
    TestRunner::new(cases(32)).run(&strategy, run).expect("all is as it was");
    assert!(reused.get() > all.get() / 4, "{reused:?} of {all:?}");
}

/// The file of the point that goes becomes that of the point that stays.
#[test]
fn the_large_layer_stays_where_it_is() {
    let mut fixture = Fixture::of_small_changes(4);
    let names = fixture.names();
    let root = file_of(&fixture, 0);
    fixture.forget(&[names[0], names[1]].into(), Reuse::Always).expect("forgotten");
    fixture.check_all(&names[2..]);
    assert_eq!(file_of(&fixture, 2), root);
    // Again and again.
    fixture.forget(&[names[2]].into(), Reuse::Always).expect("forgotten");
    fixture.check_all(&names[3..]);
    assert_eq!(file_of(&fixture, 3), root);
}

/// Whoever has the layer open sees no change: it is copied then.
#[test]
fn a_layer_that_somebody_has_open_is_copied() {
    let mut fixture = Fixture::of_small_changes(3);
    let names = fixture.names();
    let before = fs::read(fixture.layer(0)).expect("read");
    let mut reader = fs::File::open(fixture.layer(0)).expect("opened");
    fixture.forget(&[names[0]].into(), Reuse::Always).expect("forgotten");
    fixture.check_all(&names[1..]);
    assert_ne!(file_of(&fixture, 1), reader.metadata().expect("there").ino());
    let mut after = Vec::new();
    std::io::Read::read_to_end(&mut reader, &mut after).expect("read");
    assert!(after == before);
}

/// Nor does whoever has given it another name.
#[test]
fn a_layer_with_a_second_name_is_copied() {
    let mut fixture = Fixture::of_small_changes(3);
    let names = fixture.names();
    let (other, before) = (fixture.out.path().join("copy"), fs::read(fixture.layer(0)).expect("read"));
    fs::hard_link(fixture.layer(0), &other).expect("linked");
    fixture.forget(&[names[0]].into(), Reuse::Always).expect("forgotten");
    fixture.check_all(&names[1..]);
    assert!(fs::read(&other).expect("read") == before);
}

/// Leaves a chain whose point `names[1]` builds upon the layer that `names[0]` has left.
pub(super) fn half_done(fixture: &Fixture) {
    let names = fixture.names();
    let mut writer = fixture.writer();
    writer.note_forgetting(&names[..1]).expect("noted");
    merge(&writer, names[1], None, Reuse::Always).expect("merged");
    writer.forget().expect("forgotten");
    let point = writer.catalogue().points()[0].clone();
    assert_eq!((point.name, point.base, point.parent), (names[1], Some(names[0]), None));
}

/// A base that somebody opens between the two halves is copied, too.
#[test]
fn a_base_that_somebody_has_open_is_copied() {
    let fixture = Fixture::of_small_changes(3);
    let names = fixture.names();
    let root = file_of(&fixture, 0);
    half_done(&fixture);
    let base = fixture.catalogue().base(names[0]).expect("a base").path.clone();
    let before = fs::read(&base).expect("read");
    let mut reader = fs::File::open(&base).expect("opened");
    fixture.complete().expect("completed");
    fixture.check_all(&names[1..]);
    assert_ne!(file_of(&fixture, 1), root);
    let mut after = Vec::new();
    std::io::Read::read_to_end(&mut reader, &mut after).expect("read");
    assert!(after == before);
}

/// Between the two halves all goes on as ever: backups, merges above and around, and further removals.
#[test]
fn a_half_done_merge_hinders_nobody() {
    let states: [(&[usize], &[usize]); 4] =
        [(&[], &[1, 2, 3]), (&[1], &[2, 3]), (&[2], &[1, 3]), (&[1, 2], &[3])];
    for (gone, stay) in states {
        let mut fixture = Fixture::of_small_changes(3);
        half_done(&fixture);
        fixture.check_content();
        fixture.check_verified("half done");
        let mut content = fixture.points[2].1.clone();
        content[500_000..510_000].fill(9);
        fixture.back_up(&plain(), content);
        fixture.check_content();
        fixture.check_verified("backed up upon it");
        let names = fixture.names();
        let name = |indices: &[usize]| indices.iter().map(|index| names[*index]).collect::<Vec<_>>();
        fixture.forget(&name(gone).into_iter().collect(), Reuse::Always).expect("forgotten");
        fixture.check_all(&name(stay));
    }
}

/// A point goes whose layer builds upon a base, and nobody needs it.
#[test]
fn a_base_goes_with_the_point_above_it() {
    let mut fixture = Fixture::of_small_changes(2);
    half_done(&fixture);
    fixture.back_up_upon(None, &plain(), vec![7; 5000]);
    let names = fixture.names();
    let writer = fixture.writer();
    writer.remove_point(names[1]).expect("removed");
    drop(writer);
    fixture.check_all(&names[2..]);
}

/// Of several points that build upon one, only one can have its layer.
#[test]
fn where_several_build_upon_a_point_each_takes_over() {
    for first in [1, 2] {
        let mut fixture = Fixture::of_small_changes(2);
        let mut content = fixture.points[first - 1].1.clone();
        content[300_000..305_000].fill(3);
        fixture.back_up_upon(Some(first - 1), &plain(), content.clone());
        content[310_000..320_000].fill(4);
        fixture.back_up_upon(Some(2), &plain(), content);
        let names = fixture.names();
        fixture.check_all(&names);
        fixture.forget(&[names[0]].into(), Reuse::Always).expect("forgotten");
        fixture.check_all(&names[1..]);
    }
}

/// Damage in what is left of data that are overwritten in part gets no new digest; elsewhere it is found as
/// before.
#[test]
fn damage_in_the_base_stays_damage() {
    // Within the cluster of which the second point overwrites a part, and far from all changes.
    for (at, refused) in [(80_000, true), (590_000, false)] {
        let mut fixture = Fixture::empty("vm");
        let mut content = next_content(&[], &(600_000, vec![(600_000, Stretch::Noise(3))]));
        let pattern = content[at..at + 512].to_vec();
        fixture.back_up(&plain(), content.clone());
        for start in [70_000, 140_000] {
            content[start..start + 4096].fill(8);
            fixture.back_up(&plain(), content.clone());
        }
        let names = fixture.names();
        rot(&fixture.layer(0), &pattern);
        let result = fixture.forget(&[names[0]].into(), Reuse::Always);
        assert_eq!(result.is_err(), refused, "{result:?}");
        if let Err(error) = result {
            assert!(matches!(&error, MergeError::Damaged { from, .. } if *from == names[0]), "{error:?}");
        }
        let damaged = fixture.verify().iter().filter(|report| report.status == VerifyStatus::Damaged).count();
        assert!(damaged >= 2, "{:?}", fixture.verify());
    }
}

/// Far more differences than are kept apart, none of which anybody sees.
#[test]
fn a_base_may_differ_in_very_many_places_that_nobody_sees() {
    let form = Form { cluster_bits: 14, block: 512, ..plain() };
    let half_done = || {
        let mut fixture = Fixture::empty("vm");
        let mut content = next_content(&[], &(24 << 20, vec![(24 << 20, Stretch::Noise(3))]));
        fixture.back_up(&form, content.clone());
        // Every other grain of 512 bytes, in half of the image.
        content[..12 << 20].chunks_mut(1024).for_each(|chunk| chunk[..512].fill(7));
        fixture.back_up(&form, content);
        half_done(&fixture);
        fixture
    };
    let fixture = half_done();
    fault::plan(None);
    fixture.complete().expect("completed");
    let steps = fault::steps();
    fixture.check_all(&fixture.names()[1..]);
    // The digests come first.
    let replaced = |step: &String| step.starts_with("replace") && step.ends_with(".digests.base");
    let digests = steps.iter().position(replaced).expect("it has new digests");
    let fixture = half_done();
    fault::plan(Some((digests + 1, Fault::Crash)));
    fixture.complete().expect_err("cut short");
    fault::steps();
    fixture.check_verified("cut short");
    let base = fixture.catalogue().base(fixture.names()[0]).expect("a base").path.clone();
    let reader = fs::File::open(base).expect("opened");
    fixture.complete().expect("copied");
    drop(reader);
    fixture.check_all(&fixture.names()[1..]);
}

/// What a base has lost is damage of the point above it.
#[test]
fn a_base_whose_digests_are_lost_is_damage() {
    for lost in [true, false] {
        let fixture = Fixture::of_small_changes(3);
        half_done(&fixture);
        let path = fixture.catalogue().base(fixture.names()[0]).expect("a base").digests.clone();
        let mut bytes = fs::read(&path).expect("read");
        bytes[100] ^= 1;
        fs::remove_file(&path).expect("removed");
        if !lost {
            fs::write(&path, bytes).expect("written");
        }
        let report = &fixture.verify()[0];
        assert_eq!(report.status, VerifyStatus::Damaged, "{report:?}");
    }
}

/// A layer that was moved away may be brought back, and needs its base then.
#[test]
fn a_base_waits_for_a_lost_layer_that_others_build_upon() {
    let fixture = Fixture::of_small_changes(3);
    half_done(&fixture);
    let (path, away) = (fixture.layer(1), fixture.out.path().join("away"));
    let kept = fs::read(&path).expect("read");
    fs::remove_file(&path).expect("removed");
    fs::write(&away, kept).expect("written");
    drop(fixture.writer());
    fs::copy(&away, &path).expect("brought back");
    fixture.check_content();
    fixture.check_verified("brought back");
}

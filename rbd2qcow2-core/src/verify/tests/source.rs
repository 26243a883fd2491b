//! Points held against their snapshots.

use super::*;
use crate::chain::manifest::Manifest;
use crate::source::BoxError;

/// The snapshots of a store, as they are to be found.
struct Kept {
    /// What each holds; `None` where it is gone.
    contents: Vec<Option<Vec<u8>>>,
    /// A read that touches this byte fails.
    fail_read: Option<u64>,
}

impl Kept {
    fn all(store: &Store) -> Self {
        Self { contents: store.contents.iter().cloned().map(Some).collect(), fail_read: None }
    }

    fn verify(&self, store: &Store, points: &[PointName]) -> Result<Vec<PointReport>, VerifyError> {
        let options = VerifyOptions { source_reads: 3, ..VerifyOptions::default() };
        store.verify_against(points, &options, Some(self))
    }
}

impl Snapshots for Kept {
    fn find(&self, manifest: &Manifest) -> Result<Found, BoxError> {
        let number = (0..POINTS.len()).find(|number| point(*number) == manifest.point).expect("known");
        Ok(match &self.contents[number] {
            None => Found::Gone("the snapshot is not there any more".into()),
            Some(content) => Found::Snapshot(Box::new(MemorySource {
                content: content.clone(),
                block: 3000,
                fail_read: self.fail_read,
                ..MemorySource::default()
            })),
        })
    }
}

fn stores() -> impl Iterator<Item = Store> {
    [
        (65_536, Compression::None, ExtendedL2::Auto),
        (4096, Compression::Zstd { level: None }, ExtendedL2::Off),
        (512, Compression::None, ExtendedL2::Off),
    ]
    .into_iter()
    .map(|(cluster_size, compression, extended_l2)| Store::new(cluster_size, compression, extended_l2))
}

fn statuses(reports: &[PointReport]) -> Vec<Option<SourceStatus>> {
    reports.iter().map(|report| report.source.clone()).collect()
}

#[test]
fn points_are_the_same_as_their_snapshots() {
    for store in stores() {
        let reports = Kept::all(&store).verify(&store, &[]).expect("compared");
        assert_eq!(statuses(&reports), vec![Some(SourceStatus::Same); POINTS.len()]);
        assert_eq!(with_status(&reports, VerifyStatus::Ok).len(), POINTS.len());
        let asked = store.verify();
        assert_eq!(statuses(&asked), vec![None; POINTS.len()]);
    }
}

/// A changed byte that the comparison had left out would be in no layer: wherever that is, it is found,
/// and nothing else is.
#[test]
fn each_byte_that_was_left_out_is_found() {
    let mut random = Random::new(11);
    for store in stores() {
        for round in 0..60 {
            let number = usize::try_from(random.below(POINTS.len() as u64)).expect("small");
            let mut kept = Kept::all(&store);
            let content = kept.contents[number].as_mut().expect("there");
            let at = match round {
                0 => 0,
                1 => content.len() - 1,
                // In zeroes.
                2 => 50_000,
                _ => usize::try_from(random.below(content.len() as u64)).expect("small"),
            };
            content[at] ^= 1 << random.below(8);
            let reports = kept.verify(&store, &[point(number)]).expect("compared");
            let [report] = &reports[..] else { panic!("{reports:?}") };
            assert_eq!(report.source, Some(SourceStatus::Different), "byte {at} of point {number}");
            assert_eq!(report.status, VerifyStatus::Damaged);
            let [Finding::Source { range, .. }] = &report.findings[..] else { panic!("{report:?}") };
            assert!(range.contains(&(at as u64)) && range.end - range.start <= 4096, "{at}: {range:?}");
        }
    }
}

/// What an increment left out, the points above it lack, too.
#[test]
fn differences_are_followed_upwards() {
    let store = stores().next().expect("a store");
    let mut kept = Kept::all(&store);
    // Nobody has changed this since: see Store::new.
    let at = (0..200_000)
        .find(|at| {
            store.contents[1..].iter().all(|content| content[*at] == store.contents[0][*at] && *at > 90_000)
        })
        .expect("a byte that stays");
    for content in &mut kept.contents {
        content.as_mut().expect("there")[at] ^= 1;
    }
    // The snapshot of the second is the only one left.
    for number in [0, 2, 3] {
        kept.contents[number] = None;
    }
    let reports = kept.verify(&store, &[]).expect("compared");
    assert_eq!(with_status(&reports, VerifyStatus::Damaged), [1, 2, 3], "{reports:?}");
    assert!(
        reports[3].findings.iter().any(
            |finding| matches!(finding, Finding::Inherited { from, range } if *from == point(1) && range.contains(&(at as u64)))
        ),
        "{:?}",
        reports[3]
    );
}

/// A byte that one comparison left out, and the next one, too, when it was changed back.
#[test]
fn a_point_that_is_the_same_as_its_snapshot_inherits_no_difference() {
    let store = stores().next().expect("a store");
    let mut kept = Kept::all(&store);
    let unchanged = |at: &usize| store.contents.iter().all(|content| content[*at] == store.contents[0][*at]);
    let at = (90_000..200_000).find(unchanged).expect("a byte that stays");
    kept.contents[1].as_mut().expect("there")[at] ^= 1;
    let reports = kept.verify(&store, &[]).expect("compared");
    assert_eq!(with_status(&reports, VerifyStatus::Damaged), [1], "{reports:?}");
}

#[test]
fn a_snapshot_that_is_gone_is_no_damage() {
    let store = stores().next().expect("a store");
    let mut kept = Kept::all(&store);
    kept.contents[0] = None;
    let reports = kept.verify(&store, &[]).expect("compared");
    assert!(matches!(&reports[0].source, Some(SourceStatus::NotCompared(why)) if why.contains("not there")));
    assert_eq!(with_status(&reports, VerifyStatus::Ok).len(), POINTS.len());
    // Without a manifest nobody knows which it was.
    fs::remove_file(store.file(3, FileKind::Manifest)).expect("removed");
    let reports = kept.verify(&store, &[]).expect("compared");
    assert!(matches!(&reports[3].source, Some(SourceStatus::NotCompared(why)) if why.contains("manifest")));
}

#[test]
fn snapshots_of_another_size_or_that_cannot_be_read_are_told() {
    let store = stores().next().expect("a store");
    let mut kept = Kept::all(&store);
    kept.contents[3].as_mut().expect("there").push(0);
    let reports = kept.verify(&store, &[point(3)]).expect("compared");
    assert_eq!(reports[0].source, Some(SourceStatus::Different));
    assert!(
        matches!(&reports[0].findings[..], [Finding::Source { range, .. }] if *range == (350_000..350_001))
    );
    let mut kept = Kept::all(&store);
    kept.fail_read = Some(10);
    // What was found out without it is told all the same.
    let reports = kept.verify(&store, &[]).expect("looked at");
    assert_eq!(with_status(&reports, VerifyStatus::Ok).len(), POINTS.len());
    for report in reports {
        let Some(SourceStatus::Failed(why)) = report.source else { panic!("{report:?}") };
        assert!(why.contains("cannot read") && why.contains("a fault on demand"), "{why}");
    }
}

/// A point that is damaged is told to be, whatever its snapshot is like.
#[test]
fn damage_hides_behind_no_snapshot() {
    let store = Store::new(4096, Compression::Zstd { level: None }, ExtendedL2::Off);
    let kept = Kept::all(&store);
    let layer = store.file(1, FileKind::Layer);
    let length = fs::metadata(&layer).expect("there").len();
    for at in (8192..length).step_by(16_384) {
        let flip = |file: &fs::File| {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).expect("read");
            file.write_all_at(&[byte[0] ^ 0x40], at).expect("written");
        };
        let (plain, against) =
            store.with_damage(&layer, flip, || (store.verify(), kept.verify(&store, &[]).expect("compared")));
        let damaged = with_status(&against, VerifyStatus::Damaged);
        for number in with_status(&plain, VerifyStatus::Damaged) {
            assert!(damaged.contains(&number), "byte {at}: {against:?}");
        }
    }
}

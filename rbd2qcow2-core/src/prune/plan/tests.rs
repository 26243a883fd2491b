use proptest::prelude::*;

use super::*;
use crate::prune::tests::{Fixture, all, names, point};
use crate::prune::{Limit, Rule};

fn plan(fixture: &Fixture, wanted: &Wanted) -> Result<Plan, PlanError> {
    Plan::new(&fixture.catalogue(), wanted, &TimeZone::UTC, Timestamp::MAX)
}

fn last(count: u32) -> Wanted {
    let policy = Policy { last: Limit::AtMost(count), ..Policy::default() };
    Wanted { policy: Some(policy), points: BTreeSet::new() }
}

fn named(points: &[&str]) -> Wanted {
    Wanted { policy: None, points: points.iter().map(|name| point(name)).collect() }
}

/// What becomes of each point, in short: `name action reasons`.
fn told(plan: &Plan) -> Vec<String> {
    let decisions = plan.decisions.iter().map(|Decision { point, action, reasons }| {
        let action = match action {
            Action::Keep => "keep".to_owned(),
            Action::Remove { merged_into } => format!("remove into {}", names(merged_into).join("+")),
        };
        let reasons: Vec<_> = reasons.iter().map(ToString::to_string).collect();
        format!("{point} {action}: {}", reasons.join(", "))
    });
    decisions.collect()
}

const DAYS: [&str; 4] = ["20261120T020000Z", "20261121T020000Z", "20261122T020000Z", "20261123T020000Z"];

#[test]
fn a_chain_is_merged_into_what_stays() {
    let Some(fixture) = Fixture::chain(&DAYS) else { return };
    fixture.hold(DAYS[1], "the audit");
    let plan = plan(&fixture, &last(1)).expect("planned");
    assert_eq!(
        told(&plan),
        [
            format!("{} remove into {}: no rule keeps it", DAYS[0], DAYS[1]),
            format!("{} keep: held: the audit", DAYS[1]),
            format!("{} remove into {}: no rule keeps it", DAYS[2], DAYS[3]),
            format!("{} keep: newest, last", DAYS[3]),
        ]
    );
    let [first, second] = &plan.merges[..] else { panic!("{:?}", plan.merges) };
    assert_eq!((first.child, &first.removed, first.parent), (point(DAYS[1]), &vec![point(DAYS[0])], None));
    assert_eq!(
        (second.child, &second.removed, second.parent),
        (point(DAYS[3]), &vec![point(DAYS[2])], Some(point(DAYS[1])))
    );
    assert!(plan.removals.is_empty() && !plan.is_empty());
    let bytes = |day: &str| fixture.catalogue().point(point(day)).expect("there").layer_bytes;
    assert_eq!((plan.freed_at_least, plan.freed_at_most), (0, bytes(DAYS[0]) + bytes(DAYS[2])));
}

#[test]
fn a_chain_of_its_own_goes_from_its_end() {
    let Some(fixture) = Fixture::chain(&DAYS[..3]) else { return };
    fixture.add(DAYS[3], None);
    let plan = plan(&fixture, &last(1)).expect("planned");
    assert!(plan.merges.is_empty());
    assert_eq!(names(&plan.removals), [DAYS[2], DAYS[1], DAYS[0]]);
    assert_eq!(plan.removed(), 3);
    assert!(plan.freed_at_most > 0);
    assert_eq!(plan.freed_at_least, plan.freed_at_most);
}

#[test]
fn rules_see_the_points_of_all_chains() {
    let Some(fixture) = Fixture::chain(&DAYS[..2]) else { return };
    fixture.add(DAYS[2], None);
    fixture.add(DAYS[3], Some(DAYS[2]));
    let plan = plan(&fixture, &last(3)).expect("planned");
    assert_eq!(plan.merges, [Merge { child: point(DAYS[1]), removed: vec![point(DAYS[0])], parent: None }]);
    assert!(plan.removals.is_empty());
}

#[test]
fn where_several_build_upon_a_point_each_takes_it_over() {
    let Some(fixture) = Fixture::chain(&DAYS[..1]) else { return };
    for day in &DAYS[1..] {
        fixture.add(day, Some(DAYS[0]));
    }
    let plan = plan(&fixture, &last(2)).expect("planned");
    assert_eq!(
        told(&plan)[..2],
        [
            format!("{} remove into {}+{}: no rule keeps it", DAYS[0], DAYS[2], DAYS[3]),
            format!("{} remove into : no rule keeps it", DAYS[1]),
        ]
    );
    assert_eq!(names(&plan.removals), [DAYS[1]]);
    assert!(plan.freed_at_least < plan.freed_at_most);
}

#[test]
fn named_points_go_and_no_others() {
    let Some(fixture) = Fixture::chain(&DAYS) else { return };
    let plan_of_names = plan(&fixture, &named(&[DAYS[1]])).expect("planned");
    assert_eq!(
        told(&plan_of_names),
        [
            format!("{} keep: not named", DAYS[0]),
            format!("{} remove into {}: named", DAYS[1], DAYS[2]),
            format!("{} keep: not named", DAYS[2]),
            format!("{} keep: newest, not named", DAYS[3]),
        ]
    );
    // The rules do not see them.
    let both = Wanted { points: named(&[DAYS[2]]).points, ..last(2) };
    let told = told(&plan(&fixture, &both).expect("planned"));
    assert_eq!(told[1], format!("{} keep: last", DAYS[1]));
    assert_eq!(told[2], format!("{} remove into {}: named", DAYS[2], DAYS[3]));
}

#[test]
fn what_must_stay_stays() {
    let Some(fixture) = Fixture::chain(&DAYS) else { return };
    fixture.hold(DAYS[1], "the audit");
    fixture.hold(DAYS[3], "it, too");
    let refused = |wanted: &Wanted| plan(&fixture, wanted).expect_err("refused");
    assert!(
        matches!(refused(&named(&[DAYS[0], DAYS[1]])), PlanError::Held { reason, .. } if reason == "the audit")
    );
    assert!(matches!(refused(&named(&[DAYS[3]])), PlanError::Held { .. }));
    let unknown = refused(&named(&["20261123T020001Z"]));
    assert!(matches!(&unknown, PlanError::UnknownPoint { known, .. } if known.len() == 4), "{unknown}");
    let nothing = Wanted { policy: Some(Policy::default()), points: BTreeSet::new() };
    assert!(matches!(refused(&nothing), PlanError::NoRule));
    fixture.release(DAYS[3]);
    let refused = plan(&fixture, &named(&[DAYS[3]])).expect_err("refused");
    assert!(matches!(refused, PlanError::Newest { .. }), "{refused}");
    assert!(plan(&fixture, &Wanted::default()).expect("planned").is_empty());
    assert!(plan(&fixture, &all()).expect("planned").is_empty());
}

#[test]
fn the_newest_stays_whatever_its_clock_said() {
    let Some(fixture) = Fixture::chain(&DAYS[..2]) else { return };
    // A clock that stood in the future named a point; the next is numbered on from there.
    fixture.add("20991231T020000Z", Some(DAYS[1]));
    fixture.add_made("20991231T020001Z", Some("20991231T020000Z"), "2026-11-22T02:00:10Z");
    fixture.add_made("20991231T020002Z", Some("20991231T020001Z"), "2026-11-23T02:00:10Z");
    let policy = Policy { daily: Limit::AtMost(3), ..Policy::default() };
    let wanted = Wanted { policy: Some(policy), points: BTreeSet::new() };
    let plan = plan(&fixture, &wanted).expect("planned");
    assert_eq!(
        told(&plan),
        [
            format!("{} remove into 20991231T020000Z: no rule keeps it", DAYS[0]),
            format!("{} remove into 20991231T020000Z: no rule keeps it", DAYS[1]),
            "20991231T020000Z keep: daily 2099-12-31".to_owned(),
            "20991231T020001Z keep: daily 2026-11-22".to_owned(),
            "20991231T020002Z keep: newest, daily 2026-11-23".to_owned(),
        ]
    );
}

#[test]
fn a_backup_belongs_to_the_day_when_it_began() {
    let Some(fixture) = Fixture::chain(&[]) else { return };
    fixture.add_made("20261122T233000Z", None, "2026-11-23T04:00:00Z");
    fixture.add_made("20261123T233000Z", Some("20261122T233000Z"), "2026-11-24T04:00:00Z");
    let policy = Policy { daily: Limit::AtMost(2), ..Policy::default() };
    let plan = plan(&fixture, &Wanted { policy: Some(policy), points: BTreeSet::new() }).expect("planned");
    let period = |period: &str| Reason::Period { rule: Rule::Daily, period: period.to_owned() };
    assert_eq!(plan.decisions[0].reasons, [period("2026-11-22")]);
    assert_eq!(plan.decisions[1].reasons, [Reason::Newest, period("2026-11-23")]);
}

#[test]
fn a_chain_of_the_python_tool_is_one_as_any_other() {
    let Some(fixture) = Fixture::python(&["1795368792", "1795368999"]) else { return };
    fixture.add("20261123T020000Z", Some("1795368999"));
    let plan = plan(&fixture, &last(1)).expect("planned");
    let child = point("20261123T020000Z");
    let removed = vec![point("1795368999"), point("1795368792")];
    assert_eq!(plan.merges, [Merge { child, removed, parent: None }]);
}

#[test]
fn nothing_of_a_broken_image_is_pruned() {
    let lost = |suffix: &str| {
        let fixture = Fixture::chain(&DAYS)?;
        std::fs::remove_file(fixture.path(DAYS[1], suffix)).expect("removed");
        Some(fixture)
    };
    for suffix in ["qcow2", "json"] {
        let Some(fixture) = lost(suffix) else { return };
        for wanted in [last(1), last(9), named(&[DAYS[0]])] {
            let Err(PlanError::Broken { cause, .. }) = plan(&fixture, &wanted) else {
                panic!("{suffix} is missing")
            };
            let about = crate::error::Causes(&cause).to_string();
            assert!(about.contains(DAYS[1]), "{about}");
        }
    }
    // A layer that a link stands for may build upon any other.
    let Some(fixture) = Fixture::chain(&DAYS) else { return };
    let newest = fixture.path(DAYS[3], "qcow2");
    let elsewhere = fixture.dest().join("elsewhere");
    std::fs::rename(&newest, &elsewhere).expect("moved");
    std::os::unix::fs::symlink(&elsewhere, &newest).expect("linked");
    let error = plan(&fixture, &last(1)).expect_err("refused");
    assert!(matches!(&error, PlanError::Broken { cause, .. } if cause.path() == newest), "{error:?}");
    // Without digests nothing can be verified, but all is there.
    let Some(fixture) = lost("digests") else { return };
    assert_eq!(plan(&fixture, &last(1)).expect("planned").removed(), 3);
}

/// Points that build upon older ones, or upon nothing, and which of them stay.
fn forest() -> impl Strategy<Value = Vec<(Option<usize>, bool)>> {
    let links = prop::collection::vec(
        (prop::option::weighted(0.9, any::<prop::sample::Index>()), any::<bool>()),
        1..40,
    );
    links.prop_map(|links| {
        let links = links.into_iter().enumerate();
        // Mostly chains, as they are: the point right below, or any.
        let parent = |index: usize, parent: prop::sample::Index| match index {
            0 => None,
            _ if parent.index(3) > 0 => Some(index - 1),
            _ => Some(parent.index(index)),
        };
        links.map(|(index, (link, stays))| (link.and_then(|link| parent(index, link)), stays)).collect()
    })
}

proptest! {
    #[test]
    fn what_stays_is_whole_and_what_goes_is_accounted_for(forest in forest()) {
        let name = |index: usize| point(&format!("{}", 1_700_000_000 + index));
        let links: Vec<_> =
            forest.iter().enumerate().map(|(index, (parent, _))| (name(index), parent.map(name))).collect();
        let kept: BTreeSet<_> = (0..forest.len()).filter(|&index| forest[index].1).map(name).collect();
        let (merges, removals) = work(&links, &kept);

        // What each point is made of, by following the links before and after.
        let parents: BTreeMap<_, _> = links.iter().copied().collect();
        let made_of = |name: PointName, parents: &BTreeMap<PointName, Option<PointName>>| {
            std::iter::successors(Some(name), |name| parents[name]).collect::<Vec<_>>()
        };
        let mut after = parents.clone();
        after.retain(|name, _| kept.contains(name));
        let mut holds: BTreeMap<_, Vec<_>> = kept.iter().map(|&name| (name, vec![name])).collect();
        for merge in &merges {
            prop_assert!(kept.contains(&merge.child) && !merge.removed.is_empty());
            after.insert(merge.child, merge.parent);
            holds.get_mut(&merge.child).expect("it stays").extend(&merge.removed);
        }
        for &name in &kept {
            let layers = made_of(name, &after).into_iter().flat_map(|layer| holds[&layer].clone());
            prop_assert_eq!(layers.collect::<Vec<_>>(), made_of(name, &parents));
        }
        prop_assert!(merges.is_sorted_by_key(|merge| merge.child));

        // Removed is either merged or deleted, and nothing else is.
        let merged: BTreeSet<_> = merges.iter().flat_map(|merge| merge.removed.clone()).collect();
        let deleted: BTreeSet<_> = removals.iter().copied().collect();
        prop_assert_eq!(deleted.len(), removals.len());
        prop_assert!(merged.is_disjoint(&deleted));
        let gone: BTreeSet<_> = merged.union(&deleted).copied().collect();
        let all: BTreeSet<_> = parents.keys().copied().collect();
        prop_assert_eq!(gone, all.difference(&kept).copied().collect::<BTreeSet<_>>());

        // While they are deleted, one by one, none is left without what it builds upon.
        let mut left = all;
        for name in &removals {
            prop_assert!(left.remove(name));
            prop_assert!(left.iter().all(|name| parents[name].is_none_or(|parent| left.contains(&parent))));
        }
    }
}

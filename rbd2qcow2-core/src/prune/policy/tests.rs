use std::collections::{BTreeMap, BTreeSet};

use jiff::Span;
use proptest::prelude::*;

use super::*;

const BERLIN: &str = "CET-1CEST,M3.5.0,M10.5.0/3";
/// Begins at midnight, so that a day lacks its first hour, and ends there, so that another has 25.
const SAO_PAULO_2010: &str = "<-03>3<-02>,M10.3.0/0,M2.3.0/0";
/// Was set back a minute after midnight, to the day before.
const ST_JOHNS_2010: &str = "NST3:30NDT,M3.2.0/0:01,M11.1.0/0:01";
const ZONES: [&str; 5] = ["UTC0", BERLIN, SAO_PAULO_2010, ST_JOHNS_2010, "<+14>-14"];

fn zone(posix: &str) -> TimeZone {
    TimeZone::posix(posix).expect("a time zone")
}

fn times(texts: &[&str]) -> Vec<Timestamp> {
    texts.iter().map(|text| text.parse().expect("a time")).collect()
}

/// What `policy` says of points, the reasons joined.
fn told(policy: &Policy, texts: &[&str], posix: &str) -> Vec<String> {
    let reasons = policy.apply(&times(texts), &zone(posix), Timestamp::MAX);
    let texts = reasons.iter().map(|reasons| reasons.iter().map(ToString::to_string).collect::<Vec<_>>());
    texts.map(|reasons| reasons.join(", ")).collect()
}

fn within(text: &str) -> Option<Within> {
    Some(text.parse().expect("a time span"))
}

#[test]
fn no_rule_keeps_nothing() {
    assert!(Policy::default().is_empty());
    assert!(!Policy { weekly: Limit::All, ..Policy::default() }.is_empty());
    assert!(!Policy { within: within("1h"), ..Policy::default() }.is_empty());
    assert_eq!(told(&Policy::default(), &["2026-11-22T02:00:00Z"], "UTC0"), [""]);
    assert!(
        Policy { last: Limit::All, ..Policy::default() }.apply(&[], &zone("UTC0"), Timestamp::MAX).is_empty()
    );
}

#[test]
fn the_newest_of_each_period_stays() {
    let points =
        ["2026-11-20T02:00:00Z", "2026-11-21T02:00:00Z", "2026-11-21T14:00:00Z", "2026-11-23T02:00:00Z"];
    let daily = Policy { daily: Limit::AtMost(2), ..Policy::default() };
    assert_eq!(told(&daily, &points, "UTC0"), ["", "", "daily 2026-11-21", "daily 2026-11-23"]);
    // The order in which they come says nothing.
    let mixed = [points[3], points[1], points[0], points[2]];
    assert_eq!(told(&daily, &mixed, "UTC0"), ["daily 2026-11-23", "", "", "daily 2026-11-21"]);
    let last = Policy { last: Limit::AtMost(1), ..Policy::default() };
    assert_eq!(told(&last, &points, "UTC0"), ["", "", "", "last"]);
}

#[test]
fn rules_do_not_share_and_are_united() {
    let points = ["2026-11-16T02:00:00Z", "2026-11-22T02:00:00Z", "2026-11-23T02:00:00Z"];
    let policy = Policy {
        last: Limit::AtMost(1),
        weekly: Limit::AtMost(2),
        monthly: Limit::AtMost(1),
        ..Policy::default()
    };
    // The 22nd is a Sunday, and so in the week of the 16th.
    assert_eq!(
        told(&policy, &points, "UTC0"),
        ["", "weekly 2026-W47", "last, weekly 2026-W48, monthly 2026-11"]
    );
}

#[test]
fn a_rule_that_is_not_used_up_keeps_the_oldest() {
    let points = ["2026-11-02T02:00:00Z", "2026-11-12T02:00:00Z", "2026-11-23T02:00:00Z"];
    let policy = Policy { monthly: Limit::AtMost(2), yearly: Limit::AtMost(1), ..Policy::default() };
    assert_eq!(told(&policy, &points, "UTC0"), ["monthly (the oldest)", "", "monthly 2026-11, yearly 2026"]);
    let policy = Policy { yearly: Limit::All, ..Policy::default() };
    assert_eq!(told(&policy, &points, "UTC0"), ["yearly (the oldest)", "", "yearly 2026"]);
}

#[test]
fn of_points_of_one_second_the_later_in_the_list_is_the_newer() {
    let policy = Policy { last: Limit::AtMost(1), hourly: Limit::AtMost(1), ..Policy::default() };
    let points = ["2026-11-23T02:00:00Z"; 3];
    assert_eq!(told(&policy, &points, "UTC0"), ["", "", "last, hourly 2026-11-23 02:00"]);
}

#[test]
fn periods_are_local() {
    let points = ["2026-11-22T22:30:00Z", "2026-11-22T23:30:00Z"];
    let policy = Policy { daily: Limit::AtMost(5), ..Policy::default() };
    assert_eq!(told(&policy, &points, BERLIN), ["daily 2026-11-22", "daily 2026-11-23"]);
    assert_eq!(told(&policy, &points, "UTC0"), ["daily (the oldest)", "daily 2026-11-22"]);
}

#[test]
fn weeks_and_years_of_the_turn_of_the_year() {
    let points =
        ["2026-12-27T12:00:00Z", "2026-12-31T12:00:00Z", "2027-01-03T12:00:00Z", "2027-01-04T12:00:00Z"];
    let policy = Policy { weekly: Limit::AtMost(3), yearly: Limit::AtMost(2), ..Policy::default() };
    assert_eq!(
        told(&policy, &points, "UTC0"),
        ["weekly 2026-W52", "yearly 2026", "weekly 2026-W53", "weekly 2027-W01, yearly 2027"]
    );
}

#[test]
fn the_hour_that_comes_twice_is_one() {
    let points = ["2026-10-25T00:30:00Z", "2026-10-25T01:30:00Z", "2026-10-25T02:30:00Z"];
    let policy = Policy { hourly: Limit::AtMost(2), ..Policy::default() };
    assert_eq!(told(&policy, &points, BERLIN), ["", "hourly 2026-10-25 02:00", "hourly 2026-10-25 03:00"]);
}

#[test]
fn a_day_that_comes_twice_is_one() {
    // 23:30 of the 6th, 00:00:30 of the 7th, 23:30 of the 6th again, 00:30 of the 7th.
    let points =
        ["2010-11-07T02:00:00Z", "2010-11-07T02:30:30Z", "2010-11-07T03:00:00Z", "2010-11-07T04:00:00Z"];
    let policy = Policy { daily: Limit::AtMost(3), ..Policy::default() };
    assert_eq!(
        told(&policy, &points, ST_JOHNS_2010),
        ["daily (the oldest)", "", "daily 2010-11-06", "daily 2010-11-07"]
    );
}

#[test]
fn time_spans_go_by_the_calendar() {
    let before = |text: &str, time: &str, posix: &str| {
        let within: Within = text.parse().expect("a time span");
        within.before(time.parse().expect("a time"), &zone(posix)).to_string()
    };
    assert_eq!(before("1d", "2026-10-26T01:00:00Z", BERLIN), "2026-10-25T00:00:00Z");
    assert_eq!(before("24h", "2026-10-26T01:00:00Z", BERLIN), "2026-10-25T01:00:00Z");
    assert_eq!(before("1d", "2026-10-26T01:00:00Z", "UTC0"), "2026-10-25T01:00:00Z");
    assert_eq!(before("1m", "2026-03-31T12:00:00Z", "UTC0"), "2026-02-28T12:00:00Z");
    assert_eq!(before("1y", "2028-02-29T12:00:00Z", "UTC0"), "2027-02-28T12:00:00Z");
    assert_eq!(before("1y1m1w1d1h", "2026-11-23T12:00:00Z", "UTC0"), "2025-10-15T11:00:00Z");
    assert_eq!(before("65535y", "2026-11-23T12:00:00Z", "UTC0"), Timestamp::MIN.to_string());
    // 02:30 of that day does not exist; what is before it is 03:30.
    assert_eq!(before("1d", "2026-03-30T00:30:00Z", BERLIN), "2026-03-29T01:30:00Z");
}

#[test]
fn time_spans_are_read_as_restic_and_borg_write_them() {
    let read = |text: &str| text.parse::<Within>().map(|within| within.to_string());
    for (text, spelled) in [
        ("1y5m7d2h", "1y5m7d2h"),
        ("2h1y", "1y2h"),
        ("14d", "14d"),
        ("10H", "10h"),
        ("2w", "2w"),
        ("0y3d", "3d"),
    ] {
        assert_eq!(read(text), Ok(spelled.to_owned()), "{text}");
    }
    for text in ["", "7", "d", "7d ", "-7d", "+7d", "7s", "7D", "1d1d", "1.5d", "7dd", "٣d"] {
        assert_eq!(read(text), Err(WithinError::Form), "{text}");
    }
    assert_eq!(read("65536h"), Err(WithinError::TooLong));
    assert_eq!(read("0d"), Err(WithinError::Zero));
}

#[test]
fn within_counts_back_from_the_newest() {
    let points = ["2026-11-13T02:00:00Z", "2026-11-13T02:00:01Z", "2026-11-20T02:00:00Z"];
    let policy = Policy { within: within("7d"), ..Policy::default() };
    assert_eq!(told(&policy, &points, BERLIN), ["", "within 7d", "within 7d"]);
}

#[test]
fn within_does_not_count_from_the_future() {
    let points = times(&["2026-11-01T02:00:00Z", "2026-11-20T02:00:00Z", "2099-01-01T00:00:00Z"]);
    let policy = Policy { within: within("7d"), ..Policy::default() };
    let kept = |now: &str| {
        let reasons = policy.apply(&points, &zone("UTC0"), now.parse().expect("a time"));
        reasons.iter().map(|reasons| !reasons.is_empty()).collect::<Vec<_>>()
    };
    assert_eq!(kept("2026-11-21T00:00:00Z"), [false, true, true]);
    assert_eq!(kept("2099-01-02T00:00:00Z"), [false, false, true]);
    assert_eq!(kept("1970-01-01T00:00:00Z"), [true, true, true]);
}

/// What each rule calls the periods, as text.
const FORMATS: [&str; 6] = ["", "%Y-%m-%d %H", "%Y-%m-%d", "%G-%V", "%Y-%m", "%Y"];

/// The points that stay, by a way that shares nothing with the policy's: all periods are spelled out and
/// sorted by the newest point that each of them has.
fn naive(
    limits: [Option<u32>; 6],
    within: Option<i32>,
    times: &[Timestamp],
    zone: &TimeZone,
) -> BTreeSet<usize> {
    let mut kept = BTreeSet::new();
    let ages: BTreeSet<(Timestamp, usize)> =
        times.iter().enumerate().map(|(point, time)| (*time, point)).collect();
    let Some(&(newest, _)) = ages.last() else { return kept };
    for (format, limit) in FORMATS.iter().zip(limits) {
        let mut newest_of = BTreeMap::new();
        for &(time, point) in &ages {
            let period = match *format {
                "" => point.to_string(),
                format => time.to_zoned(zone.clone()).strftime(format).to_string(),
            };
            newest_of.insert(period, (time, point));
        }
        let mut chosen: Vec<_> = newest_of.into_values().collect();
        chosen.sort_unstable();
        let limit = limit.map_or(usize::MAX, |limit| usize::try_from(limit).expect("small"));
        if limit > chosen.len() {
            chosen.extend(ages.first());
        }
        kept.extend(chosen.iter().rev().take(limit).map(|(_, point)| *point));
    }
    if let Some(days) = within {
        let limit = newest.to_zoned(zone.clone()).checked_sub(Span::new().days(days)).expect("a time");
        kept.extend(ages.iter().filter(|(time, _)| *time > limit.timestamp()).map(|(_, point)| *point));
    }
    kept
}

/// Times around those at which something is special.
fn time() -> impl Strategy<Value = Timestamp> {
    let around = prop::sample::select(vec![
        "2026-10-25T00:00:00Z",
        "2026-03-29T01:00:00Z",
        "2010-02-21T02:00:00Z",
        "2010-10-17T03:00:00Z",
        "2010-11-07T02:30:00Z",
        "2024-02-29T00:00:00Z",
        "2028-02-29T23:00:00Z",
        "2027-01-01T00:00:00Z",
        "2026-12-28T00:00:00Z",
    ]);
    let hours = prop_oneof![-3_i64..3, -60_i64..60, -20_000_i64..20_000];
    (around, hours, prop_oneof![Just(0_i64), Just(-1), -3600_i64..3600]).prop_map(|(time, hours, seconds)| {
        let time: Timestamp = time.parse().expect("a time");
        Timestamp::from_second(time.as_second() + hours * 3600 + seconds).expect("a time")
    })
}

/// No rule, a small number, or all.
fn limit() -> impl Strategy<Value = Option<u32>> {
    prop_oneof![4 => Just(Some(0)), 4 => (1_u32..8).prop_map(Some), 1 => Just(None)]
}

proptest! {
    #[test]
    fn the_rules_keep_what_the_naive_model_keeps(
        times in prop::collection::vec(time(), 0..60),
        limits in [limit(), limit(), limit(), limit(), limit(), limit()],
        within in prop::option::of(1..400_i32),
        posix in prop::sample::select(&ZONES),
    ) {
        let zone = zone(posix);
        let limit = |place: usize| limits[place].map_or(Limit::All, Limit::AtMost);
        let policy = Policy {
            last: limit(0),
            hourly: limit(1),
            daily: limit(2),
            weekly: limit(3),
            monthly: limit(4),
            yearly: limit(5),
            within: within.map(|days| format!("{days}d").parse().expect("a time span")),
        };
        let reasons = policy.apply(&times, &zone, Timestamp::MAX);
        prop_assert_eq!(reasons.len(), times.len());
        let kept: BTreeSet<_> = (0..times.len()).filter(|&point| !reasons[point].is_empty()).collect();
        prop_assert_eq!(&kept, &naive(limits, within, &times, &zone));
        // Whatever is kept of some points is kept again of what was kept.
        let left: Vec<_> = kept.iter().map(|&point| times[point]).collect();
        prop_assert!(policy.apply(&left, &zone, Timestamp::MAX).iter().all(|reasons| !reasons.is_empty()));
    }
}

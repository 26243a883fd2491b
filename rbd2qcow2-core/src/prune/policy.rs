//! Which points rules keep. Pure: times in, reasons out.
//!
//! The rules are those of `restic forget`:
//! - Each rule looks at all points, and what any of them keeps stays. (In `borg prune` a point that one
//!   rule keeps does not count for the coarser ones, so that the same numbers keep more there.)
//! - A rule goes from the newest point to older ones and keeps the newest of each period that has any,
//!   until it has kept as many as it may. Periods without a point cost nothing.
//! - One that has not kept so many when it comes to the oldest point of all keeps that, too. So the first
//!   backups of a new directory stay until there are enough of them.
//! - Periods are those of the calendar and clock of one time zone; weeks are those of ISO 8601. The hour
//!   that comes twice when daylight-saving time ends is one hour.
//! - `within` counts back from the newest point, not from now: a directory that gets no more backups
//!   loses nothing. A point that stands in the future, because a clock was wrong, is not counted from.
//!
//! One thing differs: a month before the 31st of March is the last of February, not the 3rd of March.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

use super::reason::{Reason, Rule};

mod within;

pub use within::{Within, WithinError};

/// How many points a rule keeps. By `Default` none: such a rule is no rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// So many.
    AtMost(u32),
    /// One of each period there is.
    All,
}

impl Limit {
    fn is_none(self) -> bool {
        self == Self::AtMost(0)
    }

    /// Counts one point.
    fn use_up(&mut self) {
        if let Self::AtMost(left) = self {
            *left -= 1;
        }
    }
}

impl Default for Limit {
    fn default() -> Self {
        Self::AtMost(0)
    }
}

/// Rules. `Default` is none at all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// How many of the newest points stay.
    pub last: Limit,
    /// For how many hours the newest point stays.
    pub hourly: Limit,
    /// For how many days.
    pub daily: Limit,
    /// For how many weeks.
    pub weekly: Limit,
    /// For how many months.
    pub monthly: Limit,
    /// For how many years.
    pub yearly: Limit,
    /// All points stay that are younger, counted from the newest.
    pub within: Option<Within>,
}

impl Policy {
    /// Whether there is no rule, so that nothing would stay.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.within.is_none() && self.limits().iter().all(|(_, limit)| limit.is_none())
    }

    fn limits(&self) -> [(Rule, Limit); 6] {
        [
            (Rule::Last, self.last),
            (Rule::Hourly, self.hourly),
            (Rule::Daily, self.daily),
            (Rule::Weekly, self.weekly),
            (Rule::Monthly, self.monthly),
            (Rule::Yearly, self.yearly),
        ]
    }

    /// Why each of some points stays, for points taken at `times`, which may come in any order; of two
    /// taken at once the later in the list is the newer. Those that no rule keeps have no reason.
    ///
    /// Periods are those of `zone`. What lies after `now` is a mistake of some clock.
    #[must_use]
    pub fn apply(&self, times: &[Timestamp], zone: &TimeZone, now: Timestamp) -> Vec<Vec<Reason>> {
        let mut newest_first: Vec<usize> = (0..times.len()).collect();
        newest_first.sort_by_key(|&point| Reverse((times[point], point)));
        let mut reasons = vec![Vec::new(); times.len()];
        for (rule, limit) in self.limits() {
            count(rule, limit, times, &newest_first, zone, &mut reasons);
        }
        if let Some(within) = self.within {
            let from = times.iter().filter(|&&time| time <= now).max();
            // Where all of them are in the future, it is this clock that is wrong.
            let limit = from.map_or(Timestamp::MIN, |&from| within.before(from, zone));
            for (time, reasons) in times.iter().zip(&mut reasons) {
                if *time > limit {
                    reasons.push(Reason::Within(within));
                }
            }
        }
        reasons
    }
}

/// Applies one rule.
fn count(
    rule: Rule,
    mut limit: Limit,
    times: &[Timestamp],
    newest_first: &[usize],
    zone: &TimeZone,
    reasons: &mut [Vec<Reason>],
) {
    let mut met = BTreeSet::new();
    for (place, &point) in newest_first.iter().enumerate() {
        if limit.is_none() {
            return;
        }
        // Not only compared with the one before: clocks that are set back at midnight show a day twice.
        let (key, reason) = match period(rule, zone.to_datetime(times[point])) {
            Some((key, period)) => (key, Reason::Period { rule, period }),
            None => ((0, place), Reason::Last),
        };
        if met.insert(key) {
            reasons[point].push(reason);
            limit.use_up();
        } else if place + 1 == newest_first.len() {
            reasons[point].push(Reason::Oldest { rule });
        }
    }
}

/// The period that a local time falls into: what tells it from all others, and its name.
fn period(rule: Rule, local: DateTime) -> Option<((i16, usize), String)> {
    let day = || usize::try_from(local.day_of_year()).unwrap_or_default();
    let hour = || usize::try_from(local.hour()).unwrap_or_default();
    let number = |number: i8| usize::try_from(number).unwrap_or_default();
    let (year, within_year, name) = match rule {
        Rule::Last => return None,
        Rule::Hourly => (local.year(), day() * 24 + hour(), "%F %H:00"),
        Rule::Daily => (local.year(), day(), "%F"),
        Rule::Weekly => {
            let week = local.date().iso_week_date();
            (week.year(), number(week.week()), "%G-W%V")
        }
        Rule::Monthly => (local.year(), number(local.month()), "%Y-%m"),
        Rule::Yearly => (local.year(), 0, "%Y"),
    };
    Some(((year, within_year), local.strftime(name).to_string()))
}

#[cfg(test)]
mod tests;

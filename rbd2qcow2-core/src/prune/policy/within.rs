//! A time span of the calendar, as `--keep-within` takes it.

use std::fmt;
use std::str::FromStr;

use jiff::tz::TimeZone;
use jiff::{Span, Timestamp};

/// Years, months, weeks, days and hours: `1y6m2w3d12h`. Not empty.
///
/// All but hours are those of the calendar: a day is the time to the same hour of the day before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Within {
    years: u16,
    months: u16,
    weeks: u16,
    days: u16,
    hours: u16,
}

/// Why a text is no time span.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WithinError {
    /// Not numbers with units.
    #[error(
        "must be numbers with units, each at most once: y, m (months), w, d, h; 1y6m or 14d for instance"
    )]
    Form,
    /// More than 65535 of a unit.
    #[error("is too long")]
    TooLong,
    /// Nothing at all.
    #[error("must not be 0")]
    Zero,
}

impl Within {
    /// The time that lies so long before `time` by the calendar and clock of `zone`; the earliest of
    /// all, if that is before all calendars. A day that a month does not have becomes its last.
    #[must_use]
    pub fn before(self, time: Timestamp, zone: &TimeZone) -> Timestamp {
        let span = Span::new()
            .try_years(self.years)
            .and_then(|span| span.try_months(self.months))
            .and_then(|span| span.try_weeks(self.weeks))
            .and_then(|span| span.try_days(self.days))
            .and_then(|span| span.try_hours(self.hours));
        let before = span.and_then(|span| time.to_zoned(zone.clone()).checked_sub(span));
        before.map_or(Timestamp::MIN, |before| before.timestamp())
    }

    fn parts(&self) -> [(char, u16); 5] {
        [('y', self.years), ('m', self.months), ('w', self.weeks), ('d', self.days), ('h', self.hours)]
    }
}

impl FromStr for Within {
    type Err = WithinError;

    /// Units may come in any order. `H` is what borg calls an hour.
    fn from_str(text: &str) -> Result<Self, WithinError> {
        let mut found: [Option<u16>; 5] = [None; 5];
        let mut rest = text;
        while !rest.is_empty() {
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            let (number, tail) = rest.split_at(digits);
            let mut tail = tail.chars();
            let place = match tail.next() {
                Some('y') => 0,
                Some('m') => 1,
                Some('w') => 2,
                Some('d') => 3,
                Some('h' | 'H') => 4,
                _ => return Err(WithinError::Form),
            };
            if number.is_empty() || found[place].is_some() {
                return Err(WithinError::Form);
            }
            found[place] = Some(number.parse().map_err(|_| WithinError::TooLong)?);
            rest = tail.as_str();
        }
        if found == [None; 5] {
            return Err(WithinError::Form);
        }
        let [years, months, weeks, days, hours] = found.map(Option::unwrap_or_default);
        let within = Self { years, months, weeks, days, hours };
        if within.parts().iter().all(|(_, number)| *number == 0) {
            Err(WithinError::Zero)
        } else {
            Ok(within)
        }
    }
}

impl fmt::Display for Within {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, number) in self.parts().into_iter().filter(|(_, number)| *number > 0) {
            write!(f, "{number}{unit}")?;
        }
        Ok(())
    }
}

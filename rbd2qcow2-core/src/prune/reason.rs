//! Why a point stays or goes, in words.

use std::fmt;

use super::policy::Within;

/// A rule that counts points.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rule {
    /// The newest points.
    Last,
    /// The newest of each hour that has one.
    Hourly,
    /// The newest of each day.
    Daily,
    /// The newest of each week of the ISO calendar, which begins on Monday.
    Weekly,
    /// The newest of each month.
    Monthly,
    /// The newest of each year.
    Yearly,
}

impl Rule {
    /// The word that stands for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Last => "last",
            Self::Hourly => "hourly",
            Self::Daily => "daily",
            Self::Weekly => "weekly",
            Self::Monthly => "monthly",
            Self::Yearly => "yearly",
        }
    }
}

/// Why a point stays, or goes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// Stays: the next backup builds upon it.
    Newest,
    /// Stays: somebody holds it.
    Held {
        /// What they said.
        reason: String,
    },
    /// Stays: one of the newest.
    Last,
    /// Stays: the newest of its period.
    Period {
        /// Which rule keeps it.
        rule: Rule,
        /// The period: `2026-11-23 17:00`, `2026-11-23`, `2026-W48`, `2026-11` or `2026`, in local time.
        period: String,
    },
    /// Stays: the oldest of all, and the rule would have kept more.
    Oldest {
        /// Which rule keeps it.
        rule: Rule,
    },
    /// Stays: younger than that.
    Within(Within),
    /// Stays: only other points were to be removed.
    NotNamed,
    /// Goes: it was to be removed.
    Named,
    /// Goes: no rule keeps it.
    NoRule,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Newest => f.write_str("newest"),
            Self::Held { reason } => write!(f, "held: {reason}"),
            Self::Last => f.write_str(Rule::Last.as_str()),
            Self::Period { rule, period } => write!(f, "{} {period}", rule.as_str()),
            Self::Oldest { rule } => write!(f, "{} (the oldest)", rule.as_str()),
            Self::Within(within) => write!(f, "within {within}"),
            Self::NotNamed => f.write_str("not named"),
            Self::Named => f.write_str("named"),
            Self::NoRule => f.write_str("no rule keeps it"),
        }
    }
}

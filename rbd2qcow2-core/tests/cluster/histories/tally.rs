//! What histories came to, counted under names.

use std::collections::BTreeMap;
use std::fmt;

/// Begins the line in which a child tells its tally.
pub const MARK: &str = "TALLY ";

#[derive(Clone, Debug, Default)]
pub struct Tally(BTreeMap<String, u64>);

impl Tally {
    pub fn count(&mut self, name: impl Into<String>) {
        *self.0.entry(name.into()).or_default() += 1;
    }

    pub fn get(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// The sum of all whose names begin so.
    pub fn sum(&self, prefix: &str) -> u64 {
        self.0.iter().filter(|(name, _)| name.starts_with(prefix)).map(|(_, count)| count).sum()
    }

    /// The sum of all whose names end so.
    pub fn sum_ending(&self, suffix: &str) -> u64 {
        self.0.iter().filter(|(name, _)| name.ends_with(suffix)).map(|(_, count)| count).sum()
    }

    pub fn add(&mut self, other: &Self) {
        for (name, count) in &other.0 {
            *self.0.entry(name.clone()).or_default() += count;
        }
    }

    /// What a child prints.
    pub fn to_line(&self) -> String {
        format!("{MARK}{}", serde_json::to_string(&self.0).expect("JSON"))
    }

    /// What a child has printed, if it got so far.
    pub fn from_output(output: &str) -> Option<Self> {
        let line = output.lines().filter_map(|line| line.strip_prefix(MARK)).next_back()?;
        serde_json::from_str(line).ok().map(Self)
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(name, count)| writeln!(f, "{count:7} {name}"))
    }
}

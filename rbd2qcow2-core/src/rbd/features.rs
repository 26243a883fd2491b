//! The features of an image.

use std::fmt;

/// Bits of `RBD_FEATURE_*`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(pub u64);

/// The names that the `rbd` program has for the bits, from the lowest on.
const NAMES: [&str; 12] = [
    "layering",
    "striping",
    "exclusive-lock",
    "object-map",
    "fast-diff",
    "deep-flatten",
    "journaling",
    "data-pool",
    "operations",
    "migrating",
    "non-primary",
    "dirty-cache",
];

impl Features {
    /// Data may lie spread over several objects.
    pub const STRIPING: Self = Self(1 << 1);
    /// One client at a time writes.
    pub const EXCLUSIVE_LOCK: Self = Self(1 << 2);
    /// Data lie in a pool of their own.
    pub const DATA_POOL: Self = Self(1 << 7);
    /// The image is on its way to another place, and shows what is still at the old one.
    pub const MIGRATING: Self = Self(1 << 9);
    /// Those that an image can be created with. The others tell of a state that it is in.
    pub const SETTABLE: Self = Self(0xff);

    /// Those that have a name here.
    pub const NAMED: Self = Self((1 << NAMES.len()) - 1);

    /// The feature of this name, as the `rbd` program knows it.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        NAMES.iter().position(|known| *known == name).map(|bit| Self(1 << bit))
    }

    /// Those of both.
    #[must_use]
    pub fn with(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }

    /// Those that are not among `others`.
    #[must_use]
    pub fn without(self, others: Self) -> Self {
        Self(self.0 & !others.0)
    }

    /// Whether all of `others` are among them.
    #[must_use]
    pub fn has(self, others: Self) -> bool {
        self.0 & others.0 == others.0
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The newest, which no other builds upon.
    #[must_use]
    pub fn last(self) -> Self {
        Self(self.0.checked_ilog2().map_or(0, |bit| 1 << bit))
    }

    /// Their names, as `rbd info` prints them; a bit without a name as `bit-N`.
    #[must_use]
    pub fn names(self) -> Vec<String> {
        let set = (0..u64::BITS).filter(|bit| self.0 & (1 << bit) != 0);
        set.map(|bit| NAMES.get(bit as usize).map_or_else(|| format!("bit-{bit}"), |name| (*name).to_owned()))
            .collect()
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.names().join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_have_the_names_that_rbd_prints() {
        let features = Features(0b11_1101 | 1 << 60);
        let names = ["layering", "exclusive-lock", "object-map", "fast-diff", "deep-flatten", "bit-60"];
        assert_eq!(features.names(), names);
        assert_eq!(Features(0b101).to_string(), "layering, exclusive-lock");
        assert_eq!(Features::named("exclusive-lock"), Some(Features::EXCLUSIVE_LOCK));
        assert_eq!(Features::named("striping"), Some(Features::STRIPING));
        assert_eq!(Features::named("data-pool"), Some(Features::DATA_POOL));
        assert_eq!(Features::named("speed"), None);
    }

    #[test]
    fn the_last_feature_is_the_highest_bit() {
        assert_eq!(Features(0b101).last(), Features(0b100));
        assert!(Features(0).last().is_empty());
    }
}

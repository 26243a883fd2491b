//! What was used last, up to a limit.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, Hash, RandomState};

/// Values that have a cost each, of which those used last are kept: as many as cost no more than the limit
/// together.
#[derive(Debug)]
pub(super) struct Recent<K, V, S = RandomState> {
    limit: usize,
    /// What all of them cost.
    cost: usize,
    entries: HashMap<K, Entry<V>, S>,
    /// Keys by the time of the last use: the first goes first.
    uses: BTreeMap<u64, K>,
    now: u64,
}

#[derive(Debug)]
struct Entry<V> {
    used: u64,
    cost: usize,
    value: V,
}

impl<K: Copy + Eq + Hash, V: Clone, S: BuildHasher + Default> Recent<K, V, S> {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, cost: 0, entries: HashMap::default(), uses: BTreeMap::new(), now: 0 }
    }

    pub(super) fn get(&mut self, key: K) -> Option<V> {
        let entry = self.entries.get_mut(&key)?;
        self.now += 1;
        self.uses.remove(&entry.used);
        self.uses.insert(self.now, key);
        entry.used = self.now;
        Some(entry.value.clone())
    }

    /// Adds a value, or replaces it, and gives what has to go for it: to be dropped where nobody waits for
    /// that.
    #[must_use]
    pub(super) fn insert(&mut self, key: K, value: V, cost: usize) -> Vec<V> {
        self.now += 1;
        let mut gone = Vec::new();
        self.uses.insert(self.now, key);
        self.cost += cost;
        if let Some(old) = self.entries.insert(key, Entry { used: self.now, cost, value }) {
            self.uses.remove(&old.used);
            self.cost -= old.cost;
            gone.push(old.value);
        }
        while self.cost > self.limit
            && let Some((_, oldest)) = self.uses.pop_first()
            && let Some(old) = self.entries.remove(&oldest)
        {
            self.cost -= old.cost;
            gone.push(old.value);
        }
        gone
    }

    /// Takes all of them away.
    #[must_use]
    pub(super) fn clear(&mut self) -> Vec<V> {
        self.uses.clear();
        self.cost = 0;
        self.entries.drain().map(|(_, entry)| entry.value).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_kept_is_what_a_list_would_keep(
            steps in prop::collection::vec((0_u8..6, prop::option::of(1_usize..5)), 0..60)
        ) {
            const LIMIT: usize = 10;
            let mut recent: Recent<_, _> = Recent::new(LIMIT);
            // The value used last is the last one.
            let mut model: Vec<(u8, usize, usize)> = Vec::new();
            for (number, (key, cost)) in steps.into_iter().enumerate() {
                let known = model.iter().position(|(of, _, _)| *of == key);
                let old = known.map(|place| model.remove(place));
                match cost {
                    None => {
                        prop_assert_eq!(recent.get(key), old.map(|(_, value, _)| value));
                        model.extend(old);
                    }
                    Some(cost) => {
                        let mut gone: Vec<_> = old.map(|(_, value, _)| value).into_iter().collect();
                        model.push((key, number, cost));
                        while model.iter().map(|(_, _, cost)| cost).sum::<usize>() > LIMIT {
                            gone.push(model.remove(0).1);
                        }
                        prop_assert_eq!(recent.insert(key, number, cost), gone);
                    }
                }
            }
            let mut rest = recent.clear();
            rest.sort_unstable();
            let mut kept: Vec<_> = model.iter().map(|(_, value, _)| *value).collect();
            kept.sort_unstable();
            prop_assert_eq!(rest, kept);
            prop_assert!(recent.insert(0, 0, LIMIT).is_empty(), "nothing is left to pay for");
        }
    }
}

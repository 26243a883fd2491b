//! How points build upon each other, and how that is drawn. Pure.
//!
//! Each point hangs below the one that it builds upon. What builds upon each other one by one, as
//! nearly all points do, stands in one column, so a long chain is not drawn ever further to the
//! right; only where several points build upon the same one do they move by a column. The lines
//! below are a forest of two trees, where 3 and 5 both build upon 2:
//!
//! ```text
//! ├┬ the first tree's title
//! │├ 1
//! │├ 2
//! │├┬ 3
//! ││└ 4
//! │└─ 5
//! └┬ the second tree's title
//!  └ 6
//! ```

use std::collections::BTreeMap;

/// Points and their links. A point is told by its index; older ones come first.
#[derive(Clone, Debug)]
pub struct Forest<K> {
    /// The point below, which is older.
    parents: Vec<Option<usize>>,
    /// The points that build right upon each, the oldest first.
    children: Vec<Vec<usize>>,
    trees: Vec<Tree<K>>,
}

/// What belongs together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree<K> {
    /// The point below all others, where that is missing.
    pub missing: Option<K>,
    /// The points at the bottom: one, but for those that share a missing point.
    roots: Vec<usize>,
}

/// A point in a drawing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// What stands before it.
    pub stem: String,
    /// The point.
    pub point: usize,
}

/// Where a point is drawn.
enum Place {
    /// Below the point that it alone builds upon.
    Lane,
    /// A column to the right, among others.
    Sibling {
        /// No other follows.
        last: bool,
    },
}

impl<K: Ord + Copy> Forest<K> {
    /// Takes the names of points, in ascending order and each once, with the names of what they
    /// build upon. That may be missing. A link to a point that is not older leads nowhere and is
    /// left out, so whatever a damaged directory says, each point has one place.
    pub fn new(points: &[(K, Option<K>)]) -> Self {
        let mut forest =
            Self { parents: Vec::new(), children: vec![Vec::new(); points.len()], trees: Vec::new() };
        let mut missing = BTreeMap::new();
        for (index, (_, parent)) in points.iter().enumerate() {
            let found = parent.map(|parent| points.binary_search_by_key(&parent, |(name, _)| *name));
            let below = found.and_then(Result::ok).filter(|&below| below < index);
            forest.parents.push(below);
            match (below, parent, found) {
                (Some(below), ..) => forest.children[below].push(index),
                (None, &Some(parent), Some(Err(_))) => {
                    let tree = *missing.entry(parent).or_insert(forest.trees.len());
                    if tree == forest.trees.len() {
                        forest.trees.push(Tree { missing: Some(parent), roots: Vec::new() });
                    }
                    forest.trees[tree].roots.push(index);
                }
                _ => forest.trees.push(Tree { missing: None, roots: vec![index] }),
            }
        }
        forest
    }

    /// The trees, that of the oldest point first.
    pub fn trees(&self) -> &[Tree<K>] {
        &self.trees
    }

    /// The points of a tree.
    pub fn members(&self, tree: &Tree<K>) -> Vec<usize> {
        let mut members = tree.roots.clone();
        let mut next = 0;
        while let Some(&point) = members.get(next) {
            members.extend(&self.children[point]);
            next += 1;
        }
        members.sort_unstable();
        members
    }

    /// For each point how many others need it, directly or not.
    pub fn needed_by(&self) -> Vec<usize> {
        let mut needed = vec![0; self.parents.len()];
        // Younger ones come first, so their own numbers are complete.
        for (point, parent) in self.parents.iter().enumerate().rev() {
            if let Some(parent) = *parent {
                needed[parent] += needed[point] + 1;
            }
        }
        needed
    }

    /// What stands before a tree's title, and its points as they are drawn below.
    pub fn draw(&self, tree: &Tree<K>, last: bool) -> (String, Vec<Line>) {
        let (title, below) = if last { ("└┬ ", " ") } else { ("├┬ ", "│") };
        let mut lines = Vec::new();
        let mut todo = Vec::new();
        let hang = |todo: &mut Vec<_>, points: &[usize], stem: String| match *points {
            [only] => todo.push((only, stem, Place::Lane)),
            // What is drawn first is taken off last.
            _ => todo.extend(points.iter().enumerate().rev().map(|(number, &point)| {
                (point, stem.clone(), Place::Sibling { last: number + 1 == points.len() })
            })),
        };
        hang(&mut todo, &tree.roots, below.to_owned());
        while let Some((point, stem, place)) = todo.pop() {
            let above = &self.children[point];
            let ends = above.is_empty();
            let (mark, below) = match place {
                Place::Lane => (if ends { "└ " } else { "├ " }, ""),
                Place::Sibling { last: false } => (if ends { "├─ " } else { "├┬ " }, "│"),
                Place::Sibling { last: true } => (if ends { "└─ " } else { "└┬ " }, " "),
            };
            lines.push(Line { stem: format!("{stem}{mark}"), point });
            hang(&mut todo, above, stem + below);
        }
        (title.to_owned(), lines)
    }
}

#[cfg(test)]
mod tests;

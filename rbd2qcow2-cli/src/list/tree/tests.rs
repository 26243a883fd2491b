use proptest::prelude::*;

use super::*;

/// The whole drawing, a tree's title being the point that is missing.
fn drawn(points: &[(u32, Option<u32>)]) -> String {
    let forest = Forest::new(points);
    let trees = forest.trees();
    let mut text = String::from("\n");
    for (number, tree) in trees.iter().enumerate() {
        let (title, lines) = forest.draw(tree, number + 1 == trees.len());
        let name = tree.missing.map_or_else(|| "tree".to_owned(), |missing| format!("without {missing}"));
        text.push_str(&format!("{title}{name}\n"));
        for line in lines {
            text.push_str(&format!("{}{}\n", line.stem, points[line.point].0));
        }
    }
    text
}

#[test]
fn a_linear_chain_stands_in_one_column() {
    assert_eq!(
        drawn(&[(1, None), (2, Some(1)), (3, Some(2)), (4, Some(3))]),
        "
└┬ tree
 ├ 1
 ├ 2
 ├ 3
 └ 4
"
    );
    let long: Vec<_> = (0..50).map(|name: u32| (name, name.checked_sub(1))).collect();
    assert!(drawn(&long).lines().all(|line| line.chars().count() <= "└┬ tree".len()), "{}", drawn(&long));
}

#[test]
fn several_roots_are_several_trees_the_oldest_first() {
    // Two chains that took turns.
    assert_eq!(
        drawn(&[(1, None), (2, None), (3, Some(1)), (4, Some(2)), (5, None)]),
        "
├┬ tree
│├ 1
│└ 3
├┬ tree
│├ 2
│└ 4
└┬ tree
 └ 5
"
    );
}

#[test]
fn branches_move_to_the_right() {
    let points =
        [(1, None), (2, Some(1)), (3, Some(2)), (4, Some(3)), (5, Some(2)), (6, Some(5)), (7, Some(5))];
    assert_eq!(
        drawn(&[&points[..], &[(8, Some(5)), (9, Some(2)), (10, Some(9))]].concat()),
        "
└┬ tree
 ├ 1
 ├ 2
 ├┬ 3
 │└ 4
 ├┬ 5
 │├─ 6
 │├─ 7
 │└─ 8
 └┬ 9
  └ 10
"
    );
    assert_eq!(Forest::new(&points).needed_by(), [6, 5, 1, 0, 2, 0, 0]);
}

#[test]
fn what_builds_upon_a_missing_point_hangs_below_its_place() {
    assert_eq!(
        drawn(&[(1, None), (3, Some(2)), (4, Some(2)), (5, Some(4)), (7, Some(6))]),
        "
├┬ tree
│└ 1
├┬ without 2
│├─ 3
│└┬ 4
│ └ 5
└┬ without 6
 └ 7
"
    );
}

#[test]
fn links_that_lead_in_a_circle_are_cut() {
    assert_eq!(
        drawn(&[(1, Some(3)), (2, Some(1)), (3, Some(2)), (4, Some(4))]),
        "
├┬ tree
│├ 1
│├ 2
│└ 3
└┬ tree
 └ 4
"
    );
}

proptest! {
    #[test]
    fn every_point_has_one_place_after_its_parent(
        links in prop::collection::btree_map(0u32..40, prop::option::of(0u32..40), 0..30)
    ) {
        let points: Vec<_> = links.into_iter().collect();
        let forest = Forest::new(&points);
        let mut seen = Vec::new();
        let mut columns = vec![0; points.len()];
        let mut oldest = None;
        for (number, tree) in forest.trees().iter().enumerate() {
            let (_, lines) = forest.draw(tree, number + 1 == forest.trees().len());
            let first = lines.iter().map(|line| line.point).min();
            prop_assert!(first > oldest, "trees are in the order of their oldest points");
            oldest = first;
            for line in lines {
                let (name, parent) = points[line.point];
                let place = parent.and_then(|parent| points.iter().position(|(name, _)| *name == parent));
                match place {
                    Some(below) if below < line.point => {
                        prop_assert!(seen.contains(&below), "{name} comes before its parent");
                        let siblings = points.iter().filter(|(name, link)| *link == parent && parent < Some(*name));
                        let moved = usize::from(siblings.count() > 1);
                        prop_assert_eq!(line.stem.chars().count(), columns[below] + moved);
                    }
                    Some(_) => prop_assert_eq!(tree.missing, None),
                    None => prop_assert_eq!(tree.missing, parent),
                }
                columns[line.point] = line.stem.chars().count();
                seen.push(line.point);
            }
        }
        // A naive count, by following each point's links.
        let mut needed = vec![0; points.len()];
        for mut point in 0..points.len() {
            while let Some(below) = forest.parents[point] {
                needed[below] += 1;
                point = below;
            }
        }
        prop_assert_eq!(forest.needed_by(), needed);
        seen.sort_unstable();
        prop_assert_eq!(seen, (0..points.len()).collect::<Vec<_>>());
    }
}

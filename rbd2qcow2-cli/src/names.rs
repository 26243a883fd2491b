//! Names that were perhaps meant by one that does not exist.

/// Names alike less than this (1 is the same name) are not worth a suggestion.
const LIKENESS: f64 = 0.75;

/// How many names are suggested.
const SUGGESTIONS: usize = 3;

/// Those of the names `there` that are most like `asked`, as the end of a sentence; empty where none
/// is.
pub fn alike<'a>(asked: &str, there: impl IntoIterator<Item = &'a str>) -> String {
    let mut near: Vec<_> = there.into_iter().map(|name| (strsim::jaro_winkler(asked, name), name)).collect();
    near.retain(|&(likeness, _)| likeness >= LIKENESS);
    near.sort_by(|(left, _), (right, _)| right.total_cmp(left));
    suggest(near.into_iter().map(|(_, name)| name))
}

/// The first few of `names`, which come best first, as the end of a sentence; empty where there are
/// none.
pub fn suggest<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let names: Vec<_> = names.into_iter().take(SUGGESTIONS).map(|name| format!("{name:?}")).collect();
    if names.is_empty() { String::new() } else { format!("; did you mean {}?", names.join(" or ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_suggested_nearest_first() {
        let there = ["vm-web-1", "vm-web-2", "database", "vm"];
        assert_eq!(alike("vm-wbe-1", there), r#"; did you mean "vm-web-1" or "vm-web-2" or "vm"?"#);
        assert_eq!(alike("databse", there), r#"; did you mean "database"?"#);
        assert_eq!(alike("zzz", there), "");
    }
}

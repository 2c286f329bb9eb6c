//! What may have been meant by a name that is not known.

/// A question for the nearest of the `known` names, or a list of them if none is near.
///
/// ```
/// use bantam::config::nearest;
/// assert_eq!(nearest::instead("memry", ["cpus", "memory"].into_iter()), "did you mean `memory`?");
/// ```
pub fn instead<'a>(text: &str, known: impl Iterator<Item = &'a str> + Clone) -> String {
    let nearest = known.clone().map(|name| (distance(text, name), name)).min();
    match nearest {
        Some((distance, name)) if distance <= 1 + text.len() / 4 => format!("did you mean `{name}`?"),
        _ => format!("expected {}", known.collect::<Vec<_>>().join(", ")),
    }
}

/// How many characters have to be put in, left out or changed, to make one of the other.
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<_> = other.chars().collect();
    let mut row: Vec<_> = (0..=other.len()).collect();
    for (i, a) in one.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, b) in other.iter().enumerate() {
            let changed = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[other.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_told_if_it_is_near() {
        let known = || ["timeout", "memory", "env"].into_iter();
        assert_eq!(instead("timeuot", known()), "did you mean `timeout`?");
        assert_eq!(instead("enf", known()), "did you mean `env`?");
        assert_eq!(instead("colour", known()), "expected timeout, memory, env");
        for (one, other, expected) in [("", "abc", 3), ("abc", "abc", 0), ("kitten", "sitting", 3)] {
            assert_eq!((distance(one, other), distance(other, one)), (expected, expected));
        }
    }
}

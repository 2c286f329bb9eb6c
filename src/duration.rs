//! Durations as people write them: `60s`, `500ms`, `2m`. As serde's `with`, the text of an optional duration.

use std::time::Duration;

use serde::{Deserialize, Deserializer, Serializer, de};

/// Text that is no duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no duration: {why}; write it like 60s, 500ms, 2m or 1h")]
pub struct BadDuration {
    text: String,
    why: &'static str,
}

/// Reads a whole number of `ms`, `s`, `m` or `h`, above zero; a bare number is seconds.
pub fn parse(text: &str) -> Result<Duration, BadDuration> {
    let bad = |why| BadDuration { text: text.to_owned(), why };
    let unit_at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(unit_at);
    if digits.is_empty() {
        return Err(bad("it does not start with a number"));
    }
    let millis: u64 = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(bad("its unit is not known")),
    };
    let number: u64 = digits.parse().map_err(|_| bad("it is too long"))?;
    match number.checked_mul(millis) {
        None => Err(bad("it is too long")),
        Some(0) => Err(bad("it is zero")),
        Some(millis) => Ok(Duration::from_millis(millis)),
    }
}

/// Writes the duration in whole milliseconds or seconds.
pub(crate) fn text(duration: Duration) -> String {
    if duration.subsec_nanos() == 0 {
        format!("{}s", duration.as_secs())
    } else {
        format!("{}ms", duration.as_millis())
    }
}

/// For serde's `with`: the duration as text.
pub fn serialize<S: Serializer>(duration: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    match duration {
        Some(duration) => serializer.serialize_some(&text(*duration)),
        None => serializer.serialize_none(),
    }
}

/// For serde's `with`: a duration from its text.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    text.map(|text| parse(&text).map_err(de::Error::custom)).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_accepted_forms() {
        for (text, millis) in [("60s", 60_000), ("60", 60_000), ("500ms", 500), ("2m", 120_000), ("1h", 3_600_000)] {
            assert_eq!(parse(text), Ok(Duration::from_millis(millis)), "{text}");
        }
    }

    #[test]
    fn other_text_is_refused_with_the_forms() {
        for text in ["", "s", "0", "0ms", "1.5s", "-1s", "2d", "2 s", "99999999999999999999s", "9999999999999999999h"] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(&format!("`{text}`")) && error.contains("60s, 500ms"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn text_round_trips(millis in 1u64..1 << 50) {
            let duration = Duration::from_millis(millis);
            prop_assert_eq!(parse(&text(duration)), Ok(duration));
        }
    }
}

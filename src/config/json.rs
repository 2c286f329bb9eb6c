//! JSON as a [`Node`]: serde_json's grammar, and the place of each value.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::tree::{Error, Key, Node, Value};

/// Tables and lists within one another. Each level is read once more for those around it.
const DEPTH: usize = 32;

/// Reads a JSON document.
///
/// # Errors
/// Where the text is no JSON, has a key twice in one object, or more than 32 levels.
pub fn parse(text: &str) -> Result<Node, Error> {
    // As in TOML, a byte order mark is none of it. Places are counted from the text's beginning.
    let begin = text.len() - text.trim_start_matches('\u{feff}').len();
    let raw: &RawValue = serde_json::from_slice(&text.as_bytes()[begin..]).map_err(|error| {
        let line = text.split_inclusive('\n').take(error.line().saturating_sub(1)).map(str::len).sum::<usize>();
        let what = error.to_string();
        let what = what.rsplit_once(" at line ").map_or(&*what, |(what, _)| what).to_owned();
        Error::new((line + if line == 0 { begin } else { 0 } + error.column().saturating_sub(1)).min(text.len()), what)
    })?;
    node(raw, text, DEPTH)
}

/// Where a part of the text begins.
fn place(raw: &RawValue, text: &str) -> usize {
    raw.get().as_ptr().addr().wrapping_sub(text.as_ptr().addr())
}

fn node(raw: &RawValue, text: &str, depth: usize) -> Result<Node, Error> {
    let at = place(raw, text);
    let again = |error: serde_json::Error| Error::new(at, error.to_string());
    let value = match raw.get().as_bytes().first() {
        Some(b'{' | b'[') if depth == 0 => return Err(Error::new(at, format!("more than {DEPTH} levels"))),
        Some(b'{') => {
            let Members(members) = serde_json::from_slice(raw.get().as_bytes()).map_err(again)?;
            let mut pairs: Vec<(Key, Node)> = Vec::with_capacity(members.len());
            for (key, value) in members {
                let (at, name) =
                    (place(key, text), serde_json::from_slice::<String>(key.get().as_bytes()).map_err(again)?);
                let value = node(value, text, depth - 1).map_err(|error| error.within(&name, at))?;
                pairs.push((Key { at, name }, value));
            }
            refuse_twice(&pairs)?;
            Value::Table(pairs)
        }
        Some(b'[') => {
            let items: Vec<&RawValue> = serde_json::from_slice(raw.get().as_bytes()).map_err(again)?;
            Value::List(items.into_iter().map(|item| node(item, text, depth - 1)).collect::<Result<_, _>>()?)
        }
        Some(b'"') => Value::Text(serde_json::from_slice(raw.get().as_bytes()).map_err(again)?),
        Some(b'n') => Value::Null,
        Some(b't' | b'f') => Value::Boolean(raw.get() == "true"),
        _ => match raw.get().parse::<i64>().map(i128::from).or_else(|_| raw.get().parse::<u64>().map(i128::from)) {
            Ok(number) => Value::Integer(number),
            Err(_) => Value::Float(raw.get().parse().map_err(|_| Error::new(at, "expected a value"))?),
        },
    };
    Ok(Node { at, value })
}

/// Refuses a key that was there before.
fn refuse_twice(pairs: &[(Key, Node)]) -> Result<(), Error> {
    let mut keys: Vec<_> = pairs.iter().map(|(key, _)| (&key.name, key.at)).collect();
    keys.sort_unstable();
    match keys.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        Some(pair) => Err(Error::new(pair[1].1, format!("the key `{}` is given twice", pair[0].0))),
        None => Ok(()),
    }
}

/// The keys and values of an object, as they are written.
struct Members<'a>(Vec<(&'a RawValue, &'a RawValue)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read;
        impl<'de> Visitor<'de> for Read {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<'de>, A::Error> {
                let mut members = vec![];
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Result<Members<'de>, A::Error> {
                Err(de::Error::custom("expected an object"))
            }
        }
        deserializer.deserialize_map(Read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn plain(node: &Node) -> serde_json::Value {
        match &node.value {
            Value::Null => serde_json::Value::Null,
            Value::Boolean(it) => (*it).into(),
            Value::Integer(it) => i64::try_from(*it).map_or_else(|_| u64::try_from(*it).unwrap().into(), Into::into),
            Value::Float(it) => (*it).into(),
            Value::Text(it) => it.clone().into(),
            Value::List(it) => it.iter().map(plain).collect(),
            Value::Table(it) => it.iter().map(|(key, it)| (key.name.clone(), plain(it))).collect(),
        }
    }

    #[test]
    fn values_have_their_places() {
        let text = "{\n \"a\\u0062\": [1, -2, 1.5, null],\n \"b\": {\"c\": true, \"d\": \"x\\ny\"}, \"n\": 18446744073709551615}";
        let node = parse(text).unwrap();
        assert_eq!(plain(&node), serde_json::from_str::<serde_json::Value>(text).unwrap());
        let Value::Table(pairs) = &node.value else { panic!("{node:?}") };
        assert_eq!((pairs[0].0.name.as_str(), pairs[0].0.at, pairs[0].1.at), ("ab", 3, 14));
        assert_eq!(text.as_bytes()[pairs[1].1.at], b'{');
    }

    #[test]
    fn a_byte_order_mark_is_none_of_it() {
        let node = parse("\u{feff}{\"a\": 1}").unwrap();
        let Value::Table(pairs) = &node.value else { panic!("{node:?}") };
        assert_eq!((pairs[0].0.name.as_str(), pairs[0].1.at), ("a", 9));
        assert_eq!(parse("\u{feff}{\"a\": x}").unwrap_err().at, Some(9));
    }

    #[test]
    fn mistakes_are_told_where_they_are() {
        for (text, at, what) in [
            ("{\"a\": 1,\n\"b\": 2,\n\"a\": 3}", 17, "the key `a` is given twice"),
            ("{\"a\":\n [1,}", 10, "expected value"),
            ("", 0, "EOF while parsing a value"),
            ("{} x", 3, "trailing characters"),
        ] {
            let error = parse(text).unwrap_err();
            assert_eq!((error.at, error.what.as_str()), (Some(at), what), "{text}");
        }
        assert!(parse(&"[".repeat(100_000)).is_err());
        let deep = format!("{}1{}", "[".repeat(40), "]".repeat(40));
        assert!(parse(&deep).unwrap_err().what.contains("32 levels"));
    }

    proptest! {
        #[test]
        fn what_serde_json_takes_is_the_same(text in "[\\[\\]{}:,\"a01e.\\\\n \n-]{0,24}") {
            let expected = serde_json::from_str::<serde_json::Value>(&text);
            match parse(&text) {
                Ok(node) => prop_assert_eq!(plain(&node), expected.unwrap()),
                Err(error) => prop_assert!(expected.is_err() || error.what.contains("twice"), "{} {:?}", error, expected),
            }
        }
    }
}

//! `key=value,key=value`: the format of device options on the command line, as one more serde format, so that a
//! device's options are stated once, by the struct that they fill in.
//!
//! A first value without a key belongs to the struct's first field. Booleans are `on` and `off`, or `true` and
//! `false`; their key alone is `on`. A comma within a value is written twice; a value may contain `=`.

use serde::de::value::{SeqDeserializer, StrDeserializer};
use serde::de::{self, DeserializeOwned, DeserializeSeed, IntoDeserializer, MapAccess, Visitor};
use serde::forward_to_deserialize_any;

use super::de::numbers;

/// Why the text fills in no struct.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The text is empty.
    #[error("no value is given")]
    Empty,
    /// A comma has nothing before or after it.
    #[error("a key=value is missing beside a comma (a comma within a value is written twice)")]
    Gap,
    /// A key without a value.
    #[error("`{key}` has no value: write {key}=VALUE")]
    NoValue {
        /// The key.
        key: String,
    },
    /// A key that was there before.
    #[error("`{key}` is given twice")]
    Duplicate {
        /// The key.
        key: String,
    },
    /// A key that is not one of the struct's fields.
    #[error("`{key}` is not known here: expected {}", .known.join(", "))]
    Unknown {
        /// The key.
        key: String,
        /// Those that are known.
        known: &'static [&'static str],
    },
    /// A key that has to be there.
    #[error("`{0}` is not given")]
    Missing(&'static str),
    /// A value that its key cannot have.
    #[error("`{key}={value}` cannot be used: {why}")]
    Value {
        /// The key.
        key: String,
        /// The value.
        value: String,
        /// What is wrong with it.
        why: String,
    },
    /// What the struct itself objects to.
    #[error("{0}")]
    Other(String),
}

impl de::Error for Error {
    fn custom<T: std::fmt::Display>(text: T) -> Self {
        Self::Other(text.to_string())
    }
    fn missing_field(field: &'static str) -> Self {
        Self::Missing(field)
    }
}

/// Reads a `T` from `key=value,key=value`.
///
/// ```
/// use bantam::config::kv;
/// #[derive(serde::Deserialize)]
/// struct Disk { path: String, #[serde(default)] readonly: bool }
///
/// let disk: Disk = kv::from_str("a.img,readonly=on")?;
/// assert!(disk.path == "a.img" && disk.readonly);
/// # Ok::<(), kv::Error>(())
/// ```
pub fn from_str<T: DeserializeOwned>(text: &str) -> Result<T, Error> {
    if text.is_empty() {
        return Err(Error::Empty);
    }
    T::deserialize(Options(split(text)))
}

/// Splits at single commas; two make one within an item.
fn split(text: &str) -> Vec<String> {
    let mut items = vec![];
    let mut item = String::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c != ',' {
            item.push(c);
        } else if chars.next_if_eq(&',').is_some() {
            item.push(',');
        } else {
            items.push(std::mem::take(&mut item));
        }
    }
    items.push(item);
    items
}

/// The items of the text, each a `key=value` or a key alone; the first may be a value alone.
struct Options(Vec<String>);

/// A key, and its value if it has one.
type Pair = (String, Option<String>);

impl Options {
    /// The keys and values; `first` is the key of a first value without one.
    fn pairs(self, first: Option<&str>) -> Result<Vec<Pair>, Error> {
        let mut pairs: Vec<Pair> = Vec::with_capacity(self.0.len());
        for (i, item) in self.0.into_iter().enumerate() {
            let (key, value) = match (item.split_once('='), first) {
                _ if item.is_empty() => return Err(Error::Gap),
                (Some((key, value)), _) if !value.is_empty() => (key.to_owned(), Some(value.to_owned())),
                (Some((key, _)), _) => return Err(Error::NoValue { key: key.to_owned() }),
                (None, Some(first)) if i == 0 => (first.to_owned(), Some(item)),
                (None, _) => (item, None),
            };
            if pairs.iter().any(|(other, _)| *other == key) {
                return Err(Error::Duplicate { key });
            }
            pairs.push((key, value));
        }
        Ok(pairs)
    }
}

impl<'de> de::Deserializer<'de> for Options {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_map(Pairs { rest: self.pairs(None)?.into_iter(), current: None })
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        known: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let pairs = self.pairs(known.first().copied())?;
        if let Some((key, _)) = pairs.iter().find(|(key, _)| !known.contains(&key.as_str())) {
            return Err(Error::Unknown { key: key.clone(), known });
        }
        visitor.visit_map(Pairs { rest: pairs.into_iter(), current: None })
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

/// The pairs not read yet, and the one whose key was.
struct Pairs {
    rest: std::vec::IntoIter<Pair>,
    current: Option<Pair>,
}

impl<'de> MapAccess<'de> for Pairs {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        self.current = self.rest.next();
        let Some((key, _)) = &self.current else { return Ok(None) };
        let key: StrDeserializer<'_, Error> = key.as_str().into_deserializer();
        seed.deserialize(key).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let (key, value) = self.current.take().expect("serde asks for a value only after its key");
        match value {
            Some(value) => {
                seed.deserialize(Value(&value)).map_err(|error| Error::Value { key, value, why: error.to_string() })
            }
            None => seed.deserialize(Alone).map_err(|_| Error::NoValue { key }),
        }
    }
}

/// What a key has that stands alone: of a boolean it is `true`, and nothing else can do without a value.
struct Alone;

impl<'de> de::Deserializer<'de> for Alone {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, Error> {
        Err(Error::Empty)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_bool(true)
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

/// One value; what it is read as is the field's to say.
struct Value<'a>(&'a str);

impl Value<'_> {
    fn number<N: std::str::FromStr>(&self) -> Result<N, Error> {
        let bits = 8 * size_of::<N>();
        self.0.parse().map_err(|_| Error::Other(format!("expected a number of {bits} bits")))
    }
}

impl<'de> de::Deserializer<'de> for Value<'_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_str(self.0)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            "on" | "true" => visitor.visit_bool(true),
            "off" | "false" => visitor.visit_bool(false),
            _ => Err(Error::Other("expected on or off".to_owned())),
        }
    }

    numbers! {}

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _name: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_seq(SeqDeserializer::new(std::iter::once(self.0)))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        if !variants.contains(&self.0) {
            return Err(Error::Other(format!("expected {}", variants.join(" or "))));
        }
        visitor.visit_enum(self.0.into_deserializer())
    }

    forward_to_deserialize_any! {
        i128 u128 f32 f64 char str string bytes byte_buf unit unit_struct tuple tuple_struct map struct identifier
        ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde::Deserialize;
    use std::path::PathBuf;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Cache {
        #[default]
        Writeback,
        Unsafe,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Disk {
        path: PathBuf,
        #[serde(default)]
        readonly: bool,
        id: Option<String>,
        #[serde(default)]
        cache: Cache,
        mtu: Option<u16>,
        #[serde(default)]
        ports: Vec<u16>,
    }

    fn disk(path: &str) -> Disk {
        Disk { path: path.into(), readonly: false, id: None, cache: Cache::Writeback, mtu: None, ports: vec![] }
    }

    #[test]
    fn keys_fill_in_fields() {
        assert_eq!(from_str("a"), Ok(disk("a")));
        assert_eq!(from_str("path=a=b"), Ok(disk("a=b")));
        assert_eq!(from_str("readonly,readonly"), Ok(Disk { readonly: true, ..disk("readonly") }));
        assert_eq!(from_str("a,,b,readonly=true"), Ok(Disk { readonly: true, ..disk("a,b") }));
        assert_eq!(
            from_str("id=x,cache=unsafe,mtu=9000,readonly=on,path=p"),
            Ok(Disk { id: Some("x".into()), cache: Cache::Unsafe, mtu: Some(9000), readonly: true, ..disk("p") })
        );
    }

    #[test]
    fn mistakes_are_named() {
        for (text, error) in [
            ("", "no value is given"),
            ("a,", "a key=value is missing beside a comma (a comma within a value is written twice)"),
            (",a", "a key=value is missing beside a comma (a comma within a value is written twice)"),
            ("a,id", "`id` has no value: write id=VALUE"),
            ("a,cache", "`cache` has no value: write cache=VALUE"),
            ("a,read", "`read` is not known here: expected path, readonly, id, cache, mtu, ports"),
            ("a,readonly,readonly=off", "`readonly` is given twice"),
            ("a,id=", "`id` has no value: write id=VALUE"),
            ("path=", "`path` has no value: write path=VALUE"),
            ("a,path=b", "`path` is given twice"),
            ("a,id=x,id=x", "`id` is given twice"),
            ("a,read=on", "`read` is not known here: expected path, readonly, id, cache, mtu, ports"),
            ("id=x", "`path` is not given"),
            ("a,readonly=yes", "`readonly=yes` cannot be used: expected on or off"),
            ("a,cache=none", "`cache=none` cannot be used: expected writeback or unsafe"),
            ("a,mtu=65536", "`mtu=65536` cannot be used: expected a number of 16 bits"),
            ("a,mtu=x", "`mtu=x` cannot be used: expected a number of 16 bits"),
        ] {
            assert_eq!(from_str::<Disk>(text).unwrap_err().to_string(), error, "{text}");
        }
    }

    proptest! {
        #[test]
        fn values_round_trip(path in "\\PC{1,12}", id in proptest::option::of("[a-z=,]{1,8}"), readonly: bool) {
            let mut text = format!("path={}", path.replace(',', ",,"));
            if let Some(id) = &id {
                text += &format!(",id={}", id.replace(',', ",,"));
            }
            text += if readonly { ",readonly" } else { ",readonly=off" };
            prop_assert_eq!(from_str(&text), Ok(Disk { readonly, id, ..disk(&path) }));
        }

        #[test]
        fn any_text_is_taken_or_refused(text in "[a-z=,]{0,24}|\\PC{0,24}") {
            let _ = from_str::<Disk>(&text);
        }
    }
}

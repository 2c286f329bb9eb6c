//! A file's tables and values, each with its place, whatever the file's format.

use serde::de;

use super::nearest;

/// A value, and where it begins in the text, in bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// Where it begins.
    pub at: usize,
    /// What it is.
    pub value: Value,
}

/// What a value can be.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// JSON's `null`.
    Null,
    /// A boolean.
    Boolean(bool),
    /// A whole number; no format has more than 64 bits.
    Integer(i128),
    /// Another number.
    Float(f64),
    /// A text.
    Text(String),
    /// A list.
    List(Vec<Node>),
    /// A table (an object), with its keys in their order, each once.
    Table(Vec<(Key, Node)>),
}

/// A key of a table, and where it begins in the text, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// Where it begins.
    pub at: usize,
    /// The key.
    pub name: String,
}

/// What is wrong with a file, and where in it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{what}", if .path.is_empty() { String::new() } else { format!("`{path}`: ") })]
pub struct Error {
    /// Where in the text, in bytes, if that is known.
    pub at: Option<usize>,
    /// The key it is about, from the outermost table on, if there is one: `disks[0].path`.
    pub path: String,
    /// What is wrong.
    pub what: String,
}

impl Error {
    /// That `what` is wrong at a place of the text.
    pub fn new(at: usize, what: impl Into<String>) -> Self {
        Self { at: Some(at), path: String::new(), what: what.into() }
    }

    /// The same, as seen from the table or list around it: `segment` is a key or `[index]`, at this place.
    #[must_use]
    pub fn within(mut self, segment: &str, at: usize) -> Self {
        let dot = if self.path.is_empty() || self.path.starts_with('[') { "" } else { "." };
        self.path = format!("{segment}{dot}{}", self.path);
        self.at.get_or_insert(at);
        self
    }
}

impl de::Error for Error {
    fn custom<T: std::fmt::Display>(text: T) -> Self {
        Self { at: None, path: String::new(), what: text.to_string() }
    }

    fn missing_field(field: &'static str) -> Self {
        de::Error::custom(format_args!("the key `{field}` is missing"))
    }
}

impl Value {
    /// What kind of value it is, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Boolean(_) => "a boolean",
            Self::Integer(_) | Self::Float(_) => "a number",
            Self::Text(_) => "a text",
            Self::List(_) => "a list",
            Self::Table(_) => "a table",
        }
    }
}

impl Node {
    /// That something else was expected.
    pub fn unexpected(&self, expected: &str) -> Error {
        Error::new(self.at, format!("expected {expected}, and not {}", self.value.kind()))
    }

    /// Whether it is a table with this key.
    pub fn has(&self, key: &str) -> bool {
        matches!(&self.value, Value::Table(table) if table.iter().any(|(it, _)| it.name == key))
    }

    /// The table that it is, of which only these keys are known.
    /// A key with `null` is one that is not there.
    pub fn table(&self, known: &'static [&'static str]) -> Result<Table<'_>, Error> {
        let Value::Table(pairs) = &self.value else { return Err(self.unexpected("a table")) };
        check_keys(pairs.iter().filter(|(_, node)| node.value != Value::Null), known)?;
        Ok(Table { at: self.at, pairs })
    }
}

/// Refuses the first key that is not one of the `known`.
pub(super) fn check_keys<'a>(pairs: impl IntoIterator<Item = &'a (Key, Node)>, known: &[&str]) -> Result<(), Error> {
    let unknown = pairs.into_iter().map(|(key, _)| key).find(|key| !known.contains(&&*key.name));
    unknown.map_or(Ok(()), |Key { at, name }| {
        Err(Error::new(*at, format!("unknown key `{name}`: {}", nearest::instead(name, known.iter().copied()))))
    })
}

/// A table whose keys are read one by one.
#[derive(Debug, Clone, Copy)]
pub struct Table<'a> {
    at: usize,
    pairs: &'a [(Key, Node)],
}

impl<'a> Table<'a> {
    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&'a Node> {
        let value = self.pairs.iter().find(|(it, _)| it.name == key).map(|(_, value)| value);
        value.filter(|value| value.value != Value::Null)
    }

    /// That `key` has to be there.
    pub fn missing(&self, key: &str) -> Error {
        Error::new(self.at, format!("the key `{key}` is missing"))
    }

    /// That the value of `key` is wrong.
    pub fn wrong(&self, key: &str, what: &str) -> Error {
        let at = self.get(key).map_or(self.at, |node| node.at);
        Error::new(at, what).within(key, at)
    }

    /// A value that `read` makes something of.
    pub fn read<T>(&self, key: &str, read: impl FnOnce(&'a Node) -> Result<T, Error>) -> Result<Option<T>, Error> {
        let Some(node) = self.get(key) else { return Ok(None) };
        read(node).map(Some).map_err(|error| error.within(key, node.at))
    }

    /// A text.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>, Error> {
        self.read(key, |node| match &node.value {
            Value::Text(text) => Ok(text.as_str()),
            _ => Err(node.unexpected("a text")),
        })
    }

    /// A boolean.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>, Error> {
        self.read(key, |node| match &node.value {
            Value::Boolean(boolean) => Ok(*boolean),
            _ => Err(node.unexpected("a boolean")),
        })
    }

    /// A whole number from `min` to `max`.
    pub fn number(&self, key: &str, min: u64, max: u64) -> Result<Option<u64>, Error> {
        self.read(key, |node| {
            let wrong = || Error::new(node.at, format!("expected a number from {min} to {max}"));
            match node.value {
                Value::Integer(number) => {
                    u64::try_from(number).ok().filter(|number| (min..=max).contains(number)).ok_or_else(wrong)
                }
                _ => Err(node.unexpected("a whole number")),
            }
        })
    }

    /// One of the texts in `choices`: its index.
    pub fn choice(&self, key: &str, choices: &'static [&'static str]) -> Result<Option<usize>, Error> {
        self.read(key, |node| {
            let text = if let Value::Text(text) = &node.value { text } else { return Err(node.unexpected("a text")) };
            choices.iter().position(|choice| choice == text).ok_or_else(|| {
                Error::new(node.at, format!("unknown variant `{text}`, expected one of {}", choices.join(", ")))
            })
        })
    }

    /// A list.
    pub fn list(&self, key: &str) -> Result<&'a [Node], Error> {
        let list = self.read(key, |node| match &node.value {
            Value::List(items) => Ok(items.as_slice()),
            _ => Err(node.unexpected("a list")),
        })?;
        Ok(list.unwrap_or_default())
    }

    /// The keys and values.
    pub fn pairs(&self) -> &'a [(Key, Node)] {
        self.pairs
    }
}

//! TOML as a [`Node`].

use toml_span::value::ValueInner;

use super::tree::{Error, Key, Node, Value};

/// Reads a TOML document.
///
/// # Errors
/// Where the text is no TOML.
pub fn parse(text: &str) -> Result<Node, Error> {
    match toml_span::parse(text) {
        Ok(value) => Ok(node(value)),
        Err(error) => Err(Error::new(error.span.start, error.to_string())),
    }
}

fn node(mut value: toml_span::Value<'_>) -> Node {
    let at = value.span.start;
    let value = match value.take() {
        ValueInner::String(text) => Value::Text(text.into_owned()),
        ValueInner::Integer(number) => Value::Integer(number.into()),
        ValueInner::Float(number) => Value::Float(number),
        ValueInner::Boolean(boolean) => Value::Boolean(boolean),
        ValueInner::Array(items) => Value::List(items.into_iter().map(node).collect()),
        ValueInner::Table(table) => {
            let pair = |(key, value): (toml_span::value::Key<'_>, _)| {
                (Key { at: key.span.start, name: key.name.into_owned() }, node(value))
            };
            let mut pairs: Vec<_> = table.into_iter().map(pair).collect();
            // As they are in the file.
            pairs.sort_unstable_by_key(|(key, _)| key.at);
            Value::Table(pairs)
        }
    };
    Node { at, value }
}

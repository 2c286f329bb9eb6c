//! Tables of a TOML file, key by key: what is wrong is told with its line, and what is not known with what comes nearest.

use std::path::{Path, PathBuf};

use bantam::config::nearest::instead;
use toml_span::value::{Table, ValueInner};
use toml_span::{Span, Value};

/// What is wrong with a file, and where.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot use {}:{line}: {what}", .path.display())]
pub struct Error {
    path: PathBuf,
    line: usize,
    what: String,
}

/// A file's path and text.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    pub path: &'a Path,
    pub text: &'a str,
}

impl<'a> Source<'a> {
    /// Says that `what` is wrong at a place of the text.
    pub fn error(self, at: Span, what: impl Into<String>) -> Error {
        let before = &self.text.as_bytes()[..at.start.min(self.text.len())];
        let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
        Error { path: self.path.to_owned(), line, what: what.into() }
    }

    /// The keys of the whole file.
    pub fn keys(self, known: &'static [&'static str]) -> Result<Keys<'a>, Error> {
        match toml_span::parse(self.text) {
            Ok(value) => Keys::new(self, "the file", value, known),
            Err(error) => Err(self.error(error.span, error.to_string())),
        }
    }
}

/// A text, and where it is.
#[derive(Debug, Clone)]
pub struct Text {
    pub text: String,
    pub at: Span,
}

/// The keys of a table, until they are taken.
pub struct Keys<'a> {
    source: Source<'a>,
    table: Table<'a>,
    /// The whole table.
    pub at: Span,
    /// What it is.
    name: &'static str,
}

impl<'a> Keys<'a> {
    fn new(
        source: Source<'a>,
        name: &'static str,
        mut value: Value<'a>,
        known: &'static [&'static str],
    ) -> Result<Self, Error> {
        let at = value.span;
        let table = match value.take() {
            ValueInner::Table(table) => table,
            other => return Err(source.error(at, format!("{name} is a table, and not {}", kind(&other)))),
        };
        let unknown = table.keys().filter(|key| !known.contains(&&*key.name));
        if let Some(key) = unknown.min_by_key(|key| key.span.start) {
            let what = format!("`{}` is no key of {name}: {}", key.name, instead(&key.name, known.iter().copied()));
            return Err(source.error(key.span, what));
        }
        Ok(Self { source, table, at, name })
    }

    fn take(&mut self, key: &str) -> Option<(Span, ValueInner<'a>)> {
        self.table.remove(key).map(|mut value| (value.span, value.take()))
    }

    fn wrong(&self, key: &str, at: Span, expected: &str, found: &ValueInner<'_>) -> Error {
        self.source.error(at, format!("`{key}` is {expected}, and not {}", kind(found)))
    }

    /// A text; a number is one too.
    pub fn text(&mut self, key: &str) -> Result<Option<Text>, Error> {
        match self.take(key) {
            None => Ok(None),
            Some((at, ValueInner::String(text))) => Ok(Some(Text { text: text.into_owned(), at })),
            Some((at, ValueInner::Integer(number))) => Ok(Some(Text { text: number.to_string(), at })),
            Some((at, other)) => Err(self.wrong(key, at, "a text", &other)),
        }
    }

    /// A list of texts, and whether it was a list: a text alone is one of one.
    pub fn texts(&mut self, key: &str) -> Result<(Vec<Text>, bool), Error> {
        let items = match self.take(key) {
            None => return Ok((vec![], true)),
            Some((at, ValueInner::String(text))) => return Ok((vec![Text { text: text.into_owned(), at }], false)),
            Some((_, ValueInner::Array(items))) => items,
            Some((at, other)) => return Err(self.wrong(key, at, "a list of texts", &other)),
        };
        let text = |mut value: Value<'a>| match value.take() {
            ValueInner::String(text) => Ok(Text { text: text.into_owned(), at: value.span }),
            other => Err(self.wrong(key, value.span, "a list of texts", &other)),
        };
        Ok((items.into_iter().map(text).collect::<Result<_, _>>()?, true))
    }

    /// The tables `[[key]]`, which are called `name`.
    pub fn tables(
        &mut self,
        key: &str,
        name: &'static str,
        known: &'static [&'static str],
    ) -> Result<Vec<Keys<'a>>, Error> {
        let items = match self.take(key) {
            None => vec![],
            Some((_, ValueInner::Array(items))) => items,
            Some((at, _)) => return Err(self.source.error(at, format!("`{key}` is a list of tables: write {name}"))),
        };
        items.into_iter().map(|value| Keys::new(self.source, name, value, known)).collect()
    }

    /// The table `[key]`.
    pub fn table(&mut self, key: &str, known: &'static [&'static str]) -> Result<Option<Keys<'a>>, Error> {
        let Some(value) = self.table.remove(key) else { return Ok(None) };
        Keys::new(self.source, "[defaults]", value, known).map(Some)
    }

    /// A key that has to be there.
    pub fn required(&mut self, key: &str) -> Result<Text, Error> {
        let text = self.text(key)?;
        text.ok_or_else(|| self.source.error(self.at, format!("{} has no `{key}`", self.name)))
    }
}

fn kind(value: &ValueInner<'_>) -> &'static str {
    match value {
        ValueInner::String(_) => "a text",
        ValueInner::Integer(_) | ValueInner::Float(_) => "a number",
        ValueInner::Boolean(_) => "a boolean",
        ValueInner::Array(_) => "a list",
        ValueInner::Table(_) => "a table",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_text_is_read_or_refused_at_one_of_its_lines(text in "[ab=\\[\\]{}'\"\\\\ \\n.,#1é-]{0,40}") {
            let source = Source { path: Path::new("t"), text: &text };
            if let Err(error) = source.keys(&["a"]) {
                prop_assert!(error.line <= 1 + text.matches('\n').count());
            }
        }
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        let source = |text| Source { path: Path::new("t.toml"), text };
        let error = |text| {
            let mut keys = source(text).keys(&["a", "b"])?;
            keys.text("a").and_then(|_| keys.texts("b")).map(drop)
        };
        for (text, expected) in [
            ("a = 1\n\nc = 2", "cannot use t.toml:3: `c` is no key of the file: did you mean `a`?"),
            ("\na = true", "cannot use t.toml:2: `a` is a text, and not a boolean"),
            ("b = [\n'x',\n2]", "cannot use t.toml:3: `b` is a list of texts, and not a number"),
        ] {
            assert_eq!(error(text).unwrap_err().to_string(), expected);
        }
        let broken = error("a = 1\nb = [").unwrap_err().to_string();
        assert!(broken.starts_with("cannot use t.toml:2: "), "{broken}");
        assert!(error("a = 'x'\nb = 'y'").is_ok());
    }
}

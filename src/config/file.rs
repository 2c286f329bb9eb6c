//! `--config FILE`: a machine, and how its run is told, in JSON or TOML. Firecracker's configuration file is one, too.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::de::{self, Deserialize, Visitor};
use serde::{Serialize, forward_to_deserialize_any};

use super::tree::{self, Node, Value};
use super::{Config, Name, firecracker, json, toml};

/// The most bytes in a file.
const MAX: u64 = 4 << 20;

/// What a run does beside running the machine. Its keys stand in the file beside those of the [`Config`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Run {
    /// The name that others reach the machine by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// Where the outcome, durations and counters are written, as JSON; `-` is standard output.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub report: Option<PathBuf>,
    /// Where the outcome is written as JUnit XML; `-` is standard output.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub junit: Option<PathBuf>,
    /// The key of the warm snapshot that it starts from, or makes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warm: Option<String>,
    /// Whether workflow commands of GitHub Actions are printed.
    #[serde(skip_serializing_if = "is_default")]
    pub github: bool,
    /// How often it is run again after a failure.
    #[serde(skip_serializing_if = "is_default")]
    pub retry: u16,
    /// How much more is logged: 1 what happens, 2 details, 3 everything.
    #[serde(skip_serializing_if = "is_default")]
    pub verbose: u8,
    /// The file that is logged to, at its end, instead of to standard error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_file: Option<PathBuf>,
    /// Where what happens is written, as lines of JSON.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub events: Option<PathBuf>,
    /// What the process may still do when the machine runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<crate::sandbox::Mode>,
    /// That it runs in a jail.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jail: Option<Jail>,
    /// Where the counters are written each minute and at the end, as lines of JSON, under Firecracker's names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics: Option<PathBuf>,
}

/// Who a machine's process is in a jail, and how it is limited.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Jail {
    /// The user; if root starts it, otherwise one that nobody else is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// The group; otherwise that of the user's number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gid: Option<u32>,
    /// Whether a control group limits its memory and processes; otherwise, if one can be made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<bool>,
}

impl Jail {
    /// Reads `uid=N,gid=N,cgroup=on|off`, of which each may be missing.
    ///
    /// # Errors
    /// When it is something else.
    pub fn read(text: &str) -> Result<Self, super::kv::Error> {
        if text.is_empty() { Ok(Self::default()) } else { super::kv::from_str(text) }
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// What a file says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Document {
    /// The machine.
    pub config: Config,
    /// How its run is told.
    pub run: Run,
    /// Whether it says where the serial console is: with a command that is otherwise nowhere.
    pub says_serial: bool,
}

/// Why a file says nothing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read.
    #[error("cannot read the configuration {}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// It is no configuration.
    #[error("cannot use the configuration {}, line {line}: {what}", .path.display())]
    Wrong {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong there.
        what: tree::Error,
    },
}

/// Reads the file at `path`; `-` is standard input.
///
/// # Errors
/// When it cannot be read, or is no configuration.
pub fn read(path: &Path) -> Result<Document, Error> {
    parse(path, &read_text(path)?)
}

/// The text of a configuration file at `path`, which `-` is standard input for.
///
/// # Errors
/// When it cannot be read, is larger than 4 MiB, or no UTF-8.
pub fn read_text(path: &Path) -> Result<String, Error> {
    let mut text = String::new();
    let read = match path.as_os_str() == "-" {
        true => io::stdin().lock().take(MAX + 1).read_to_string(&mut text),
        false => File::open(path).and_then(|file| file.take(MAX + 1).read_to_string(&mut text)),
    };
    let read = read.and_then(|bytes| match u64::try_from(bytes).unwrap_or(u64::MAX) > MAX {
        true => Err(io::Error::new(io::ErrorKind::FileTooLarge, "it has more than 4 MiB")),
        false => Ok(()),
    });
    read.map(|()| text).map_err(|source| Error::Read { path: path.to_owned(), source })
}

/// Reads the text of the file at `path`: JSON if its name ends in `.json`, TOML if that is `.toml`, else what it begins like.
///
/// # Errors
/// When it is no configuration.
pub fn parse(path: &Path, text: &str) -> Result<Document, Error> {
    let read = tree(path, text).and_then(|node| match firecracker::is_file(&node) {
        true => firecracker::document(&node),
        false => document(node),
    });
    read.map_err(|what| wrong(path, text, what))
}

/// That something in the text of the file at `path` is wrong.
pub fn wrong(path: &Path, text: &str, what: tree::Error) -> Error {
    let before = &text.as_bytes()[..what.at.unwrap_or(0).min(text.len())];
    let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
    Error::Wrong { path: path.to_owned(), line, what }
}

/// The text's tables and values.
///
/// # Errors
/// When it is neither JSON nor TOML.
pub fn tree(path: &Path, text: &str) -> Result<Node, tree::Error> {
    let is_json = match path.extension() {
        Some(extension) if extension == "json" => true,
        Some(extension) if extension == "toml" => false,
        _ => text.trim_start().starts_with('{'),
    };
    if is_json { json::parse(text) } else { toml::parse(text) }
}

fn document(mut node: Node) -> Result<Document, tree::Error> {
    let says_serial = node.has("serial");
    let Value::Table(pairs) = &mut node.value else { return Err(node.unexpected("a table")) };
    // What tells editors of the keys.
    pairs.retain(|(key, _)| key.name != "$schema");
    tree::check_keys(&*pairs, &keys())?;
    let (of_run, of_machine) = std::mem::take(pairs).into_iter().partition(|(key, _)| is_of_run(&key.name));
    let part = |pairs| Node { at: node.at, value: Value::Table(pairs) };
    let (run, config) = (part(of_run), part(of_machine));
    Ok(Document { config: Config::deserialize(&config)?, run: Run::deserialize(&run)?, says_serial })
}

fn is_of_run(key: &str) -> bool {
    Fields::of::<Run>().contains(&key)
}

/// All keys that a file may have at its outermost level.
pub fn keys() -> Vec<&'static str> {
    [Fields::of::<Config>(), Fields::of::<Run>()].concat()
}

/// Asks a struct for the names of its fields.
struct Fields<'a>(&'a mut &'static [&'static str]);

impl Fields<'_> {
    fn of<T: for<'de> Deserialize<'de>>() -> &'static [&'static str] {
        let mut fields: &'static [&'static str] = &[];
        // It fills in nothing, which is an error.
        let _ = T::deserialize(Fields(&mut fields));
        fields
    }
}

impl<'de> de::Deserializer<'de> for Fields<'_> {
    type Error = de::value::Error;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
        Err(de::Error::custom("it has no fields"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Self::Error> {
        *self.0 = fields;
        Err(de::Error::custom("only the fields were asked for"))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Size;
    use crate::devices::console;
    use proptest::prelude::*;

    fn read(name: &str, text: &str) -> Result<Document, String> {
        parse(Path::new(name), text).map_err(|error| error.to_string())
    }

    #[test]
    fn both_formats_say_the_same() {
        let toml = "kernel = 'k'\nmemory = '1G'\ntimeout = 60\nreport = 'r.json'\n[[disks]]\npath = 'd'\nreadonly = true\n\
                    [command]\narguments = ['ls']";
        let json = r#"{"kernel": "k", "memory": "1024M", "timeout": "1m", "report": "r.json",
                       "disks": [{"path": "d", "readonly": true}], "command": {"arguments": ["ls"]}}"#;
        let document = read("x.toml", toml).unwrap();
        assert_eq!(document.config.memory, Size::gib(1));
        assert!(document.config.disks[0].readonly && !document.says_serial);
        assert_eq!(document.run.report, Some("r.json".into()));
        for (name, text) in [("x", toml), ("/dev/fd/3", json), ("x.json", json)] {
            assert_eq!(read(name, text), Ok(document.clone()), "{name}");
        }
        let document = read("x", "'$schema' = 'x'\nserial = 'none'").unwrap();
        assert!(document.says_serial && document.config.serial == console::Spec::None);
    }

    #[test]
    fn mistakes_are_told_with_file_line_and_key() {
        for (name, text, error) in [
            ("a.toml", "cpus = 2\n\nmemry = '1G'", "a.toml, line 3: unknown key `memry`: did you mean `memory`?"),
            ("a.json", "{\"cpus\":\n\"two\"}", "a.json, line 2: `cpus`: expected a number of 32 bits, and not a text"),
            ("a", "memory = '12X'", "a, line 1: `memory`: `12X` is no size: its unit is not known"),
            ("a", "\n[[disks]]\npath = 'd'\nreadonly = 1", "line 4: `disks[0].readonly`: expected true or false"),
            ("a", "[[disks]]\npth = 'd'", "line 2: `disks[0]`: unknown key `pth`: did you mean `path`?"),
            ("a", "\n[[disks]]\nid = 'd'", "line 2: `disks[0]`: the key `path` is missing"),
            ("a", "[[disks]]\npath = 'd'\ncache = 'x'", "`disks[0].cache`: expected writeback or unsafe"),
            ("a", "cpus = 99999999999", "`cpus`: expected a number of 32 bits, and not 99999999999"),
            ("a", "reprt = 'x'", "unknown key `reprt`: did you mean `report`?"),
            ("a", "{\"cpus\": 1,\n \"cpus\": 2}", "line 2: the key `cpus` is given twice"),
            ("a", "cpus = 1\ncpus = 2", "line 2: "),
            ("a", "{\"cpus\": 1,\n", "line 2: EOF"),
            ("a.json", "[]", "line 1: expected a table, and not a list"),
            (
                "a",
                "\nsandbox = true",
                "line 2: `sandbox`: expected \"on\", \"log\" or \"off\", and not true: write \"on\"",
            ),
            ("a", "sandbox = 'yes'", "`sandbox`: cannot use `yes` as a sandbox: expected on, log or off"),
            ("a", "[[disks]]\npath = 'd'\niops = 0", "`disks[0].iops`: "),
        ] {
            let found = read(name, text).unwrap_err();
            assert!(found.contains(error), "{text}\n{found}");
        }
    }

    #[test]
    fn what_is_printed_is_read() {
        let config =
            Config::new().kernel("k").rootfs("r").cpus(3).memory(Size::gib(2)).disk(crate::virtio::blk::Spec::new("d"));
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(read("x", &json).unwrap().config, config);
    }

    /// The keys of both structs, with what their documents say.
    fn schema() -> String {
        let generate = || schemars::generate::SchemaSettings::draft2020_12().into_generator();
        let mut schema = serde_json::to_value(generate().into_root_schema_for::<Config>()).unwrap();
        let run = serde_json::to_value(generate().into_root_schema_for::<Run>()).unwrap();
        let of_run = run["properties"].as_object().unwrap().clone();
        schema["properties"].as_object_mut().unwrap().extend(of_run);
        schema["properties"]["$schema"] =
            serde_json::json!({"type": "string", "description": "This schema, for editors."});
        schema["title"] = "bantam run --config".into();
        cut_examples(&mut schema);
        format!("{schema:#}\n")
    }

    /// Leaves of each description what is not for programmers.
    fn cut_examples(value: &mut serde_json::Value) {
        match value {
            serde_json::Value::String(text) => {
                let end = text.find("\n\n```").unwrap_or(text.len());
                *text = text[..end].replace('\n', " ");
            }
            serde_json::Value::Array(items) => items.iter_mut().for_each(cut_examples),
            serde_json::Value::Object(map) => map.values_mut().for_each(cut_examples),
            _ => {}
        }
    }

    #[test]
    fn the_schema_is_that_of_the_structs() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("resources/config.schema.json");
        let schema = schema();
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(&path, &schema).unwrap();
        }
        let kept = std::fs::read_to_string(path).unwrap_or_default();
        assert!(kept == schema, "resources/config.schema.json is out of date: UPDATE_DOCS=1 cargo test --lib config");
        for key in keys() {
            assert!(
                serde_json::from_str::<serde_json::Value>(&schema).unwrap()["properties"][key].is_object(),
                "{key}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_text_is_taken_or_refused(text in "[a-z\\[\\]{}:,'\"= \n.0-9-]{0,40}") {
            let _ = read("x", &text);
            let _ = read("x.json", &text);
        }
    }
}

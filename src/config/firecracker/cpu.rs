//! `cpu-config`.

use std::path::Path;

use serde::Deserialize;

use crate::arch::x86_64::template::Template;
use crate::config::file;
use crate::config::json;
use crate::config::tree::{Error, Node, Value};

/// What a template has for other processors.
const OF_AARCH64: [&str; 2] = ["reg_modifiers", "vcpu_features"];

/// Reads a CPU template; `None` if it changes nothing.
///
/// # Errors
/// Where it is wrong, or for another processor.
pub fn read(node: &Node) -> Result<Option<Template>, Error> {
    let Value::Table(pairs) = &node.value else { return Err(node.unexpected("a table")) };
    let (others, ours): (Vec<_>, Vec<_>) =
        pairs.iter().cloned().partition(|(key, _)| OF_AARCH64.contains(&key.name.as_str()));
    if let Some((key, value)) = others.iter().find(|(_, value)| value.value != Value::List(vec![])) {
        return Err(Error::new(value.at, "this is x86-64, and not aarch64").within(&key.name, value.at));
    }
    let ours = Node { at: node.at, value: Value::Table(ours) };
    let template = Template::deserialize(&ours)?;
    Ok(Some(template).filter(|template| *template != Template::default()))
}

/// The same in a configuration file, which also may have the path of a file with the template.
///
/// # Errors
/// The same, and when that file cannot be read.
pub fn read_in_file(node: &Node) -> Result<Option<Template>, Error> {
    let Value::Text(path) = &node.value else { return read(node) };
    let wrong = |what: String| Error::new(node.at, format!("cannot use the CPU template {path}: {what}"));
    let text = file::read_text(Path::new(path)).map_err(|error| match error {
        file::Error::Read { source, .. } => wrong(source.to_string()),
        error => wrong(error.to_string()),
    })?;
    json::parse(&text).and_then(|node| read(&node)).map_err(|error| wrong(error.to_string()))
}

//! Arrows point down only: no module imports one on a floor above its own, and no two modules import each other.
//!
//! The floors are those of docs/ARCHITECTURE.md. The test reads the `crate::` paths of every source file.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// Modules by floor, lowest first. Those of one floor may import each other, but not in a circle.
const FLOORS: &[&[&str]] = &[
    &[
        "bus",
        "cgroup",
        "duration",
        "file",
        "image",
        "interrupt",
        "limit",
        "memory",
        "metrics",
        "outcome",
        "sandbox",
        "signal",
        "size",
        "snapshot",
        "socket",
        "terminal",
        "text",
        "threads",
    ],
    &["arch"],
    &["devices", "kvm", "virtio"],
    &["boot", "command", "vcpu"],
    &["config"],
    &["machine"],
    &["check", "control", "kernels", "named", "warm"],
    &["cli", "main", "lib", "process"],
];

fn floor(module: &str) -> usize {
    FLOORS.iter().position(|modules| modules.contains(&module)).unwrap_or_else(|| {
        panic!("module `{module}` is on no floor: add it to tests/architecture.rs and docs/ARCHITECTURE.md")
    })
}

/// The top-level modules that the text of a source file names after `crate::`, its tests left out.
fn imports(text: &str) -> BTreeSet<String> {
    let text = text.split("#[cfg(test)]").next().unwrap_or_default();
    let code: Vec<_> = text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect();
    let code = code.join("\n");
    let mut found = BTreeSet::new();
    for after in code.split("crate::").skip(1) {
        let end = after.find(|c: char| !c.is_alphanumeric() && c != '_' && c != '{').unwrap_or(after.len());
        let name = &after[..end];
        if let Some(list) = name.strip_prefix('{') {
            // `use crate::{a, b::c};`
            let list = after[1..].split_once("};").map_or(list, |(list, _)| list);
            let mut depth = 0;
            let mut item = String::new();
            for c in list.chars().chain([',']) {
                match c {
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    ',' if depth == 0 => {
                        found.extend(item.trim().split("::").next().filter(|name| !name.is_empty()).map(String::from));
                        item.clear();
                        continue;
                    }
                    _ => {}
                }
                item.push(c);
            }
        } else if name.starts_with(|c: char| c.is_lowercase()) {
            found.insert(name.to_owned());
        }
    }
    found
}

/// Every module under `folder` with what it imports: `a.rs` and all of `a/` are module `a`.
fn read(folder: &Path, module: Option<&str>, graph: &mut BTreeMap<String, BTreeSet<String>>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        // The guest's init is a program by itself.
        if path.ends_with("src/init") {
            continue;
        }
        let name = module.unwrap_or_else(|| path.file_stem().unwrap().to_str().unwrap()).to_owned();
        if path.is_dir() {
            read(&path, Some(&name), graph);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            graph.entry(name).or_default().extend(imports(&fs::read_to_string(&path).unwrap()));
        }
    }
}

fn graph() -> BTreeMap<String, BTreeSet<String>> {
    let mut graph = BTreeMap::new();
    read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), None, &mut graph);
    assert!(graph.len() > 10, "the sources are read");
    graph
}

#[test]
fn arrows_point_down() {
    for (module, imported) in graph() {
        for other in imported.iter().filter(|other| **other != module) {
            assert!(
                floor(other) <= floor(&module),
                "`{module}` (floor {}) imports `{other}` (floor {})",
                floor(&module),
                floor(other)
            );
        }
    }
}

#[test]
fn no_two_modules_import_each_other() {
    let graph = graph();
    for (module, imported) in &graph {
        for other in imported.iter().filter(|other| *other != module) {
            assert!(!graph.get(other).is_some_and(|back| back.contains(module)), "`{module}` and `{other}`");
        }
    }
}

#[test]
fn imports_are_read() {
    let text = "use crate::{a, b::{c, d}, e};\nuse crate::f::G; // crate::x\n// crate::y\ncrate::h::i();\n";
    let expected: BTreeSet<String> = ["a", "b", "e", "f", "h"].map(String::from).into();
    assert_eq!(imports(text), expected);
}

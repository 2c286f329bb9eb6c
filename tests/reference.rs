//! The documents say what is there: the reference of the command is its own help, links lead somewhere, every key is
//! explained, and the list of files with unsafe code is whole.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const BANTAM: &str = env!("CARGO_BIN_EXE_bantam");

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn read(name: &str) -> String {
    fs::read_to_string(path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// What bantam prints, in lines of at most 100 characters.
fn bantam(flags: &[&str]) -> String {
    let output = Command::new(BANTAM).args(flags).env("COLUMNS", "100").stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{flags:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The files below `folder` with this extension, by their paths in the repository.
fn files(folder: &str, extension: &str) -> Vec<String> {
    let mut found = vec![];
    for entry in fs::read_dir(path(folder)).unwrap() {
        let entry = entry.unwrap();
        let name = format!("{folder}/{}", entry.file_name().to_str().unwrap());
        if entry.file_type().unwrap().is_dir() {
            found.extend(files(&name, extension));
        } else if Path::new(&name).extension().is_some_and(|it| it == extension) {
            found.push(name);
        }
    }
    found
}

fn documents() -> Vec<String> {
    let mut documents = files("docs", "md");
    documents.push("README.md".into());
    assert!(documents.len() > 5, "the documents are found");
    documents
}

/// docs/cli.md as it has to be.
fn reference() -> String {
    let mut text = String::from(
        "# The command's reference\n\n\
         What `--help` prints. This page is made by `UPDATE_DOCS=1 cargo test --test reference`; do not edit it.\n",
    );
    let cached = "image|image ls|image pull|image rm|image prune|kernel|kernel ls|kernel import|kernel build|kernel rm|warm|warm ls|warm rm";
    for command in ["", "run", "restore", "api", "check"].into_iter().chain(cached.split('|')).chain([
        "test",
        "ps",
        "stop",
        "pause",
        "resume",
        "snapshot",
        "metrics",
        "console",
        "completions",
        "man",
    ]) {
        let name = format!("bantam {command}");
        let flags: Vec<_> = command.split_terminator(' ').chain(["--help"]).collect();
        let help: Vec<_> = bantam(&flags).lines().map(|line| format!("{}\n", line.trim_end())).collect();
        text.push_str(&format!("\n## {}\n\n```\n{}```\n", name.trim_end(), help.concat()));
    }
    text
}

#[test]
fn the_reference_is_the_help() {
    let expected = reference();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(path("docs/cli.md"), &expected).unwrap();
    }
    assert!(read("docs/cli.md") == expected, "docs/cli.md is out of date: UPDATE_DOCS=1 cargo test --test reference");
}

/// The blocks of code in a document, each with the language after its fence.
fn blocks(text: &str) -> Vec<(String, String)> {
    let mut parts = text.split("\n```").skip(1);
    let mut blocks = vec![];
    while let Some(block) = parts.next() {
        let (language, code) = block.split_once('\n').unwrap();
        blocks.push((language.into(), format!("{code}\n")));
        parts.next();
    }
    blocks
}

#[test]
fn the_configuration_shown_is_what_is_printed() {
    let blocks = blocks(&read("docs/config.md"));
    let (_, command) =
        blocks.iter().find(|(language, code)| language == "sh" && code.contains("--print-config")).unwrap();
    let (_, shown) = blocks.iter().find(|(language, _)| language == "json").unwrap();
    let flags: Vec<_> = command.split_whitespace().skip(1).filter(|flag| *flag != "\\").collect();
    assert_eq!(&bantam(&flags), shown, "docs/config.md: {command}");
}

#[test]
fn the_test_file_shown_has_the_cases_shown() {
    let blocks = blocks(&read("docs/ci.md"));
    let (_, file) = blocks.iter().find(|(language, code)| language == "toml" && code.contains("[[kernel]]")).unwrap();
    let (_, shown) = blocks.iter().find(|(_, code)| code.starts_with("debian-12/alpine/unit\n")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(folder.path().join("kernels/lib/modules")).unwrap();
    for name in ["kernels/vmlinuz-6.1", "kernels/vmlinux", "rootfs.tar"] {
        fs::write(folder.path().join(name), "").unwrap();
    }
    let path = folder.path().join("ci.toml");
    fs::write(&path, file).unwrap();
    assert_eq!(&bantam(&["test", "--list", path.to_str().unwrap()]), shown);
}

#[test]
fn every_key_of_the_test_file_is_explained() {
    // An unknown key is told with all that are known, if none is near.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ci.toml");
    let text = read("docs/ci.md");
    let (_, text) = text.split_once("\n### The file\n").unwrap();
    let command = "[[command]]\nname = 'a'\nrun = 'x'";
    for table in ["", "[defaults]", "[[kernel]]", "[[root]]", "[[command]]", "[[exclude]]", "[[include]]"] {
        let before = if table.is_empty() { "" } else { command };
        fs::write(&path, format!("{before}\n{table}\nnothing-like-it = 1")).unwrap();
        let output = Command::new(BANTAM).arg("test").arg(&path).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        let (_, known) = error.trim_end().rsplit_once(": expected ").unwrap();
        for key in known.split(", ") {
            let explained = [format!("`{key}`"), format!("`[{key}]`"), format!("`[[{key}]]`")];
            assert!(explained.iter().any(|key| text.contains(key)), "docs/ci.md does not explain {key}");
        }
    }
}

/// Every key of `value`, and of what is in it.
fn keys(value: &serde_json::Value, found: &mut BTreeSet<String>) {
    match value {
        serde_json::Value::Object(map) => map.iter().for_each(|(key, value)| {
            found.insert(key.clone());
            keys(value, found);
        }),
        serde_json::Value::Array(items) => items.iter().for_each(|item| keys(item, found)),
        _ => {}
    }
}

#[test]
fn every_key_of_the_configuration_is_explained() {
    let json = bantam(&[
        "run",
        "--kernel",
        "k",
        "--disk",
        "d,id=x",
        "--net",
        "t",
        "--timeout",
        "1s",
        "--balloon",
        "64M",
        "--print-config",
        "root.img",
        "--",
        "true",
    ]);
    let mut found = BTreeSet::new();
    keys(&serde_json::from_str(&json).unwrap(), &mut found);
    assert!(found.len() > 15, "{found:?}");
    let text = read("docs/config.md");
    for key in found {
        assert!(text.contains(&format!("| `{key}` |")), "docs/config.md does not explain `{key}`");
    }
}

#[test]
fn every_field_of_the_report_is_explained() {
    use bantam::config::Size;
    use bantam::virtio::device::VirtioDevice;
    use bantam::virtio::{balloon, blk, net, rng};
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(512).unwrap();
    let disk = blk::Blk::open(&blk::Spec::new(image.path())).unwrap();
    let mut found = BTreeSet::new();
    keys(&disk.metrics().to_json(), &mut found);
    keys(&rng::Rng::new().metrics().to_json(), &mut found);
    let balloon = balloon::Balloon::new(&balloon::Spec::default(), Size::mib(256)).unwrap();
    keys(&balloon.metrics().to_json(), &mut found);
    keys(&serde_json::to_value(net::Statistics::default()).unwrap(), &mut found);
    keys(&serde_json::to_value(bantam::vcpu::Metrics::default()).unwrap(), &mut found);
    keys(&serde_json::to_value(bantam::machine::Report::default()).unwrap(), &mut found);
    assert!(found.len() > 25, "{found:?}");
    let text = read("docs/config.md");
    let (_, text) = text.split_once("\n## The report\n").unwrap();
    for key in found {
        let explained = ["", "durations.", "limits."].iter().any(|of| text.contains(&format!("`{of}{key}`")));
        assert!(explained, "docs/config.md does not explain `{key}`");
    }
}

/// The anchor of a heading, as GitHub makes it.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().to_lowercase().replace(' ', "-");
    kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, '-' | '_')).collect()
}

#[test]
fn links_lead_somewhere() {
    let mut seen = 0;
    for document in documents() {
        let folder = path(&document).parent().unwrap().to_owned();
        for link in read(&document).split("](").skip(1).map(|rest| rest.split(')').next().unwrap()) {
            if link.starts_with("http") {
                continue;
            }
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { path(&document) } else { folder.join(file) };
            assert!(target.exists(), "{document} links to {link}, which is not there");
            if !heading.is_empty() {
                let text = fs::read_to_string(&target).unwrap();
                let mut headings = text.lines().filter(|line| line.starts_with('#'));
                let found = headings.any(|line| anchor(line.trim_start_matches('#')) == heading);
                assert!(found, "{document} links to {link}, and there is no such heading");
            }
            seen += 1;
        }
    }
    assert!(seen > 20, "the links are found");
}

#[test]
fn the_readme_shows_the_example_of_the_library() {
    let crate_text = read("src/lib.rs");
    let lines = crate_text.lines().filter_map(|line| line.strip_prefix("//!"));
    let text: String = lines.map(|line| format!("{}\n", line.strip_prefix(' ').unwrap_or(line))).collect();
    let (_, example) = blocks(&text).into_iter().find(|(language, _)| language == "no_run").unwrap();
    let shown: String =
        example.lines().filter(|line| !line.starts_with("# ")).map(|line| format!("{line}\n")).collect();
    assert!(read("README.md").contains(&format!("```rust\n{shown}```\n")), "it is not: {shown}");
}

#[test]
fn the_readme_runs_the_test_that_ci_runs() {
    let ci = read(".ci/run");
    let command = ci.lines().find_map(|line| line.split_once("/../")).unwrap().1.trim_end_matches('"');
    assert!(read("README.md").contains(&format!("\n{command} ")), "{command}");
}

#[test]
fn the_list_of_unsafe_code_is_whole() {
    let text = read("docs/SECURITY.md");
    let (_, section) = text.split_once("\n## Unsafe code\n").unwrap();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| [")?.split(']').next());
    let listed: BTreeSet<_> = rows.map(String::from).collect();
    let found: BTreeSet<_> = files("src", "rs")
        .iter()
        .filter(|file| read(file).lines().any(|line| line.contains("(unsafe_code")))
        .map(|file| file.trim_start_matches("src/").to_owned())
        .collect();
    assert!(!found.is_empty());
    assert_eq!(listed, found, "docs/SECURITY.md");
}

/// The names of the dependencies of the program, its tests and its fuzz targets.
fn dependencies() -> BTreeSet<String> {
    let manifests = ["Cargo.toml", "tests/fuzz/Cargo.toml"].map(read).join("\n");
    let lists = manifests.split("\n[").filter(|part| part.starts_with("dependencies]") || part.starts_with("dev-dep"));
    let lines = lists.flat_map(|list| list.lines().skip(1));
    let names = lines.filter_map(|line| Some(line.split_once('=')?.0.trim().to_owned()));
    names.filter(|name| name != "bantam").collect()
}

#[test]
fn every_dependency_has_its_reason() {
    let page = read("docs/DEPENDENCIES.md");
    let first_cells = page.lines().filter_map(|line| line.strip_prefix("| `")?.split_once(" |"));
    let explained: BTreeSet<_> =
        first_cells.flat_map(|(names, _)| names.split(", ")).map(|name| name.trim_matches('`').to_owned()).collect();
    assert!(explained.len() > 20, "the tables are found: {explained:?}");
    assert_eq!(explained, dependencies());
}

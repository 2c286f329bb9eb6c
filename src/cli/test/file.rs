//! The test file: kernels, root file systems and commands, what holds for them, and which of them go together.

use std::path::{Path, PathBuf};

use bantam::config::nearest::instead;
use clap::Parser;
use toml_span::Span;

use super::keys::{Error, Keys, Source, Text};
use super::matrix::{Entry, Matrix, Pattern, Settings};
use crate::cli::{Cli, Command, Run, kernel};

/// Keys that are flags of `bantam run` by the same name; the last one counts.
const SINGLE: [&str; 10] =
    ["boot-timeout", "cpu-quota", "cpus", "hostname", "memory", "pids", "retry", "timeout", "user", "workdir"];
/// Keys that are flags of `bantam run`, which may be there several times.
const SEVERAL: [(&str, &str); 2] = [("env", "env"), ("shares", "share")];

/// `$more` and the keys of settings.
macro_rules! with_settings {
    ($($more:literal),*) => {
        &[$($more,)* "boot-timeout", "cpu-quota", "cpus", "env", "hostname", "memory", "options", "pids", "retry", "shares",
          "timeout", "user", "workdir"]
    };
}

const FILE: &[&str] = &["defaults", "kernel", "root", "command", "exclude", "include"];
const DEFAULTS: &[&str] = with_settings!();
const KERNEL: &[&str] = with_settings!("name", "path", "modules", "cmdline");
const ROOT: &[&str] = with_settings!("name", "path", "initrd");
const COMMAND: &[&str] = with_settings!("name", "run");
const PATTERN: &[&str] = &["kernel", "root", "command"];

/// The time that a case has, unless the file says otherwise: a guest that hangs is found out.
const TIMEOUT: &str = "10m";

/// Reads the file at `path`. What it names is looked for in its folder.
pub fn read(path: &Path, text: &str) -> Result<Matrix, Error> {
    let source = Source { path, text };
    let reader = Reader { source, folder: super::folder_of(path) };
    let mut file = source.keys(FILE)?;
    let mut defaults = Settings { single: [("timeout", TIMEOUT.to_owned())].into(), several: vec![] };
    if let Some(mut keys) = file.table("defaults", DEFAULTS)? {
        defaults.add(&reader.settings(&mut keys)?);
    }
    let mut entries = |key, name, known| {
        let tables = file.tables(key, name, known)?;
        let entries = tables.into_iter().map(|mut keys| {
            let (name, at) = reader.name(&mut keys)?;
            let settings = reader.settings(&mut keys)?;
            let own = match key {
                "kernel" => reader.kernel(&mut keys)?,
                "root" => reader.root(&mut keys)?,
                _ => reader.command(&mut keys)?,
            };
            Ok((Entry { name, settings, ..own }, at))
        });
        reader.distinct(entries.collect::<Result<_, Error>>()?)
    };
    let kernels = entries("kernel", "[[kernel]]", KERNEL)?;
    let roots = entries("root", "[[root]]", ROOT)?;
    let commands = entries("command", "[[command]]", COMMAND)?;
    let axes = [kernels, roots, commands];
    if axes.iter().all(Vec::is_empty) {
        let what = "there is nothing to run: write a [[kernel]], a [[root]] or a [[command]]";
        return Err(source.error(file.at, what));
    }
    let mut patterns = |key, name| {
        let tables = file.tables(key, name, PATTERN)?;
        tables.into_iter().map(|mut keys| reader.pattern(&mut keys, &axes)).collect::<Result<Vec<_>, Error>>()
    };
    let (excluded, included) = (patterns("exclude", "[[exclude]]")?, patterns("include", "[[include]]")?);
    Ok(Matrix { defaults, axes, excluded, included })
}

/// What `bantam run` makes of these flags.
pub fn parse(flags: &[String]) -> Result<Run, String> {
    let words = ["bantam", "run"].into_iter().chain(flags.iter().map(String::as_str));
    match Cli::try_parse_from(words) {
        Ok(Cli { command: Command::Run(run) }) => Ok(*run),
        Ok(_) => Err("this is no flag of `bantam run`".into()),
        Err(error) => {
            let text = error.to_string();
            let text = text.split_once("\n\n").map_or(&*text, |(first, _)| first);
            Err(text.strip_prefix("error: ").unwrap_or(text).split_whitespace().collect::<Vec<_>>().join(" "))
        }
    }
}

struct Reader<'a> {
    source: Source<'a>,
    folder: PathBuf,
}

/// What a folder's name may have, in bytes.
const NAME_MAX: usize = 255;

impl Reader<'_> {
    /// The name, which is also one of a folder.
    fn name(&self, keys: &mut Keys<'_>) -> Result<(String, Span), Error> {
        let Text { text, at } = keys.required("name")?;
        if text.is_empty()
            || text.len() > NAME_MAX
            || text.starts_with('.')
            || text.contains(|c: char| c == '/' || c.is_control())
        {
            return Err(self.source.error(
                at,
                format!(
                    "`{text}` is no name: it is empty, longer than {NAME_MAX} bytes, begins with a dot, or has a slash"
                ),
            ));
        }
        Ok((text, at))
    }

    fn distinct(&self, entries: Vec<(Entry, Span)>) -> Result<Vec<Entry>, Error> {
        let mut distinct: Vec<Entry> = vec![];
        for (entry, at) in entries {
            if distinct.iter().any(|other| other.name == entry.name) {
                return Err(self.source.error(at, format!("there are two by the name of `{}`", entry.name)));
            }
            distinct.push(entry);
        }
        Ok(distinct)
    }

    /// What holds for all that a table stands for, as flags.
    fn settings(&self, keys: &mut Keys<'_>) -> Result<Settings, Error> {
        let mut settings = Settings::default();
        for key in SINGLE {
            if let Some(value) = keys.text(key)? {
                self.flag(key, &value)?;
                settings.single.insert(key, value.text);
            }
        }
        for (key, flag) in SEVERAL {
            for value in keys.texts(key)?.0 {
                let run = self.flag(flag, &value)?;
                for share in run.shares {
                    self.must_exist(&share.path, value.at)?;
                }
                settings.several.push(format!("--{flag}={}", value.text));
            }
        }
        let (options, _) = keys.texts("options")?;
        if let Some(first) = options.first() {
            let at = Span::new(first.at.start, first.at.end);
            let flags: Vec<_> = options.into_iter().map(|option| option.text).collect();
            let run = parse(&flags).map_err(|why| self.source.error(at, format!("`options`: {why}")))?;
            if let Some(flag) = kept_back(&run) {
                let what = format!("`options`: {flag} cannot be one, as `bantam test` sets it or has a key for it");
                return Err(self.source.error(at, what));
            }
            settings.several.extend(flags);
        }
        Ok(settings)
    }

    /// Checks a flag's value, which is what `bantam run` takes.
    fn flag(&self, flag: &str, value: &Text) -> Result<Run, Error> {
        let parsed = parse(&[format!("--{flag}={}", value.text)]);
        parsed.map_err(|why| self.source.error(value.at, why))
    }

    fn must_exist(&self, path: &Path, at: Span) -> Result<(), Error> {
        let what = |error| format!("cannot find {}: {error}", path.display());
        match self.folder.join(path).metadata() {
            Ok(_) => Ok(()),
            Err(error) => Err(self.source.error(at, what(error))),
        }
    }

    fn kernel(&self, keys: &mut Keys<'_>) -> Result<Entry, Error> {
        let mut entry = Entry::default();
        let path = keys.required("path")?;
        // A name without a slash may be that of one in the cache.
        let name = Path::new(&path.text);
        if path.text.contains('/') || self.folder.join(name).exists() {
            self.must_exist(name, path.at)?;
        } else if let Err(error) = kernel::find(Some(name)) {
            return Err(self.source.error(path.at, error.to_string()));
        }
        entry.flags.push(format!("--kernel={}", path.text));
        if let Some(value) = keys.text("modules")? {
            self.must_exist(Path::new(&value.text), value.at)?;
            entry.flags.push(format!("--modules={}", value.text));
        }
        entry.cmdline = keys.text("cmdline")?.map(|value| value.text);
        Ok(entry)
    }

    fn root(&self, keys: &mut Keys<'_>) -> Result<Entry, Error> {
        let mut entry = Entry::default();
        if let Some(value) = keys.text("initrd")? {
            self.must_exist(Path::new(&value.text), value.at)?;
            entry.flags.push(format!("--initrd={}", value.text));
        }
        if let Some(value) = keys.text("path")? {
            let is_reference = value.text.starts_with("docker://") || value.text.starts_with("oci:");
            if !is_reference {
                self.must_exist(Path::new(&value.text), value.at)?;
            }
            if value.text.starts_with('-') {
                return Err(self
                    .source
                    .error(value.at, format!("`{0}` looks like an option: write ./{0}", value.text)));
            }
            entry.rootfs = Some(value.text);
        } else if entry.flags.is_empty() {
            return Err(self.source.error(keys.at, "[[root]] has no `path`, and no `initrd`"));
        }
        Ok(entry)
    }

    fn command(&self, keys: &mut Keys<'_>) -> Result<Entry, Error> {
        let (words, is_list) = keys.texts("run")?;
        let mut words: Vec<_> = words.into_iter().map(|word| word.text).collect();
        if words.first().is_none_or(String::is_empty) {
            return Err(self.source.error(keys.at, "[[command]] has no `run`: a list of texts, or a text for /bin/sh"));
        }
        if !is_list {
            words.splice(..0, ["/bin/sh", "-c"].map(String::from));
        }
        Ok(Entry { words, ..Entry::default() })
    }

    fn pattern(&self, keys: &mut Keys<'_>, axes: &[Vec<Entry>; 3]) -> Result<Pattern, Error> {
        let mut pattern = Pattern::default();
        for ((key, axis), names) in PATTERN.iter().zip(axes).zip(&mut pattern.0) {
            for Text { text, at } in keys.texts(key)?.0 {
                if !axis.iter().any(|entry| entry.name == text) {
                    let instead = instead(&text, axis.iter().map(|entry| &*entry.name));
                    return Err(self.source.error(at, format!("there is no {key} `{text}`: {instead}")));
                }
                names.push(text);
            }
        }
        if pattern.0.iter().all(Vec::is_empty) {
            return Err(self.source.error(keys.at, "this names no `kernel`, `root` or `command`"));
        }
        Ok(pattern)
    }
}

/// A flag that is not for the file to give.
fn kept_back(run: &Run) -> Option<&'static str> {
    let given = [
        (run.rootfs.is_some(), "ROOTFS"),
        (!run.command.is_empty(), "COMMAND"),
        (run.kernel.is_some(), "--kernel"),
        (run.cmdline.is_some(), "--cmdline"),
        (run.tty, "--tty"),
        (run.report.is_some(), "--report"),
        (run.junit.is_some(), "--junit"),
        (run.github, "--github"),
        (run.config.is_some(), "--config"),
        (run.print_config, "--print-config"),
        (run.serial.is_some(), "--serial"),
        (run.console.is_some(), "--console"),
    ];
    given.into_iter().find_map(|(given, flag)| given.then_some(flag))
}

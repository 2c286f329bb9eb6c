//! bantam's own words: log lines on standard error, or in a file.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bantam::config::firecracker;
use bantam::machine::firecracker::Counts;
use log::{Level, LevelFilter, Log, Metadata, Record};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::stdio::stderr;

use super::may_create;

/// The log file could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the log file {}", .path.display())]
pub struct Error {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Where log lines go.
enum Target {
    StandardError,
    /// A file, once it may be created; until then the lines are kept.
    Later(PathBuf, Vec<u8>),
    File(File),
}

/// What is logged, and how.
#[derive(Debug, Clone)]
struct Style {
    level: LevelFilter,
    show_level: bool,
    show_origin: bool,
    /// The only module that is heard.
    module: Option<String>,
}

impl Style {
    fn new(level: LevelFilter) -> Self {
        Self { level, show_level: false, show_origin: false, module: None }
    }
}

struct State {
    target: Target,
    style: Style,
    /// Where lines are counted that could not be written.
    counts: Option<Arc<Counts>>,
}

/// The log, which lasts for the rest of the process.
#[must_use]
pub struct Started(Arc<Mutex<State>>);

/// Starts to log: warnings, and with `verbose` 1, 2, 3 what is less and less important; to the end of `file`, or to
/// standard error. Nothing is touched before [`Started::create`].
pub fn start(verbose: u8, file: Option<&Path>) -> Result<Started, Error> {
    let level = match verbose {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        2 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    let target = match file {
        Some(path) => {
            check(path).map_err(|source| Error { path: path.to_owned(), source })?;
            Target::Later(path.to_owned(), Vec::new())
        }
        None => Target::StandardError,
    };
    let state = Arc::new(Mutex::new(State { target, style: Style::new(level), counts: None }));
    if log::set_boxed_logger(Box::new(Logger(Arc::clone(&state)))).is_ok() {
        log::set_max_level(level);
    }
    Ok(Started(state))
}

/// Opens the file to append to it. A pipe that nobody reads is not waited for.
fn open(path: &Path, create: bool) -> io::Result<File> {
    let file = OpenOptions::new().append(true).create(create).custom_flags(libc::O_NONBLOCK).open(path)?;
    rustix::fs::fcntl_setfl(&file, OFlags::APPEND)?;
    Ok(file)
}

/// Checks that lines could be appended to the file at `path`.
fn check(path: &Path) -> io::Result<()> {
    match open(path, false) {
        Err(error) if error.kind() == ErrorKind::NotFound => may_create(path),
        opened => opened.map(drop),
    }
}

impl Started {
    /// Creates the log file, if there is to be one, and writes what was logged so far.
    pub fn create(self) -> Result<(), Error> {
        let mut state = lock(&self.0);
        if let Target::Later(path, lines) = &state.target {
            let opened = open(path, true);
            let mut file = opened.map_err(|source| Error { path: path.clone(), source })?;
            // As in `Logger::log`.
            let _ = file.write_all(lines);
            state.target = Target::File(file);
        }
        Ok(())
    }

    /// Counts lines that cannot be written.
    pub fn count(&self, counts: Arc<Counts>) {
        lock(&self.0).counts = Some(counts);
    }

    /// Logs as Firecracker's clients ask for, from now on. What they leave out is as before.
    pub fn change(&self, logger: &firecracker::Logger) -> Result<(), Error> {
        let mut state = lock(&self.0);
        if let Some(path) = logger.log_path.as_deref().map(Path::new) {
            let opened = open(path, true);
            state.target = Target::File(opened.map_err(|source| Error { path: path.to_owned(), source })?);
        }
        let style = &mut state.style;
        style.level = logger.level.unwrap_or(style.level);
        style.show_level = logger.show_level.unwrap_or(style.show_level);
        style.show_origin = logger.show_log_origin.unwrap_or(style.show_origin);
        style.module = logger.module.clone().or(style.module.take());
        log::set_max_level(style.level);
        Ok(())
    }
}

impl Drop for Started {
    /// Nothing runs, so there is no log: what was logged is told nevertheless.
    fn drop(&mut self) {
        let mut state = lock(&self.0);
        if let Target::Later(_, lines) = &state.target {
            let _ = say(lines);
            state.target = Target::StandardError;
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Logger(Arc<Mutex<State>>);

impl Style {
    /// Other crates log what the guest does without a limit: they are heard only at the last level.
    fn hears(&self, metadata: &Metadata<'_>) -> bool {
        let ours = metadata.target().split("::").next() == Some("bantam");
        let asked = self.module.as_ref().is_none_or(|module| metadata.target().starts_with(module));
        metadata.level() <= self.level && asked && (ours || self.level == LevelFilter::Trace)
    }

    fn line(&self, record: &Record<'_>) -> String {
        let origin = match (record.file(), record.line()) {
            (Some(file), Some(line)) if self.show_origin => Some(format!("{file}:{line}")),
            _ => None,
        };
        let level = self.show_level.then(|| record.level().to_string());
        match [level, origin].into_iter().flatten().collect::<Vec<_>>().join(":").as_str() {
            "" => line(record.level(), &record.args().to_string()),
            from => format!("bantam: [{from}] {}\n", record.args()),
        }
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        lock(&self.0).style.hears(metadata)
    }

    /// Writes a line at once, so that those of several threads, or processes, do not mix. If it cannot be written
    /// there is nobody to tell.
    fn log(&self, record: &Record<'_>) {
        let State { target, style, counts } = &mut *lock(&self.0);
        if style.hears(record.metadata()) {
            let line = style.line(record);
            let written = match target {
                Target::StandardError => say(line.as_bytes()),
                Target::Later(_, lines) => lines.write_all(line.as_bytes()),
                Target::File(file) => file.write_all(line.as_bytes()),
            };
            if let (Err(error), Some(counts)) = (written, counts) {
                let missed = error.kind() == ErrorKind::WouldBlock;
                counts.count("logger", if missed { "missed_log_count" } else { "log_fails" });
            }
        }
    }

    fn flush(&self) {}
}

/// Writes to standard error. One that takes nothing is given a second, once: threads of vCPUs and devices log, and so does
/// the one that heeds limits and signals.
fn say(bytes: &[u8]) -> io::Result<()> {
    static IS_DEAF: AtomicBool = AtomicBool::new(false);
    const PATIENCE: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
    // What a pipe takes at once, if it takes anything.
    const PIPE_BUF: usize = 4096;
    for part in bytes.chunks(PIPE_BUF) {
        let patience = if IS_DEAF.load(Relaxed) { Timespec::default() } else { PATIENCE };
        let is_deaf = poll(&mut [PollFd::new(&stderr(), PollFlags::OUT)], Some(&patience)) == Ok(0);
        IS_DEAF.store(is_deaf, Relaxed);
        if is_deaf {
            return Err(ErrorKind::WouldBlock.into());
        }
        io::stderr().write_all(part)?;
    }
    Ok(())
}

fn line(level: Level, text: &str) -> String {
    let level = match level {
        Level::Error => "error: ",
        Level::Warn => "warning: ",
        Level::Info => "",
        Level::Debug => "debug: ",
        Level::Trace => "trace: ",
    };
    format!("bantam: {level}{text}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_say_who_and_how_bad() {
        assert_eq!(line(Level::Warn, "x"), "bantam: warning: x\n");
        assert_eq!(line(Level::Info, "x"), "bantam: x\n");
    }

    #[test]
    fn a_line_says_what_it_is_asked_to() {
        let args = format_args!("x");
        let mut record = Record::builder();
        let record = record.level(Level::Info).file(Some("a.rs")).line(Some(3)).target("bantam::a").args(args).build();
        let mut style = Style { show_level: true, ..Style::new(LevelFilter::Info) };
        assert_eq!(style.line(&record), "bantam: [INFO] x\n");
        style.show_origin = true;
        assert_eq!(style.line(&record), "bantam: [INFO:a.rs:3] x\n");
        style.module = Some("bantam::b".into());
        assert!(!style.hears(record.metadata()));
    }

    #[test]
    fn a_file_is_created_only_when_it_is_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        check(&path).unwrap();
        assert!(check(folder.path()).is_err() && check(&path.join("log")).is_err());
        let target = || Target::Later(path.clone(), b"early\n".to_vec());
        let started = || {
            Started(Arc::new(Mutex::new(State {
                target: target(),
                style: Style::new(LevelFilter::Warn),
                counts: None,
            })))
        };
        drop(started());
        assert!(!path.exists());
        started().create().unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "early\n");
    }

    #[test]
    fn other_crates_are_heard_only_at_the_last_level() {
        let heard = |level, source, at| Style::new(level).hears(&Metadata::builder().target(source).level(at).build());
        assert!(heard(LevelFilter::Warn, "bantam::machine", Level::Warn));
        assert!(!heard(LevelFilter::Warn, "bantam::machine", Level::Info));
        assert!(!heard(LevelFilter::Debug, "virtio_queue::chain", Level::Error));
        assert!(heard(LevelFilter::Trace, "virtio_queue::chain", Level::Error));
    }
}

//! bantam's own words: log lines on standard error, or in a file.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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

/// The log, which lasts for the rest of the process.
#[must_use]
pub struct Started(Arc<Mutex<Target>>);

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
    let target = Arc::new(Mutex::new(target));
    if log::set_boxed_logger(Box::new(Logger { level, target: Arc::clone(&target) })).is_ok() {
        log::set_max_level(level);
    }
    Ok(Started(target))
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
        let mut target = lock(&self.0);
        if let Target::Later(path, lines) = &*target {
            let opened = open(path, true);
            let mut file = opened.map_err(|source| Error { path: path.clone(), source })?;
            // As in `Logger::log`.
            let _ = file.write_all(lines);
            *target = Target::File(file);
        }
        Ok(())
    }
}

impl Drop for Started {
    /// Nothing runs, so there is no log: what was logged is told nevertheless.
    fn drop(&mut self) {
        let mut target = lock(&self.0);
        if let Target::Later(_, lines) = &*target {
            let _ = say(lines);
            *target = Target::StandardError;
        }
    }
}

fn lock(target: &Mutex<Target>) -> MutexGuard<'_, Target> {
    target.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Logger {
    level: LevelFilter,
    target: Arc<Mutex<Target>>,
}

impl Log for Logger {
    /// Other crates log what the guest does without a limit: they are heard only at the last level.
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let ours = metadata.target().split("::").next() == Some("bantam");
        metadata.level() <= self.level && (ours || self.level == LevelFilter::Trace)
    }

    /// Writes a line at once, so that those of several threads, or processes, do not mix. If it cannot be written
    /// there is nobody to tell.
    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let line = line(record.level(), &record.args().to_string());
            let _ = match &mut *lock(&self.target) {
                Target::StandardError => say(line.as_bytes()),
                Target::Later(_, lines) => lines.write_all(line.as_bytes()),
                Target::File(file) => file.write_all(line.as_bytes()),
            };
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
    fn a_file_is_created_only_when_it_is_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        check(&path).unwrap();
        assert!(check(folder.path()).is_err() && check(&path.join("log")).is_err());
        let started = || Started(Arc::new(Mutex::new(Target::Later(path.clone(), b"early\n".to_vec()))));
        drop(started());
        assert!(!path.exists());
        started().create().unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "early\n");
    }

    #[test]
    fn other_crates_are_heard_only_at_the_last_level() {
        let heard = |level, source, at| {
            let target = Arc::new(Mutex::new(Target::StandardError));
            Logger { level, target }.enabled(&Metadata::builder().target(source).level(at).build())
        };
        assert!(heard(LevelFilter::Warn, "bantam::machine", Level::Warn));
        assert!(!heard(LevelFilter::Warn, "bantam::machine", Level::Info));
        assert!(!heard(LevelFilter::Debug, "virtio_queue::chain", Level::Error));
        assert!(heard(LevelFilter::Trace, "virtio_queue::chain", Level::Error));
    }
}

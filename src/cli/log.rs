//! bantam's own words: log lines on standard error, or in a file.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use log::{Level, LevelFilter, Log, Metadata, Record};

/// The log file could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the log file {}", .path.display())]
pub struct Error {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Starts to log, for the rest of the process: warnings, and with `verbose` 1, 2, 3 what is less and less important;
/// to the end of `file`, or to standard error.
pub fn start(verbose: u8, file: Option<&Path>) -> Result<(), Error> {
    let level = match verbose {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        2 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    let file = match file {
        Some(path) => Some(
            OpenOptions::new()
                .append(true)
                .create(true)
                .open(path)
                .map_err(|source| Error { path: path.to_owned(), source })?,
        ),
        None => None,
    };
    let logger = Box::new(Logger { level, file });
    if log::set_boxed_logger(logger).is_ok() {
        log::set_max_level(level);
    }
    Ok(())
}

struct Logger {
    level: LevelFilter,
    file: Option<File>,
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
            let _ = match &self.file {
                Some(file) => (&mut &*file).write_all(line.as_bytes()),
                None => io::stderr().write_all(line.as_bytes()),
            };
        }
    }

    fn flush(&self) {}
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
    fn other_crates_are_heard_only_at_the_last_level() {
        let heard = |level, target, at| {
            Logger { level, file: None }.enabled(&Metadata::builder().target(target).level(at).build())
        };
        assert!(heard(LevelFilter::Warn, "bantam::machine", Level::Warn));
        assert!(!heard(LevelFilter::Warn, "bantam::machine", Level::Info));
        assert!(!heard(LevelFilter::Debug, "virtio_queue::chain", Level::Error));
        assert!(heard(LevelFilter::Trace, "virtio_queue::chain", Level::Error));
    }
}

//! Lines for a reader that is not waited for.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Bytes that may wait for the reader; a line that finds no room is dropped.
const ROOM: usize = 64 << 10;
/// A pipe that takes anything takes so much without waiting.
const PIPE_BUF: usize = 4096;

/// Where lines are written: a file, which they are added to, a pipe or a terminal.
#[derive(Debug)]
pub struct Lines {
    /// `None` when nobody can read any more.
    file: Option<File>,
    waiting: Vec<u8>,
    /// Lines that found no room.
    missed: u64,
}

impl Lines {
    /// Opens `path`. A named pipe need not have a reader yet.
    ///
    /// # Errors
    /// When it can neither be opened nor made.
    pub fn open(path: &Path) -> io::Result<Self> {
        let is_pipe = fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_fifo());
        let mut options = OpenOptions::new();
        options.append(true).read(is_pipe).create(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        Ok(Self { file: Some(options.open(path)?), waiting: Vec::new(), missed: 0 })
    }

    /// Whether somebody can read what is added.
    pub(super) fn is_open(&self) -> bool {
        self.file.is_some()
    }

    /// Adds a line, and writes what the reader has room for.
    pub(super) fn add(&mut self, line: &serde_json::Value) {
        let line = format!("{line}\n");
        if self.file.is_some() && self.waiting.len() + line.len() <= ROOM {
            self.waiting.extend_from_slice(line.as_bytes());
        } else {
            self.missed += 1;
        }
        self.write();
    }

    /// How many lines found no room, since this was last asked.
    pub(super) fn take_missed(&mut self) -> u64 {
        std::mem::take(&mut self.missed)
    }

    /// What to poll for room, if something waits for it.
    pub(super) fn wanting(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().filter(|_| !self.waiting.is_empty()).map(|file| file.as_fd())
    }

    /// Writes what the reader has room for.
    pub(super) fn write(&mut self) {
        while let Some(file) = self.file.as_mut().filter(|_| !self.waiting.is_empty()) {
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            let polled = poll(&mut [PollFd::new(&*file, PollFlags::OUT)], Some(&now));
            if polled != Ok(1) {
                return;
            }
            match file.write(&self.waiting[..self.waiting.len().min(PIPE_BUF)]) {
                Ok(count) => drop(self.waiting.drain(..count)),
                Err(error) if [io::ErrorKind::WouldBlock, io::ErrorKind::Interrupted].contains(&error.kind()) => return,
                Err(error) => {
                    log::warn!("cannot write events or metrics, going on without them: {error}");
                    self.file = None;
                    self.waiting.clear();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn lines_are_added_to_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events");
        for number in 0..2 {
            Lines::open(&path).unwrap().add(&serde_json::json!({"number": number}));
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"number\":0}\n{\"number\":1}\n");
        assert!(Lines::open(folder.path()).is_err());
    }

    #[test]
    fn a_reader_that_stalls_is_not_waited_for_and_gets_whole_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        let mut lines = Lines::open(&path).unwrap();
        let line = serde_json::json!({"text": "x".repeat(1000)});
        for _ in 0..1000 {
            lines.add(&line);
        }
        assert!(lines.wanting().is_some() && lines.waiting.len() <= ROOM);
        assert!(lines.take_missed() > 800 && lines.take_missed() == 0);
        let mut reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        let mut text = Vec::new();
        let mut buffer = [0; 4096];
        while lines.wanting().is_some() {
            let count = reader.read(&mut buffer).unwrap();
            text.extend_from_slice(&buffer[..count]);
            lines.write();
        }
        drop(lines);
        reader.read_to_end(&mut text).unwrap();
        let expected = format!("{line}\n");
        assert!(text.len() > ROOM && text.len() < 1000 * expected.len());
        assert!(text.chunks(expected.len()).all(|chunk| chunk == expected.as_bytes()));
    }
}

//! How a run ended, as continuous integration is told: whether it failed, why, and what was said last.

use std::fmt::Write;
use std::time::Duration;

use bantam::command::Tail;
use bantam::outcome::Outcome;
use serde::{Deserialize, Serialize};

/// Bytes that are kept of each output of the command.
pub const KEPT: usize = 64 << 10;
/// Lines that are shown of what was said last.
const LINES: usize = 20;
/// Bytes that are shown of a line.
const LINE_BYTES: usize = 512;

/// The kinds of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Failure {
    /// The command ended with a status that is not 0.
    ExitStatus,
    /// A signal ended the command.
    Killed,
    /// The command failed, and the guest's kernel had ended a process for its memory.
    OutOfMemory,
    /// The guest's kernel panicked.
    Panic,
    /// A vCPU could not go on.
    Crash,
    /// `--boot-timeout` was over.
    BootTimeout,
    /// `--timeout` was over.
    Timeout,
    /// The guest went away before its command had ended.
    LostGuest,
    /// A signal, or the user, ended the machine.
    Interrupted,
    /// bantam or the host failed, or the command could not be started.
    Error,
}

impl Failure {
    /// Its name, as in the report.
    pub fn name(self) -> &'static str {
        match self {
            Self::ExitStatus => "exit-status",
            Self::Killed => "killed",
            Self::OutOfMemory => "out-of-memory",
            Self::Panic => "panic",
            Self::Crash => "crash",
            Self::BootTimeout => "boot-timeout",
            Self::Timeout => "timeout",
            Self::LostGuest => "lost-guest",
            Self::Interrupted => "interrupted",
            Self::Error => "error",
        }
    }

    /// Whether what was to be tested failed, and not the test.
    pub fn is_of_the_guest(self) -> bool {
        !matches!(self, Self::Interrupted | Self::Error)
    }
}

/// What was said last, by whom; each oldest first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Lines {
    /// The guest's kernel, and all else that is on its console.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub console_tail: Vec<String>,
    /// The command, on standard output.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stdout_tail: Vec<String>,
    /// The command, on standard error.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stderr_tail: Vec<String>,
}

/// How one attempt ended.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Ending {
    /// Absent if it did what it was to do.
    pub failure: Option<Failure>,
    /// How it ended, in words.
    pub cause: String,
    /// How long it took.
    pub time: Duration,
    pub lines: Lines,
}

impl Ending {
    /// The reason in words, and what was said last.
    pub fn text(&self) -> String {
        let mut text = format!("{}\n", self.cause);
        let parts = [
            ("of the guest's console", &self.lines.console_tail),
            ("of standard output", &self.lines.stdout_tail),
            ("of standard error", &self.lines.stderr_tail),
        ];
        for (whose, lines) in parts.into_iter().filter(|(_, lines)| !lines.is_empty()) {
            let _ = writeln!(text, "\nThe last lines {whose}:");
            lines.iter().for_each(|line| text.extend(["  ", line, "\n"]));
        }
        text
    }
}

/// What an outcome is for the one who wanted a command run, or only a machine: a failure or none, and in words.
pub fn judge(outcome: &Outcome, has_command: bool, out_of_memory: Option<&str>) -> (Option<Failure>, String) {
    let failure = match outcome {
        Outcome::Exited(0) => None,
        Outcome::Exited(_) | Outcome::Killed(_) if out_of_memory.is_some() => Some(Failure::OutOfMemory),
        Outcome::Exited(_) => Some(Failure::ExitStatus),
        Outcome::Killed(_) => Some(Failure::Killed),
        // A guest that goes away says nothing about the command.
        Outcome::PoweredOff | Outcome::Rebooted | Outcome::Halted => has_command.then_some(Failure::LostGuest),
        Outcome::Stopped => has_command.then_some(Failure::Interrupted),
        Outcome::Panicked(_) => Some(Failure::Panic),
        Outcome::Crashed(_) => Some(Failure::Crash),
        Outcome::BootTimedOut { .. } => Some(Failure::BootTimeout),
        Outcome::TimedOut { .. } => Some(Failure::Timeout),
        Outcome::Signaled(_) => Some(Failure::Interrupted),
    };
    let words = match (failure, out_of_memory) {
        (Some(Failure::OutOfMemory), Some(line)) => {
            // The sizes follow.
            let who = line.split_once(" total-vm:").map_or(line, |(who, _)| who);
            format!("{outcome}: the guest ran out of memory ({who})")
        }
        (Some(_), _) if is_before_the_end(outcome) => format!("{outcome} before the command had ended"),
        _ => outcome.to_string(),
    };
    (failure, words)
}

/// Whether a guest that ended so may not have run its command to the end.
pub fn is_before_the_end(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::PoweredOff | Outcome::Rebooted | Outcome::Halted | Outcome::Stopped)
}

/// The last lines of what is kept of a stream.
pub fn last_lines(tail: &Tail) -> Vec<String> {
    let bytes = tail.bytes();
    let bytes = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
    if bytes.is_empty() {
        return vec![];
    }
    let mut lines: Vec<_> = bytes.rsplit(|byte| *byte == b'\n').take(LINES).map(line).collect();
    lines.reverse();
    lines
}

/// A line as it can be shown anywhere.
fn line(bytes: &[u8]) -> String {
    plain(&String::from_utf8_lossy(&bytes[..bytes.len().min(LINE_BYTES)]))
}

/// `text` without what a terminal takes for orders, and without carriage returns at the ends of lines.
pub fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            // A control sequence ends with a character from `@` to `~`.
            '\x1b' if chars.next_if_eq(&'[').is_some() => while chars.next_if(|c| (' '..='?').contains(c)).is_some() {},
            '\r' if matches!(chars.peek(), None | Some('\n')) => {}
            '\t' | '\n' => plain.push(c),
            c if c.is_control() => plain.push(char::REPLACEMENT_CHARACTER),
            c => plain.push(c),
        }
        if c == '\x1b' {
            chars.next_if(|c| ('@'..='~').contains(c));
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failure_is_named_as_in_the_report() {
        for failure in
            [Failure::ExitStatus, Failure::OutOfMemory, Failure::BootTimeout, Failure::LostGuest, Failure::Error]
        {
            assert_eq!(serde_json::to_value(failure).unwrap(), failure.name());
        }
    }

    #[test]
    fn a_guest_that_goes_away_fails_only_a_command() {
        assert_eq!(judge(&Outcome::PoweredOff, false, None), (None, "the guest powered off".into()));
        let (failure, words) = judge(&Outcome::PoweredOff, true, None);
        assert_eq!(failure, Some(Failure::LostGuest));
        assert_eq!(words, "the guest powered off before the command had ended");
        assert_eq!(judge(&Outcome::Signaled(15), true, None).0, Some(Failure::Interrupted));
    }

    #[test]
    fn memory_is_the_reason_only_of_a_failure() {
        let line = Some("Out of memory: Killed process 7 (x) total-vm:8kB, anon-rss:4kB");
        let (failure, words) = judge(&Outcome::Killed(9), true, line);
        assert_eq!(failure, Some(Failure::OutOfMemory));
        assert_eq!(
            words,
            "the command was killed by signal 9: the guest ran out of memory (Out of memory: Killed process 7 (x))"
        );
        assert_eq!(judge(&Outcome::Exited(2), true, line).0, Some(Failure::OutOfMemory));
        assert_eq!(judge(&Outcome::Exited(0), true, line).0, None);
    }

    #[test]
    fn the_last_lines_are_short_and_plain() {
        let mut tail = Tail::new(KEPT);
        (0..30).for_each(|i| tail.push(format!("{i}\r\n").as_bytes()));
        tail.push(&[b'x'; 2000]);
        tail.push(b"\n\x1b[1;31mred\x1b[0m \xff\x07");
        let lines = last_lines(&tail);
        assert_eq!((lines.len(), lines[0].as_str(), lines[18].len()), (LINES, "12", LINE_BYTES));
        assert_eq!(lines[19], "red \u{fffd}\u{fffd}");
        assert!(last_lines(&Tail::new(KEPT)).is_empty());
    }

    #[test]
    fn unfinished_sequences_are_left_out() {
        for (text, expected) in [("a\x1b[", "a"), ("a\x1b", "a\u{fffd}"), ("\x1b(Bb", "\u{fffd}(Bb"), ("\x1b[31", "")] {
            assert_eq!(plain(text), expected, "{text:?}");
        }
    }
}

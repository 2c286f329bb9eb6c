//! What the user sees of the cases: a line for each that has ended, one that lives on a terminal, and the table at the end.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::time::Duration;

use rustix::stdio::{stderr, stdout};
use rustix::termios::{isatty, tcgetwinsize};

use crate::cli::ending::Failure;
use crate::cli::github;
use crate::cli::junit::Case;

/// Writes for people.
pub struct Screen {
    /// Whether the line that lives is shown, on standard error.
    live: bool,
    colours: bool,
    github: bool,
}

/// What became of a case, as one word.
fn result(case: &Case) -> &'static str {
    match (case.failure(), case.attempts.len()) {
        (_, 0) => "not run",
        (None, 1) => "pass",
        (None, _) => "flaky",
        (Some(Failure::Error), _) => "ERROR",
        (Some(Failure::Interrupted), _) => "stopped",
        (Some(_), _) => "FAIL",
    }
}

fn cause(case: &Case) -> String {
    let attempts = match (case.failure(), case.attempts.len()) {
        (_, 0 | 1) => String::new(),
        (None, number) => format!("at attempt {number}; the first: {}", case.attempts[0].cause),
        (Some(_), number) => format!(" ({number} attempts)"),
    };
    match case.attempts.last() {
        Some(last) if last.failure.is_some() => format!("{}{attempts}", last.cause),
        _ => attempts,
    }
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

impl Screen {
    pub fn new(github: bool) -> Self {
        let colours = isatty(stdout()) && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self { live: isatty(stderr()), colours, github }
    }

    /// Whether there is a line to keep alive.
    pub fn is_live(&self) -> bool {
        self.live
    }

    /// Shows what is going on.
    pub fn show(&self, text: &str) {
        if self.live {
            let columns = tcgetwinsize(stderr()).map_or(0, |size| usize::from(size.ws_col));
            let columns = if columns == 0 { 80 } else { columns };
            let line: String = text.chars().take(columns - 1).collect();
            let _ = io::stderr().write_all(format!("\r\x1b[K{line}").as_bytes());
        }
    }

    /// Takes that away again.
    fn clear(&self) {
        if self.live {
            let _ = io::stderr().write_all(b"\r\x1b[K");
        }
    }

    fn coloured(&self, word: &str) -> String {
        let colour = match word {
            "pass" => 32,
            "flaky" => 33,
            _ => 31,
        };
        if self.colours { format!("\x1b[{colour}m{word:<7}\x1b[0m") } else { format!("{word:<7}") }
    }

    /// Tells that a case has ended, and if it failed, what was said last.
    pub fn ended(&self, name: &str, case: &Case) {
        self.clear();
        let mut text = format!("{}  {:>9}  {name}", self.coloured(result(case)), seconds(case.time()));
        if !cause(case).is_empty() {
            let _ = write!(text, ": {}", cause(case));
        }
        self.print(&format!("{}\n", text.trim_end()));
        let Some(last) = case.attempts.last().filter(|last| last.failure.is_some()) else { return };
        // The words are in the line above.
        let all = last.text();
        let lines: String = all.lines().skip(2).map(|line| format!("    {line}\n")).collect();
        if self.github {
            let group = github::Group::begin(name);
            print(&lines);
            group.end();
            github::error(name, last);
        } else {
            print(&lines);
        }
    }

    /// The table of all cases, and how many ended how.
    pub fn table(&self, names: &[String], cases: &[Case], time: Duration) {
        self.clear();
        let width = names.iter().map(|name| name.chars().count()).max().unwrap_or(0);
        let mut text = format!("\n{:<7}  {:>9}  {:<width$}  reason\n", "result", "time", "case");
        for (name, case) in names.iter().zip(cases) {
            let word = self.coloured(result(case));
            let line = format!("{word}  {:>9}  {name:<width$}  {}", seconds(case.time()), cause(case));
            let _ = writeln!(text, "{}", line.trim_end());
        }
        let number = |word: &str| cases.iter().filter(|case| result(case) == word).count();
        let words = [
            ("pass", "passed"),
            ("flaky", "flaky"),
            ("FAIL", "failed"),
            ("ERROR", "could not be done"),
            ("stopped", "stopped"),
            ("not run", "not run"),
        ];
        let counts = words.map(|(word, says)| (number(word), says));
        let counts: Vec<_> =
            counts.iter().filter(|(count, _)| *count > 0).map(|(count, says)| format!("{count} {says}")).collect();
        let plural = if cases.len() == 1 { "" } else { "s" };
        let _ = writeln!(text, "\n{} case{plural} in {}: {}", cases.len(), seconds(time), counts.join(", "));
        self.print(&text);
    }

    /// Prints what has words of a guest's.
    fn print(&self, text: &str) {
        if self.github { print(&github::inert(text)) } else { print(text) }
    }
}

/// Writes to standard output. A reader that goes away has seen enough.
pub fn print(text: &str) {
    let mut out = io::stdout();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

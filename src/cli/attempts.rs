//! The attempts of one run, and all who are told of them: the report, the JUnit file, GitHub.

use std::error::Error;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bantam::command::Tail;
use bantam::config::Config;
use bantam::machine::{Machine, Report};
use bantam::outcome::Outcome;
use bantam::sandbox::Access;
use serde::Serialize;

use super::ending::{self, Ending, Failure, Lines};
use super::junit::{self, Case};
use super::message::{chain, say};
use super::output_file::{self, OutputFile};
use super::warm::{Start, Starts};
use super::{Run, github};

/// One attempt as the report has it.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Attempt {
    /// Of a machine that has none, as it could not be built or run.
    #[serde(skip_serializing_if = "Option::is_none")]
    outcome: Option<&'static str>,
    #[serde(flatten)]
    report: Report,
    failure: Option<Failure>,
    #[serde(skip_serializing_if = "Option::is_none")]
    warm: Option<Start>,
    #[serde(flatten)]
    lines: Lines,
    #[serde(skip)]
    output: Option<[Tail; 2]>,
    #[serde(skip)]
    has_run: bool,
}

impl Attempt {
    /// What became of `machine`, if there was one, after this time. All of it is only looked at if it is `wanted`.
    fn new(
        machine: Option<&Machine>,
        ended: Result<&Outcome, String>,
        has_command: bool,
        time: Duration,
        wanted: bool,
    ) -> Self {
        let mut report = machine.filter(|_| wanted).map(Machine::report).unwrap_or_default();
        report.durations.end.get_or_insert(time);
        let (outcome, failure) = match ended {
            Ok(outcome) => {
                let (failure, cause) = ending::judge(outcome, has_command, machine.and_then(Machine::out_of_memory));
                report.cause = cause;
                (None, failure)
            }
            Err(cause) => {
                report.outcome = None;
                report.cause = cause;
                (Some("failed"), Some(Failure::Error))
            }
        };
        let output = machine.and_then(Machine::kept_output).map(bantam::command::Kept::take);
        let mut lines = Lines::default();
        if failure.is_some() && wanted {
            if let Some(machine) = machine.filter(|_| !matches!(report.outcome, Some(Outcome::Panicked(_)))) {
                // A panic has its own.
                lines.console_tail = machine.console_tail();
            }
            if let Some([stdout, stderr]) = &output {
                lines.stdout_tail = ending::last_lines(stdout);
                lines.stderr_tail = ending::last_lines(stderr);
            }
        }
        Self { outcome, report, failure, warm: None, lines, output, has_run: machine.is_some() }
    }

    /// How it ended.
    pub fn cause(&self) -> &str {
        &self.report.cause
    }

    /// Whether another attempt may end otherwise: nobody wanted the end, and the flags make a machine.
    fn is_worth_another(&self) -> bool {
        self.has_run && self.failure.is_some_and(|failure| failure != Failure::Interrupted)
    }

    /// Whether the guest ended a process for its memory, and the command failed.
    pub fn ran_out_of_memory(&self) -> bool {
        self.failure == Some(Failure::OutOfMemory)
    }

    fn ending(&self) -> Ending {
        let mut lines = self.lines.clone();
        if let Some(Outcome::Panicked(panic)) = &self.report.outcome {
            lines.console_tail.clone_from(&panic.console_tail);
        }
        lines.console_tail.iter_mut().for_each(|line| *line = ending::plain(line));
        let time = self.report.durations.end.unwrap_or_default();
        Ending { failure: self.failure, cause: ending::plain(&self.report.cause), time, lines }
    }
}

/// The last attempt, and those before it.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Whole<'a> {
    #[serde(flatten)]
    last: &'a Attempt,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    earlier_attempts: &'a [Attempt],
}

/// What is to be told, and what there is to tell so far.
pub struct Attempts {
    report: Option<OutputFile>,
    junit: Option<OutputFile>,
    github: bool,
    /// What is run, and where.
    name: String,
    class: String,
    ended: Vec<Attempt>,
    most: usize,
}

impl Attempts {
    /// Checks that it can be told what `run` asks for.
    pub fn new(run: &Run, config: &Config) -> Result<Self, output_file::Error> {
        let open = |what, path: &Option<_>| path.as_deref().map(|path| OutputFile::new(what, path)).transpose();
        let path = |path: &std::path::Path| path.display().to_string();
        let kernel = config.kernel.as_deref().map(path).unwrap_or_default();
        let command = config.command.as_ref().map(|command| command.arguments.join(" "));
        let (name, class) = match (command.filter(|text| !text.is_empty()), config.rootfs.as_deref().map(path)) {
            (Some(command), rootfs) => (command, rootfs.unwrap_or(kernel)),
            (None, Some(rootfs)) => (rootfs, kernel),
            (None, None) => (kernel, "bantam".into()),
        };
        Ok(Self {
            report: open("report", &run.report)?,
            junit: open("JUnit file", &run.junit)?,
            github: run.github,
            name,
            class,
            ended: vec![],
            most: 1 + usize::from(run.retries()),
        })
    }

    /// Has the process at the other end of `pipe` [write](Self::write) the files.
    pub fn write_by(&mut self, pipe: &Arc<File>) {
        for (number, file) in (0..).zip([&mut self.report, &mut self.junit]) {
            file.iter_mut().for_each(|file| file.write_by(pipe.clone(), number));
        }
    }

    /// Writes the file that has this number there.
    pub fn write(&self, number: u8, content: &[u8]) -> Result<(), output_file::Error> {
        let file = [&self.report, &self.junit].get(usize::from(number)).copied().and_then(Option::as_ref);
        file.map_or(Ok(()), |file| file.write(content))
    }

    /// What is opened when all is told.
    pub fn opened_later(&self) -> Vec<(PathBuf, Access)> {
        [&self.report, &self.junit].into_iter().flatten().filter_map(OutputFile::opened_later).collect()
    }

    /// Whether anybody wants to know what happened, and what the command printed.
    fn are_wanted(&self) -> bool {
        self.report.is_some() || self.junit.is_some() || self.github
    }

    /// Builds and runs machines until one has ended that no other is to follow: how it ended, and the machine if there is
    /// one. What builds them is told when it began, and whether anybody wants to know what happened.
    pub fn run(
        &mut self,
        has_command: bool,
        mut begin: Instant,
        warm: &mut Option<Starts>,
        mut build: impl FnMut(Instant, bool, &mut Option<Starts>) -> Result<Machine, Box<dyn Error>>,
    ) -> (Result<Outcome, Box<dyn Error>>, Option<Machine>) {
        let wanted = self.are_wanted();
        loop {
            let (group, mut machine) = (self.group(), None);
            let ended = loop {
                let ended = build(begin, wanted, warm).and_then(|built| Ok(machine.insert(built).run()?));
                if !warm.as_mut().is_some_and(|warm| warm.is_lost(machine.as_ref(), &ended)) {
                    break ended;
                }
                machine = None;
            };
            group.into_iter().for_each(github::Group::end);
            let result = ended.as_ref().map_err(|error| chain(&**error));
            let mut attempt = Attempt::new(machine.as_ref(), result, has_command, begin.elapsed(), wanted);
            attempt.warm = warm.as_mut().and_then(|warm| warm.last.take());
            let Some(why) = self.take(attempt) else { return (ended, machine) };
            drop(machine);
            say(&why);
            begin = Instant::now();
        }
    }

    /// The group for the output of the attempt that begins, if it is to have one.
    fn group(&self) -> Option<github::Group> {
        self.github.then(|| match self.ended.len() {
            0 => github::Group::begin(&self.name),
            earlier => github::Group::begin(&format!("{} (attempt {} of {})", self.name, earlier + 1, self.most)),
        })
    }

    /// Takes an attempt that has ended; whether there is to be another one, and in words.
    fn take(&mut self, attempt: Attempt) -> Option<String> {
        let again = attempt.is_worth_another() && self.ended.len() + 1 < self.most;
        // Only what the last one printed is told whole.
        self.ended.iter_mut().for_each(|earlier| earlier.output = None);
        self.ended.push(attempt);
        let number = self.ended.len();
        let cause = self.last().cause();
        again.then(|| format!("attempt {number} of {} failed, and another follows: {cause}", self.most))
    }

    /// The last attempt so far.
    pub fn last(&self) -> &Attempt {
        self.ended.last().expect("it is asked for after an attempt")
    }

    /// Tells everybody.
    pub fn tell(&mut self) -> Result<(), output_file::Error> {
        let endings: Vec<_> = self.ended.iter().map(Attempt::ending).collect();
        if self.github {
            self.tell_github(&endings);
        }
        let mut written = Ok(());
        let (last, earlier) = self.ended.split_last_mut().expect("it is told after an attempt");
        if let Some(file) = &self.report {
            let whole = Whole { last, earlier_attempts: earlier };
            let mut json = serde_json::to_vec_pretty(&whole).expect("a report can be JSON");
            json.push(b'\n');
            written = file.write(&json);
        }
        if let Some(file) = &self.junit {
            let time = endings.iter().map(|ending| ending.time).sum();
            let output = last.output.take().unwrap_or_else(|| [Tail::new(0), Tail::new(0)]);
            let case = Case { class: self.class.clone(), name: self.name.clone(), attempts: endings, output };
            written = written.and(file.write(junit::document("bantam run", &[case], time).as_bytes()));
        }
        written
    }

    fn tell_github(&self, endings: &[Ending]) {
        match endings.split_last() {
            Some((last, _)) if last.failure.is_some() => github::error(&self.name, last),
            Some((_, earlier @ [first, ..])) => {
                let text = format!("it succeeded at attempt {}; the first failed: {}", earlier.len() + 1, first.text());
                github::warning(&self.name, &text);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_an_outcome_in_the_report() {
        let failed = Attempt::new(None, Err("why".into()), true, Duration::ZERO, true);
        let report = serde_json::to_value(&failed).unwrap();
        assert_eq!((&report["outcome"], &report["cause"]), (&"failed".into(), &"why".into()));
        assert_eq!(report["failure"], "error");
        assert!(report["durations"].is_object());
        assert!(!failed.is_worth_another(), "it would fail again");
    }

    #[test]
    fn earlier_attempts_are_beside_the_last() {
        let attempt = |why: &str| Attempt::new(None, Err(why.into()), true, Duration::ZERO, true);
        let whole = Whole { last: &attempt("two"), earlier_attempts: &[attempt("one")] };
        let report = serde_json::to_value(&whole).unwrap();
        assert_eq!((&report["cause"], &report["earlier-attempts"][0]["cause"]), (&"two".into(), &"one".into()));
        let whole = Whole { last: &attempt("one"), earlier_attempts: &[] };
        assert!(serde_json::to_value(&whole).unwrap().get("earlier-attempts").is_none());
    }
}

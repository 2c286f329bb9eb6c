//! `bantam test`: a matrix of kernels, root file systems and commands, each case a `bantam run` of its own.

mod file;
mod keys;
mod machine;
mod matrix;
mod summary;

use std::collections::VecDeque;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bantam::command::Tail;
use bantam::signal::{self, SignalFd};
use clap::Args;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;

use self::machine::{Ended, Machine};
use self::summary::Screen;
use super::ending::{Ending, Failure};
use super::junit;
use super::output_file::{self, OutputFile};

/// How long machines have to end by themselves when they are to be ended.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often what is going on is shown anew.
const TICK: Duration = Duration::from_secs(1);

pub const EXAMPLES: &str = "\
Examples:
  bantam test ci.toml
  bantam test ci.toml --list
  bantam test ci.toml --filter debian/ --jobs 2
  bantam test ci.toml --junit result.xml --output logs

Exit status:
  0      every case passed
  1      a case failed
  125    nothing could be run: the file, or the flags, are not right
  128+N  ended by signal N";

#[derive(Debug, Args)]
pub struct Test {
    /// The file with kernels, root file systems and commands, in TOML; what it names is looked for in its folder.
    #[arg(value_name = "FILE.toml")]
    file: PathBuf,
    /// Run only cases with TEXT in their name, KERNEL/ROOT/COMMAND; more than once: with any of them.
    #[arg(long, value_name = "TEXT")]
    filter: Vec<String>,
    /// Print the names of the cases, and run none.
    #[arg(long)]
    list: bool,
    /// How many machines run at once [default: one for each CPU].
    #[arg(short, long, value_name = "N")]
    jobs: Option<NonZeroUsize>,
    /// Write how the cases ended to FILE, as JUnit XML; - is standard output.
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Print workflow commands of GitHub Actions: an annotation for each case that failed.
    #[arg(long)]
    github: bool,
    /// Keep all that the cases print, the kernel's messages and the reports in DIR/KERNEL/ROOT/COMMAND.
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

/// Why nothing was run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    File(#[from] keys::Error),
    #[error(transparent)]
    Output(#[from] output_file::Error),
    #[error("cannot read the tests in {}", .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot run any test of {}: {why}", .path.display())]
    NoCase { path: PathBuf, why: &'static str },
    #[error("cannot run the test {name} of {}: {why}", .path.display())]
    Flags { path: PathBuf, name: String, why: String },
    #[error("cannot keep output in {}", .path.display())]
    Keep { path: PathBuf, source: io::Error },
    #[error("cannot write the JUnit file to {}: it is where the tests are", .0.display())]
    Overwritten(PathBuf),
    #[error("cannot wait for signals by a signalfd")]
    Signals(#[source] io::Error),
}

/// What became of the tests.
pub enum Verdict {
    Passed,
    Failed,
    /// By a signal with this number.
    Ended(i32),
}

/// The folder that `path` is in, as it can be gone to.
fn folder_of(path: &Path) -> PathBuf {
    super::folder(path).to_owned()
}

fn is_one_file(one: &Path, other: &Path) -> bool {
    matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other)
}

impl Test {
    /// Runs the tests. What cannot be written at the end is told, too.
    pub fn run(&self) -> Result<Verdict, Error> {
        let read = |source| Error::Read { path: self.file.clone(), source };
        let text = std::fs::read_to_string(&self.file).map_err(read)?;
        let mut cases = file::read(&self.file, &text)?.cases();
        let no_case = |why| Error::NoCase { path: self.file.clone(), why };
        if cases.is_empty() {
            return Err(no_case("everything is excluded"));
        }
        let wanted = |name: &str| self.filter.is_empty() || self.filter.iter().any(|text| name.contains(&**text));
        cases.retain(|case| wanted(&case.name()));
        if cases.is_empty() {
            return Err(no_case("no name has the text of --filter (--list prints them)"));
        }
        for case in &cases {
            // Each is right by itself, and may go badly with another.
            let flags = |why| Error::Flags { path: self.file.clone(), name: case.name(), why };
            file::parse(&case.flags).map_err(flags)?;
        }
        if self.list {
            cases.iter().for_each(|case| summary::print(&format!("{}\n", case.name())));
            return Ok(Verdict::Passed);
        }
        let same = self.junit.as_ref().is_some_and(|junit| is_one_file(junit, &self.file));
        if same {
            return Err(Error::Overwritten(self.file.clone()));
        }
        let junit = self.junit.as_deref().map(|path| OutputFile::new("JUnit file", path)).transpose()?;
        let keep = |path: &PathBuf| {
            let made = std::path::absolute(path).and_then(|path| std::fs::create_dir_all(&path).map(|()| path));
            made.map_err(|source| Error::Keep { path: path.clone(), source })
        };
        let output = self.output.as_ref().map(keep).transpose()?;
        let signals = SignalFd::new(&signal::ENDING).map_err(Error::Signals)?;

        let started = Instant::now();
        let mut suite = Suite {
            folder: folder_of(&self.file),
            output,
            screen: Screen::new(self.github),
            names: cases.iter().map(matrix::Case::name).collect(),
            waiting: (0..cases.len()).collect(),
            running: vec![],
            ended: cases.iter().map(|_| None).collect(),
            cases,
            signal: None,
            deadline: None,
        };
        let jobs = self.jobs.or_else(|| std::thread::available_parallelism().ok()).map_or(1, NonZeroUsize::get);
        suite.serve(jobs, &signals);
        drop(signals);
        self.tell(suite, junit, started.elapsed())
    }

    fn tell(&self, suite: Suite, junit: Option<OutputFile>, time: Duration) -> Result<Verdict, Error> {
        let Suite { names, cases, ended, screen, signal, .. } = suite;
        let file = self.file.file_stem().unwrap_or_default().to_string_lossy();
        let ended = ended.into_iter().map(|ended| ended.unwrap_or_else(not_run));
        let cases: Vec<_> = cases.iter().zip(ended).map(|(case, ended)| for_junit(case, ended, &file)).collect();
        screen.table(&names, &cases, time);
        if let Some(junit) = junit {
            junit.write(junit::document(&file, &cases, time).as_bytes())?;
        }
        Ok(match signal {
            Some(number) => Verdict::Ended(number),
            None if cases.iter().any(|case| case.failure().is_some()) => Verdict::Failed,
            None => Verdict::Passed,
        })
    }
}

fn not_run() -> Ended {
    Ended { attempts: vec![], output: [Tail::new(0), Tail::new(0)] }
}

/// A case as the JUnit file has it: the last name is its own, the others are what it belongs to.
fn for_junit(case: &matrix::Case, Ended { attempts, output }: Ended, file: &str) -> junit::Case {
    let (name, class) = case.names.split_last().expect("a case has a name");
    let class = if class.is_empty() { file.to_owned() } else { class.join("/") };
    junit::Case { class, name: name.clone(), attempts, output }
}

/// All cases, and how far they are.
struct Suite {
    folder: PathBuf,
    output: Option<PathBuf>,
    screen: Screen,
    names: Vec<String>,
    cases: Vec<matrix::Case>,
    waiting: VecDeque<usize>,
    running: Vec<Machine>,
    ended: Vec<Option<Ended>>,
    /// The first one that came.
    signal: Option<i32>,
    /// When machines are killed that were to end.
    deadline: Option<Instant>,
}

impl Suite {
    /// Runs all cases, so many at once, or ends them when a signal comes.
    fn serve(&mut self, jobs: usize, signals: &SignalFd) {
        loop {
            while self.signal.is_none() && self.running.len() < jobs {
                let Some(index) = self.waiting.pop_front() else { break };
                self.start(index);
            }
            if self.running.is_empty() {
                return;
            }
            self.screen.show(&self.line());
            if self.wait(signals)
                && let Some(number) = signals.take()
            {
                self.interrupt(number);
            }
            if self.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                self.running.iter().for_each(|machine| machine.signal(Signal::KILL));
            }
            self.collect();
        }
    }

    fn start(&mut self, index: usize) {
        match Machine::start(index, &self.cases[index], &self.folder, self.output.as_deref()) {
            Ok(machine) => self.running.push(machine),
            Err(error) => {
                let cause = format!("cannot start bantam for this case: {error}");
                let ending = Ending { failure: Some(Failure::Error), cause, ..Ending::default() };
                self.take(index, Ended { attempts: vec![ending], ..not_run() });
            }
        }
    }

    /// Waits for something to happen; whether a signal came.
    fn wait(&self, signals: &SignalFd) -> bool {
        let mut fds = vec![PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN)];
        let descriptors = self.running.iter().flat_map(Machine::descriptors);
        fds.extend(descriptors.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        let left = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let tick = self.screen.is_live().then_some(TICK);
        let timeout = left.into_iter().chain(tick).min().and_then(|time| Timespec::try_from(time).ok());
        let ready = poll(&mut fds, timeout.as_ref());
        ready.is_ok() && !fds[0].revents().is_empty()
    }

    /// Ends all machines; at once when it is asked for a second time.
    fn interrupt(&mut self, number: i32) {
        if self.signal.replace(self.signal.unwrap_or(number)).is_some() {
            self.deadline = Some(Instant::now());
            return;
        }
        self.deadline = Some(Instant::now() + PATIENCE);
        for machine in &self.running {
            // The first one is for the command.
            machine.signal(Signal::INT);
            machine.signal(Signal::TERM);
        }
    }

    fn collect(&mut self) {
        for mut machine in std::mem::take(&mut self.running) {
            machine.read();
            match machine.ended() {
                Some(ended) => self.take(machine.index, ended),
                None => self.running.push(machine),
            }
        }
    }

    fn take(&mut self, index: usize, mut ended: Ended) {
        let last = ended.attempts.last_mut().filter(|last| last.failure == Some(Failure::Interrupted));
        if let Some((last, number)) = last.zip(self.signal) {
            // It was sent another one.
            last.cause = format!("the machine was ended by signal {number}, as all were");
        }
        let case = for_junit(&self.cases[index], ended, "");
        self.screen.ended(&self.names[index], &case);
        self.ended[index] = Some(Ended { attempts: case.attempts, output: case.output });
    }

    /// What is going on, in a line.
    fn line(&self) -> String {
        let ended = || self.ended.iter().flatten();
        let failed = ended().filter(|ended| ended.attempts.last().is_some_and(|last| last.failure.is_some())).count();
        let running: Vec<_> =
            self.running.iter().map(|it| format!("{} {} s", self.names[it.index], it.time().as_secs())).collect();
        let failed = if failed > 0 { format!(", {failed} failed") } else { String::new() };
        format!("{} of {} done{failed}: {}", ended().count(), self.cases.len(), running.join(", "))
    }
}

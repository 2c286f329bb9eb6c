//! One `bantam run` as a process: what it prints, its report, and its end.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use bantam::command::Tail;
use rustix::fs::OFlags;
use rustix::io::FdFlags;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use serde::Deserialize;

use super::matrix::Case;
use crate::cli::ending::{self, Ending, Failure, KEPT, Lines};

/// More than a report of many attempts has.
const REPORT_MAX: usize = 8 << 20;
/// Bytes that are read of a stream at once.
const BUFFER: usize = 64 << 10;

/// What a machine writes, until it is closed.
struct Stream {
    pipe: Option<File>,
    tail: Tail,
    /// Where all of it is kept.
    copy: Option<File>,
}

impl Stream {
    fn new(pipe: OwnedFd, kept: usize, copy: Option<File>) -> io::Result<Self> {
        rustix::fs::fcntl_setfl(&pipe, OFlags::NONBLOCK)?;
        Ok(Self { pipe: Some(pipe.into()), tail: Tail::new(kept), copy })
    }

    /// Reads what there is, but no more than `most` bytes at once.
    fn read(&mut self, mut most: usize) {
        let mut buffer = [0; BUFFER];
        while let Some(pipe) = self.pipe.as_mut().filter(|_| most > 0) {
            match pipe.read(&mut buffer) {
                Ok(count) if count > 0 => {
                    most = most.saturating_sub(count);
                    self.tail.push(&buffer[..count]);
                    if let Some(Err(error)) = self.copy.as_mut().map(|copy| copy.write_all(&buffer[..count])) {
                        log::warn!("cannot keep all output: {error}");
                        self.copy = None;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => self.pipe = None,
            }
        }
    }
}

/// A case that runs.
pub struct Machine {
    /// Its number among all cases.
    pub index: usize,
    child: Child,
    pidfd: OwnedFd,
    started: Instant,
    /// Standard output, standard error, the report.
    streams: [Stream; 3],
}

/// A case that has run.
pub struct Ended {
    /// In order; the last one counts.
    pub attempts: Vec<Ending>,
    /// The end of what it printed.
    pub output: [Tail; 2],
}

impl Machine {
    /// Starts `case` in the folder of its file. All that it prints is kept in `output`, if there is one.
    pub fn start(index: usize, case: &Case, folder: &Path, output: Option<&Path>) -> io::Result<Self> {
        let kept = output.map(|output| case.names.iter().fold(output.to_owned(), |path, name| path.join(name)));
        let keep = |name: &str| kept.as_ref().map(|kept| File::create(kept.join(name))).transpose();
        if let Some(kept) = &kept {
            fs::create_dir_all(kept)?;
        }
        let [(stdout, to_stdout), (stderr, to_stderr), (report, to_report)] = [pipe()?, pipe()?, pipe()?];
        // This process has one thread, and starts nothing else meanwhile.
        rustix::io::fcntl_setfd(&to_report, FdFlags::empty())?;
        // The same program, even if there is another one by its name now.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("bantam").args(["run", &format!("--supervised={}", std::process::id())]).args(&case.flags);
        command.arg(format!("--cmdline={}", case.cmdline));
        command.arg(format!("--report=/dev/fd/{}", to_report.as_raw_fd()));
        if let Some(kept) = kept.as_ref().filter(|_| case.has_command) {
            command.arg("--console").arg(kept.join("console"));
        }
        // The terminal's signals are for this process alone.
        command.args(&case.operands).current_dir(folder).process_group(0);
        command.stdin(Stdio::null()).stdout(to_stdout).stderr(to_stderr);
        let streams = [
            Stream::new(stdout, KEPT, keep("stdout")?)?,
            Stream::new(stderr, KEPT, keep("stderr")?)?,
            Stream::new(report, REPORT_MAX, keep("report.json")?)?,
        ];
        let mut child = command.spawn()?;
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).inspect_err(|_| {
            let _ = child.kill().and_then(|()| child.wait());
        })?;
        Ok(Self { index, child, pidfd, started: Instant::now(), streams })
    }

    /// What to wait for: its end, and what it writes.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let pipes = self.streams.iter().filter_map(|stream| stream.pipe.as_ref());
        [self.pidfd.as_fd()].into_iter().chain(pipes.map(AsFd::as_fd))
    }

    /// Takes what it has written.
    pub fn read(&mut self) {
        self.streams.iter_mut().for_each(|stream| stream.read(BUFFER));
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        // It may have ended just now.
        let _ = kill_process(Pid::from_child(&self.child), signal);
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<Ended> {
        let status = match self.child.try_wait() {
            Ok(status) => status?,
            // It is nobody's child any more: it has ended.
            Err(_) => ExitStatus::from_raw(0xff00),
        };
        // A process that it left behind may have the pipes, and is not waited for.
        self.streams.iter_mut().for_each(|stream| stream.read(REPORT_MAX));
        let [stdout, stderr, report] = &mut self.streams;
        let report: Option<Told> = serde_json::from_slice(&report.tail.bytes()).ok();
        let attempts = match report {
            Some(told) => told.endings(),
            None => vec![untold(status, &stderr.tail, self.started.elapsed())],
        };
        let take = |stream: &mut Stream| std::mem::replace(&mut stream.tail, Tail::new(0));
        Some(Ended { attempts, output: [take(stdout), take(stderr)] })
    }

    /// How long it has been running.
    pub fn time(&self) -> Duration {
        self.started.elapsed()
    }
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(pipe_with(PipeFlags::CLOEXEC)?)
}

/// How a process ended that told nothing: a mistake that it found in its flags, or a signal.
fn untold(status: ExitStatus, stderr: &Tail, time: Duration) -> Ending {
    let lines = Lines { stderr_tail: ending::last_lines(stderr), ..Lines::default() };
    let (failure, cause) =
        match (status.signal(), lines.stderr_tail.iter().find_map(|line| line.strip_prefix("bantam: "))) {
            (Some(number), _) => (Failure::Interrupted, format!("bantam was ended by signal {number}")),
            (None, Some(line)) => (Failure::Error, line.to_owned()),
            (None, None) => (Failure::Error, format!("bantam ended with {status}, and told nothing")),
        };
    Ending { failure: Some(failure), cause, time, lines }
}

/// What a report tells of this.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Told {
    cause: String,
    failure: Option<Failure>,
    durations: Durations,
    #[serde(default)]
    console_tail: Vec<String>,
    #[serde(default)]
    stdout_tail: Vec<String>,
    #[serde(default)]
    stderr_tail: Vec<String>,
    #[serde(default)]
    earlier_attempts: Vec<Told>,
}

#[derive(Deserialize)]
struct Durations {
    /// In milliseconds.
    end: Option<f64>,
}

impl Told {
    /// All attempts, the last one last.
    fn endings(mut self) -> Vec<Ending> {
        let earlier = std::mem::take(&mut self.earlier_attempts);
        let mut endings: Vec<_> = earlier.into_iter().flat_map(Told::endings).collect();
        let plain = |lines: Vec<String>| lines.iter().map(|line| ending::plain(line)).collect();
        endings.push(Ending {
            failure: self.failure,
            cause: ending::plain(&self.cause),
            time: Duration::from_secs_f64(self.durations.end.unwrap_or_default().max(0.0) / 1000.0),
            lines: Lines {
                console_tail: plain(self.console_tail),
                stdout_tail: self.stdout_tail,
                stderr_tail: self.stderr_tail,
            },
        });
        endings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_has_all_attempts() {
        let json = r#"{"outcome": "exited", "status": 0, "cause": "b", "failure": null, "durations": {"end": 1500.0},
                       "earlier-attempts": [{"cause": "a", "failure": "panic", "durations": {"end": null},
                                             "console-tail": ["x\u001b[1my\r"]}]}"#;
        let endings = serde_json::from_str::<Told>(json).unwrap().endings();
        assert_eq!((endings[0].failure, &*endings[0].cause), (Some(Failure::Panic), "a"));
        assert_eq!(endings[0].lines.console_tail, ["xy"]);
        assert_eq!((endings[1].failure, endings[1].time), (None, Duration::from_millis(1500)));
    }

    #[test]
    fn a_process_that_told_nothing_has_failed() {
        let mut stderr = Tail::new(KEPT);
        stderr.push(b"bantam: cannot do that\nmore\n");
        let ending = untold(ExitStatus::from_raw(125 << 8), &stderr, Duration::ZERO);
        assert_eq!((ending.failure, &*ending.cause), (Some(Failure::Error), "cannot do that"));
        let ending = untold(ExitStatus::from_raw(9), &stderr, Duration::ZERO);
        assert_eq!((ending.failure, &*ending.cause), (Some(Failure::Interrupted), "bantam was ended by signal 9"));
    }
}

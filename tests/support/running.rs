//! A bantam process: what it prints, and its end.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, Command, ExitStatus};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use tempfile::TempDir;

/// A bantam process that was started. It is killed when this is dropped, and when its time is over.
pub struct Running {
    child: Child,
    stdout: Option<Output>,
    stderr: Option<Output>,
    folder: TempDir,
    deadline: Instant,
}

/// How a bantam process ended.
#[derive(Debug)]
pub struct Ended {
    /// As the shell counts: the exit status, or 128 and the number of the signal that killed it.
    pub status: i32,
    pub stdout: String,
    pub stdout_bytes: Vec<u8>,
    pub stderr: String,
    /// What `--report` wrote; null if there is nothing.
    pub report: serde_json::Value,
}

impl Running {
    /// Starts `command`, which has its report in `folder`, for as long as `limit`.
    pub fn start(command: &mut Command, folder: TempDir, limit: Duration) -> Self {
        let mut child = command.spawn().unwrap();
        let stdout = child.stdout.take().map(Output::collect);
        let stderr = child.stderr.take().map(Output::collect);
        Self { child, stdout, stderr, folder, deadline: Instant::now() + limit }
    }

    /// The process' number.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Its folder, where `report.json` appears.
    pub fn folder(&self) -> &std::path::Path {
        self.folder.path()
    }

    /// Types text.
    pub fn write(&mut self, text: &str) {
        self.stdin().as_mut().unwrap().write_all(text.as_bytes()).unwrap();
    }

    /// The pipe to its standard input, to take and close.
    pub fn stdin(&mut self) -> &mut Option<ChildStdin> {
        &mut self.child.stdin
    }

    /// Takes what it prints from `output`, where its command's standard output was led to by hand.
    pub fn read_from(&mut self, output: impl Read + Send + 'static) {
        self.stdout = Some(Output::collect(output));
    }

    /// What it printed so far.
    pub fn stdout(&self) -> String {
        self.stdout.as_ref().map_or(String::new(), Output::text)
    }

    /// What it said about itself so far.
    pub fn stderr(&self) -> String {
        self.stderr.as_ref().map_or(String::new(), Output::text)
    }

    /// Waits until `text` was printed.
    pub fn wait_for(&self, text: &str) {
        let stdout = self.stdout.as_ref().unwrap();
        if !stdout.wait_for(text, self.deadline) {
            self.fail(&format!("`{text}` was not printed"));
        }
    }

    /// Waits until what was printed is as `wanted`.
    pub fn wait_until(&self, wanted: impl Fn(&str) -> bool) {
        let stdout = self.stdout.as_ref().unwrap();
        if !stdout.wait_until(|bytes| wanted(&String::from_utf8_lossy(bytes)), self.deadline) {
            self.fail("what was waited for was not printed");
        }
    }

    /// Waits until it said `text` about itself so many times.
    pub fn wait_for_errors(&self, text: &str, times: usize) {
        let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).matches(text).count() >= times;
        if !self.stderr.as_ref().unwrap().wait_until(said, self.deadline) {
            self.fail(&format!("`{text}` was not said"));
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Waits until it ends by itself.
    pub fn wait(mut self) -> Ended {
        let pidfd = pidfd_open(self.pid(), PidfdFlags::empty()).unwrap();
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&Timespec::try_from(left).unwrap())) {
                Ok(0) => self.fail("it did not end in time"),
                Err(rustix::io::Errno::INTR) => {}
                polled => break assert_eq!(polled, Ok(1)),
            }
        }
        let status = status(self.child.wait().unwrap());
        let report = fs::read(self.folder.path().join("report.json"));
        let stdout_bytes = self.stdout.take().map_or(vec![], Output::end);
        let stderr = self.stderr.take().map_or(vec![], Output::end);
        Ended {
            status,
            stdout: String::from_utf8_lossy(&stdout_bytes).into_owned(),
            stdout_bytes,
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
            report: report.map_or(serde_json::Value::Null, |json| serde_json::from_slice(&json).unwrap()),
        }
    }

    fn fail(&self, what: &str) -> ! {
        panic!("{what}\n{}", shown(&self.stdout(), &self.stderr()));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    /// Checks that the guest's script ran to its end, and the guest powered off.
    #[track_caller]
    pub fn succeeded(self) -> Self {
        self.require(self.stdout.contains(super::SUCCEEDED), "the guest's script did not succeed");
        self.require(self.status == 0, "bantam failed");
        self
    }

    /// Checks that this is so.
    #[track_caller]
    pub fn require(&self, so: bool, otherwise: &str) {
        let Self { status, stdout, stderr, report, .. } = self;
        assert!(so, "{otherwise} (status {status})\n{}\n--- report\n{report:#}", shown(stdout, stderr));
    }

    /// What the guest printed as the first line `name=value`.
    #[track_caller]
    pub fn value(&self, name: &str) -> &str {
        let value = self.values(name).next();
        self.require(value.is_some(), &format!("the guest printed no {name}"));
        value.unwrap()
    }

    /// All that the guest printed as lines `name=value`.
    pub fn values(&self, name: &str) -> impl Iterator<Item = &str> + use<'_> {
        let name = format!("{name}=");
        self.stdout.lines().filter_map(move |line| line.strip_prefix(&name)).map(str::trim)
    }

    /// What the guest printed as a line `name=number`.
    #[track_caller]
    pub fn number(&self, name: &str) -> u64 {
        self.value(name).parse().unwrap_or_else(|_| panic!("{name}={} is not a number", self.value(name)))
    }

    /// A number in the report's statistics of `device`.
    #[track_caller]
    pub fn counted(&self, device: &str, counter: &str) -> u64 {
        let count = self.report["statistics"][device][counter].as_u64();
        count.unwrap_or_else(|| panic!("no {device} {counter} in {:#}", self.report))
    }
}

/// What was read from a pipe so far, by a thread.
struct Output {
    read: Arc<(Mutex<Collected>, Condvar)>,
    thread: JoinHandle<()>,
}

#[derive(Default)]
struct Collected {
    bytes: Vec<u8>,
    ended: bool,
}

impl Output {
    fn collect(mut pipe: impl Read + Send + 'static) -> Self {
        let read = Arc::<(Mutex<Collected>, Condvar)>::default();
        let thread = thread::spawn({
            let read = read.clone();
            move || {
                let mut buffer = [0; 4096];
                loop {
                    let count = pipe.read(&mut buffer).unwrap_or(0);
                    let mut so_far = read.0.lock().unwrap();
                    so_far.bytes.extend_from_slice(&buffer[..count]);
                    so_far.ended = count == 0;
                    read.1.notify_all();
                    if so_far.ended {
                        return;
                    }
                }
            }
        });
        Self { read, thread }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.read.0.lock().unwrap().bytes).into_owned()
    }

    fn wait_for(&self, text: &str, deadline: Instant) -> bool {
        self.wait_until(|bytes| bytes.windows(text.len()).any(|window| window == text.as_bytes()), deadline)
    }

    fn wait_until(&self, wanted: impl Fn(&[u8]) -> bool, deadline: Instant) -> bool {
        let found = |so_far: &Collected| wanted(&so_far.bytes);
        let left = deadline.saturating_duration_since(Instant::now());
        let so_far = self.read.0.lock().unwrap();
        let waited = self.read.1.wait_timeout_while(so_far, left, |so_far| !found(so_far) && !so_far.ended);
        found(&waited.unwrap().0)
    }

    fn end(self) -> Vec<u8> {
        self.thread.join().unwrap();
        std::mem::take(&mut self.read.0.lock().unwrap().bytes)
    }
}

fn status(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap())
}

fn shown(stdout: &str, stderr: &str) -> String {
    let last = |text: &str, count| {
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(count)..].join("\n")
    };
    format!("--- the console's last lines\n{}\n--- standard error\n{}", last(stdout, 40), last(stderr, 40))
}

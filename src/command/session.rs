//! The host's side of a command that runs: its streams, its signals, and its end.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use rustix::termios::{isatty, tcgetwinsize};

use super::protocol::{self, message};
use super::tail::{Kept, Tail};
use super::{Spec, initramfs};
use crate::sandbox::{Role, Sandbox};
use crate::terminal::{self, Escapes, Raw, Request};

/// Bytes that are on their way in each direction, at most, here.
const BUFFER: usize = 64 << 10;
/// More than the text of any failure.
const FAILURE_MAX: u64 = 64 << 10;
/// Until the terminal is looked at again, while this process may not read it.
const BACKGROUND: Duration = Duration::from_millis(200);

/// Where the command's streams end on the host.
#[derive(Debug)]
pub struct Streams {
    /// What the command reads.
    pub stdin: OwnedFd,
    /// What it prints.
    pub stdout: OwnedFd,
    /// What it prints about that.
    pub stderr: OwnedFd,
}

impl Streams {
    /// Those of this process.
    ///
    /// # Errors
    /// When descriptors are used up.
    pub fn inherit() -> io::Result<Self> {
        let duplicate = |fd: BorrowedFd<'_>| Ok::<_, io::Error>(rustix::io::fcntl_dupfd_cloexec(fd, 3)?);
        Ok(Self {
            stdin: duplicate(rustix::stdio::stdin())?,
            stdout: duplicate(rustix::stdio::stdout())?,
            stderr: duplicate(rustix::stdio::stderr())?,
        })
    }
}

/// How the command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// By itself, with this status.
    Exited(u8),
    /// By a signal with this number.
    Killed(i32),
}

/// What limits the command's processes, in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PidsLimit {
    /// A control group.
    Group,
    /// The kernel's limit of all threads, with some to spare.
    Threads,
}

impl PidsLimit {
    fn of(value: u32) -> Option<Self> {
        match value {
            protocol::PIDS_BY_GROUP => Some(Self::Group),
            protocol::PIDS_BY_THREADS => Some(Self::Threads),
            _ => None,
        }
    }
}

impl fmt::Display for PidsLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Group => "a control group of the guest",
            Self::Threads => "the guest's limit of all threads, as its kernel has no control groups for processes",
        })
    }
}

/// What a session tells the machine.
#[derive(Debug)]
pub enum Report {
    /// The guest waits for the command, which [`Session::give`] gives.
    Ready,
    /// The guest is about to start the command.
    Started(Option<PidsLimit>),
    /// The command has ended, and all its output was passed on.
    Ended(Ended),
    /// The guest cannot start the command; why.
    Failed(String),
    /// The user ends the machine by the terminal.
    Quit,
}

/// A command's session.
pub struct Session {
    control: UnixStream,
    /// Until it starts.
    idle: Option<Idle>,
    /// Says when nothing is carried any more.
    done: Option<Receiver<()>>,
    /// The terminal in raw mode, if the command has it.
    raw: Option<Raw>,
    has_terminal: bool,
    running: bool,
    /// The terminal's size has changed before the guest could be told.
    resized: bool,
    signals: u32,
    /// Has the guest that waits be given the command.
    give: Option<SyncSender<()>>,
    /// Carries the input, which is left alone until the command begins: another guest may get it.
    late_input: Option<Box<dyn FnOnce() + Send>>,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("running", &self.running).finish_non_exhaustive()
    }
}

/// How the guest comes to know of its command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// By what it boots with.
    AtBoot,
    /// By the session, when [`Session::give`] says so.
    WhenGiven,
    /// By the session: it waits for it already.
    AtOnce,
}

/// What the guest is told of its command by the session.
#[derive(Debug)]
struct Given {
    text: Vec<u8>,
    /// When it may be told; else it is at once.
    when: Option<Receiver<()>>,
}

/// What the threads get.
#[derive(Debug)]
struct Idle {
    streams: Streams,
    stdin: UnixStream,
    outputs: Vec<UnixStream>,
    kept: Option<Kept>,
    given: Option<Given>,
}

/// The guest's ends of connections, by the port of the host that they belong to.
pub type Ends = HashMap<u32, UnixStream>;

impl Session {
    /// A session for `command`, and the ends for the vsock device.
    ///
    /// # Errors
    /// When sockets cannot be had, or there is no terminal.
    pub fn new(command: &Spec, told: Told, streams: Streams) -> io::Result<(Self, Ends)> {
        let tty = command.tty;
        if tty && !isatty(&streams.stdin) {
            return Err(io::Error::other("standard input is not a terminal"));
        }
        let mut ends = Ends::new();
        let mut end = |port| {
            let (host, guest) = UnixStream::pair()?;
            ends.insert(port, guest);
            Ok::<_, io::Error>(host)
        };
        let control = end(protocol::CONTROL)?;
        let stdin = end(protocol::STDIN)?;
        let outputs = if tty { vec![stdin.try_clone()?] } else { vec![end(protocol::STDOUT)?, end(protocol::STDERR)?] };
        let (give, given) = match told {
            Told::AtBoot => (None, None),
            Told::WhenGiven | Told::AtOnce => {
                let text = [initramfs::told(command, Self::window()), initramfs::seed()?].concat();
                let (give, when) = mpsc::sync_channel(1);
                let waits = told == Told::WhenGiven;
                (waits.then_some(give), Some(Given { text, when: waits.then_some(when) }))
            }
        };
        let idle = Some(Idle { streams, stdin, outputs, kept: None, given });
        let session = Self {
            control,
            idle,
            done: None,
            raw: None,
            has_terminal: tty,
            running: false,
            resized: false,
            signals: 0,
            give,
            late_input: None,
        };
        Ok((session, ends))
    }

    /// Has the guest that waits for it be given the command. Without effect if it has been.
    pub fn give(&mut self) {
        // Its receiver is gone when the guest is.
        if let Some(give) = self.give.take() {
            let _ = give.send(());
        }
    }

    /// Has the last `bytes` of each output kept, from the start on.
    pub fn keep(&mut self, bytes: usize) -> Kept {
        let kept = Kept::new(bytes);
        self.idle.iter_mut().for_each(|idle| idle.kept = Some(kept.clone()));
        kept
    }

    /// The size of the user's terminal, as the init takes it.
    pub fn window() -> u32 {
        let size = tcgetwinsize(rustix::stdio::stdin());
        size.map_or(0, |size| u32::from(size.ws_row) << 16 | u32::from(size.ws_col))
    }

    /// Starts to carry streams, on threads in `sandbox`, which call `report`.
    ///
    /// # Errors
    /// When a thread cannot be started, or the terminal not be set.
    pub fn start(&mut self, sandbox: &Sandbox, report: impl Fn(Report) + Clone + Send + 'static) -> io::Result<()> {
        let Some(Idle { streams, stdin, outputs, kept, given }) = self.idle.take() else { return Ok(()) };
        if self.has_terminal {
            self.raw = Raw::enter_whole()?;
        }
        let Streams { stdin: input, stdout, stderr } = streams;
        let escapes = self.has_terminal.then(Escapes::default);
        let quit = report.clone();
        let enter = {
            let sandbox = sandbox.clone();
            move || {
                let entered = sandbox.enter(Role::Stream);
                entered.inspect_err(|error| log::error!("cannot restrict a thread of the command's: {error}")).is_ok()
            }
        };
        let entered = enter.clone();
        let is_late = !self.has_terminal && given.as_ref().is_some_and(|given| given.when.is_none());
        let carry = move || {
            if entered() && carry_input(&File::from(input), &stdin, escapes) {
                quit(Report::Quit);
            }
        };
        if is_late {
            self.late_input = Some(Box::new(carry));
        } else {
            // It may wait for its input for ever, and is not waited for.
            crate::threads::named("bantam-stdin".into()).spawn(carry)?;
        }
        let mut writers = vec![];
        let [kept_stdout, kept_stderr] = kept.map_or([None, None], |kept| [Some(kept.stdout), Some(kept.stderr)]);
        let ends = [("bantam-stdout", stdout, kept_stdout), ("bantam-stderr", stderr, kept_stderr)];
        for (from, (name, to, tail)) in outputs.into_iter().zip(ends) {
            let entered = enter.clone();
            let carry = move || {
                if entered() {
                    carry_output(name, &from, &File::from(to), tail.as_deref());
                }
            };
            writers.push(crate::threads::named(name.into()).spawn(carry)?);
        }
        let control = self.control.try_clone()?;
        let (done, is_done) = mpsc::channel();
        crate::threads::named("bantam-command".into()).spawn(move || {
            if enter() {
                listen(control, given, writers, &report);
            }
            let _ = done.send(());
        })?;
        self.done = Some(is_done);
        Ok(())
    }

    /// The guest said that the command is about to run.
    pub fn started(&mut self) {
        self.running = true;
        if let Some(carry) = self.late_input.take()
            && let Err(error) = crate::threads::named("bantam-stdin".into()).spawn(carry)
        {
            log::error!("cannot start the thread that carries standard input: {error}");
        }
        if std::mem::take(&mut self.resized) {
            self.resize();
        }
    }

    /// Sends the command a signal; false if it is not running yet, or was sent one before: then it is for the machine.
    pub fn signal(&mut self, signal: i32) -> bool {
        self.signals += 1;
        self.running
            && self.signals == 1
            && u32::try_from(signal).is_ok_and(|number| self.tell(protocol::SIGNAL, number))
    }

    /// Tells the command the terminal's size.
    pub fn resize(&mut self) {
        if self.running && self.has_terminal {
            self.tell(protocol::WINDOW, Self::window());
        }
        // Before that its command may be on its way there.
        self.resized = !self.running;
    }

    fn tell(&self, what: u32, value: u32) -> bool {
        // A guest that does not listen is not waited for.
        let sent = send(&self.control, &message(what, value), SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        sent.is_ok_and(|count| count == protocol::MESSAGE)
    }

    /// After the end of the machine: waits so long until the output that is there has been written, and gives the
    /// terminal back.
    pub fn finish(&mut self, patience: Duration) {
        if let Some(done) = self.done.take()
            && done.recv_timeout(patience).is_err()
        {
            log::info!("the command's output is not read: the rest is dropped");
        }
        self.raw = None;
    }
}

/// Takes what the guest says, until it has no more to say and all output was written.
fn listen(
    mut control: UnixStream,
    mut given: Option<Given>,
    mut writers: Vec<JoinHandle<()>>,
    report: &impl Fn(Report),
) {
    if given.as_ref().is_some_and(|given| given.when.is_none()) {
        tell_command(&mut control, &mut given);
    }
    let mut bytes = [0; protocol::MESSAGE];
    while control.read_exact(&mut bytes).is_ok() {
        match protocol::parse(bytes) {
            (protocol::READY, _) => {
                if given.is_some() {
                    report(Report::Ready);
                    tell_command(&mut control, &mut given);
                }
            }
            (protocol::STARTED, limit) => report(Report::Started(PidsLimit::of(limit))),
            (protocol::FAILED, length) => {
                let mut text = vec![];
                let _ = Read::by_ref(&mut control).take(FAILURE_MAX.min(length.into())).read_to_end(&mut text);
                report(Report::Failed(String::from_utf8_lossy(&text).into_owned()));
            }
            (protocol::ENDED, status) => {
                join(&mut writers);
                report(Report::Ended(ended(status)));
            }
            (what, _) => {
                log::warn!("the guest's init says something that is not known: {what}");
                break;
            }
        }
    }
    join(&mut writers);
}

/// Tells the guest its command, when it may be told.
fn tell_command(control: &mut UnixStream, given: &mut Option<Given>) {
    let Some(Given { text, when }) = given.take() else { return };
    if when.is_none_or(|when| when.recv().is_ok()) {
        let length = u32::try_from(text.len()).unwrap_or(0);
        // A guest that is gone is noticed by who reads.
        let _ = control.write_all(&[&message(protocol::COMMAND, length)[..], &text].concat());
    }
}

fn join(writers: &mut Vec<JoinHandle<()>>) {
    for writer in writers.drain(..) {
        if writer.join().is_err() {
            log::error!("a thread that carries the command's output panicked");
        }
    }
}

/// What a wait status says.
pub(super) fn ended(status: u32) -> Ended {
    match (status & 0x7f, status >> 8 & 0xff) {
        (0, code) => Ended::Exited(u8::try_from(code).expect("it is masked")),
        (signal, _) => Ended::Killed(i32::try_from(signal).expect("it is masked")),
    }
}

/// Carries the command's input until its end, or until the command takes no more. True if the user ends the machine.
fn carry_input(mut from: &File, mut to: &UnixStream, mut escapes: Option<Escapes>) -> bool {
    let is_terminal = isatty(from);
    let mut buffer = vec![0; BUFFER];
    loop {
        let mut fds = [PollFd::new(from, PollFlags::IN), PollFd::new(to, PollFlags::empty())];
        match poll(&mut fds, None) {
            Ok(_) if !fds[1].revents().is_empty() => return false,
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => break,
        }
        if fds[0].revents().is_empty() {
            continue;
        }
        if is_terminal && !terminal::in_foreground() {
            // Reading it now would stop the process.
            thread::sleep(BACKGROUND);
            continue;
        }
        let count = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if [ErrorKind::WouldBlock, ErrorKind::Interrupted].contains(&error.kind()) => continue,
            Err(error) => {
                log::info!("cannot read standard input: {error}");
                break;
            }
        };
        let (count, request) = escapes.as_mut().map_or((count, None), |keys| keys.filter(&mut buffer[..count]));
        if to.write_all(&buffer[..count]).is_err() {
            return false;
        }
        match request {
            Some(Request::Quit) => return true,
            Some(Request::Help) => drop(rustix::io::write(rustix::stdio::stderr(), terminal::HELP.as_bytes())),
            None => {}
        }
    }
    let _ = to.shutdown(Shutdown::Write);
    false
}

/// Carries the command's output until its end, or until nobody reads it. Then the command is told.
fn carry_output(name: &str, mut from: &UnixStream, to: &File, kept: Option<&Mutex<Tail>>) {
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        if let Some(kept) = kept {
            kept.lock().unwrap_or_else(PoisonError::into_inner).push(&buffer[..count]);
        }
        if let Err(error) = write_all(to, &buffer[..count]) {
            log::debug!("{name}: {error}");
            let _ = from.shutdown(Shutdown::Both);
            return;
        }
    }
}

/// Writes everything, also to a descriptor that somebody made nonblocking.
fn write_all(mut to: &File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                poll(&mut [PollFd::new(&to.as_fd(), PollFlags::OUT)], None)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

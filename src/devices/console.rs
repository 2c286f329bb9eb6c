//! The host's end of the serial console.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use rustix::io::retry_on_intr;

use crate::socket::Listener;
use crate::terminal::{self, Escapes, Raw, Request};
use crate::text::serde_as_text;

/// Where the serial console is on the host: `stdio`, `none`, `file=PATH` or `socket=PATH`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Spec {
    /// Standard input and output.
    #[default]
    Stdio,
    /// Nowhere: what the guest writes is dropped, and it reads nothing.
    None,
    /// Output to this file, no input.
    File(PathBuf),
    /// Both ways on a Unix socket that is created at this path.
    Socket(PathBuf),
}

/// Text that is no [`Spec`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot use `{0}` as a serial console: expected stdio, none, file=PATH or socket=PATH")]
pub struct BadSpec(String);

impl FromStr for Spec {
    type Err = BadSpec;

    fn from_str(text: &str) -> Result<Self, BadSpec> {
        match text.split_once('=') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "none" => Ok(Self::None),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("socket", path)) if !path.is_empty() => Ok(Self::Socket(path.into())),
            _ => Err(BadSpec(text.to_owned())),
        }
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdio => f.write_str("stdio"),
            Self::None => f.write_str("none"),
            Self::File(path) => write!(f, "file={}", path.display()),
            Self::Socket(path) => write!(f, "socket={}", path.display()),
        }
    }
}

serde_as_text!(Spec);

/// What the guest's input brings.
#[derive(Debug, PartialEq, Eq)]
pub enum Incoming {
    /// This many bytes for the guest; may be none.
    Bytes(usize),
    /// There will be no more.
    End,
    /// The user ends the machine.
    Quit,
}

/// Where the guest's input comes from. The run loop polls the descriptor for reading, then reads once.
pub trait Input: Send {
    /// What to poll now; it may be another one after each read.
    fn fd(&self) -> BorrowedFd<'_>;
    /// Reads what is there into `buffer`.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<Incoming>;
    /// Whether it carries requests for bantam, and so is read even if the guest takes nothing.
    fn is_terminal(&self) -> bool {
        false
    }
}

/// The host's end of a console.
pub struct Console {
    /// Takes what the guest writes. It may block: it is called on a thread of its own.
    pub output: Box<dyn Write + Send>,
    /// Brings what the guest reads.
    pub input: Option<Box<dyn Input>>,
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Console").field("input", &self.input.is_some()).finish_non_exhaustive()
    }
}

/// A console could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Standard output, or the terminal on standard input, could not be used.
    #[error("cannot use the terminal as a serial console")]
    Stdio(#[source] io::Error),
    /// The file could not be created.
    #[error("cannot create {} for the serial console", .0.display())]
    File(PathBuf, #[source] io::Error),
    /// The socket could not be created.
    #[error("cannot listen on the socket {} for the serial console", .0.display())]
    Socket(PathBuf, #[source] io::Error),
}

impl Console {
    /// A console that writes to `output` and reads nothing.
    pub fn to(output: impl Write + Send + 'static) -> Self {
        Console { output: Box::new(output), input: None }
    }

    /// Opens what `spec` says. [`Spec::Stdio`] switches a terminal to raw mode until the console is dropped.
    pub fn open(spec: &Spec) -> Result<Self, Error> {
        match spec {
            Spec::Stdio => Self::stdio().map_err(Error::Stdio),
            Spec::None => Ok(Self::to(io::sink())),
            Spec::File(path) => {
                let file = create(path).map_err(|error| Error::File(path.clone(), error))?;
                Ok(Self::to(file))
            }
            Spec::Socket(path) => Socket::listen(path).map_err(|error| Error::Socket(path.clone(), error)),
        }
    }

    fn stdio() -> io::Result<Self> {
        let output = Stdout::new()?;
        let is_terminal = rustix::termios::isatty(rustix::stdio::stdin());
        let raw = if is_terminal { Raw::enter()? } else { None };
        // A background process that reads its terminal is stopped; without it the guest just has no input.
        let background = raw.is_none() && is_terminal;
        let terminal = raw.as_ref().and_then(|_| reopen(rustix::stdio::stdin()));
        let stdin = Stdin { raw, terminal, escapes: Escapes::default() };
        let input: Option<Box<dyn Input>> = if background { None } else { Some(Box::new(stdin)) };
        Ok(Console { output: Box::new(output), input })
    }
}

/// The terminal that is open as `fd` once more, so as not to wait in a read when another program (a pager, say) has taken
/// what there was. Others share `fd` itself, which has to stay as it is for them.
fn reopen(fd: BorrowedFd<'_>) -> Option<File> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path).ok()
}

/// Creates or empties the file at `path`. A pipe without a reader is refused: waiting for one could not be ended, as
/// the signals that would end it are blocked.
fn create(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    // Clears O_NONBLOCK: writing may wait, on the console's own thread.
    rustix::fs::fcntl_setfl(&file, OFlags::empty())?;
    Ok(file)
}

/// Standard output, unbuffered. Another program that has it too may have made it non-blocking.
#[derive(Debug)]
pub struct Stdout(File);

impl Stdout {
    /// A descriptor of its own.
    pub fn new() -> io::Result<Self> {
        Ok(Self(File::from(rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 0)?)))
    }
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.0.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let mut fds = [PollFd::new(&self.0, PollFlags::OUT)];
                    retry_on_intr(|| poll(&mut fds, None))?;
                }
                written => return written,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Standard input. If it is a terminal, it is raw and has escape sequences.
struct Stdin {
    raw: Option<Raw>,
    /// Where a terminal is read, if it could be opened again.
    terminal: Option<File>,
    escapes: Escapes,
}

impl Input for Stdin {
    fn fd(&self) -> BorrowedFd<'_> {
        self.terminal.as_ref().map_or(rustix::stdio::stdin(), AsFd::as_fd)
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<Incoming> {
        let count = rustix::io::read(self.fd(), &mut *buffer)?;
        if count == 0 {
            return Ok(Incoming::End);
        }
        if self.raw.is_none() {
            return Ok(Incoming::Bytes(count));
        }
        let (count, request) = self.escapes.filter(&mut buffer[..count]);
        match request {
            Some(Request::Quit) => return Ok(Incoming::Quit),
            Some(Request::Help) => drop(io::stderr().write_all(terminal::HELP.as_bytes())),
            None => {}
        }
        Ok(Incoming::Bytes(count))
    }

    fn is_terminal(&self) -> bool {
        self.raw.is_some()
    }
}

/// A listening socket and the one client it has at a time. What is written while there is none is dropped.
struct Socket {
    listener: Listener,
    client: Arc<Mutex<Option<UnixStream>>>,
    /// The client as this end reads it.
    reading: Option<UnixStream>,
}

impl Socket {
    fn listen(path: &Path) -> io::Result<Console> {
        let listener = Listener::bind(path)?;
        let client = Arc::default();
        let output = SocketOutput(Arc::clone(&client));
        let input = Socket { listener, client, reading: None };
        Ok(Console { output: Box::new(output), input: Some(Box::new(input)) })
    }
}

fn lock(client: &Mutex<Option<UnixStream>>) -> MutexGuard<'_, Option<UnixStream>> {
    client.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Input for Socket {
    fn fd(&self) -> BorrowedFd<'_> {
        self.reading.as_ref().map_or(self.listener.as_fd(), AsFd::as_fd)
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<Incoming> {
        let Some(client) = &mut self.reading else {
            let (client, _) = self.listener.accept()?;
            self.reading = Some(client.try_clone()?);
            *lock(&self.client) = Some(client);
            return Ok(Incoming::Bytes(0));
        };
        match client.read(buffer) {
            // It may have more to read: it makes way when it cannot be written to, or for the next one.
            Ok(0) => {
                self.reading = None;
                Ok(Incoming::Bytes(0))
            }
            Err(_) => {
                self.reading = None;
                lock(&self.client).take();
                Ok(Incoming::Bytes(0))
            }
            Ok(count) => Ok(Incoming::Bytes(count)),
        }
    }
}

struct SocketOutput(Arc<Mutex<Option<UnixStream>>>);

impl Write for SocketOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Not under the lock: a client that does not read blocks this thread, but not the one that accepts.
        let client = lock(&self.0).as_ref().map(UnixStream::try_clone).transpose()?;
        let Some(mut client) = client else { return Ok(bytes.len()) };
        // The reading end sees that it has gone, too, and takes the next one.
        Ok(client.write(bytes).unwrap_or(bytes.len()))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_without_a_reader_is_refused_and_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
        assert!(matches!(Console::open(&Spec::File(path.clone())), Err(Error::File(..))));
        let _reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        let file = create(&path).unwrap();
        assert!(!rustix::fs::fcntl_getfl(&file).unwrap().contains(OFlags::NONBLOCK), "a full pipe is waited for");
    }

    #[test]
    fn a_terminal_whose_input_another_took_is_not_waited_for() {
        use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
        let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&user).unwrap();
        unlockpt(&user).unwrap();
        let name = ptsname(&user, Vec::new()).unwrap().into_string().unwrap();
        let shared = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open(name).unwrap();
        let terminal = reopen(shared.as_fd());
        assert!(!rustix::fs::fcntl_getfl(&shared).unwrap().contains(OFlags::NONBLOCK));
        let mut stdin = Stdin { raw: None, terminal, escapes: Escapes::default() };
        let error = stdin.read(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        rustix::io::write(&user, b"x\n").unwrap();
        assert_eq!(stdin.read(&mut [0; 8]).unwrap(), Incoming::Bytes(2));
    }

    #[test]
    fn a_socket_serves_one_client_after_another() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("serial.sock");
        let mut console = Console::open(&Spec::Socket(path.clone())).unwrap();
        assert!(matches!(Console::open(&Spec::Socket(path.clone())), Err(Error::Socket(..))), "taken");
        let mut input = console.input.take().unwrap();
        console.output.write_all(b"nobody listens").unwrap();
        for _ in 0..2 {
            let mut client = UnixStream::connect(&path).unwrap();
            let mut buffer = [0; 16];
            assert_eq!(input.read(&mut buffer).unwrap(), Incoming::Bytes(0), "accepted");
            client.write_all(b"in").unwrap();
            assert_eq!(input.read(&mut buffer).unwrap(), Incoming::Bytes(2));
            console.output.write_all(b"out").unwrap();
            let mut seen = [0; 3];
            client.read_exact(&mut seen).unwrap();
            assert_eq!((&buffer[..2], &seen), (&b"in"[..], b"out"));
            drop(client);
            assert_eq!(input.read(&mut buffer).unwrap(), Incoming::Bytes(0), "gone");
        }
        drop(input);
        assert!(!path.exists());
    }

    #[test]
    fn a_client_that_has_no_more_to_say_reads_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("serial.sock");
        let mut console = Console::open(&Spec::Socket(path.clone())).unwrap();
        let mut input = console.input.take().unwrap();
        let mut client = UnixStream::connect(&path).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        for step in ["accepted", "at its end"] {
            assert_eq!(input.read(&mut [0; 16]).unwrap(), Incoming::Bytes(0), "{step}");
        }
        console.output.write_all(b"out").unwrap();
        let mut next = UnixStream::connect(&path).unwrap();
        assert_eq!(input.read(&mut [0; 16]).unwrap(), Incoming::Bytes(0), "accepted");
        console.output.write_all(b"next").unwrap();
        drop((input, console));
        let (mut seen, mut seen_next) = (String::new(), String::new());
        client.read_to_string(&mut seen).unwrap();
        next.read_to_string(&mut seen_next).unwrap();
        assert_eq!((&*seen, &*seen_next), ("out", "next"));
    }

    #[test]
    fn a_socket_that_nobody_listens_on_is_replaced_and_nothing_else_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("serial.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "as a killed process leaves it");
        drop(Console::open(&Spec::Socket(path.clone())).unwrap());
        std::fs::write(&path, "mine").unwrap();
        assert!(matches!(Console::open(&Spec::Socket(path.clone())), Err(Error::Socket(..))));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
    }

    #[test]
    fn output_that_does_not_block_is_waited_for() {
        let (mut reader, writer) = io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        let mut output = Stdout(File::from(std::os::fd::OwnedFd::from(writer)));
        let written = std::thread::spawn(move || output.write_all(&[b'x'; 1 << 20]));
        let mut seen = Vec::new();
        reader.read_to_end(&mut seen).unwrap();
        written.join().unwrap().unwrap();
        assert_eq!(seen.len(), 1 << 20);
    }

    #[test]
    fn specs_round_trip() {
        for text in ["stdio", "none", "file=/tmp/a=b", "socket=x"] {
            assert_eq!(text.parse::<Spec>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn other_text_is_refused() {
        for text in ["", "file", "file=", "socket=", "tty", "stdio=x", "none="] {
            assert_eq!(text.parse::<Spec>(), Err(BadSpec(text.to_owned())), "{text}");
        }
    }
}

//! The network that needs no privilege: passt, a program that makes the guest's packets its own connections.
//!
//! It is started with one end of a socket pair, in the foreground, and ends when the other end is closed: also when this
//! process is killed. It listens on the published ports, answers DHCP and ARP, and forwards DNS.

#![expect(unsafe_code, reason = "has the child inherit one descriptor")]

use std::io::{self, BufRead, BufReader, Read};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::FdFlags;

use super::host::Host;
use super::stream::Stream;
use super::{MacAddr, Publish};
use crate::sandbox::{Role, Sandbox};

/// The guest's address.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// The length in bits of its network's prefix.
pub const PREFIX_LENGTH: u8 = 24;
/// The gateway.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The name server: passt forwards to the host's.
pub const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// The most bytes in a frame that the guest is told to send, without another wish. A packet costs what it costs, so the
/// largest are best: passt makes others of them.
pub const MTU: u16 = 65520;
/// The gateway's Ethernet address.
const GATEWAY_MAC: &str = "52:55:0a:00:02:02";

/// How long it may take to start.
const START_LIMIT: Duration = Duration::from_secs(20);
/// The longest line of its messages.
const LINE_MAX: u64 = 1 << 12;
/// Its messages that are logged as such: the guest can cause some.
const LOGGED_LINES: u32 = 50;

/// Why there is no such network.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// passt is not there.
    #[error(
        "cannot start passt, which a user network needs: there is no such program in PATH (`sudo apt install passt`)"
    )]
    Missing,
    /// The host did not start it.
    #[error("cannot start passt, which a user network needs")]
    Start(#[source] io::Error),
    /// It ended at once.
    #[error("cannot start passt, which a user network needs: it ended as it started ({status}){said}")]
    Ended {
        /// How.
        status: ExitStatus,
        /// What it said.
        said: String,
    },
    /// It does nothing.
    #[error("cannot start passt, which a user network needs: it does not answer")]
    Silent,
    /// A port of the host cannot be had.
    #[error("cannot publish the host's port {port}")]
    Port {
        /// The port.
        port: Publish,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// A running passt.
pub struct Passt {
    /// `None` where a test has the other end of the stream.
    child: Option<Child>,
    stream: Stream,
    /// Its messages, until it is known to run.
    messages: Option<ChildStderr>,
    ports: Vec<Publish>,
}

impl Passt {
    /// Starts it for a guest with the address `mac`.
    pub fn start(ports: &[Publish], mac: MacAddr, mtu: u16) -> Result<Self, Error> {
        let (ours, theirs) = UnixStream::pair().map_err(Error::Start)?;
        let stream = Stream::new(ours).map_err(Error::Start)?;
        let mut command = Command::new("passt");
        command.args(["--foreground", "--quiet", "--ipv4-only", "--interface", "lo", "--no-map-gw"]);
        command.args(["--address", &GUEST.to_string(), "--netmask", &PREFIX_LENGTH.to_string()]);
        command.args(["--gateway", &GATEWAY.to_string(), "--mac-addr", GATEWAY_MAC]);
        command.args(["--dns-forward", &NAME_SERVER.to_string(), "--mtu", &mtu.to_string()]);
        for (udp, option) in [(false, "--tcp-ports"), (true, "--udp-ports")] {
            let mut ports = ports.iter().filter(|port| port.udp == udp).peekable();
            // Without a word, UDP ports would follow those of TCP.
            if ports.peek().is_none() {
                command.args([option, "none"]);
            }
            for port in ports {
                command.args([option, &specification(port)]);
            }
        }
        command.args(["--fd", &theirs.as_raw_fd().to_string()]);
        // Its own process group: a terminal's signals are not for it.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0);
        let inherit = move || Ok(rustix::io::fcntl_setfd(&theirs, FdFlags::empty())?);
        // SAFETY: between fork and exec only fcntl is called, which is async-signal-safe.
        unsafe { command.pre_exec(inherit) };
        let mut child = command.spawn().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::Missing,
            _ => Error::Start(error),
        })?;
        let messages = child.stderr.take();
        // From here on it is ended when this is dropped.
        let mut passt = Self { child: Some(child), stream, messages, ports: ports.to_vec() };
        // What is answered when it is ready. If it has ended by now, why is found out then.
        let _ = passt.stream.send_frame(&arp_request(mac));
        Ok(passt)
    }

    /// One whose end of the socket the test has.
    #[cfg(any(test, fuzzing))]
    pub fn in_test() -> (Self, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let stream = Stream::new(ours).expect("a socket");
        (Self { child: None, stream, messages: None, ports: vec![] }, theirs)
    }

    /// Waits until it has its ports and serves the guest. Its messages are then to be [passed on](Messages::pass_on).
    pub fn wait_until_ready(&mut self) -> Result<Option<Messages>, Error> {
        let Some(mut messages) = self.messages.take() else { return Ok(None) };
        let deadline = Instant::now() + START_LIMIT;
        loop {
            match self.stream.skip_frame() {
                Ok(()) => break,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return Err(self.failure(&mut messages)),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Silent);
            }
            let left = Timespec::try_from(left).expect("some seconds");
            match poll(&mut [PollFd::new(&self.stream, PollFlags::IN)], Some(&left)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(Error::Start(error.into())),
            }
        }
        Ok(Some(Messages(messages)))
    }

    /// Why it ended.
    fn failure(&mut self, messages: &mut ChildStderr) -> Error {
        // It has closed its descriptors: killing it does not change its status any more.
        let status = match self.end() {
            Ok(status) => status.unwrap_or_default(),
            Err(error) => return Error::Start(error),
        };
        let taken = self.ports.iter().find_map(|port| Some((*port, port.try_bind().err()?)));
        if let Some((port, source)) = taken {
            return Error::Port { port, source };
        }
        let mut text = vec![];
        let _ = messages.take(16 * LINE_MAX).read_to_end(&mut text);
        let text = String::from_utf8_lossy(&text);
        let said = text.lines().filter(|line| is_message(line)).map(|line| format!(": {}", line.trim())).collect();
        Error::Ended { status, said }
    }

    fn end(&mut self) -> io::Result<Option<ExitStatus>> {
        let Some(child) = &mut self.child else { return Ok(None) };
        // It has neither files nor anything to write.
        child.kill()?;
        child.wait().map(Some)
    }

    /// Whether it has ended.
    pub fn is_gone(&self) -> bool {
        self.stream.is_gone()
    }

    /// Whether a frame that it sent is here.
    pub fn has_more(&self) -> bool {
        self.stream.has_more()
    }

    /// What goes to it and comes from it.
    pub fn stream(&mut self) -> &mut Stream {
        &mut self.stream
    }
}

/// What a passt says while it serves a guest.
#[derive(Debug)]
pub struct Messages(ChildStderr);

impl Messages {
    /// Passes them on to the log, by a thread in `sandbox`.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn pass_on(self, sandbox: &Sandbox) -> io::Result<()> {
        let sandbox = sandbox.clone();
        let log = move || match sandbox.enter(Role::Stream) {
            Ok(()) => self::log(self.0),
            Err(error) => log::error!("cannot restrict the thread of passt's messages: {error}"),
        };
        crate::threads::named("bantam-passt".into()).spawn(log).map(drop)
    }
}

impl Drop for Passt {
    /// Its ports are free when this returns.
    fn drop(&mut self) {
        let _ = self.end();
    }
}

impl AsFd for Passt {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// A port as passt's options have it.
fn specification(port: &Publish) -> String {
    let address = port.address.map(|address| format!("{address}/")).unwrap_or_default();
    format!("{address}{}:{}", port.host, port.guest)
}

/// An Ethernet frame in which the guest asks for the gateway's address (RFC 826).
fn arp_request(mac: MacAddr) -> [u8; 42] {
    let mut frame = [0; 42];
    let mut set = |at: usize, bytes: &[u8]| frame[at..at + bytes.len()].copy_from_slice(bytes);
    set(0, &[0xff; 6]);
    set(6, &mac.bytes());
    // ARP; of Ethernet and IPv4 addresses, 6 and 4 bytes; a request.
    set(12, &[0x08, 0x06, 0, 1, 0x08, 0x00, 6, 4, 0, 1]);
    set(22, &mac.bytes());
    set(28, &GUEST.octets());
    set(38, &GATEWAY.octets());
    frame
}

/// Whether a line is worth being told.
fn is_message(line: &str) -> bool {
    /// Where there is no system log, old versions say so of each of their messages. Root is meant to start it.
    const NOISE: [&str; 3] = ["Failed to send", "Don't run as root", "Started as root"];
    !line.trim().is_empty() && !NOISE.iter().any(|noise| line.starts_with(noise))
}

/// Passes its messages on to the log, until it ends.
fn log(messages: ChildStderr) {
    let mut messages = BufReader::new(messages);
    let (mut line, mut lines) = (vec![], 0u32);
    while let Ok(1..) = messages.by_ref().take(LINE_MAX).read_until(b'\n', &mut line) {
        let text = String::from_utf8_lossy(&line);
        if is_message(&text) {
            lines = lines.saturating_add(1);
            let level = if lines > LOGGED_LINES { log::Level::Debug } else { log::Level::Info };
            log::log!(level, "passt: {}", text.trim());
        }
        line.clear();
    }
}

//! The first process of a guest that runs one command: it loads kernel modules, makes the command's root file system its
//! own, starts the command, carries its streams to and from the host, and tells how it ended.
//!
//! It is a program by itself, static and without the standard library, which build.rs compiles and bantam carries. All
//! it is told is in /.bantam of the initramfs; all it tells goes through vsock connections to the host, or, before there
//! are any, to the kernel's log.

#![no_std]
#![no_main]

extern crate alloc;

mod account;
#[cfg_attr(target_arch = "x86_64", path = "x86_64.rs")]
mod arch;
mod child;
mod file;
mod network;
mod pids;
#[path = "../command/protocol.rs"]
mod protocol;
mod random;
mod relay;
mod root;
mod runtime;
mod spec;
mod sys;

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::ffi::CStr;

use child::Streams;
use relay::{End, Relay};
use spec::Spec;
use sys::{Fd, POLLIN, PollFd};

const SIGCHLD: u32 = 17;
const SIGKILL: u32 = 9;
const TIOCSWINSZ: usize = 0x5414;
/// The number of the terminal that belongs to a master, and unlocking it.
const TIOCGPTN: usize = 0x8004_5430;
const TIOCSPTLCK: usize = 0x4004_5431;

fn main() -> ! {
    let prepared = prepare();
    match prepared {
        Err(why) => say(&why),
        Ok((mut control, mut spec)) => {
            if let Err(why) = run(&mut control, &mut spec) {
                tell(control, protocol::FAILED, u32::try_from(why.len()).unwrap_or(0));
                let _ = sys::write(control, why.as_bytes());
            }
            // The host ends the machine.
            let _ = sys::read(control, &mut [0]);
        }
    }
    sys::restart()
}

/// Says something in the kernel's log, as an error.
fn say(text: &str) {
    if let Ok(log) = sys::open(c"/dev/kmsg", sys::WRITE_ONLY) {
        let _ = sys::write(log, format!("<3>bantam init: {text}\n").as_bytes());
        sys::close(log);
    }
}

/// Tells the host something.
fn tell(control: Fd, what: u32, value: u32) {
    let _ = sys::write(control, &protocol::message(what, value));
}

/// Gets as far as a connection to the host.
fn prepare() -> Result<(Fd, Spec), String> {
    root::mount_devices().map_err(|error| format!("cannot mount /dev: {error}"))?;
    // The kernel may have found no console: these numbers are not for sockets.
    while let Ok(fd) = sys::open(c"/dev/null", sys::READ_WRITE) {
        if fd > 2 {
            sys::close(fd);
            break;
        }
    }
    let text = file::read(&file::path(&format!("{}/spec", protocol::FOLDER)));
    let text = text.map_err(|error| format!("cannot read what to do: {error}"))?;
    let spec = Spec::parse(&text).ok_or("what to do makes no sense")?;
    for module in &spec.modules {
        if let Err(error) = load(module) {
            // What it is for fails, and says more.
            say(&format!("cannot load {}: {error}", module.to_string_lossy()));
        }
    }
    Ok((connect(protocol::CONTROL)?, spec))
}

fn load(module: &CStr) -> sys::Result<()> {
    let fd = sys::open(module, sys::READ)?;
    let loaded = sys::load_module(fd);
    sys::close(fd);
    loaded.or_else(|error| if error == sys::EEXIST { Ok(()) } else { Err(error) })
}

/// A connection to a port of the host.
fn connect(port: u32) -> Result<Fd, String> {
    let connect = || {
        let socket = sys::socket(sys::AF_VSOCK, 1)?;
        sys::connect_vsock(socket, port).map(|()| socket)
    };
    connect().map_err(|error| format!("cannot connect to the host by vsock: {error}"))
}

/// Takes the command from the host when the guest is ready for it. Until then the machine may be saved, and go on where
/// there is another host: that has a connection of its own.
fn take_command(control: &mut Fd, spec: &mut Spec) -> Result<(), String> {
    loop {
        tell(*control, protocol::READY, 0);
        if let Some(text) = read_command(*control) {
            spec.add(&text).filter(|()| !spec.arguments.is_empty()).ok_or("what to run makes no sense")?;
            return random::mix(&spec.seed).map_err(|error| format!("cannot make random numbers anew: {error}"));
        }
        sys::close(*control);
        *control = connect(protocol::CONTROL)?;
    }
}

/// What the host says of the command; `None` if the connection ends before.
fn read_command(control: Fd) -> Option<Vec<u8>> {
    let mut message = [0; protocol::MESSAGE];
    loop {
        file::read_exact(control, &mut message)?;
        if let (protocol::COMMAND, length) = protocol::parse(message) {
            let mut text = vec![0; length as usize];
            return file::read_exact(control, &mut text).map(|()| text);
        }
    }
}

/// Runs the command to its end.
fn run(control: &mut Fd, spec: &mut Spec) -> Result<(), String> {
    if spec.root == spec::Root::Initramfs {
        root::clear(&spec.modules);
    }
    let layer = root::enter(&spec.root, spec.upper.as_deref())?;
    root::mount_shares(&spec.shares)?;
    network::set_up(spec)?;
    if spec.waits {
        take_command(control, spec)?;
    }
    let control = *control;
    if let Some(name) = &spec.host_name {
        sys::set_host_name(name).map_err(|error| format!("cannot set the host name: {error}"))?;
    }
    network::write_names(spec);
    let account = child::prepare(spec)?;
    let signals = 1 << (SIGCHLD - 1);
    let signal_fd = sys::set_signal_mask(signals).and_then(|()| sys::signal_fd(signals));
    let signal_fd = signal_fd.map_err(|error| format!("cannot wait for processes: {error}"))?;

    let (streams, relays, terminal) = if spec.terminal.is_some() { terminal(spec)? } else { pipes()? };
    let limited = spec.pids.map(pids::limit).transpose()?;
    tell(control, protocol::STARTED, limited.unwrap_or(0));
    let pid = child::start(spec, &account, streams)?;
    for fd in [streams.stdin, streams.stdout, streams.stderr] {
        sys::close(fd);
    }
    let mut session = Session { control, signal_fd, terminal, relays, pid };
    let status = session.serve();
    session.end_all();
    session.drain();
    root::settle(&spec.root, layer);
    tell(control, protocol::ENDED, status);
    Ok(())
}

/// The command's ends of its streams; what carries them; and the terminal's master, if there is a terminal.
type Carried = (Streams, Vec<Relay>, Option<Fd>);

fn pipes() -> Result<Carried, String> {
    let hosts = [connect(protocol::STDIN)?, connect(protocol::STDOUT)?, connect(protocol::STDERR)?];
    let make = || -> sys::Result<Carried> {
        let (stdin, to_stdin) = sys::pipe()?;
        let (from_stdout, stdout) = sys::pipe()?;
        let (from_stderr, stderr) = sys::pipe()?;
        let relays = vec![
            Relay::new(hosts[0], to_stdin, End::Close)?,
            Relay::new(from_stdout, hosts[1], End::ShutDown)?,
            Relay::new(from_stderr, hosts[2], End::ShutDown)?,
        ];
        Ok((Streams { stdin, stdout, stderr }, relays, None))
    };
    make().map_err(|error| format!("cannot make the command's streams: {error}"))
}

fn terminal(spec: &Spec) -> Result<Carried, String> {
    let host = connect(protocol::STDIN)?;
    let make = || -> sys::Result<Carried> {
        let flags = sys::READ_WRITE | sys::NOCTTY;
        let master = sys::open(c"/dev/ptmx", flags).or_else(|_| sys::open(c"/dev/pts/ptmx", flags))?;
        let (unlock, mut number) = (0i32, 0u32);
        sys::ioctl(master, TIOCSPTLCK, &raw const unlock as usize)?;
        sys::ioctl(master, TIOCGPTN, &raw mut number as usize)?;
        let open = || sys::open(&file::path(&format!("/dev/pts/{number}")), flags);
        let streams = Streams { stdin: open()?, stdout: open()?, stderr: open()? };
        set_size(master, spec.terminal.unwrap_or_default());
        let relays = vec![Relay::new(host, master, End::Leave)?, Relay::new(master, host, End::ShutDown)?];
        Ok((streams, relays, Some(master)))
    };
    make().map_err(|error| format!("cannot make a terminal: {error}"))
}

/// Rows << 16 | columns.
fn set_size(terminal: Fd, size: u32) {
    let size = [(size >> 16) as u16, size as u16, 0, 0];
    let _ = sys::ioctl(terminal, TIOCSWINSZ, size.as_ptr() as usize);
}

/// The command while it runs.
struct Session {
    control: Fd,
    signal_fd: Fd,
    terminal: Option<Fd>,
    relays: Vec<Relay>,
    pid: i32,
}

impl Session {
    /// Until the command has ended; its wait status.
    fn serve(&mut self) -> u32 {
        let mut message = ([0; protocol::MESSAGE], 0);
        loop {
            let [child, control] = self.wait(true);
            if control {
                self.listen(&mut message);
            }
            if child {
                let _ = sys::read(self.signal_fd, &mut [0; 128]);
                if let Some(status) = self.reap() {
                    return status;
                }
            }
        }
    }

    /// Waits for something to happen, and carries what can be carried. Whether a process ended, and the host said
    /// something.
    fn wait(&mut self, for_processes: bool) -> [bool; 2] {
        let processes = if for_processes { self.signal_fd } else { -1 };
        let mut fds = [PollFd { fd: -1, events: POLLIN, ready: 0 }; 8];
        (fds[0].fd, fds[1].fd) = (processes, self.control);
        for (relay, fds) in self.relays.iter().zip(fds[2..].chunks_mut(2)) {
            fds.copy_from_slice(&relay.interests());
        }
        if sys::poll(&mut fds).is_err() {
            return [false; 2];
        }
        for (relay, fds) in self.relays.iter_mut().zip(fds[2..].chunks(2)) {
            relay.advance([fds[0], fds[1]]);
        }
        [fds[0].ready != 0, fds[1].ready != 0]
    }

    /// Takes what the host says; `message` is what there is of one.
    fn listen(&self, (message, have): &mut ([u8; protocol::MESSAGE], usize)) {
        match sys::read(self.control, &mut message[*have..]) {
            Ok(count) if count > 0 => *have += count,
            Err(sys::EINTR) => return,
            // Nobody is there to run it for.
            _ => sys::restart(),
        }
        if *have < protocol::MESSAGE {
            return;
        }
        *have = 0;
        match (protocol::parse(*message), self.terminal) {
            ((protocol::SIGNAL, signal), _) => {
                // As a terminal does, all of the command's processes are told.
                let _ = sys::kill(-self.pid, signal);
            }
            ((protocol::WINDOW, size), Some(terminal)) => set_size(terminal, size),
            _ => {}
        }
    }

    /// Buries the processes that have ended; the wait status of the command, if it is one of them.
    fn reap(&self) -> Option<u32> {
        let mut status = None;
        while let Ok((pid, ended)) = sys::wait(false) {
            if pid == 0 {
                break;
            }
            if pid == self.pid {
                status = Some(ended);
            }
        }
        status
    }

    /// Ends what the command left behind.
    fn end_all(&mut self) {
        loop {
            let _ = sys::kill(-1, SIGKILL);
            if sys::wait(true) == Err(sys::ECHILD) {
                return;
            }
        }
    }

    /// Carries the rest of the output.
    fn drain(&mut self) {
        self.relays[0].stop();
        while !self.relays.iter().all(Relay::is_done) {
            if self.wait(false)[1] {
                // The host has nothing to say now but that it is gone.
                if sys::read(self.control, &mut [0; protocol::MESSAGE]).unwrap_or(0) == 0 {
                    sys::restart();
                }
            }
        }
    }
}

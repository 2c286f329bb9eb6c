//! Guest memory from another process, by userfaultfd: Firecracker's protocol, and so its handlers.
//!
//! The process listens on a Unix socket. It gets the regions of guest memory as JSON, and with them a userfaultfd, by which it
//! learns of each page that is used for the first time, and puts it there. Nothing else is said.
//!
//! A page that nobody gives is waited for, by whatever thread uses it, and not even a signal ends that, but SIGKILL. So a
//! handler that ends has to be noticed, and it ends the machine.

#![expect(unsafe_code, reason = "the ioctls of userfaultfd; the process at the other end of a socket")]

use std::fs::File;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::json;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::inbox::{Event, Sender};
use super::memory_copy::PAGE;
use super::snapshot::Error;
use crate::memory::GuestRam;
use crate::sandbox::{Role, Sandbox};

/// linux/userfaultfd.h.
const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xaa00;
const UFFDIO_API: libc::Ioctl = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00;
const UFFDIO_UNREGISTER: libc::Ioctl = 0x8010_aa01;
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;

/// A process that gives guest memory, for as long as this is there.
#[derive(Debug)]
pub struct Handler {
    /// Without it pages that nobody has given would be zeros.
    _memory: Arc<Userfaultfd>,
    /// By its end the process learns of ours.
    _socket: UnixStream,
    stage: Arc<Mutex<Stage>>,
    /// Its end is that of the thread that watches the process.
    _watching: OwnedFd,
}

/// What has to be done when the process ends.
#[derive(Debug)]
enum Stage {
    /// The machine is being built: that goes on with memory of zeros, and is refused at its end.
    Building,
    Lost,
    /// The guest must not go on.
    Running(Sender),
}

impl Handler {
    /// Has the process that listens at `path` give all of `ram`, which is fresh. The thread that watches it is in `sandbox`.
    pub fn connect(path: &Path, ram: &GuestRam, sandbox: &Sandbox) -> Result<Self, Error> {
        let reach = |source| Error::Reach { path: path.to_owned(), source };
        let socket = UnixStream::connect(path).map_err(reach)?;
        let memory = Arc::new(Userfaultfd::new(ram).map_err(Error::Userfaultfd)?);
        let stage = Arc::new(Mutex::new(Stage::Building));
        let watching = watch(&socket, memory.clone(), stage.clone(), sandbox).map_err(reach)?;
        send(&socket, memory.fd.as_fd(), &regions(ram)).map_err(reach)?;
        Ok(Self { _memory: memory, _socket: socket, stage, _watching: watching })
    }

    /// From now on the end of the process is told to the machine.
    ///
    /// # Errors
    /// When it has ended, and memory is not what it should be.
    pub fn machine_is_built(&self, sender: &Sender) -> Result<(), Error> {
        let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*stage, Stage::Lost) {
            return Err(Error::HandlerEnded);
        }
        *stage = Stage::Running(sender.clone());
        Ok(())
    }
}

/// What the process is told of guest memory.
fn regions(ram: &GuestRam) -> String {
    let mut offset = 0;
    let region = |region: &<GuestRam as GuestMemoryBackend>::R| {
        let told = json!({
            "base_host_virt_addr": region.as_ptr() as u64,
            "size": region.len(),
            "offset": offset,
            "page_size": PAGE,
            // Bytes in spite of the name, as Firecracker has it.
            "page_size_kib": PAGE,
        });
        offset += region.len();
        told
    };
    ram.iter().map(region).collect::<serde_json::Value>().to_string()
}

fn send(socket: &UnixStream, fd: BorrowedFd<'_>, text: &str) -> io::Result<()> {
    let fds = [fd];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    // A socket that carries so little takes it at once.
    let sent = sendmsg(socket, &[IoSlice::new(text.as_bytes())], &mut control, SendFlags::NOSIGNAL)?;
    if sent == text.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Watches the process that `socket` leads to, on a thread, until what is returned is closed. It has ended when it has closed the
/// socket and the process that listened is gone: either may be before the other, or mean nothing by itself.
fn watch(
    socket: &UnixStream,
    memory: Arc<Userfaultfd>,
    stage: Arc<Mutex<Stage>>,
    sandbox: &Sandbox,
) -> io::Result<OwnedFd> {
    // Now: its number may be another's later.
    let process = listener(socket)?;
    let socket = socket.try_clone()?;
    let (end, watching) = pipe_with(PipeFlags::CLOEXEC)?;
    let sandbox = sandbox.clone();
    let watch = move || {
        if let Err(error) = sandbox.enter_first(Role::Memory) {
            return log::error!("cannot restrict the thread that watches the process with guest memory: {error}");
        }
        if !wait(socket.as_fd(), PollFlags::empty(), &end) {
            return;
        }
        match process {
            // It may go on without the socket.
            Listener::Unseen => return,
            Listener::Watched(process) if !wait(process.as_fd(), PollFlags::IN, &end) => return,
            Listener::Watched(_) | Listener::Gone => {}
        }
        let mut stage = stage.lock().unwrap_or_else(PoisonError::into_inner);
        match &*stage {
            Stage::Running(sender) => sender.send(Event::MemoryLost),
            Stage::Building | Stage::Lost => {
                memory.release();
                *stage = Stage::Lost;
            }
        }
    };
    crate::threads::named("bantam-memory".into()).spawn(watch)?;
    Ok(watching)
}

/// Waits for `events`, or the end, of one; false when the other ends first.
fn wait(one: BorrowedFd<'_>, events: PollFlags, other: &OwnedFd) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(one, events), PollFd::new(other, PollFlags::empty())];
    loop {
        match poll(&mut fds, None) {
            Err(Errno::INTR) => {}
            Err(_) => return false,
            Ok(_) if !fds[1].revents().is_empty() => return false,
            Ok(_) if !fds[0].revents().is_empty() => return true,
            Ok(_) => {}
        }
    }
}

/// The process that listened at a socket.
enum Listener {
    /// It can be waited for.
    Watched(OwnedFd),
    /// It ended before the socket was connected to.
    Gone,
    /// It cannot be seen from here, or not be watched.
    Unseen,
}

/// Finds the process that listened.
fn listener(socket: &UnixStream) -> io::Result<Listener> {
    // That of Linux 6.5 is of the process itself, whatever has its number by now.
    let mut pidfd: libc::c_int = -1;
    match peer(socket, SO_PEERPIDFD, &mut pidfd).map_err(|error| error.raw_os_error()) {
        // SAFETY: the kernel has just made it, for this thread.
        Ok(()) => return Ok(Listener::Watched(unsafe { OwnedFd::from_raw_fd(pidfd) })),
        Err(Some(libc::ESRCH | libc::EINVAL)) => return Ok(Listener::Gone),
        Err(_) => {}
    }
    let mut ids = libc::ucred { pid: 0, uid: 0, gid: 0 };
    peer(socket, libc::SO_PEERCRED, &mut ids)?;
    let Some(process) = Pid::from_raw(ids.pid) else { return Ok(Listener::Unseen) };
    Ok(match pidfd_open(process, PidfdFlags::empty()) {
        Ok(process) => Listener::Watched(process),
        Err(Errno::SRCH) => Listener::Gone,
        Err(_) => Listener::Unseen,
    })
}

/// include/uapi/asm-generic/socket.h.
const SO_PEERPIDFD: libc::c_int = 77;

/// Asks for something of the peer, which the kernel writes to `answer`.
fn peer<T: Copy>(socket: &UnixStream, name: libc::c_int, answer: &mut T) -> io::Result<()> {
    let mut len = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
    let at = std::ptr::from_mut(answer).cast();
    // SAFETY: there is room for what is asked, integers, and `len` says how much.
    check(unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, name, at, &raw mut len) })
}

/// A userfaultfd of guest memory.
#[derive(Debug)]
struct Userfaultfd {
    fd: OwnedFd,
    /// Address and length of each region in this process.
    ranges: Vec<[u64; 2]>,
}

impl Userfaultfd {
    /// Has each first use of a page wait for it.
    fn new(ram: &GuestRam) -> io::Result<Self> {
        let fd = open()?;
        // Removed pages (by the balloon) are told of, too.
        let mut api = [UFFD_API, UFFD_FEATURE_EVENT_REMOVE, 0];
        // SAFETY: it reads and writes a `struct uffdio_api`, which is three u64.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) })?;
        let ranges: Vec<_> = ram.iter().map(|region| [region.as_ptr() as u64, region.len()]).collect();
        for [start, len] in &ranges {
            let mut register = [*start, *len, UFFDIO_REGISTER_MODE_MISSING, 0];
            // SAFETY: it reads and writes a `struct uffdio_register`, which is four u64. What happens to the memory is what
            // may happen to a guest's at any time.
            check(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) })?;
        }
        Ok(Self { fd, ranges })
    }

    /// Has nobody wait any more: pages that have not come are zeros.
    fn release(&self) {
        for range in &self.ranges {
            // SAFETY: it reads a `struct uffdio_range`, which is two u64.
            if let Err(error) = check(unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_UNREGISTER, range) }) {
                log::warn!("cannot take guest memory back: {error}");
            }
        }
    }
}

/// A userfaultfd for the kernel's accesses, too: KVM's are such. The device gives one to whoever may open it, the system call
/// to the privileged.
fn open() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let device = File::options().read(true).write(true).open("/dev/userfaultfd");
    let fd = match &device {
        // SAFETY: it takes a number, and makes a descriptor.
        Ok(device) => unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) },
        // SAFETY: the same.
        Err(_) => unsafe { libc::syscall(libc::SYS_userfaultfd, flags) }.try_into().unwrap_or(-1),
    };
    check(fd)?;
    // SAFETY: it has just been made, for this thread.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

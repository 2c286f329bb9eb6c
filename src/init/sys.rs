//! System calls of Linux. Nothing here allocates.

#![expect(unsafe_code, reason = "system calls have no safe wrapper without a library")]

use core::ffi::CStr;

use crate::arch::{self, number};

/// What the kernel said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

pub const ENOENT: Errno = Errno(2);
pub const EINTR: Errno = Errno(4);
pub const ECHILD: Errno = Errno(10);
pub const EAGAIN: Errno = Errno(11);
pub const EACCES: Errno = Errno(13);
pub const EBUSY: Errno = Errno(16);
pub const EEXIST: Errno = Errno(17);
pub const ENOTDIR: Errno = Errno(20);

impl core::fmt::Display for Errno {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let text = match self.0 {
            1 => "operation not permitted",
            2 => "no such file or directory",
            5 => "input/output error",
            6 => "no such device or address",
            7 => "argument list too long",
            8 => "exec format error",
            12 => "out of memory",
            13 => "permission denied",
            16 => "device or resource busy",
            19 => "no such device",
            20 => "not a directory",
            21 => "is a directory",
            22 => "invalid argument",
            26 => "text file busy",
            28 => "no space left",
            30 => "read-only file system",
            36 => "file name too long",
            40 => "too many levels of symbolic links",
            97 => "address family not supported",
            110 => "timed out",
            111 => "connection refused",
            number => return write!(f, "error {number}"),
        };
        f.write_str(text)
    }
}

pub type Result<T> = core::result::Result<T, Errno>;

/// A descriptor.
pub type Fd = i32;

/// # Safety
/// The arguments must be what the call expects, and memory that they lead to must be valid for it.
unsafe fn call(number: usize, arguments: [usize; 6]) -> Result<usize> {
    // SAFETY: the caller vouches for the arguments.
    let result = unsafe { arch::call(number, arguments) };
    if (-4095..0).contains(&result) { Err(Errno(-result as i32)) } else { Ok(result as usize) }
}

/// A call whose pointers, if any, come from references that live for as long as it does.
macro_rules! call {
    ($number:expr $(, $argument:expr)*) => {{
        let given = [$($argument as usize),*];
        let mut all = [0usize; 6];
        all[..given.len()].copy_from_slice(&given);
        // SAFETY: each use below passes what the call expects, from references that outlive it.
        unsafe { call($number, all) }
    }};
}

pub const READ: i32 = 0;
pub const WRITE_ONLY: i32 = 1;
pub const READ_WRITE: i32 = 2;
pub const CREATE: i32 = 0o100;
pub const CLOEXEC: i32 = 0o2000000;
pub const NOCTTY: i32 = 0o400;
pub const NONBLOCK: i32 = 0o4000;
pub const FOLDER: i32 = 0o200000;

pub fn read(fd: Fd, buffer: &mut [u8]) -> Result<usize> {
    call!(number::READ, fd, buffer.as_mut_ptr(), buffer.len())
}

pub fn write(fd: Fd, bytes: &[u8]) -> Result<usize> {
    call!(number::WRITE, fd, bytes.as_ptr(), bytes.len())
}

/// A file that is made has mode 644.
pub fn open(path: &CStr, flags: i32) -> Result<Fd> {
    call!(number::OPEN, path.as_ptr(), flags | CLOEXEC, 0o644).map(|fd| fd as Fd)
}

pub fn close(fd: Fd) {
    let _ = call!(number::CLOSE, fd);
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct PollFd {
    pub fd: Fd,
    pub events: i16,
    pub ready: i16,
}

pub const POLLIN: i16 = 1;
pub const POLLOUT: i16 = 4;

/// Waits until something is ready.
pub fn poll(fds: &mut [PollFd]) -> Result<usize> {
    call!(number::POLL, fds.as_mut_ptr(), fds.len(), -1isize)
}

/// Fresh memory.
pub fn map(bytes: usize) -> Result<*mut u8> {
    // Readable and writable; private and anonymous.
    call!(number::MMAP, 0, bytes, 3, 0x22, -1isize, 0).map(|address| address as *mut u8)
}

pub fn set_signal_mask(mask: u64) -> Result<()> {
    call!(number::RT_SIGPROCMASK, 2, &raw const mask, 0, 8).map(drop)
}

pub fn ioctl(fd: Fd, request: usize, argument: usize) -> Result<usize> {
    call!(number::IOCTL, fd, request, argument)
}

pub fn pause_for(milliseconds: u64) {
    let time = [milliseconds / 1000, milliseconds % 1000 * 1_000_000];
    let _ = call!(number::NANOSLEEP, time.as_ptr(), 0);
}

pub fn socket(family: u16, kind: i32) -> Result<Fd> {
    call!(number::SOCKET, family, kind | CLOEXEC, 0).map(|fd| fd as Fd)
}

pub const AF_VSOCK: u16 = 40;

/// Connects to a port of the host.
pub fn connect_vsock(socket: Fd, port: u32) -> Result<()> {
    #[repr(C)]
    struct Address {
        family: u16,
        reserved: u16,
        port: u32,
        cid: u32,
        zero: [u8; 4],
    }
    let address = Address { family: AF_VSOCK, reserved: 0, port, cid: 2, zero: [0; 4] };
    call!(number::CONNECT, socket, &raw const address, size_of::<Address>()).map(drop)
}

pub fn shut_down_writing(socket: Fd) {
    let _ = call!(number::SHUTDOWN, socket, 1);
}

/// The new process' number in the old one, 0 in the new one.
pub fn fork() -> Result<i32> {
    call!(number::FORK).map(|pid| pid as i32)
}

/// `arguments` and `environment` end with a null pointer.
pub fn exec(path: &CStr, arguments: &[*const u8], environment: &[*const u8]) -> Errno {
    call!(number::EXECVE, path.as_ptr(), arguments.as_ptr(), environment.as_ptr()).err().unwrap_or(Errno(0))
}

pub fn exit(status: i32) -> ! {
    loop {
        let _ = call!(number::EXIT_GROUP, status);
    }
}

/// The process that ended, 0 if none has, and its wait status.
pub fn wait(block: bool) -> Result<(i32, u32)> {
    let mut status = 0u32;
    let flags = if block { 0 } else { 1 };
    call!(number::WAIT4, -1isize, &raw mut status, flags, 0).map(|pid| (pid as i32, status))
}

pub fn kill(pid: i32, signal: u32) -> Result<()> {
    call!(number::KILL, pid as isize, signal).map(drop)
}

pub fn chdir(path: &CStr) -> Result<()> {
    call!(number::CHDIR, path.as_ptr()).map(drop)
}

/// Enters a folder that is open.
pub fn chdir_fd(folder: Fd) -> Result<()> {
    call!(number::FCHDIR, folder).map(drop)
}

pub fn mkdir(path: &CStr, mode: u32) -> Result<()> {
    call!(number::MKDIR, path.as_ptr(), mode).map(drop)
}

pub fn rmdir(path: &CStr) -> Result<()> {
    call!(number::RMDIR, path.as_ptr()).map(drop)
}

pub fn unlink(path: &CStr) -> Result<()> {
    call!(number::UNLINK, path.as_ptr()).map(drop)
}

pub fn symlink(target: &CStr, path: &CStr) -> Result<()> {
    call!(number::SYMLINK, target.as_ptr(), path.as_ptr()).map(drop)
}

/// How many bytes of the target there are.
pub fn read_link(path: &CStr, target: &mut [u8]) -> Result<usize> {
    call!(number::READLINK, path.as_ptr(), target.as_mut_ptr(), target.len())
}

pub fn chown_fd(fd: Fd, user: u32, group: u32) -> Result<()> {
    call!(number::FCHOWN, fd, user, group).map(drop)
}

pub fn set_umask(mask: u32) {
    let _ = call!(number::UMASK, mask);
}

pub fn set_user(user: u32) -> Result<()> {
    call!(number::SETUID, user).map(drop)
}

pub fn set_group(group: u32) -> Result<()> {
    call!(number::SETGID, group).map(drop)
}

pub fn set_session() -> Result<()> {
    call!(number::SETSID).map(drop)
}

pub fn set_groups(groups: &[u32]) -> Result<()> {
    call!(number::SETGROUPS, groups.len(), groups.as_ptr()).map(drop)
}

pub fn chroot(path: &CStr) -> Result<()> {
    call!(number::CHROOT, path.as_ptr()).map(drop)
}

pub fn sync() {
    let _ = call!(number::SYNC);
}

pub const MS_RDONLY: usize = 1;
pub const MS_NOSUID: usize = 2;
pub const MS_NODEV: usize = 4;
pub const MS_NOEXEC: usize = 8;
pub const MS_REMOUNT: usize = 32;
pub const MS_BIND: usize = 4096;
pub const MS_MOVE: usize = 8192;

pub fn mount(source: &CStr, target: &CStr, kind: &CStr, flags: usize, data: &CStr) -> Result<()> {
    call!(number::MOUNT, source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, data.as_ptr()).map(drop)
}

/// Restarts the machine, which bantam takes for its end. Every kernel can, and at once.
pub fn restart() -> ! {
    let _ = call!(number::REBOOT, 0xfee1_deadusize, 0x2812_1969, 0x0123_4567, 0);
    loop {
        pause_for(1000);
    }
}

pub fn set_host_name(name: &[u8]) -> Result<()> {
    call!(number::SETHOSTNAME, name.as_ptr(), name.len()).map(drop)
}

/// A descriptor that is readable when one of the signals in `mask` is pending.
pub fn signal_fd(mask: u64) -> Result<Fd> {
    call!(number::SIGNALFD4, -1isize, &raw const mask, 8, CLOEXEC | NONBLOCK).map(|fd| fd as Fd)
}

pub fn duplicate_to(fd: Fd, to: Fd) -> Result<()> {
    if fd == to {
        // Only to drop its close-on-exec flag.
        return call!(number::FCNTL, fd, 2, 0).map(drop);
    }
    call!(number::DUP2, fd, to).map(drop)
}

pub fn set_nonblocking(fd: Fd) -> Result<()> {
    let flags = call!(number::FCNTL, fd, 3, 0)?;
    call!(number::FCNTL, fd, 4, flags | NONBLOCK as usize).map(drop)
}

/// The end to read from, and the end to write to.
pub fn pipe() -> Result<(Fd, Fd)> {
    let mut ends = [0; 2];
    call!(number::PIPE2, ends.as_mut_ptr(), CLOEXEC)?;
    Ok((ends[0], ends[1]))
}

pub fn load_module(fd: Fd) -> Result<()> {
    call!(number::FINIT_MODULE, fd, c"".as_ptr(), 0).map(drop)
}

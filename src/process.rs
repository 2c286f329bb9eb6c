//! The process of the `bantam` command: how it starts and exits, and what it gives back while a machine runs.

#![expect(unsafe_code, reason = "the C library calls main; memory is given back; fork, signal and close_range")]

use std::ptr::with_exposed_provenance_mut;

use rustix::mm::{Advice, madvise};

/// The status that the process exits with.
#[derive(Debug, Clone, Copy)]
pub struct ExitCode(u8);

impl ExitCode {
    /// All is well.
    pub const SUCCESS: Self = Self(0);
    /// What was asked is not so.
    pub const FAILURE: Self = Self(1);
}

impl From<u8> for ExitCode {
    fn from(status: u8) -> Self {
        Self(status)
    }
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(ExitCode(status): ExitCode) -> Self {
        status.into()
    }
}

/// Where the C library starts the program. The standard library's own start would read `/proc/self/maps` and give each
/// thread a second stack, in 30 system calls, to say of a stack overflow what kills the process either way.
#[cfg(all(target_env = "gnu", not(test)))]
// SAFETY: it is the program's only `main`, of the type that the C library calls.
#[unsafe(no_mangle)]
extern "C" fn main(_count: std::ffi::c_int, _arguments: *const *const std::ffi::c_char) -> std::ffi::c_int {
    open_standard_streams();
    let ExitCode(status) = super::start();
    std::process::exit(status.into())
}

/// Opens `/dev/null` as those of the standard streams that are closed: a file that is opened would become one of them.
#[cfg(all(target_env = "gnu", not(test)))]
fn open_standard_streams() {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::stdio::{stderr, stdin, stdout};
    use std::os::fd::IntoRawFd;
    let streams = [stdin(), stdout(), stderr()];
    let mut streams = streams.each_ref().map(|stream| PollFd::new(stream, PollFlags::empty()));
    let _ = poll(&mut streams, Some(&Timespec::default()));
    for _ in streams.iter().filter(|stream| stream.revents().contains(PollFlags::NVAL)) {
        // It gets the lowest number that is free, and is never closed.
        let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null");
        let _ = null.map(IntoRawFd::into_raw_fd);
    }
}

/// Makes a process that is a copy of this one, and goes on from here: its ID, or `None` in the copy.
///
/// # Errors
/// When the host does not make one.
pub fn fork() -> std::io::Result<Option<rustix::process::Pid>> {
    // SAFETY: its callers have made sure that there is no other thread, whose locks the copy would have.
    let pid = unsafe { libc::fork() };
    if pid < 0 { Err(std::io::Error::last_os_error()) } else { Ok(rustix::process::Pid::from_raw(pid)) }
}

/// The status of a process that has called `abort`, as shells show it.
const ABORTED: std::ffi::c_int = 128 + libc::SIGABRT;

/// Has `abort` end this process, the first of a PID namespace, with the status that it has for others: signals that a
/// process sends to itself do nothing to that one unless it handles them.
///
/// # Errors
/// When the handler cannot be installed.
pub fn end_when_aborted() -> std::io::Result<()> {
    extern "C" fn end(_: std::ffi::c_int) {
        // SAFETY: it is async-signal-safe, and nothing that it leaves undone is owed to anybody.
        unsafe { libc::_exit(ABORTED) }
    }
    // SAFETY: the handler only ends the process.
    let before = unsafe { libc::signal(libc::SIGABRT, end as *const () as libc::sighandler_t) };
    if before == libc::SIG_ERR { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// Closes all descriptors but the standard streams and those that are `named`.
pub fn close_all_but(mut named: Vec<std::os::fd::RawFd>) {
    const FIRST: u32 = 3;
    named.sort_unstable();
    let mut first = FIRST;
    let named = named.into_iter().filter_map(|fd| u32::try_from(fd).ok());
    for end in named.chain([u32::MAX]) {
        // The last one is none.
        let last = if end == u32::MAX { end } else { end.saturating_sub(1) };
        if first <= last {
            // SAFETY: nothing that this process has opened is open yet. An old kernel has no such call: they stay open.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
        first = first.max(end.saturating_add(1));
    }
}

/// How much of the stack is looked at, in bytes: more than starting takes.
const STACK: usize = 256 << 10;
/// Less than this, in bytes, have the functions that are being called.
const FRAMES: usize = 4 << 10;

/// Gives back memory that was used before, and is not now: free heap, the stack below the caller's, and the pages of the
/// program, of which those that are used again come back from the page cache, 64 KiB at a time. A guest that does nothing
/// needs nearly none.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: gives back what is free.
    unsafe {
        libc::malloc_trim(0);
    }
    // Other threads' stacks are next to one another.
    if rustix::thread::gettid() == rustix::process::getpid() {
        let here = 0u8;
        let stack = (&raw const here).addr() - FRAMES;
        // SAFETY: below the frame of the last function there is nothing on a stack, and the kernel maps nothing else within
        // a MiB of what the first thread's has grown to.
        unsafe { give_back_pages(stack - STACK, stack) };
    }
    // SAFETY: the linker defines both, around the parts of the program that are never written.
    unsafe extern "C" {
        safe static __executable_start: u8;
        safe static etext: u8;
    }
    // SAFETY: these pages are those of the program's file.
    unsafe { give_back_pages((&raw const __executable_start).addr(), (&raw const etext).addr()) };
}

/// Gives back the whole pages between two addresses: zeros, or what is in the file, are read from them next.
///
/// # Safety
/// Nobody needs what was written to these pages.
unsafe fn give_back_pages(start: usize, end: usize) {
    let page = usize::try_from(bantam::memory::page_size()).expect("addresses of pages fit");
    let (start, end) = (start.next_multiple_of(page), end / page * page);
    // SAFETY: as the caller says. If it does not work, the memory stays.
    let _ = unsafe { madvise(with_exposed_provenance_mut(start), end - start, Advice::LinuxDontNeed) };
}

/// A release never unwinds (`panic = "abort"`), and says where it panicked without a list of callers. These are for what the
/// precompiled standard library has of both: with them the linker finds that nobody uses it, nor libgcc. A static C library needs the true ones.
#[cfg(all(panic = "abort", target_env = "gnu", not(target_feature = "crt-static")))]
mod unwinder {
    use std::ffi::{c_int, c_void};

    /// There are no callers to tell of.
    // SAFETY: libgcc has the same function, and is not linked when this one is there.
    #[unsafe(no_mangle)]
    extern "C" fn _Unwind_Backtrace(
        _tell: extern "C" fn(*mut c_void, *mut c_void) -> c_int,
        _to: *mut c_void,
    ) -> c_int {
        0
    }

    macro_rules! never {
        ($($name:ident)*) => {
            $(
                // SAFETY: as above.
                #[unsafe(no_mangle)]
                extern "C" fn $name() -> ! {
                    std::process::abort()
                }
            )*
        };
    }
    never! {
        _Unwind_GetDataRelBase _Unwind_GetIP _Unwind_GetIPInfo _Unwind_GetLanguageSpecificData _Unwind_GetRegionStart
        _Unwind_GetTextRelBase _Unwind_Resume _Unwind_SetGR _Unwind_SetIP
    }
}

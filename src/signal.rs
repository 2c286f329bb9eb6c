//! Signals: those that end a machine, as a descriptor; and the one that makes a vCPU leave the guest.

#![expect(unsafe_code, reason = "signalfd and the signal mask have no safe wrapper here")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::OnceLock;

use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// The signals with which a user or a supervisor ends a program.
pub const ENDING: [i32; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

/// A descriptor that becomes readable when one of a set of signals arrives. Their default action is gone: they are
/// blocked in this thread and in those that it starts from now on. So it is made before any other thread is. When it is
/// dropped, this thread has them as before, but for those that came and were not taken.
pub struct SignalFd {
    fd: OwnedFd,
    before: libc::sigset_t,
    /// Those that are taken, of the ones that another process passes on.
    passed_on: Option<Vec<i32>>,
}

/// What tells of a signal, for another process ([`SignalFd::passed_on`]).
pub type Record = [u8; size_of::<libc::signalfd_siginfo>()];

impl SignalFd {
    /// Blocks `signals` and takes them from here on, but for those that the process was started to ignore (`nohup`).
    pub fn new(signals: &[i32]) -> io::Result<Self> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset initialises the set that it is given.
        unsafe { libc::sigemptyset(set.as_mut_ptr()) };
        // SAFETY: initialised just above.
        let mut set = unsafe { set.assume_init() };
        for signal in signals {
            // SAFETY: `set` is an initialised signal set.
            unsafe { libc::sigaddset(&mut set, *signal) };
        }
        let mut before = MaybeUninit::uninit();
        // SAFETY: `set` is initialised, and `before` has room for a set.
        let error = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, before.as_mut_ptr()) };
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        // SAFETY: pthread_sigmask has written it.
        let before = unsafe { before.assume_init() };
        // SAFETY: `set` is initialised; -1 makes a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: signalfd has just made the descriptor, and nobody else has it.
        Ok(SignalFd { fd: unsafe { OwnedFd::from_raw_fd(fd) }, before, passed_on: None })
    }

    /// The same, but the signals are those whose [records](Self::take_record) another process writes to a pipe, of which
    /// this is the other end, nonblocking. Those that come to this process do nothing.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn passed_on(signals: &[i32], pipe: OwnedFd) -> io::Result<Self> {
        let taken = signals.to_vec();
        let mut signals = Self::new(signals)?;
        (signals.fd, signals.passed_on) = (pipe, Some(taken));
        Ok(signals)
    }

    /// The number of the signal that arrived first, if one has.
    pub fn take(&self) -> Option<i32> {
        loop {
            let (number, _) = self.take_record()?;
            if self.passed_on.as_ref().is_none_or(|taken| taken.contains(&number)) {
                return Some(number);
            }
        }
    }

    /// The number of the signal that arrived first, if one has, and what tells another process of it.
    pub fn take_record(&self) -> Option<(i32, Record)> {
        let mut info: Record = [0; size_of::<Record>()];
        loop {
            match rustix::io::read(&self.fd, &mut info) {
                Ok(len) if len == info.len() => {}
                _ => return None,
            }
            // ssi_signo comes first. A signal that is ignored is queued nevertheless where it is blocked.
            let number = i32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
            if !is_ignored(number) {
                return Some((number, info));
            }
        }
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for SignalFd {
    fn drop(&mut self) {
        while self.take().is_some() {}
        // SAFETY: the set is one that pthread_sigmask gave.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.before, std::ptr::null_mut()) };
    }
}

/// Has this process be killed when the one that started it ends, which is `parent`, and this thread take the signals that
/// end a program, which it may have been started with blocked. False if that one has ended already.
pub fn end_with_parent(parent: u32) -> bool {
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    if std::os::unix::process::parent_id() != parent {
        return false;
    }
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set that it is given.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: initialised just above.
    let mut set = unsafe { set.assume_init() };
    for signal in ENDING {
        // SAFETY: `set` is an initialised signal set.
        unsafe { libc::sigaddset(&mut set, signal) };
    }
    // SAFETY: `set` is initialised, and the one before is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut()) };
    true
}

/// Blocks all signals but those that it causes in this thread, and in the processes that it makes.
pub fn block_all() {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigfillset initialises the set that it is given.
    unsafe { libc::sigfillset(set.as_mut_ptr()) };
    // A violation of the sandbox is told by its handler.
    // SAFETY: initialised just above.
    unsafe { libc::sigdelset(set.as_mut_ptr(), libc::SIGSYS) };
    // SAFETY: as above, and the one before is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, set.as_ptr(), std::ptr::null_mut()) };
}

/// Has writes to a pipe or socket that nobody reads fail with EPIPE, in place of SIGPIPE that kills; has a file that reaches
/// the process's limit (`ulimit -f`) fail to grow, with EFBIG, in place of SIGXFSZ that kills; and has children be waited
/// for, which go without a word where SIGCHLD is ignored, as a supervisor may pass on.
pub fn set_up() {
    for signal in [libc::SIGPIPE, libc::SIGXFSZ] {
        // SAFETY: to ignore a signal runs nobody's code.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    // SAFETY: nor does the default of this one.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

fn is_ignored(signal: i32) -> bool {
    let mut action = MaybeUninit::uninit();
    // SAFETY: only asks; `action` has room for the answer.
    let result = unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) };
    // SAFETY: sigaction initialised it when it returned 0.
    result == 0 && unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
}

/// The signal that makes a thread's `KVM_RUN` return: the first real-time signal. Its handler does nothing; it is
/// installed for the whole process when the first machine runs.
pub fn kick_signal() -> io::Result<i32> {
    static INSTALLED: OnceLock<Result<i32, i32>> = OnceLock::new();
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    let installed = INSTALLED.get_or_init(|| {
        let signal = SIGRTMIN();
        register_signal_handler(signal, nothing).map(|()| signal).map_err(|error| error.errno())
    });
    installed.map_err(io::Error::from_raw_os_error)
}

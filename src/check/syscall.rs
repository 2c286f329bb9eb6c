//! System calls that are only asked whether they are there.

#![expect(unsafe_code, reason = "system calls that no crate wraps safely")]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// Creates an io_uring of one entry and drops it again.
pub(super) fn io_uring() -> io::Result<()> {
    // `struct io_uring_params`, 120 bytes, all zero: no flags.
    let mut params = [0u64; 15];
    // SAFETY: io_uring_setup reads and writes 120 bytes at `params`, which is as long and outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) };
    descriptor(fd).map(drop)
}

/// Creates a userfaultfd that handles faults of user space only, which needs no privilege, and drops it again.
pub(super) fn userfaultfd() -> io::Result<()> {
    const UFFD_USER_MODE_ONLY: libc::c_int = 1;
    // SAFETY: userfaultfd takes flags only and touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | UFFD_USER_MODE_ONLY) };
    descriptor(fd).map(drop)
}

/// What a system call returned that opens a descriptor.
fn descriptor(returned: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(returned) {
        // SAFETY: the system call has just opened this descriptor, and nobody else knows it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asking_leaves_no_descriptor_open() {
        let mine = |path: std::path::PathBuf| {
            std::fs::read_link(path).is_ok_and(|to| to.to_string_lossy().starts_with("anon_inode:[userfaultfd"))
        };
        let open =
            || std::fs::read_dir("/proc/self/fd").unwrap().filter(|fd| mine(fd.as_ref().unwrap().path())).count();
        for _ in 0..3 {
            let _ = userfaultfd();
            let _ = io_uring();
        }
        assert_eq!(open(), 0);
    }
}

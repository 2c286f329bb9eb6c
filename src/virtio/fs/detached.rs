//! Folders that are trees of mounts of their own (open_tree(2)): in no namespace, and with nothing above them.

#![expect(unsafe_code, reason = "mount_setattr has no safe wrapper here")]

use std::io;
use std::mem::size_of_val;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

/// The folder at `path`, with what is mounted below it now. It takes CAP_SYS_ADMIN over this process' mounts, and Linux 5.2. From
/// Linux 5.12 on no device in it can be opened, nothing run, and if it is `readonly` nothing be changed.
pub fn open(path: &Path, readonly: bool) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::AT_RECURSIVE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, path, flags).map_err(explain)?;
    let readonly = if readonly { libc::MOUNT_ATTR_RDONLY } else { 0 };
    let attr_set = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC | libc::MOUNT_ATTR_NOSUID | readonly;
    let attributes = libc::mount_attr { attr_set, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let (call, at) = (libc::SYS_mount_setattr, libc::AT_EMPTY_PATH | libc::AT_RECURSIVE);
    let empty = c"".as_ptr();
    // SAFETY: it reads a text that ends with NUL, and a struct of this size.
    let result =
        unsafe { libc::syscall(call, tree.as_raw_fd(), empty, at, &raw const attributes, size_of_val(&attributes)) };
    match io::Error::last_os_error() {
        _ if result == 0 => Ok(tree),
        error if error.raw_os_error() == Some(libc::ENOSYS) => Ok(tree),
        error => Err(error),
    }
}

fn explain(error: Errno) -> io::Error {
    let why = match error {
        Errno::NOSYS => "a folder in a jail takes Linux 5.2",
        Errno::INVAL => "it is in no mount of this process (as /dev/fd/N is not in a jail): name it by its path",
        _ => return error.into(),
    };
    io::Error::new(io::Error::from(error).kind(), why)
}

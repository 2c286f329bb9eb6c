//! Landlock: which files a process may still open (Documentation/userspace-api/landlock.rst).

#![expect(unsafe_code, reason = "Landlock has no safe wrapper here")]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};

// Rights to files, by their bits (`LANDLOCK_ACCESS_FS_*`).
const WRITE_FILE: u64 = 1 << 1;
const READ_FILE: u64 = 1 << 2;
const READ_DIR: u64 = 1 << 3;
const REMOVE_DIR: u64 = 1 << 4;
const REMOVE_FILE: u64 = 1 << 5;
const MAKE_DIR: u64 = 1 << 7;
const MAKE_REG: u64 = 1 << 8;
const MAKE_SOCK: u64 = 1 << 9;
const MAKE_FIFO: u64 = 1 << 10;
const MAKE_SYM: u64 = 1 << 12;
const REFER: u64 = 1 << 13;
const TRUNCATE: u64 = 1 << 14;
const IOCTL_DEV: u64 = 1 << 15;
/// Those of the first version, to which `REFER`, `TRUNCATE` and `IOCTL_DEV` came in versions 2, 3 and 5.
const FIRST: u64 = (1 << 13) - 1;
/// Those that a rule about a file can give; the others are about a folder.
const OF_A_FILE: u64 = WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV;
/// `LANDLOCK_ACCESS_NET_BIND_TCP`, `_CONNECT_TCP`: version 4.
const TCP: u64 = 0b11;
/// `LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET`: version 6.
const ABSTRACT_SOCKETS: u64 = 1;

/// What may be done to a file, or to all that is below a folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read it.
    Read,
    /// Read it, and write to it.
    Write,
    /// Do all that can be done to files and folders, but run them, and make devices.
    Change,
    /// Put files there, and write to and remove those that are there: what a file that is replaced whole takes.
    Replace,
    /// Remove files: what a socket leaves behind.
    Remove,
}

impl Access {
    fn rights(self) -> u64 {
        const READ: u64 = READ_FILE | READ_DIR;
        match self {
            Self::Read => READ,
            Self::Write => READ | WRITE_FILE | TRUNCATE | IOCTL_DEV,
            Self::Change => {
                let make = MAKE_DIR | MAKE_REG | MAKE_SOCK | MAKE_FIFO | MAKE_SYM;
                READ | WRITE_FILE | TRUNCATE | make | REMOVE_DIR | REMOVE_FILE | REFER
            }
            Self::Replace => WRITE_FILE | TRUNCATE | MAKE_REG | REMOVE_FILE,
            Self::Remove => REMOVE_FILE,
        }
    }
}

/// Why there are no rules.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This kernel has no Landlock, or it is turned off.
    #[error("this kernel has no Landlock, or does not use it (lsm=landlock,... on its command line)")]
    Unavailable,
    /// Its first version has no right to move a file to another folder, which a share needs.
    #[error("a shared folder that can be written to needs version 2 of Landlock, of Linux 5.19")]
    Old,
    /// A path.
    #[error("cannot allow {}", .path.display())]
    Path {
        /// Which.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Something else.
    #[error("cannot make rules of Landlock")]
    Make(#[source] io::Error),
    /// They were not taken.
    #[error("cannot have the rules of Landlock be kept")]
    Restrict(#[source] io::Error),
}

/// The version of Landlock's ABI.
///
/// # Errors
/// When there is none.
pub fn version() -> io::Result<i64> {
    const LANDLOCK_CREATE_RULESET_VERSION: u32 = 1;
    let ruleset = std::ptr::null::<Handled>();
    // SAFETY: with this flag landlock_create_ruleset takes no ruleset and touches no memory.
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, ruleset, 0usize, LANDLOCK_CREATE_RULESET_VERSION) };
    if version < 0 { Err(io::Error::last_os_error()) } else { Ok(version) }
}

/// `struct landlock_ruleset_attr`: what is denied unless a rule gives it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Handled {
    access_fs: u64,
    access_net: u64,
    scoped: u64,
}

impl Handled {
    /// All that version `version` has.
    fn of(version: i64) -> Self {
        let newer = [(2, REFER), (3, TRUNCATE), (5, IOCTL_DEV)];
        let access_fs = newer.iter().filter(|(since, _)| version >= *since).fold(FIRST, |all, (_, right)| all | right);
        let since = |since, rights| if version >= since { rights } else { 0 };
        Self { access_fs, access_net: since(4, TCP), scoped: since(6, ABSTRACT_SOCKETS) }
    }

    fn create(&self) -> io::Result<OwnedFd> {
        // A kernel that knows less of the struct takes it if the rest is zeros.
        let call = libc::SYS_landlock_create_ruleset;
        // SAFETY: it reads as many bytes as it is told, which are those of `self`.
        let fd = unsafe { libc::syscall(call, &raw const *self, size_of::<Self>(), 0u32) };
        match i32::try_from(fd) {
            // SAFETY: the system call has just opened this descriptor, and nobody else knows it.
            Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Rules: a thread that [takes](Self::restrict) them, and those that it starts from then on, can open no file, make, move or
/// remove none, and begin no TCP connection, but what the rules allow. Descriptors that are open are not touched.
#[derive(Debug)]
pub struct Ruleset {
    fd: OwnedFd,
    handled: Handled,
}

impl Ruleset {
    /// The newest version of Landlock whose rights are known here.
    const NEWEST: i64 = 6;

    /// Rules that allow these and nothing else.
    ///
    /// # Errors
    /// When the kernel has no Landlock, or none that is enough.
    pub fn new(allowed: &[(PathBuf, Access)]) -> Result<Self, Error> {
        let mut handled = Handled::of(Self::NEWEST);
        let fd = handled.create().or_else(|_| {
            handled = Handled::of(version().map_err(|_| Error::Unavailable)?.min(Self::NEWEST));
            handled.create().map_err(Error::Make)
        })?;
        let ruleset = Self { fd, handled };
        if handled.access_fs & REFER == 0 && allowed.iter().any(|(_, access)| *access == Access::Change) {
            return Err(Error::Old);
        }
        for (path, access) in allowed {
            ruleset.allow(path, *access).map_err(|source| Error::Path { path: path.clone(), source })?;
        }
        Ok(ruleset)
    }

    fn allow(&self, path: &Path, access: Access) -> io::Result<()> {
        const LANDLOCK_RULE_PATH_BENEATH: u32 = 1;
        /// `struct landlock_path_beneath_attr`.
        #[repr(C, packed)]
        struct PathBeneath {
            allowed_access: u64,
            parent_fd: i32,
        }
        let parent = rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let is_folder = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&parent)?.st_mode).is_dir();
        let possible = if is_folder { u64::MAX } else { OF_A_FILE };
        let allowed_access = access.rights() & self.handled.access_fs & possible;
        if allowed_access == 0 {
            return Ok(());
        }
        let rule = PathBeneath { allowed_access, parent_fd: parent.as_raw_fd() };
        let (call, fd) = (libc::SYS_landlock_add_rule, self.fd.as_raw_fd());
        // SAFETY: it reads a struct of this kind at `rule`.
        let result = unsafe { libc::syscall(call, fd, LANDLOCK_RULE_PATH_BENEATH, &raw const rule, 0u32) };
        match io::Error::last_os_error() {
            _ if result == 0 => Ok(()),
            // A pipe or a socket by its descriptor (/dev/fd/N), about which there are no rules: it may be opened.
            error if error.raw_os_error() == Some(libc::EBADFD) => Ok(()),
            error => Err(error),
        }
    }

    /// Has this thread, and those that it starts from now on, keep the rules. It has to have given up new privileges
    /// (`PR_SET_NO_NEW_PRIVS`).
    ///
    /// # Errors
    /// When the kernel does not take them.
    pub fn restrict(&self) -> Result<(), Error> {
        // SAFETY: it takes a descriptor and flags, and touches no memory.
        let result = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, self.fd.as_raw_fd(), 0u32) };
        if result == 0 { Ok(()) } else { Err(Error::Restrict(io::Error::last_os_error())) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};

    #[test]
    fn old_versions_handle_less() {
        assert_eq!(Handled::of(1), Handled { access_fs: 0x1fff, access_net: 0, scoped: 0 });
        assert_eq!(Handled::of(3), Handled { access_fs: 0x7fff, access_net: 0, scoped: 0 });
        assert_eq!(Handled::of(6), Handled { access_fs: 0xffff, access_net: 3, scoped: 1 });
    }

    #[test]
    fn a_thread_opens_only_what_the_rules_name() {
        if version().is_err() {
            eprintln!("this kernel has no Landlock: nothing is tested");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["read", "write", "change", "replace", "remove", "other"] {
            fs::create_dir(path(name)).unwrap();
            fs::write(path(name).join("file"), "x").unwrap();
        }
        let all = [
            (path("read"), Access::Read),
            (path("write/file"), Access::Write),
            (path("change"), Access::Change),
            (path("replace"), Access::Replace),
            (path("remove"), Access::Remove),
        ];
        let (_reader, writer) = rustix::pipe::pipe().unwrap();
        let pipe = PathBuf::from(format!("/proc/self/fd/{}", writer.as_raw_fd()));
        let rules = Ruleset::new(&[&all[..], &[(pipe.clone(), Access::Write)]].concat()).unwrap();
        let open = File::open(path("other/file")).unwrap();
        let tried = std::thread::spawn({
            let folder = folder.path().to_owned();
            move || {
                rustix::thread::set_no_new_privs(true).unwrap();
                rules.restrict().unwrap();
                let file = |name: &str| folder.join(name);
                let denied =
                    |result: io::Result<()>| result.is_err_and(|e| e.kind() == io::ErrorKind::PermissionDenied);
                let read = |name: &str| File::open(file(name)).map(drop);
                let write = |name: &str| File::options().append(true).open(file(name)).map(drop);
                let make = |name: &str| File::options().write(true).create_new(true).open(file(name)).map(drop);
                assert!(denied(read("other/file")) && denied(make("other/new")), "nobody names it");
                assert!(denied(fs::read_dir(&folder).map(drop)) && open.metadata().is_ok());
                assert!(read("read/file").is_ok() && denied(write("read/file")) && denied(make("read/new")));
                assert!(read("write/file").is_ok() && write("write/file").is_ok() && denied(make("write/new")));
                fs::create_dir(file("change/folder")).unwrap();
                fs::rename(file("change/file"), file("change/folder/file")).unwrap();
                fs::remove_file(file("change/folder/file")).unwrap();
                make("replace/new").unwrap();
                fs::rename(file("replace/new"), file("replace/file")).unwrap();
                assert!(denied(read("replace/file")));
                assert!(denied(write("remove/file")) && denied(make("remove/new")));
                fs::remove_file(file("remove/file")).unwrap();
                assert!(File::options().append(true).open(&pipe).is_ok(), "there are no rules about pipes");
                assert!(std::net::TcpListener::bind("127.0.0.1:0").is_err() || version().unwrap() < 4);
            }
        });
        tried.join().unwrap();
        assert!(File::open(path("other/file")).is_ok(), "this thread is as it was");
    }
}

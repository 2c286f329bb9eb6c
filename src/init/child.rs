//! The command as a process.

use alloc::ffi::CString;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::ffi::CStr;
use core::ptr::null;

use crate::account::{self, Account};
use crate::file;
use crate::pids;
use crate::spec::Spec;
use crate::sys::{self, Fd};

/// Where programs are looked for, if the environment does not say.
const PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// As a shell's: there is no such command.
const NOT_FOUND: i32 = 127;
/// As a shell's: there is one, but it cannot be run.
const NOT_RUN: i32 = 126;

const TIOCSCTTY: usize = 0x540e;

/// The command's three streams, its own ends of them.
#[derive(Clone, Copy)]
pub struct Streams {
    pub stdin: Fd,
    pub stdout: Fd,
    pub stderr: Fd,
}

/// Who runs the command, and what its environment is.
pub fn prepare(spec: &mut Spec) -> Result<Account, String> {
    let passwd = file::read(c"/etc/passwd").unwrap_or_default();
    let group = file::read(c"/etc/group").unwrap_or_default();
    let account = account::find(spec.user.as_deref().unwrap_or(b"0"), &passwd, &group)?;
    if spec.variable("PATH").is_none() {
        spec.environment.extend(CString::new([b"PATH=", PATH].concat()));
    }
    if spec.variable("HOME").is_none() {
        spec.environment.extend(CString::new([b"HOME=", &*account.home].concat()));
    }
    Ok(account)
}

/// Starts the command, in a session of its own; its process number.
pub fn start(spec: &Spec, account: &Account, streams: Streams) -> Result<i32, String> {
    for fd in [streams.stdin, streams.stdout, streams.stderr] {
        // So that it may open /dev/stdout by name.
        let _ = sys::chown_fd(fd, account.user, if spec.terminal.is_some() { 5 } else { account.group });
    }
    match sys::fork() {
        Ok(0) => become_command(spec, account, streams),
        forked => forked.map_err(|error| format!("cannot start a process: {error}")),
    }
}

/// In the new process.
fn become_command(spec: &Spec, account: &Account, streams: Streams) -> ! {
    let name = &*spec.arguments[0];
    let prepared = enter_session(spec, streams);
    if let Some(folder) = &spec.folder {
        // As other runners of containers do, so that an image need not have it.
        let _ = file::make_folders(folder);
    }
    let prepared = prepared.and_then(|()| if spec.pids.is_some() { pids::enter() } else { Ok(()) });
    if let Err(error) = prepared.and_then(|()| become_user(account)) {
        refuse(name, NOT_RUN, &format!("{error}"));
    }
    if let Err(error) = sys::chdir(spec.folder.as_deref().unwrap_or(c"/")) {
        let folder = spec.folder.as_deref().unwrap_or_default().to_string_lossy();
        refuse(name, NOT_RUN, &format!("cannot enter {folder}: {error}"));
    }
    let error = exec(spec, name);
    refuse(name, if error == sys::ENOENT { NOT_FOUND } else { NOT_RUN }, &format!("{error}"))
}

fn enter_session(spec: &Spec, streams: Streams) -> sys::Result<()> {
    sys::set_session()?;
    sys::set_umask(0o022);
    sys::duplicate_to(streams.stdin, 0)?;
    sys::duplicate_to(streams.stdout, 1)?;
    sys::duplicate_to(streams.stderr, 2)?;
    if spec.terminal.is_some() {
        sys::ioctl(0, TIOCSCTTY, 0)?;
    }
    sys::set_signal_mask(0)
}

fn become_user(account: &Account) -> sys::Result<()> {
    sys::set_groups(&account.groups)?;
    sys::set_group(account.group)?;
    sys::set_user(account.user)
}

/// Says on standard error why the command was not run, and ends.
fn refuse(name: &CStr, status: i32, why: &str) -> ! {
    let _ = sys::write(2, format!("bantam: cannot run `{}`: {why}\n", name.to_string_lossy()).as_bytes());
    sys::exit(status)
}

/// Runs the program, which is looked for in PATH unless its name has a slash; returns only why it cannot.
fn exec(spec: &Spec, name: &CStr) -> sys::Errno {
    let arguments = pointers(&spec.arguments);
    let environment = pointers(&spec.environment);
    if name.to_bytes().contains(&b'/') {
        return sys::exec(name, &arguments, &environment);
    }
    let mut found = sys::ENOENT;
    let path = spec.variable("PATH").unwrap_or(PATH);
    for folder in path.split(|byte| *byte == b':').filter(|_| !name.is_empty()) {
        let folder = if folder.is_empty() { &b"."[..] } else { folder };
        let Ok(program) = CString::new([folder, b"/", name.to_bytes()].concat()) else { continue };
        match sys::exec(&program, &arguments, &environment) {
            sys::ENOENT | sys::ENOTDIR => {}
            sys::EACCES => found = sys::EACCES,
            other => return other,
        }
    }
    found
}

fn pointers(strings: &[CString]) -> Vec<*const u8> {
    strings.iter().map(|string| string.as_ptr().cast()).chain([null()]).collect()
}

//! The namespaces of a jail (namespaces(7)).

#![expect(unsafe_code, reason = "unshare, mount and umount2 have no safe wrapper here")]

use std::ffi::CStr;
use std::fs;
use std::io;
use std::ptr::null;

use rustix::process::{Gid, Uid, chdir, getegid, geteuid, pivot_root};
use rustix::system::sethostname;
use rustix::thread::{UnshareFlags, set_thread_groups, set_thread_res_gid, set_thread_res_uid, unshare_unsafe};

use super::{Error, failed};

/// Has the next child be the first process of a PID namespace; in a user namespace of this user, without root.
pub fn split(as_user: bool) -> Result<(), Error> {
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    let user = if as_user { UnshareFlags::NEWUSER } else { UnshareFlags::empty() };
    // SAFETY: descriptors stay shared, and this is the only thread.
    unsafe { unshare_unsafe(user | UnshareFlags::NEWPID) }.map_err(|error| Error::Namespaces(error.into()))?;
    if as_user {
        // The same IDs: a file of this user is one of this user.
        let write = |file: &str, text: String| fs::write(format!("/proc/self/{file}"), text).map_err(Error::Namespaces);
        write("setgroups", "deny".into())?;
        write("uid_map", format!("{uid} {uid} 1"))?;
        write("gid_map", format!("{gid} {gid} 1"))?;
    }
    Ok(())
}

/// Leaves this thread without files, networks and all else that has a name on the host.
pub fn leave() -> Result<(), Error> {
    let namespaces = UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    // SAFETY: descriptors stay shared, and this is the only thread.
    unsafe { unshare_unsafe(namespaces) }.map_err(|error| Error::Namespaces(error.into()))?;
    sethostname(b"jail").map_err(failed("name the host"))?;
    // What is mounted from now on is not seen by others.
    mount(None, c"/", libc::MS_REC | libc::MS_PRIVATE, None).map_err(failed("have mounts for itself"))?;
    // On any folder: it is the root in no time.
    let empty = libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    mount(Some(c"tmpfs"), c"/proc", empty, Some(c"size=4k,nr_inodes=2,mode=0555"))
        .map_err(failed("mount an empty root"))?;
    chdir("/proc").map_err(failed("enter an empty root"))?;
    // The old root is then mounted on the new one, at the same place (pivot_root(2)).
    pivot_root(".", ".").map_err(failed("change the root"))?;
    // SAFETY: takes a path and flags.
    let result = unsafe { libc::umount2(c".".as_ptr(), libc::MNT_DETACH) };
    if result != 0 {
        return Err(failed("leave the old root")(io::Error::last_os_error()));
    }
    chdir("/").map_err(failed("enter the new root"))
}

fn mount(kind: Option<&CStr>, target: &CStr, flags: libc::c_ulong, data: Option<&CStr>) -> io::Result<()> {
    let text = |text: Option<&CStr>| text.map_or(null(), CStr::as_ptr);
    // SAFETY: takes texts that end with NUL, or none, and flags.
    let result = unsafe { libc::mount(text(kind), target.as_ptr(), text(kind), flags, text(data).cast()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes this thread another user's, in no other group.
pub fn become_user(uid: u32, gid: u32) -> Result<(), Error> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    set_thread_groups(&[]).map_err(failed("leave groups"))?;
    set_thread_res_gid(gid, gid, gid).map_err(failed("change the group"))?;
    set_thread_res_uid(uid, uid, uid).map_err(failed("change the user"))
}

//! The namespaces of a jail (namespaces(7)).

#![expect(unsafe_code, reason = "unshare has no safe wrapper here")]

use std::fs;

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
use rustix::process::{Gid, Uid, chdir, getegid, geteuid, pivot_root};
use rustix::system::sethostname;
use rustix::thread::{UnshareFlags, set_thread_groups, set_thread_res_gid, set_thread_res_uid, unshare_unsafe};

use super::{Error, failed};

fn unshare(namespaces: UnshareFlags) -> Result<(), Error> {
    // SAFETY: descriptors stay shared, and this is the only thread.
    unsafe { unshare_unsafe(namespaces) }.map_err(|error| Error::Namespaces(error.into()))
}

/// Has the next child be the first process of a PID namespace; in a user namespace of this user, without root.
pub fn split(as_user: bool) -> Result<(), Error> {
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    let user = if as_user { UnshareFlags::NEWUSER } else { UnshareFlags::empty() };
    unshare(user | UnshareFlags::NEWPID)?;
    if as_user {
        // The same IDs: a file of this user is one of this user.
        let write = |file: &str, text: String| fs::write(format!("/proc/self/{file}"), text).map_err(Error::Namespaces);
        write("setgroups", "deny".into())?;
        write("uid_map", format!("{uid} {uid} 1"))?;
        write("gid_map", format!("{gid} {gid} 1"))?;
    }
    Ok(())
}

/// Gives this thread a mount namespace of its own, which is like the one that it had.
pub fn own_mounts() -> Result<(), Error> {
    unshare(UnshareFlags::NEWNS)?;
    // What is mounted from now on is not seen by others.
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
        .map_err(failed("have mounts for itself"))
}

/// Leaves this thread without files, networks and all else that has a name on the host.
pub fn leave() -> Result<(), Error> {
    unshare(UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWCGROUP)?;
    own_mounts()?;
    sethostname(b"jail").map_err(failed("name the host"))?;
    // On any folder: it is the root in no time.
    let empty = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("tmpfs", "/proc", "tmpfs", empty, c"size=4k,nr_inodes=2,mode=0555").map_err(failed("mount an empty root"))?;
    chdir("/proc").map_err(failed("enter an empty root"))?;
    // The old root is then mounted on the new one, at the same place (pivot_root(2)).
    pivot_root(".", ".").map_err(failed("change the root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(failed("leave the old root"))?;
    chdir("/").map_err(failed("enter the new root"))
}

/// Makes this thread another user's, in no other group.
pub fn become_user(uid: u32, gid: u32) -> Result<(), Error> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    set_thread_groups(&[]).map_err(failed("leave groups"))?;
    set_thread_res_gid(gid, gid, gid).map_err(failed("change the group"))?;
    set_thread_res_uid(uid, uid, uid).map_err(failed("change the user"))
}

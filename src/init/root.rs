//! The command's root file system, and those that every root has.

use alloc::ffi::CString;
use alloc::format;
use alloc::string::String;
use core::ffi::CStr;

use crate::file::{make_folder, make_folders, path};
use crate::spec::{Root, Share};
use crate::sys::{self, MS_MOVE, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY, MS_REMOUNT};

/// The disk.
const DISK: &CStr = c"/dev/vda";
/// Where it is mounted first.
const BELOW: &CStr = c"/.bantam/below";
/// The writable layer.
const MEMORY: &CStr = c"/.bantam/memory";
/// Both.
const MERGED: &CStr = c"/.bantam/merged";

/// Mounts /dev, so that there are devices at all.
pub fn mount_devices() -> sys::Result<()> {
    make_folder(c"/dev", 0o755)?;
    match sys::mount(c"devtmpfs", c"/dev", c"devtmpfs", MS_NOSUID, c"mode=755") {
        Err(sys::EBUSY) => Ok(()),
        mounted => mounted,
    }
}

/// Makes the command's root our own.
pub fn enter(root: &Root) -> Result<(), String> {
    let new = match root {
        Root::Initramfs => return mount_rest(),
        Root::Writable(kind) => {
            mount_disk(kind, 0)?;
            BELOW
        }
        Root::Overlay(kind) => {
            mount_disk(kind, MS_RDONLY)?;
            mount_overlay()?;
            MERGED
        }
    };
    let move_in = || -> sys::Result<()> {
        sys::chdir(new)?;
        make_folder(c"dev", 0o755)?;
        sys::mount(c"/dev", c"dev", c"", MS_MOVE, c"")?;
        sys::mount(c".", c"/", c"", MS_MOVE, c"")?;
        sys::chroot(c".")?;
        sys::chdir(c"/")
    };
    move_in().map_err(|error| format!("cannot move into the root file system: {error}"))?;
    mount_rest()
}

fn mount_disk(kind: &CStr, flags: usize) -> Result<(), String> {
    wait_for_disk();
    let mount = |data: &CStr| {
        make_folder(BELOW, 0o755)?;
        sys::mount(DISK, BELOW, kind, flags, data)
    };
    let mounted = match mount(c"") {
        // A journal that cannot be replayed, because the disk cannot be written.
        Err(_) if flags & MS_RDONLY != 0 && kind == c"ext4" => mount(c"noload"),
        mounted => mounted,
    };
    mounted.map_err(|error| format!("cannot mount {} as {}: {error}", DISK.to_string_lossy(), kind.to_string_lossy()))
}

/// Its driver may take a moment.
fn wait_for_disk() {
    for _ in 0..1000 {
        match sys::open(DISK, sys::READ) {
            Ok(fd) => return sys::close(fd),
            Err(_) => sys::pause_for(5),
        }
    }
}

fn mount_overlay() -> Result<(), String> {
    let mount = || -> sys::Result<()> {
        make_folder(MEMORY, 0o755)?;
        sys::mount(c"tmpfs", MEMORY, c"tmpfs", 0, c"mode=755")?;
        make_folder(c"/.bantam/memory/upper", 0o755)?;
        make_folder(c"/.bantam/memory/work", 0o755)?;
        make_folder(MERGED, 0o755)?;
        let layers = c"lowerdir=/.bantam/below,upperdir=/.bantam/memory/upper,workdir=/.bantam/memory/work";
        sys::mount(c"overlay", MERGED, c"overlay", 0, layers)
    };
    mount().map_err(|error| format!("cannot mount a writable layer over the root file system: {error}"))
}

/// Mounts what programs expect everywhere.
fn mount_rest() -> Result<(), String> {
    let safe = MS_NOSUID | MS_NODEV | MS_NOEXEC;
    let needed: [(&CStr, &CStr, u32, usize, &CStr); 7] = [
        (c"/proc", c"proc", 0o555, safe, c""),
        (c"/sys", c"sysfs", 0o555, safe, c""),
        (c"/dev/pts", c"devpts", 0o755, MS_NOSUID | MS_NOEXEC, c"mode=620,ptmxmode=666,gid=5"),
        (c"/dev/shm", c"tmpfs", 0o1777, MS_NOSUID | MS_NODEV, c"mode=1777"),
        (c"/run", c"tmpfs", 0o755, MS_NOSUID | MS_NODEV, c"mode=755"),
        (c"/tmp", c"tmpfs", 0o1777, MS_NOSUID | MS_NODEV, c"mode=1777"),
        (c"/sys/fs/cgroup", c"cgroup2", 0o755, safe, c""),
    ];
    for (target, kind, mode, flags, data) in needed {
        let mounted = make_folder(target, mode).and_then(|()| sys::mount(kind, target, kind, flags, data));
        // Not every kernel has control groups.
        if let Err(error) = mounted
            && kind != c"cgroup2"
        {
            return Err(format!("cannot mount {}: {error}", target.to_string_lossy()));
        }
    }
    let links = [
        (c"/proc/self/fd", c"/dev/fd"),
        (c"/proc/self/fd/0", c"/dev/stdin"),
        (c"/proc/self/fd/1", c"/dev/stdout"),
        (c"/proc/self/fd/2", c"/dev/stderr"),
    ];
    for (target, link) in links {
        // Who has such files of its own keeps them.
        let _ = sys::symlink(target, link);
    }
    Ok(())
}

/// Mounts the folders that the host shares.
pub fn mount_shares(shares: &[Share]) -> Result<(), String> {
    for Share { tag, path, readonly } in shares {
        let flags = if *readonly { MS_RDONLY } else { 0 };
        let mounted = make_folders(path).and_then(|()| sys::mount(tag, path, c"virtiofs", flags, c""));
        mounted.map_err(|error| format!("cannot mount the share {}: {error}", path.to_string_lossy()))?;
    }
    Ok(())
}

/// Has everything that was written be on the disk, and nothing follow.
pub fn settle(root: &Root) {
    if matches!(root, Root::Writable(_)) {
        sys::sync();
        let _ = sys::mount(c"", c"/", c"", MS_REMOUNT | MS_RDONLY, c"");
    }
}

/// Forgets what the initramfs brought and is used: its memory is the guest's.
pub fn clear(modules: &[CString]) {
    for file in modules {
        let _ = sys::unlink(file);
    }
    for file in ["/.bantam/spec", "/.bantam/init"] {
        let _ = sys::unlink(&path(file));
    }
    for folder in ["/.bantam/modules", "/.bantam"] {
        let _ = sys::rmdir(&path(folder));
    }
}

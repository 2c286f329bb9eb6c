//! The command's root file system, and those that every root has.

use alloc::ffi::CString;
use alloc::format;
use alloc::string::String;
use core::ffi::CStr;

use crate::file::{make_folder, make_folders, path};
use crate::spec::{Root, Share};
use crate::sys::{self, Fd, MS_MOVE, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY, MS_REMOUNT};

/// The disk.
const DISK: &CStr = c"/dev/vda";
/// Where it is mounted first.
const BELOW: &CStr = c"/.bantam/below";
/// The writable layer.
const UPPER: &CStr = c"/.bantam/upper";
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

/// Makes the command's root our own. Returns the folder of the writable layer if that is on a disk.
pub fn enter(root: &Root, upper: Option<&CStr>) -> Result<Option<Fd>, String> {
    let mut layer = None;
    let new = match root {
        Root::Initramfs => return mount_rest().map(|()| None),
        Root::Writable(kind) => {
            mount_disk(DISK, BELOW, kind, 0, c"")?;
            BELOW
        }
        Root::Share(tag) => {
            let mounted = make_folder(BELOW, 0o755).and_then(|()| sys::mount(tag, BELOW, c"virtiofs", 0, c""));
            mounted.map_err(|error| format!("cannot mount the host's folder as the root file system: {error}"))?;
            BELOW
        }
        Root::Overlay(kind) => {
            mount_disk(DISK, BELOW, kind, MS_RDONLY, c"")?;
            if let Some(disk) = upper {
                // The host gets back what is removed.
                mount_disk(disk, UPPER, c"ext4", 0, c"discard")?;
            }
            mount_overlay(upper.is_none())?;
            layer = upper.and_then(|_| sys::open(UPPER, sys::READ | sys::FOLDER).ok());
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
    mount_rest().map(|()| layer)
}

fn mount_disk(disk: &CStr, target: &CStr, kind: &CStr, flags: usize, data: &CStr) -> Result<(), String> {
    wait_for_disk(disk);
    let mount = |data: &CStr| {
        make_folder(target, 0o755)?;
        sys::mount(disk, target, kind, flags, data)
    };
    let mounted = match mount(data) {
        // A journal that cannot be replayed, because the disk cannot be written.
        Err(_) if flags & MS_RDONLY != 0 && kind == c"ext4" => mount(c"noload"),
        mounted => mounted,
    };
    mounted.map_err(|error| format!("cannot mount {} as {}: {error}", disk.to_string_lossy(), kind.to_string_lossy()))
}

/// Its driver may take a moment.
fn wait_for_disk(disk: &CStr) {
    for _ in 0..1000 {
        match sys::open(disk, sys::READ) {
            Ok(fd) => return sys::close(fd),
            Err(_) => sys::pause_for(5),
        }
    }
}

fn mount_overlay(in_memory: bool) -> Result<(), String> {
    let mount = || -> sys::Result<()> {
        if in_memory {
            make_folder(UPPER, 0o755)?;
            sys::mount(c"tmpfs", UPPER, c"tmpfs", 0, c"mode=755")?;
        }
        make_folder(c"/.bantam/upper/upper", 0o755)?;
        make_folder(c"/.bantam/upper/work", 0o755)?;
        make_folder(MERGED, 0o755)?;
        let layers = c"lowerdir=/.bantam/below,upperdir=/.bantam/upper/upper,workdir=/.bantam/upper/work";
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

/// Has everything that was written be on the disk or the host, and nothing follow. `layer` is that of [`enter`].
pub fn settle(root: &Root, layer: Option<Fd>) {
    if layer.is_none() && !matches!(root, Root::Writable(_) | Root::Share(_)) {
        return;
    }
    sys::sync();
    let _ = sys::mount(c"", c"/", c"", MS_REMOUNT | MS_RDONLY, c"");
    // No path leads there from the root.
    if layer.is_some_and(|folder| sys::chdir_fd(folder).is_ok()) {
        let _ = sys::mount(c"", c".", c"", MS_REMOUNT | MS_RDONLY, c"");
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

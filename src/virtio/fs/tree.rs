//! The shared folder: the files that the guest knows, by node number, and what can be done with them.
//!
//! A node is a descriptor opened with O_PATH. A name is looked up one step at a time, below a node, and a symbolic link
//! is never followed on the host: nothing outside the folder can be reached, whatever the guest or others do to it.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{self, AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::detached;
use super::wire::{Attr, fattr};

/// The node number of the shared folder itself: `FUSE_ROOT_ID`.
pub const ROOT: u64 = 1;

type Result<T> = std::result::Result<T, Errno>;

/// A file that the guest knows.
struct Node {
    /// Opened with O_PATH.
    fd: OwnedFd,
    key: (u64, u64),
    kind: FileType,
    /// How often the guest was told of it and has not forgotten it.
    lookups: u64,
    _slot: Slot,
}

/// One of the descriptors that shared folders may have in this process: half of all, as it needs some for other things.
pub struct Slot(());

/// Slots in use.
static SLOTS: AtomicU64 = AtomicU64::new(0);

impl Slot {
    /// A slot, if there is one ([`Errno::NFILE`]).
    pub fn take() -> Result<Self> {
        let all = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
        let used = SLOTS.fetch_add(1, Ordering::Relaxed);
        let slot = Self(());
        if used < all / 2 { Ok(slot) } else { Err(Errno::NFILE) }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        SLOTS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The shared folder.
pub struct Tree {
    readonly: bool,
    /// Who owns new files: the guest's user, or, without the right to give files away, ours, who is root in the guest.
    ids: Option<(u32, u32)>,
    /// /proc/self/fd: a name below it leads to that descriptor's file.
    descriptors: OwnedFd,
    nodes: HashMap<u64, Node>,
    by_key: HashMap<(u64, u64), u64>,
    next_node: u64,
}

/// The user and group of the guest that ask.
#[derive(Debug, Clone, Copy)]
pub struct Caller {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// A new value of each attribute that SETATTR may set; times as `Timestamps` has them.
pub struct NewAttr {
    /// `FATTR_*`.
    pub valid: u32,
    /// Permissions.
    pub mode: u32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Length in bytes.
    pub size: u64,
    /// Access and modification time: seconds, nanoseconds.
    pub times: [(u64, u32); 2],
}

impl Tree {
    /// The folder at `path`, maybe [`detached`].
    pub fn open(path: &Path, readonly: bool, detached: bool) -> io::Result<Self> {
        let open = |path: &Path, readonly: bool| {
            if detached {
                detached::open(path, readonly)
            } else {
                Ok(fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
            }
        };
        let descriptors = open(Path::new("/proc/self/fd"), false)?;
        let fd = open(path, readonly)?;
        let stat = stat(&fd)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            return Err(Errno::NOTDIR.into());
        }
        let root =
            Node { fd, key: (stat.st_dev, stat.st_ino), kind: FileType::Directory, lookups: 1, _slot: Slot::take()? };
        let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
        Ok(Self {
            readonly,
            ids: (!uid.is_root()).then(|| (uid.as_raw(), gid.as_raw())),
            descriptors,
            by_key: HashMap::from([(root.key, ROOT)]),
            nodes: HashMap::from([(ROOT, root)]),
            next_node: ROOT + 1,
        })
    }

    /// Forgets all nodes but the root: a new guest starts from there.
    pub fn forget_all(&mut self) {
        self.nodes.retain(|number, _| *number == ROOT);
        self.by_key.retain(|_, number| *number == ROOT);
    }

    fn node(&self, number: u64) -> Result<&Node> {
        self.nodes.get(&number).ok_or(Errno::STALE)
    }

    fn writable(&self) -> Result<()> {
        if self.readonly { Err(Errno::ROFS) } else { Ok(()) }
    }

    /// A node's attributes.
    pub fn attr(&self, number: u64) -> Result<Attr> {
        Ok(self.to_attr(&stat(&self.node(number)?.fd)?))
    }

    fn to_attr(&self, stat: &Stat) -> Attr {
        let map = |id: u32, own: Option<u32>| if own == Some(id) { 0 } else { id };
        let small = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        let nanoseconds = |value| u32::try_from(value).unwrap_or(0);
        Attr {
            ino: stat.st_ino,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            blocks: u64::try_from(stat.st_blocks).unwrap_or(0),
            atime: (stat.st_atime, nanoseconds(stat.st_atime_nsec)),
            mtime: (stat.st_mtime, nanoseconds(stat.st_mtime_nsec)),
            ctime: (stat.st_ctime, nanoseconds(stat.st_ctime_nsec)),
            mode: stat.st_mode,
            nlink: small(stat.st_nlink),
            uid: map(stat.st_uid, self.ids.map(|(uid, _)| uid)),
            gid: map(stat.st_gid, self.ids.map(|(_, gid)| gid)),
            // As the kernel packs it for FUSE: 8 bits of the minor, 12 of the major, the rest of the minor.
            rdev: {
                let (major, minor) = (fs::major(stat.st_rdev), fs::minor(stat.st_rdev));
                minor & 0xff | major << 8 | (minor & !0xff) << 12
            },
            blksize: small(u64::try_from(stat.st_blksize).unwrap_or(4096)),
        }
    }

    /// Looks `name` up below a node; the guest now knows the file as the node returned.
    pub fn lookup(&mut self, parent: u64, name: &[u8]) -> Result<(u64, Attr)> {
        let fd = open_below(&self.directory(parent)?.fd, name, OFlags::PATH, Mode::empty())?;
        let stat = stat(&fd)?;
        let key = (stat.st_dev, stat.st_ino);
        let attr = self.to_attr(&stat);
        if let Some(number) = self.by_key.get(&key)
            && let Some(node) = self.nodes.get_mut(number)
        {
            node.lookups += 1;
            return Ok((*number, attr));
        }
        let slot = Slot::take()?;
        let number = self.next_node;
        self.next_node += 1;
        self.by_key.insert(key, number);
        self.nodes
            .insert(number, Node { fd, key, kind: FileType::from_raw_mode(stat.st_mode), lookups: 1, _slot: slot });
        Ok((number, attr))
    }

    /// The guest forgets `count` lookups of a node.
    pub fn forget(&mut self, number: u64, count: u64) {
        let Some(node) = self.nodes.get_mut(&number).filter(|_| number != ROOT) else { return };
        node.lookups = node.lookups.saturating_sub(count);
        if node.lookups == 0 {
            self.by_key.remove(&node.key);
            self.nodes.remove(&number);
        }
    }

    fn directory(&self, number: u64) -> Result<&Node> {
        self.node(number).and_then(|node| if node.kind == FileType::Directory { Ok(node) } else { Err(Errno::NOTDIR) })
    }

    /// Opens a regular file or a directory once more, for I/O. Others are the guest's own business.
    pub fn open_node(&self, number: u64, flags: OFlags) -> Result<OwnedFd> {
        let node = self.node(number)?;
        match node.kind {
            FileType::RegularFile => {
                if flags.intersects(OFlags::WRONLY | OFlags::RDWR | OFlags::TRUNC) {
                    self.writable()?;
                }
            }
            FileType::Directory => {}
            _ => return Err(Errno::PERM),
        }
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        fs::openat(&self.descriptors, name_of(node.fd.as_fd()), flags, Mode::empty())
    }

    /// The mode of a file that is open in some way, maybe with O_PATH.
    fn set_mode(&self, file: BorrowedFd<'_>, mode: Mode) -> Result<()> {
        fs::chmodat(&self.descriptors, name_of(file), mode, AtFlags::empty())
    }

    /// Gives a new file to the guest's user, and the mode that was asked for whatever our umask is.
    fn adopt(&mut self, parent: u64, name: &[u8], mode: Option<u32>, caller: Caller) -> Result<(u64, Attr)> {
        let (number, _) = self.lookup(parent, name)?;
        let node = self.node(number)?;
        if self.ids.is_none() {
            fs::chownat(&node.fd, "", Some(uid(caller.uid)?), Some(gid(caller.gid)?), AtFlags::EMPTY_PATH)?;
        }
        if let Some(mode) = mode {
            self.set_mode(node.fd.as_fd(), Mode::from_raw_mode(mode & 0o7777))?;
        }
        Ok((number, self.attr(number)?))
    }

    /// Makes a folder.
    pub fn make_directory(&mut self, parent: u64, name: &[u8], mode: u32, caller: Caller) -> Result<(u64, Attr)> {
        self.writable()?;
        fs::mkdirat(&self.directory(parent)?.fd, component(name)?, Mode::from_raw_mode(mode & 0o7777))?;
        self.adopt(parent, name, Some(mode), caller)
    }

    /// Makes a file, a pipe or a socket. A device would be one of the host: never.
    pub fn make_node(&mut self, parent: u64, name: &[u8], mode: u32, caller: Caller) -> Result<(u64, Attr)> {
        self.writable()?;
        let kind = FileType::from_raw_mode(mode);
        if !matches!(kind, FileType::RegularFile | FileType::Fifo | FileType::Socket) {
            return Err(Errno::PERM);
        }
        fs::mknodat(&self.directory(parent)?.fd, component(name)?, kind, Mode::from_raw_mode(mode & 0o7777), 0)?;
        self.adopt(parent, name, Some(mode), caller)
    }

    /// Makes a symbolic link.
    pub fn make_link(&mut self, parent: u64, name: &[u8], target: &[u8], caller: Caller) -> Result<(u64, Attr)> {
        self.writable()?;
        fs::symlinkat(target, &self.directory(parent)?.fd, component(name)?)?;
        self.adopt(parent, name, None, caller)
    }

    /// Makes and opens a file, or opens the one there is if `flags` allow that.
    pub fn create(
        &mut self,
        parent: u64,
        name: &[u8],
        flags: OFlags,
        mode: u32,
        caller: Caller,
    ) -> Result<(u64, Attr, OwnedFd)> {
        self.writable()?;
        let parent_fd = &self.directory(parent)?.fd;
        match open_below(parent_fd, name, flags | OFlags::CREATE | OFlags::EXCL, Mode::from_raw_mode(mode & 0o7777)) {
            // It is open for writing even if its mode forbids that.
            Ok(fd) => self.adopt(parent, name, Some(mode), caller).map(|(number, attr)| (number, attr, fd)),
            Err(Errno::EXIST) if !flags.contains(OFlags::EXCL) => {
                let (number, _) = self.lookup(parent, name)?;
                let fd = self.open_node(number, flags)?;
                Ok((number, self.attr(number)?, fd))
            }
            Err(error) => Err(error),
        }
    }

    /// Another name for a file.
    pub fn link(&mut self, number: u64, parent: u64, name: &[u8]) -> Result<(u64, Attr)> {
        self.writable()?;
        let (node, directory) = (self.node(number)?, self.directory(parent)?);
        // By way of /proc: linking the descriptor itself takes CAP_DAC_READ_SEARCH.
        let from = name_of(node.fd.as_fd());
        fs::linkat(&self.descriptors, from, &directory.fd, component(name)?, AtFlags::SYMLINK_FOLLOW)?;
        self.lookup(parent, name)
    }

    /// Removes a name: of a folder with `AtFlags::REMOVEDIR`.
    pub fn remove(&self, parent: u64, name: &[u8], flags: AtFlags) -> Result<()> {
        self.writable()?;
        fs::unlinkat(&self.directory(parent)?.fd, component(name)?, flags)
    }

    /// Renames, or exchanges two names; `flags` are those of renameat2(2).
    pub fn rename(&self, from: (u64, &[u8]), to: (u64, &[u8]), flags: u32) -> Result<()> {
        self.writable()?;
        let flags = fs::RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        if flags.contains(fs::RenameFlags::WHITEOUT) {
            // It is a device.
            return Err(Errno::INVAL);
        }
        let (old, new) = (self.directory(from.0)?, self.directory(to.0)?);
        fs::renameat_with(&old.fd, component(from.1)?, &new.fd, component(to.1)?, flags)
    }

    /// Where a symbolic link leads.
    pub fn read_link(&self, number: u64) -> Result<Vec<u8>> {
        Ok(fs::readlinkat(&self.node(number)?.fd, "", Vec::new())?.into_bytes())
    }

    /// Sets attributes; `open` is the file if the guest has it open for writing.
    pub fn set_attr(&self, number: u64, new: &NewAttr, open: Option<BorrowedFd<'_>>) -> Result<Attr> {
        self.writable()?;
        let node = self.node(number)?;
        let has = |bit| new.valid & bit != 0;
        if has(fattr::MODE) {
            if node.kind == FileType::Symlink {
                return Err(Errno::OPNOTSUPP);
            }
            self.set_mode(node.fd.as_fd(), Mode::from_raw_mode(new.mode & 0o7777))?;
        }
        if has(fattr::UID) || has(fattr::GID) {
            let own = |id: u32, own: Option<u32>| if id == 0 { own.unwrap_or(0) } else { id };
            let user = has(fattr::UID).then(|| uid(own(new.uid, self.ids.map(|ids| ids.0)))).transpose()?;
            let group = has(fattr::GID).then(|| gid(own(new.gid, self.ids.map(|ids| ids.1)))).transpose()?;
            fs::chownat(&node.fd, "", user, group, AtFlags::EMPTY_PATH)?;
        }
        if has(fattr::SIZE) {
            match open {
                Some(open) => fs::ftruncate(open, new.size)?,
                None if node.kind == FileType::RegularFile => {
                    fs::ftruncate(self.open_node(number, OFlags::WRONLY)?, new.size)?;
                }
                None => return Err(Errno::INVAL),
            }
        }
        if has(fattr::KILL_SUIDGID) && node.kind == FileType::RegularFile {
            self.kill_suid_gid(node.fd.as_fd())?;
        }
        if has(fattr::ATIME) || has(fattr::MTIME) {
            let time = |set, now, (seconds, nanoseconds): (u64, u32)| Timespec {
                tv_sec: i64::from_le_bytes(seconds.to_le_bytes()),
                tv_nsec: if !has(set) {
                    fs::UTIME_OMIT
                } else if has(now) {
                    fs::UTIME_NOW
                } else {
                    nanoseconds.into()
                },
            };
            let times = Timestamps {
                last_access: time(fattr::ATIME, fattr::ATIME_NOW, new.times[0]),
                last_modification: time(fattr::MTIME, fattr::MTIME_NOW, new.times[1]),
            };
            fs::utimensat(&node.fd, "", &times, AtFlags::EMPTY_PATH)?;
        }
        self.attr(number)
    }

    /// Takes a file's set-user-id bit away, and the set-group-id bit where it means that. Linux does so by itself when a
    /// process without CAP_FSETID writes; ours may have it where the guest's has not.
    pub fn kill_suid_gid(&self, file: BorrowedFd<'_>) -> Result<()> {
        let mode = Mode::from_raw_mode(stat(file)?.st_mode);
        let group = if mode.contains(Mode::XGRP) { Mode::SGID } else { Mode::empty() };
        let kept = mode - Mode::SUID - group;
        if kept == mode { Ok(()) } else { self.set_mode(file, kept) }
    }

    /// The file system's figures.
    pub fn statfs(&self, number: u64) -> Result<fs::StatFs> {
        fs::fstatfs(&self.node(number)?.fd)
    }

    /// The value of an extended attribute, at most 64 KiB.
    pub fn get_xattr(&self, number: u64, name: &[u8]) -> Result<Vec<u8>> {
        let mut value = vec![0; 64 << 10];
        let name = xattr_name(name)?;
        let length = fs::fgetxattr(self.with_xattrs(number)?.ok_or(Errno::NODATA)?, name, &mut value)?;
        value.truncate(length);
        Ok(value)
    }

    /// The names of the extended attributes, each with a NUL byte at its end.
    pub fn list_xattr(&self, number: u64) -> Result<Vec<u8>> {
        let file = match self.with_xattrs(number) {
            Ok(Some(file)) => file,
            // The names may be asked for where the values may not be read.
            Ok(None) | Err(Errno::ACCESS) => return Ok(vec![]),
            Err(error) => return Err(error),
        };
        let mut names = vec![0; 64 << 10];
        let length = fs::flistxattr(file, &mut names)?;
        names.truncate(length);
        let ours = names.split_inclusive(|byte| *byte == 0).filter(|name| name.starts_with(USER_XATTR));
        Ok(ours.flatten().copied().collect())
    }

    /// Sets an extended attribute; `flags` are those of setxattr(2).
    pub fn set_xattr(&self, number: u64, name: &[u8], value: &[u8], flags: u32) -> Result<()> {
        self.writable()?;
        let flags = fs::XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let name = xattr_name(name)?;
        fs::fsetxattr(self.with_xattrs(number)?.ok_or(Errno::PERM)?, name, value, flags)
    }

    /// Removes an extended attribute.
    pub fn remove_xattr(&self, number: u64, name: &[u8]) -> Result<()> {
        self.writable()?;
        let name = xattr_name(name)?;
        fs::fremovexattr(self.with_xattrs(number)?.ok_or(Errno::PERM)?, name)
    }

    /// The file, open, if it is one that may have extended attributes of a user's (xattr(7)): there is no way to them by an
    /// O_PATH descriptor but a path.
    fn with_xattrs(&self, number: u64) -> Result<Option<OwnedFd>> {
        match self.node(number)?.kind {
            FileType::RegularFile => match self.open_node(number, OFlags::RDONLY) {
                // It may be one that can only be written to.
                Err(Errno::ACCESS) if !self.readonly => self.open_node(number, OFlags::WRONLY).map(Some),
                opened => opened.map(Some),
            },
            FileType::Directory => self.open_node(number, OFlags::RDONLY).map(Some),
            _ => Ok(None),
        }
    }
}

/// The extended attributes that mean nothing to the host: all others are left alone.
const USER_XATTR: &[u8] = b"user.";

fn xattr_name(name: &[u8]) -> Result<&[u8]> {
    if name.starts_with(USER_XATTR) { Ok(name) } else { Err(Errno::OPNOTSUPP) }
}

fn stat(fd: impl AsFd) -> Result<Stat> {
    fs::statat(fd, "", AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW)
}

/// The name of a descriptor in /proc/self/fd.
fn name_of(fd: BorrowedFd<'_>) -> DecInt {
    DecInt::from_fd(fd)
}

/// A name that is one step down.
fn component(name: &[u8]) -> Result<&[u8]> {
    match name {
        b"" | b"." | b".." => Err(Errno::INVAL),
        _ if name.contains(&b'/') => Err(Errno::INVAL),
        _ => Ok(name),
    }
}

fn open_below(parent: impl AsFd, name: &[u8], flags: OFlags, mode: Mode) -> Result<OwnedFd> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    // NO_SYMLINKS would refuse to open a link itself, even with O_PATH and O_NOFOLLOW: only its last step is left out.
    fs::openat2(parent, component(name)?, flags, mode, ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS)
}

fn uid(raw: u32) -> Result<Uid> {
    if raw == u32::MAX { Err(Errno::INVAL) } else { Ok(Uid::from_raw(raw)) }
}

fn gid(raw: u32) -> Result<Gid> {
    if raw == u32::MAX { Err(Errno::INVAL) } else { Ok(Gid::from_raw(raw)) }
}

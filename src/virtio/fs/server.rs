//! Answers FUSE requests from a [`Tree`].

use std::collections::{HashMap, VecDeque};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{self, AtFlags, FallocateFlags, FileType, OFlags, RawDir, SeekFrom};
use rustix::io::Errno;

use super::tree::{Caller, NewAttr, Slot, Tree};
use super::wire::{
    IN_HEADER, InHeader, OPEN_KILL_SUIDGID, OUT_HEADER, Reader, Reply, TooShort, VERSION, WRITE_KILL_SUIDGID, init, op,
};
use super::{MAX_WRITE, PAGE};
use crate::virtio::iovec::Iovecs;

/// How long the guest may take an answer for true that others on the host may make wrong, in seconds.
const VALID: u64 = 1;
/// The longest request without file data: two names, or a name and an extended attribute.
const MAX_REQUEST: usize = 80 << 10;
/// Bytes of directory entries read at once.
const ENTRIES: usize = 8 << 10;
/// The least bytes that an entry takes in an answer: `struct fuse_dirent` without a name.
const DIRENT: usize = 24;
/// The most files and folders that the guest may have open at once.
const MAX_OPEN: usize = 4096;

/// The server of one guest.
pub struct Server {
    tree: Tree,
    /// What the guest has open.
    handles: HashMap<u64, Open>,
    next_handle: u64,
    /// What the guest can do, which it said at first.
    started: bool,
}

/// The body of an answer.
enum Answer {
    /// These bytes.
    Bytes(Reply),
    /// As many bytes of file data, which are in the guest's buffers.
    Data(usize),
    /// The guest waits for none.
    None,
}

impl From<TooShort> for Errno {
    fn from(TooShort: TooShort) -> Self {
        Errno::INVAL
    }
}

impl Server {
    /// A server of `tree`.
    pub fn new(tree: Tree) -> Self {
        Self { tree, handles: HashMap::new(), next_handle: 1, started: false }
    }

    /// Forgets the guest.
    pub fn reset(&mut self) {
        self.tree.forget_all();
        self.handles.clear();
        self.started = false;
    }

    /// Answers the request in `request` with `reply`; how many bytes of that it wrote.
    pub fn serve(&mut self, request: &mut Iovecs, reply: &mut Iovecs) -> u32 {
        let room = reply.bytes();
        let mut header = [0; IN_HEADER];
        if request.bytes() < IN_HEADER {
            return 0;
        }
        request.read(0, &mut header);
        request.advance(IN_HEADER);
        let Ok(header) = Reader::new(&header).header() else { return 0 };
        let mut front = reply.same_memory();
        reply.split_front(OUT_HEADER, &mut front);
        let (error, body) = match self.answer(&header, request, reply) {
            Ok(Answer::None) => return 0,
            Ok(Answer::Data(length)) => (0, length),
            Ok(Answer::Bytes(Reply(bytes))) if bytes.len() <= reply.bytes() => {
                reply.write(0, &bytes);
                (0, bytes.len())
            }
            Ok(Answer::Bytes(_)) => (Errno::IO.raw_os_error(), 0),
            Err(error) => (error.raw_os_error(), 0),
        };
        if room < OUT_HEADER {
            return 0;
        }
        let length = u32::try_from(OUT_HEADER + body).expect("an answer is shorter than 4 GiB");
        let mut out = Reply::default();
        out.u32(length).bytes(&(-error).to_le_bytes()).u64(header.unique);
        front.write(0, &out.0);
        length
    }

    fn answer(&mut self, header: &InHeader, request: &mut Iovecs, reply: &mut Iovecs) -> Result<Answer, Errno> {
        if header.opcode == op::WRITE {
            return self.write(request);
        }
        if request.bytes() > MAX_REQUEST {
            return Err(Errno::INVAL);
        }
        let mut bytes = vec![0; request.bytes()];
        request.read(0, &mut bytes);
        let mut args = Reader::new(&bytes);
        if header.opcode == op::READ {
            return self.read(&mut args, reply);
        }
        let room = reply.bytes();
        let (args, node) = (&mut args, header.node);
        let caller = Caller { uid: header.uid, gid: header.gid };
        let mut out = Reply::default();
        match header.opcode {
            op::INIT => self.init(args, &mut out)?,
            _ if !self.started => return Err(Errno::INVAL),
            op::DESTROY => self.reset(),
            op::FORGET => {
                self.tree.forget(node, args.u64()?);
                return Ok(Answer::None);
            }
            op::BATCH_FORGET => {
                let count = args.u64()?;
                for _ in 0..u32::try_from(count & 0xffff_ffff).expect("32 bits") {
                    let (node, lookups) = (args.u64()?, args.u64()?);
                    self.tree.forget(node, lookups);
                }
                return Ok(Answer::None);
            }
            // Every request is answered before the next is looked at.
            op::INTERRUPT => return Ok(Answer::None),
            op::LOOKUP => entry(&mut out, self.tree.lookup(node, args.text()?)?),
            op::GETATTR => drop(out.attr_out(VALID, &self.tree.attr(node)?)),
            op::SETATTR => self.set_attr(node, args, &mut out)?,
            op::READLINK => drop(out.bytes(&self.tree.read_link(node)?)),
            op::SYMLINK => {
                let (name, target) = (args.text()?, args.text()?);
                entry(&mut out, self.tree.make_link(node, name, target, caller)?);
            }
            op::MKNOD => {
                let mode = args.u32()?;
                args.skip(12)?;
                entry(&mut out, self.tree.make_node(node, args.text()?, mode, caller)?);
            }
            op::MKDIR => {
                let mode = args.u32()?;
                args.skip(4)?;
                entry(&mut out, self.tree.make_directory(node, args.text()?, mode, caller)?);
            }
            op::UNLINK => self.tree.remove(node, args.text()?, AtFlags::empty())?,
            op::RMDIR => self.tree.remove(node, args.text()?, AtFlags::REMOVEDIR)?,
            op::RENAME | op::RENAME2 => {
                let to = args.u64()?;
                let flags = if header.opcode == op::RENAME2 { (args.u32()?, args.skip(4)?).0 } else { 0 };
                let (old, new) = (args.text()?, args.text()?);
                self.tree.rename((node, old), (to, new), flags)?;
            }
            op::LINK => {
                let old = args.u64()?;
                entry(&mut out, self.tree.link(old, node, args.text()?)?);
            }
            op::OPEN | op::OPENDIR => {
                let (flags, kill) = (open_flags(args.u32()?), args.u32()? & OPEN_KILL_SUIDGID != 0);
                let directory = if header.opcode == op::OPENDIR { OFlags::DIRECTORY } else { OFlags::empty() };
                let fd = self.tree.open_node(node, flags | directory)?;
                if kill && flags.contains(OFlags::TRUNC) {
                    self.tree.kill_suid_gid(fd.as_fd())?;
                }
                out.open(self.keep(fd)?);
            }
            op::CREATE => {
                let (flags, mode) = (args.u32()?, args.u32()?);
                args.skip(8)?;
                let excl = OFlags::from_bits_retain(flags) & OFlags::EXCL;
                let (node, attr, fd) = self.tree.create(node, args.text()?, open_flags(flags) | excl, mode, caller)?;
                entry(&mut out, (node, attr));
                out.open(self.keep(fd)?);
            }
            op::RELEASE | op::RELEASEDIR => drop(self.handles.remove(&args.u64()?)),
            op::FSYNC | op::FSYNCDIR => {
                let (fd, flags) = (self.handle(args.u64()?)?, args.u32()?);
                if flags & 1 != 0 { fs::fdatasync(fd) } else { fs::fsync(fd) }?;
            }
            op::STATFS => statfs(&mut out, &self.tree.statfs(node)?),
            op::SETXATTR => {
                let (size, flags) = (args.u32()?, args.u32()?);
                let name = args.text()?;
                self.tree.set_xattr(node, name, args.bytes(size as usize)?, flags)?;
            }
            op::GETXATTR => {
                let (size, _) = (args.u32()?, args.u32()?);
                sized(&mut out, &self.tree.get_xattr(node, args.text()?)?, size)?;
            }
            op::LISTXATTR => {
                let size = args.u32()?;
                sized(&mut out, &self.tree.list_xattr(node)?, size)?;
            }
            op::REMOVEXATTR => self.tree.remove_xattr(node, args.text()?)?,
            op::READDIR | op::READDIRPLUS => {
                let plus = header.opcode == op::READDIRPLUS;
                self.read_directory(node, args, room, plus, &mut out)?;
            }
            op::FALLOCATE => {
                let fd = self.handle(args.u64()?)?;
                let (offset, length, mode) = (args.u64()?, args.u64()?, args.u32()?);
                fs::fallocate(fd, FallocateFlags::from_bits(mode).ok_or(Errno::OPNOTSUPP)?, offset, length)?;
            }
            op::LSEEK => {
                let fd = self.handle(args.u64()?)?;
                let (offset, whence) = (args.u64()?, args.u32()?);
                let to = match i32::try_from(whence) {
                    Ok(libc::SEEK_DATA) => SeekFrom::Data(offset),
                    Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset),
                    _ => return Err(Errno::INVAL),
                };
                out.u64(fs::seek(fd, to)?);
            }
            // FLUSH among them, which the guest then leaves out: there is nothing to do when a file is closed.
            _ => return Err(Errno::NOSYS),
        }
        Ok(Answer::Bytes(out))
    }

    fn init(&mut self, args: &mut Reader<'_>, out: &mut Reply) -> Result<(), Errno> {
        let (major, minor) = (args.u32()?, args.u32()?);
        if (major, minor) < VERSION {
            return Err(Errno::PROTO);
        }
        let (readahead, flags) = (args.u32()?, args.u32()?);
        let wanted = init::ASYNC_READ
            | init::ATOMIC_O_TRUNC
            | init::BIG_WRITES
            | init::DO_READDIRPLUS
            | init::READDIRPLUS_AUTO
            | init::PARALLEL_DIROPS
            | init::MAX_PAGES
            | init::HANDLE_KILLPRIV_V2;
        self.reset();
        self.started = true;
        out.u32(VERSION.0).u32(VERSION.1).u32(readahead).u32(flags & wanted);
        // max_background, congestion_threshold, max_write, time_gran.
        out.u16(64).u16(48).u32(MAX_WRITE).u32(1);
        // max_pages, map_alignment, flags2, max_stack_depth, unused.
        out.u16(u16::try_from(MAX_WRITE / PAGE).expect("256")).u16(0).u32(0).bytes(&[0; 28]);
        Ok(())
    }

    fn keep(&mut self, fd: OwnedFd) -> Result<u64, Errno> {
        if self.handles.len() >= MAX_OPEN {
            return Err(Errno::NFILE);
        }
        let slot = Slot::take()?;
        let handle = self.next_handle;
        self.next_handle += 1;
        self.handles.insert(handle, Open { fd, entries: VecDeque::new(), position: 0, _slot: slot });
        Ok(handle)
    }

    fn handle(&self, handle: u64) -> Result<&OwnedFd, Errno> {
        self.handles.get(&handle).map(|open| &open.fd).ok_or(Errno::BADF)
    }

    fn set_attr(&mut self, node: u64, args: &mut Reader<'_>, out: &mut Reply) -> Result<(), Errno> {
        let (valid, _, handle, size) = (args.u32()?, args.u32()?, args.u64()?, args.u64()?);
        args.skip(8)?;
        let (atime, mtime, _) = (args.u64()?, args.u64()?, args.u64()?);
        let (atime_nsec, mtime_nsec, _) = (args.u32()?, args.u32()?, args.u32()?);
        let (mode, _, uid, gid) = (args.u32()?, args.u32()?, args.u32()?, args.u32()?);
        let times = [(atime, atime_nsec), (mtime, mtime_nsec)];
        let open = (valid & super::wire::fattr::FH != 0).then(|| self.handle(handle)).transpose()?;
        let new = NewAttr { valid, mode, uid, gid, size, times };
        out.attr_out(VALID, &self.tree.set_attr(node, &new, open.map(AsFd::as_fd))?);
        Ok(())
    }

    fn read(&mut self, args: &mut Reader<'_>, reply: &mut Iovecs) -> Result<Answer, Errno> {
        let (fd, offset, size) = (self.handle(args.u64()?)?, args.u64()?, args.u32()?);
        reply.limit(size.min(MAX_WRITE) as usize);
        let mut done = 0;
        while reply.bytes() > 0 {
            match reply.preadv(fd, offset.saturating_add(done as u64)) {
                Ok(0) => break,
                Ok(count) => {
                    done += count;
                    reply.advance(count);
                }
                Err(_) if done > 0 => break,
                Err(error) => return Err(from_host(&error)),
            }
        }
        Ok(Answer::Data(done))
    }

    fn write(&mut self, request: &mut Iovecs) -> Result<Answer, Errno> {
        let mut bytes = [0; 40];
        request.read(0, &mut bytes);
        let mut args = Reader::new(&bytes[..request.bytes().min(40)]);
        let (fd, offset, size, flags) = (self.handle(args.u64()?)?, args.u64()?, args.u32()?, args.u32()?);
        args.skip(16)?;
        request.advance(bytes.len());
        if size > MAX_WRITE || request.bytes() < size as usize {
            return Err(Errno::INVAL);
        }
        if flags & WRITE_KILL_SUIDGID != 0 {
            // Who may not write changes nothing.
            if !fs::fcntl_getfl(fd)?.intersects(OFlags::WRONLY | OFlags::RDWR) {
                return Err(Errno::BADF);
            }
            self.tree.kill_suid_gid(fd.as_fd())?;
        }
        request.limit(size as usize);
        let mut done = 0u32;
        while request.bytes() > 0 {
            match request.pwritev(fd, offset.saturating_add(done.into())) {
                Ok(0) => break,
                Ok(count) => {
                    done += u32::try_from(count).map_err(|_| Errno::IO)?;
                    request.advance(count);
                }
                Err(_) if done > 0 => break,
                Err(error) => return Err(from_host(&error)),
            }
        }
        let mut out = Reply::default();
        out.u32(done).u32(0);
        Ok(Answer::Bytes(out))
    }

    /// Adds as many entries as have room; with `plus` the guest now knows them all.
    fn read_directory(
        &mut self,
        node: u64,
        args: &mut Reader<'_>,
        room: usize,
        plus: bool,
        out: &mut Reply,
    ) -> Result<(), Errno> {
        let (handle, offset, size) = (args.u64()?, args.u64()?, args.u32()?);
        let open = self.handles.get_mut(&handle).ok_or(Errno::BADF)?;
        if offset != open.position {
            open.entries.clear();
            open.position = fs::seek(&open.fd, SeekFrom::Start(offset))?;
        }
        let room = room.min(size as usize).min(MAX_WRITE as usize);
        if room < DIRENT {
            return Ok(());
        }
        loop {
            if open.entries.is_empty() {
                open.read_entries()?;
            }
            let Some(found) = open.entries.front() else { return Ok(()) };
            let dirent = (DIRENT + found.name.len()).next_multiple_of(8);
            if out.0.len() + dirent + if plus { 128 } else { 0 } > room {
                return Ok(());
            }
            let dots = found.name == b"." || found.name == b"..";
            if plus && dots {
                // Node 0: not looked up.
                out.bytes(&[0; 128]);
            } else if plus {
                match self.tree.lookup(node, &found.name) {
                    Ok(looked_up) => entry(out, looked_up),
                    // Gone in the meantime.
                    Err(Errno::NOENT) => {
                        open.entries.pop_front();
                        continue;
                    }
                    Err(error) if out.0.is_empty() => return Err(error),
                    Err(_) => return Ok(()),
                }
            }
            out.dirent(found.ino, found.next, found.kind.into(), &found.name);
            open.position = found.next;
            open.entries.pop_front();
        }
    }
}

/// What the guest has open.
struct Open {
    fd: OwnedFd,
    /// Of a directory: entries that were read and that the guest has not asked for yet. To read them once more would
    /// leave some out where positions are counts, as on tmpfs, when others were removed.
    entries: VecDeque<Entry>,
    /// The position after the last entry that the guest got.
    position: u64,
    _slot: Slot,
}

/// A directory entry.
struct Entry {
    ino: u64,
    /// The position after it.
    next: u64,
    kind: u8,
    name: Vec<u8>,
}

impl Open {
    /// Reads some entries, if there are more.
    fn read_entries(&mut self) -> Result<(), Errno> {
        let mut buffer = vec![MaybeUninit::uninit(); ENTRIES];
        let mut found = RawDir::new(&self.fd, &mut buffer);
        while let Some(entry) = found.next() {
            let entry = entry?;
            self.entries.push_back(Entry {
                ino: entry.ino(),
                next: entry.next_entry_cookie(),
                kind: kind_number(entry.file_type()),
                name: entry.file_name().to_bytes().to_vec(),
            });
            if found.is_buffer_empty() {
                break;
            }
        }
        Ok(())
    }
}

/// `DT_*`.
fn kind_number(kind: FileType) -> u8 {
    match kind {
        FileType::Fifo => libc::DT_FIFO,
        FileType::CharacterDevice => libc::DT_CHR,
        FileType::Directory => libc::DT_DIR,
        FileType::BlockDevice => libc::DT_BLK,
        FileType::RegularFile => libc::DT_REG,
        FileType::Symlink => libc::DT_LNK,
        FileType::Socket => libc::DT_SOCK,
        FileType::Unknown => libc::DT_UNKNOWN,
    }
}

/// Those of the guest's open flags that mean something here. The guest appends, and caches, by itself.
fn open_flags(flags: u32) -> OFlags {
    let kept = OFlags::WRONLY | OFlags::RDWR | OFlags::TRUNC | OFlags::SYNC | OFlags::DSYNC;
    OFlags::from_bits_retain(flags) & kept
}

fn entry(out: &mut Reply, (node, attr): (u64, super::wire::Attr)) {
    out.entry(VALID, node, &attr);
}

/// An extended attribute's bytes, or with a `size` of 0 how many there are: `struct fuse_getxattr_out`.
fn sized(out: &mut Reply, bytes: &[u8], size: u32) -> Result<(), Errno> {
    if size == 0 {
        out.u32(u32::try_from(bytes.len()).map_err(|_| Errno::RANGE)?).u32(0);
    } else if bytes.len() > size as usize {
        return Err(Errno::RANGE);
    } else {
        out.bytes(bytes);
    }
    Ok(())
}

/// `struct fuse_kstatfs`.
fn statfs(out: &mut Reply, host: &fs::StatFs) {
    let small = |value: i64| u32::try_from(value).unwrap_or(4096);
    out.u64(host.f_blocks).u64(host.f_bfree).u64(host.f_bavail).u64(host.f_files).u64(host.f_ffree);
    out.u32(small(host.f_bsize)).u32(small(host.f_namelen)).u32(small(host.f_frsize)).bytes(&[0; 28]);
}

fn from_host(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

//! Requests under way at the same time, by io_uring(7): all that a kick brings is given to the kernel by one system call, and
//! what is done is found in memory.
//!
//! Operations of a ring pass no seccomp filter. So the ring itself is restricted before it is used: to reading, writing and
//! flushing the file that is registered with it.

#![expect(unsafe_code, reason = "hands pointers into guest memory to the kernel")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use io_uring::register::Restriction;
use io_uring::squeue::Flags;
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode};
use vm_memory::GuestAddress;

use crate::memory::GuestRam;
use crate::virtio::iovec::Iovecs;

/// `IORING_REGISTER_FILES_UPDATE`.
const REGISTER_FILES_UPDATE: u8 = 6;
/// How often the kernel is asked again to take requests that it has no memory for at the moment.
const TRIES_MAX: u32 = 100_000;

/// What a request is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// To fill its buffers.
    Read,
    /// To write them.
    Write,
    /// To have all that was written on the disk.
    Flush,
}

/// A driver's request.
#[derive(Clone, Copy)]
pub struct Request {
    /// The queue that it came by, and its chain there.
    pub queue: usize,
    pub head: u16,
    /// Where its status goes.
    pub status_at: GuestAddress,
    /// The bytes before that which the device may write.
    pub room: u64,
}

/// A request that is done by the ring.
pub struct Job {
    pub kind: Kind,
    pub request: Request,
    /// What of its buffers is left to do, from byte `offset` of the file on. Empty for a flush.
    pub buffers: Iovecs,
    pub offset: u64,
    /// How many bytes of data it has, and how many of them are done.
    pub len: u64,
    pub done: u64,
}

/// A ring for one file, and the requests that are under way in it.
pub struct Uring {
    ring: IoUring,
    /// Those under way, by what the ring has as their names.
    jobs: Vec<Option<Job>>,
    free: Vec<usize>,
    /// Buffer lists for the next ones.
    spare: Vec<Iovecs>,
    /// Whether the kernel has not been told of all yet.
    queued: bool,
    len: usize,
}

impl Uring {
    /// A ring for as many as `entries` requests on `file`, which takes no more operations than it needs.
    ///
    /// # Errors
    /// When the host has no io_uring, or none for this process.
    pub fn new(file: &File, entries: u16) -> io::Result<Self> {
        let build = |cooperative: bool| {
            let mut builder = IoUring::builder();
            builder.setup_r_disabled();
            if cooperative {
                // Since Linux 5.19: what is done is not announced by interrupting the thread.
                builder.setup_coop_taskrun();
            }
            builder.build(entries.into())
        };
        let ring = build(true).or_else(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => build(false),
            _ => Err(error),
        })?;
        let submitter = ring.submitter();
        submitter.register_files(&[file.as_raw_fd()])?;
        let fixed = Flags::FIXED_FILE.bits();
        submitter.register_restrictions(&mut [
            Restriction::sqe_op(opcode::Read::CODE),
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Write::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_flags_allowed(fixed),
            Restriction::sqe_flags_required(fixed),
            Restriction::register_op(REGISTER_FILES_UPDATE),
        ])?;
        submitter.register_enable_rings()?;
        let entries = usize::from(entries);
        let free = (0..entries).rev().collect();
        let jobs = (0..entries).map(|_| None).collect();
        Ok(Self { ring, jobs, free, spare: vec![], queued: false, len: 0 })
    }

    /// Works on `file` from now on, while nothing is under way.
    pub fn set_file(&mut self, file: &File) -> io::Result<()> {
        self.ring.submitter().register_files_update(0, &[file.as_raw_fd()]).map(drop)
    }

    /// How many requests are under way.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the kernel has not been told of all that was begun.
    pub fn is_queued(&self) -> bool {
        self.queued
    }

    /// An empty list of buffers in `ram`, which is the same each time.
    pub fn spare(&mut self, ram: &GuestRam) -> Iovecs {
        self.spare.pop().unwrap_or_else(|| Iovecs::short(ram))
    }

    /// Takes a list of buffers back.
    pub fn put_back(&mut self, mut buffers: Iovecs) {
        buffers.clear();
        self.spare.push(buffers);
    }

    /// Begins a request; the kernel hears of it with the next [`submit`](Self::submit). There are no more
    /// of them than the ring has entries.
    pub fn begin(&mut self, job: Job) {
        let index = self.free.pop().expect("the caller has no more than there are entries");
        self.len += 1;
        self.jobs[index] = Some(job);
        self.push(index);
    }

    fn push(&mut self, index: usize) {
        let job = self.jobs[index].as_ref().expect("a request that was begun");
        let (file, offset) = (Fixed(0), job.offset);
        let list = job.buffers.list();
        let count = u32::try_from(list.len()).expect("a list is bounded");
        let entry = match (job.kind, list) {
            (Kind::Flush, _) => opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build(),
            (Kind::Read, [one]) => opcode::Read::new(file, one.iov_base.cast(), len(one)).offset(offset).build(),
            (Kind::Write, [one]) => opcode::Write::new(file, one.iov_base.cast(), len(one)).offset(offset).build(),
            (Kind::Read, _) => opcode::Readv::new(file, list.as_ptr(), count).offset(offset).build(),
            (Kind::Write, _) => opcode::Writev::new(file, list.as_ptr(), count).offset(offset).build(),
        };
        let entry = entry.user_data(index as u64);
        // SAFETY: the buffers are guest memory, which the list keeps mapped, and neither the list nor its memory goes before
        // the kernel is done with the request (`reap`, `drop`).
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("the ring has an entry for each request");
        self.queued = true;
    }

    /// Tells the kernel of what was begun.
    pub fn submit(&mut self) -> io::Result<()> {
        // What a fuzz target has done is done when the device rests.
        let want = if cfg!(fuzzing) { self.len } else { 0 };
        if self.queued { self.enter(want) } else { Ok(()) }
    }

    /// Does the same, and waits until a request is done, if there is one.
    pub fn wait(&mut self) -> io::Result<()> {
        if self.len == 0 { Ok(()) } else { self.enter(1) }
    }

    fn enter(&mut self, want: usize) -> io::Result<()> {
        let mut tries = 0;
        loop {
            match self.ring.submit_and_wait(want) {
                // It stops at one that it cannot take, and at a signal.
                Ok(_) if !self.ring.submission().is_empty() || self.ring.completion().len() < want => {}
                Ok(_) => {
                    self.queued = false;
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // For want of memory, at the moment; or for want of room for what is done, which is then to be taken.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                    if !self.ring.completion().is_empty() {
                        return Ok(());
                    }
                    tries += 1;
                    if tries == TRIES_MAX {
                        return Err(error);
                    }
                    std::thread::yield_now();
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// A request that is done, with what came of it. One that was done in part is begun again.
    pub fn reap(&mut self) -> Option<(Job, io::Result<()>)> {
        loop {
            let entry = self.ring.completion().next()?;
            let index = usize::try_from(entry.user_data()).expect("an index of ours");
            let job = self.jobs[index].as_mut().expect("each request is done once");
            let result = match u32::try_from(entry.result()) {
                Err(_) if -entry.result() == libc::EINTR => None,
                Err(_) => Some(Err(io::Error::from_raw_os_error(-entry.result()))),
                Ok(_) if job.kind == Kind::Flush => Some(Ok(())),
                Ok(count) => {
                    job.buffers.advance(count as usize);
                    job.offset += u64::from(count);
                    job.done += u64::from(count);
                    match (count, job.kind) {
                        _ if job.buffers.is_empty() => Some(Ok(())),
                        // The file was larger when it was opened.
                        (0, Kind::Read) => Some(Err(io::ErrorKind::UnexpectedEof.into())),
                        (0, _) => Some(Err(io::ErrorKind::WriteZero.into())),
                        _ => None,
                    }
                }
            };
            match result {
                Some(result) => {
                    let job = self.jobs[index].take()?;
                    self.free.push(index);
                    self.len -= 1;
                    return Some((job, result));
                }
                None => self.push(index),
            }
        }
    }
}

fn len(one: &libc::iovec) -> u32 {
    u32::try_from(one.iov_len).expect("a request is bounded")
}

impl AsFd for Uring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring is open for as long as it is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        while self.len > 0 {
            if self.wait().is_err() {
                // The kernel still has them.
                std::mem::forget(std::mem::take(&mut self.jobs));
                return;
            }
            while self.reap().is_some() {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::Bytes;

    use super::*;

    /// A ring for a file of 64 KiB that counts its pages, and the file; `None` where there is no io_uring.
    fn ring() -> Option<(Uring, File)> {
        let file = tempfile::tempfile().unwrap();
        (0..16).for_each(|page: u8| file.write_all_at(&[page; 4096], u64::from(page) * 4096).unwrap());
        match Uring::new(&file, 32) {
            Ok(ring) => Some((ring, file)),
            Err(error) => {
                eprintln!("skipped: {error}");
                None
            }
        }
    }

    fn job(ring: &mut Uring, ram: &GuestRam, kind: Kind, page: u8, len: u32) -> Job {
        let mut buffers = ring.spare(ram);
        buffers.push(GuestAddress(u64::from(page) * 4096), len).unwrap();
        let request = Request { queue: 0, head: page.into(), status_at: GuestAddress(0), room: 0 };
        Job { kind, request, buffers, offset: u64::from(page) * 4096, len: len.into(), done: 0 }
    }

    #[test]
    fn many_requests_are_one_submission() {
        let Some((mut ring, file)) = ring() else { return };
        let ram = crate::memory::reserve(&[0..0x10000]).unwrap();
        for page in 0..16 {
            let job = job(&mut ring, &ram, Kind::Read, page, 4096);
            ring.begin(job);
        }
        assert_eq!((ring.len(), ring.is_queued()), (16, true));
        ring.submit().unwrap();
        assert!(!ring.is_queued());
        let mut heads = vec![];
        while ring.len() > 0 {
            ring.wait().unwrap();
            while let Some((job, result)) = ring.reap() {
                result.unwrap();
                heads.push(job.request.head);
                ring.put_back(job.buffers);
            }
        }
        heads.sort_unstable();
        assert_eq!(heads, (0..16).collect::<Vec<_>>());
        for page in 0..16u8 {
            let mut read = [0xff; 4096];
            ram.read_slice(&mut read, GuestAddress(u64::from(page) * 4096)).unwrap();
            assert_eq!(read, [page; 4096]);
        }
        // One that ends early, and one of nothing.
        file.set_len(4096 + 100).unwrap();
        let read = job(&mut ring, &ram, Kind::Read, 1, 4096);
        ring.begin(read);
        while ring.len() > 0 {
            ring.wait().unwrap();
            while let Some((job, result)) = ring.reap() {
                assert_eq!((job.done, result.unwrap_err().kind()), (100, io::ErrorKind::UnexpectedEof));
            }
        }
    }

    #[test]
    fn a_ring_does_nothing_but_what_it_is_for() {
        use std::os::fd::RawFd;

        let Some((mut ring, file)) = ring() else { return };
        let mut result = |entry: io_uring::squeue::Entry| {
            // SAFETY: it has no buffer, or is refused before.
            unsafe { ring.ring.submission().push(&entry) }.unwrap();
            ring.ring.submit_and_wait(1).unwrap();
            ring.ring.completion().next().unwrap().result()
        };
        let fd: RawFd = file.as_raw_fd();
        let any = io_uring::types::Fd(fd);
        assert_eq!(result(opcode::Nop::new().build()), -libc::EACCES);
        assert_eq!(result(opcode::Fsync::new(any).build()), -libc::EACCES, "a file that is not registered");
        let linked = opcode::Fsync::new(Fixed(0)).build().flags(Flags::IO_LINK);
        assert_eq!(result(linked), -libc::EACCES);
        assert_eq!(result(opcode::Close::new(Fixed(0)).build()), -libc::EACCES);
        assert_eq!(result(opcode::Fsync::new(Fixed(1)).build()), -libc::EBADF);
        assert_eq!(result(opcode::Fsync::new(Fixed(0)).build()), 0);
        let error = ring.ring.submitter().register_files(&[fd]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EACCES));
        ring.set_file(&file).unwrap();
    }
}

//! Copying guest memory to the `memory` file of a snapshot, by a child process.
//!
//! The child has guest memory as it was at the fork, copy-on-write, so the guest goes on while it is written. It is a copy of a
//! process of many threads, of which it has one: it takes no lock, allocates nothing, and makes system calls only. What it
//! works on was prepared before.

#![expect(unsafe_code, reason = "clone(2) without a signal at the end; guest memory goes to the kernel by its address")]

use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{self, Pid, Signal, WaitId, WaitIdOptions};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::GuestRam;

pub const PAGE: u64 = 4096;
/// Entries of /proc/self/pagemap that are read at once.
const ENTRIES: usize = 512;
/// An entry: the page is in memory, or swapped out.
const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
const SWAPPED: u64 = 1 << 62;
/// It is a page of a file, and no copy of one.
const OF_A_FILE: u64 = 1 << 61;

/// Which pages of guest memory are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// Those that are not all zeros.
    Used,
    /// Those that were ever used, also when they are all zeros.
    Touched,
    /// Those that are other than in the files which guest memory was mapped from.
    Changed,
}

/// Runs of pages: the number of the first, counted from the beginning of the file, and how many.
pub type Runs = Vec<(u64, u64)>;

/// Guest memory that is to be written, region after region.
#[derive(Debug)]
pub struct Source {
    /// Keeps the pages mapped.
    _ram: GuestRam,
    regions: Vec<Region>,
    /// Where what was never touched need not be zeros, by ascending address: files are mapped there.
    mapped: Vec<Range<u64>>,
    pages: Pages,
    /// Whether a child has all of it.
    is_private: bool,
}

#[derive(Debug)]
struct Region {
    /// In this process.
    address: u64,
    len: u64,
    /// In the file.
    offset: u64,
}

impl Source {
    /// Looks where guest memory is.
    pub fn new(ram: &GuestRam, pages: Pages) -> Self {
        let mut offset = 0;
        let region = |region: &<GuestRam as GuestMemoryBackend>::R| {
            let found = Region { address: region.as_ptr() as u64, len: region.len(), offset };
            offset += found.len;
            found
        };
        let regions = ram.iter().map(region).collect();
        let is_private = ram.iter().all(|region| region.flags() & libc::MAP_SHARED == 0);
        let everything = 0..u64::MAX;
        let mapped = mapped_files().unwrap_or_else(|| vec![everything]);
        Self { _ram: ram.clone(), regions, mapped, pages, is_private }
    }

    /// Knows that pages come from another process when they are first used, which a child could not wait for.
    pub fn served(mut self) -> Self {
        if self.pages != Pages::Changed {
            (self.mapped, self.is_private) = (vec![0..u64::MAX], false);
        }
        self
    }

    /// The length of the file.
    fn len(&self) -> u64 {
        self.regions.last().map_or(0, |region| region.offset + region.len)
    }

    /// Writes the pages to `file`, which is empty, while nobody changes them.
    ///
    /// # Errors
    /// When the host does not write them, or does not tell which have changed.
    pub fn copy(&self, file: &File) -> io::Result<Runs> {
        let mut runs = Runs::new();
        self.write(file.as_fd(), &mut |first, count| {
            append(&mut runs, first, count);
            Ok(())
        })?;
        Ok(runs)
    }

    /// Has a child process write the pages as they are now. All signals are blocked in this thread: they are in the child.
    ///
    /// # Errors
    /// When the host does not make the process.
    pub fn fork(&self, file: &File) -> io::Result<Child> {
        if !self.is_private {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        let parent = process::getpid();
        const NONE: libc::c_long = 0;
        let (flags, mut pidfd) = (libc::c_long::from(libc::CLONE_PIDFD), RawFd::from(-1));
        // Without a signal for its end, nobody else in this process learns of the child, or waits for it.
        // SAFETY: like fork(2), this gives the child a copy of all memory, its stack among it. The child only makes system
        // calls on what it finds, and ends without returning. `pidfd` is there for the answer.
        let pid = unsafe { libc::syscall(libc::SYS_clone, flags, NONE, &raw mut pidfd, NONE, NONE) };
        match pid {
            -1 => Err(io::Error::last_os_error()),
            0 => self.be_child(parent, file.as_raw_fd(), writer.as_fd()),
            _ => {
                // SAFETY: clone has just made it, for this thread.
                let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
                Ok(Child { pidfd, has_ended: false, reader: reader.into() })
            }
        }
    }

    /// The life of the child.
    fn be_child(&self, parent: Pid, file: RawFd, runs: BorrowedFd<'_>) -> ! {
        let written = || -> Result<(), Errno> {
            process::set_parent_process_death_signal(Some(Signal::KILL))?;
            if process::getppid() != Some(parent) {
                return Err(Errno::SRCH);
            }
            close_others(file, runs.as_raw_fd());
            // SAFETY: it is the parent's, which was open at the fork, and was not closed since.
            let file = unsafe { BorrowedFd::borrow_raw(file) };
            self.write(file, &mut |first, count| {
                if self.pages != Pages::Changed {
                    return Ok(());
                }
                let run = first.to_ne_bytes().into_iter().chain(count.to_ne_bytes());
                let mut bytes = [0; 16];
                bytes.iter_mut().zip(run).for_each(|(to, from)| *to = from);
                // Whole: it is less than what a pipe takes at once.
                rustix::io::write(runs, &bytes).map(drop)
            })
        };
        let status = written().err().map_or(0, Errno::raw_os_error);
        loop {
            // SAFETY: ends the process, which has nothing to clean up.
            unsafe { libc::syscall(libc::SYS_exit_group, status) };
        }
    }

    /// Writes the pages, and tells `found` of each run of them. Without a lock or an allocation.
    fn write(&self, file: BorrowedFd<'_>, found: &mut dyn FnMut(u64, u64) -> Result<(), Errno>) -> Result<(), Errno> {
        rustix::fs::ftruncate(file, self.len())?;
        let pagemap = rustix::fs::open(c"/proc/self/pagemap", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        if self.pages == Pages::Changed {
            pagemap.as_ref().map_err(|error| *error)?;
        }
        for region in &self.regions {
            let mut mapped = self.mapped.iter().peekable();
            // From the first page of a run to behind its last.
            let mut run = region.address..region.address;
            let mut flush = |run: &Range<u64>| {
                if run.is_empty() {
                    return Ok(());
                }
                let offset = region.offset + (run.start - region.address);
                write_run(file, run, offset)?;
                found(offset / PAGE, (run.end - run.start) / PAGE)
            };
            let end = region.address + region.len;
            let mut entries = [0; ENTRIES * 8];
            for chunk in (region.address..end).step_by(ENTRIES * 4096) {
                let pages = (chunk..end).step_by(4096).take(ENTRIES);
                let known = match &pagemap {
                    Ok(pagemap) => {
                        let left = usize::try_from((end - chunk) / PAGE).unwrap_or(ENTRIES);
                        let len = 8 * left.min(ENTRIES);
                        let read = rustix::io::pread(pagemap, &mut entries[..len], chunk / PAGE * 8);
                        read.and_then(|read| if read == len { Ok(()) } else { Err(Errno::IO) })
                    }
                    Err(error) => Err(*error),
                };
                if self.pages == Pages::Changed {
                    known?;
                }
                for (page, entry) in pages.zip(entries.chunks_exact(8)) {
                    while mapped.next_if(|range| range.end <= page).is_some() {}
                    let is_mapped = mapped.peek().is_some_and(|range| range.start <= page);
                    let entry = known.ok().and(entry.try_into().ok()).map_or(u64::MAX, u64::from_ne_bytes);
                    let is_wanted = match self.pages {
                        Pages::Used => (is_mapped || entry & PRESENT_OR_SWAPPED != 0) && !is_zero(page),
                        Pages::Touched => is_mapped || entry & PRESENT_OR_SWAPPED != 0,
                        Pages::Changed => entry & PRESENT_OR_SWAPPED != 0 && entry & (SWAPPED | OF_A_FILE) != OF_A_FILE,
                    };
                    if is_wanted && run.end == page {
                        run.end += PAGE;
                    } else if is_wanted {
                        flush(&run)?;
                        run = page..page + PAGE;
                    }
                }
            }
            flush(&run)?;
        }
        Ok(())
    }
}

/// A child process that writes guest memory. It is killed when this is dropped.
#[derive(Debug)]
pub struct Child {
    pidfd: OwnedFd,
    has_ended: bool,
    /// Where it tells what it has written.
    reader: File,
}

impl Child {
    /// Waits until all is written; which pages those are, if that is asked.
    ///
    /// # Errors
    /// When they are not.
    pub fn wait(mut self) -> io::Result<Runs> {
        let mut runs = Runs::new();
        let mut run = [0; 16];
        loop {
            match self.reader.read_exact(&mut run) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
                read => read?,
            }
            let number = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_ne_bytes);
            append(&mut runs, number(&run[..8]), number(&run[8..]));
        }
        match self.reap()? {
            Ok(0) => Ok(runs),
            Ok(status) => Err(io::Error::from_raw_os_error(status)),
            Err(signal) => {
                Err(io::Error::other(format!("the process that writes memory was killed by signal {signal}")))
            }
        }
    }

    /// The status that it ends with, or the signal that has killed it.
    fn reap(&mut self) -> io::Result<Result<i32, i32>> {
        // Without a signal for its end a child is waited for only by who asks for such ones.
        let options = WaitIdOptions::EXITED | WaitIdOptions::from_bits_retain(libc::__WALL.cast_unsigned());
        loop {
            match process::waitid(WaitId::PidFd(self.pidfd.as_fd()), options) {
                Err(Errno::INTR) => {}
                ended => {
                    self.has_ended = true;
                    let ended = ended?.ok_or(io::ErrorKind::NotFound)?;
                    return Ok(ended.exit_status().ok_or(ended.terminating_signal().unwrap_or_default()));
                }
            }
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.has_ended {
            let _ = process::pidfd_send_signal(&self.pidfd, Signal::KILL);
            let _ = self.reap();
        }
    }
}

/// Adds a run of pages that begins where the last ends, or behind it.
fn append(runs: &mut Runs, first: u64, count: u64) {
    match runs.last_mut() {
        Some((start, length)) if *start + *length == first => *length += count,
        _ => runs.push((first, count)),
    }
}

/// Closes all descriptors but two, so that whatever they are of ends with the parent. A Linux before 5.9 cannot.
fn close_others(one: RawFd, other: RawFd) {
    let close = |first: RawFd, last: RawFd| {
        if first <= last {
            // SAFETY: nothing of what the child does uses them.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    };
    let (low, high) = (one.min(other), one.max(other));
    close(0, low - 1);
    close(low + 1, high - 1);
    close(high + 1, RawFd::MAX);
}

/// Whether a page of guest memory is all zeros.
fn is_zero(page: u64) -> bool {
    let words = page as *const u64;
    (0..4096 / size_of::<u64>()).all(|index| {
        // SAFETY: within the page, which is mapped for as long as `Source` is. It is no memory of any Rust value.
        let word = unsafe { words.add(index) };
        // SAFETY: as above, and aligned.
        unsafe { word.read_volatile() == 0 }
    })
}

/// Writes guest memory at the addresses of `run` to `offset` of `file`.
fn write_run(file: BorrowedFd<'_>, run: &Range<u64>, offset: u64) -> Result<(), Errno> {
    let mut done = 0;
    while run.start + done < run.end {
        let (from, left) = ((run.start + done) as *const libc::c_void, run.end - run.start - done);
        let at = i64::try_from(offset + done).map_err(|_| Errno::FBIG)?;
        let left = usize::try_from(left).map_err(|_| Errno::FBIG)?;
        // SAFETY: it is guest memory, mapped for as long as `Source` is; the kernel reads what is there.
        let written = unsafe { libc::pwrite64(file.as_raw_fd(), from, left, at) };
        match u64::try_from(written) {
            Ok(0) => return Err(Errno::IO),
            Ok(written) => done += written,
            Err(_) => match Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO) {
                Errno::INTR => {}
                error => return Err(error),
            },
        }
    }
    Ok(())
}

/// Addresses of this process that files are mapped to, if the host tells.
fn mapped_files() -> Option<Vec<Range<u64>>> {
    let mapping = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let inode = words.nth(3)?;
        let address = |text| u64::from_str_radix(text, 16).ok();
        Some((address(start)?..address(end)?, inode != "0"))
    };
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    let mappings: Option<Vec<_>> = maps.lines().map(mapping).collect();
    Some(mappings?.into_iter().filter(|(_, is_file)| *is_file).map(|(range, _)| range).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;
    use std::os::unix::fs::FileExt;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn a_child_writes_what_memory_was() {
        let ram = memory::reserve(&[0..4 << 20, 16 << 20..20 << 20]).unwrap();
        for page in (0..1024).chain(4096..5120) {
            ram.write_obj(page, GuestAddress(page * PAGE)).unwrap();
        }
        let file = tempfile::tempfile().unwrap();
        let child = Source::new(&ram, Pages::Used).fork(&file).unwrap();
        for page in (0..1024).chain(4096..5120) {
            ram.write_obj(u64::MAX, GuestAddress(page * PAGE)).unwrap();
        }
        memory::discard(&ram, 0..1 << 20).unwrap();
        assert_eq!(child.wait().unwrap(), []);
        assert_eq!(file.metadata().unwrap().len(), 8 << 20);
        let mut number = [0; 8];
        for (page, at) in (0..1024u64).chain(4096..5120).zip(0..) {
            file.read_exact_at(&mut number, at * PAGE).unwrap();
            assert_eq!(u64::from_ne_bytes(number), page);
        }
    }

    #[test]
    fn who_cannot_write_says_why_and_who_is_not_waited_for_is_gone() {
        let ram = memory::reserve(&[0..4 << 20]).unwrap();
        ram.write_obj(1u8, GuestAddress(0)).unwrap();
        let full = File::options().write(true).open("/dev/full").unwrap();
        let child = Source::new(&ram, Pages::Used).fork(&full).unwrap();
        assert_eq!(child.wait().unwrap_err().raw_os_error(), Some(libc::EINVAL), "it cannot be truncated");
        let read_only = File::open("/proc/self/exe").unwrap();
        let child = Source::new(&ram, Pages::Changed).fork(&read_only).unwrap();
        let pid = fs::read_to_string(format!("/proc/self/fdinfo/{}", child.pidfd.as_raw_fd())).unwrap();
        let pid = pid.lines().find_map(|line| line.strip_prefix("Pid:")).unwrap().trim().to_owned();
        drop(child);
        assert!(!fs::exists(format!("/proc/{pid}")).unwrap());
    }

    #[test]
    fn zeros_count_where_they_may_replace_something() {
        let ram = memory::reserve(&[0..4 << 20]).unwrap();
        ram.write_obj(1u8, GuestAddress(0)).unwrap();
        ram.write_obj(0u8, GuestAddress(2 << 20)).unwrap();
        let blocks = |pages| {
            let file = tempfile::tempfile().unwrap();
            Source::new(&ram, pages).copy(&file).unwrap();
            std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap())
        };
        assert!(blocks(Pages::Touched) >= blocks(Pages::Used) + PAGE / 512);
    }

    #[test]
    fn runs_become_one_where_they_meet() {
        let mut runs = vec![];
        for (first, count) in [(0, 1), (1, 2), (4, 1)] {
            append(&mut runs, first, count);
        }
        assert_eq!(runs, [(0, 3), (4, 1)]);
    }
}

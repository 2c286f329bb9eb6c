//! Guest buffers as readv(2) and its kin take them: lists that point straight into guest memory, so that a device's
//! data is never copied on the way between the guest and a host file.

#![expect(unsafe_code, reason = "hands pointers into guest memory to the kernel")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

use crate::memory::{self, GuestRam};

/// The most buffers of a list: what one system call takes (`UIO_MAXIOV`), less one for the `rest` of [`Iovecs::readv`]
/// or the `front` of [`Iovecs::writev_after`].
pub const MAX: usize = 1023;

/// Why a buffer cannot be part of a list.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not all of it is guest memory.
    #[error("{len} bytes at {addr:#x} are not in guest memory")]
    Address {
        /// Its guest-physical address.
        addr: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// The list has [`MAX`] buffers.
    #[error("more than {MAX} buffers")]
    Full,
}

/// A list of buffers in guest memory.
pub struct Iovecs {
    /// Keeps the pages mapped that the list points to.
    ram: GuestRam,
    list: Vec<libc::iovec>,
    bytes: usize,
}

// SAFETY: the pointers are into `ram`, which may be used from any thread; they are followed only by the kernel and
// through volatile accesses.
unsafe impl Send for Iovecs {}

impl Iovecs {
    /// An empty list of buffers in `ram`, with room for the longest: it allocates here and never again.
    pub fn new(ram: &GuestRam) -> Self {
        Self { ram: ram.clone(), list: Vec::with_capacity(MAX + 1), bytes: 0 }
    }

    /// An empty list of buffers in `ram`, with room for none: for a few of them.
    pub fn short(ram: &GuestRam) -> Self {
        Self { ram: ram.clone(), list: Vec::new(), bytes: 0 }
    }

    /// An empty list of buffers in the same memory, for a few of them.
    pub fn same_memory(&self) -> Self {
        Self::short(&self.ram)
    }

    /// The buffers: where they are in this process, which they are for as long as the list is there.
    pub fn list(&self) -> &[libc::iovec] {
        &self.list
    }

    /// Number of buffers.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there is no buffer.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Length of all buffers together.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether all buffers begin at multiples of `address` and have lengths that are such of `len`.
    pub fn are_multiples_of(&self, address: usize, len: u64) -> bool {
        let is = |iovec: &libc::iovec| {
            iovec.iov_base.addr().is_multiple_of(address) && (iovec.iov_len as u64).is_multiple_of(len)
        };
        self.list.iter().all(is)
    }

    /// Forgets all buffers.
    pub fn clear(&mut self) {
        self.truncate(0);
    }

    /// Keeps the first `len` buffers.
    pub fn truncate(&mut self, len: usize) {
        self.bytes -= self.list.iter().skip(len).map(|iovec| iovec.iov_len).sum::<usize>();
        self.list.truncate(len);
    }

    /// Forgets the first `len` buffers, or all if there are fewer.
    pub fn remove_first(&mut self, len: usize) {
        self.bytes -= self.list.drain(..len.min(self.list.len())).map(|iovec| iovec.iov_len).sum::<usize>();
    }

    /// Forgets the first `bytes` bytes, or all if there are fewer: a system call did those.
    pub fn advance(&mut self, bytes: usize) {
        let mut left = bytes;
        let done = self.list.iter().take_while(|iovec| {
            let whole = iovec.iov_len <= left;
            left -= if whole { iovec.iov_len } else { 0 };
            whole
        });
        let done = done.count();
        self.remove_first(done);
        if let Some(first) = self.list.first_mut() {
            first.iov_base = first.iov_base.wrapping_byte_add(left);
            first.iov_len -= left;
            self.bytes -= left;
        }
    }

    /// Keeps the first `bytes` bytes.
    pub fn limit(&mut self, bytes: usize) {
        let mut left = bytes;
        let whole = self.list.iter().take_while(|iovec| {
            let fits = iovec.iov_len <= left;
            left -= if fits { iovec.iov_len } else { 0 };
            fits
        });
        let whole = whole.count();
        if let Some(last) = self.list.get_mut(whole).filter(|_| left > 0) {
            self.bytes -= last.iov_len - left;
            last.iov_len = left;
            self.truncate(whole + 1);
        } else {
            self.truncate(whole);
        }
    }

    /// Moves the first `bytes` bytes to the end of `front`, or all if there are fewer.
    pub fn split_front(&mut self, bytes: usize, front: &mut Self) {
        let before = front.list.len();
        front.list.extend_from_slice(&self.list);
        front.bytes += self.bytes;
        let kept: usize = front.list[..before].iter().map(|iovec| iovec.iov_len).sum();
        front.limit(kept + bytes);
        self.advance(bytes);
    }

    /// Adds the `len` bytes at `addr`; an empty buffer adds nothing. After an error some of them may have been
    /// added: [`truncate`](Self::truncate) takes those back.
    pub fn push(&mut self, addr: GuestAddress, len: u32) -> Result<(), Error> {
        if let Some(slice) = memory::slice(&self.ram, addr, len as usize) {
            return if slice.is_empty() { Ok(()) } else { add(&mut self.list, &mut self.bytes, &slice) };
        }
        // Where two regions of guest memory meet.
        for slice in self.ram.get_slices(addr, len as usize) {
            let slice = slice.map_err(|_| Error::Address { addr: addr.0, len })?;
            add(&mut self.list, &mut self.bytes, &slice)?;
        }
        Ok(())
    }

    /// Copies `data` over the buffers from `offset` of their bytes on; what lies beyond their end is left out.
    pub fn write(&self, offset: usize, data: &[u8]) {
        let mut data = data;
        for target in self.slices_from(offset) {
            let (now, later) = data.split_at(data.len().min(target.len()));
            target.copy_from(now);
            data = later;
        }
    }

    /// Copies the buffers from `offset` of their bytes on to `data`, as much as there is.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        let mut data = data;
        for source in self.slices_from(offset) {
            let (now, later) = data.split_at_mut(data.len().min(source.len()));
            source.copy_to(now);
            data = later;
        }
    }

    fn slices_from(&self, offset: usize) -> impl Iterator<Item = VolatileSlice<'_>> {
        let mut skip = offset;
        self.list.iter().filter_map(move |iovec| {
            let skipped = skip.min(iovec.iov_len);
            skip -= skipped;
            // SAFETY: `push` took the buffer from `ram`, which is still mapped.
            let slice = unsafe { VolatileSlice::new(iovec.iov_base.cast(), iovec.iov_len) };
            slice.offset(skipped).ok().filter(|slice| !slice.is_empty())
        })
    }

    /// readv(2) into the buffers and, when they are full, into `rest`.
    pub fn readv(&mut self, fd: impl AsFd, rest: &mut [u8]) -> io::Result<usize> {
        let len = self.list.len();
        self.list.push(libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() });
        let (fd, list, count) = (fd.as_fd().as_raw_fd(), self.list.as_ptr(), self.count());
        // SAFETY: the list's buffers are in mapped guest memory, or in `rest`, which is borrowed for the call.
        let result = retry(|| unsafe { libc::readv(fd, list, count) });
        self.list.truncate(len);
        result
    }

    /// writev(2) from the buffers.
    pub fn writev(&self, fd: impl AsFd) -> io::Result<usize> {
        let (fd, list, count) = (fd.as_fd().as_raw_fd(), self.list.as_ptr(), self.count());
        // SAFETY: the list's buffers are in mapped guest memory.
        retry(|| unsafe { libc::writev(fd, list, count) })
    }

    /// writev(2) from `front` and then the buffers.
    pub fn writev_after(&mut self, fd: impl AsFd, front: &[u8]) -> io::Result<usize> {
        self.list.insert(0, libc::iovec { iov_base: front.as_ptr().cast_mut().cast(), iov_len: front.len() });
        let (fd, list, count) = (fd.as_fd().as_raw_fd(), self.list.as_ptr(), self.count());
        // SAFETY: the list's buffers are in mapped guest memory, or `front`, which is borrowed for the call and only read.
        let result = retry(|| unsafe { libc::writev(fd, list, count) });
        self.list.remove(0);
        result
    }

    /// preadv(2), or pread(2), into the buffers, from byte `offset` of the file. It may read less than there is room for.
    pub fn preadv(&mut self, fd: impl AsFd, offset: u64) -> io::Result<usize> {
        let (fd, list, count) = (fd.as_fd().as_raw_fd(), self.list.as_ptr(), self.count());
        let offset = file_offset(offset)?;
        // A list costs the kernel a quarter more.
        if let [one] = &self.list[..] {
            // SAFETY: the buffer is in mapped guest memory.
            return retry(|| unsafe { libc::pread(fd, one.iov_base, one.iov_len, offset) });
        }
        // SAFETY: the list's buffers are in mapped guest memory.
        retry(|| unsafe { libc::preadv(fd, list, count, offset) })
    }

    /// pwritev(2), or pwrite(2), from the buffers, to byte `offset` of the file. It may write less than there is.
    pub fn pwritev(&self, fd: impl AsFd, offset: u64) -> io::Result<usize> {
        let (fd, list, count) = (fd.as_fd().as_raw_fd(), self.list.as_ptr(), self.count());
        let offset = file_offset(offset)?;
        if let [one] = &self.list[..] {
            // SAFETY: the buffer is in mapped guest memory, and only read.
            return retry(|| unsafe { libc::pwrite(fd, one.iov_base, one.iov_len, offset) });
        }
        // SAFETY: the list's buffers are in mapped guest memory.
        retry(|| unsafe { libc::pwritev(fd, list, count, offset) })
    }

    fn count(&self) -> libc::c_int {
        libc::c_int::try_from(self.list.len()).expect("a list has at most MAX buffers and the rest")
    }
}

fn file_offset(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Makes a system call until no signal interrupts it.
fn retry(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(bytes) => return Ok(bytes),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// Adds a buffer to a list of so many bytes.
fn add(list: &mut Vec<libc::iovec>, bytes: &mut usize, slice: &VolatileSlice<'_>) -> Result<(), Error> {
    if list.len() == MAX {
        return Err(Error::Full);
    }
    list.push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
    *bytes += slice.len();
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};

    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;

    fn ram() -> GuestRam {
        crate::memory::reserve(&[0..0x2000, 0x2000..0x4000, 0x8000..0x9000]).unwrap()
    }

    #[test]
    fn a_buffer_may_cross_from_one_region_to_the_next() {
        let ram = ram();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"..across").unwrap();
        let mut iovecs = Iovecs::new(&ram);
        iovecs.push(GuestAddress(0x1ffd), 6).unwrap();
        assert_eq!((iovecs.len(), iovecs.bytes()), (2, 6));
        assert_eq!(iovecs.preadv(&file, 2).unwrap(), 6);
        assert_eq!(ram.read_obj::<[u8; 6]>(GuestAddress(0x1ffd)).unwrap(), *b"across");
        assert_eq!(iovecs.pwritev(&file, 6).unwrap(), 6);
        file.rewind().unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "..acroacross");
    }

    #[test]
    fn buffers_outside_guest_memory_are_refused() {
        let ram = ram();
        let mut iovecs = Iovecs::new(&ram);
        for (addr, len) in [(0x3fff, 2), (0x5000, 1), (0x8000, u32::MAX), (u64::MAX, 2), (u64::MAX - 1, 1)] {
            assert_eq!(iovecs.push(GuestAddress(addr), len), Err(Error::Address { addr, len }));
            iovecs.clear();
        }
        iovecs.push(GuestAddress(u64::MAX), 0).unwrap();
        assert!(iovecs.is_empty());
    }

    #[test]
    fn a_list_is_bounded() {
        let ram = ram();
        let mut iovecs = Iovecs::new(&ram);
        for _ in 0..MAX {
            iovecs.push(GuestAddress(0), 1).unwrap();
        }
        assert_eq!(iovecs.push(GuestAddress(0), 1), Err(Error::Full));
        iovecs.remove_first(MAX - 1);
        assert_eq!((iovecs.len(), iovecs.bytes()), (1, 1));
        iovecs.remove_first(2);
        assert_eq!((iovecs.len(), iovecs.bytes()), (0, 0));
    }

    #[test]
    fn a_list_goes_on_where_a_call_ended() {
        let ram = ram();
        ram.write_slice(b"abcdefghi", GuestAddress(0)).unwrap();
        for done in 0..12 {
            let mut iovecs = Iovecs::new(&ram);
            for addr in [0, 3, 6] {
                iovecs.push(GuestAddress(addr), 3).unwrap();
            }
            iovecs.advance(done);
            let mut file = tempfile::tempfile().unwrap();
            let left = 9usize.saturating_sub(done);
            assert_eq!((iovecs.bytes(), iovecs.pwritev(&file, 0).unwrap()), (left, left));
            let mut text = String::new();
            file.read_to_string(&mut text).unwrap();
            assert_eq!(text, "abcdefghi"[9 - left..]);
        }
    }

    #[test]
    fn a_list_is_split_and_limited_at_any_byte() {
        let ram = ram();
        ram.write_slice(b"abcdefghi", GuestAddress(0)).unwrap();
        for at in 0..12 {
            let mut iovecs = Iovecs::new(&ram);
            for addr in [0, 3, 6] {
                iovecs.push(GuestAddress(addr), 3).unwrap();
            }
            let mut front = Iovecs::new(&ram);
            iovecs.split_front(at, &mut front);
            let text = |iovecs: &Iovecs| {
                let mut data = [b'.'; 10];
                iovecs.read(0, &mut data);
                String::from_utf8(data[..iovecs.bytes()].to_vec()).unwrap()
            };
            let (first, second) = "abcdefghi".split_at(at.min(9));
            assert_eq!((text(&front).as_str(), text(&iovecs).as_str()), (first, second));
            front.limit(at / 2);
            assert_eq!(text(&front), first[..(at / 2).min(first.len())]);
        }
    }

    #[test]
    fn what_the_guest_has_no_room_for_goes_to_the_rest() {
        let ram = ram();
        let (mut from, to) = std::os::unix::net::UnixStream::pair().unwrap();
        from.write_all(b"one two three").unwrap();
        let mut iovecs = Iovecs::new(&ram);
        iovecs.push(GuestAddress(0), 4).unwrap();
        iovecs.push(GuestAddress(0x100), 4).unwrap();
        let mut rest = [0; 16];
        assert_eq!(iovecs.readv(&to, &mut rest).unwrap(), 13);
        assert_eq!((iovecs.len(), &rest[..5]), (2, b"three".as_slice()));
        iovecs.write(2, b"ee tw");
        assert_eq!(ram.read_obj::<[u8; 4]>(GuestAddress(0)).unwrap(), *b"onee");
        assert_eq!(ram.read_obj::<[u8; 4]>(GuestAddress(0x100)).unwrap(), *b" tw ");
        iovecs.write(7, b"!!");
        assert_eq!(ram.read_obj::<[u8; 5]>(GuestAddress(0x100)).unwrap(), *b" tw!\0");
    }

    proptest! {
        #[test]
        fn a_list_is_what_a_list_of_bytes_would_be(
            pushed in prop::collection::vec((0u64..0x9010, 0u32..40), 0..8),
            steps in prop::collection::vec((0..4usize, 0..90usize), 0..8),
        ) {
            let ram = ram();
            // Each byte tells where it is.
            let told = |addr: u64| u8::try_from(addr * 7 % 251).unwrap();
            for addr in (0..0x4000).chain(0x8000..0x9000) {
                ram.write_obj(told(addr), GuestAddress(addr)).unwrap();
            }
            let is_memory = |addr: &u64| *addr < 0x4000 || (0x8000..0x9000).contains(addr);
            let (mut iovecs, mut expected) = (Iovecs::new(&ram), vec![]);
            for (addr, len) in pushed {
                let (before, bytes) = (iovecs.len(), addr..addr + u64::from(len));
                let is_right = bytes.clone().all(|addr| is_memory(&addr));
                prop_assert_eq!(iovecs.push(GuestAddress(addr), len).is_ok(), is_right);
                if is_right {
                    expected.extend(bytes.map(told));
                } else {
                    iovecs.truncate(before);
                }
            }
            for (step, count) in steps {
                let some = count.min(expected.len());
                match step {
                    0 => {
                        iovecs.advance(count);
                        expected.drain(..some);
                    }
                    1 => {
                        iovecs.limit(count);
                        expected.truncate(some);
                    }
                    2 => {
                        let mut front = iovecs.same_memory();
                        iovecs.split_front(count, &mut front);
                        prop_assert_eq!(front.bytes(), some);
                        expected.drain(..some);
                    }
                    _ => {
                        let mut data = vec![0; expected.len() - some];
                        iovecs.read(some, &mut data);
                        prop_assert_eq!(&data, &expected[some..]);
                    }
                }
                prop_assert_eq!(iovecs.bytes(), expected.len());
            }
            let mut data = vec![0; expected.len()];
            iovecs.read(0, &mut data);
            prop_assert_eq!(data, expected);
        }
    }
}

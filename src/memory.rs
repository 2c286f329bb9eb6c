//! Guest memory: reserved lazily, never touched before the guest does.
//!
//! The pages are private and anonymous, mapped with `MAP_NORESERVE`: the host commits one only when the guest, or
//! the loader, first writes it. Parts of files can be mapped over them: what the guest only reads of these is in the host's
//! page cache, once for all machines.

#![expect(unsafe_code, reason = "mmap and madvise take an address; mallopt and sysconf have no safe wrapper")]

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MemoryRegionAddress, VolatileMemory, VolatileSlice,
};

/// The guest's memory. A clone refers to the same pages.
pub type GuestRam = GuestMemoryMmap<()>;

/// Why guest memory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host did not map the pages.
    #[error("cannot reserve {} MiB of guest memory at {start:#x}", .bytes >> 20)]
    Map {
        /// First guest-physical address of the region.
        start: u64,
        /// Length of the region in bytes.
        bytes: u64,
        /// What the host said.
        #[source]
        source: MmapRegionError,
    },
    /// The host has not so many huge pages.
    #[error(
        "cannot reserve {} MiB of guest memory in huge pages: the host has {free} of {} MiB left (`sysctl vm.nr_hugepages=N` sets how many there are)",
        .bytes >> 20, HUGE_PAGE >> 20
    )]
    HugePages {
        /// Length of the region in bytes.
        bytes: u64,
        /// Pages that nobody has or has reserved.
        free: u64,
        /// What the host said.
        #[source]
        source: MmapRegionError,
    },
    /// The ranges do not make a guest memory: they overlap, are empty, or do not fit the address space.
    #[error("cannot lay out guest memory over {0:#x?}")]
    Layout(Vec<Range<u64>>),
}

/// Has all threads of this process allocate from one arena, which grows and shrinks in large steps. glibc gives each its own
/// otherwise: five system calls, and a few pages that nobody shares. Allocations are rare in a machine that runs.
pub fn use_one_arena() {
    /// More than starting takes, in bytes.
    #[cfg(target_env = "gnu")]
    const STEP: libc::c_int = 512 << 10;
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [
        (libc::M_ARENA_MAX, 1),
        (libc::M_TOP_PAD, STEP),
        (libc::M_TRIM_THRESHOLD, 2 * STEP),
        (libc::M_MMAP_THRESHOLD, STEP / 2),
    ] {
        // SAFETY: changes a parameter of the allocator, at any time.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Reserves guest memory over the given guest-physical ranges, in ascending order.
///
/// ```
/// use vm_memory::{Bytes, GuestAddress};
/// let ram = bantam::memory::reserve(&[0..1 << 20])?;
/// ram.write_obj(7u32, GuestAddress(0x1000))?;
/// assert_eq!(ram.read_obj::<u32>(GuestAddress(0x1000))?, 7);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn reserve(ranges: &[Range<u64>]) -> Result<GuestRam, Error> {
    reserve_as(ranges, libc::MAP_NORESERVE, |start, bytes, source| Error::Map { start, bytes, source })
}

/// The same in the host's huge pages (hugetlbfs) of 2 MiB, which ranges begin and end at. They are the guest's from now on: none
/// is given back before all are.
///
/// # Errors
/// When there are not so many.
pub fn reserve_huge(ranges: &[Range<u64>]) -> Result<GuestRam, Error> {
    reserve_as(ranges, libc::MAP_HUGETLB | libc::MAP_HUGE_2MB, |_, bytes, source| Error::HugePages {
        bytes,
        free: free_huge_pages(),
        source,
    })
}

fn reserve_as(
    ranges: &[Range<u64>],
    flags: libc::c_int,
    error: fn(u64, u64, MmapRegionError) -> Error,
) -> Result<GuestRam, Error> {
    let layout = || Error::Layout(ranges.to_vec());
    let regions = ranges
        .iter()
        .map(|range| {
            let bytes = range.end.checked_sub(range.start).ok_or_else(layout)?;
            let size = usize::try_from(bytes).map_err(|_| layout())?;
            let map = || map_pages(size, flags).map_err(|source| error(range.start, bytes, source));
            let mut pages = map()?;
            // Where the guest's address and the host's are not the same part of a huge page none is of use. The host cares for that
            // since Linux 6.7.
            let surplus = (pages.as_ptr() as u64).wrapping_sub(range.start) % HUGE_PAGE;
            if surplus != 0 && bytes >= HUGE_PAGE {
                let end = pages.as_ptr().wrapping_add(size);
                drop(pages);
                pages = map_below(end, surplus, map)?;
            }
            GuestRegionMmap::new(pages, GuestAddress(range.start)).ok_or_else(layout)
        })
        .collect::<Result<Vec<_>, _>>()?;
    GuestRam::from_regions(regions).map_err(|_| layout())
}

fn map_pages(size: usize, flags: libc::c_int) -> Result<MmapRegion, MmapRegionError> {
    MmapRegionBuilder::new(size)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags)
        .build()
}

/// Has `map` find the `surplus` bytes below `end` taken. The host maps from the top down: what had its place up to `end` has it
/// below them.
fn map_below<T>(end: *mut u8, surplus: u64, map: impl Fn() -> T) -> T {
    let Ok(len) = usize::try_from(surplus) else { return map() };
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED_NOREPLACE;
    // SAFETY: it takes the place of nothing, and nobody uses it.
    let filler = unsafe { mmap_anonymous(end.wrapping_sub(len).cast(), len, ProtFlags::empty(), flags) };
    let mapped = map();
    if let Ok(filler) = filler {
        // SAFETY: as above.
        if let Err(error) = unsafe { munmap(filler, len) } {
            log::debug!("{len} bytes of addresses stay taken: {error}");
        }
    }
    mapped
}

fn free_huge_pages() -> u64 {
    let pool = |file| {
        let text = std::fs::read_to_string(format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{file}")).ok()?;
        text.trim().parse::<u64>().ok()
    };
    pool("free_hugepages").zip(pool("resv_hugepages")).map_or(0, |(free, reserved)| free.saturating_sub(reserved))
}

fn is_huge(region: &GuestRegionMmap<()>) -> bool {
    region.flags() & libc::MAP_HUGETLB != 0
}

/// So many bytes of guest memory, if they are all in one region. There are few regions: that of the address is found sooner by
/// looking at each.
pub fn slice(ram: &GuestRam, at: GuestAddress, len: usize) -> Option<VolatileSlice<'_>> {
    let offset = |region: &GuestRegionMmap| at.0.wrapping_sub(region.start_addr().0);
    let region = ram.iter().find(|region| offset(region) < region.len())?;
    region.get_slice(MemoryRegionAddress(offset(region)), len).ok()
}

/// An object in guest memory. As `read_obj`, which is made for those that lie in several regions: no ring or header does.
///
/// # Errors
/// When it is not all in guest memory.
pub fn read_obj<T: ByteValued>(ram: &GuestRam, at: GuestAddress) -> Result<T, GuestMemoryError> {
    match slice(ram, at, size_of::<T>()) {
        Some(slice) => Ok(slice.get_ref(0)?.load()),
        None => ram.read_obj(at),
    }
}

/// Writes an object to guest memory, as [`read_obj`] reads one.
///
/// # Errors
/// When it is not all in guest memory.
pub fn write_obj<T: ByteValued>(ram: &GuestRam, object: T, at: GuestAddress) -> Result<(), GuestMemoryError> {
    match slice(ram, at, size_of::<T>()) {
        Some(slice) => slice.get_ref(0).map(|place| place.store(object)).map_err(GuestMemoryError::from),
        None => ram.write_obj(object, at),
    }
}

/// Fills `bytes` from guest memory, as [`read_obj`].
///
/// # Errors
/// When they are not all in guest memory.
pub fn read_slice(ram: &GuestRam, bytes: &mut [u8], at: GuestAddress) -> Result<(), GuestMemoryError> {
    match slice(ram, at, bytes.len()) {
        Some(slice) => {
            slice.copy_to(bytes);
            Ok(())
        }
        None => ram.read_slice(bytes, at),
    }
}

/// Gives the pages of `range`, of guest-physical addresses, back to the host: whole pages, none of which is counted as
/// the guest's any more. What the guest finds there when it uses them again is zeros, or, of memory mapped privately
/// from a file, what is in that.
///
/// # Errors
/// When some of it is not guest memory, it does not begin and end at pages' bounds, or the host refuses.
pub fn discard(ram: &GuestRam, range: Range<u64>) -> io::Result<()> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    let page = page_size();
    let size = usize::try_from(range.end.saturating_sub(range.start)).map_err(|_| invalid())?;
    if !range.start.is_multiple_of(page)
        || !range.end.is_multiple_of(page)
        || !ram.check_range(GuestAddress(range.start), size)
    {
        return Err(invalid());
    }
    let mut start = range.start;
    while start < range.end {
        let region = ram.find_region(GuestAddress(start)).ok_or_else(invalid)?;
        let end = range.end.min(region.start_addr().0 + region.len());
        let size = usize::try_from(end - start).map_err(|_| invalid())?;
        let pages = ram.get_slice(GuestAddress(start), size).map_err(|_| invalid())?;
        // Shared pages belong to the file, which has to give them up.
        let shared = region.flags() & libc::MAP_SHARED != 0;
        let advice = if shared { Advice::LinuxRemove } else { Advice::LinuxDontNeed };
        // SAFETY: the pages are mapped for as long as `ram` is. It is the guest's memory, of which no reference exists,
        // and which the guest may change at any time anyway.
        unsafe { madvise(pages.ptr_guard_mut().as_ptr().cast(), pages.len(), advice) }?;
        start = end;
    }
    Ok(())
}

/// The size of a huge page on x86-64 and AArch64 hosts, in bytes.
pub const HUGE_PAGE: u64 = 2 << 20;

/// Asks the host to back `range`, which is part of one region and about to be filled, by huge pages: they come hundreds of times
/// rarer, and the guest finds its way through them faster. A host that has none to give goes on with small ones.
pub fn prefer_huge_pages(ram: &GuestRam, range: Range<u64>) {
    let start = range.start / HUGE_PAGE * HUGE_PAGE;
    let Some(region) = ram.find_region(GuestAddress(start)) else { return };
    let size = range.end.next_multiple_of(HUGE_PAGE).min(region.start_addr().0 + region.len()) - start;
    let Some(pages) = usize::try_from(size).ok().and_then(|size| ram.get_slice(GuestAddress(start), size).ok()) else {
        return;
    };
    // SAFETY: the pages are mapped for as long as `ram` is, and this advice leaves what is in them as it is.
    let advised = unsafe { madvise(pages.ptr_guard_mut().as_ptr().cast(), pages.len(), Advice::LinuxHugepage) };
    if let Err(error) = advised {
        log::debug!("no huge pages for guest memory at {start:#x}: {error}");
    }
}

/// Has all of guest memory there before it is used. What is mapped from files stays shared with all who map them.
///
/// # Errors
/// When the host cannot read the files.
pub fn prefault(ram: &GuestRam) -> io::Result<()> {
    for region in ram.iter() {
        let pages = region.as_volatile_slice().map_err(io::Error::other)?;
        // SAFETY: the pages are mapped for as long as `ram` is, and this advice leaves what is in them as it is.
        let populated =
            unsafe { madvise(pages.ptr_guard_mut().as_ptr().cast(), pages.len(), Advice::LinuxPopulateRead) };
        match populated {
            // A Linux before 5.14.
            Err(Errno::INVAL) => touch(&pages)?,
            other => other?,
        }
    }
    Ok(())
}

/// Has the host read what `range`, of guest-physical addresses in one region, has in files, in the background; or have it there
/// when this returns, if it is to be awaited.
///
/// # Errors
/// When it is not in one region, or the host cannot.
pub fn read_ahead(ram: &GuestRam, range: Range<u64>, is_awaited: bool) -> io::Result<()> {
    let len = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
    let pages = ram.get_slice(GuestAddress(range.start), len).map_err(io::Error::other)?;
    let advice = if is_awaited { Advice::LinuxPopulateRead } else { Advice::WillNeed };
    // SAFETY: the pages are mapped for as long as `ram` is, and this advice leaves what is in them as it is.
    Ok(unsafe { madvise(pages.ptr_guard_mut().as_ptr().cast(), len, advice) }?)
}

/// Has the pages of `range`, of guest-physical addresses in one region, be this memory's own, as if each had been written
/// (Linux 5.14).
///
/// # Errors
/// When it is not in one region, or the host cannot.
pub fn own(ram: &GuestRam, range: Range<u64>) -> io::Result<()> {
    let page = page_size();
    let start = range.start / page * page;
    let len = usize::try_from(range.end.next_multiple_of(page) - start).map_err(io::Error::other)?;
    let pages = ram.get_slice(GuestAddress(start), len).map_err(io::Error::other)?;
    // SAFETY: the pages are mapped for as long as `ram` is, and this advice leaves what is in them as it is.
    Ok(unsafe { madvise(pages.ptr_guard_mut().as_ptr().cast(), len, Advice::LinuxPopulateWrite) }?)
}

/// Reads something of each page.
fn touch(pages: &VolatileSlice<'_, ()>) -> io::Result<()> {
    let page = usize::try_from(page_size()).map_err(io::Error::other)?;
    let touched = (0..pages.len()).step_by(page).try_for_each(|at| pages.load::<u8>(at, Ordering::Relaxed).map(drop));
    touched.map_err(io::Error::other)
}

/// The size of the host's pages, in bytes.
pub fn page_size() -> u64 {
    // SAFETY: only asks. The C library was told when the program started: rustix would ask the kernel, before Linux 6.4 by a file
    // of /proc, and panic when there is no descriptor left for it.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.unsigned_abs()
}

/// Maps `len` bytes of `file` from `offset` on over guest memory at `address`, all three multiples of the host's page size,
/// in place of what was there. What the guest writes stays its own (`MAP_PRIVATE`).
///
/// The guest has what is in the file when it first reads or writes a page of it. When the file is shorter by then, an access of
/// the guest ends the machine, and one of this process raises SIGBUS. Pages given back by `madvise(MADV_DONTNEED)` have what is
/// in the file, not zeros.
///
/// # Errors
/// When the range is not aligned, is not part of one region of guest memory, or the host does not map the file. Then the
/// memory is as fresh.
pub fn map_file(ram: &GuestRam, address: u64, file: &File, offset: u64, len: u64) -> io::Result<()> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    let page = page_size();
    if [address, offset, len].iter().any(|number| number % page != 0) {
        return Err(invalid());
    }
    let len = usize::try_from(len).map_err(|_| invalid())?;
    let pages = ram.get_slice(GuestAddress(address), len).map_err(|_| invalid())?;
    if ram.find_region(GuestAddress(address)).is_none_or(is_huge) {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "a part of a huge page cannot be mapped from a file"));
    }
    let start = pages.ptr_guard_mut().as_ptr().cast();
    let access = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
    // SAFETY: the pages are `ram`'s, so nothing but guest memory goes, to which no references are ever made.
    let mapped = unsafe { mmap(start, len, access, flags, file, offset) };
    if let Err(error) = mapped {
        // The host may have taken away what was there before it found that it cannot map the file.
        // SAFETY: as above.
        let restored = unsafe { mmap_anonymous(start, len, access, flags) };
        restored.expect("there is room where memory was mapped before");
        return Err(error.into());
    }
    Ok(())
}

/// Fewer bytes of a file than this are read: a mapping of its own would cost more.
const MAP_MIN: u64 = 64 << 10;

/// Puts `len` bytes of `file` from `offset` on into fresh guest memory at `address`: whole pages that are the same ones in
/// both are mapped, as by [`map_file`], the rest is read. Of a file that cannot be mapped all is read, into huge pages.
///
/// # Errors
/// When the host does not read the file, it ends before, or there is no such guest memory.
pub fn load_file(ram: &GuestRam, address: u64, file: &File, offset: u64, len: u64) -> io::Result<()> {
    let page = page_size();
    let all = offset..offset.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
    let pages = all.start.next_multiple_of(page)..all.end / page * page;
    if address % page == offset % page && pages.end.saturating_sub(pages.start) >= MAP_MIN {
        let at = |offset| address + (offset - all.start);
        match map_file(ram, at(pages.start), file, pages.start, pages.end - pages.start) {
            Ok(()) => {
                read_part(ram, address, file, all.start..pages.start)?;
                return read_part(ram, at(pages.end), file, pages.end..all.end);
            }
            Err(error) => log::debug!("cannot map a file as guest memory at {address:#x}, and read it: {error}"),
        }
    }
    prefer_huge_pages(ram, address..address.saturating_add(len));
    read(ram, address, file, all)
}

fn read(ram: &GuestRam, address: u64, mut file: &File, part: Range<u64>) -> io::Result<()> {
    let len = usize::try_from(part.end - part.start).map_err(io::Error::other)?;
    file.seek(SeekFrom::Start(part.start))?;
    ram.read_exact_volatile_from(GuestAddress(address), &mut file, len).map_err(into_io)
}

/// Reads what is less than a page.
fn read_part(ram: &GuestRam, address: u64, file: &File, part: Range<u64>) -> io::Result<()> {
    let mut bytes = vec![0; usize::try_from(part.end - part.start).map_err(io::Error::other)?];
    if !bytes.is_empty() {
        file.read_exact_at(&mut bytes, part.start)?;
        ram.write_slice(&bytes, GuestAddress(address)).map_err(into_io)?;
    }
    Ok(())
}

/// What the host said, of an error with guest memory.
pub(crate) fn into_io(error: GuestMemoryError) -> io::Error {
    match error {
        GuestMemoryError::IOError(error) => error,
        GuestMemoryError::PartialBuffer { .. } => io::ErrorKind::UnexpectedEof.into(),
        other => io::Error::other(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn more_than_the_host_has_is_only_reserved() {
        let ram = reserve(&[0..1 << 30, 4 << 30..64 << 30]).unwrap();
        assert_eq!(ram.num_regions(), 2);
        assert!(!ram.check_range(GuestAddress(3 << 30), 1));
    }

    #[test]
    fn huge_pages_keep_what_is_there_and_stay_within_memory() {
        let ram = reserve(&[0..8 << 20]).unwrap();
        ram.write_obj(7u32, GuestAddress(3 << 20)).unwrap();
        prefer_huge_pages(&ram, 3 << 20..5 << 20);
        prefer_huge_pages(&ram, 7 << 20..9 << 20);
        assert_eq!(ram.read_obj::<u32>(GuestAddress(3 << 20)).unwrap(), 7);
    }

    #[test]
    fn memory_is_where_huge_pages_can_be() {
        // Other threads map things at the same time.
        let mut placed = 0;
        for _ in 0..20 {
            // One more page each time, so that what comes next is elsewhere.
            std::mem::forget(map_pages(4096, 0).unwrap());
            let ram = reserve(&[0..5 << 20, 4 << 30..(4 << 30) + (3 << 20), 5 << 30..(5 << 30) + 4096]).unwrap();
            let is_placed = |region: &GuestRegionMmap| (region.as_ptr() as u64).is_multiple_of(HUGE_PAGE);
            placed += usize::from(ram.iter().take(2).all(is_placed));
        }
        assert!(placed > 10, "{placed} of 20");
    }

    #[test]
    fn what_was_mapped_from_a_file_becomes_its_own() {
        let (file, bytes) = file();
        let ram = reserve(&[0..1 << 20]).unwrap();
        map_file(&ram, 0x1_0000, &file, 0, 0x5000).unwrap();
        own(&ram, 0x1_1800..0x1_3800).unwrap();
        file.write_all_at(&[0; 0x5000], 0).unwrap();
        let own = 0x1000..0x4000;
        assert_eq!(read_back(&ram, 0x1_1000, 0x3000), bytes[own]);
        assert_eq!([0x1_0000, 0x1_4000].map(|at| read_back(&ram, at, 0x1000)), [[0; 0x1000]; 2]);
        assert!(super::own(&ram, 0..2 << 20).is_err());
    }

    /// Five pages and a half, no two bytes that follow one another alike.
    fn file() -> (File, Vec<u8>) {
        let file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..0x5800u32).map(|i| (i + (i >> 12)).to_le_bytes()[0]).collect();
        file.write_all_at(&bytes, 0).unwrap();
        (file, bytes)
    }

    fn read_back(ram: &GuestRam, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0xff; len];
        ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    #[test]
    fn touched_pages_are_there() {
        let (file, bytes) = file();
        let ram = reserve(&[0..1 << 20]).unwrap();
        map_file(&ram, 0x1_0000, &file, 0x1000, 0x2000).unwrap();
        touch(&ram.get_slice(GuestAddress(0), 1 << 20).unwrap()).unwrap();
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        for page in [0, 0xf, 0x10, 0x11, 0xff] {
            let address = ram.get_host_address(GuestAddress(page * 0x1000)).unwrap() as u64;
            let mut entry = [0; 8];
            pagemap.read_exact_at(&mut entry, address / page_size() * 8).unwrap();
            assert!(u64::from_ne_bytes(entry) >> 63 == 1, "page {page:#x}");
        }
        assert_eq!(read_back(&ram, 0x1_0000, 0x2000), bytes[0x1000..0x3000]);
    }

    #[test]
    fn what_is_mapped_is_the_file_and_what_is_written_is_not() {
        let (file, bytes) = file();
        let ram = reserve(&[0..1 << 20]).unwrap();
        ram.write_slice(&[7; 0x1000], GuestAddress(0x1_0000)).unwrap();
        map_file(&ram, 0x1_0000, &file, 0x1000, 0x2000).unwrap();
        assert_eq!(read_back(&ram, 0x1_0000, 0x2000), bytes[0x1000..0x3000]);
        assert_eq!(read_back(&ram, 0x1_2000, 0x1000), [0; 0x1000]);
        ram.write_slice(&[7; 0x1000], GuestAddress(0x1_0800)).unwrap();
        let mut whole = vec![];
        (&file).read_to_end(&mut whole).unwrap();
        assert_eq!(whole, bytes);
    }

    #[test]
    fn what_cannot_be_mapped_leaves_memory_in_its_place() {
        let ram = reserve(&[0..1 << 20, 1 << 20..2 << 20]).unwrap();
        let kind = |file: &File, address, offset, len| map_file(&ram, address, file, offset, len).unwrap_err().kind();
        let (file, _) = file();
        let invalid = io::ErrorKind::InvalidInput;
        for (address, offset, len) in [(0x800, 0, 0x1000), (0, 0x800, 0x1000), (0, 0, 0x800), (0xf_f000, 0, 0x2000)] {
            assert_eq!(kind(&file, address, offset, len), invalid, "{address:#x}, {offset:#x}, {len:#x}");
        }
        // A directory.
        map_file(&ram, 0, &File::open("/").unwrap(), 0, 0x1000).unwrap_err();
        ram.write_slice(&[7; 0x1000], GuestAddress(0)).unwrap();
        assert_eq!(read_back(&ram, 0, 0x2000), [[7; 0x1000], [0; 0x1000]].concat());
    }

    #[test]
    fn a_file_is_loaded_wherever_its_pages_are() {
        let file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..0x4_0000u32).map(|i| (i.wrapping_mul(i) >> 5).to_le_bytes()[0]).collect();
        file.write_all_at(&bytes, 0).unwrap();
        // Mapped with and without edges, read because it is small, or on odd addresses, or offsets.
        for (address, offset, len) in [
            (0x1_0000, 0x1000, 0x1_0000),
            (0x1_0123, 0x1123, 0x2_0fff),
            (0x1_0fff, 0x1fff, 0x1_f001),
            (0x1_0000, 0x1000, 0x200),
            (0x1_0001, 0x1000, 0x2_0000),
            (0x1_0000, 0x0fff, 0x2_0000),
            (0x1_0000, 0, 0),
        ] {
            let ram = reserve(&[0..1 << 20]).unwrap();
            load_file(&ram, address, &file, offset, len).unwrap();
            let (from, size) = (usize::try_from(offset).unwrap(), usize::try_from(len).unwrap());
            let around = [&[0][..], &bytes[from..from + size], &[0]].concat();
            assert!(read_back(&ram, address - 1, size + 2) == around, "{address:#x}, {offset:#x}, {len:#x}");
        }
        let ram = reserve(&[0..1 << 20]).unwrap();
        let error = load_file(&ram, 0x1_0001, &file, 0x3_ffff, 2).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(load_file(&ram, 0, &file, 1, u64::MAX).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn discarded_pages_are_zeros_and_the_others_stay() {
        let ram = reserve(&[0..0x2000, 0x2000..0x4000]).unwrap();
        ram.write_slice(&[7; 0x4000], GuestAddress(0)).unwrap();
        discard(&ram, 0x1000..0x3000).unwrap();
        let byte = |address| ram.read_obj::<u8>(GuestAddress(address)).unwrap();
        assert_eq!([0xfff, 0x1000, 0x2fff, 0x3000].map(byte), [7, 0, 0, 7]);
        for range in [0x3000..0x5000, 0x10_0000..0x10_1000, 0x800..0x1000, 0..0x800, u64::MAX - 0xfff..u64::MAX] {
            assert!(discard(&ram, range).is_err());
        }
        assert_eq!(byte(0x3000), 7);
    }

    #[test]
    fn shared_pages_are_taken_out_of_their_file() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x4000).unwrap();
        let pages = MmapRegionBuilder::new(0x4000)
            .with_file_offset(vm_memory::FileOffset::new(file.try_clone().unwrap(), 0))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED)
            .build()
            .unwrap();
        let ram = GuestRam::from_regions(vec![GuestRegionMmap::new(pages, GuestAddress(0)).unwrap()]).unwrap();
        ram.write_slice(&[7; 0x4000], GuestAddress(0)).unwrap();
        discard(&ram, 0x1000..0x3000).unwrap();
        let mut content = vec![0; 0x4000];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut content, 0).unwrap();
        assert_eq!([0xfff, 0x1000, 0x2fff, 0x3000].map(|at| content[at]), [7, 0, 0, 7]);
    }

    #[test]
    fn overlapping_ranges_are_refused() {
        assert!(matches!(reserve(&[0..0x3000, 0x2000..0x4000]), Err(Error::Layout(_))));
    }
}

//! Guest memory: reserved lazily, never touched before the guest does.
//!
//! The pages are private and anonymous, mapped with `MAP_NORESERVE`: the host commits one only when the guest, or
//! the loader, first writes it.

#![expect(unsafe_code, reason = "madvise takes an address; mallopt has no safe wrapper")]

use std::ops::Range;

use rustix::mm::{Advice, madvise};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};

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
    /// The ranges do not make a guest memory: they overlap, are empty, or do not fit the address space.
    #[error("cannot lay out guest memory over {0:#x?}")]
    Layout(Vec<Range<u64>>),
}

/// Has all threads of this process allocate from one arena. glibc gives each its own otherwise: five system calls, and
/// a few pages that nobody shares. Allocations are rare in a machine that runs.
pub fn use_one_arena() {
    #[cfg(target_env = "gnu")]
    // SAFETY: changes a parameter of the allocator, at any time.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
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
    let layout = || Error::Layout(ranges.to_vec());
    let regions = ranges
        .iter()
        .map(|range| {
            let bytes = range.end.checked_sub(range.start).ok_or_else(layout)?;
            let pages = MmapRegionBuilder::new(usize::try_from(bytes).map_err(|_| layout())?)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
                .build()
                .map_err(|source| Error::Map { start: range.start, bytes, source })?;
            GuestRegionMmap::new(pages, GuestAddress(range.start)).ok_or_else(layout)
        })
        .collect::<Result<Vec<_>, _>>()?;
    GuestRam::from_regions(regions).map_err(|_| layout())
}

/// The size of a huge page on x86-64 and AArch64 hosts, in bytes.
const HUGE_PAGE: u64 = 2 << 20;

/// Asks the host to back `range`, which is about to be filled, by huge pages: they come hundreds of times rarer, and
/// the guest finds its way through them faster. A host that has none to give goes on with small ones.
pub fn prefer_huge_pages(ram: &GuestRam, range: Range<u64>) {
    let start = range.start / HUGE_PAGE * HUGE_PAGE;
    let size = range.end.next_multiple_of(HUGE_PAGE) - start;
    let Some(pages) = usize::try_from(size).ok().and_then(|size| ram.get_slice(GuestAddress(start), size).ok()) else {
        return;
    };
    // SAFETY: the pages are mapped for as long as `ram` is, and this advice leaves what is in them as it is.
    let advised = unsafe { madvise(pages.ptr_guard_mut().as_ptr().cast(), pages.len(), Advice::LinuxHugepage) };
    if let Err(error) = advised {
        log::debug!("no huge pages for guest memory at {start:#x}: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

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
    fn overlapping_ranges_are_refused() {
        assert!(matches!(reserve(&[0..0x3000, 0x2000..0x4000]), Err(Error::Layout(_))));
    }
}

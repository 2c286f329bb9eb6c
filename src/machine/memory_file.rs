//! The `memory` file of a snapshot, mapped: guest memory as it is, region after region. Pages of zeros are holes.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use super::memory_copy::PAGE;
use crate::memory::{self, GuestRam};

/// Maps the `changed` pages of `file`, as [`Source`](super::memory_copy::Source) has written them, over guest memory.
///
/// # Errors
/// When there are no such pages of guest memory, or the host does not map them.
pub fn map_changed(ram: &GuestRam, file: &File, changed: &[(u64, u64)]) -> io::Result<()> {
    let mut offset = 0;
    for region in ram.iter() {
        let end = offset + region.len();
        for (first, count) in changed {
            let bytes = |pages: u64| pages.checked_mul(PAGE).ok_or(io::ErrorKind::InvalidInput);
            let range = bytes(*first)?..bytes(first.checked_add(*count).ok_or(io::ErrorKind::InvalidInput)?)?;
            // A run may go on in the next region.
            let (from, to) = (range.start.max(offset), range.end.min(end));
            if from < to {
                memory::map_file(ram, region.start_addr().raw_value() + from - offset, file, from, to - from)?;
            }
        }
        offset = end;
    }
    Ok(())
}

/// Maps `file` as guest memory over the `ranges`. Pages are read when the guest first uses them; what it writes stays its
/// own.
///
/// # Errors
/// When the host does not map it. Where the file is shorter, an access ends the machine.
pub fn map(file: &Arc<File>, ranges: &[Range<u64>]) -> Result<GuestRam, memory::Error> {
    let layout = || memory::Error::Layout(ranges.to_vec());
    let mut offset = 0;
    let mut regions = Vec::new();
    for range in ranges {
        let bytes = range.end.checked_sub(range.start).ok_or_else(layout)?;
        let pages = MmapRegionBuilder::new(usize::try_from(bytes).map_err(|_| layout())?)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::from_arc(Arc::clone(file), offset))
            .build()
            .map_err(|source| memory::Error::Map { start: range.start, bytes, source })?;
        regions.push(GuestRegionMmap::new(pages, GuestAddress(range.start)).ok_or_else(layout)?);
        offset += bytes;
    }
    GuestRam::from_regions(regions).map_err(|_| layout())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::memory_copy::{Pages, Runs, Source};
    use std::os::unix::fs::MetadataExt;
    use vm_memory::Bytes;

    fn write(ram: &GuestRam, file: &File) -> io::Result<()> {
        Source::new(ram, Pages::Used).copy(file).map(drop)
    }

    /// By a child, while memory changes.
    fn write_changed(ram: &GuestRam, file: &File) -> io::Result<Runs> {
        let child = Source::new(ram, Pages::Changed).fork(file)?;
        ram.write_obj(77u8, GuestAddress(19 * MIB)).unwrap();
        child.wait()
    }

    const MIB: u64 = 1 << 20;

    #[test]
    fn what_has_changed_is_written_and_mapped_over_the_rest() {
        let ranges = [0..4 * MIB, 16 * MIB..20 * MIB];
        let ram = memory::reserve(&ranges).unwrap();
        for address in [0, 2 * MIB, 4 * MIB - 1, 16 * MIB, 19 * MIB] {
            ram.write_obj(1u8, GuestAddress(address)).unwrap();
        }
        let file = || Arc::new(tempfile::tempfile().unwrap());
        let base = file();
        write(&ram, &base).unwrap();
        let ram = map(&base, &ranges).unwrap();
        memory::prefault(&ram).unwrap();
        // One page becomes zeros, two are beside each other in different regions, one is only read.
        ram.write_obj(0u8, GuestAddress(2 * MIB)).unwrap();
        ram.write_obj(2u8, GuestAddress(4 * MIB - 1)).unwrap();
        ram.write_obj(3u8, GuestAddress(16 * MIB)).unwrap();
        assert_eq!(ram.read_obj::<u8>(GuestAddress(19 * MIB)).unwrap(), 1);
        let diff = file();
        let changed = write_changed(&ram, &diff).unwrap();
        assert_eq!(changed, [(512, 1), (1023, 2)]);
        assert_eq!(diff.metadata().unwrap().len(), 8 * MIB);
        let ram = map(&base, &ranges).unwrap();
        map_changed(&ram, &diff, &changed).unwrap();
        let read =
            [0, 2 * MIB, 4 * MIB - 1, 16 * MIB, 19 * MIB].map(|at| ram.read_obj::<u8>(GuestAddress(at)).unwrap());
        assert_eq!(read, [1, 0, 2, 3, 1]);
        // And what changes after that.
        ram.write_obj(9u8, GuestAddress(19 * MIB)).unwrap();
        let next = file();
        assert_eq!(write_changed(&ram, &next).unwrap(), [(1024 + 768, 1)]);
        assert!(map_changed(&ram, &diff, &[(u64::MAX, 2)]).is_err());
    }

    #[test]
    fn memory_is_written_and_mapped_and_zeros_are_holes() {
        let ranges = [0..8 * MIB, 16 * MIB..64 * MIB];
        let ram = memory::reserve(&ranges).unwrap();
        let data = [(0, 1), (8 * MIB - 1, 2), (16 * MIB, 3), (40 * MIB + 5 * PAGE, 4), (64 * MIB - 1, 5)];
        for (address, byte) in data {
            ram.write_obj(byte, GuestAddress(address)).unwrap();
        }
        // Touched, and zeros again.
        ram.write_slice(&[7; 2 * 4096], GuestAddress(30 * MIB)).unwrap();
        ram.write_slice(&[0; 2 * 4096], GuestAddress(30 * MIB)).unwrap();
        let file = Arc::new(tempfile::tempfile().unwrap());
        write(&ram, &file).unwrap();
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.len(), 56 * MIB);
        assert!(metadata.blocks() * 512 <= 16 * PAGE, "{} blocks", metadata.blocks());
        for prefault in [false, true] {
            let mapped = map(&file, &ranges).unwrap();
            if prefault {
                memory::prefault(&mapped).unwrap();
            }
            for (address, byte) in data {
                assert_eq!(mapped.read_obj::<u8>(GuestAddress(address)).unwrap(), byte);
            }
            assert_eq!(mapped.read_obj::<u64>(GuestAddress(30 * MIB)).unwrap(), 0);
            // Its own, and not the file's; and written again with what is only in the file.
            mapped.write_obj(9u8, GuestAddress(20 * MIB)).unwrap();
            let again = Arc::new(tempfile::tempfile().unwrap());
            write(&mapped, &again).unwrap();
            let twice = map(&again, &ranges).unwrap();
            assert_eq!(twice.read_obj::<u8>(GuestAddress(20 * MIB)).unwrap(), 9);
            assert_eq!(twice.read_obj::<u8>(GuestAddress(64 * MIB - 1)).unwrap(), 5);
        }
        assert_eq!(map(&file, &ranges).unwrap().read_obj::<u8>(GuestAddress(20 * MIB)).unwrap(), 0);
    }
}

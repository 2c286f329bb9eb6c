//! The `memory` file of a snapshot: guest memory as it is, region after region. Pages of zeros are holes.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Address, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use crate::memory::{self, GuestRam};

const PAGE: usize = 4096;
/// What is copied at once, in bytes.
const CHUNK: usize = 1 << 20;
/// An entry of /proc/self/pagemap: the page is in memory, or swapped out.
const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
const SWAPPED: u64 = 1 << 62;
/// It is a page of a file, and no copy of one.
const OF_A_FILE: u64 = 1 << 61;

/// Writes all of guest memory to `file`, which is empty. What was never written is not read.
pub fn write(ram: &GuestRam, file: &File) -> io::Result<()> {
    let touched = Touched::new();
    let mut buffer = vec![0; CHUNK];
    let mut offset = 0;
    for region in ram.iter() {
        let (start, len) = (region.start_addr(), region.len());
        let host = ram.get_host_address(start).map_err(io::Error::other)? as u64;
        for at in (0..len).step_by(CHUNK) {
            let size = usize::try_from(len - at).map_or(CHUNK, |left| left.min(CHUNK));
            if !touched.any(host + at..host + at + size as u64) {
                continue;
            }
            let chunk = &mut buffer[..size];
            ram.read_slice(chunk, start.unchecked_add(at)).map_err(io::Error::other)?;
            write_chunk(chunk, file, offset + at)?;
        }
        offset += len;
    }
    file.set_len(offset)
}

/// Writes the pages that are other than in the files which guest memory was mapped from, each at its place; which ones, as
/// first page and count.
///
/// # Errors
/// When the host does not tell which these are, or does not write them.
pub fn write_changed(ram: &GuestRam, file: &File) -> io::Result<Vec<(u64, u64)>> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut changed: Vec<(u64, u64)> = Vec::new();
    let (mut page, mut entries) = (vec![0; PAGE], vec![0; CHUNK / PAGE * 8]);
    let mut offset = 0;
    for region in ram.iter() {
        let (start, len) = (region.start_addr(), region.len());
        let host = ram.get_host_address(start).map_err(io::Error::other)? as u64;
        for chunk in (0..len).step_by(CHUNK) {
            let pages =
                usize::try_from((len - chunk) / PAGE as u64).map_or(CHUNK / PAGE, |left| left.min(CHUNK / PAGE));
            let entries = &mut entries[..8 * pages];
            pagemap.read_exact_at(entries, (host + chunk) / PAGE as u64 * 8)?;
            for (at, entry) in (chunk..).step_by(PAGE).zip(entries.chunks(8)) {
                let entry = entry.try_into().map(u64::from_le_bytes).unwrap_or(u64::MAX);
                if entry & PRESENT_OR_SWAPPED == 0 || entry & (SWAPPED | OF_A_FILE) == OF_A_FILE {
                    continue;
                }
                ram.read_slice(&mut page, start.unchecked_add(at)).map_err(io::Error::other)?;
                file.write_all_at(&page, offset + at)?;
                let number = (offset + at) / PAGE as u64;
                match changed.last_mut() {
                    Some((first, count)) if *first + *count == number => *count += 1,
                    _ => changed.push((number, 1)),
                }
            }
        }
        offset += len;
    }
    file.set_len(offset)?;
    Ok(changed)
}

/// Maps the `changed` pages of `file`, as [`write_changed`] wrote them, over guest memory.
///
/// # Errors
/// When there are no such pages of guest memory, or the host does not map them.
pub fn map_changed(ram: &GuestRam, file: &File, changed: &[(u64, u64)]) -> io::Result<()> {
    let mut offset = 0;
    for region in ram.iter() {
        let end = offset + region.len();
        for (first, count) in changed {
            let bytes = |pages: u64| pages.checked_mul(PAGE as u64).ok_or(io::ErrorKind::InvalidInput);
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

/// Writes the pages of `chunk` that are not all zeros.
fn write_chunk(chunk: &[u8], file: &File, offset: u64) -> io::Result<()> {
    let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
    let mut begin = None;
    for at in (0..chunk.len()).step_by(PAGE) {
        let page = &chunk[at..chunk.len().min(at + PAGE)];
        match (begin, is_zero(page)) {
            (None, false) => begin = Some(at),
            (Some(from), true) => {
                file.write_all_at(&chunk[from..at], offset + from as u64)?;
                begin = None;
            }
            _ => {}
        }
    }
    begin.map_or(Ok(()), |from| file.write_all_at(&chunk[from..], offset + from as u64))
}

/// Which pages of this process have ever been written, as far as the host tells.
struct Touched {
    pagemap: Option<File>,
    /// Addresses that files are mapped to: what is there need not have been touched.
    files: Vec<Range<u64>>,
}

impl Touched {
    fn new() -> Self {
        let mapping = |line: &str| {
            let mut words = line.split_ascii_whitespace();
            let (start, end) = words.next()?.split_once('-')?;
            let inode = words.nth(3)?;
            let address = |text| u64::from_str_radix(text, 16).ok();
            Some((address(start)?..address(end)?, inode != "0"))
        };
        let Ok(maps) = fs::read_to_string("/proc/self/maps") else { return Self { pagemap: None, files: vec![] } };
        let mappings: Option<Vec<_>> = maps.lines().map(mapping).collect();
        let pagemap = File::open("/proc/self/pagemap").ok().filter(|_| mappings.is_some());
        let files = mappings.into_iter().flatten().filter(|(_, file)| *file).map(|(range, _)| range).collect();
        Self { pagemap, files }
    }

    /// Whether any page of `range` may have something in it.
    fn any(&self, range: Range<u64>) -> bool {
        let Some(pagemap) = &self.pagemap else { return true };
        if self.files.iter().any(|file| file.start < range.end && range.start < file.end) {
            return true;
        }
        let mut entries = [0; CHUNK / PAGE * 8];
        let pages = usize::try_from((range.end - range.start) / PAGE as u64).unwrap_or(usize::MAX);
        let Some(entries) = entries.get_mut(..8 * pages) else { return true };
        if pagemap.read_exact_at(entries, range.start / PAGE as u64 * 8).is_err() {
            return true;
        }
        let entry = |bytes: &[u8]| bytes.try_into().map(u64::from_le_bytes).unwrap_or(u64::MAX);
        entries.chunks(8).any(|bytes| entry(bytes) & PRESENT_OR_SWAPPED != 0)
    }
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
    use std::os::unix::fs::MetadataExt;

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
        let data = [(0, 1), (8 * MIB - 1, 2), (16 * MIB, 3), (40 * MIB + 5 * PAGE as u64, 4), (64 * MIB - 1, 5)];
        for (address, byte) in data {
            ram.write_obj(byte, GuestAddress(address)).unwrap();
        }
        // Touched, and zeros again.
        ram.write_slice(&[7; 2 * PAGE], GuestAddress(30 * MIB)).unwrap();
        ram.write_slice(&[0; 2 * PAGE], GuestAddress(30 * MIB)).unwrap();
        let file = Arc::new(tempfile::tempfile().unwrap());
        write(&ram, &file).unwrap();
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.len(), 56 * MIB);
        assert!(metadata.blocks() * 512 <= 16 * PAGE as u64, "{} blocks", metadata.blocks());
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

//! Guest memory, small enough to be compared as a whole: two regions that meet, a hole, and a third.

use std::ops::Range;

use bantam::memory::GuestRam;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

/// Where rings are, unless the input has them elsewhere; buffers follow.
pub const RINGS_END: u64 = 0x8000;
/// Where two regions meet.
pub const MEET: u64 = 0x1_0000;
/// Where the hole begins,
pub const HOLE: u64 = 0x1_8000;
/// and ends.
pub const HIGH: u64 = 0x2_0000;
/// The end of memory.
pub const END: u64 = 0x2_8000;

/// What is where nobody wrote.
const PATTERN: u8 = 0x5a;

/// Guest memory, and what the harness knows to be in it.
pub struct Memory {
    pub ram: GuestRam,
    /// What was there at the last look: zeros in the hole.
    pub known: Vec<u8>,
}

impl Memory {
    /// Fresh memory. It is not mapped anew for each input: that would take longer than most inputs do.
    pub fn new() -> Self {
        thread_local! {
            static RAM: GuestRam = bantam::memory::reserve(&[0..MEET, MEET..HOLE, HIGH..END]).expect("160 KiB");
        }
        let memory = Self { ram: RAM.with(Clone::clone), known: vec![0; END as usize] };
        for region in memory.regions() {
            Self::slice(&memory.ram, region.clone()).fill(PATTERN);
        }
        memory.refreshed()
    }

    fn refreshed(mut self) -> Self {
        self.refresh();
        self
    }

    fn regions(&self) -> impl Iterator<Item = Range<usize>> {
        self.ram.iter().map(|region| {
            let start = region.start_addr().0 as usize;
            start..start + region.len() as usize
        })
    }

    #[expect(clippy::mut_from_ref, reason = "it is the guest's memory, and devices have no thread here")]
    fn slice(ram: &GuestRam, range: Range<usize>) -> &mut [u8] {
        let region = ram.find_region(GuestAddress(range.start as u64)).expect("it is a region's");
        let at = range.start as u64 - region.start_addr().0;
        let start = region.get_host_address(MemoryRegionAddress(at)).expect("it is in the region");
        // SAFETY: the range is within the region, which is mapped as long as `ram` lives. No device runs meanwhile.
        unsafe { std::slice::from_raw_parts_mut(start, range.len()) }
    }

    /// Takes what is there now for known.
    pub fn refresh(&mut self) {
        for region in self.regions().collect::<Vec<_>>() {
            let now: &[u8] = Self::slice(&self.ram, region.clone());
            self.known[region].copy_from_slice(now);
        }
    }

    /// Writes `data` as the guest does; what is not memory is left out.
    pub fn write(&mut self, address: u64, data: &[u8]) {
        let Ok(address) = usize::try_from(address) else { return };
        for region in self.regions().collect::<Vec<_>>() {
            let start = address.max(region.start);
            let end = address.saturating_add(data.len()).min(region.end);
            if start < end {
                let data = &data[start - address..end - address];
                self.known[start..end].copy_from_slice(data);
                Self::slice(&self.ram, start..end).copy_from_slice(data);
            }
        }
    }

    /// Whether a range is as it was.
    pub fn is_known(&self, range: &Range<u64>) -> bool {
        self.regions().all(|region| {
            let start = (range.start as usize).max(region.start);
            let end = (range.end as usize).min(region.end);
            start >= end || *Self::slice(&self.ram, start..end) == self.known[start..end]
        })
    }

    /// Fills a range of one region with zeros.
    pub fn clear(&mut self, range: Range<u64>) {
        self.write(range.start, &vec![0; (range.end - range.start) as usize]);
    }

    pub fn is_memory(&self, address: u64) -> bool {
        address < HOLE || (HIGH..END).contains(&address)
    }

    /// The number of at most 8 bytes that is known to be at `address`, if all of it is memory.
    pub fn number(&self, address: u64, bytes: u64) -> Option<u64> {
        let last = address.checked_add(bytes - 1)?;
        let of = |bytes: &[u8]| bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte));
        (self.is_memory(address) && self.is_memory(last)).then(|| of(&self.known[address as usize..=last as usize]))
    }

    /// The number that is there now.
    pub fn fresh(&self, address: u64, bytes: u64) -> Option<u64> {
        let byte =
            |at: u64| self.is_memory(at).then(|| u64::from(Self::slice(&self.ram, at as usize..at as usize + 1)[0]));
        (0..bytes).rev().try_fold(0, |number, i| Some(number << 8 | byte(address.checked_add(i)?)?))
    }

    /// Compares memory with what was known, outside of what `may` change: those bytes are not looked at. Then takes what
    /// is there for known. A change elsewhere is one that `explained` has a reason for.
    pub fn check(&mut self, may: &[Range<u64>], explained: impl Fn(&[u8], &[u8]) -> bool) {
        for range in may {
            for region in self.regions().collect::<Vec<_>>() {
                let start = (range.start as usize).max(region.start);
                let end = usize::try_from(range.end).unwrap_or(usize::MAX).min(region.end);
                if start < end {
                    let now: &[u8] = Self::slice(&self.ram, start..end);
                    self.known[start..end].copy_from_slice(now);
                }
            }
        }
        for region in self.regions().collect::<Vec<_>>() {
            let now: &[u8] = Self::slice(&self.ram, region.clone());
            if *now == self.known[region.clone()] {
                continue;
            }
            for (page, known) in now.chunks(0x1000).zip(self.known[region.clone()].chunks(0x1000)) {
                if page != known && !explained(page, known) {
                    let i = (0..page.len()).find(|i| page[*i] != known[*i]).expect("they differ");
                    let at = page.as_ptr() as usize - now.as_ptr() as usize + region.start + i;
                    panic!("memory at {at:#x} was not given, and is {:#x} instead of {:#x}", page[i], known[i]);
                }
            }
            let now = now.to_vec();
            self.known[region].copy_from_slice(&now);
        }
    }

    /// Whether `text` is anywhere in memory.
    pub fn has(&self, text: &[u8]) -> bool {
        memchr::memmem::find(&self.known, text).is_some()
    }
}

impl Default for Memory {
    fn default() -> Self {
        Self::new()
    }
}

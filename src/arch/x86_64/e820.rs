//! The memory map that the guest is told: what is memory, and what of it is taken.

use std::ops::Range;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::layout::{HIGH_MEMORY, LOW_MEMORY_END};
use crate::memory::GuestRam;

/// What a range is good for. The numbers are those of the e820 map and of PVH alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Free memory.
    Usable = 1,
    /// Not to be touched: the tables below 1 MiB.
    Reserved = 2,
}

/// The memory map, in ascending order.
pub fn map(ram: &GuestRam) -> Vec<(Range<u64>, Kind)> {
    let mut map = Vec::new();
    for region in ram.iter() {
        let start = region.start_addr().0;
        let end = start.saturating_add(region.len());
        let parts = [
            (start..end.min(LOW_MEMORY_END), Kind::Usable),
            (start.max(LOW_MEMORY_END)..end.min(HIGH_MEMORY), Kind::Reserved),
            (start.max(HIGH_MEMORY)..end, Kind::Usable),
        ];
        map.extend(parts.into_iter().filter(|(range, _)| !range.is_empty()));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::x86_64::layout::ram_ranges;
    use crate::memory::reserve;

    #[test]
    fn the_tables_are_reserved_and_the_rest_is_usable() {
        let ram = reserve(&ram_ranges(5 << 30)).unwrap();
        assert_eq!(
            map(&ram),
            [
                (0..0x9_fc00, Kind::Usable),
                (0x9_fc00..0x10_0000, Kind::Reserved),
                (0x10_0000..3 << 30, Kind::Usable),
                (4 << 30..6 << 30, Kind::Usable),
            ]
        );
    }
}

//! What the guest says of its memory: virtio 1.2, section 5.5.6.4, and what Linux has added since.

use serde::Serialize;
use vm_memory::Bytes;

use crate::memory::GuestRam;
use crate::size::Size;
use crate::virtio::queue::Chain;

/// Bytes of one statistic: a tag of 16 bits and a value of 64.
const ENTRY: usize = 10;
/// Statistics that are read of one request: more than there are tags.
const ENTRIES: usize = 64;

/// A balloon, and the memory of its guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statistics {
    /// How large the balloon is to be.
    pub target: Size,
    /// How large it is, as the guest says.
    pub actual: Size,
    /// What the guest said last, once it has.
    pub guest: Option<GuestStatistics>,
}

macro_rules! statistics {
    ($($tag:literal $name:ident $text:literal),* $(,)?) => {
        /// What the guest said; absent what it did not. Memory is in bytes, the others are counts since it booted.
        #[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
        pub struct GuestStatistics {
            $(
                #[doc = $text]
                #[serde(skip_serializing_if = "Option::is_none")]
                pub $name: Option<u64>,
            )*
        }

        impl GuestStatistics {
            fn set(&mut self, tag: u16, value: u64) {
                match tag {
                    $($tag => self.$name = Some(value),)*
                    // Of a later version of the device.
                    _ => {}
                }
            }
        }
    };
}

statistics! {
    0 swap_in "Memory that was swapped in.",
    1 swap_out "Memory that was swapped out.",
    2 major_faults "Page faults that took I/O.",
    3 minor_faults "Page faults that did not.",
    4 free_memory "Memory that is used for nothing.",
    5 total_memory "Memory that there is.",
    6 available_memory "Memory that new programs could have without swapping.",
    7 disk_caches "Memory that can be had without I/O.",
    8 hugetlb_allocations "Huge pages that were allocated.",
    9 hugetlb_failures "Huge pages that could not be.",
    10 oom_kill "Processes that were ended because memory ran out.",
    11 alloc_stall "Allocations that had to wait for memory.",
    12 async_scan "Pages that were looked at in the background, to be reclaimed.",
    13 direct_scan "Pages that an allocation looked at.",
    14 async_reclaim "Pages that were reclaimed in the background.",
    15 direct_reclaim "Pages that an allocation reclaimed.",
}

impl GuestStatistics {
    /// Reads a request; `None` if there is nothing to be read.
    pub(super) fn read(ram: &GuestRam, chain: Chain<'_>) -> Option<Self> {
        let mut bytes = [0; ENTRY * ENTRIES];
        let mut len = 0;
        for buffer in chain.readable() {
            let count = (buffer.len() as usize).min(bytes.len() - len);
            ram.read_slice(&mut bytes[len..len + count], buffer.addr()).ok()?;
            len += count;
        }
        let mut read = Self::default();
        let entries = bytes[..len].as_chunks::<ENTRY>().0;
        for entry in entries {
            let (tag, value) = entry.split_at(2);
            let tag = u16::from_le_bytes(tag.try_into().expect("2 bytes"));
            read.set(tag, u64::from_le_bytes(value.try_into().expect("8 bytes")));
        }
        (!entries.is_empty()).then_some(read)
    }
}

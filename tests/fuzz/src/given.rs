//! What a driver has given a device, read from guest memory without the code that is under test.

use std::collections::HashMap;
use std::ops::Range;

use virtio_queue::QueueT;

use crate::memory::Memory;

const NEXT: u64 = 1;
const WRITE: u64 = 2;
const INDIRECT: u64 = 4;
/// The most descriptors that a table outside of the queue's has for a device.
const INDIRECT_MAX: u64 = 65535;

/// Where a queue's parts are, and how far the device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ring {
    pub size: u16,
    pub table: u64,
    pub driver: u64,
    pub device: u64,
    pub event_idx: bool,
    pub next_avail: u16,
    pub next_used: u16,
}

impl Ring {
    pub fn of(queue: &virtio_queue::Queue) -> Self {
        Self {
            size: queue.size(),
            table: queue.desc_table(),
            driver: queue.avail_ring(),
            device: queue.used_ring(),
            event_idx: queue.event_idx_enabled(),
            next_avail: queue.next_avail(),
            next_used: queue.next_used(),
        }
    }

    /// What only the driver writes: the table and the available ring.
    pub fn drivers(&self) -> [Range<u64>; 2] {
        let size = u64::from(self.size);
        [self.table..self.table + 16 * size, self.driver..self.driver + 6 + 2 * size]
    }

    /// What only the device writes.
    pub fn devices(&self) -> Range<u64> {
        self.device..self.device + 6 + 8 * u64::from(self.size)
    }

    /// Of that, what it writes when it uses `count` buffers: flags and index, elements, and `avail_event`.
    pub fn used_parts(&self, count: u16) -> Vec<Range<u64>> {
        let element = |i: u16| self.used_element(self.next_used.wrapping_add(i));
        let end = self.device + 4 + 8 * u64::from(self.size);
        let mut parts: Vec<_> = (0..count.min(self.size)).map(|i| element(i)..element(i) + 8).collect();
        parts.extend([self.device..self.device + 4, end..end + 2]);
        parts
    }

    pub fn used_element(&self, position: u16) -> u64 {
        self.device + 4 + 8 * u64::from(position % self.size)
    }

    pub fn available_index(&self, memory: &Memory) -> u16 {
        memory.number(self.driver + 2, 2).unwrap_or(0) as u16
    }

    /// The buffers that are at a position of the available ring.
    pub fn given(&self, memory: &Memory, position: u16) -> Given {
        let slot = self.driver + 4 + 2 * u64::from(position % self.size);
        let head = memory.number(slot, 2).unwrap_or(0);
        let mut given = Given { head, ..Given::default() };
        let (mut table, mut size, mut index, mut left, mut indirect) =
            (self.table, u64::from(self.size), head, u64::from(self.size), false);
        let (mut seen, mut is_loop) = (HashMap::new(), false);
        while left > 0 && index < size {
            if let Some((then, room)) = seen.insert(index, (left, given.room)).filter(|_| !is_loop) {
                // So often the same comes again until the table has no more.
                given.room += left / (then - left) * (given.room - room);
                (left, is_loop) = (left % (then - left), true);
                continue;
            }
            left -= 1;
            let at = table.wrapping_add(16 * index);
            let read = |offset: u64, bytes| memory.number(at.checked_add(offset)?, bytes);
            let (Some(addr), Some(len), Some(flags), Some(next)) = (read(0, 8), read(8, 4), read(12, 2), read(14, 2))
            else {
                break;
            };
            if flags & INDIRECT != 0 {
                if indirect || len % 16 != 0 || len / 16 > INDIRECT_MAX {
                    break;
                }
                (table, size, index, left, indirect) = (addr, len / 16, 0, len / 16, true);
                given.tables.push(addr..addr.saturating_add(len));
                seen.clear();
                continue;
            }
            if flags & WRITE != 0 && len > 0 {
                given.room += len;
                given.last = addr.saturating_add(len - 1);
                if !is_loop {
                    given.writable.push(addr..addr.saturating_add(len));
                }
            }
            if flags & NEXT == 0 {
                break;
            }
            index = next;
        }
        given
    }
}

/// A chain of buffers.
#[derive(Debug, Default)]
pub struct Given {
    pub head: u64,
    /// Those that the device may write, in order, each once.
    pub writable: Vec<Range<u64>>,
    /// Bytes that the device may write.
    pub room: u64,
    /// The last one of them.
    last: u64,
    /// Tables outside of the queue's.
    pub tables: Vec<Range<u64>>,
}

impl Given {
    /// The first `bytes` of them.
    pub fn first(&self, bytes: u64) -> Vec<Range<u64>> {
        let mut left = bytes;
        let mut first = vec![];
        for range in &self.writable {
            let some = left.min(range.end - range.start);
            first.push(range.start..range.start + some);
            left -= some;
        }
        first
    }

    /// Whether all that the device may write is memory: else it need not know how far it came.
    pub fn is_memory(&self, memory: &Memory) -> bool {
        let is_memory = |range: &Range<u64>| {
            // Longer ones go beyond the end.
            range.end - range.start < 1 << 20
                && range.clone().step_by(0x1000).all(|at| memory.is_memory(at))
                && memory.is_memory(range.end - 1)
        };
        self.writable.iter().all(is_memory)
    }

    /// The last one of them.
    pub fn last(&self) -> Option<Range<u64>> {
        (self.room > 0).then(|| self.last..self.last.saturating_add(1))
    }
}

/// Whether two ranges have something in common.
pub fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

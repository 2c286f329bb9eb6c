//! A request: descriptors that the driver chained together (virtio 1.2, 2.7.5).

use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestAddress, VolatileMemory, VolatileSlice};

use crate::memory::{self, GuestRam};

/// Bytes of a descriptor.
const DESCRIPTOR: u64 = size_of::<Descriptor>() as u64;

/// The descriptors of a request, each read once. One that breaks a rule ends it, and the last one that came said that there was
/// another.
#[derive(Debug, Clone)]
pub struct Chain<'a> {
    ram: &'a GuestRam,
    /// The table that they are in now: that of the queue, or one that a descriptor of that refers to.
    table: GuestAddress,
    /// How many it has.
    size: u16,
    /// It, if it is all in guest memory.
    whole: Option<VolatileSlice<'a>>,
    is_indirect: bool,
    head: u16,
    next: u16,
    /// How many may come: no more than the table has, or they are a loop.
    left: u16,
    bytes: u32,
}

impl<'a> Chain<'a> {
    /// What begins with descriptor `head` of a queue's `table`, which has `size` of them.
    pub(super) fn new(ram: &'a GuestRam, table: u64, size: u16, head: u16) -> Self {
        let table = GuestAddress(table);
        let whole = whole(ram, table, size);
        Self { ram, table, size, whole, is_indirect: false, head, next: head, left: size, bytes: 0 }
    }

    /// The number of the first descriptor, by which the request is given back.
    pub fn head_index(&self) -> u16 {
        self.head
    }

    /// The descriptors of what the device reads.
    pub fn readable(self) -> impl Iterator<Item = Descriptor> {
        self.filter(|descriptor| !descriptor.is_write_only())
    }

    /// Those of what it writes.
    pub fn writable(self) -> impl Iterator<Item = Descriptor> {
        self.filter(Descriptor::is_write_only)
    }

    /// Goes on in the table that a descriptor refers to (2.7.5.3); `None` if that is wrong.
    fn enter(&mut self, descriptor: &Descriptor) -> Option<()> {
        let len = u64::from(descriptor.len());
        if self.is_indirect || !len.is_multiple_of(DESCRIPTOR) {
            return None;
        }
        let size = u16::try_from(len / DESCRIPTOR).ok()?;
        (self.table, self.size, self.left) = (descriptor.addr(), size, size);
        self.whole = whole(self.ram, self.table, size);
        (self.next, self.is_indirect) = (0, true);
        Some(())
    }
}

fn whole(ram: &GuestRam, table: GuestAddress, size: u16) -> Option<VolatileSlice<'_>> {
    memory::slice(ram, table, size_of::<Descriptor>() * usize::from(size))
}

impl Iterator for Chain<'_> {
    type Item = Descriptor;

    fn next(&mut self) -> Option<Descriptor> {
        loop {
            if self.left == 0 || self.next >= self.size {
                return None;
            }
            let offset = DESCRIPTOR * u64::from(self.next);
            let descriptor: Descriptor = match &self.whole {
                Some(table) => table.get_ref(usize::try_from(offset).ok()?).ok()?.load(),
                None => memory::read_obj(self.ram, GuestAddress(self.table.0.checked_add(offset)?)).ok()?,
            };
            if descriptor.refers_to_indirect_table() {
                self.enter(&descriptor)?;
                continue;
            }
            // All of them have less than 4 GiB (2.7.5.2).
            self.bytes = self.bytes.checked_add(descriptor.len())?;
            self.left = if descriptor.has_next() { self.left - 1 } else { 0 };
            self.next = descriptor.next();
            return Some(descriptor);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
    use virtio_queue::{Queue, QueueOwnedT, QueueT};
    use vm_memory::Bytes;

    use super::*;

    const TABLE: u64 = 0;
    const AVAILABLE: u64 = 0x100;
    const OTHER: u64 = 0x200;
    const SIZE: u16 = 8;

    /// A descriptor of a driver that knows little of rules.
    fn descriptor() -> impl Strategy<Value = Descriptor> {
        let flags = VRING_DESC_F_NEXT | VRING_DESC_F_WRITE | VRING_DESC_F_INDIRECT;
        let addr = prop_oneof![Just(OTHER), Just(TABLE), Just(0x3f8), any::<u64>()];
        let len = prop_oneof![(0u32..9).prop_map(|count| count * 16), Just(16 << 16), any::<u32>()];
        (addr, len, 0..=flags, 0..SIZE + 2)
            .prop_map(|(addr, len, flags, next)| Descriptor::new(addr, len, flags.try_into().unwrap(), next))
    }

    proptest! {
        /// Chains are those that virtio_queue finds, which others have looked at.
        #[test]
        fn chains_are_those_of_virtio_queue(
            descriptors in proptest::collection::vec(descriptor(), 16..32),
            head in 0..SIZE + 2,
        ) {
            // Two regions, so that a table may reach beyond the first, and beyond all.
            let ram = memory::reserve(&[0..0x1000, 0x1000..0x2000]).unwrap();
            for (slot, descriptor) in descriptors.iter().enumerate() {
                let table = if slot < 8 { TABLE } else { OTHER - 8 * 16 };
                ram.write_obj(*descriptor, GuestAddress(table + 16 * slot as u64)).unwrap();
            }
            ram.write_obj([0u16, 1, head], GuestAddress(AVAILABLE)).unwrap();
            let mut queue = Queue::new(SIZE).unwrap();
            queue.try_set_desc_table_address(GuestAddress(TABLE)).unwrap();
            queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).unwrap();
            queue.set_ready(true);
            let theirs = queue.iter(&ram).unwrap().next().unwrap();
            let ours = Chain::new(&ram, TABLE, SIZE, head);
            prop_assert_eq!(ours.head_index(), theirs.head_index());
            let fields = |it: Descriptor| (it.addr(), it.len(), it.flags(), it.next());
            prop_assert_eq!(ours.map(fields).collect::<Vec<_>>(), theirs.map(fields).collect::<Vec<_>>());
        }
    }
}

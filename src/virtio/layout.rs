//! A request as the driver laid it out: what the device may read, then what it may write, cut into buffers anywhere.
//!
//! The driver says with the order of the bytes what they are, not with the cuts (virtio 1.2, 2.7.4.1).

use vm_memory::{Address, GuestAddress, GuestMemoryBackend};

use crate::memory::{self, GuestRam};
use crate::virtio::iovec::{self, Iovecs};
use crate::virtio::queue::Chain;

/// Bytes of guest memory that belong together, in order.
#[derive(Default)]
pub struct Bytestream {
    buffers: Vec<(GuestAddress, u32)>,
    /// Buffers before this one are taken.
    first: usize,
    len: u64,
}

impl Bytestream {
    fn clear(&mut self) {
        self.buffers.clear();
        (self.first, self.len) = (0, 0);
    }

    fn push(&mut self, addr: GuestAddress, len: u32) {
        self.buffers.push((addr, len));
        self.len += u64::from(len);
    }

    /// Bytes that are left.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Copies the first `data.len()` bytes out of guest memory and removes them; false if there are not that many, or
    /// not all in guest memory.
    #[must_use]
    pub fn take(&mut self, ram: &GuestRam, mut data: &mut [u8]) -> bool {
        while !data.is_empty() {
            let Some((addr, len)) = self.buffers.get_mut(self.first) else { return false };
            let count = data.len().min(*len as usize);
            let (now, later) = data.split_at_mut(count);
            if memory::read_slice(ram, now, *addr).is_err() {
                return false;
            }
            data = later;
            let count = u32::try_from(count).expect("no more than a u32");
            // Where the address would overflow nothing can be left.
            *addr = addr.unchecked_add(count.into());
            *len -= count;
            self.first += usize::from(*len == 0);
            self.len -= u64::from(count);
        }
        true
    }

    /// The address of the first byte that is left, if it is in guest memory.
    pub fn first(&self, ram: &GuestRam) -> Option<GuestAddress> {
        let (addr, _) = *self.buffers.get(self.first)?;
        ram.address_in_range(addr).then_some(addr)
    }

    /// Removes the last byte; its address, if it is in guest memory.
    pub fn take_last(&mut self, ram: &GuestRam) -> Option<GuestAddress> {
        let (addr, len) = self.buffers.last_mut()?;
        let last = addr.checked_add(u64::from(*len) - 1)?;
        *len -= 1;
        if *len == 0 {
            self.buffers.pop();
        }
        self.len -= 1;
        ram.address_in_range(last).then_some(last)
    }

    /// Makes `iovecs` the list of what is left.
    pub fn list(&self, iovecs: &mut Iovecs) -> Result<(), iovec::Error> {
        iovecs.clear();
        self.buffers[self.first..].iter().try_for_each(|(addr, len)| iovecs.push(*addr, *len))
    }
}

/// A request's bytes. It is filled again for each request, so that there is nothing to allocate.
#[derive(Default)]
pub struct Layout {
    /// What the device may read.
    pub readable: Bytestream,
    /// What the device may write.
    pub writable: Bytestream,
}

impl Layout {
    /// Takes down the descriptors of `chain`, each read once; false if they are not a proper chain of at most `max`:
    /// they end in nothing, loop, or go back from writable to readable (2.7.4.2).
    #[must_use]
    pub fn load(&mut self, chain: Chain<'_>, max: usize) -> bool {
        self.readable.clear();
        self.writable.clear();
        let mut complete = false;
        for (count, descriptor) in chain.enumerate() {
            if count == max {
                return false;
            }
            complete = !descriptor.has_next();
            if descriptor.len() == 0 {
                continue;
            }
            if descriptor.is_write_only() {
                self.writable.push(descriptor.addr(), descriptor.len());
            } else if self.writable.buffers.is_empty() {
                self.readable.push(descriptor.addr(), descriptor.len());
            } else {
                return false;
            }
        }
        complete
    }
}

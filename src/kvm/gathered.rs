//! Writes to a port that KVM gathers (`KVM_REGISTER_COALESCED_MMIO`): the guest goes on at once, and they are served when a
//! vCPU leaves it for something else. For a port whose driver looks at the device after it has written.

#![expect(unsafe_code, reason = "the ring of writes is shared with the kernel")]

use std::mem::size_of;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};

use kvm_bindings::{kvm_coalesced_mmio, kvm_coalesced_mmio_ring};
use kvm_ioctls::{IoEventAddress, VmFd};

use crate::bus::Bus;

/// A port that KVM can gather writes of one byte to.
pub struct Gathered {
    pub(super) vm: Arc<VmFd>,
    pub(super) port: u16,
}

impl Gathered {
    /// From now on it does, until a vCPU leaves the guest for something else; or it cannot.
    pub fn start(&self) {
        if let Err(error) = self.vm.register_coalesced_mmio(IoEventAddress::Pio(self.port.into()), 1) {
            log::debug!("cannot gather writes to port {:#x}: {error}", self.port);
        }
    }

    /// From now on each write leaves the guest.
    pub fn stop(&self) {
        let port = IoEventAddress::Pio(self.port.into());
        if let Err(error) = self.vm.unregister_coalesced_mmio(port, 1) {
            log::error!("cannot have writes to port {:#x} leave the guest: {error}", self.port);
        }
    }
}

/// Held by who serves writes, so that they stay in order. All vCPUs have the same ring.
pub(super) type Turn = Arc<Mutex<()>>;

/// Serves the writes in the ring at `ring`, on a page of `page_size` bytes. A caller that does not wait leaves them to who is at it.
///
/// # Safety
/// The page is mapped, and KVM's ring.
pub(super) unsafe fn serve(ring: NonNull<u8>, page_size: usize, turn: &Turn, pio: &Bus, waits: bool) {
    let entries = (page_size - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>();
    // SAFETY: the ring begins with two numbers, aligned as the page is, which are accessed as atomics, and by the kernel.
    let first = unsafe { AtomicU32::from_ptr(ring.cast().as_ptr()) };
    // SAFETY: as above.
    let second = unsafe { ring.add(size_of::<u32>()) };
    // SAFETY: as above.
    let last = unsafe { AtomicU32::from_ptr(second.cast().as_ptr()) };
    if first.load(Ordering::Acquire) == last.load(Ordering::Acquire) {
        return;
    }
    let _turn = match turn.try_lock() {
        Ok(turn) => turn,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) if waits => turn.lock().unwrap_or_else(PoisonError::into_inner),
        Err(TryLockError::WouldBlock) => return,
    };
    // What others write from now on they see to.
    let end = last.load(Ordering::Acquire);
    // SAFETY: they lie behind the two numbers.
    let all = unsafe { ring.add(size_of::<kvm_coalesced_mmio_ring>()) }.cast::<kvm_coalesced_mmio>();
    let mut at = first.load(Ordering::Acquire);
    while at != end {
        let index = usize::try_from(at).unwrap_or(0) % entries;
        // SAFETY: there are so many on the page.
        let entry = unsafe { all.add(index) };
        // SAFETY: KVM has written it before it changed `last`, and leaves it until `first` is beyond.
        let write = unsafe { entry.read_volatile() };
        let len = usize::try_from(write.len).unwrap_or(0).min(write.data.len());
        pio.write(write.phys_addr, &write.data[..len]);
        at = u32::try_from((index + 1) % entries).expect("a page has few");
        first.store(at, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::BusDevice;

    #[derive(Default)]
    struct Port(Vec<u8>);

    impl BusDevice for Port {
        fn read(&mut self, _: u64, _: &mut [u8]) {}
        fn write(&mut self, _: u64, data: &[u8]) {
            self.0.extend_from_slice(data);
        }
    }

    #[test]
    fn writes_are_served_in_order_around_the_ring() {
        const ENTRIES: u32 = 170;
        let mut page = vec![0u64; 512];
        let ring = NonNull::from(&mut page[0]).cast::<u8>();
        let put = |at: u32, byte: u8| {
            let mut entry = kvm_coalesced_mmio { phys_addr: 0x3f8, len: 1, ..Default::default() };
            entry.data[0] = byte;
            // SAFETY: they lie behind the two numbers.
            let all = unsafe { ring.add(8) }.cast::<kvm_coalesced_mmio>();
            // SAFETY: the page has so many.
            let place = unsafe { all.add(at as usize) };
            // SAFETY: as above.
            unsafe { place.write(entry) };
        };
        let set = |first: u32, last: u32| {
            // SAFETY: the page begins with the two numbers.
            unsafe { ring.cast::<[u32; 2]>().write([first, last]) };
        };
        let (mut bus, port, turn) = (Bus::default(), Arc::new(Mutex::new(Port::default())), Turn::default());
        bus.attach(0x3f8, 8, port.clone()).unwrap();
        // SAFETY: the page is a ring, and nobody else has it.
        let serve = |waits| unsafe { serve(ring, 4096, &turn, &bus, waits) };
        serve(true);
        put(ENTRIES - 1, b'a');
        put(0, b'b');
        set(ENTRIES - 1, 1);
        let held = turn.lock().unwrap();
        serve(false);
        assert!(port.lock().unwrap().0.is_empty(), "another one is at it");
        drop(held);
        serve(false);
        serve(true);
        assert_eq!(port.lock().unwrap().0, b"ab");
        assert_eq!(page[0], 1 | 1 << 32);
    }
}

//! The guest's part in tests: a driver that speaks to the registers, and lays rings out in guest memory.

use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress};

use super::device::VirtioDevice;
use super::mmio::Mmio;
use crate::bus::BusDevice;
use crate::interrupt::Interrupt;
use crate::memory::GuestRam;

/// Guest addresses from here on are free for buffers.
pub const BUFFERS: u64 = 0x4_0000;
/// End of guest memory.
pub const END: u64 = 0x20_0000;

/// A buffer: address, length, whether the device may write it.
pub type Buffer = (u64, u32, bool);

/// Far longer than anything here takes: what does not come by then never does.
const PATIENCE: Duration = Duration::from_secs(20);

struct Line(mpsc::Sender<()>);

impl Interrupt for Line {
    fn trigger(&self) -> std::io::Result<()> {
        let _ = self.0.send(());
        Ok(())
    }
}

/// A virtqueue as the driver sees it.
pub struct Ring {
    ram: GuestRam,
    base: u64,
    size: u16,
    next: u16,
    pub available: u16,
    seen: u16,
}

impl Ring {
    pub fn new(ram: &GuestRam, index: u64, size: u16) -> Self {
        let base = 0x4000 * (index + 1);
        ram.write_slice(&[0; 0x4000], GuestAddress(base)).unwrap();
        Self { ram: ram.clone(), base, size, next: 0, available: 0, seen: 0 }
    }

    pub fn descriptors(&self) -> u64 {
        self.base
    }
    pub fn driver(&self) -> u64 {
        self.base + 0x1000
    }
    pub fn device(&self) -> u64 {
        self.base + 0x2000
    }

    /// Writes descriptor `index` of the table at `table`.
    pub fn write_descriptor(&self, table: u64, index: u16, (addr, len): (u64, u32), flags: u32, next: u16) {
        let at = table + 16 * u64::from(index);
        self.ram.write_obj(addr, GuestAddress(at)).unwrap();
        self.ram.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.ram.write_obj(u16::try_from(flags).unwrap(), GuestAddress(at + 12)).unwrap();
        self.ram.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    fn write_chain(&self, table: u64, first: u16, buffers: &[Buffer]) {
        for (i, (addr, len, writable)) in (first..).zip(buffers) {
            let last = usize::from(i - first) + 1 == buffers.len();
            let flags = if *writable { VRING_DESC_F_WRITE } else { 0 } | if last { 0 } else { VRING_DESC_F_NEXT };
            self.write_descriptor(table, i, (*addr, *len), flags, if last { 0 } else { i + 1 });
        }
    }

    /// Makes a chain of descriptors available; its head.
    pub fn add(&mut self, buffers: &[Buffer]) -> u16 {
        let len = u16::try_from(buffers.len()).unwrap();
        if self.next + len > self.size {
            self.next = 0;
        }
        let head = self.next;
        self.write_chain(self.base, head, buffers);
        self.next += len;
        self.publish(head);
        head
    }

    /// Makes a chain available whose descriptors are in a table at `table`.
    pub fn add_indirect(&mut self, table: u64, buffers: &[Buffer]) -> u16 {
        self.write_chain(table, 0, buffers);
        let head = self.next % self.size;
        let len = u32::try_from(16 * buffers.len()).unwrap();
        self.write_descriptor(self.base, head, (table, len), VRING_DESC_F_INDIRECT, 0);
        self.next = head + 1;
        self.publish(head);
        head
    }

    /// Makes the chain at `head` available, and asks to hear of the next used one.
    pub fn publish(&mut self, head: u16) {
        let driver = self.driver();
        let slot = driver + 4 + 2 * u64::from(self.available % self.size);
        self.ram.write_obj(head, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.ask_to_hear();
        self.set_available(self.available);
    }

    /// Sets `used_event`: of the next used one.
    fn ask_to_hear(&self) {
        let at = self.driver() + 4 + 2 * u64::from(self.size);
        self.ram.store(self.seen, GuestAddress(at), Ordering::Relaxed).unwrap();
    }

    /// Sets `avail.idx`.
    pub fn set_available(&self, index: u16) {
        self.ram.store(index, GuestAddress(self.driver() + 2), Ordering::Release).unwrap();
    }

    /// What the device used since the last call: heads and lengths.
    pub fn used(&mut self) -> Vec<(u16, u32)> {
        let device = self.device();
        let mut used = Vec::new();
        loop {
            let index: u16 = self.ram.load(GuestAddress(device + 2), Ordering::Acquire).unwrap();
            if self.seen == index {
                return used;
            }
            while self.seen != index {
                let at = device + 4 + 8 * u64::from(self.seen % self.size);
                let [head, len]: [u32; 2] = self.ram.read_obj(GuestAddress(at)).unwrap();
                used.push((u16::try_from(head).unwrap(), len));
                self.seen = self.seen.wrapping_add(1);
            }
            self.ask_to_hear();
            // What came before the device knew that was not told.
            fence(Ordering::SeqCst);
        }
    }
}

/// A driver with its device.
pub struct Driver {
    pub ram: GuestRam,
    pub mmio: Mmio,
    pub rings: Vec<Ring>,
    interrupts: Mutex<mpsc::Receiver<()>>,
}

impl Driver {
    /// Finds `device`, and does nothing with it yet. Guest memory is two regions that meet in the midst of the buffers.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        let ram = crate::memory::reserve(&[0..END / 2, END / 2..END]).unwrap();
        let (line, interrupts) = mpsc::channel();
        let mmio = Mmio::new(ram.clone(), device, Arc::new(Line(line)), "test").unwrap();
        Self { ram, mmio, rings: Vec::new(), interrupts: Mutex::new(interrupts) }
    }

    pub fn read(&mut self, offset: u32) -> u32 {
        let mut data = [0xff; 4];
        self.mmio.read(offset.into(), &mut data);
        u32::from_le_bytes(data)
    }

    pub fn write(&mut self, offset: u32, value: u32) {
        self.mmio.write(offset.into(), &value.to_le_bytes());
    }

    pub fn offered(&mut self) -> u64 {
        let halves = [0, 1].map(|sel| {
            self.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, sel);
            u64::from(self.read(VIRTIO_MMIO_DEVICE_FEATURES))
        });
        halves[0] | halves[1] << 32
    }

    /// Resets, and negotiates `features`; the status that comes of it.
    pub fn negotiate(&mut self, features: u64) -> u32 {
        for status in [0, 1, 3] {
            self.write(VIRTIO_MMIO_STATUS, status);
        }
        for sel in [0, 1] {
            self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, sel);
            self.write(VIRTIO_MMIO_DRIVER_FEATURES, u32::try_from(features >> (32 * sel) & 0xffff_ffff).unwrap());
        }
        self.write(VIRTIO_MMIO_STATUS, 0xb);
        self.read(VIRTIO_MMIO_STATUS)
    }

    /// Sets every queue up at its largest size.
    pub fn set_up_queues(&mut self) {
        self.rings.clear();
        for index in 0.. {
            self.write(VIRTIO_MMIO_QUEUE_SEL, index);
            let size = self.read(VIRTIO_MMIO_QUEUE_NUM_MAX);
            if size == 0 {
                return;
            }
            let ring = Ring::new(&self.ram, index.into(), u16::try_from(size).unwrap());
            self.write(VIRTIO_MMIO_QUEUE_NUM, size);
            for (register, address) in [
                (VIRTIO_MMIO_QUEUE_DESC_LOW, ring.descriptors()),
                (VIRTIO_MMIO_QUEUE_AVAIL_LOW, ring.driver()),
                (VIRTIO_MMIO_QUEUE_USED_LOW, ring.device()),
            ] {
                self.write(register, u32::try_from(address).unwrap());
                self.write(register + 4, 0);
            }
            self.write(VIRTIO_MMIO_QUEUE_READY, 1);
            self.rings.push(ring);
        }
    }

    /// Negotiates all that is offered, sets every queue up and says DRIVER_OK.
    pub fn start(&mut self) {
        let features = self.offered();
        self.start_with(features);
    }

    /// As [`start`](Self::start), with `features`.
    pub fn start_with(&mut self, features: u64) {
        assert_eq!(self.negotiate(features), 0xb);
        self.set_up_queues();
        self.write(VIRTIO_MMIO_STATUS, 0xf);
    }

    pub fn notify(&mut self, queue: u32) {
        self.write(VIRTIO_MMIO_QUEUE_NOTIFY, queue);
    }

    /// Waits for an interrupt; the bits of `InterruptStatus`, which it acknowledges.
    pub fn wait(&mut self) -> u32 {
        loop {
            self.interrupts.lock().unwrap().recv_timeout(PATIENCE).expect("the device interrupts");
            let status = self.read(VIRTIO_MMIO_INTERRUPT_STATUS);
            self.write(VIRTIO_MMIO_INTERRUPT_ACK, status);
            // None is left of what was acknowledged together with one before.
            if status != 0 {
                return status;
            }
        }
    }

    /// Notifies `queue` and waits until the device has used `count` buffers.
    pub fn finish(&mut self, queue: usize, count: usize) -> Vec<(u16, u32)> {
        self.notify(u32::try_from(queue).unwrap());
        let mut used = self.rings[queue].used();
        while used.len() < count {
            self.wait();
            assert_eq!(self.read(VIRTIO_MMIO_STATUS) & 0x40, 0, "the device gave up");
            used.extend(self.rings[queue].used());
        }
        used
    }

    /// Waits until the device says DEVICE_NEEDS_RESET.
    pub fn wait_for_needs_reset(&mut self) {
        while self.read(VIRTIO_MMIO_STATUS) & 0x40 == 0 {
            self.wait();
        }
    }

    /// Fills guest memory at `addr`.
    pub fn put(&self, addr: u64, data: &[u8]) {
        self.ram.write_slice(data, GuestAddress(addr)).unwrap();
    }

    /// Guest memory at `addr`.
    pub fn get(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.ram.read_slice(&mut data, GuestAddress(addr)).unwrap();
        data
    }
}

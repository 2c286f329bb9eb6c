//! A driver that is up to anything, on one virtio device behind its registers.
//!
//! It begins as a proper driver would, unless the input has it otherwise, so that most inputs come to requests. Whatever it
//! does, after each turn of the device:
//!
//! - guest memory is as it was, but for buffers that the device was given, and its part of the rings;
//! - the used index has moved by buffers that were given, each once, in their order unless the device has another, and no length is
//!   more than there was room for;
//! - no byte behind that length has changed, unless something longer was dropped;
//! - a driver that wants to hear of used buffers was interrupted;
//! - the device comes to rest, and has done what it can;
//! - its status is one that a driver can have brought about.
//!
//! The state that it is in can be saved and restored at any time, and after a reset it works.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bantam::bus::BusDevice;
use bantam::interrupt::Interrupt;
use bantam::virtio::device::VirtioDevice;
use bantam::virtio::mmio::Mmio;
use virtio_bindings::virtio_mmio::*;

use crate::given::{Given, Ring, overlap};
use crate::input::{self, Result, Unstructured};
use crate::memory::{HIGH, HOLE, Memory, RINGS_END};

/// The parts of a test that are of one device.
pub trait Device: Sized {
    /// The last byte of a request's writable ones is written even where the length does not count it.
    const STATUS_LAST: bool = false;
    /// What the driver asks for may empty its own rings.
    const EMPTIES_PAGES: bool = false;
    /// Nothing is done before the request that [`probe`](Self::probe) gives.
    const PROBE_FIRST: bool = false;

    /// The device, and what it has on the host.
    fn new(u: &mut Unstructured) -> Result<(Self, Box<dyn VirtioDevice>)>;
    /// The same device for a guest that goes on elsewhere; `None` if that cannot be. There is no other one then.
    fn again(&mut self) -> Option<Box<dyn VirtioDevice>>;
    /// What a driver may send by a queue.
    fn request(&self, queue: u16, u: &mut Unstructured) -> Result<Vec<u8>>;
    /// How long the buffers for an answer to that are, as a proper driver has them; `None` if there is no telling.
    fn answer(&self, request: &[u8], u: &mut Unstructured) -> Result<Option<Vec<u32>>> {
        let _ = (request, u);
        Ok(None)
    }
    /// Something happens on the host.
    fn host(&mut self, mmio: &mut Mmio, u: &mut Unstructured) -> Result<()> {
        let _ = (mmio, u);
        Ok(())
    }
    /// Whether the device may use what it is given in any order.
    fn uses_in_any_order(&self) -> bool {
        false
    }
    /// Whether the device uses all that it is given by a queue before it rests.
    fn serves_all(&self, queue: u16) -> bool {
        let _ = queue;
        false
    }
    /// Whether a page may have become so, from what it was and what the device may write, although it was not given.
    fn explains(&self, page: &[u8], before: &[u8]) -> bool {
        let _ = (page, before);
        false
    }
    /// Whether a buffer may have been written behind the length that it was used with: one that more was read into at
    /// first, which was dropped (virtio 1.2, 2.7.8.2, has the length be an underestimate).
    fn underestimates(&mut self) -> bool {
        false
    }
    /// A proper request by a queue, and how many bytes there are for the answer.
    fn probe(&self) -> (u16, Vec<u8>, u32);
    /// Looks at the answer to that.
    fn probed(&self, answer: &[u8]) {
        let _ = answer;
    }
    /// What holds at the end; and what would keep the device from answering is taken back.
    fn end(&mut self, mmio: &mut Mmio, memory: &Memory) {
        let _ = (mmio, memory);
    }
}

/// Tries an input.
pub fn run<D: Device>(data: &[u8]) {
    let mut u = Unstructured::new(data);
    let Ok((device, virtio)) = D::new(&mut u) else { return };
    let mut guest = Guest::new(device, virtio);
    guest.start();
    if D::PROBE_FIRST && !matches!(u.ratio(1, 16), Ok(true)) {
        guest.probe();
    }
    for _ in 0..STEPS_MAX {
        if u.is_empty() || guest.step(&mut u).is_err() {
            break;
        }
    }
    guest.end();
}

/// The most that happens to a device.
const STEPS_MAX: usize = 64;
/// The most turns that a device may take before it rests.
const TURNS_MAX: usize = 10_000;
/// The size of a queue's part of memory for rings.
const RINGS: u64 = 0x2000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const DRIVER_OK: u32 = 4;
const FAILED: u32 = 0x80;
const NEEDS_RESET: u32 = 0x40;

#[derive(Default)]
struct Line(AtomicUsize);

impl Interrupt for Line {
    fn trigger(&self) -> std::io::Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// What was given by a queue and not used yet, from the device's next used position on.
#[derive(Default)]
struct Pending {
    ring: Option<Ring>,
    given: Vec<Given>,
}

struct Guest<D> {
    device: D,
    mmio: Mmio,
    memory: Memory,
    line: Arc<Line>,
    queues: u16,
    pending: Vec<Pending>,
    /// Where the next descriptor and the next buffer go.
    next: u16,
    buffer: u64,
}

impl<D: Device> Guest<D> {
    fn new(device: D, virtio: Box<dyn VirtioDevice>) -> Self {
        let memory = Memory::new();
        let queues = u16::try_from(virtio.queue_sizes().len()).expect("a few");
        let line = Arc::new(Line::default());
        let mmio = Mmio::new(memory.ram.clone(), virtio, line.clone(), "fuzzed").expect("eventfds");
        let pending = (0..queues).map(|_| Pending::default()).collect();
        Self { device, mmio, memory, line, queues, pending, next: 0, buffer: RINGS_END }
    }

    fn read(&mut self, offset: u32) -> u32 {
        let mut data = [0xff; 4];
        self.mmio.read(offset.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u32, value: u32) {
        self.mmio.write(offset.into(), &value.to_le_bytes());
    }

    /// Does what a proper driver does first.
    fn start(&mut self) {
        self.set_up(None, |_, _, _| Ok(())).expect("there is no input");
    }

    /// Sets the device up with all features, or those of `features`; `change` may have queues be others.
    fn set_up(
        &mut self,
        features: Option<u64>,
        mut change: impl FnMut(&mut Self, u32, &mut [u64; 4]) -> Result<()>,
    ) -> Result<()> {
        self.reset();
        self.write(VIRTIO_MMIO_STATUS, 1);
        self.write(VIRTIO_MMIO_STATUS, 3);
        for half in [0, 1] {
            self.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, half);
            let offered = self.read(VIRTIO_MMIO_DEVICE_FEATURES);
            self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            let wanted = features.map_or(u32::MAX, |features| (features >> (32 * half)) as u32);
            // Bit 32 is VERSION_1, without which nothing goes on.
            self.write(VIRTIO_MMIO_DRIVER_FEATURES, offered & (wanted | half));
        }
        self.write(VIRTIO_MMIO_STATUS, 0xb);
        for index in 0..self.queues {
            self.write(VIRTIO_MMIO_QUEUE_SEL, index.into());
            let max = self.read(VIRTIO_MMIO_QUEUE_NUM_MAX);
            let base = RINGS * u64::from(index);
            self.memory.clear(base..base + RINGS);
            let mut queue = [max.into(), base, base + 0x1000, base + 0x1400];
            change(self, index.into(), &mut queue)?;
            let [size, addresses @ ..] = queue;
            self.write(VIRTIO_MMIO_QUEUE_NUM, size as u32);
            let registers = [VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_USED_LOW];
            for (register, address) in registers.into_iter().zip(addresses) {
                self.write(register, address as u32);
                self.write(register + 4, (address >> 32) as u32);
            }
            self.write(VIRTIO_MMIO_QUEUE_READY, u32::from(size != 0));
        }
        self.next = 0;
        self.write(VIRTIO_MMIO_STATUS, 0xf);
        self.settle();
        Ok(())
    }

    fn reset(&mut self) {
        // What it gives back is not used.
        self.watched(|guest| guest.write(VIRTIO_MMIO_STATUS, 0));
        assert_eq!(self.read(VIRTIO_MMIO_STATUS), 0, "the status after a reset");
        assert_eq!(self.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0, "the interrupts after a reset");
    }

    /// One thing that a guest or the host may do.
    fn step(&mut self, u: &mut Unstructured) -> Result<()> {
        match u.int_in_range(0..=23)? {
            0..=7 => self.send(u)?,
            8..=10 => {
                let queue = if u.ratio(7, 8)? { u.int_in_range(0..=u32::from(self.queues))? } else { u.arbitrary()? };
                self.notify(queue);
            }
            11 | 12 => self.watched(|guest| guest.device.host(&mut guest.mmio, u))?,
            13 => self.settle(),
            14 => {
                let (address, data) = (input::address(u)?, input::bytes(u, 16)?);
                self.memory.write(address, &data);
            }
            15 => {
                let (queue, index) = (self.queue(u)?, u.int_in_range(0..=255u64)?);
                let table = self.rings(queue).table + 16 * index;
                let (addr, len) = (input::address(u)?, input::length(u)?);
                let next = u.int_in_range(0..=260)?;
                self.descriptor(table, addr, len, u.int_in_range(0..=7)?, next);
            }
            16 => {
                let queue = self.queue(u)?;
                let ring = self.rings(queue);
                let index = match u.int_in_range(0..=2)? {
                    0 => ring.available_index(&self.memory).wrapping_add(u.int_in_range(0..=2)?),
                    1 => ring.available_index(&self.memory).wrapping_sub(u.int_in_range(0..=300)?),
                    _ => u.arbitrary()?,
                };
                self.memory.write(ring.driver + 2, &index.to_le_bytes());
            }
            17 => {
                // The flags, or the event that is waited for.
                let queue = self.queue(u)?;
                let ring = self.rings(queue);
                let at = if u.arbitrary()? { 0 } else { 4 + 2 * u64::from(ring.size) };
                let value: u16 = u.int_in_range(0..=4)?;
                self.memory.write(ring.driver + at, &value.to_le_bytes());
            }
            18 => {
                let offset = if u.ratio(7, 8)? { 4 * u.int_in_range(0..=72)? } else { u.arbitrary()? };
                let value = if u.ratio(1, 2)? { input::number(u)? as u32 } else { input::address(u)? as u32 };
                self.watched(|guest| guest.write(offset, value));
                let status = self.read(VIRTIO_MMIO_STATUS) & !FAILED & !NEEDS_RESET;
                assert!([0, 1, 3, 0xb, 0xf].contains(&status), "the status is {status:#x}");
            }
            19 => {
                let (offset, len) = (input::number(u)?, *u.choose(&[1, 2, 4, 8])?);
                let mut data = vec![0xff; len];
                self.mmio.read(offset, &mut data);
                let (offset, data) = (input::number(u)?, input::bytes(u, 8)?);
                self.watched(|guest| guest.mmio.write(offset, &data));
            }
            20 => self.start(),
            21 => {
                let features = u.arbitrary()?;
                let odd = u.arbitrary()?;
                self.set_up(Some(features), |_, _, queue| {
                    queue[0] = 1 << u.int_in_range(0..=8)?;
                    if odd {
                        queue[u.int_in_range(0..=3)?] = input::address(u)?;
                    }
                    Ok(())
                })?;
            }
            22 => self.move_elsewhere(),
            _ => drop(input::bytes(u, 4)?),
        }
        Ok(())
    }

    fn queue(&self, u: &mut Unstructured) -> Result<u16> {
        u.int_in_range(0..=self.queues - 1)
    }

    /// Where a queue's rings are, or would be.
    fn rings(&self, queue: u16) -> Ring {
        let running = self.mmio.queues().get(usize::from(queue)).and_then(Option::as_ref);
        running.map(|queue| Ring::of(queue.ring())).unwrap_or(Ring {
            size: 256,
            table: RINGS * u64::from(queue),
            driver: RINGS * u64::from(queue) + 0x1000,
            device: RINGS * u64::from(queue) + 0x1400,
            event_idx: true,
            next_avail: 0,
            next_used: 0,
        })
    }

    fn descriptor(&mut self, at: u64, addr: u64, len: u32, flags: u16, next: u16) {
        self.memory.write(at, &addr.to_le_bytes());
        self.memory.write(at + 8, &len.to_le_bytes());
        self.memory.write(at + 12, &flags.to_le_bytes());
        self.memory.write(at + 14, &next.to_le_bytes());
    }

    /// Takes so much memory for a buffer.
    fn allocate(&mut self, len: u32) -> u64 {
        let len = u64::from(len);
        if self.buffer < HOLE && self.buffer + len > HOLE {
            self.buffer = HIGH;
        }
        if self.buffer + len > crate::memory::END {
            self.buffer = RINGS_END;
        }
        let at = self.buffer;
        self.buffer += len.min(0x8000);
        at
    }

    /// Makes a request available, which may be cut into buffers anywhere, and be in a table of its own.
    fn send(&mut self, u: &mut Unstructured) -> Result<()> {
        let queue = self.queue(u)?;
        let data = self.device.request(queue, u)?;
        let mut buffers = vec![];
        let mut left = &data[..];
        while !left.is_empty() {
            let cut = if buffers.len() < 3 && u.ratio(1, 3)? { u.int_in_range(0..=left.len())? } else { left.len() };
            let (now, later) = left.split_at(cut);
            let at = self.allocate(cut as u32);
            self.memory.write(at, now);
            buffers.push((at, cut as u32, 0));
            left = later;
        }
        let proper = if u.ratio(3, 4)? { self.device.answer(&data, u)? } else { None };
        let lengths = match proper {
            Some(lengths) => lengths,
            None => (0..u.int_in_range(0..=3)?).map(|_| input::length(u)).collect::<Result<_>>()?,
        };
        for len in lengths {
            let at = if u.ratio(15, 16)? { self.allocate(len) } else { input::address(u)? };
            buffers.push((at, len, WRITE));
        }
        let shape: u8 = u.arbitrary()?;
        if shape & 0x80 != 0 && shape & 0x40 != 0 && !buffers.is_empty() {
            // In the wrong order, or one too many.
            let from = u.choose_index(buffers.len())?;
            buffers.push(buffers[from]);
        }
        self.give(queue, &buffers, shape & 3 == 3);
        if shape & 0xc != 0xc {
            self.notify(queue.into());
        }
        Ok(())
    }

    /// Makes buffers available.
    fn give(&mut self, queue: u16, buffers: &[(u64, u32, u16)], indirect: bool) {
        if buffers.is_empty() {
            return;
        }
        let ring = self.rings(queue);
        let count = buffers.len() as u16;
        let (table, first) = if indirect {
            let table = self.allocate(16 * u32::from(count));
            let head = self.next % ring.size;
            self.next = head + 1;
            self.descriptor(ring.table + 16 * u64::from(head), table, 16 * u32::from(count), INDIRECT, 0);
            self.publish(&ring, head);
            (table, 0)
        } else {
            if self.next + count > ring.size {
                self.next = 0;
            }
            let first = self.next;
            self.next += count;
            self.publish(&ring, first);
            (ring.table, first)
        };
        for (i, (addr, len, flags)) in (first..).zip(buffers) {
            let next = if i - first + 1 < count { NEXT } else { 0 };
            self.descriptor(table + 16 * u64::from(i), *addr, *len, flags | next, i + 1);
        }
    }

    fn publish(&mut self, ring: &Ring, head: u16) {
        let index = ring.available_index(&self.memory);
        self.memory.write(ring.driver + 4 + 2 * u64::from(index % ring.size), &head.to_le_bytes());
        self.memory.write(ring.driver + 2, &index.wrapping_add(1).to_le_bytes());
    }

    /// Has the device do all that it can, and looks at what came of it.
    fn settle(&mut self) {
        let rests = self.watched(|guest| (0..TURNS_MAX).any(|_| !guest.mmio.poll()));
        assert!(rests, "the device does not come to rest");
    }

    /// Notifies the device, which may be of no such queue.
    fn notify(&mut self, queue: u32) {
        self.write(VIRTIO_MMIO_QUEUE_NOTIFY, queue);
        self.settle();
        let runs = self.read(VIRTIO_MMIO_STATUS) & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK;
        if let Some(Some(ring)) = self.pending.get(queue as usize).map(|pending| pending.ring)
            && runs
            && self.device.serves_all(queue as u16)
        {
            let now = self.rings(queue as u16);
            let left = ring.available_index(&self.memory).wrapping_sub(now.next_used);
            assert_eq!(left, 0, "of queue {queue} some requests were left");
        }
    }

    /// Does something by which the device may do something, and looks at what came of it.
    fn watched<T>(&mut self, act: impl FnOnce(&mut Self) -> T) -> T {
        let tangled = self.look();
        let interrupts = self.line.0.load(Ordering::Relaxed);
        let result = act(self);
        let interrupted = self.line.0.load(Ordering::Relaxed) > interrupts;
        let mut may = vec![];
        let rings: Vec<_> =
            self.mmio.queues().iter().map(|queue| queue.as_ref().map(|queue| Ring::of(queue.ring()))).collect();
        let mut used = vec![];
        for (index, pending) in self.pending.iter().enumerate() {
            let Some(before) = &pending.ring else { continue };
            // After a reset there is nothing to compare with: what it wrote before it was stopped is in order.
            let after = rings.get(index).copied().flatten();
            let count = after.map_or(0, |after| after.next_used.wrapping_sub(before.next_used));
            assert!(
                usize::from(count) <= pending.given.len() || tangled,
                "queue {index} used {count} of {}",
                pending.given.len()
            );
            may.extend(before.used_parts(if after.is_some() { count } else { before.size }));
            used.push((index, *before, count));
        }
        // A driver may have made more available than the ring has room for. What was used first is written over then.
        let is_overrun = used.iter().any(|(_, ring, count)| *count > ring.size);
        if tangled || is_overrun || D::EMPTIES_PAGES && self.is_torn(&rings) {
            self.memory.refresh();
            self.forget_stopped();
            return result;
        }
        let fresh = |at, bytes| self.memory.fresh(at, bytes).expect("rings are in memory");
        // Of used buffers, as much as the device says; that is in memory, which was not looked at yet.
        let underestimates = self.device.underestimates();
        let mut elements = vec![];
        let in_order = !self.device.uses_in_any_order();
        for (index, before, count) in used {
            let mut left: Vec<_> = self.pending[index].given.iter().collect();
            for i in 0..count {
                let at = before.used_element(before.next_used.wrapping_add(i));
                let (id, len) = (fresh(at, 4), fresh(at + 4, 4));
                let found = left.iter().position(|given| given.head == id).filter(|found| *found == 0 || !in_order);
                let given = left.remove(found.unwrap_or_else(|| panic!("queue {index} used {id}, which is not next")));
                assert!(len <= given.room, "queue {index} used {len} bytes of {}", given.room);
                let exact = given.is_memory(&self.memory) && !underestimates;
                elements.extend(given.first(if exact { len } else { u64::MAX }));
                elements.extend(given.last().filter(|_| D::STATUS_LAST));
            }
            // The device may still write what it has not used.
            elements.extend(left.iter().flat_map(|given| given.writable.iter().cloned()));
            if let Some(Some(after)) = rings.get(index).filter(|_| count > 0) {
                assert_eq!(fresh(before.device + 2, 2), u64::from(after.next_used), "the used index of queue {index}");
                let wants = if before.event_idx {
                    let event = fresh(before.driver + 4 + 2 * u64::from(before.size), 2) as u16;
                    after.next_used.wrapping_sub(event).wrapping_sub(1) < count
                } else {
                    fresh(before.driver, 2) & 1 == 0
                };
                assert!(interrupted || !wants, "queue {index}: the driver was not told of {count} used buffers");
            }
        }
        may.extend(elements);
        let device = &self.device;
        self.memory.check(&may, |page, before| device.explains(page, before));
        self.forget_stopped();
        result
    }

    /// Whether a part of the rings has been emptied.
    fn is_torn(&self, now: &[Option<Ring>]) -> bool {
        let before = self.pending.iter().filter_map(|pending| pending.ring);
        let drivers = before.clone().flat_map(|ring| ring.drivers()).any(|part| !self.memory.is_known(&part));
        let index = |ring: &Ring| self.memory.fresh(ring.device + 2, 2) != Some(ring.next_used.into());
        let devices = now.iter().flatten().any(index);
        let elements = self.pending.iter().zip(now).any(|(pending, now)| {
            let (Some(before), Some(now)) = (pending.ring, now) else { return false };
            let count = now.next_used.wrapping_sub(before.next_used);
            (0..count).zip(&pending.given).any(|(i, given)| {
                self.memory.fresh(before.used_element(before.next_used.wrapping_add(i)), 4) != Some(given.head)
            })
        });
        drivers || devices || elements
    }

    /// What was given by queues that are no more is the driver's again.
    fn forget_stopped(&mut self) {
        for (index, pending) in self.pending.iter_mut().enumerate() {
            if self.mmio.queues().get(index).is_none_or(Option::is_none) {
                *pending = Pending::default();
            }
        }
    }

    /// Takes down what the device is given before it acts. True if rings and buffers share memory, so that what it does
    /// changes what it was given.
    fn look(&mut self) -> bool {
        let mut written = vec![];
        let mut read = vec![];
        for (index, pending) in self.pending.iter_mut().enumerate() {
            let queue = self.mmio.queues().get(index).and_then(Option::as_ref);
            let Some(ring) = queue.map(|queue| Ring::of(queue.ring())) else {
                *pending = Pending::default();
                continue;
            };
            // What was used since is done with; what was taken is as it was then.
            let used = pending.ring.map_or(0, |before| usize::from(ring.next_used.wrapping_sub(before.next_used)));
            pending.given.drain(..used.min(pending.given.len()));
            pending.given.truncate(ring.next_avail.wrapping_sub(ring.next_used).into());
            let taken = ring.next_used.wrapping_add(pending.given.len() as u16);
            let more = ring.available_index(&self.memory).wrapping_sub(taken);
            if more <= ring.size {
                pending.given.extend((0..more).map(|i| ring.given(&self.memory, taken.wrapping_add(i))));
            }
            written.push(ring.devices());
            read.extend(ring.drivers());
            for given in &pending.given {
                written.extend(given.writable.iter().cloned());
                read.extend(given.tables.iter().cloned());
            }
            pending.ring = Some(ring);
        }
        let rings: Vec<_> = self.pending.iter().filter_map(|pending| Some(pending.ring?.devices())).collect();
        let meets = |one: &std::ops::Range<u64>| read.iter().any(|other| overlap(one, other));
        let buried = |ring: &std::ops::Range<u64>| written.iter().filter(|one| overlap(one, ring)).count() > 1;
        written.iter().any(meets) || rings.iter().any(buried)
    }

    /// Saves the device's state and goes on with a new device.
    fn move_elsewhere(&mut self) {
        // As a machine does before it saves.
        self.settle();
        let state = self.watched(|guest| guest.mmio.save());
        let Some(device) = self.device.again() else { return };
        let line: Arc<dyn Interrupt> = self.line.clone();
        // The old one has the disk's lock until it is gone.
        self.mmio = Mmio::new(self.memory.ram.clone(), device, line, "restored").expect("eventfds");
        let text = state.to_string();
        let state = serde_json::from_str(&text).expect("it was JSON");
        self.mmio.restore(&state).unwrap_or_else(|error| panic!("{error}: {text}"));
        let runs = |state: &serde_json::Value| {
            state["status"].as_u64().is_some_and(|status| status as u32 & DRIVER_OK != 0)
                && state["needs-reset"] == false
        };
        let strip = |mut state: serde_json::Value| {
            let positions = if runs(&state) { None } else { Some("positions") };
            for key in ["generation", "interrupt-status", "config"].into_iter().chain(positions) {
                state[key] = 0.into();
            }
            state
        };
        assert_eq!(strip(self.mmio.save()), strip(state), "what was restored is saved as something else");
        self.pending.iter_mut().for_each(|pending| *pending = Pending::default());
        self.mmio.resume();
        self.settle();
    }

    /// The device works after all that.
    fn end(mut self) {
        self.device.end(&mut self.mmio, &self.memory);
        self.start();
        self.probe();
    }

    /// Makes a proper request, and looks at the answer.
    fn probe(&mut self) {
        let (queue, request, room) = self.device.probe();
        self.buffer = RINGS_END;
        let at = self.allocate(request.len() as u32);
        self.memory.write(at, &request);
        let answer = self.allocate(room);
        let mut buffers = vec![(at, request.len() as u32, 0), (answer, room, WRITE)];
        buffers.retain(|(_, len, _)| *len > 0);
        let before = self.rings(queue).next_used;
        self.give(queue, &buffers, false);
        self.notify(queue.into());
        assert_eq!(self.read(VIRTIO_MMIO_STATUS), 0xf, "the status of a device that was reset");
        let ring = self.rings(queue);
        assert_eq!(ring.next_used, before + 1, "a device that was reset does nothing");
        let len = self.memory.number(ring.used_element(before) + 4, 4).expect("it is in memory");
        let answer = self.memory.known[answer as usize..][..len as usize].to_vec();
        self.device.probed(&answer);
    }
}

//! The MMIO transport: the registers through which a driver finds a virtio device, negotiates and starts it.
//!
//! Virtio 1.2, section 4.2, version 2 registers (no legacy interface); the device's life cycle is that of 2.1 and 3.1.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE as ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER as DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_FAILED as FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::change::{self, Change};
use super::device::{DriverField, VirtioDevice};
use super::queue::InterruptState;
use super::worker::{Parts, Paused, Request, Worker};
use crate::bus::BusDevice;
use crate::interrupt::Interrupt;
use crate::memory::GuestRam;
use crate::metrics::Metrics;
use crate::sandbox;
use crate::snapshot::{self, Hex};

/// Offset of `QueueNotify`, where an ioeventfd for each of [`Mmio::kicks`] belongs.
pub const QUEUE_NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// "virt" (4.2.2).
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"bntm");

/// What the status comes to, step by step (3.1.1).
const LOADED: u32 = ACKNOWLEDGE | DRIVER;
const NEGOTIATED: u32 = LOADED | FEATURES_OK;
const STARTED: u32 = NEGOTIATED | DRIVER_OK;

/// Feature bits of the transport and the ring, beside the device's own.
const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// A virtio device on the MMIO bus.
pub struct Mmio {
    name: String,
    ram: GuestRam,
    interrupt: Arc<InterruptState>,
    metrics: Arc<dyn Metrics>,
    kicks: Vec<Arc<EventFd>>,
    owner: Owner,
    sandbox: sandbox::Device,

    // What the device is; the driver may read it while its thread has the device.
    device_type: u32,
    offered: u64,
    config: Box<[u8]>,
    driver_field: Option<Arc<DriverField>>,

    // The registers that the driver writes.
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    accepted: u64,
    queue_sel: u32,
    queues: Vec<QueueRegisters>,
}

/// What the report has of a device.
struct Counts {
    device: Arc<dyn Metrics>,
    interrupt: Arc<InterruptState>,
}

impl Metrics for Counts {
    fn to_json(&self) -> serde_json::Value {
        let mut counts = self.device.to_json();
        if let Some(counts) = counts.as_object_mut() {
            counts.insert("interrupts".into(), self.interrupt.raised.get().into());
        }
        counts
    }
}

/// Who has the device.
enum Owner {
    Transport(Box<dyn VirtioDevice>),
    Thread(Worker),
    /// The machine is paused.
    Paused(Paused),
    /// The machine was restored and has not run since.
    Restored(Box<dyn VirtioDevice>, Vec<Option<virtio_queue::Queue>>),
    /// Its thread panicked.
    Nobody,
}

/// A queue as the driver describes it, unchecked.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct QueueRegisters {
    max: u16,
    size: u32,
    ready: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

impl QueueRegisters {
    fn new(max: u16) -> Self {
        Self { max, size: max.into(), ready: false, descriptors: 0, driver: 0, device: 0 }
    }

    /// The ring that the registers describe, or why there can be none.
    fn ring(&self, ram: &GuestRam, event_idx: bool) -> Result<virtio_queue::Queue, &'static str> {
        let mut ring = virtio_queue::Queue::new(self.max).map_err(|_| "the device's size of it is wrong")?;
        let size = u16::try_from(self.size).unwrap_or_default();
        let (table, driver, device) = [self.descriptors, self.driver, self.device].map(GuestAddress).into();
        ring.try_set_size(size).map_err(|_| "its size is not a power of 2, or is too large")?;
        ring.try_set_desc_table_address(table).map_err(|_| "the descriptor table is not aligned")?;
        ring.try_set_avail_ring_address(driver).map_err(|_| "the available ring is not aligned")?;
        ring.try_set_used_ring_address(device).map_err(|_| "the used ring is not aligned")?;
        // As virtio_queue's is_valid(), which writes a line to the log for each time that the guest gets it wrong.
        let size = usize::from(size);
        if !ram.check_range(table, 16 * size)
            || !ram.check_range(driver, 6 + 2 * size)
            || !ram.check_range(device, 6 + 8 * size)
        {
            return Err("it is not in guest memory");
        }
        ring.set_event_idx(event_idx);
        ring.set_ready(true);
        Ok(ring)
    }
}

impl Mmio {
    /// Puts `device` behind registers; `line` interrupts the guest. The device is called
    /// `name` in the log, and its thread `bantam-NAME`.
    ///
    /// # Errors
    /// When the host has no eventfd left: there is one for each queue.
    pub fn new(
        ram: GuestRam,
        device: Box<dyn VirtioDevice>,
        line: Arc<dyn Interrupt>,
        name: impl Into<String>,
    ) -> io::Result<Self> {
        let sizes = device.queue_sizes();
        Ok(Self {
            name: name.into(),
            ram,
            interrupt: Arc::new(InterruptState::new(line)),
            metrics: device.metrics(),
            kicks: sizes.iter().map(|_| EventFd::new(KICK_FLAGS).map(Arc::new)).collect::<Result<_, _>>()?,
            device_type: device.device_type(),
            offered: device.features() | FEATURES,
            config: device.config().into(),
            driver_field: device.driver_field(),
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            accepted: 0,
            queue_sel: 0,
            queues: sizes.iter().map(|max| QueueRegisters::new(*max)).collect(),
            owner: Owner::Transport(device),
            sandbox: sandbox::Sandbox::default().device(0, std::iter::empty()),
        })
    }

    /// Has the device's thread be in `sandbox`.
    pub fn sandboxed(mut self, sandbox: sandbox::Device) -> Self {
        self.sandbox = sandbox;
        self
    }

    /// The eventfd of each queue, by index, that a write of the index to [`QUEUE_NOTIFY`] is to signal. One that comes
    /// by [`BusDevice::write`] does too.
    pub fn kicks(&self) -> impl Iterator<Item = (u16, &EventFd)> {
        (0..).zip(self.kicks.iter().map(|kick| &**kick))
    }

    /// The device's counters, and one for its interrupts.
    pub fn metrics(&self) -> Arc<dyn Metrics> {
        Arc::new(Counts { device: self.metrics.clone(), interrupt: self.interrupt.clone() })
    }

    /// Has the device's thread end as soon as it can, for a change that is not its own to make. Who waits at the receiver hears
    /// when that is so, by an error; [`change`](Self::change) is to follow.
    pub fn rest(&mut self) -> Option<mpsc::Receiver<()>> {
        if let Owner::Thread(worker) = &mut self.owner { Some(worker.rest()) } else { None }
    }

    /// Changes the device, or has its thread do it and returns at once. The answer comes when it is done; none comes
    /// when the driver reset the device before: then the change is to be asked for again.
    ///
    /// A disk is given another file here, between two requests: in a [sandbox](Self::sandboxed) its thread may not do that. Who
    /// does not want to wait for the former with the transport in hand has the thread [rest](Self::rest) first.
    pub fn change(&mut self, change: Change) -> mpsc::Receiver<Result<(), change::Error>> {
        let (answer, answered) = mpsc::channel();
        match &mut self.owner {
            Owner::Thread(worker) if worker.rests() || matches!(change, Change::Disk(_)) => {
                self.pause();
                let changed = self.change(change).recv();
                self.resume();
                let is_there = matches!(self.owner, Owner::Thread(_));
                let result = if is_there { changed } else { Ok(Err(change::Error::Gone)) };
                let _ = result.map(|result| answer.send(result));
            }
            Owner::Transport(device) | Owner::Restored(device, _) => {
                let request = Request { change, answer };
                let result = request.apply(&mut **device, None, &self.interrupt, self.status & DRIVER_OK != 0);
                request.answer(result);
            }
            Owner::Thread(worker) => worker.change(Request { change, answer }),
            Owner::Paused(paused) => paused.change(Request { change, answer }),
            Owner::Nobody => {
                let _ = answer.send(Err(change::Error::Gone));
            }
        }
        answered
    }

    fn read_register(&self, offset: u32) -> u32 {
        let queue = self.queues.get(self.queue_sel as usize);
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device_type,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => half(self.offered, self.device_features_sel),
            VIRTIO_MMIO_QUEUE_NUM_MAX => queue.map_or(0, |queue| queue.max.into()),
            VIRTIO_MMIO_QUEUE_READY => queue.map_or(0, |queue| queue.ready.into()),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.pending(),
            VIRTIO_MMIO_STATUS if self.interrupt.needs_reset() => self.status | NEEDS_RESET,
            VIRTIO_MMIO_STATUS => self.status,
            // No shared memory regions: of length -1, at -1.
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            VIRTIO_MMIO_CONFIG_GENERATION => self.interrupt.changed_config().map_or(0, |(generation, _)| generation),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES if self.may_negotiate() => {
                set_half(&mut self.accepted, self.driver_features_sel, value);
            }
            VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            VIRTIO_MMIO_QUEUE_NOTIFY if self.status & DRIVER_OK != 0 => {
                if let Some(kick) = self.kicks.get(value as usize) {
                    // It fails only when the counter is full, after 2^64 - 2 kicks.
                    let _ = kick.write(1);
                }
            }
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.write_status(value),
            _ if self.may_set_up_queues() => {
                if let Some(queue) = self.queues.get_mut(self.queue_sel as usize) {
                    write_queue(queue, offset, value);
                }
            }
            _ => {}
        }
    }

    fn may_negotiate(&self) -> bool {
        self.status & (DRIVER | FEATURES_OK | FAILED) == DRIVER
    }

    fn may_set_up_queues(&self) -> bool {
        self.status & (FEATURES_OK | DRIVER_OK | FAILED) == FEATURES_OK
    }

    /// The driver says how far it is (3.1.1); a step that must not come yet is not taken.
    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        self.status |= value & FAILED;
        for (bit, before) in [(ACKNOWLEDGE, 0), (DRIVER, ACKNOWLEDGE), (FEATURES_OK, DRIVER), (DRIVER_OK, FEATURES_OK)]
        {
            let wanted = value & bit != 0 && self.status & bit == 0;
            if !wanted || self.status & (before | FAILED) != before || self.interrupt.needs_reset() {
                continue;
            }
            if bit == FEATURES_OK && !self.features_acceptable() {
                continue;
            }
            self.status |= bit;
            if bit == DRIVER_OK {
                self.start();
            }
        }
    }

    fn features_acceptable(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted & (1 << VIRTIO_F_VERSION_1) != 0
    }

    /// Gives the device to a thread of its own; if that cannot be, the device needs a reset.
    fn start(&mut self) {
        let event_idx = self.accepted & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let mut rings = Vec::with_capacity(self.queues.len());
        for (index, queue) in self.queues.iter().enumerate() {
            match queue.ready.then(|| queue.ring(&self.ram, event_idx)).transpose() {
                Ok(ring) => rings.push(ring),
                Err(error) => {
                    return self.interrupt.fail(&self.name, format_args!("cannot start virtqueue {index}: {error}"));
                }
            }
        }
        let Owner::Transport(device) = std::mem::replace(&mut self.owner, Owner::Nobody) else {
            return self.interrupt.fail(&self.name, "its thread panicked: there is no such device any more");
        };
        self.give((device, rings));
    }

    /// There are no threads when inputs are tried: the device waits for [`poll`](Self::poll).
    #[cfg(fuzzing)]
    fn give(&mut self, parts: Parts) {
        let paused = Paused::start(&self.name, parts, self.accepted, &self.ram, &self.kicks, &self.interrupt);
        self.owner = Owner::Paused(paused.unwrap_or_else(|(error, _)| panic!("no descriptor is left: {error}")));
    }

    /// Has the device do what there is to do at the moment; whether there was anything.
    #[cfg(fuzzing)]
    pub fn poll(&mut self) -> bool {
        if let Owner::Paused(paused) = &mut self.owner { paused.poll() } else { false }
    }

    /// The queues of a device that was started.
    #[cfg(fuzzing)]
    pub fn queues(&self) -> &[Option<super::queue::Queue>] {
        if let Owner::Paused(paused) = &self.owner { paused.queues() } else { &[] }
    }

    #[cfg(not(fuzzing))]
    fn give(&mut self, parts: Parts) {
        self.owner = match Worker::start(
            &self.name,
            parts,
            self.accepted,
            &self.ram,
            &self.kicks,
            &self.interrupt,
            &self.sandbox,
        ) {
            Ok(worker) => Owner::Thread(worker),
            Err((error, (device, _))) => {
                self.interrupt.fail(&self.name, format_args!("cannot start the device's thread: {error}"));
                Owner::Transport(device)
            }
        };
    }

    /// The driver starts over (2.1.2, 2.4): nothing that it said before counts.
    fn reset(&mut self) {
        self.owner = match std::mem::replace(&mut self.owner, Owner::Nobody) {
            Owner::Thread(worker) => worker.stop().map_or(Owner::Nobody, |(device, _)| Owner::Transport(device)),
            Owner::Paused(paused) => Owner::Transport(paused.stop().0),
            Owner::Restored(device, _) => Owner::Transport(device),
            other => other,
        };
        if let Owner::Transport(device) = &mut self.owner {
            device.restore_queue_pairs(1);
        }
        self.interrupt.reset();
        self.status = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.accepted = 0;
        self.queue_sel = 0;
        for queue in &mut self.queues {
            *queue = QueueRegisters::new(queue.max);
        }
    }
}

/// What a device's registers, its driver's queues and the interrupt were.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct State {
    device_type: u32,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    accepted: u64,
    queue_sel: u32,
    queues: Vec<QueueRegisters>,
    /// The next available and the next used index of each queue that the device works on.
    positions: Vec<Option<(u16, u16)>>,
    interrupt_status: u32,
    needs_reset: bool,
    generation: u32,
    config: Hex,
    /// What the driver has written to its field of the configuration.
    driver_field: Option<u32>,
    /// The host has lost data that the driver wrote.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    lost_data: bool,
    /// How many pairs of queues the driver uses.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    queue_pairs: u16,
}

fn one() -> u16 {
    1
}

fn is_one(pairs: &u16) -> bool {
    *pairs == 1
}

fn position(ring: &virtio_queue::Queue) -> Option<(u16, u16)> {
    Some((ring.next_avail(), ring.next_used()))
}

/// A notification must never block the vCPU that makes it.
const KICK_FLAGS: i32 = libc::EFD_NONBLOCK | libc::EFD_CLOEXEC;

/// A queue's registers; those of a queue that is ready cannot be written, but `QueueReady` (4.2.2.2).
fn write_queue(queue: &mut QueueRegisters, offset: u32, value: u32) {
    match offset {
        // A queue that is taken back starts over.
        VIRTIO_MMIO_QUEUE_READY if value == 0 => *queue = QueueRegisters::new(queue.max),
        VIRTIO_MMIO_QUEUE_READY => queue.ready = value == 1,
        _ if queue.ready => {}
        VIRTIO_MMIO_QUEUE_NUM => queue.size = value,
        VIRTIO_MMIO_QUEUE_DESC_LOW => set_half(&mut queue.descriptors, 0, value),
        VIRTIO_MMIO_QUEUE_DESC_HIGH => set_half(&mut queue.descriptors, 1, value),
        VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_half(&mut queue.driver, 0, value),
        VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_half(&mut queue.driver, 1, value),
        VIRTIO_MMIO_QUEUE_USED_LOW => set_half(&mut queue.device, 0, value),
        VIRTIO_MMIO_QUEUE_USED_HIGH => set_half(&mut queue.device, 1, value),
        _ => {}
    }
}

/// Bits 0 to 31 or 32 to 63; zero for halves that there are not.
fn half(word: u64, which: u32) -> u32 {
    match which {
        0 => (word & 0xffff_ffff) as u32,
        1 => (word >> 32) as u32,
        _ => 0,
    }
}

fn set_half(word: &mut u64, which: u32, value: u32) {
    match which {
        0 => *word = *word >> 32 << 32 | u64::from(value),
        1 => *word = *word & 0xffff_ffff | u64::from(value) << 32,
        // Feature bits from 64 on, none of which is offered: accepting one must be refused.
        _ if value != 0 => *word = u64::MAX,
        _ => {}
    }
}

impl BusDevice for Mmio {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let (offset, config) = match u32::try_from(offset) {
            Ok(offset) => (offset, offset.checked_sub(VIRTIO_MMIO_CONFIG)),
            Err(_) => return,
        };
        if let Some(field) = self.driver_field.as_ref().filter(|field| config == Some(field.offset)) {
            let bytes = field.value.load(Ordering::Relaxed).to_le_bytes();
            let len = bytes.len().min(data.len());
            data[..len].copy_from_slice(&bytes[..len]);
        } else if let Some(at) = config {
            let changed = self.interrupt.changed_config();
            let config = changed.as_ref().map_or(&self.config, |(_, config)| config);
            let bytes = config.get(at as usize..).unwrap_or_default();
            let len = bytes.len().min(data.len());
            data[..len].copy_from_slice(&bytes[..len]);
        } else if let (0, Ok(word)) = (offset % 4, <&mut [u8; 4]>::try_from(data)) {
            *word = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (Ok(offset), Ok(word)) = (u32::try_from(offset), data.try_into()) else { return };
        let value = u32::from_le_bytes(word);
        match (offset.checked_sub(VIRTIO_MMIO_CONFIG), &self.driver_field) {
            (None, _) if offset % 4 == 0 => self.write_register(offset, value),
            (Some(at), Some(field)) if at == field.offset => field.value.store(value, Ordering::Relaxed),
            _ => {}
        }
    }

    /// Ends the device's thread, if it has one.
    fn pause(&mut self) {
        self.owner = match std::mem::replace(&mut self.owner, Owner::Nobody) {
            Owner::Thread(worker) => worker.pause().map_or(Owner::Nobody, Owner::Paused),
            other => other,
        };
    }

    /// Gives the device a thread again; if that cannot be, it needs a reset.
    fn resume(&mut self) {
        self.owner = match std::mem::replace(&mut self.owner, Owner::Nobody) {
            Owner::Paused(paused) => match paused.resume() {
                Ok(worker) => Owner::Thread(worker),
                Err((error, paused)) => {
                    self.interrupt.fail(&self.name, format_args!("cannot start the device's thread: {error}"));
                    Owner::Paused(paused)
                }
            },
            Owner::Restored(device, rings) => {
                self.give((device, rings));
                return self.interrupt.raise_again();
            }
            other => other,
        };
    }

    fn save(&mut self) -> Value {
        let positions = match &mut self.owner {
            Owner::Paused(paused) => paused.positions(),
            Owner::Restored(_, rings) => rings.iter().map(|ring| position(ring.as_ref()?)).collect(),
            Owner::Transport(_) | Owner::Thread(_) | Owner::Nobody => vec![],
        };
        let changed = self.interrupt.changed_config();
        let (generation, config) = changed.unwrap_or_else(|| (0, self.config.clone()));
        let state = State {
            device_type: self.device_type,
            status: self.status,
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            accepted: self.accepted,
            queue_sel: self.queue_sel,
            queues: self.queues.clone(),
            positions,
            interrupt_status: self.interrupt.pending(),
            needs_reset: self.interrupt.needs_reset(),
            generation,
            config: Hex(config.into()),
            driver_field: self.driver_field.as_ref().map(|field| field.value.load(Ordering::Relaxed)),
            lost_data: match &self.owner {
                Owner::Transport(device) | Owner::Restored(device, _) => device.has_lost_data(),
                Owner::Paused(paused) => paused.has_lost_data(),
                Owner::Thread(_) | Owner::Nobody => false,
            },
            queue_pairs: match &self.owner {
                Owner::Restored(device, _) => device.queue_pairs(),
                // One that needs a reset has none in use after it.
                Owner::Paused(paused) if !self.interrupt.needs_reset() => paused.queue_pairs(),
                Owner::Paused(_) | Owner::Transport(_) | Owner::Thread(_) | Owner::Nobody => 1,
            },
        };
        serde_json::to_value(state).expect("numbers and text are JSON")
    }

    fn restore(&mut self, state: &Value) -> Result<(), snapshot::Error> {
        let fail = |error: serde_json::Error| snapshot::Error::part("a virtio device", error);
        let state = State::deserialize(state).map_err(fail)?;
        let refuse =
            |why: &dyn std::fmt::Display| Err(snapshot::Error::part(format!("the virtio device {}", self.name), why));
        if state.device_type != self.device_type {
            let (then, now) = (state.device_type, self.device_type);
            return refuse(&format_args!("it was a device of type {then}, and here is one of type {now}"));
        }
        if !state.queues.iter().map(|queue| queue.max).eq(self.queues.iter().map(|queue| queue.max)) {
            let (then, now) = (state.queues.len(), self.queues.len());
            return refuse(&format_args!("its queues are other than here: it had {then}, and here it has {now}"));
        }
        let missing = state.accepted & !self.offered;
        // A driver may have accepted what there is not, and was told so by the status.
        if state.status & FEATURES_OK != 0 && missing != 0 {
            return refuse(&format_args!("its driver uses features that it does not have here: bits {missing:#x}"));
        }
        // Step by step, as write_status has it.
        if ![0, ACKNOWLEDGE, LOADED, NEGOTIATED, STARTED].contains(&(state.status & !FAILED)) {
            return refuse(&format_args!("its status is {:#x}", state.status));
        }
        if state.status & FEATURES_OK != 0 && state.accepted & (1 << VIRTIO_F_VERSION_1) == 0 {
            return refuse(&"its driver uses the legacy interface");
        }
        let runs = state.status & DRIVER_OK != 0 && !state.needs_reset;
        let has_position = |index| state.positions.get(index).copied().flatten().is_some();
        let ready = state.queues.iter().enumerate().all(|(index, queue)| queue.ready == has_position(index));
        if state.positions.len() > state.queues.len() || runs && !ready {
            return refuse(&"it has no positions in its queues, or such in others");
        }
        let mut rings = Vec::new();
        let event_idx = state.accepted & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        for (index, queue) in state.queues.iter().enumerate() {
            let Some((available, used)) = state.positions.get(index).copied().flatten() else {
                rings.push(None);
                continue;
            };
            let mut ring = match queue.ring(&self.ram, event_idx) {
                Ok(ring) => ring,
                Err(why) => return refuse(&format_args!("of virtqueue {index} {why}")),
            };
            ring.set_next_avail(available);
            ring.set_next_used(used);
            rings.push(Some(ring));
        }
        let pairs = state.queue_pairs;
        if let Owner::Transport(device) = &mut self.owner
            && !(if runs { device.restore_queue_pairs(pairs) } else { pairs == 1 })
        {
            return refuse(&format_args!("its driver uses {pairs} pairs of queues"));
        }
        self.status = state.status;
        self.device_features_sel = state.device_features_sel;
        self.driver_features_sel = state.driver_features_sel;
        self.accepted = state.accepted;
        self.queue_sel = state.queue_sel;
        self.queues = state.queues;
        self.interrupt.restore(state.interrupt_status, state.needs_reset);
        if let (true, Owner::Transport(device)) = (state.lost_data, &mut self.owner) {
            device.restore_lost_data();
        }
        if runs && let Owner::Transport(mut device) = std::mem::replace(&mut self.owner, Owner::Nobody) {
            device.replace();
            self.owner = Owner::Restored(device, rings);
        }
        if let (Some(field), Some(value)) = (&self.driver_field, state.driver_field) {
            field.value.store(value, Ordering::Relaxed);
        }
        // A link is up again that was down, a disk has another size: the driver is told.
        if state.generation > 0 || state.config.0 != *self.config {
            self.interrupt.restore_config(state.generation, &self.config);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::super::device::{Error, Io};
    use super::super::testing::{BUFFERS, Driver, END};
    use super::*;
    use serde_json::json;

    /// Has two queues; returns what arrives on the first. Told to by the first byte of a buffer, it fails or panics.
    struct Fake {
        log: Arc<Mutex<Vec<String>>>,
    }

    impl VirtioDevice for Fake {
        fn device_type(&self) -> u32 {
            42
        }
        fn features(&self) -> u64 {
            1 << 5
        }
        fn queue_sizes(&self) -> &[u16] {
            &[8, 4]
        }
        fn config(&self) -> &[u8] {
            &[1, 2, 3, 4, 5, 6]
        }
        fn metrics(&self) -> Arc<dyn Metrics> {
            Arc::new(())
        }
        fn start(&mut self, features: u64, _: &mut Io) -> Result<(), Error> {
            self.log.lock().unwrap().push(format!("start {features:#x}"));
            Ok(())
        }
        fn queue_ready(&mut self, index: usize, io: &mut Io) -> Result<(), Error> {
            let Some((ram, queue)) = io.queue(index) else { return Ok(()) };
            let mut order = 0;
            queue.serve(ram, |mut chain| {
                let buffer = chain.next().unwrap();
                order = vm_memory::Bytes::read_obj(ram, buffer.addr()).unwrap();
                assert_ne!(order, b'p', "told to panic");
                self.log.lock().unwrap().push(format!("serve {index}"));
                0
            })?;
            if order == b'f' {
                return Err(Error::Host { what: "told to fail".into(), source: io::ErrorKind::Other.into() });
            }
            Ok(())
        }
        fn change(&mut self, _: &Change, io: Option<&mut Io>) -> Result<(), change::Error> {
            let failed = Error::Host { what: "told to change".into(), source: io::ErrorKind::Other.into() };
            io.map_or(Ok(()), |_| Err(failed.into()))
        }
        fn stop(&mut self, _: &mut Io) {
            self.log.lock().unwrap().push("stop".into());
        }
    }

    fn driver() -> (Driver, Arc<Mutex<Vec<String>>>) {
        let log = Arc::new(Mutex::new(Vec::new()));
        (Driver::new(Box::new(Fake { log: log.clone() })), log)
    }

    fn logged(log: &Mutex<Vec<String>>) -> Vec<String> {
        std::mem::take(&mut log.lock().unwrap())
    }

    #[test]
    fn the_driver_finds_what_it_is() {
        let (mut driver, _) = driver();
        assert_eq!(driver.read(0), 0x7472_6976);
        assert_eq!(driver.read(4), 2);
        assert_eq!(driver.read(8), 42);
        assert_eq!(driver.offered(), 1 << 32 | 1 << 29 | 1 << 28 | 1 << 5);
        driver.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
        assert_eq!(driver.read(VIRTIO_MMIO_DEVICE_FEATURES), 0);
        for (queue, size) in [(0, 8), (1, 4), (2, 0), (u32::MAX, 0)] {
            driver.write(VIRTIO_MMIO_QUEUE_SEL, queue);
            assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_NUM_MAX), size);
        }
        for register in [0xb0, 0xb4, 0xb8, 0xbc] {
            assert_eq!(driver.read(register), u32::MAX);
        }
        assert_eq!(driver.read(VIRTIO_MMIO_CONFIG_GENERATION), 0);
    }

    #[test]
    fn a_changed_configuration_is_told_and_stays() {
        let (mut driver, _) = driver();
        driver.start();
        driver.mmio.interrupt.change_config(&[9, 8]);
        assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 2);
        assert_eq!(driver.read(VIRTIO_MMIO_CONFIG_GENERATION), 1);
        driver.write(VIRTIO_MMIO_STATUS, 0);
        let mut config = [0xff; 4];
        driver.mmio.read(0x100, &mut config);
        assert_eq!((config, driver.read(VIRTIO_MMIO_INTERRUPT_STATUS)), ([9, 8, 0, 0], 0));
        driver.mmio.interrupt.change_config(&[7]);
        assert_eq!(driver.read(VIRTIO_MMIO_CONFIG_GENERATION), 2);
    }

    #[test]
    fn registers_take_aligned_words_and_the_configuration_any_width() {
        let (mut driver, _) = driver();
        for (offset, len) in [(0, 1), (0, 2), (0, 8), (1, 4), (2, 4)] {
            let mut data = vec![0xff; len];
            driver.mmio.read(offset, &mut data);
            assert_eq!(data, vec![0; len], "{len} bytes at {offset}");
        }
        driver.mmio.write(0x70, &[1, 0]);
        driver.mmio.write(0x71, &[1, 0, 0, 0]);
        assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 0);
        for (offset, expected) in
            [(0x100u64, &[1u8, 2, 3, 4, 5, 6, 0, 0][..]), (0x101, &[2]), (0x102, &[3, 4]), (0x104, &[5, 6, 0, 0])]
        {
            let mut data = vec![0xff; expected.len()];
            driver.mmio.read(offset, &mut data);
            assert_eq!(data, expected);
        }
        for offset in [0x106, 0xfff, u64::MAX] {
            let mut data = [0xff];
            driver.mmio.read(offset, &mut data);
            driver.mmio.write(offset, &data);
            assert_eq!(data, [0], "{offset:#x}");
        }
    }

    #[test]
    fn features_that_are_not_offered_and_old_drivers_are_refused() {
        let (mut driver, _) = driver();
        for features in [1 << 5, 1 << 32 | 1 << 6, 1 << 32 | 1 << 63, 0] {
            assert_eq!(driver.negotiate(features), 3, "{features:#x}");
        }
        assert_eq!(driver.negotiate(1 << 32), 0xb);
        // From the third word on there is nothing to accept.
        for status in [0, 1, 3] {
            driver.write(VIRTIO_MMIO_STATUS, status);
        }
        for (sel, value) in [(1, 1), (2, 1)] {
            driver.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, sel);
            driver.write(VIRTIO_MMIO_DRIVER_FEATURES, value);
        }
        driver.write(VIRTIO_MMIO_STATUS, 0xb);
        assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 3);
    }

    #[test]
    fn steps_come_in_order() {
        let (mut driver, log) = driver();
        for (written, read) in [(2, 0), (4, 0), (8, 0), (1, 1), (5, 1), (3, 3), (7, 3), (0x83, 0x83), (0xf, 0x83)] {
            driver.write(VIRTIO_MMIO_STATUS, written);
            assert_eq!(driver.read(VIRTIO_MMIO_STATUS), read, "after {written:#x}");
        }
        driver.write(VIRTIO_MMIO_STATUS, 0);
        // Queues come after the features.
        driver.set_up_queues();
        driver.write(VIRTIO_MMIO_QUEUE_SEL, 0);
        assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 0);
        assert_eq!(logged(&log), [""; 0]);
    }

    #[test]
    fn it_serves_until_it_is_reset_and_again_after() {
        let (mut driver, log) = driver();
        for _ in 0..3 {
            // Buffers that were there before DRIVER_OK are served without a notification.
            let features = driver.offered();
            driver.negotiate(features);
            driver.set_up_queues();
            driver.rings[1].add(&[(BUFFERS, 1, false)]);
            driver.write(VIRTIO_MMIO_STATUS, 0xf);
            assert_eq!(driver.wait(), 1);
            let head = driver.rings[0].add(&[(BUFFERS, 1, false)]);
            assert_eq!(driver.finish(0, 1), [(head, 0)]);
            assert_eq!(driver.rings[1].used(), [(0, 0)]);
            driver.write(VIRTIO_MMIO_STATUS, 0);
            assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 0);
            assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
            assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 0);
            assert_eq!(logged(&log), ["start 0x130000020", "serve 1", "serve 0", "stop"]);
        }
        // Dropped while it runs, it is stopped.
        driver.start();
        drop(driver);
        assert_eq!(logged(&log), ["start 0x130000020", "stop"]);
    }

    #[test]
    fn a_pause_takes_nothing_from_the_device() {
        let (mut driver, log) = driver();
        // Nothing to pause yet.
        driver.mmio.pause();
        driver.mmio.resume();
        driver.start();
        for _ in 0..3 {
            let head = driver.rings[0].add(&[(BUFFERS, 1, false)]);
            assert_eq!(driver.finish(0, 1), [(head, 0)]);
            driver.mmio.pause();
            driver.mmio.pause();
            let head = driver.rings[0].add(&[(BUFFERS, 1, false)]);
            driver.notify(0);
            assert_eq!(driver.rings[0].used(), []);
            driver.mmio.resume();
            driver.mmio.resume();
            // The first interrupt may be that of the buffer before, which was seen without.
            let mut used = vec![];
            while used.is_empty() {
                assert_eq!(driver.wait(), 1);
                used = driver.rings[0].used();
            }
            assert_eq!(used, [(head, 0)]);
        }
        // A device that gave up goes on waiting for its reset.
        driver.rings[0].publish(8);
        driver.notify(0);
        driver.wait_for_needs_reset();
        driver.mmio.pause();
        driver.mmio.resume();
        assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 0x4f);
        driver.mmio.pause();
        driver.write(VIRTIO_MMIO_STATUS, 0);
        driver.mmio.resume();
        let log = logged(&log);
        assert_eq!(
            log.iter().filter(|line| !line.starts_with("serve")).collect::<Vec<_>>(),
            ["start 0x130000020", "stop"]
        );
        driver.start();
        let head = driver.rings[0].add(&[(BUFFERS, 1, false)]);
        assert_eq!(driver.finish(0, 1), [(head, 0)]);
    }

    #[test]
    fn what_no_device_saves_is_refused() {
        let (mut driver, _) = driver();
        driver.start();
        driver.mmio.pause();
        let state = driver.mmio.save();
        let restore = |state: &Value| self::driver().0.mmio.restore(state);
        restore(&state).unwrap();
        for (place, value, why) in [
            ("/device-type", json!(1), "it was a device of type 1"),
            ("/status", json!(0x10), "its status is 0x10"),
            ("/status", json!(DRIVER_OK), "its status is 0x4"),
            ("/status", json!(u32::MAX), "its status is"),
            ("/accepted", json!(u64::MAX), "its driver uses features that it does not have here"),
            ("/accepted", json!(1 << 5), "its driver uses the legacy interface"),
            ("/queues", json!([]), "its queues are other than here"),
            ("/queues/0/max", json!(16), "its queues are other than here"),
            ("/queues/0/size", json!(9), "of virtqueue 0 its size is not a power of 2"),
            ("/queues/0/ready", json!(false), "no positions"),
            ("/queues/1/descriptors", json!(END), "of virtqueue 1 it is not in guest memory"),
            ("/queues/1/device", json!(u64::MAX - 3), "of virtqueue 1 it is not in guest memory"),
            ("/positions", json!([]), "no positions"),
            ("/positions/1", Value::Null, "no positions"),
            ("/positions", json!([[0, 0], [0, 0], [0, 0]]), "or such in others"),
        ] {
            let mut other = state.clone();
            *other.pointer_mut(place).unwrap() = value;
            let error = restore(&other).unwrap_err().to_string();
            assert!(error.contains("the virtio device") && error.contains(why), "{place}: {error}");
        }
        // Where in the ring it is only the driver knows.
        let mut other = state.clone();
        other["positions"] = json!([[u16::MAX, 7], [1, u16::MAX]]);
        restore(&other).unwrap();
    }

    #[test]
    fn a_queue_can_be_taken_back_before_driver_ok() {
        let (mut driver, log) = driver();
        driver.negotiate(1 << 32);
        driver.set_up_queues();
        driver.write(VIRTIO_MMIO_QUEUE_SEL, 0);
        // A ready queue keeps its registers.
        driver.write(VIRTIO_MMIO_QUEUE_NUM, 3);
        driver.write(VIRTIO_MMIO_QUEUE_READY, 0);
        assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 0);
        driver.rings[0].add(&[(BUFFERS, 1, false)]);
        driver.rings[1].add(&[(BUFFERS, 1, false)]);
        driver.write(VIRTIO_MMIO_STATUS, 0xf);
        driver.notify(0);
        assert_eq!(driver.wait(), 1);
        driver.write(VIRTIO_MMIO_STATUS, 0);
        assert_eq!(logged(&log), ["start 0x100000000", "serve 1", "stop"]);
    }

    #[test]
    fn a_bad_queue_needs_a_reset() {
        let (mut driver, log) = driver();
        let end = u32::try_from(END).unwrap();
        for (register, value) in [
            (VIRTIO_MMIO_QUEUE_NUM, 3),
            (VIRTIO_MMIO_QUEUE_NUM, 0),
            (VIRTIO_MMIO_QUEUE_NUM, 16),
            (VIRTIO_MMIO_QUEUE_NUM, 0x1_0004),
            (VIRTIO_MMIO_QUEUE_DESC_LOW, 8),
            (VIRTIO_MMIO_QUEUE_DESC_HIGH, 1),
            (VIRTIO_MMIO_QUEUE_DESC_LOW, end - 16),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, 1),
            (VIRTIO_MMIO_QUEUE_AVAIL_HIGH, u32::MAX),
            (VIRTIO_MMIO_QUEUE_USED_LOW, 2),
            (VIRTIO_MMIO_QUEUE_USED_LOW, end - 4),
            (VIRTIO_MMIO_QUEUE_USED_HIGH, u32::MAX),
        ] {
            driver.negotiate(1 << 32);
            driver.write(VIRTIO_MMIO_QUEUE_SEL, 1);
            driver.write(VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x1000);
            driver.write(register, value);
            driver.write(VIRTIO_MMIO_QUEUE_READY, 1);
            driver.write(VIRTIO_MMIO_STATUS, 0xf);
            assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 0x4f, "{value:#x} in {register:#x}");
            assert_eq!(driver.wait(), 2);
        }
        // To the very end of all addresses, and beyond.
        for register in [VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_USED_LOW] {
            driver.negotiate(1 << 32);
            driver.write(VIRTIO_MMIO_QUEUE_SEL, 1);
            driver.write(register, u32::MAX << 4);
            driver.write(register + 4, u32::MAX);
            driver.write(VIRTIO_MMIO_QUEUE_READY, 1);
            driver.write(VIRTIO_MMIO_STATUS, 0xf);
            assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 0x4f, "{register:#x}");
        }
        assert_eq!(logged(&log), [""; 0]);
        driver.start();
        let head = driver.rings[0].add(&[(BUFFERS, 1, false)]);
        assert_eq!(driver.finish(0, 1), [(head, 0)]);
    }

    #[test]
    fn what_the_driver_breaks_works_again_after_a_reset() {
        let (mut driver, log) = driver();
        for breakage in 0..3 {
            driver.start();
            match breakage {
                0 => driver.rings[0].set_available(9),
                1 => driver.rings[0].publish(8),
                _ => {
                    driver.put(BUFFERS, b"f");
                    driver.rings[0].add(&[(BUFFERS, 1, false)]);
                }
            }
            driver.notify(0);
            driver.wait_for_needs_reset();
            driver.notify(0);
            driver.notify(u32::MAX);
        }
        driver.put(BUFFERS, b" ");
        driver.start();
        let head = driver.rings[0].add(&[(BUFFERS, 1, false)]);
        assert_eq!(driver.finish(0, 1), [(head, 0)]);
        assert_eq!(logged(&log).iter().filter(|line| *line == "stop").count(), 3);
    }

    #[test]
    fn a_device_that_a_change_breaks_needs_a_reset() {
        let (mut driver, log) = driver();
        let change = |driver: &mut Driver| driver.mmio.change(Change::Balloon(crate::size::Size::bytes(0))).recv();
        for is_paused in [false, true] {
            change(&mut driver).unwrap().unwrap();
            driver.start();
            if is_paused {
                driver.mmio.pause();
            }
            assert_eq!(change(&mut driver).unwrap().unwrap_err().to_string(), "told to change");
            assert_ne!(driver.read(VIRTIO_MMIO_STATUS) & NEEDS_RESET, 0);
            if is_paused {
                driver.mmio.resume();
            }
            // It answers still, and serves no more.
            driver.put(BUFFERS, b"x");
            driver.rings[0].add(&[(BUFFERS, 1, true)]);
            driver.notify(0);
            change(&mut driver).unwrap().unwrap_err();
            driver.write(VIRTIO_MMIO_STATUS, 0);
            assert!(!logged(&log).contains(&"serve 0".to_owned()));
        }
        driver.start();
        driver.put(BUFFERS, b"x");
        driver.rings[0].add(&[(BUFFERS, 1, true)]);
        assert_eq!(driver.finish(0, 1).len(), 1);
    }

    #[test]
    fn a_panic_in_the_device_ends_only_the_device() {
        let (mut driver, _) = driver();
        for start in ["panics", "is gone"] {
            driver.start();
            driver.put(BUFFERS, b"p");
            driver.rings[0].add(&[(BUFFERS, 1, false)]);
            driver.notify(0);
            driver.wait_for_needs_reset();
            driver.write(VIRTIO_MMIO_STATUS, 0);
            assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 0, "{start}");
        }
        assert_eq!(driver.read(8), 42);
    }

    #[test]
    fn the_thread_is_named_and_takes_no_signals() {
        let (mut driver, _) = driver();
        driver.start();
        let head = driver.rings[0].add(&[(BUFFERS, 1, false)]);
        assert_eq!(driver.finish(0, 1), [(head, 0)]);
        let status = std::fs::read_dir("/proc/self/task")
            .unwrap()
            .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).ok())
            .find(|status| status.starts_with("Name:\tbantam-test\n"))
            .expect("there is a thread of that name");
        let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:\t")).unwrap();
        let blocked = u64::from_str_radix(blocked, 16).unwrap();
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGALRM, libc::SIGRTMIN()] {
            assert_ne!(blocked & 1 << (signal - 1), 0, "signal {signal}");
        }
        assert_eq!(driver.mmio.kicks().map(|(index, _)| index).collect::<Vec<_>>(), [0, 1]);
    }
}

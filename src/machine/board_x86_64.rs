//! The x86-64 board: which devices are where, and how they reach the run loop.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::io::retry_on_intr;
use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_RO;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::{Bytes, GuestAddress};

use super::Error;
use super::inbox::{Event, Sender};
use crate::arch::x86_64::{VirtioWindow, layout};
use crate::bus::BusDevice;
use crate::config::Config;
use crate::devices::cmos::Cmos;
use crate::devices::i8042::I8042;
use crate::devices::ioapic::{self, Ioapic};
use crate::devices::output::Output;
use crate::devices::power::Power;
use crate::devices::pvpanic::Pvpanic;
use crate::devices::serial::{Gather, Serial};
use crate::interrupt::Interrupt;
use crate::kvm::{Gathered, IrqLine, Vm};
use crate::memory::GuestRam;
use crate::metrics::Metrics;
use crate::sandbox::Sandbox;
use crate::vcpu::Buses;
use crate::virtio::device::VirtioDevice;
use crate::virtio::mmio::{Mmio, QUEUE_NOTIFY};

/// COM1, as the run loop holds it.
pub(super) type Port = Serial<Output, Box<dyn Fn() + Send>>;

impl Gather for Gathered {
    fn start(&mut self) {
        Gathered::start(self);
    }

    fn stop(&mut self) {
        Gathered::stop(self);
    }
}

/// The keyboard controller, as the run loop holds it.
pub(super) type Keyboard = I8042<Box<dyn Fn() + Send>>;

/// A virtio device and what its thread and its counters are called.
pub(super) type NamedDevice = (String, Box<dyn VirtioDevice>);

/// The devices of a machine, as they are attached.
pub(super) struct Board<'a> {
    pub vm: &'a Vm,
    pub buses: Buses,
    /// The virtio devices.
    pub attached: Vec<Attached>,
    /// What other devices count, by what they are called.
    pub counts: Vec<(&'static str, Arc<dyn Metrics>)>,
    /// What keys are pressed on, if there is a keyboard.
    pub keyboard: Option<Arc<Mutex<Keyboard>>>,
}

/// A virtio device on its bus.
#[derive(Clone)]
pub(super) struct Attached {
    /// What its thread and its counters are called.
    pub name: String,
    pub metrics: Arc<dyn Metrics>,
    /// Whether it is a disk that the guest must not write.
    pub readonly: bool,
    /// Gone when the machine has ended.
    pub transport: Weak<Mutex<Mmio>>,
}

impl<'a> Board<'a> {
    pub fn new(vm: &'a Vm) -> Self {
        Board { vm, buses: Buses::default(), attached: Vec::new(), counts: Vec::new(), keyboard: None }
    }

    /// Attaches what every machine has: serial port, keyboard controller (with a keyboard or without), clock, power
    /// registers, pvpanic.
    pub fn attach_legacy(
        &mut self,
        output: Output,
        inbox: &Sender,
        config: &Config,
    ) -> Result<Arc<Mutex<Port>>, Error> {
        let send = |event: fn() -> Event| {
            let inbox = inbox.clone();
            move || inbox.send(event())
        };
        let on_room: Box<dyn Fn() + Send> = Box::new(send(|| Event::InputRoom));
        let mut serial = Serial::new(self.vm.line(layout::COM1_IRQ), output, on_room);
        config.serial_bw.into_iter().for_each(|limit| serial.limit(limit));
        self.counts.push(("serial", serial.counts()));
        let serial = Arc::new(Mutex::new(serial));
        self.attach_port(layout::COM1, 8, serial.clone())?;

        let line = || Arc::new(self.vm.line(layout::KEYBOARD_IRQ)) as Arc<dyn Interrupt>;
        let line = config.keyboard.then(line);
        let on_reset: Box<dyn Fn() + Send> = Box::new(send(|| Event::Reset));
        let i8042 = I8042::new(on_reset, line);
        self.counts.push(("keyboard", i8042.counts()));
        let i8042 = Arc::new(Mutex::new(i8042));
        self.attach_port(layout::I8042[0], 5, i8042.clone())?;
        self.keyboard = Some(i8042).filter(|_| config.keyboard);
        let power =
            Power::new(layout::ACPI_S5, layout::ACPI_RESET_VALUE, send(|| Event::PowerOff), send(|| Event::Reset));
        self.attach_port(layout::ACPI_SLEEP_CONTROL, 3, Arc::new(Mutex::new(power)))?;
        self.attach_port(layout::CMOS, 2, Arc::new(Mutex::new(Cmos::default())))?;
        self.attach_port(layout::PVPANIC, 1, Arc::new(Mutex::new(Pvpanic::new(send(|| Event::Pvpanic)))))?;
        Ok(serial)
    }

    /// Has bytes that a kernel writes to the serial port, while it does nothing else, be gathered: each would leave the guest
    /// once more than it does for the status.
    pub fn gather_output(&self, serial: &Mutex<Port>) {
        serial.lock().unwrap_or_else(PoisonError::into_inner).gather(self.vm.gathered(layout::COM1));
    }

    /// Attaches an IOAPIC, if KVM has none.
    pub fn attach_ioapic(&mut self) -> Result<(), Error> {
        let Some(routes) = self.vm.routes() else { return Ok(()) };
        let ioapic = Ioapic::new(move |messages: [Option<ioapic::Message>; ioapic::PINS]| {
            let pins = (0u32..).zip(messages);
            let routed = pins.filter_map(|(pin, message)| message.map(|message| (pin, message.address, message.data)));
            if let Err(error) = routes.set(routed) {
                log::error!("IOAPIC: {error}");
            }
        });
        Ok(self.buses.mmio.attach(layout::IOAPIC, ioapic::SIZE, Arc::new(Mutex::new(ioapic)))?)
    }

    fn attach_port(&mut self, port: u16, len: u64, device: Arc<Mutex<dyn BusDevice>>) -> Result<(), Error> {
        Ok(self.buses.pio.attach(port.into(), len, device)?)
    }

    /// Gives a restored machine an ID of its own; what interrupts the guest to tell it so.
    pub fn attach_generation_id(&mut self, ram: &GuestRam) -> Result<IrqLine, Error> {
        let mut id = [0; 16];
        let random = retry_on_intr(|| getrandom(&mut id[..], GetRandomFlags::empty()));
        random.map_err(|error| Error::GenerationId(error.into()))?;
        ram.write_slice(&id, GuestAddress(layout::GENERATION_ID)).expect("every machine has the first MiB");
        Ok(self.vm.line(layout::ACPI_EVENT_GSI))
    }

    /// Attaches the virtio devices, each with a window and an interrupt of its own, in this order. There are no
    /// more of them than [`virtio_windows`].
    pub fn attach_virtio(&mut self, ram: &GuestRam, devices: Vec<NamedDevice>, sandbox: &Sandbox) -> Result<(), Error> {
        let own: Vec<_> = devices.iter().map(|(_, device)| device.own_files()).collect();
        for (index, (VirtioWindow { base, gsi }, (name, device))) in virtio_windows().zip(devices).enumerate() {
            let others = own.iter().enumerate().filter(|(other, _)| *other != index).flat_map(|(_, files)| files);
            let sandbox = sandbox.device(device.device_type(), others.copied());
            let readonly = device.device_type() == VIRTIO_ID_BLOCK && device.features() & 1 << VIRTIO_BLK_F_RO != 0;
            let line = Arc::new(self.vm.line(gsi));
            let mmio = Mmio::new(ram.clone(), device, line, name.as_str())
                .map_err(|source| Error::EventFd { what: "a virtqueue", source })?
                .sandboxed(sandbox);
            for (queue, kick) in mmio.kicks() {
                self.vm.attach_ioeventfd(kick, base + QUEUE_NOTIFY, queue.into())?;
            }
            let metrics = mmio.metrics();
            let mmio = Arc::new(Mutex::new(mmio));
            self.attached.push(Attached { name, metrics, readonly, transport: Arc::downgrade(&mmio) });
            self.buses.mmio.attach(base, layout::VIRTIO_MMIO_SIZE, mmio)?;
        }
        Ok(())
    }
}

/// The windows and interrupts of virtio devices, in order.
pub(super) fn virtio_windows() -> impl Iterator<Item = VirtioWindow> {
    let bases = (0..).map(|i| layout::VIRTIO_MMIO + i * layout::VIRTIO_MMIO_SIZE);
    bases.zip(layout::VIRTIO_GSIS).map(|(base, gsi)| VirtioWindow { base, gsi })
}

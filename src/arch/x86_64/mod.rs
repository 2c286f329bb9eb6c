//! x86-64: where things are, and the tables that tell the guest.

use std::ops::Range;

use vm_memory::GuestMemoryError;

pub mod acpi;
pub mod boot_params;
pub mod cpuid;
pub mod e820;
pub mod layout;
pub mod mptable;
pub mod pvh;
pub mod regs;
pub mod template;

/// APIC IDs from this one on do not fit xAPIC mode, where it means all CPUs (Intel SDM volume 3, 11.12.9).
pub const FIRST_X2APIC_ID: u32 = 255;

/// Whether a machine of `cpus` CPUs starts in x2APIC mode.
pub fn needs_x2apic(cpus: u32) -> bool {
    cpus > FIRST_X2APIC_ID
}

/// Boot structures could not be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no guest memory where they have to be.
    #[error("cannot write the {what} to guest memory at {address:#x}")]
    NoMemory {
        /// What was written.
        what: &'static str,
        /// Where, guest-physical.
        address: u64,
        /// What is wrong there.
        #[source]
        source: GuestMemoryError,
    },
    /// The machine has more CPUs than there is room to tell of.
    #[error("the ACPI tables of {cpus} CPUs take {size} bytes, there is room for {room}")]
    TooManyCpus {
        /// CPUs of the machine.
        cpus: u32,
        /// Size of the tables in bytes.
        size: usize,
        /// Room for them in bytes.
        room: u64,
    },
}

fn no_memory(what: &'static str, address: u64) -> impl Fn(GuestMemoryError) -> Error + Copy {
    move |source| Error::NoMemory { what, address, source }
}

/// What the tables tell of a machine. CPUs have the APIC IDs 0, 1, 2, ...
#[derive(Debug, Clone, Copy, Default)]
pub struct Platform<'a> {
    /// Number of CPUs.
    pub cpus: u32,
    /// The virtio-mmio devices.
    pub virtio: &'a [VirtioWindow],
    /// Whether there is a serial port.
    pub com1: bool,
    /// Whether there is a pvpanic port.
    pub pvpanic: bool,
    /// Whether there is a keyboard.
    pub keyboard: bool,
}

/// Where a virtio-mmio device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VirtioWindow {
    /// Guest-physical address of its registers, [`layout::VIRTIO_MMIO_SIZE`] long.
    pub base: u64,
    /// Its global system interrupt, edge-triggered.
    pub gsi: u32,
}

/// What the kernel is told beside its command line at [`layout::CMDLINE`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BootInfo {
    /// Where the initrd is.
    pub initrd: Option<Range<u64>>,
    /// Where the ACPI root pointer is; `None` hides ACPI.
    pub rsdp: Option<u64>,
}

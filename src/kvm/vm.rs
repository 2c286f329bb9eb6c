//! A KVM virtual machine: its memory slots, interrupt controllers, eventfds and vCPUs.

#![expect(unsafe_code, reason = "KVM_SET_USER_MEMORY_REGION hands host memory to a guest")]

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_IRQ_ROUTING_MSI, KVM_MAX_CPUID_ENTRIES,
    KVM_PIT_SPEAKER_DUMMY, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, KvmIrqRouting,
    kvm_cpuid_entry2, kvm_enable_cap, kvm_irq_routing_entry, kvm_irq_routing_msi, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, Kvm, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::Vcpu;
use super::gathered::{Gathered, Turn};
use crate::arch::x86_64::cpuid::{self, for_vcpu};
use crate::arch::x86_64::template::{self, Template};
use crate::arch::x86_64::{layout, needs_x2apic};
use crate::interrupt::Interrupt;
use crate::memory::GuestRam;
use crate::snapshot;

/// What KVM would not do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `/dev/kvm` cannot be opened.
    #[error("cannot open /dev/kvm")]
    Open(#[source] io::Error),
    /// More vCPUs than this host's KVM allows.
    #[error("cannot create {asked} vCPUs: KVM on this host allows at most {max}")]
    TooManyVcpus {
        /// How many were asked for.
        asked: u32,
        /// `KVM_CAP_MAX_VCPUS`.
        max: usize,
    },
    /// An ioctl failed.
    #[error("KVM: cannot {what}")]
    Ioctl {
        /// What was attempted, on what.
        what: String,
        /// What KVM said.
        #[source]
        source: io::Error,
    },
    /// What was saved does not fit.
    #[error(transparent)]
    State(snapshot::Error),
    /// The CPU that was asked for cannot be had.
    #[error(transparent)]
    Template(#[from] template::Error),
}

impl Error {
    /// For `map_err`: names what an ioctl was meant to do.
    pub(super) fn ioctl(what: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        |error| Error::Ioctl { what: what.into(), source: io::Error::from_raw_os_error(error.errno()) }
    }
}

/// A virtual machine with in-kernel interrupt controllers, and the guest memory that its slots refer to.
pub struct Vm {
    pub(super) fd: Arc<VmFd>,
    /// Stays open: a process that has shut itself in could not open it again.
    pub(super) kvm: Kvm,
    pub(super) x2apic: bool,
    /// Keeps the mapped pages alive for as long as the slots point at them.
    ram: GuestRam,
    pub(super) cpuid: CpuId,
    tsc_deadline: bool,
    turn: Turn,
}

impl Vm {
    /// Creates a virtual machine for `cpus` vCPUs with the memory `ram`.
    pub fn new(ram: GuestRam, cpus: u32) -> Result<Self, Error> {
        let kvm = Kvm::new().map_err(|error| Error::Open(io::Error::from_raw_os_error(error.errno())))?;
        // One vCPU there can always be.
        if cpus > 1 {
            let max = kvm.get_max_vcpus();
            if usize::try_from(cpus).map_or(true, |cpus| cpus > max) {
                return Err(Error::TooManyVcpus { asked: cpus, max });
            }
        }
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(Error::ioctl("read the supported CPUID (KVM_GET_SUPPORTED_CPUID)"))?;
        let fd = loop {
            // A signal, a debugger's say, interrupts KVM_CREATE_VM.
            match kvm.create_vm() {
                Err(error) if error.errno() == libc::EINTR => {}
                other => break other.map_err(Error::ioctl("create a virtual machine (KVM_CREATE_VM)"))?,
            }
        };
        // Since Linux 3.3 local APICs of KVM have that timer, but the supported CPUID does not tell.
        let vm = Vm {
            fd: Arc::new(fd),
            kvm,
            x2apic: needs_x2apic(cpus),
            ram,
            cpuid,
            tsc_deadline: true,
            turn: Turn::default(),
        };
        // First: it waits for an SRCU grace period, which takes a timer tick once the others have begun one.
        vm.map_memory()?;
        // The identity map stays where KVM has it: below the TSS.
        let tss = usize::try_from(layout::KVM_TSS).expect("the TSS lies below 4 GiB");
        vm.fd.set_tss_address(tss).map_err(Error::ioctl("place the TSS (KVM_SET_TSS_ADDR)"))?;
        vm.create_interrupt_controllers()?;
        Ok(vm)
    }

    /// KVM's PIC, IOAPIC, PIT and local APICs; the latter only, with 32-bit IDs, where its IOAPIC does not reach all.
    fn create_interrupt_controllers(&self) -> Result<(), Error> {
        if self.x2apic {
            let flags = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
            self.enable(KVM_CAP_X2APIC_API, flags, "give local APICs 32-bit IDs (KVM_CAP_X2APIC_API)")?;
            let pins = layout::IOAPIC_PINS;
            return self.enable(KVM_CAP_SPLIT_IRQCHIP, pins, "create the local APICs (KVM_CAP_SPLIT_IRQCHIP)");
        }
        self.fd.create_irq_chip().map_err(Error::ioctl("create the interrupt controllers (KVM_CREATE_IRQCHIP)"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        self.fd.create_pit2(pit).map_err(Error::ioctl("create the timer (KVM_CREATE_PIT2)"))
    }

    fn enable(&self, cap: u32, argument: u32, what: &str) -> Result<(), Error> {
        let mut enable = kvm_enable_cap { cap, ..Default::default() };
        enable.args[0] = argument.into();
        self.fd.enable_cap(&enable).map_err(Error::ioctl(what))
    }

    /// Changes what vCPUs that are created from now on have of CPUID.
    ///
    /// # Errors
    /// When KVM does not have what the template needs.
    pub fn apply(&mut self, template: &Template) -> Result<(), Error> {
        let is_missing = |number: u32| self.fd.check_extension_raw(number.into()) <= 0;
        let mut needed = template.kvm_capabilities.iter().filter(|capability| capability.needed);
        if let Some(capability) = needed.find(|capability| is_missing(capability.number)) {
            return Err(template::Error::Capability(capability.number).into());
        }
        // The template may take what KVM does not tell of.
        cpuid::set_tsc_deadline(&mut self.cpuid, self.tsc_deadline);
        template.apply(&mut self.cpuid)?;
        self.tsc_deadline = cpuid::has_tsc_deadline(&self.cpuid);
        Ok(())
    }

    /// Guest memory.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// What an IOAPIC outside of KVM sets; `None` if KVM has its own.
    pub fn routes(&self) -> Option<Routes> {
        self.x2apic.then(|| Routes(Arc::clone(&self.fd)))
    }

    fn map_memory(&self) -> Result<(), Error> {
        for (slot, region) in (0u32..).zip(self.ram.iter()) {
            let start = region.start_addr();
            let host = self.ram.get_host_address(start).expect("a region contains its first address");
            let slot = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: start.raw_value(),
                memory_size: region.len(),
                userspace_addr: host as u64,
            };
            // SAFETY: the slot covers a whole region of `self.ram`, which vCPUs access, and what runs while `self` or one of
            // them lives: `self` and each `Vcpu` keep the memory mapped until theirs is closed. What is left of the virtual
            // machine then, for as long as a line has its descriptor, is not run.
            unsafe { self.fd.set_user_memory_region(slot) }.map_err(Error::ioctl(format!(
                "map {} MiB of guest memory at {:#x} (KVM_SET_USER_MEMORY_REGION)",
                region.len() >> 20,
                start.raw_value()
            )))?;
        }
        Ok(())
    }

    /// Creates vCPU `index` of `cpus`, with its CPUID.
    pub fn create_vcpu(&self, index: u32, cpus: u32) -> Result<Vcpu, Error> {
        self.create_vcpu_with(index, &for_vcpu(&self.cpuid, index, cpus, self.tsc_deadline))
    }

    pub(super) fn create_vcpu_with(&self, index: u32, cpuid: &[kvm_cpuid_entry2]) -> Result<Vcpu, Error> {
        let fd = self
            .fd
            .create_vcpu(index.into())
            .map_err(Error::ioctl(format!("create vCPU {index} (KVM_CREATE_VCPU)")))?;
        Vcpu::new(fd, index, cpuid, self.fd.run_size(), Arc::clone(&self.turn), self.ram.clone())
    }

    /// What has KVM gather writes to `port`.
    pub fn gathered(&self, port: u16) -> Gathered {
        Gathered { vm: Arc::clone(&self.fd), port }
    }

    /// The line of interrupt `gsi`.
    pub fn line(&self, gsi: u32) -> IrqLine {
        IrqLine { vm: Arc::clone(&self.fd), gsi, turn: Mutex::default() }
    }

    /// Has KVM write `event` whenever the guest writes `value`, 32 bits, at `address` (`KVM_IOEVENTFD`).
    pub fn attach_ioeventfd(&self, event: &EventFd, address: u64, value: u32) -> Result<(), Error> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), value)
            .map_err(Error::ioctl(format!("attach an ioeventfd at {address:#x} (KVM_IOEVENTFD)")))
    }
}

/// An interrupt line. It is no irqfd: what an irqfd sends to an IOAPIC waits for a thread of the kernel's, which on a busy
/// host has been seen to come after the guest had halted.
pub struct IrqLine {
    vm: Arc<VmFd>,
    gsi: u32,
    /// Held from up to down: an edge between those of another thread would be none.
    turn: Mutex<()>,
}

impl Interrupt for IrqLine {
    /// Up and down (`KVM_IRQ_LINE`).
    fn trigger(&self) -> io::Result<()> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        [true, false].into_iter().try_for_each(|level| Ok(self.vm.set_irq_line(self.gsi, level)?))
    }
}

/// The interrupt messages that lines send.
pub struct Routes(Arc<VmFd>);

impl Routes {
    /// From now on the line of `gsi` sends the message `data` to `address`, for each of `routes` as (`gsi`, `address`,
    /// `data`); those of other GSIs do nothing (`KVM_SET_GSI_ROUTING`).
    pub fn set(&self, routes: impl Iterator<Item = (u32, u64, u32)>) -> Result<(), Error> {
        let entries: Vec<_> = routes
            .map(|(gsi, address, data)| {
                let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
                let [low, high] = [address, address >> 32].map(|half| (half & 0xffff_ffff) as u32);
                entry.u.msi = kvm_irq_routing_msi { address_lo: low, address_hi: high, data, ..Default::default() };
                entry
            })
            .collect();
        let what = "route interrupts (KVM_SET_GSI_ROUTING)";
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| Error::Ioctl { what: what.into(), source: io::Error::other("more routes than KVM takes") })?;
        self.0.set_gsi_routing(&routing).map_err(Error::ioctl(what))
    }
}

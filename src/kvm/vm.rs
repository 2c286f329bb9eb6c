//! A KVM virtual machine: its memory slots, interrupt controllers, eventfds and vCPUs.

#![expect(unsafe_code, reason = "KVM_SET_USER_MEMORY_REGION hands host memory to a guest")]

use std::io;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::Vcpu;
use crate::arch::x86_64::layout;
use crate::memory::GuestRam;

/// What KVM would not do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `/dev/kvm` cannot be opened.
    #[error("cannot open /dev/kvm")]
    Open(#[source] io::Error),
    /// `/dev/kvm` speaks another API than the one that has been stable since Linux 2.6.22.
    #[error("/dev/kvm has API version {0}, not 12")]
    ApiVersion(i32),
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
}

impl Error {
    /// For `map_err`: names what an ioctl was meant to do.
    pub(super) fn ioctl(what: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        |error| Error::Ioctl { what: what.into(), source: io::Error::from_raw_os_error(error.errno()) }
    }
}

/// A virtual machine with in-kernel interrupt controllers, and the guest memory that its slots refer to.
pub struct Vm {
    fd: VmFd,
    /// Keeps the mapped pages alive for as long as the slots point at them.
    ram: GuestRam,
    cpuid: CpuId,
    tsc_deadline: bool,
}

impl Vm {
    /// Creates a virtual machine for `cpus` vCPUs with the memory `ram`.
    pub fn new(ram: GuestRam, cpus: u32) -> Result<Self, Error> {
        let kvm = Kvm::new().map_err(|error| Error::Open(io::Error::from_raw_os_error(error.errno())))?;
        match kvm.get_api_version() {
            12 => {}
            other => return Err(Error::ApiVersion(other)),
        }
        let max = kvm.get_max_vcpus();
        if usize::try_from(cpus).map_or(true, |cpus| cpus > max) {
            return Err(Error::TooManyVcpus { asked: cpus, max });
        }
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(Error::ioctl("read the supported CPUID (KVM_GET_SUPPORTED_CPUID)"))?;
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        let fd = loop {
            // A signal, a debugger's say, interrupts KVM_CREATE_VM.
            match kvm.create_vm() {
                Err(error) if error.errno() == libc::EINTR => {}
                other => break other.map_err(Error::ioctl("create a virtual machine (KVM_CREATE_VM)"))?,
            }
        };
        let vm = Vm { fd, ram, cpuid, tsc_deadline };
        // First: it waits for an SRCU grace period, which takes a timer tick once the others have begun one.
        vm.map_memory()?;
        vm.fd
            .set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(Error::ioctl("place the identity map (KVM_SET_IDENTITY_MAP_ADDR)"))?;
        let tss = usize::try_from(layout::KVM_TSS).expect("the TSS lies below 4 GiB");
        vm.fd.set_tss_address(tss).map_err(Error::ioctl("place the TSS (KVM_SET_TSS_ADDR)"))?;
        vm.fd.create_irq_chip().map_err(Error::ioctl("create the interrupt controllers (KVM_CREATE_IRQCHIP)"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.fd.create_pit2(pit).map_err(Error::ioctl("create the timer (KVM_CREATE_PIT2)"))?;
        Ok(vm)
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
            // SAFETY: the slot covers a whole region of `self.ram`. The virtual machine lives as long as a descriptor of
            // it or of a vCPU is open; `self` and each `Vcpu` keep the memory mapped until theirs is closed.
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
        let fd = self
            .fd
            .create_vcpu(index.into())
            .map_err(Error::ioctl(format!("create vCPU {index} (KVM_CREATE_VCPU)")))?;
        let cpuid = crate::arch::x86_64::cpuid::for_vcpu(&self.cpuid, index, cpus, self.tsc_deadline);
        Vcpu::new(fd, index, &cpuid, self.fd.run_size(), self.ram.clone())
    }

    /// Has KVM raise interrupt `gsi` whenever `line` is written (`KVM_IRQFD`).
    pub fn attach_irqfd(&self, line: &EventFd, gsi: u32) -> Result<(), Error> {
        self.fd.register_irqfd(line, gsi).map_err(Error::ioctl(format!("attach an irqfd to GSI {gsi} (KVM_IRQFD)")))
    }

    /// Has KVM write `event` whenever the guest writes `value`, 32 bits, at `address` (`KVM_IOEVENTFD`).
    pub fn attach_ioeventfd(&self, event: &EventFd, address: u64, value: u32) -> Result<(), Error> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), value)
            .map_err(Error::ioctl(format!("attach an ioeventfd at {address:#x} (KVM_IOEVENTFD)")))
    }
}

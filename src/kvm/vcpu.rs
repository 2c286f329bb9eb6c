//! One vCPU: its registers, and what made it leave the guest.

#![expect(unsafe_code, reason = "the kvm_run page is shared with the kernel and with the thread that kicks")]

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{
    CpuId, KVM_COALESCED_MMIO_PAGE_OFFSET, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, KVM_MP_STATE_RUNNABLE, Msrs, kvm_cpuid_entry2, kvm_msr_entry,
    kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::Error;
use super::gathered::{self, Turn};
use crate::arch::x86_64::regs::{self, Entry};
use crate::arch::x86_64::template::{self, MsrModifier};
use crate::bus::Bus;
use crate::memory::{GuestRam, page_size};

/// Why a vCPU came back, when it was not for a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// A device access, served; go on.
    Served(Access),
    /// A kick or a signal.
    Interrupted,
    /// `KVM_EXIT_SHUTDOWN`: a triple fault.
    Shutdown,
    /// `KVM_EXIT_FAIL_ENTRY`: the processor refused the state, for this hardware reason.
    FailEntry(u64),
    /// `KVM_EXIT_INTERNAL_ERROR` with this suberror; of an emulation failure the instruction's bytes.
    InternalError {
        /// `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
        /// What KVM could not emulate, if it says.
        instruction: Vec<u8>,
    },
    /// An exit that this machine never asks for.
    Unexpected(String),
}

/// What a device was accessed by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// `KVM_EXIT_IO`, in.
    PortRead,
    /// `KVM_EXIT_IO`, out.
    PortWrite,
    /// `KVM_EXIT_MMIO`, a read.
    MmioRead,
    /// `KVM_EXIT_MMIO`, a write.
    MmioWrite,
}

/// A vCPU. Lives on one thread; [`Kicker`] reaches it from others.
pub struct Vcpu {
    pub(super) fd: VcpuFd,
    pub(super) index: u32,
    run: Arc<RunPage>,
    /// That of the writes which KVM has gathered.
    turn: Turn,
    /// Stays mapped while the guest may run, whoever goes first. Dropped after `fd`.
    _ram: GuestRam,
}

impl Vcpu {
    pub(super) fn new(
        fd: VcpuFd,
        index: u32,
        cpuid: &[kvm_cpuid_entry2],
        run_size: usize,
        turn: Turn,
        ram: GuestRam,
    ) -> Result<Self, Error> {
        let run = RunPage::map(&fd, run_size)
            .map_err(|source| Error::Ioctl { what: format!("map the run page of vCPU {index}"), source })?;
        let run = Arc::new(run);
        let cpuid = CpuId::from_entries(cpuid).map_err(|_| Error::Ioctl {
            what: format!("make the CPUID of vCPU {index}"),
            source: io::Error::other("more leaves than KVM takes"),
        })?;
        fd.set_cpuid2(&cpuid).map_err(Error::ioctl(format!("set the CPUID of vCPU {index} (KVM_SET_CPUID2)")))?;
        let msrs = Msrs::from_entries(&regs::msrs()).expect("two MSRs fit");
        fd.set_msrs(&msrs).map_err(Error::ioctl(format!("set the MSRs of vCPU {index} (KVM_SET_MSRS)")))?;
        Ok(Vcpu { fd, index, run, turn, _ram: ram })
    }

    /// Has the boot vCPU start at `entry`. The others wait for it to send INIT and SIPI.
    pub fn set_entry(&self, entry: Entry) -> Result<(), Error> {
        let fail = |what: &str| Error::ioctl(format!("{what} of vCPU {}", self.index));
        let mut sregs = self.fd.get_sregs().map_err(fail("read the special registers (KVM_GET_SREGS)"))?;
        entry.set_sregs(&mut sregs);
        self.fd.set_sregs(&sregs).map_err(fail("set the special registers (KVM_SET_SREGS)"))?;
        self.fd.set_regs(&entry.regs()).map_err(fail("set the registers (KVM_SET_REGS)"))
    }

    /// Changes model specific registers from what KVM has in them.
    ///
    /// # Errors
    /// When KVM does not have one of them, or not take its value.
    pub fn modify_msrs(&self, modifiers: &[MsrModifier]) -> Result<(), Error> {
        for MsrModifier { addr, bitmap } in modifiers {
            let what = |verb: &str| format!("{verb} the MSR {addr} of vCPU {}", self.index);
            let mut msrs =
                Msrs::from_entries(&[kvm_msr_entry { index: addr.0, ..Default::default() }]).expect("one MSR fits");
            let read = self.fd.get_msrs(&mut msrs);
            if read.map_err(Error::ioctl(what("read")))? == 0 {
                return Err(template::Error::Msr(addr.0).into());
            }
            let entry = &mut msrs.as_mut_slice()[0];
            entry.data = bitmap.apply(entry.data);
            let value = entry.data;
            if self.fd.set_msrs(&msrs).map_err(Error::ioctl(what("set")))? == 0 {
                return Err(template::Error::Value { addr: addr.0, value }.into());
            }
        }
        Ok(())
    }

    /// Has the vCPU start in x2APIC mode.
    pub fn enter_x2apic(&self) -> Result<(), Error> {
        let fail = || Error::ioctl(format!("put the APIC of vCPU {} into x2APIC mode (KVM_SET_SREGS)", self.index));
        let mut sregs = self.fd.get_sregs().map_err(fail())?;
        regs::enter_x2apic(&mut sregs);
        self.fd.set_sregs(&sregs).map_err(fail())
    }

    /// What kicks this vCPU from another thread.
    pub fn kicker(&self) -> Kicker {
        Kicker(Arc::clone(&self.run))
    }

    /// Enters the guest until it needs a device, and serves that access; or until something else happens.
    pub fn run(&mut self, pio: &Bus, mmio: &Bus) -> Result<Exit, Error> {
        let exit = self.fd.run();
        // What was written before comes before, and when it stands still nothing is left.
        let is_memory = matches!(exit, Ok(VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..)));
        self.run.serve_gathered(&self.turn, pio, !is_memory);
        let exit = match exit {
            Ok(exit) => exit,
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => return Ok(Exit::Interrupted),
            Err(error) => return Err(Error::ioctl(format!("run vCPU {} (KVM_RUN)", self.index))(error)),
        };
        let access = match exit {
            // A string instruction moves several items through the one port.
            VcpuExit::IoOut(port, data) => {
                data.chunks(self.run.io_size()).for_each(|item| pio.write(port.into(), item));
                Access::PortWrite
            }
            VcpuExit::IoIn(port, data) => {
                data.chunks_mut(self.run.io_size()).for_each(|item| pio.read(port.into(), item));
                Access::PortRead
            }
            VcpuExit::MmioRead(address, data) => {
                mmio.read(address, data);
                Access::MmioRead
            }
            VcpuExit::MmioWrite(address, data) => {
                mmio.write(address, data);
                Access::MmioWrite
            }
            VcpuExit::Intr => return Ok(Exit::Interrupted),
            VcpuExit::Shutdown => return Ok(Exit::Shutdown),
            VcpuExit::FailEntry(reason, _) => return Ok(Exit::FailEntry(reason)),
            VcpuExit::InternalError => return Ok(self.internal_error()),
            other => return Ok(Exit::Unexpected(format!("{other:?}"))),
        };
        Ok(Exit::Served(access))
    }

    /// Tells the guest's clock that the guest stands still, so that its watchdogs do not take it for a lockup.
    pub fn tell_pause(&self) {
        // A guest without that clock has nothing to be told.
        let _ = self.fd.kvmclock_ctrl();
    }

    /// Takes back a kick, once it is answered.
    pub fn clear_kick(&self) {
        self.run.immediate_exit().store(0, Ordering::SeqCst);
    }

    fn internal_error(&mut self) -> Exit {
        let run = self.fd.get_kvm_run();
        // SAFETY: every variant of the union is plain data, and KVM_EXIT_INTERNAL_ERROR filled in this one.
        let internal = unsafe { run.__bindgen_anon_1.internal };
        let mut instruction = Vec::new();
        if internal.suberror == KVM_INTERNAL_ERROR_EMULATION && internal.ndata >= 1 {
            // struct emulation_failure: flags, then the count of bytes and up to 15 of them.
            let flags = internal.data[0];
            let bytes: Vec<u8> = internal.data[1..3].iter().flat_map(|word| word.to_le_bytes()).collect();
            if flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0 {
                let count = usize::from(bytes[0]).min(15);
                instruction = bytes[1..=count].to_vec();
            }
        }
        Exit::InternalError { suberror: internal.suberror, instruction }
    }

    /// Where the vCPU stands: instruction pointer and privilege level.
    pub fn position(&self) -> (u64, u8) {
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        let cpl = self.fd.get_sregs().map_or(0, |sregs| sregs.ss.dpl);
        (rip, cpl)
    }

    /// Whether nothing but an NMI or a reset can make the vCPU run again: it was never started, or it halted with
    /// interrupts off.
    pub fn is_stopped(&self) -> bool {
        const INTERRUPT_FLAG: u64 = 1 << 9;
        let waits = self.fd.get_mp_state().is_ok_and(|state| state.mp_state != KVM_MP_STATE_RUNNABLE);
        waits && self.fd.get_regs().is_ok_and(|regs| regs.rflags & INTERRUPT_FLAG == 0)
    }
}

/// Has a vCPU leave the guest, or not enter it, from another thread. It takes effect at once if the vCPU's thread
/// also gets a signal.
pub struct Kicker(Arc<RunPage>);

impl Kicker {
    /// Every `KVM_RUN` returns at once until the vCPU takes the kick back.
    pub fn kick(&self) {
        self.0.immediate_exit().store(1, Ordering::SeqCst);
    }
}

/// A mapping of a vCPU's `kvm_run`, of its own, so that it may outlive or leave the vCPU's thread.
struct RunPage {
    page: NonNull<kvm_run>,
    len: usize,
}

// SAFETY: the page is shared memory; what is read or written through it is one byte, volatile or atomic.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    fn map(fd: &VcpuFd, len: usize) -> io::Result<Self> {
        use rustix::mm::{MapFlags, ProtFlags, mmap};
        use std::os::fd::{AsRawFd, BorrowedFd};
        // SAFETY: `fd` is open for as long as it is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        // SAFETY: a new shared mapping at an address of the kernel's choice disturbs no other.
        let page =
            unsafe { mmap(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, fd, 0) }?;
        let page = NonNull::new(page.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        Ok(RunPage { page, len })
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the field lies within the mapped page.
        let byte = unsafe { &raw mut (*self.page.as_ptr()).immediate_exit };
        // SAFETY: the byte is mapped while `self` lives and only ever accessed as an atomic, or by the kernel.
        unsafe { AtomicU8::from_ptr(byte) }
    }

    /// Serves the writes that KVM has gathered. Who does not wait leaves them to another vCPU that is at it.
    fn serve_gathered(&self, turn: &Turn, pio: &Bus, waits: bool) {
        let page_size = usize::try_from(page_size()).expect("pages fit");
        let start = page_size * KVM_COALESCED_MMIO_PAGE_OFFSET as usize;
        if self.len < start + page_size {
            return;
        }
        // SAFETY: the mapping is larger.
        let ring = unsafe { self.page.cast::<u8>().add(start) };
        // SAFETY: KVM has its ring there, which is mapped while `self` lives.
        unsafe { gathered::serve(ring, page_size, turn, pio, waits) };
    }

    /// Size of one item of the port I/O that the last exit was for: 1, 2 or 4 bytes.
    fn io_size(&self) -> usize {
        // SAFETY: the field lies within the mapped page.
        let size = unsafe { &raw const (*self.page.as_ptr()).__bindgen_anon_1.io.size };
        // SAFETY: the byte is mapped while `self` lives, and the kernel writes it only during KVM_RUN.
        let size = unsafe { size.read_volatile() };
        usize::from(size).max(1)
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: `map` mapped exactly this, and nothing borrowed from `self` is left.
        let unmapped = unsafe { rustix::mm::munmap(self.page.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok());
    }
}

//! The registers of a vCPU that is about to enter a kernel.
//!
//! Two ways in: PVH enters in 32-bit protected mode without paging, the 64-bit boot protocol in long mode with the
//! first 4 GiB mapped one to one. Both are plain values here; [`crate::kvm`] applies them.

use kvm_bindings::{kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

use super::layout;
use crate::memory::GuestRam;

/// Where and how the boot vCPU enters the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// By the PVH note (Xen's `XEN_ELFNOTE_PHYS32_ENTRY`): `%ebx` points to an `hvm_start_info`.
    Pvh {
        /// Guest-physical address of the entry point.
        entry: u64,
        /// Guest-physical address of the `hvm_start_info`.
        start_info: u64,
    },
    /// By the 64-bit boot protocol (Documentation/arch/x86/boot.rst): `%rsi` points to the zero page.
    Linux64 {
        /// Guest-physical address of the entry point.
        entry: u64,
        /// Guest-physical address of the `boot_params`.
        zero_page: u64,
    },
}

/// The tables of long mode do not fit the guest memory.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the boot page tables and GDT")]
pub struct Error(#[from] vm_memory::GuestMemoryError);

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Present, writable (Intel SDM volume 3, 4.5).
const PAGE_TABLE: u64 = 0x3;
/// Present, writable, 2 MiB.
const LARGE_PAGE: u64 = 0x83;

/// Flat 4 GiB segment, present, accessed; `type_` as in Intel SDM volume 3, 3.4.5.1.
fn flat(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        db: u8::from(!long),
        l: u8::from(long),
        s: 1,
        g: 1,
        ..Default::default()
    }
}

/// A busy 32-bit (or, in long mode, 64-bit) TSS at 0: VM entry wants a valid task register.
fn task_state(limit: u32) -> kvm_segment {
    kvm_segment { limit, selector: 0x20, type_: 0xb, present: 1, ..Default::default() }
}

impl Entry {
    /// The general registers: the entry point, and where the kernel finds its parameters.
    pub fn regs(self) -> kvm_regs {
        // Bit 1 of RFLAGS is always set.
        let start = kvm_regs { rflags: 2, ..Default::default() };
        match self {
            Entry::Pvh { entry, start_info } => kvm_regs { rip: entry, rbx: start_info, ..start },
            Entry::Linux64 { entry, zero_page } => kvm_regs { rip: entry, rsi: zero_page, ..start },
        }
    }

    /// Changes the special registers of a vCPU after reset to those that the entry asks for.
    pub fn set_sregs(self, sregs: &mut kvm_sregs) {
        let long = matches!(self, Entry::Linux64 { .. });
        sregs.cs = flat(0x10, 0xb, long);
        let data = kvm_segment { db: 1, l: 0, ..flat(0x18, 0x3, false) };
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = task_state(0x67);
        sregs.gdt.base = layout::GDT;
        sregs.gdt.limit = layout::GDT_ENTRIES * 8 - 1;
        sregs.idt.limit = 0;
        sregs.cr0 = CR0_PE | CR0_ET;
        sregs.cr4 = 0;
        sregs.efer = 0;
        if long {
            sregs.cr0 |= CR0_PG;
            sregs.cr3 = layout::PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
        }
    }

    /// Writes what the entry needs in guest memory besides the kernel: the GDT, and the page tables of long mode.
    pub fn write_tables(self, ram: &GuestRam) -> Result<(), Error> {
        let long = matches!(self, Entry::Linux64 { .. });
        // __BOOT_CS is selector 0x10 and __BOOT_DS 0x18.
        let code: u64 = if long { 0x00af_9b00_0000_ffff } else { 0x00cf_9b00_0000_ffff };
        let gdt: [u64; 5] = [0, 0, code, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];
        for (i, entry) in (0u64..).zip(gdt) {
            ram.write_obj(entry, GuestAddress(layout::GDT + 8 * i))?;
        }
        if long {
            self.write_page_tables(ram)?;
        }
        Ok(())
    }

    /// PML4, PDPT and four page directories: the first 4 GiB, one to one, in 2 MiB pages.
    fn write_page_tables(self, ram: &GuestRam) -> Result<(), Error> {
        let pdpt = layout::PAGE_TABLES + 0x1000;
        let directories = pdpt + 0x1000;
        ram.write_obj(pdpt | PAGE_TABLE, GuestAddress(layout::PAGE_TABLES))?;
        for i in 0..4 {
            ram.write_obj((directories + 0x1000 * i) | PAGE_TABLE, GuestAddress(pdpt + 8 * i))?;
        }
        let pages: Vec<u8> = (0..4 * 512u64).flat_map(|i| ((i << 21) | LARGE_PAGE).to_le_bytes()).collect();
        ram.write_slice(&pages, GuestAddress(directories))?;
        Ok(())
    }
}

/// Puts a vCPU's local APIC into x2APIC mode (Intel SDM volume 3, 11.12.1), as firmware does where xAPIC IDs do not
/// suffice.
pub fn enter_x2apic(sregs: &mut kvm_sregs) {
    const ENABLED: u64 = 1 << 11;
    const X2APIC: u64 = 1 << 10;
    sregs.apic_base |= ENABLED | X2APIC;
}

/// MSRs that a kernel expects firmware to have set, the same on every vCPU.
pub fn msrs() -> [kvm_msr_entry; 2] {
    const IA32_MISC_ENABLE: u32 = 0x1a0;
    const FAST_STRINGS: u64 = 1;
    const MTRR_DEF_TYPE: u32 = 0x2ff;
    const MTRR_ENABLED_WRITE_BACK: u64 = 0x806;
    let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    [msr(IA32_MISC_ENABLE, FAST_STRINGS), msr(MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram() -> GuestRam {
        crate::memory::reserve(&[0..1 << 20]).unwrap()
    }

    #[test]
    fn long_mode_maps_the_first_four_gib_one_to_one() {
        let ram = ram();
        Entry::Linux64 { entry: 0x100_0200, zero_page: 0x7000 }.write_tables(&ram).unwrap();
        for address in [0u64, 0x1234_5678, 0xfee0_0000, 0xffff_ffff] {
            let mut table = layout::PAGE_TABLES;
            for shift in [39, 30] {
                let entry: u64 = ram.read_obj(GuestAddress(table + 8 * ((address >> shift) & 511))).unwrap();
                assert_eq!(entry & 0xfff, PAGE_TABLE);
                table = entry & !0xfff;
            }
            let page: u64 = ram.read_obj(GuestAddress(table + 8 * ((address >> 21) & 511))).unwrap();
            assert_eq!(page, (address & !0x1f_ffff) | LARGE_PAGE);
        }
    }

    #[test]
    fn pvh_enters_protected_mode_without_paging() {
        let entry = Entry::Pvh { entry: 0x100_0000, start_info: 0x6000 };
        let mut sregs = kvm_sregs { cr0: 0x6000_0010, ..Default::default() };
        entry.set_sregs(&mut sregs);
        assert_eq!((sregs.cr0 & CR0_PG, sregs.cr4, sregs.efer), (0, 0, 0));
        assert_eq!((sregs.cs.db, sregs.cs.l, sregs.cs.base, sregs.cs.limit), (1, 0, 0, 0xffff_ffff));
        assert_eq!((entry.regs().rip, entry.regs().rbx), (0x100_0000, 0x6000));
    }
}

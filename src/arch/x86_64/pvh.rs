//! The start info of the PVH boot protocol (Xen's `arch-x86/hvm/start_info.h`).

use linux_loader::start_info::{XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress};

use super::layout::{CMDLINE, PVH_START_INFO};
use super::{BootInfo, Error, e820, no_memory};
use crate::memory::GuestRam;

/// The version that brought the memory map.
const VERSION: u32 = 1;
const MODULES: u64 = PVH_START_INFO + 0x40;
const MEMORY_MAP: u64 = PVH_START_INFO + 0x60;

/// Writes the start info to [`PVH_START_INFO`], and its module and memory map after it.
///
/// # Errors
/// When there is no guest memory at that address.
pub fn write(ram: &GuestRam, info: &BootInfo) -> Result<(), Error> {
    let failed = no_memory("PVH start info", PVH_START_INFO);
    let map = e820::map(ram);
    let mut start_info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: VERSION,
        cmdline_paddr: CMDLINE,
        rsdp_paddr: info.rsdp.unwrap_or(0),
        memmap_paddr: MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        ..Default::default()
    };
    if let Some(initrd) = &info.initrd {
        let module = hvm_modlist_entry { paddr: initrd.start, size: initrd.end - initrd.start, ..Default::default() };
        (start_info.nr_modules, start_info.modlist_paddr) = (1, MODULES);
        ram.write_obj(module, GuestAddress(MODULES)).map_err(failed)?;
    }
    let mut at = MEMORY_MAP;
    for (range, kind) in map {
        let (addr, size) = (range.start, range.end - range.start);
        let entry = hvm_memmap_table_entry { addr, size, type_: kind as u32, reserved: 0 };
        ram.write_obj(entry, GuestAddress(at)).map_err(failed)?;
        at += size_of::<hvm_memmap_table_entry>() as u64;
    }
    ram.write_obj(start_info, GuestAddress(PVH_START_INFO)).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::x86_64::layout::{ZERO_PAGE, ram_ranges};
    use crate::memory::reserve;

    #[test]
    fn the_start_info_leads_to_its_module_and_memory_map() {
        let ram = reserve(&ram_ranges(4 << 30)).unwrap();
        write(&ram, &BootInfo { initrd: Some(0x8000_0000..0x8000_0100), rsdp: Some(0xe_0000) }).unwrap();
        let info: hvm_start_info = ram.read_obj(GuestAddress(PVH_START_INFO)).unwrap();
        assert_eq!((info.magic, info.version, info.nr_modules), (0x336e_c578, 1, 1));
        assert_eq!((info.cmdline_paddr, info.rsdp_paddr), (CMDLINE, 0xe_0000));
        let module: hvm_modlist_entry = ram.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!((module.paddr, module.size), (0x8000_0000, 0x100));
        assert_eq!(info.memmap_entries, 4);
        let last: hvm_memmap_table_entry = ram.read_obj(GuestAddress(info.memmap_paddr + 3 * 24)).unwrap();
        assert_eq!((last.addr, last.size, last.type_), (4 << 30, 1 << 30, 1));
        assert!(info.memmap_paddr + 4 * 24 < ZERO_PAGE);
    }

    #[test]
    fn without_an_initrd_there_is_no_module() {
        let ram = reserve(&ram_ranges(128 << 20)).unwrap();
        write(&ram, &BootInfo::default()).unwrap();
        let info: hvm_start_info = ram.read_obj(GuestAddress(PVH_START_INFO)).unwrap();
        assert_eq!((info.nr_modules, info.modlist_paddr, info.rsdp_paddr), (0, 0, 0));
    }
}

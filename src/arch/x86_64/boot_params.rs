//! The "zero page" of the 64-bit boot protocol (Documentation/arch/x86/boot.rst and zero-page.rst).

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress};

use super::layout::{CMDLINE, CMDLINE_MAX, ZERO_PAGE};
use super::{BootInfo, Error, e820, no_memory};
use crate::memory::GuestRam;

/// "HdrS", which says that the setup header is there.
const HEADER_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// The protocol that the fields we fill in are from.
const VERSION: u16 = 0x20f;
/// The protected-mode part is at 1 MiB or above.
const LOADED_HIGH: u8 = 1;

/// Writes the zero page to [`ZERO_PAGE`]. `header` is the kernel's own, if it came with one.
///
/// # Errors
/// When there is no guest memory at that address.
pub fn write(ram: &GuestRam, header: Option<setup_header>, info: &BootInfo) -> Result<(), Error> {
    let mut params = boot_params { hdr: header.unwrap_or_default(), ..Default::default() };
    if header.is_none() {
        params.hdr.version = VERSION;
        params.hdr.kernel_alignment = 2 << 20;
        params.hdr.cmdline_size = u32::try_from(CMDLINE_MAX - 1).unwrap_or(u32::MAX);
    }
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.loadflags |= LOADED_HIGH;
    (params.hdr.cmd_line_ptr, params.ext_cmd_line_ptr) = halves(CMDLINE);
    if let Some(initrd) = &info.initrd {
        (params.hdr.ramdisk_image, params.ext_ramdisk_image) = halves(initrd.start);
        (params.hdr.ramdisk_size, params.ext_ramdisk_size) = halves(initrd.end - initrd.start);
    }
    params.acpi_rsdp_addr = info.rsdp.unwrap_or(0);
    let map = e820::map(ram);
    let mut table = params.e820_table;
    for (entry, (range, kind)) in table.iter_mut().zip(&map) {
        *entry = boot_e820_entry { addr: range.start, size: range.end - range.start, r#type: *kind as u32 };
    }
    params.e820_table = table;
    params.e820_entries = u8::try_from(map.len().min(table.len())).unwrap_or(u8::MAX);
    ram.write_obj(params, GuestAddress(ZERO_PAGE)).map_err(no_memory("zero page", ZERO_PAGE))
}

/// The low and the high half.
fn halves(value: u64) -> (u32, u32) {
    #[expect(clippy::cast_possible_truncation, reason = "the low half is asked for")]
    (value as u32, (value >> 32) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::x86_64::layout::ram_ranges;
    use crate::memory::reserve;

    #[test]
    fn the_zero_page_has_its_fields_where_the_protocol_says() {
        let ram = reserve(&ram_ranges(128 << 20)).unwrap();
        let info = BootInfo { initrd: Some(0x700_0000..0x700_1234), rsdp: Some(0xe_0000) };
        write(&ram, None, &info).unwrap();
        let read32 = |at: u64| ram.read_obj::<u32>(GuestAddress(ZERO_PAGE + at)).unwrap();
        let read64 = |at: u64| ram.read_obj::<u64>(GuestAddress(ZERO_PAGE + at)).unwrap();
        assert_eq!(read64(0x070), 0xe_0000);
        assert_eq!(read32(0x202), HEADER_MAGIC);
        assert_eq!(read32(0x210).to_le_bytes()[0], 0xff);
        assert_eq!((read32(0x218), read32(0x21c)), (0x700_0000, 0x1234));
        assert_eq!(u64::from(read32(0x228)), CMDLINE);
        assert_eq!(read32(0x1e8).to_le_bytes()[0], 3);
        assert_eq!((read64(0x2d0 + 40), read64(0x2d0 + 48), read32(0x2d0 + 56)), (0x10_0000, 127 << 20, 1));
    }

    #[test]
    fn a_kernels_own_header_is_kept() {
        let ram = reserve(&ram_ranges(128 << 20)).unwrap();
        let header = setup_header { init_size: 0x123_4000, version: 0x20c, ..Default::default() };
        write(&ram, Some(header), &BootInfo::default()).unwrap();
        let params: boot_params = ram.read_obj(GuestAddress(ZERO_PAGE)).unwrap();
        let setup_header { init_size, version, boot_flag, .. } = params.hdr;
        assert_eq!((init_size, version, boot_flag), (0x123_4000, 0x20c, BOOT_FLAG));
    }
}

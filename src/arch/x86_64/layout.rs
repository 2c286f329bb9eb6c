//! Where everything is in the guest-physical and port address spaces.
//!
//! ```text
//! 0            zero page, page tables, command line, free memory
//! 0x9_fc00     reserved up to 1 MiB: RSDP and ACPI tables at 0xe_0000, MP table at 0xf_e000
//! 1 MiB        kernel, free memory, initrd up to the end of low memory
//! 3 GiB        MMIO gap: virtio windows, IOAPIC, local APIC, KVM's own pages
//! 4 GiB        the rest of memory
//! ```

use std::ops::Range;

/// The boot vCPU's global descriptor table.
pub const GDT: u64 = 0x500;
/// Descriptors in it, 8 bytes each.
pub const GDT_ENTRIES: u16 = 5;
/// PVH `hvm_start_info`, its modules and its memory map.
pub const PVH_START_INFO: u64 = 0x6000;
/// Linux `struct boot_params`, the "zero page".
pub const ZERO_PAGE: u64 = 0x7000;
/// The identity-mapping page tables of the 64-bit boot protocol.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// The longest command line that Linux takes on x86, its NUL included (`COMMAND_LINE_SIZE`).
pub const CMDLINE_MAX: usize = 2048;
/// Where conventional memory ends: from here up to [`HIGH_MEMORY`] everything is reserved for tables.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// The ACPI root pointer and, after it, the tables; the kernel looks for it from here on (ACPI 6.4, 5.2.5.1).
pub const ACPI: Range<u64> = 0xe_0000..0xf_d000;
/// A number of 16 bytes that is another one whenever the machine goes on from a snapshot.
pub const GENERATION_ID: u64 = 0xf_d000;
/// The MP floating pointer and table, within the BIOS area that the kernel scans (MP 1.4, section 4).
pub const MP_TABLE: Range<u64> = 0xf_e000..0x10_0000;
/// 1 MiB, where kernels begin.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// Start of the MMIO gap, and the end of low memory in large machines.
pub const MMIO_GAP_START: u64 = 0xc000_0000;
/// End of the MMIO gap, where the rest of memory begins.
pub const MMIO_GAP_END: u64 = 1 << 32;
/// The first virtio-mmio window; the others follow it.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// Distance between virtio-mmio windows, and their length.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// The IOAPIC.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Every CPU's local APIC.
pub const LAPIC: u64 = 0xfee0_0000;
/// KVM's task state segment, three pages (`KVM_SET_TSS_ADDR`). The page below is where KVM has its identity map.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// The global system interrupts of virtio devices, one each, in this order: first those that no driver for an old device
/// looks for, then COM2's, the parallel port's, the disk controllers' and the floppy's. Those of devices that kernels
/// take to be there, or that they find here, are left out: timer, keyboard, cascade, COM1, clock, mouse and coprocessor.
pub const VIRTIO_GSIS: [u32; 17] = [5, 9, 10, 11, 16, 17, 18, 19, 20, 21, 22, 23, 3, 7, 14, 15, 6];
/// Pins of the IOAPIC, and so global system interrupts.
pub const IOAPIC_PINS: u32 = 24;
/// The interrupt of ACPI events: the mouse's, as there is none.
pub const ACPI_EVENT_GSI: u32 = 12;
/// The first serial port, COM1: eight I/O ports.
pub const COM1: u16 = 0x3f8;
/// COM1's interrupt.
pub const COM1_IRQ: u32 = 4;
/// Data and command ports of the i8042 keyboard controller, of which only the reset line is there.
pub const I8042: [u16; 2] = [0x60, 0x64];
/// The keyboard's interrupt.
pub const KEYBOARD_IRQ: u32 = 1;
/// Index and data ports of the CMOS clock.
pub const CMOS: u16 = 0x70;
/// The ACPI sleep control register (ACPI 6.4, 4.8.3.7).
pub const ACPI_SLEEP_CONTROL: u16 = 0x600;
/// The ACPI sleep status register.
pub const ACPI_SLEEP_STATUS: u16 = 0x601;
/// The ACPI reset register (ACPI 6.4, 4.8.3.6).
pub const ACPI_RESET: u16 = 0x602;
/// What a guest writes to [`ACPI_RESET`].
pub const ACPI_RESET_VALUE: u8 = 1;
/// The sleep type that means soft-off (`_S5`).
pub const ACPI_S5: u8 = 5;
/// The port by which a guest tells that it panicked.
pub const PVPANIC: u16 = 0x505;

/// The guest-physical ranges of `bytes` of memory: up to the MMIO gap, and the rest above it.
pub fn ram_ranges(bytes: u64) -> Vec<Range<u64>> {
    let low = bytes.min(MMIO_GAP_START);
    let mut ranges = Vec::from([0..low]);
    if bytes > low {
        ranges.push(MMIO_GAP_END..MMIO_GAP_END.saturating_add(bytes - low));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn virtio_devices_share_no_interrupt() {
        let mut gsis = VIRTIO_GSIS.to_vec();
        gsis.extend([0, 1, 2, COM1_IRQ, 8, 12, 13]);
        gsis.sort_unstable();
        assert!(gsis.into_iter().eq(0..IOAPIC_PINS));
    }

    proptest! {
        #[test]
        fn ranges_add_up_and_keep_out_of_the_gap(bytes in 1u64..1 << 46) {
            let ranges = ram_ranges(bytes);
            prop_assert_eq!(ranges.iter().map(|range| range.end - range.start).sum::<u64>(), bytes);
            for range in ranges {
                prop_assert!(range.start < range.end);
                prop_assert!(range.end <= MMIO_GAP_START || range.start >= MMIO_GAP_END);
            }
        }
    }
}

//! The MP table, by which kernels without ACPI find CPUs and the IOAPIC (MultiProcessor Specification 1.4).

use vm_memory::{Bytes, GuestAddress};

use super::layout::{IOAPIC, IOAPIC_PINS, LAPIC, MP_TABLE};
use super::{Error, Platform, no_memory};
use crate::memory::GuestRam;

/// The most CPUs that fit the table's 8-bit APIC IDs; one ID is the IOAPIC's, and 255 means all. Kernels without ACPI
/// see no more of a larger machine.
pub const CPUS_MAX: u32 = 254;

const SPEC_1_4: u8 = 4;
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;
const ISA: u8 = 0;
const ENABLED: u8 = 1;
const BOOTSTRAP: u8 = 2;
/// Versions of the integrated local APIC and of the IOAPIC that KVM emulates.
const LAPIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
/// Family 6, and the features FPU and APIC; kernels ask CPUID.
const CPU_SIGNATURE: u32 = 0x600;
const CPU_FEATURES: u32 = 0x201;
/// Interrupt types.
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;
/// Active high, edge-triggered.
const EDGE_HIGH: u16 = 0b0101;
/// As the bus has it.
const CONFORMING: u16 = 0;
const ALL_CPUS: u8 = 0xff;

/// Writes the floating pointer to the start of [`MP_TABLE`], and the table after it.
///
/// # Errors
/// When there is no guest memory at that address.
pub fn write(ram: &GuestRam, platform: &Platform) -> Result<(), Error> {
    let pointer_size = 16;
    let address = u32::try_from(MP_TABLE.start).unwrap_or(0) + pointer_size;
    let mut pointer = [0; 16];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&address.to_le_bytes());
    pointer[8] = 1; // length in units of 16 bytes
    pointer[9] = SPEC_1_4;
    pointer[10] = checksum(&pointer);
    let bytes = [pointer.as_slice(), &table(platform.cpus.min(CPUS_MAX))].concat();
    ram.write_slice(&bytes, GuestAddress(MP_TABLE.start)).map_err(no_memory("MP table", MP_TABLE.start))
}

fn table(cpus: u32) -> Vec<u8> {
    let ioapic_id = u8::try_from(cpus).unwrap_or(u8::MAX);
    let mut entries: Vec<Vec<u8>> = Vec::new();
    for id in 0..ioapic_id {
        let flags = if id == 0 { ENABLED | BOOTSTRAP } else { ENABLED };
        let fixed = [PROCESSOR, id, LAPIC_VERSION, flags];
        entries.push([&fixed[..], &CPU_SIGNATURE.to_le_bytes(), &CPU_FEATURES.to_le_bytes(), &[0; 8]].concat());
    }
    entries.push([&[BUS, ISA][..], b"ISA   "].concat());
    entries.push([&[IO_APIC, ioapic_id, IOAPIC_VERSION, ENABLED][..], &address(IOAPIC)].concat());
    for pin in 0..u8::try_from(IOAPIC_PINS).unwrap_or(0) {
        entries.push(interrupt(IO_INTERRUPT, INT, EDGE_HIGH, pin, ioapic_id, pin));
    }
    entries.push(interrupt(LOCAL_INTERRUPT, EXT_INT, CONFORMING, 0, 0, 0));
    entries.push(interrupt(LOCAL_INTERRUPT, NMI, CONFORMING, 0, ALL_CPUS, 1));

    let body = entries.concat();
    let header_size = 44;
    let size = u16::try_from(header_size + body.len()).unwrap_or(0);
    let count = u16::try_from(entries.len()).unwrap_or(0);
    let mut table = b"PCMP".to_vec();
    table.extend(size.to_le_bytes());
    table.extend([SPEC_1_4, 0]);
    table.extend(b"BANTAM  ");
    table.extend(b"BANTAM VM   ");
    table.extend([0; 6]); // no OEM table
    table.extend(count.to_le_bytes());
    table.extend(address(LAPIC));
    table.extend([0; 4]); // no extended table
    table.extend(body);
    table[7] = checksum(&table);
    table
}

fn interrupt(entry: u8, kind: u8, flags: u16, irq: u8, apic: u8, pin: u8) -> Vec<u8> {
    let [low, high] = flags.to_le_bytes();
    vec![entry, kind, low, high, ISA, irq, apic, pin]
}

fn address(address: u64) -> [u8; 4] {
    u32::try_from(address).unwrap_or(0).to_le_bytes()
}

/// What makes the bytes add up to 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::reserve;

    fn written(cpus: u32) -> Vec<u8> {
        let ram = reserve(&[0..1 << 20]).unwrap();
        write(&ram, &Platform { cpus, ..Default::default() }).unwrap();
        let mut bytes = vec![0; usize::try_from(MP_TABLE.end - MP_TABLE.start).unwrap()];
        ram.read_slice(&mut bytes, GuestAddress(MP_TABLE.start)).unwrap();
        bytes
    }

    #[test]
    fn every_count_of_cpus_makes_a_sound_table() {
        for cpus in [1, 2, 37, 254, 255, 4096] {
            let bytes = written(cpus);
            assert_eq!(&bytes[..4], b"_MP_");
            assert_eq!(checksum(&bytes[..16]), 0);
            let at = u32::from_le_bytes(bytes[4..8].try_into().unwrap());
            let table = &bytes[usize::try_from(u64::from(at) - MP_TABLE.start).unwrap()..];
            assert_eq!(&table[..4], b"PCMP");
            let size = usize::from(u16::from_le_bytes([table[4], table[5]]));
            assert_eq!(checksum(&table[..size]), 0);

            let (mut counts, mut at, mut entries) = ([0; 5], 44, 0);
            while at < size {
                counts[usize::from(table[at])] += 1;
                at += if table[at] == PROCESSOR { 20 } else { 8 };
                entries += 1;
            }
            assert_eq!(at, size);
            assert_eq!(entries, u16::from_le_bytes([table[34], table[35]]));
            assert_eq!(counts, [cpus.min(254), 1, 1, 24, 2]);
        }
    }

    #[test]
    fn the_first_cpu_boots_and_the_ioapic_has_an_id_of_its_own() {
        let table = table(2);
        assert_eq!((table[44 + 1], table[44 + 3]), (0, ENABLED | BOOTSTRAP));
        assert_eq!((table[64 + 1], table[64 + 3]), (1, ENABLED));
        assert_eq!(table[92..96], [IO_APIC, 2, IOAPIC_VERSION, ENABLED]);
        assert_eq!(table[96..100], 0xfec0_0000u32.to_le_bytes());
    }
}

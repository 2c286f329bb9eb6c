//! The ACPI tables: RSDP, XSDT, FADT, MADT and DSDT of a hardware-reduced platform (ACPI 6.4).
//!
//! There is no SCI, no PM timer and no fixed hardware but the sleep and reset registers. The MADT has the CPUs and
//! the IOAPIC, the DSDT the devices.

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name, Notify, ONE, Package, Path, ResourceTemplate, Scope,
    ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress};

use super::layout::{
    ACPI, ACPI_EVENT_GSI, ACPI_RESET, ACPI_RESET_VALUE, ACPI_S5, ACPI_SLEEP_CONTROL, ACPI_SLEEP_STATUS, COM1, COM1_IRQ,
    GENERATION_ID, I8042, IOAPIC, KEYBOARD_IRQ, LAPIC, PVPANIC, VIRTIO_MMIO_SIZE,
};
use super::{Error, FIRST_X2APIC_ID, Platform, VirtioWindow, needs_x2apic, no_memory};
use crate::memory::GuestRam;

const OEM_ID: [u8; 6] = *b"BANTAM";
const OEM_TABLE_ID: [u8; 8] = *b"BANTAMVM";
const OEM_REVISION: u32 = 1;
/// Revisions of the tables in ACPI 6.4. DSDT 2 is the one whose integers have 64 bits.
const MADT_REVISION: u8 = 5;
const DSDT_REVISION: u8 = 2;
const SDT_HEADER: u32 = 36;

/// `IAPC_BOOT_ARCH` (ACPI 6.4, table 5.11): a serial port on legacy addresses. Without the 8042 bit Linux does not
/// probe for a keyboard, and resets by port 0x64 all the same. MSI is not ruled out.
const BOOT_ARCH: u16 = LEGACY_DEVICES | VGA_NOT_PRESENT | CMOS_RTC_NOT_PRESENT;
const LEGACY_DEVICES: u16 = 1 << 0;
const HAS_8042: u16 = 1 << 1;
const VGA_NOT_PRESENT: u16 = 1 << 2;
const CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;

/// Writes the tables to [`ACPI`] and returns the address of the root pointer.
///
/// # Errors
/// When there is no guest memory at that address, or no room for that many CPUs.
pub fn write(ram: &GuestRam, platform: &Platform) -> Result<u64, Error> {
    let mut tables = Tables { next: ACPI.start, bytes: Vec::new() };
    let rsdp = tables.reserve(Rsdp::len());
    let dsdt = tables.add(&dsdt(platform));
    let fadt = tables.add(&fadt(dsdt, platform.keyboard));
    let madt = tables.add(&madt(platform.cpus));
    let mut list = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    list.add_entry(fadt);
    list.add_entry(madt);
    let xsdt = tables.add(&bytes_of(&list));
    let root = bytes_of(&Rsdp::new(OEM_ID, xsdt));
    tables.bytes[..root.len()].copy_from_slice(&root);

    let (size, room) = (tables.bytes.len(), ACPI.end - ACPI.start);
    if size as u64 > room {
        return Err(Error::TooManyCpus { cpus: platform.cpus, size, room });
    }
    ram.write_slice(&tables.bytes, GuestAddress(ACPI.start)).map_err(no_memory("ACPI tables", ACPI.start))?;
    Ok(rsdp)
}

/// Tables one after the other, each at a multiple of 16.
struct Tables {
    next: u64,
    bytes: Vec<u8>,
}

impl Tables {
    fn reserve(&mut self, size: usize) -> u64 {
        self.add(&vec![0; size])
    }

    /// Appends a table and returns where it is.
    fn add(&mut self, table: &[u8]) -> u64 {
        let address = self.next;
        self.bytes.extend(table);
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        self.next = ACPI.start + self.bytes.len() as u64;
        address
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn sdt(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut sdt = Sdt::new(signature, SDT_HEADER, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    sdt.append_slice(body);
    sdt.as_slice().to_vec()
}

/// An I/O port of one byte.
fn port(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into())
}

fn fadt(dsdt: u64, keyboard: bool) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = (BOOT_ARCH | if keyboard { HAS_8042 } else { 0 }).into();
    fadt.reset_reg = port(ACPI_RESET);
    fadt.reset_value = ACPI_RESET_VALUE;
    fadt.sleep_control_reg = port(ACPI_SLEEP_CONTROL);
    fadt.sleep_status_reg = port(ACPI_SLEEP_STATUS);
    bytes_of(&fadt.finalize())
}

fn madt(cpus: u32) -> Vec<u8> {
    let mut body = Vec::new();
    body.dword(address32(LAPIC));
    body.dword(0); // no 8259
    for id in 0..cpus {
        // IDs that xAPIC mode does not have only fit x2APIC structures (ACPI 6.4, 5.2.12.12).
        match u8::try_from(id) {
            Ok(id) if u32::from(id) < FIRST_X2APIC_ID => {
                ProcessorLocalApic::new(id, id, EnabledStatus::Enabled).to_aml_bytes(&mut body);
            }
            _ => x2apic(&mut body, id),
        }
    }
    IoApic::new(0, address32(IOAPIC), 0).to_aml_bytes(&mut body);
    // LINT1 is the NMI of all processors (5.2.12.7 and 5.2.12.13), conforming to the bus.
    body.vec(&[4, 6, 0xff, 0, 0, 1]);
    if needs_x2apic(cpus) {
        body.vec(&[10, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]);
    }
    sdt(*b"APIC", MADT_REVISION, &body)
}

/// A processor's local x2APIC structure (5.2.12.12).
fn x2apic(body: &mut Vec<u8>, id: u32) {
    body.vec(&[9, 16, 0, 0]);
    body.dword(id);
    body.dword(EnabledStatus::Enabled as u32);
    body.dword(id);
}

fn dsdt(platform: &Platform) -> Vec<u8> {
    let mut devices = Vec::new();
    if platform.com1 {
        com1(&mut devices);
    }
    if platform.pvpanic {
        pvpanic(&mut devices);
    }
    generation_id(&mut devices);
    if platform.keyboard {
        keyboard(&mut devices);
    }
    for (index, window) in platform.virtio.iter().enumerate() {
        virtio(&mut devices, index, window);
    }
    let mut body = Scope::raw(Path::new("_SB_"), devices);
    Name::new("_S5_".into(), &Package::new(vec![&ACPI_S5])).to_aml_bytes(&mut body);
    sdt(*b"DSDT", DSDT_REVISION, &body)
}

fn com1(sink: &mut Vec<u8>) {
    let ports = IO::new(COM1, COM1, 1, 8);
    let interrupt = Interrupt::new(true, true, false, false, COM1_IRQ);
    Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ONE),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &interrupt])),
        ],
    )
    .to_aml_bytes(sink);
}

fn keyboard(sink: &mut Vec<u8>) {
    let [data, control] = I8042.map(|port| IO::new(port, port, 1, 1));
    let interrupt = Interrupt::new(true, true, false, false, KEYBOARD_IRQ);
    Device::new(
        "KBD0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0303")),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&data, &control, &interrupt])),
        ],
    )
    .to_aml_bytes(sink);
}

fn pvpanic(sink: &mut Vec<u8>) {
    let port = IO::new(PVPANIC, PVPANIC, 1, 1);
    Device::new(
        "PEVT".into(),
        vec![&Name::new("_HID".into(), &"QEMU0001"), &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&port]))],
    )
    .to_aml_bytes(sink);
}

/// The number that tells a guest that it was restored (Microsoft's "Virtual Machine Generation ID"), and the event device
/// (ACPI 6.4, 5.6.9) whose interrupt says that it has changed.
fn generation_id(sink: &mut Vec<u8>) {
    /// What the driver is notified of.
    const CHANGED: u8 = 0x80;
    let address = Package::new(vec![&GENERATION_ID, &ZERO]);
    Device::new(
        "VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"VMGENCTR"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &address),
        ],
    )
    .to_aml_bytes(sink);
    let interrupt = Interrupt::new(true, true, false, false, ACPI_EVENT_GSI);
    Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt])),
            &Method::new("_EVT".into(), 1, true, vec![&Notify::new(&Path::new("\\_SB_.VGEN"), &CHANGED)]),
        ],
    )
    .to_aml_bytes(sink);
}

fn virtio(sink: &mut Vec<u8>, index: usize, window: &VirtioWindow) {
    let registers = Memory32Fixed::new(true, address32(window.base), address32(VIRTIO_MMIO_SIZE));
    let interrupt = Interrupt::new(true, true, false, false, window.gsi);
    Device::new(
        Path::new(&format!("V{index:03}")),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &index),
            &Name::new("_CCA".into(), &ONE),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&registers, &interrupt])),
        ],
    )
    .to_aml_bytes(sink);
}

fn address32(address: u64) -> u32 {
    u32::try_from(address).expect("the MMIO gap is below 4 GiB")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::x86_64::layout::{VIRTIO_GSIS, VIRTIO_MMIO};
    use crate::memory::reserve;

    fn windows() -> Vec<VirtioWindow> {
        VIRTIO_GSIS
            .into_iter()
            .zip(0u64..)
            .map(|(gsi, i)| VirtioWindow { base: VIRTIO_MMIO + i * VIRTIO_MMIO_SIZE, gsi })
            .collect()
    }

    fn read(ram: &GuestRam, address: u64, size: usize) -> Vec<u8> {
        let mut bytes = vec![0; size];
        ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// Follows an address to a table, checks the table and returns it.
    fn table(ram: &GuestRam, address: u64) -> Vec<u8> {
        let size = ram.read_obj::<u32>(GuestAddress(address + 4)).unwrap();
        assert!(address + u64::from(size) <= ACPI.end);
        let table = read(ram, address, size.try_into().unwrap());
        assert_eq!(sum(&table), 0, "{}", String::from_utf8_lossy(&table[..4]));
        table
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// FADT, MADT and DSDT as a guest finds them.
    fn find(ram: &GuestRam, root: u64) -> [Vec<u8>; 3] {
        assert_eq!(root % 16, 0);
        let rsdp = read(ram, root, 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
        let xsdt = table(ram, u64_at(&rsdp, 24));
        assert_eq!((&xsdt[..4], xsdt.len()), (&b"XSDT"[..], 36 + 2 * 8));
        let (fadt, madt) = (table(ram, u64_at(&xsdt, 36)), table(ram, u64_at(&xsdt, 44)));
        let dsdt = table(ram, u64_at(&fadt, 140));
        assert_eq!([&fadt[..4], &madt[..4], &dsdt[..4]], [b"FACP", b"APIC", b"DSDT"]);
        [fadt, madt, dsdt]
    }

    #[test]
    fn every_count_of_cpus_makes_sound_tables() {
        let ram = reserve(&[0..1 << 20]).unwrap();
        for cpus in [1, 2, 254, 255, 256, 4096] {
            let windows = windows();
            let root =
                write(&ram, &Platform { cpus, virtio: &windows, com1: true, pvpanic: true, keyboard: true }).unwrap();
            let [_, madt, _] = find(&ram, root);
            let (mut at, mut ids) = (44, Vec::new());
            while at < madt.len() {
                match madt[at] {
                    0 => ids.push(u32::from(madt[at + 3])),
                    9 => ids.push(u32::from_le_bytes(madt[at + 4..at + 8].try_into().unwrap())),
                    _ => {}
                }
                at += usize::from(madt[at + 1]);
            }
            assert_eq!(at, madt.len());
            assert!(ids.into_iter().eq(0..cpus), "{cpus}");
        }
    }

    #[test]
    fn more_cpus_than_there_is_room_for_are_refused() {
        let ram = reserve(&[0..1 << 20]).unwrap();
        let error = write(&ram, &Platform { cpus: 10_000, ..Default::default() }).unwrap_err();
        assert!(matches!(error, Error::TooManyCpus { cpus: 10_000, .. }), "{error}");
    }

    #[test]
    fn the_fadt_has_the_reset_and_sleep_registers() {
        let ram = reserve(&[0..1 << 20]).unwrap();
        let root = write(&ram, &Platform { cpus: 1, ..Default::default() }).unwrap();
        let [fadt, ..] = find(&ram, root);
        let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
        assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
        assert_eq!(fadt[109] & 0b1010, 0, "8042 or no MSI");
        for (at, port) in [(116, ACPI_RESET), (244, ACPI_SLEEP_CONTROL), (256, ACPI_SLEEP_STATUS)] {
            assert_eq!(fadt[at..at + 4], [1, 8, 0, 1]);
            assert_eq!(u64_at(&fadt, at + 4), u64::from(port));
        }
        assert_eq!(fadt[128], ACPI_RESET_VALUE);
    }

    #[test]
    fn the_dsdt_names_what_is_there_and_no_more() {
        let ram = reserve(&[0..1 << 20]).unwrap();
        let count = |virtio: &[VirtioWindow], present: bool| {
            let platform = Platform { cpus: 1, virtio, com1: present, pvpanic: present, keyboard: present };
            let [_, _, dsdt] = find(&ram, write(&ram, &platform).unwrap());
            let keyboard = &[0x0c, 0x41, 0xd0, 0x03, 0x03];
            [&b"LNRO0005\0"[..], b"QEMU0001\0", &[0x0c, 0x41, 0xd0, 0x05, 0x01], b"VMGENCTR\0", b"ACPI0013\0", keyboard]
                .map(|id| dsdt.windows(id.len()).filter(|window| *window == id).count())
        };
        assert_eq!(count(&[], false), [0, 0, 0, 1, 1, 0]);
        assert_eq!(count(&windows(), true), [17, 1, 1, 1, 1, 1]);
    }

    /// The ACPI project's own disassembler takes the DSDT, where it is installed.
    #[test]
    fn iasl_disassembles_the_dsdt() {
        use std::process::Command;
        if Command::new("iasl").arg("-v").output().is_err() {
            return;
        }
        let ram = reserve(&[0..1 << 20]).unwrap();
        let windows = windows();
        let platform = Platform { cpus: 300, virtio: &windows, com1: true, pvpanic: true, keyboard: true };
        let tables = find(&ram, write(&ram, &platform).unwrap());
        let directory = tempfile::tempdir().unwrap();
        for (name, table) in ["facp", "apic", "dsdt"].into_iter().zip(tables) {
            std::fs::write(directory.path().join(name), table).unwrap();
            let output = Command::new("iasl").args(["-d", name]).current_dir(&directory).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        let dsl = std::fs::read_to_string(directory.path().join("dsdt.dsl")).unwrap();
        for expected in [
            "Memory32Fixed (ReadWrite,",
            "0xD0010000,",
            "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive",
            "0x00000017,",
            "EisaId (\"PNP0501\")",
            "EisaId (\"PNP0303\")",
            "Name (_S5",
        ] {
            assert!(dsl.contains(expected), "{expected} in {dsl}");
        }
    }
}

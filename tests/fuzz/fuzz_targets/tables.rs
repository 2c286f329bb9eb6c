//! What a kernel is told: ACPI and MP tables, boot parameters, its command line; and where memory is.
#![no_main]

use arbitrary::Arbitrary;
use bantam::arch::x86_64::layout::{CMDLINE, CMDLINE_MAX, ram_ranges};
use bantam::arch::x86_64::{BootInfo, Platform, VirtioWindow, acpi, boot_params, e820, mptable, pvh};
use bantam::boot::cmdline::Cmdline;
use bantam::memory::{GuestRam, reserve};
use vm_memory::{Bytes, GuestAddress};

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    cpus: u16,
    windows: Vec<(u32, u8)>,
    flags: [bool; 3],
    memory: u64,
    cmdline: Vec<&'a str>,
    initrd: Option<(u64, u32)>,
}

const LOW: usize = 1 << 20;

fn low(ram: &GuestRam) -> Vec<u8> {
    let mut bytes = vec![0; LOW];
    ram.read_slice(&mut bytes, GuestAddress(0)).expect("it is memory");
    bytes
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn number(bytes: &[u8], at: usize, len: usize) -> usize {
    bytes[at..at + len].iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte))
}

/// A system description table: its signature, and it.
fn table(bytes: &[u8], at: usize) -> (&[u8], &[u8]) {
    let table = &bytes[at..at + number(bytes, at + 4, 4)];
    assert_eq!(sum(table), 0, "the checksum of the table at {at:#x}");
    (&table[..4], table)
}

fn check_acpi(ram: &GuestRam, platform: &Platform) -> Option<u64> {
    let root = acpi::write(ram, platform).ok()?;
    let bytes = low(ram);
    let at = root as usize;
    assert_eq!((&bytes[at..at + 8], sum(&bytes[at..at + 20]), sum(&bytes[at..at + 36])), (&b"RSD PTR "[..], 0, 0));
    let (signature, list) = table(&bytes, number(&bytes, at + 24, 8));
    assert_eq!(signature, b"XSDT");
    let tables: Vec<_> = list[36..].chunks(8).map(|entry| table(&bytes, number(entry, 0, 8))).collect();
    assert_eq!(tables.iter().map(|table| table.0).collect::<Vec<_>>(), [b"FACP", b"APIC"]);
    assert_eq!(table(&bytes, number(tables[0].1, 140, 8)).0, b"DSDT");
    let mut madt = &tables[1].1[44..];
    let mut cpus = 0;
    while let [kind, len, ..] = *madt {
        cpus += u32::from(kind == 0 || kind == 9);
        madt = &madt[usize::from(len)..];
    }
    assert_eq!(cpus, platform.cpus, "CPUs in the MADT");
    Some(root)
}

fn check_mp(ram: &GuestRam, platform: &Platform) {
    if mptable::write(ram, platform).is_err() {
        return;
    }
    let bytes = low(ram);
    let mut found = memchr::memmem::find_iter(&bytes, b"_MP_").filter(|at| at % 16 == 0);
    let at = found.next().expect("a floating pointer");
    assert_eq!(sum(&bytes[at..at + 16]), 0);
    let at = number(&bytes, at + 4, 4);
    let table = &bytes[at..at + number(&bytes, at + 4, 2)];
    assert_eq!((&table[..4], sum(table)), (&b"PCMP"[..], 0));
}

fn check_cmdline(ram: &GuestRam, parts: &[&str]) {
    let mut cmdline = Cmdline::default();
    for part in parts {
        let before = cmdline.clone();
        if cmdline.push(part).is_err() {
            assert_eq!(cmdline, before, "what is refused changes nothing");
        }
    }
    let _ = cmdline.acpi_off();
    let before = low(ram);
    cmdline.write(ram).expect("there is memory");
    let after = low(ram);
    let (at, text) = (CMDLINE as usize, cmdline.to_string());
    assert!(text.len() < CMDLINE_MAX && !text.contains('\0'));
    assert_eq!(after[at..at + text.len() + 1], [text.as_bytes(), &[0]].concat());
    assert_eq!((&before[..at], &before[at + CMDLINE_MAX..]), (&after[..at], &after[at + CMDLINE_MAX..]));
}

fn check_memory(bytes: u64) {
    // As much as a machine can have, of whole pages.
    let bytes = bytes % (64 << 40) / 4096 * 4096;
    let ranges = ram_ranges(bytes);
    assert_eq!(ranges.iter().map(|range| range.end - range.start).sum::<u64>(), bytes);
    assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start), "{ranges:x?}");
    // Reserving is cheap up to what the host's address space has.
    if let Ok(ram) = reserve(&ranges)
        && bytes > 0
        && bytes < 1 << 40
    {
        let map = e820::map(&ram);
        assert!(map.windows(2).all(|pair| pair[0].0.end <= pair[1].0.start), "{map:x?}");
        assert!(map.iter().all(|(range, _)| range.start < range.end), "{map:x?}");
    }
}

libfuzzer_sys::fuzz_target!(|input: Input| {
    let windows = input.windows.iter().take(64);
    let virtio: Vec<_> = windows
        .map(|(page, gsi)| VirtioWindow { base: u64::from(page & 0xf_ffff) << 12, gsi: (*gsi).into() })
        .collect();
    let [com1, pvpanic, keyboard] = input.flags;
    let platform = Platform { cpus: u32::from(input.cpus) % 1200 + 1, virtio: &virtio, com1, pvpanic, keyboard };
    let ram = reserve(&[0..4 << 20]).expect("memory");
    let rsdp = check_acpi(&ram, &platform);
    check_mp(&ram, &platform);
    check_cmdline(&ram, &input.cmdline);
    let initrd = input.initrd.map(|(start, len)| start..start.saturating_add(len.into()));
    let info = BootInfo { initrd, rsdp };
    let _ = boot_params::write(&ram, None, &info);
    let _ = pvh::write(&ram, &info);
    check_memory(input.memory);
});

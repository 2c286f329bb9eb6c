//! Kernels of a few instructions.
#![allow(dead_code, reason = "no test program uses all of it")]

/// 32-bit code that resets the machine by the keyboard controller: mov al, 0xfe; out 0x64, al; jmp $.
pub const REBOOT: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe];
/// Code that leaves the guest for ever: out 0x80, al; jmp to the out.
pub const KNOCK: &[u8] = &[0xe6, 0x80, 0xeb, 0xfc];
/// Code that goes on for ever: jmp $.
pub const HANG: &[u8] = &[0xeb, 0xfe];
/// Code that halts for good: cli; hlt; jmp to the hlt.
pub const HALT: &[u8] = &[0xfa, 0xf4, 0xeb, 0xfd];
/// Code that is idle, with interrupts on: sti; hlt; jmp to the hlt.
pub const IDLE: &[u8] = &[0xfb, 0xf4, 0xeb, 0xfd];

/// Where the parts of the [`elf`] start: the program headers, the note, the code.
pub const ELF_PARTS: [usize; 3] = [64, 64 + 2 * 56, 64 + 2 * 56 + 20];

/// A kernel, an ELF file with a PVH note and one segment with `code`, loaded at 1 MiB.
pub fn elf(code: &[u8]) -> Vec<u8> {
    let [headers, note, start] = ELF_PARTS;
    let header = |kind: u32, offset: usize, address: u64, len: usize| {
        let (offset, len) = (offset as u64, len as u64);
        let fields = [offset, address, address, len, len, 4];
        let mut bytes = [kind.to_le_bytes(), 7u32.to_le_bytes()].concat();
        bytes.extend(fields.iter().flat_map(|field| field.to_le_bytes()));
        bytes
    };
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for field in [1 << 20, headers as u64, 0] {
        elf.extend(u64::to_le_bytes(field));
    }
    for field in [0, 0, 64, 56, 2, 64, 0, 0] {
        elf.extend(u16::to_le_bytes(field));
    }
    elf.extend(header(4, note, 0, 20));
    elf.extend(header(1, start, 1 << 20, code.len()));
    for field in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), 1 << 20] {
        elf.extend(u32::to_le_bytes(field));
    }
    elf.extend(code);
    elf
}

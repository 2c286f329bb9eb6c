//! Tiny kernels for tests.

use std::io::Read;

use super::kernel::Compression;

/// Where the ELF of [`elf`] has its parts in the file.
pub const NOTE: usize = 0x100;
pub const TEXT: usize = 0x120;
pub const DATA: usize = 0x200;
pub const DATA_END: usize = 0x300;
pub const SECTIONS: usize = 0x340;
/// Program headers: two segments and the notes.
pub const PHDR: [usize; 3] = [0x40, 0x78, 0xb0];
/// Where "acpi_osi=" is.
pub const OSI: usize = DATA + 0x20;

/// Overwrites bytes.
pub fn patch(bytes: &mut [u8], at: usize, with: impl AsRef<[u8]>) {
    let with = with.as_ref();
    bytes[at..at + with.len()].copy_from_slice(with);
}

/// An ELF kernel: text with a PVH note at 1 MiB, data with `acpi_osi=` and 3328 bytes of `.bss` at 2 MiB, and section
/// headers.
pub fn elf() -> Vec<u8> {
    let mut elf = vec![0; 0x400];
    patch(&mut elf, 0, b"\x7fELF\x02\x01\x01");
    let header: [u16; 4] = [2, 62, 1, 0]; // ET_EXEC, EM_X86_64, EV_CURRENT
    patch(&mut elf, 16, header.map(u16::to_le_bytes).concat());
    let header: [u64; 3] = [0x10_0030, 0x40, SECTIONS as u64]; // entry, program and section headers
    patch(&mut elf, 24, header.map(u64::to_le_bytes).concat());
    let header: [u16; 6] = [64, 56, 3, 64, 3, 2];
    patch(&mut elf, 52, header.map(u16::to_le_bytes).concat());
    // Type and flags, offset, virtual and physical address, size in file and memory, alignment.
    let segments: [[u64; 7]; 3] = [
        [5 << 32 | 1, NOTE as u64, 0xffff_ffff_8010_0000, 0x10_0000, 0x100, 0x100, 0x1000],
        [6 << 32 | 1, DATA as u64, 0xffff_ffff_8020_0000, 0x20_0000, 0x100, 0x1000, 0x1000],
        [4 << 32 | 4, NOTE as u64, 0xffff_ffff_8010_0000, 0x10_0000, 24, 24, 4],
    ];
    for (at, segment) in PHDR.into_iter().zip(segments) {
        patch(&mut elf, at, segment.map(u64::to_le_bytes).concat());
    }
    let note: [u32; 6] = [4, 8, 18, u32::from_le_bytes(*b"Xen\0"), 0x10_0020, 0];
    patch(&mut elf, NOTE, note.map(u32::to_le_bytes).concat());
    patch(&mut elf, TEXT, b"text");
    patch(&mut elf, OSI, b"\0acpi_osi=\0");
    patch(&mut elf, OSI + 0x20, b"Linux version 6.1.0-test (me@here) #1\n\0");
    patch(&mut elf, DATA_END, b"\0.init.data\0.shstrtab\0");
    // Name and type, flags, address, offset, size.
    let sections: [[u64; 5]; 2] =
        [[1 << 32 | 1, 3, 0xffff_ffff_8020_0000, DATA as u64, 0x100], [3 << 32 | 12, 0, 0, DATA_END as u64, 22]];
    for (i, section) in sections.into_iter().enumerate() {
        patch(&mut elf, SECTIONS + 64 * (i + 1), section.map(u64::to_le_bytes).concat());
    }
    elf
}

/// A bzImage with one setup sector, and `payload` at 0x10 of its protected-mode part.
pub fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 1024 + 0x10];
    image.extend(payload);
    image.resize(image.len().next_multiple_of(16), 0);
    let paragraphs = u32::try_from((image.len() - 1024) / 16).unwrap();
    let length = u32::try_from(payload.len()).unwrap();
    patch(&mut image, 0x1f1, [1]);
    patch(&mut image, 0x1f4, paragraphs.to_le_bytes());
    patch(&mut image, 0x1fe, [0x55, 0xaa, 0xeb, 0x6a]);
    patch(&mut image, 0x202, b"HdrS\x0f\x02");
    patch(&mut image, 0x20e, 0x100u16.to_le_bytes());
    patch(&mut image, 0x22c, 0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    patch(&mut image, 0x236, [1, 0]); // 64-bit entry point
    patch(&mut image, 0x248, [0x10u32.to_le_bytes(), length.to_le_bytes()].concat());
    patch(&mut image, 0x258, 0x100_0000u64.to_le_bytes());
    patch(&mut image, 0x260, 0x20_0000u32.to_le_bytes()); // init_size
    patch(&mut image, 0x300, b"6.1.0-test (me@here) #1\0");
    image
}

/// [`elf`] as a payload: compressed, and its size after it where the kernel's build puts it.
pub fn payload(compression: Compression) -> Vec<u8> {
    let elf = elf();
    let mut packed = match compression {
        Compression::Gzip => {
            let mut packed = Vec::new();
            flate2::read::GzEncoder::new(elf.as_slice(), flate2::Compression::best()).read_to_end(&mut packed).unwrap();
            return packed;
        }
        Compression::Bzip2 => {
            let mut packed = Vec::new();
            bzip2::read::BzEncoder::new(elf.as_slice(), bzip2::Compression::best()).read_to_end(&mut packed).unwrap();
            packed
        }
        Compression::Lz4 => {
            let block = lz4_flex::block::compress(&elf);
            let size = u32::try_from(block.len()).unwrap().to_le_bytes();
            [&[0x02, 0x21, 0x4c, 0x18], &size[..], &block].concat()
        }
        Compression::Zstd => {
            ruzstd::encoding::compress_to_vec(elf.as_slice(), ruzstd::encoding::CompressionLevel::Fastest)
        }
        Compression::Xz => XZ.to_vec(),
        Compression::Lzma => b"\x5d\0\0\x80\0 stands for a payload that only the guest unpacks".to_vec(),
        Compression::Lzo => b"\x89LZO\0\x0d\x0a\x1a\x0a stands for a payload that only the guest unpacks".to_vec(),
    };
    packed.extend(u32::try_from(elf.len()).unwrap().to_le_bytes());
    packed
}

/// [`elf`] by `xz --check=crc32 --x86 --lzma2=dict=128MiB`, as Linux does it.
const XZ: &[u8] = b"\
    \xfd\x37\x7a\x58\x5a\x00\x00\x01\x69\x22\xde\x36\x02\x01\x04\x00\x21\x01\x1e\x00\x05\x0c\xec\xd7\xe0\x03\xff\x00\
    \xc2\x5d\x00\x3f\x91\x45\x84\x68\x3d\x89\xa6\xda\x8a\xcc\x93\xe2\x4e\xd9\x04\x99\x62\x9e\xd5\x3d\x7a\x32\x1e\x2d\
    \xf2\x73\x04\x98\x3e\x3a\x23\xc1\xa3\xeb\xa4\x82\x5c\xd3\x47\x6a\xe4\x2c\x2a\x15\x59\xbb\x12\x7a\x7b\x59\x8d\x0a\
    \x03\x99\xf9\xdb\x16\x32\x24\xbb\x58\x27\xf7\x3f\x76\x5c\xaf\x7d\x7a\xf6\x5c\x40\x5e\x02\x98\x63\xef\x07\x1f\xa1\
    \x49\x32\x93\xbc\x6d\x2d\x48\xb4\xb4\x3b\x62\x8f\xc4\x9d\x19\x6a\xbc\xaf\xfa\xad\xf3\x9f\xe5\x04\x3e\x3b\xdc\x7d\
    \x12\xac\x7b\x4e\x66\xc0\x2b\x1c\x09\xb8\xec\xae\xa5\xf6\xb5\x67\x11\xca\xe2\x1c\x2c\xc7\x88\xff\xab\x2e\x49\x73\
    \x38\x6c\x83\x9f\x0a\xe0\xdb\x49\x74\x80\xb1\x09\x0c\xeb\x00\xaf\xf4\xec\x47\xba\xe9\xbd\x87\xe2\x3c\x12\xd1\x90\
    \x48\xf4\xbd\x8a\x88\x62\x18\xf5\x7a\xd7\x08\xc2\x2b\x3e\x29\x7d\x57\x59\x8c\x23\x45\x97\xd6\x10\xd1\xda\x1e\x27\
    \xdd\x00\x00\x00\x6f\x2b\xa6\x54\x00\x01\xda\x01\x80\x08\x00\x00\xa7\x25\xda\xae\x3e\x30\x0d\x8b\x02\x00\x00\x00\
    \x00\x01\x59\x5a";

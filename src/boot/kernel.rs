//! Loading a kernel: an ELF `vmlinux` or a bzImage.
//!
//! A bzImage's payload is unpacked here rather than by the guest, which saves the guest time and memory, and what is
//! inside is loaded as the ELF that it is. Only if its compression is not one we read does the guest unpack it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use linux_loader::bootparam::setup_header;
use serde::Serialize;

pub use super::bzimage::Error as BzImageError;
use super::bzimage::{self, BzImage, ENTRY_64, is_bzimage};
pub use super::elf::Error as ElfError;
use super::elf::{self, Elf};
use super::image::{FileImage, HEAD, Image, StreamImage};
use super::low_memory_end;
use super::payload::Payload;
pub use super::unpack::Compression;
pub use super::unpacked::Cache;
use crate::arch::x86_64::layout::ZERO_PAGE;
pub use crate::arch::x86_64::regs::Entry;
use crate::memory::GuestRam;

/// A kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
#[error("cannot load kernel {path}")]
pub struct Error {
    /// The kernel's file.
    pub path: PathBuf,
    /// What is wrong with it.
    #[source]
    pub reason: Reason,
}

/// Why a kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Reason {
    /// The host did not open or read it.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It is a directory.
    #[error("it is a directory")]
    Directory,
    /// It is a device, a pipe or a socket.
    #[error("it is not a regular file")]
    NotFile,
    /// It has no bytes.
    #[error("it is empty")]
    Empty,
    /// It is neither ELF nor bzImage.
    #[error("{0}")]
    NotKernel(String),
    /// It is a bad ELF file.
    #[error(transparent)]
    Elf(#[from] elf::Error),
    /// It is a bad bzImage.
    #[error(transparent)]
    BzImage(#[from] bzimage::Error),
    /// It is a bzImage with bad contents.
    #[error("cannot unpack its {compression} payload")]
    Unpack {
        /// How the payload is compressed.
        compression: Compression,
        /// What the decompressor said.
        #[source]
        source: io::Error,
    },
    /// It is a bzImage with a bad ELF file in it.
    #[error("bad contents of its payload")]
    Payload(#[source] elf::Error),
}

/// The format of a kernel's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// ELF `vmlinux`.
    Elf,
    /// bzImage.
    BzImage,
}

/// A kernel in guest memory.
#[derive(Debug)]
pub struct Kernel {
    /// How it wants to be entered, and the boot structure it then needs.
    pub entry: Entry,
    /// The memory it takes until it manages memory itself.
    pub range: Range<u64>,
    /// The highest address that a byte of its initrd may have.
    pub initrd_max: u64,
    /// Whether it has ACPI; otherwise it needs the MP table, and `virtio_mmio.device=` on its command line.
    pub acpi: bool,
    /// The format of its file.
    pub format: Format,
    /// How its payload was compressed, if it was and is known.
    pub compression: Option<Compression>,
    /// Whether the guest has to unpack it.
    pub packed: bool,
    /// What a bzImage that is not unpacked says of itself, for the zero page.
    pub setup_header: Option<setup_header>,
    /// The version that a bzImage's setup header tells.
    pub version: Option<String>,
}

/// Loads the kernel at `path` into fresh guest memory.
///
/// # Errors
/// When there is no such kernel, or it does not fit guest memory; the error names the file and the figures.
pub fn load(ram: &GuestRam, path: &Path) -> Result<Kernel, Error> {
    load_with(ram, path, &Cache::Off)
}

/// The same with a cache of unpacked kernels: what is in a bzImage is mapped from there, as an ELF file is, and put there if it
/// was not yet.
///
/// # Errors
/// As [`load`]. A cache that cannot be used is none.
pub fn load_with(ram: &GuestRam, path: &Path, cache: &Cache) -> Result<Kernel, Error> {
    load_file(ram, path, cache).map_err(|reason| Error { path: path.into(), reason })
}

fn load_file(ram: &GuestRam, path: &Path, cache: &Cache) -> Result<Kernel, Reason> {
    let (file, len) = open(path)?;
    let head = read_head(&file, len)?;
    if head.starts_with(&elf::MAGIC) {
        let mut image = FileImage { file: &file, head: &head, len };
        return Ok(of_elf(elf::load(&mut image, ram)?));
    }
    if is_bzimage(&head) {
        return load_bzimage(&file, &head, &BzImage::parse(&head, len)?, ram, cache);
    }
    Err(Reason::NotKernel(not_kernel(&head)))
}

/// Writes the kernel at `path` to `to`: what is in a bzImage if that can be unpacked, so that no run has to do it; else the
/// file as it is.
///
/// # Errors
/// When it cannot be read or unpacked, or not be written.
pub fn extract(path: &Path, to: &mut impl Write) -> Result<Format, Error> {
    extract_file(path, to).map_err(|reason| Error { path: path.into(), reason })
}

fn extract_file(path: &Path, to: &mut impl Write) -> Result<Format, Reason> {
    let (mut file, len) = open(path)?;
    let head = read_head(&file, len)?;
    if is_bzimage(&head) {
        let image = BzImage::parse(&head, len)?;
        if let Some(payload) = Payload::of(&file, &image)? {
            let failed = |source| Reason::Unpack { compression: payload.compression, source };
            if let Some(unpacked) = payload.unpack().map_err(failed)? {
                io::copy(&mut unpacked.take(payload.unpacked_size()), to).map_err(failed)?;
                return Ok(Format::Elf);
            }
        }
    }
    io::copy(&mut file, to)?;
    Ok(if is_bzimage(&head) { Format::BzImage } else { Format::Elf })
}

/// Opens a regular file, without waiting at a pipe, and tells its length.
pub(super) fn open(path: &Path) -> Result<(File, u64), Reason> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_dir() {
        return Err(Reason::Directory);
    }
    if !metadata.is_file() {
        return Err(Reason::NotFile);
    }
    if metadata.len() == 0 {
        return Err(Reason::Empty);
    }
    Ok((file, metadata.len()))
}

/// The first bytes of a file of this length.
fn read_head(file: &File, len: u64) -> io::Result<Vec<u8>> {
    let mut head = vec![0; HEAD.min(usize::try_from(len).unwrap_or(HEAD))];
    file.read_exact_at(&mut head, 0)?;
    Ok(head)
}

fn of_elf(Elf { entry, range, acpi }: Elf) -> Kernel {
    Kernel {
        entry,
        range,
        initrd_max: u32::MAX.into(),
        acpi,
        format: Format::Elf,
        compression: None,
        packed: false,
        setup_header: None,
        version: None,
    }
}

fn load_bzimage(file: &File, head: &[u8], image: &BzImage, ram: &GuestRam, cache: &Cache) -> Result<Kernel, Reason> {
    let version = image.version.and_then(|offset| read_version(file, offset));
    let payload = Payload::of(file, image)?;
    let unpacked = match &payload {
        Some(payload) => load_payload(payload, head, ram, cache)?,
        None => None,
    };
    let kernel = match unpacked {
        Some(elf) => of_elf(elf),
        None => load_packed(file, image, ram)?,
    };
    let compression = payload.map(|payload| payload.compression);
    Ok(Kernel { format: Format::BzImage, compression, version, ..kernel })
}

/// Loads what is in a payload; `None` if that is for the guest to unpack.
fn load_payload(payload: &Payload<'_>, head: &[u8], ram: &GuestRam, cache: &Cache) -> Result<Option<Elf>, Reason> {
    if payload.compression.is_for_guest() {
        return Ok(None);
    }
    if let Some(unpacked) = cache.open(payload, head) {
        let head = read_head(&unpacked.file, unpacked.len)?;
        let mut image = FileImage { file: &unpacked.file, head: &head, len: unpacked.len };
        return match elf::load(&mut image, ram) {
            Ok(elf) => {
                unpacked.keep();
                Ok(Some(elf))
            }
            Err(error) => {
                unpacked.remove();
                Err(Reason::Payload(error))
            }
        };
    }
    let failed = |source| Reason::Unpack { compression: payload.compression, source };
    let Some(unpacked) = payload.unpack().map_err(failed)? else { return Ok(None) };
    let mut image = StreamImage::new(unpacked, payload.unpacked_size()).map_err(failed)?;
    elf::load(&mut image, ram).map(Some).map_err(Reason::Payload)
}

/// Loads a bzImage as it is, to be unpacked by the guest.
fn load_packed(file: &File, image: &BzImage, ram: &GuestRam) -> Result<Kernel, Reason> {
    let range = image.place(low_memory_end(ram))?;
    let Range { start, end } = image.protected_mode;
    FileImage { file, head: &[], len: end }.load(start, end - start, ram, range.start)?;
    Ok(Kernel {
        entry: Entry::Linux64 { entry: range.start + ENTRY_64, zero_page: ZERO_PAGE },
        range,
        initrd_max: image.setup_header.initrd_addr_max.into(),
        // It cannot be looked into, and nearly all kernels do.
        acpi: true,
        format: Format::BzImage,
        compression: None,
        packed: true,
        setup_header: Some(image.setup_header),
        version: None,
    })
}

/// The NUL-terminated text at `offset`.
fn read_version(file: &File, offset: u64) -> Option<String> {
    let mut text = [0; 256];
    let read = file.read_at(&mut text, offset).ok()?;
    let end = memchr::memchr(0, &text[..read])?;
    Some(String::from_utf8_lossy(&text[..end]).into_owned())
}

/// Says what a file is that is not a kernel of ours.
fn not_kernel(head: &[u8]) -> String {
    let is = if let Some(compression) = Compression::detect(head) {
        format!("a file compressed with {compression}; unpack it first")
    } else {
        match (head.get(..2), head.get(0x38..0x3c)) {
            (_, Some(b"ARM\x64")) => "an AArch64 kernel, not one for x86-64".into(),
            (_, Some(b"RSC\x05")) => "a RISC-V kernel, not one for x86-64".into(),
            (Some(b"MZ"), _) => "an EFI program, not a bzImage".into(),
            _ if elf::MAGIC.starts_with(head) => format!("only {} bytes long", head.len()),
            _ => "neither an ELF file nor a bzImage".into(),
        }
    };
    format!("it is {is}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::fixture::{DATA, DATA_END, NOTE, OSI, PHDR, SECTIONS, TEXT, bzimage, elf, patch, payload};
    use crate::memory::reserve;
    use proptest::prelude::*;
    use std::io::Write;
    use vm_memory::{Bytes, GuestAddress};

    /// Loads a file with these bytes into 64 MiB.
    fn load_bytes(bytes: &[u8]) -> (GuestRam, Result<Kernel, Error>) {
        let ram = reserve(&[0..64 << 20]).unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let kernel = load(&ram, file.path());
        (ram, kernel)
    }

    /// An error as a user reads it, without the path.
    fn message(error: &Error) -> String {
        let mut text = String::new();
        let mut next = std::error::Error::source(error);
        while let Some(error) = next {
            text = if text.is_empty() { error.to_string() } else { format!("{text}: {error}") };
            next = error.source();
        }
        text
    }

    fn refusal(bytes: &[u8]) -> String {
        message(&load_bytes(bytes).1.expect_err("it is refused"))
    }

    fn patched(at: usize, with: impl AsRef<[u8]>) -> Vec<u8> {
        let mut bytes = elf();
        patch(&mut bytes, at, with);
        bytes
    }

    fn assert_in_memory(ram: &GuestRam) {
        let elf = elf();
        for (address, range) in [(0x10_0000, NOTE..NOTE + 0x100), (0x20_0000, DATA..DATA_END)] {
            let mut loaded = vec![0xff; range.len()];
            ram.read_slice(&mut loaded, GuestAddress(address)).unwrap();
            assert_eq!(loaded, elf[range]);
        }
    }

    #[test]
    fn an_elf_with_a_pvh_note_is_entered_by_it() {
        let (ram, kernel) = load_bytes(&elf());
        let kernel = kernel.unwrap();
        assert_eq!(kernel.entry, Entry::Pvh { entry: 0x10_0020, start_info: 0x6000 });
        assert_eq!(kernel.range, 0x10_0000..0x20_1000);
        assert_eq!((kernel.format, kernel.compression, kernel.packed), (Format::Elf, None, false));
        assert!(kernel.acpi);
        assert_in_memory(&ram);
    }

    #[test]
    fn an_elf_without_one_is_entered_in_64_bits() {
        for entry in [0x10_0030u64, 0xffff_ffff_8010_0030] {
            let mut bytes = patched(NOTE + 8, [19]);
            patch(&mut bytes, 24, entry.to_le_bytes());
            let kernel = load_bytes(&bytes).1.unwrap();
            assert_eq!(kernel.entry, Entry::Linux64 { entry: 0x10_0030, zero_page: 0x7000 });
        }
    }

    #[test]
    fn acpi_is_what_is_in_init_data_or_anywhere_if_there_are_no_sections() {
        let acpi = |bytes: &[u8]| load_bytes(bytes).1.unwrap().acpi;
        let mut without = patched(OSI, b"\0acpi-osi=\0");
        assert!(!acpi(&without));
        patch(&mut without, TEXT, b"acpi_osi=");
        assert!(!acpi(&without));
        patch(&mut without, 60, [0]); // e_shnum
        assert!(acpi(&without));
    }

    #[test]
    fn zeros_that_a_linker_wrote_out_are_not_read() {
        // .init.data is only half as long as its segment; what follows is .bss.
        let mut bytes = patched(SECTIONS + 64 + 32, 0x80u64.to_le_bytes());
        patch(&mut bytes, DATA + 0x80, b"not read");
        let (ram, kernel) = load_bytes(&bytes);
        assert!(kernel.unwrap().acpi);
        assert_eq!(ram.read_obj::<u64>(GuestAddress(0x20_0080)).unwrap(), 0);
    }

    #[test]
    fn every_compression_that_we_read_gives_the_same_kernel() {
        use Compression::*;
        for compression in [Gzip, Xz, Zstd, Lz4, Bzip2] {
            let (ram, kernel) = load_bytes(&bzimage(&payload(compression)));
            let kernel = kernel.unwrap_or_else(|error| panic!("{compression}: {}", message(&error)));
            assert_eq!((kernel.format, kernel.compression), (Format::BzImage, Some(compression)));
            assert_eq!(kernel.entry, Entry::Pvh { entry: 0x10_0020, start_info: 0x6000 });
            assert_eq!(kernel.version.as_deref(), Some("6.1.0-test (me@here) #1"));
            assert!(kernel.acpi && !kernel.packed);
            assert_in_memory(&ram);
        }
    }

    #[test]
    fn what_we_cannot_unpack_the_guest_does() {
        for (payload, compression) in [
            (payload(Compression::Lzma), Some(Compression::Lzma)),
            (payload(Compression::Lzo), Some(Compression::Lzo)),
            (b"something of the future".to_vec(), None),
        ] {
            let (ram, kernel) = load_bytes(&bzimage(&payload));
            let kernel = kernel.unwrap();
            assert_eq!(kernel.entry, Entry::Linux64 { entry: 0x100_0200, zero_page: 0x7000 });
            assert_eq!(kernel.range, 0x100_0000..0x120_0000);
            assert_eq!((kernel.initrd_max, kernel.compression), (0x7fff_ffff, compression));
            assert!(kernel.packed && kernel.acpi);
            let init_size = kernel.setup_header.unwrap().init_size;
            assert_eq!(init_size, 0x20_0000);
            let mut loaded = vec![0; payload.len()];
            ram.read_slice(&mut loaded, GuestAddress(0x100_0010)).unwrap();
            assert_eq!(loaded, payload);
        }
    }

    #[test]
    fn a_bad_elf_is_told_what_is_wrong_with_it() {
        let u16 = u16::to_le_bytes;
        let u64 = u64::to_le_bytes;
        let [text, data, _] = PHDR;
        for (at, with, expected) in [
            (18, u16(183).to_vec(), "it is an ELF file for AArch64, not for x86-64"),
            (18, u16(243).to_vec(), "for RISC-V, not"),
            (18, u16(0xbad).to_vec(), "for machine 2989, 64 bits, little-endian"),
            (4, vec![1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 3, 0], "for 32-bit x86"),
            (5, vec![2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 22], "for s390"),
            (5, vec![3], "byte order is 3"),
            (16, u16(1).to_vec(), "its type is 1, not that of an executable"),
            (54, u16(32).to_vec(), "program headers are 32 bytes long"),
            (56, u16(0).to_vec(), "it has no program headers"),
            (56, u16(999).to_vec(), "999 program headers"),
            (32, u64(0x3f0).to_vec(), "the table of program headers ends at byte 1176, the file at 1024"),
            (32, u64(u64::from_le_bytes([0xff; 8])).to_vec(), "it is truncated: the table of program headers"),
            (text + 32, u64(0x7000).to_vec(), "a segment ends at byte 28928, the file at 1024"),
            (data + 40, u64(0x80).to_vec(), "256 bytes in the file and only 128 in memory"),
            (text + 24, u64(0x9_f000).to_vec(), "0x9f000..0x9f100 overlaps the boot structures below 1 MiB"),
            (data + 24, u64(0x10_00ff).to_vec(), "0x100000..0x100100 and 0x1000ff..0x1010ff overlap"),
            (data + 40, u64(64 << 20).to_vec(), "it needs 66 MiB, there are 64 below the MMIO gap"),
            (data + 24, u64(u64::from_le_bytes([0xff; 8])).to_vec(), "does not fit guest memory"),
            (NOTE + 16, 0x30_0000u32.to_le_bytes().to_vec(), "entry point 0x300000 is outside its segments"),
        ] {
            let refusal = refusal(&patched(at, with));
            assert!(refusal.contains(expected), "{expected:?} in {refusal:?}");
        }
        let mut bytes = patched(text, [6]);
        patch(&mut bytes, data, [6]);
        assert!(refusal(&bytes).contains("it has nothing to load"));
    }

    #[test]
    fn what_is_no_kernel_is_told_what_it_is() {
        let arm = [&[0; 0x38][..], b"ARM\x64", &[0; 64]].concat();
        for (bytes, expected) in [
            (&b""[..], "it is empty"),
            (b"\x7fEL", "it is only 3 bytes long"),
            (b"#!/bin/sh\n", "it is neither an ELF file nor a bzImage"),
            (b"\x1f\x8b\x08\0", "it is a file compressed with gzip; unpack it first"),
            (b"MZ\x90\0", "it is an EFI program, not a bzImage"),
            (&arm, "it is an AArch64 kernel, not one for x86-64"),
        ] {
            assert_eq!(refusal(bytes), expected);
        }
    }

    #[test]
    fn what_is_no_file_is_refused_without_waiting() {
        let ram = reserve(&[0..1 << 20]).unwrap();
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(message(&load(&ram, directory.path()).unwrap_err()), "it is a directory");
        let pipe = directory.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
        assert_eq!(message(&load(&ram, &pipe).unwrap_err()), "it is not a regular file");
        let missing = load(&ram, &directory.path().join("none")).unwrap_err();
        assert!(missing.to_string().ends_with("/none"), "{missing}");
        assert!(message(&missing).contains("No such file"), "{}", message(&missing));
    }

    #[test]
    fn a_bad_bzimage_is_told_what_is_wrong_with_it() {
        let gzip = bzimage(&payload(Compression::Gzip));
        let lzma = bzimage(&payload(Compression::Lzma));
        for (image, at, with, expected) in [
            (&gzip, 0x206, vec![7, 2], "its boot protocol 2.07 is older than 2.12"),
            (&gzip, 0x24c, vec![0; 4], "it has no payload"),
            (&gzip, 0x24c, vec![0, 0, 0, 1], "the payload ends at byte 16778256, the file at"),
            (&gzip, 0x1f1, vec![200], "the setup code ends at byte 102912"),
            (&gzip, 0x440, vec![0xff; 8], "cannot unpack its gzip payload"),
            (&lzma, 0x236, vec![0, 0], "no 64-bit entry point"),
            (&lzma, 0x258, vec![0; 8], "its load address 0x0 overlaps the boot structures"),
            (&lzma, 0x260, vec![0, 0, 0, 4], "at 0x1000000..0x5000000 to unpack itself, there are 64 MiB"),
        ] {
            let mut image = image.clone();
            patch(&mut image, at, with);
            let refusal = refusal(&image);
            assert!(refusal.contains(expected), "{expected:?} in {refusal:?}");
        }
    }

    #[test]
    fn a_bad_elf_inside_a_bzimage_is_told_apart() {
        let mut packed = Vec::new();
        flate2::read::GzEncoder::new(&b"\x7fELF and no more"[..], flate2::Compression::fast())
            .read_to_end(&mut packed)
            .unwrap();
        assert!(refusal(&bzimage(&packed)).starts_with("bad contents of its payload: it is truncated: the ELF header"));
    }

    #[test]
    fn cut_off_anywhere_a_kernel_is_refused() {
        let elf = elf();
        for size in 0..DATA_END {
            let refusal = refusal(&elf[..size]);
            let expected = match size {
                0 => "empty",
                1..4 => "bytes long",
                4..64 => "the ELF header ends at byte 64",
                64..0xe8 => "the table of program headers ends at byte 232",
                0xe8..0x200 => "a segment ends at byte 512",
                _ => "a segment ends at byte 768",
            };
            assert!(refusal.contains(expected), "{size}: {refusal}");
        }
        for size in DATA_END..elf.len() {
            assert!(load_bytes(&elf[..size]).1.unwrap().acpi, "{size}");
        }
        let payload = payload(Compression::Xz);
        let image = bzimage(&payload);
        for size in 1..1024 + 0x10 + payload.len() {
            let refusal = refusal(&image[..size]);
            let expected = match size {
                0..0x206 => "neither",
                0x206..0x264 => "the setup header ends at byte 612",
                0x264..0x400 => "the setup code ends at byte 1024",
                _ => "the payload ends at byte",
            };
            assert!(refusal.contains(expected), "{size}: {refusal}");
        }
    }

    #[test]
    fn a_payload_cut_off_anywhere_is_refused() {
        for compression in [Compression::Gzip, Compression::Xz, Compression::Lz4, Compression::Zstd, Compression::Bzip2]
        {
            let mut whole = payload(compression);
            let size = whole.split_off(whole.len() - 4);
            // What is cut off may be a checksum or the end mark, without which the kernel is whole.
            for cut in 12..whole.len() / 2 {
                let refusal = refusal(&bzimage(&[&whole[..cut], &size].concat()));
                assert!(refusal.contains("npack") || refusal.contains("payload"), "{compression} {cut}: {refusal}");
            }
        }
    }

    #[test]
    fn a_payload_that_is_not_elf_is_refused() {
        let mut contents = elf();
        contents[0] = b'X';
        let size = u32::try_from(contents.len()).unwrap().to_le_bytes();
        let packed = lz4_flex::block::compress(&contents);
        let block = u32::try_from(packed.len()).unwrap().to_le_bytes();
        let refusal = refusal(&bzimage(&[&[0x02, 0x21, 0x4c, 0x18][..], &block, &packed, &size].concat()));
        assert!(refusal.ends_with("bad contents of its payload: it is not an ELF file"), "{refusal}");
    }

    proptest! {
        #[test]
        fn no_damage_to_a_kernel_is_fatal(
            which in 0usize..6, at in 0usize..2048, with in prop::collection::vec(any::<u8>(), 1..9)
        ) {
            use Compression::*;
            let mut bytes = match which {
                0 => elf(),
                _ => bzimage(&payload([Gzip, Xz, Zstd, Lz4, Bzip2][which - 1])),
            };
            let at = at % (bytes.len() - with.len());
            patch(&mut bytes, at, with);
            if let Err(error) = load_bytes(&bytes).1 {
                prop_assert!(!message(&error).is_empty());
            }
        }
    }
}

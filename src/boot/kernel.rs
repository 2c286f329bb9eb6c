//! Loading a kernel: an ELF `vmlinux` or a bzImage.
//!
//! A bzImage's payload is unpacked here rather than by the guest, which saves the guest time and memory, and what is
//! inside is loaded as the ELF that it is. Only if its compression is not one we read does the guest unpack it.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use linux_loader::bootparam::setup_header;
use serde::Serialize;

use super::bzimage::{self, BzImage, ENTRY_64, is_bzimage};
use super::elf::{self, Elf};
use super::image::{FileImage, HEAD, Image, StreamImage};
use super::low_memory_end;
pub use super::unpack::Compression;
use super::unpack::unpack;
use crate::arch::x86_64::layout::ZERO_PAGE;
pub use crate::arch::x86_64::regs::Entry;
use crate::memory::GuestRam;

/// How much of a payload is read at once.
const READ_AHEAD: usize = 256 << 10;

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
    load_file(ram, path).map_err(|reason| Error { path: path.into(), reason })
}

fn load_file(ram: &GuestRam, path: &Path) -> Result<Kernel, Reason> {
    let (file, len) = open(path)?;
    let mut head = vec![0; HEAD.min(usize::try_from(len).unwrap_or(HEAD))];
    file.read_exact_at(&mut head, 0)?;
    if head.starts_with(&elf::MAGIC) {
        let mut image = FileImage { file: &file, head: &head, len };
        return Ok(of_elf(elf::load(&mut image, ram)?));
    }
    if is_bzimage(&head) {
        return load_bzimage(&file, &BzImage::parse(&head, len)?, ram);
    }
    Err(Reason::NotKernel(not_kernel(&head)))
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

fn load_bzimage(file: &File, image: &BzImage, ram: &GuestRam) -> Result<Kernel, Reason> {
    let mut start = [0; 8];
    file.read_exact_at(&mut start, image.payload.start)?;
    let compression = Compression::detect(&start);
    let version = image.version.and_then(|offset| read_version(file, offset));
    let unpacked = compression.and_then(|compression| {
        let packed = Part { file, range: image.payload.start..image.payload.end - compression.trailer() };
        let unpacked = unpack(compression, BufReader::with_capacity(READ_AHEAD, packed))?;
        Some(
            unpacked
                .and_then(|unpacked| StreamImage::new(unpacked, unpacked_size(file, image)?))
                .map_err(|source| Reason::Unpack { compression, source }),
        )
    });
    let kernel = match unpacked {
        Some(unpacked) => of_elf(elf::load(&mut unpacked?, ram).map_err(Reason::Payload)?),
        None => load_packed(file, image, ram)?,
    };
    Ok(Kernel { format: Format::BzImage, compression, version, ..kernel })
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

/// What a payload unpacks to, in bytes: the build puts it last, as gzip does by itself.
fn unpacked_size(file: &File, image: &BzImage) -> io::Result<u64> {
    let mut size = [0; 4];
    file.read_exact_at(&mut size, image.payload.end - 4)?;
    Ok(u32::from_le_bytes(size).into())
}

/// The NUL-terminated text at `offset`.
fn read_version(file: &File, offset: u64) -> Option<String> {
    let mut text = [0; 256];
    let read = file.read_at(&mut text, offset).ok()?;
    let end = memchr::memchr(0, &text[..read])?;
    Some(String::from_utf8_lossy(&text[..end]).into_owned())
}

/// A part of a file, as a reader.
struct Part<'a> {
    file: &'a File,
    range: Range<u64>,
}

impl Read for Part<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.range.end - self.range.start).unwrap_or(usize::MAX);
        let size = left.min(buf.len());
        let read = self.file.read_at(&mut buf[..size], self.range.start)?;
        self.range.start += read as u64;
        Ok(read)
    }
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

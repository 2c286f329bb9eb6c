//! ELF kernels: `vmlinux`, or what is inside a bzImage.

use std::io;
use std::ops::Range;

use linux_loader::elf::{
    EM_386, EM_AARCH64, EM_ARM, EM_LOONGARCH, EM_MIPS, EM_PPC64, EM_RISCV, EM_S390, EM_X86_64, ET_DYN, ET_EXEC,
    PT_LOAD, PT_NOTE, SHF_ALLOC, SHT_NOBITS,
};
use vm_memory::{Bytes, GuestAddress};

use super::image::Image;
use super::{find, low_memory_end, mib};
use crate::arch::x86_64::layout::{HIGH_MEMORY, PVH_START_INFO, ZERO_PAGE};
use crate::arch::x86_64::regs::Entry;
use crate::memory::{GuestRam, page_size, prefer_huge_pages};

/// What an ELF file begins with.
pub(super) const MAGIC: [u8; 4] = *b"\x7fELF";

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const SECTION_HEADER: usize = 64;
/// More program headers than any kernel has; Linux has five.
const SEGMENTS_MAX: u16 = 64;
/// More section headers than a kernel has that is not built for debugging a single function.
const SECTIONS_MAX: u16 = 4096;
/// More bytes of section names, or of notes, than a kernel has.
const STRINGS_MAX: u64 = 64 << 10;
/// More bytes of section names than most kernels have.
const NAMES: u64 = 4 << 10;
/// The note with the 32-bit physical entry point of PVH (`XEN_ELFNOTE_PHYS32_ENTRY`).
const PHYS32_ENTRY: u32 = 18;

/// What is wrong with an ELF kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file ends within something that it says it has.
    #[error("it is truncated: {what} ends at byte {end}, the file at {len}")]
    Truncated {
        /// What is cut off.
        what: &'static str,
        /// Where that would end.
        end: u64,
        /// Length of the file.
        len: u64,
    },
    /// A payload that is something else.
    #[error("it is not an ELF file")]
    Magic,
    /// A kernel for another machine.
    #[error("it is an ELF file for {0}, not for x86-64")]
    Architecture(String),
    /// An ELF file that cannot be a kernel.
    #[error("it is an ELF file but no kernel: {0}")]
    NotKernel(String),
    /// A segment where the boot structures are.
    #[error("its segment at {start:#x}..{end:#x} overlaps the boot structures below 1 MiB")]
    Low {
        /// Where the segment starts.
        start: u64,
        /// Where it ends.
        end: u64,
    },
    /// A segment that no guest memory is under.
    #[error("its segment at {start:#x}..{end:#x} does not fit guest memory: it needs {} MiB, there are {} below the MMIO gap", mib(*.end), mib(*.memory))]
    TooBig {
        /// Where the segment starts.
        start: u64,
        /// Where it ends.
        end: u64,
        /// The memory there is, in bytes.
        memory: u64,
    },
    /// Two segments share addresses.
    #[error("its segments at {:#x}..{:#x} and {:#x}..{:#x} overlap", .0.start, .0.end, .1.start, .1.end)]
    Overlap(Range<u64>, Range<u64>),
    /// It starts where nothing was loaded.
    #[error("its entry point {0:#x} is outside its segments")]
    Entry(u64),
    /// Its bytes could not be had.
    #[error("cannot read its {what}")]
    Read {
        /// What was read.
        what: &'static str,
        /// What the host or the decompressor said.
        #[source]
        source: io::Error,
    },
}

/// A loaded ELF kernel.
#[derive(Debug)]
pub(super) struct Elf {
    /// How it wants to be entered.
    pub entry: Entry,
    /// From its first to past its last byte in guest memory.
    pub range: Range<u64>,
    /// Whether it has ACPI.
    pub acpi: bool,
}

/// A part of the file: its offset and its size.
type FilePart = (u64, u64);

struct Segment {
    offset: u64,
    file_size: u64,
    vaddr: u64,
    memory: Range<u64>,
}

impl Segment {
    /// Where the bytes at a file range are in guest memory, if they are this segment's.
    fn find(&self, offset: u64, size: u64) -> Option<u64> {
        let within = offset.checked_sub(self.offset)?;
        (within.checked_add(size)? <= self.file_size).then(|| self.memory.start + within)
    }
}

/// Loads `image` into fresh guest memory.
pub(super) fn load(image: &mut impl Image, ram: &GuestRam) -> Result<Elf, Error> {
    let header = Header::read(image)?;
    let (mut segments, notes) = header.segments(image)?;
    place(&segments, ram)?;
    // An image that is unpacked on the fly has its section headers behind it only when they are no longer needed.
    let sections = if image.seekable() { header.sections(image) } else { None };
    segments.sort_unstable_by_key(|segment| segment.offset);
    let start = segments.iter().map(|segment| segment.memory.start).min().unwrap_or(0);
    let end = segments.iter().map(|segment| segment.memory.end).max().unwrap_or(0);
    if !image.seekable() {
        prefer_huge_pages(ram, start..end);
    }
    for segment in &segments {
        let size = sections.as_ref().map_or(segment.file_size, |sections| sections.file_size(segment));
        let size = if image.seekable() { whole_pages(segment, size, image.len(), &segments) } else { size };
        image
            .load(segment.offset, size, ram, segment.memory.start)
            .map_err(|source| Error::Read { what: "segments", source })?;
    }

    let pvh = notes.and_then(|notes| pvh_entry(&read_notes(image, ram, &segments, notes).ok()?));
    let address = pvh.map_or_else(|| header.physical_entry(&segments), u64::from);
    if !segments.iter().any(|segment| segment.memory.contains(&address)) {
        return Err(Error::Entry(address));
    }
    let entry = match pvh {
        Some(_) => Entry::Pvh { entry: address, start_info: PVH_START_INFO },
        None => Entry::Linux64 { entry: address, zero_page: ZERO_PAGE },
    };

    let init_data = sections.and_then(|sections| {
        let (offset, size) = sections.init_data?;
        let address = segments.iter().find_map(|segment| segment.find(offset, size))?;
        Some(address..address + size)
    });
    let acpi = match init_data {
        Some(range) => has_acpi(ram, range),
        None => segments
            .iter()
            .rev()
            .any(|segment| has_acpi(ram, segment.memory.start..segment.memory.start + segment.file_size)),
    };
    Ok(Elf { entry, range: start..end, acpi })
}

/// `size`, of what is loaded of a segment, or that up to the end of the last page, so that all of it is mapped: if the
/// segment has nothing but what is in the file, nobody else has anything there.
fn whole_pages(segment: &Segment, size: u64, len: u64, segments: &[Segment]) -> u64 {
    let start = &segment.memory.start;
    let whole = start.saturating_add(size).next_multiple_of(page_size()) - start;
    let end = start + whole;
    let is_in_file = segment.offset.checked_add(whole).is_some_and(|end| end <= len);
    let is_zeros = whole > segment.file_size && segment.memory.end - start > segment.file_size;
    let is_other = segments.iter().any(|other| other.memory.start > *start && other.memory.start < end);
    if is_in_file && !is_zeros && !is_other { whole } else { size }
}

/// Checks that every segment has memory of its own.
fn place(segments: &[Segment], ram: &GuestRam) -> Result<(), Error> {
    let memory = low_memory_end(ram);
    let mut ranges: Vec<_> = segments.iter().map(|segment| segment.memory.clone()).collect();
    ranges.sort_unstable_by_key(|range| range.start);
    for range in &ranges {
        let Range { start, end } = *range;
        if start < HIGH_MEMORY {
            return Err(Error::Low { start, end });
        }
        if end > memory {
            return Err(Error::TooBig { start, end, memory });
        }
    }
    match ranges.windows(2).find(|pair| pair[1].start < pair[0].end) {
        Some(pair) => Err(Error::Overlap(pair[0].clone(), pair[1].clone())),
        None => Ok(()),
    }
}

struct Header {
    entry: u64,
    program_headers: u64,
    segments: u16,
    section_headers: u64,
    sections: u16,
    names: u16,
}

impl Header {
    fn read(image: &mut impl Image) -> Result<Self, Error> {
        let mut header = [0; HEADER];
        within(image, "the ELF header", 0, HEADER as u64)?;
        image.read(0, &mut header).map_err(|source| Error::Read { what: "ELF header", source })?;
        if !header.starts_with(&MAGIC) {
            return Err(Error::Magic);
        }
        let no_kernel = |why: String| Err(Error::NotKernel(why));
        let machine = match header[5] {
            1 => u16_at(&header, 18),
            2 => u16::from_be_bytes([header[18], header[19]]),
            other => return no_kernel(format!("its byte order is {other}")),
        };
        if (header[4], header[5], machine) != (2, 1, EM_X86_64) {
            return Err(Error::Architecture(architecture(header[4], header[5], machine)));
        }
        match u16_at(&header, 16) {
            ET_EXEC | ET_DYN => {}
            kind => return no_kernel(format!("its type is {kind}, not that of an executable")),
        }
        let (size, segments) = (u16_at(&header, 54), u16_at(&header, 56));
        if segments == 0 {
            return no_kernel("it has no program headers".into());
        }
        if usize::from(size) != PROGRAM_HEADER {
            return no_kernel(format!("its program headers are {size} bytes long, not {PROGRAM_HEADER}"));
        }
        if segments > SEGMENTS_MAX {
            return no_kernel(format!("it has {segments} program headers, more than {SEGMENTS_MAX}"));
        }
        Ok(Self {
            entry: u64_at(&header, 24),
            program_headers: u64_at(&header, 32),
            segments,
            section_headers: if usize::from(u16_at(&header, 58)) == SECTION_HEADER { u64_at(&header, 40) } else { 0 },
            sections: u16_at(&header, 60),
            names: u16_at(&header, 62),
        })
    }

    /// The segments to load, and the file range of the notes.
    fn segments(&self, image: &mut impl Image) -> Result<(Vec<Segment>, Option<FilePart>), Error> {
        let mut table = vec![0; usize::from(self.segments) * PROGRAM_HEADER];
        within(image, "the table of program headers", self.program_headers, table.len() as u64)?;
        image
            .read(self.program_headers, &mut table)
            .map_err(|source| Error::Read { what: "program headers", source })?;
        let (mut segments, mut notes) = (Vec::new(), None);
        for header in table.chunks_exact(PROGRAM_HEADER) {
            let (offset, vaddr, start) = (u64_at(header, 8), u64_at(header, 16), u64_at(header, 24));
            let (file_size, size) = (u64_at(header, 32), u64_at(header, 40));
            match u32_at(header, 0) {
                PT_LOAD if size > 0 => {
                    within(image, "a segment", offset, file_size)?;
                    if file_size > size {
                        return Err(Error::NotKernel(format!(
                            "a segment has {file_size} bytes in the file and only {size} in memory"
                        )));
                    }
                    let memory = start..start.saturating_add(size);
                    segments.push(Segment { offset, file_size, vaddr, memory });
                }
                PT_NOTE if file_size <= STRINGS_MAX => notes = Some((offset, file_size)),
                _ => {}
            }
        }
        if segments.is_empty() {
            return Err(Error::NotKernel("it has nothing to load".into()));
        }
        Ok((segments, notes))
    }

    /// The section headers, if there are any that can be used. A stripped kernel does without them.
    fn sections(&self, image: &mut impl Image) -> Option<Sections> {
        if self.section_headers == 0 || self.sections == 0 || self.sections > SECTIONS_MAX {
            return None;
        }
        // Linkers put their names right before them.
        let before = self.section_headers.min(NAMES);
        let mut end = vec![0; usize::try_from(before).ok()? + usize::from(self.sections) * SECTION_HEADER];
        image.read(self.section_headers - before, &mut end).ok()?;
        let (names, table) = end.split_at(usize::try_from(before).ok()?);
        let headers: Vec<_> = table
            .chunks_exact(SECTION_HEADER)
            .map(|header| Section {
                name: u32_at(header, 0),
                nobits: u32_at(header, 4) == SHT_NOBITS,
                alloc: u64_at(header, 8) & SHF_ALLOC != 0,
                offset: u64_at(header, 24),
                size: u64_at(header, 32),
            })
            .collect();
        let strings = headers.get(usize::from(self.names)).filter(|strings| strings.size <= STRINGS_MAX)?;
        let size = usize::try_from(strings.size).ok()?;
        let within = strings.offset.checked_sub(self.section_headers - before).and_then(|at| usize::try_from(at).ok());
        let names = match within.and_then(|at| names.get(at..at.checked_add(size)?)) {
            Some(names) => names.to_vec(),
            None => {
                let mut names = vec![0; size];
                image.read(strings.offset, &mut names).ok()?;
                names
            }
        };
        let init_data = headers.iter().find(|section| {
            let name = usize::try_from(section.name).ok().and_then(|name| names.get(name..));
            !section.nobits && name.is_some_and(|name| name.starts_with(b".init.data\0"))
        });
        Some(Sections { init_data: init_data.map(|section| (section.offset, section.size)), headers })
    }

    /// `e_entry` is a physical address in Linux, but other kernels link it with their code.
    fn physical_entry(&self, segments: &[Segment]) -> u64 {
        let loaded = segments.iter().any(|segment| segment.memory.contains(&self.entry));
        let linked = segments.iter().find_map(|segment| {
            let within = self.entry.checked_sub(segment.vaddr)?;
            (within < segment.memory.end - segment.memory.start).then(|| segment.memory.start + within)
        });
        linked.filter(|_| !loaded).unwrap_or(self.entry)
    }
}

struct Section {
    name: u32,
    nobits: bool,
    alloc: bool,
    offset: u64,
    size: u64,
}

struct Sections {
    headers: Vec<Section>,
    /// Where `.init.data` is.
    init_data: Option<FilePart>,
}

impl Sections {
    /// How much of a segment is worth reading: a linker script may have its `.bss` written out as zeros, which fresh
    /// memory has already.
    fn file_size(&self, segment: &Segment) -> u64 {
        let end = segment.offset + segment.file_size;
        let inside = |section: &&Section| section.alloc && (segment.offset..end).contains(&section.offset);
        let used = self
            .headers
            .iter()
            .filter(inside)
            .filter(|section| !section.nobits)
            .map(|section| section.offset.saturating_add(section.size).min(end))
            .max();
        used.map_or(segment.file_size, |used| used - segment.offset)
    }
}

/// The notes' bytes: from the segment that they are part of, else from the image.
fn read_notes(
    image: &mut impl Image,
    ram: &GuestRam,
    segments: &[Segment],
    (offset, size): FilePart,
) -> io::Result<Vec<u8>> {
    let mut notes = vec![0; usize::try_from(size).map_err(io::Error::other)?];
    match segments.iter().find_map(|segment| segment.find(offset, size)) {
        Some(address) => ram.read_slice(&mut notes, GuestAddress(address)).map_err(io::Error::other)?,
        None => image.read(offset, &mut notes)?,
    }
    Ok(notes)
}

/// The PVH entry point among the notes.
fn pvh_entry(mut notes: &[u8]) -> Option<u32> {
    let padded = |size: u32| usize::try_from(size).ok()?.checked_next_multiple_of(4);
    while notes.len() >= 12 {
        let (name_size, size, kind) = (u32_at(notes, 0), u32_at(notes, 4), u32_at(notes, 8));
        let name = 12;
        let data = padded(name_size)?.checked_add(name)?;
        let next = padded(size)?.checked_add(data)?;
        if kind == PHYS32_ENTRY && size >= 4 && notes.get(name..name + 4)? == b"Xen\0" && name_size == 4 {
            return notes.get(data..data + 4).map(|entry| u32_at(entry, 0));
        }
        notes = notes.get(next..)?;
    }
    None
}

/// Whether the kernel parses `acpi_osi=`, which it does if built with `CONFIG_ACPI`.
fn has_acpi(ram: &GuestRam, range: Range<u64>) -> bool {
    find(ram, range, b"acpi_osi=").is_some()
}

/// Refuses what lies past the end of the image.
fn within(image: &impl Image, what: &'static str, offset: u64, size: u64) -> Result<(), Error> {
    let (end, len) = (offset.saturating_add(size), image.len());
    if end > len { Err(Error::Truncated { what, end, len }) } else { Ok(()) }
}

/// Names the machine of an ELF header.
fn architecture(class: u8, order: u8, machine: u16) -> String {
    let name = match machine {
        EM_386 => "32-bit x86",
        EM_X86_64 => "x86-64 in 32 bits (x32)",
        EM_ARM => "32-bit Arm",
        EM_AARCH64 => "AArch64",
        EM_RISCV => "RISC-V",
        EM_LOONGARCH => "LoongArch",
        EM_S390 => "s390",
        EM_PPC64 => "64-bit PowerPC",
        EM_MIPS => "MIPS",
        _ => {
            let bits = if class == 2 { 64 } else { 32 };
            let order = if order == 2 { "big" } else { "little" };
            return format!("machine {machine}, {bits} bits, {order}-endian");
        }
    };
    name.into()
}

/// The little-endian number at `at`.
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// The little-endian number at `at`.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

/// The little-endian number at `at`.
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

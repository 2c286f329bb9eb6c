//! bzImage: the setup header, and where the payload is (Documentation/arch/x86/boot.rst).

use std::ops::Range;

use linux_loader::bootparam::setup_header;
use vm_memory::ByteValued;

use crate::arch::x86_64::layout::HIGH_MEMORY;

/// Where the setup header begins, in a bzImage as in the zero page.
const SETUP_HEADER: usize = 0x1f1;
/// Where the fields of protocol 2.12 end, the first that tells of a 64-bit entry point.
const HEADER_2_12: u64 = 0x264;
/// The kernel has an entry point at 0x200 for 64-bit mode.
const XLF_KERNEL_64: u16 = 1;
/// Where that is, from the start of the protected-mode part.
pub(super) const ENTRY_64: u64 = 0x200;
const SECTOR: u64 = 512;
/// Less than any compressed kernel: magic and size.
const PAYLOAD_MIN: u64 = 16;

/// What is wrong with a bzImage.
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
    /// It is from before Linux 3.8.
    #[error("its boot protocol {}.{:02} is older than 2.12", .0 >> 8, .0 & 0xff)]
    Old(u16),
    /// There is nothing in it.
    #[error("it has no payload")]
    Empty,
    /// It would have to unpack itself, and cannot be entered in 64-bit mode for that.
    #[error("only it can unpack itself, but it has no 64-bit entry point for that")]
    No64,
    /// It cannot unpack itself within guest memory.
    #[error("it needs guest memory at {start:#x}..{end:#x} to unpack itself, there are {} MiB below the MMIO gap", .memory >> 20)]
    TooBig {
        /// Where it is loaded.
        start: u64,
        /// Where the memory it needs ends.
        end: u64,
        /// The memory there is, in bytes.
        memory: u64,
    },
    /// It wants to be where the boot structures are.
    #[error("its load address {0:#x} overlaps the boot structures below 1 MiB")]
    Low(u64),
}

/// The parts of a bzImage.
#[derive(Debug)]
pub(super) struct BzImage {
    /// What it says of itself.
    pub setup_header: setup_header,
    /// The protected-mode part in the file.
    pub protected_mode: Range<u64>,
    /// The compressed payload in the file.
    pub payload: Range<u64>,
    /// File offset of its version, a NUL-terminated string.
    pub version: Option<u64>,
}

/// Whether a file that begins so is a bzImage.
pub(super) fn is_bzimage(head: &[u8]) -> bool {
    head.get(0x1fe..0x200) == Some(&[0x55, 0xaa]) && head.get(0x202..0x206) == Some(b"HdrS")
}

impl BzImage {
    /// Reads the setup header of a file `len` bytes long that begins with `head`.
    pub fn parse(head: &[u8], len: u64) -> Result<Self, Error> {
        let within = |what, end| if end > len { Err(Error::Truncated { what, end, len }) } else { Ok(()) };
        within("the setup header", HEADER_2_12)?;
        let mut header = setup_header::default();
        let said = usize::from(head[0x201]) + 0x202 - SETUP_HEADER;
        let size = said.min(header.as_slice().len()).min(head.len() - SETUP_HEADER);
        header.as_mut_slice()[..size].copy_from_slice(&head[SETUP_HEADER..SETUP_HEADER + size]);
        if header.version < 0x20c {
            return Err(Error::Old(header.version));
        }

        let setup_sectors = if header.setup_sects == 0 { 4 } else { header.setup_sects };
        let start = (u64::from(setup_sectors) + 1) * SECTOR;
        let end = start + u64::from(header.syssize) * 16;
        let payload = start + u64::from(header.payload_offset);
        let payload_end = payload + u64::from(header.payload_length);
        within("the setup code", start)?;
        within("the payload", payload_end)?;
        if payload_end - payload < PAYLOAD_MIN {
            return Err(Error::Empty);
        }
        Ok(Self {
            setup_header: header,
            // A signature may follow, and padding may be missing.
            protected_mode: start..end.clamp(payload_end, len),
            payload: payload..payload_end,
            version: (header.kernel_version != 0).then_some(u64::from(header.kernel_version) + SECTOR),
        })
    }

    /// Where it has to be to unpack itself, and all the memory it needs for that.
    pub fn place(&self, memory: u64) -> Result<Range<u64>, Error> {
        let setup_header { xloadflags, pref_address: start, init_size, .. } = self.setup_header;
        if xloadflags & XLF_KERNEL_64 == 0 {
            return Err(Error::No64);
        }
        let size = u64::from(init_size).max(self.protected_mode.end - self.protected_mode.start);
        let end = start.saturating_add(size);
        if start < HIGH_MEMORY {
            return Err(Error::Low(start));
        }
        if end > memory {
            return Err(Error::TooBig { start, end, memory });
        }
        Ok(start..end)
    }
}

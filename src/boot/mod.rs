//! Loading a guest: the kernel, its initrd and its command line, all into guest memory.
//!
//! Boot is data: nothing here calls KVM. [`kernel::load`] says how the kernel wants to be entered and whether it has
//! ACPI; knowing that, the board writes the tables of [`arch::x86_64`](crate::arch::x86_64) and the command line.

use std::ops::Range;

use memchr::memmem;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::GuestRam;

mod bzimage;
pub mod cmdline;
pub mod cpio;
mod elf;
pub mod filesystem;
#[cfg(test)]
mod fixture;
mod image;
pub mod initrd;
pub mod inspect;
pub mod kernel;
pub mod modules;
mod payload;
mod unpack;
mod unpacked;

/// Why a guest could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its kernel.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
    /// Its initrd.
    #[error(transparent)]
    Initrd(#[from] initrd::Error),
    /// Its command line.
    #[error(transparent)]
    Cmdline(#[from] cmdline::Error),
}

/// Where the memory that begins at 0 ends.
fn low_memory_end(ram: &GuestRam) -> u64 {
    ram.find_region(GuestAddress(0)).map_or(0, |region| region.len())
}

/// Bytes as MiB, rounded up.
fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

/// How much guest memory is searched at once.
const CHUNK: usize = 16 << 10;

/// Where guest memory first has `needle` within `range`.
fn find(ram: &GuestRam, range: Range<u64>, needle: &[u8]) -> Option<u64> {
    let finder = memmem::Finder::new(needle);
    let mut chunk = vec![0; CHUNK];
    let mut start = range.start;
    while start < range.end {
        let size = usize::try_from(range.end - start).map_or(chunk.len(), |left| left.min(chunk.len()));
        ram.read_slice(&mut chunk[..size], GuestAddress(start)).ok()?;
        if let Some(at) = finder.find(&chunk[..size]) {
            return Some(start + at as u64);
        }
        // The next chunk repeats what could be the beginning of the needle.
        start += if size == chunk.len() { size + 1 - needle.len() } else { size } as u64;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::reserve;

    #[test]
    fn a_needle_is_found_across_chunks_and_not_past_the_end() {
        let ram = reserve(&[0..1 << 20]).unwrap();
        let chunk = 0x100 + CHUNK as u64;
        for at in [0x100, chunk - 5, chunk - 1, chunk, 0x2_0000 - 9] {
            ram.write_slice(b"acpi_osi=", GuestAddress(at)).unwrap();
            assert_eq!(find(&ram, 0x100..0x2_0000, b"acpi_osi="), Some(at));
            assert_eq!(find(&ram, 0x100..at + 8, b"acpi_osi="), None);
            ram.write_slice(&[0; 9], GuestAddress(at)).unwrap();
        }
    }
}

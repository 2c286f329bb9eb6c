//! Loading a guest: the kernel, its initrd and its command line, all into guest memory.
//!
//! Boot is data: nothing here calls KVM. [`kernel::load`] says how the kernel wants to be entered and whether it has
//! ACPI; knowing that, the board writes the tables of [`arch::x86_64`](crate::arch::x86_64) and the command line.

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::GuestRam;

mod bzimage;
pub mod cmdline;
mod elf;
mod image;
pub mod initrd;
pub mod kernel;
mod unpack;

/// Where the memory that begins at 0 ends.
fn low_memory_end(ram: &GuestRam) -> u64 {
    ram.find_region(GuestAddress(0)).map_or(0, |region| region.len())
}

/// Bytes as MiB, rounded up.
fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

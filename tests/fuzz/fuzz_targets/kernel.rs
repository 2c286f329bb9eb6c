//! Kernels, and an initrd behind one.
#![no_main]

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use bantam::arch::x86_64::regs::Entry;
use bantam::boot::inspect::inspect;
use bantam::boot::{initrd, kernel};
use bantam::memory::{GuestRam, reserve};
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress};

/// Room for the smallest kernels.
const MEMORY: u64 = 24 << 20;
const PAGE: u64 = 4096;
/// More than this is not unpacked, so that no input takes long.
const UNPACKED_MAX: usize = 32 << 20;

fn file(content: &[u8]) -> (File, PathBuf) {
    let mut file = File::from(memfd_create("kernel", MemfdFlags::CLOEXEC).expect("a file in memory"));
    file.write_all(content).expect("memory");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    (file, path)
}

/// The pages that are there, of which the guest would find something in.
fn touched(ram: &GuestRam) -> Vec<u64> {
    use vm_memory::GuestMemoryBackend;
    let host = ram.get_host_address(GuestAddress(0)).expect("there is memory") as u64;
    let mut entries = vec![0; (MEMORY / PAGE * 8) as usize];
    let pagemap = File::open("/proc/self/pagemap").expect("Linux");
    pagemap.read_exact_at(&mut entries, host / PAGE * 8).expect("Linux");
    let present = |(_, entry): &(u64, &[u8; 8])| u64::from_le_bytes(**entry) >> 63 == 1;
    (0..).zip(entries.as_chunks::<8>().0).filter(present).map(|(page, _)| page * PAGE).collect()
}

/// Takes so many bytes.
struct Limited(Vec<u8>);

impl Write for Limited {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + data.len() > UNPACKED_MAX {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((initrd_len, content)) = data.split_first_chunk::<2>() else { return };
    let (_kernel, path) = file(content);
    let ram = reserve(&[0..MEMORY]).expect("memory");
    let loaded = kernel::load(&ram, &path);
    let _ = inspect(&path);
    let mut unpacked = Limited(vec![]);
    let extracted = kernel::extract(&path, &mut unpacked);
    let Ok(kernel) = loaded else { return };

    let range = kernel.range.clone();
    assert!(range.start < range.end && range.end <= MEMORY, "the kernel is at {range:x?}");
    // What follows in the last page may be what the file has there.
    let pages = range.start..range.end.next_multiple_of(PAGE);
    let is_within = |page: &u64| pages.contains(page) && pages.contains(&(page + PAGE - 1));
    for page in touched(&ram).into_iter().filter(|page| !is_within(page)) {
        let mut bytes = [0; PAGE as usize];
        ram.read_slice(&mut bytes, GuestAddress(page)).expect("it is memory");
        let is_stray = |(at, byte): &(u64, u8)| *byte != 0 && !pages.contains(at);
        let stray = if bytes == [0; PAGE as usize] { None } else { (page..).zip(bytes).find(is_stray) };
        assert_eq!(stray, None, "something is outside of the kernel's pages, {pages:x?}");
    }
    let (Entry::Linux64 { entry, .. } | Entry::Pvh { entry, .. }) = kernel.entry;
    assert!(entry < MEMORY, "the kernel is entered at {entry:#x}");

    // What is in it is the same kernel.
    if extracted.is_ok() && !kernel.packed {
        let (_unpacked, path) = file(&unpacked.0);
        let again = kernel::load(&reserve(&[0..MEMORY]).expect("memory"), &path).expect("it was loaded packed");
        assert_eq!((&again.range, again.entry, again.acpi), (&range, kernel.entry, kernel.acpi));
    }

    let initrd = vec![0xee; usize::from(u16::from_le_bytes(*initrd_len)) * 64 + 1];
    let (_initrd, path) = file(&initrd);
    let more = [0xdd; 100];
    match initrd::load_with(&ram, Some(&path), &more, &kernel) {
        Ok(at) => {
            assert!(at.start >= range.end && at.end <= MEMORY && at.start % PAGE == 0, "the initrd is at {at:x?}");
            assert!(at.end - 1 <= kernel.initrd_max, "the initrd is at {at:x?}");
            let mut bytes = vec![0; (at.end - at.start) as usize];
            ram.read_slice(&mut bytes, GuestAddress(at.start)).expect("it is memory");
            assert!(bytes.starts_with(&initrd) && bytes.ends_with(&more));
        }
        Err(initrd::Error::TooBig { size, room, .. }) => assert!(size > room),
        Err(error) => panic!("{error}"),
    }
});

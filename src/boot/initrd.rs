//! Loading an initrd: as high in low memory as the kernel takes it, out of the way of what the kernel unpacks.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress};

use super::cpio;
use super::kernel::{self, Kernel};
use super::low_memory_end;
use crate::memory::{GuestRam, load_file};

const PAGE: u64 = 4096;

/// An initrd could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host did not open it, or it is not a file with something in it.
    #[error("cannot load initrd {path}")]
    Open {
        /// The initrd's file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: kernel::Reason,
    },
    /// The host did not read it.
    #[error("cannot read initrd {path}")]
    Read {
        /// The initrd's file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// There is no room for it.
    #[error(
        "initrd {path} is {size} bytes large and does not fit: {room} are free between the kernel and {limit:#x} \
         (a larger --memory may help)"
    )]
    TooBig {
        /// The initrd's file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The largest initrd that would fit, in bytes.
        room: u64,
        /// Where memory for an initrd ends.
        limit: u64,
    },
}

/// Loads the initrd at `path` for `kernel` and returns where it is.
///
/// # Errors
/// When there is no such file, or it does not fit between the kernel and the end of low memory.
pub fn load(ram: &GuestRam, path: &Path, kernel: &Kernel) -> Result<Range<u64>, Error> {
    load_with(ram, Some(path), &[], kernel)
}

/// Loads the initrd at `path`, if there is one, and the archive `more` after it: the kernel unpacks one after the other.
///
/// # Errors
/// As [`load`].
pub fn load_with(ram: &GuestRam, path: Option<&Path>, more: &[u8], kernel: &Kernel) -> Result<Range<u64>, Error> {
    let opened = path.map(|path| Ok((path, kernel::open(path)?)));
    let opened =
        opened.transpose().map_err(|source| Error::Open { path: path.unwrap_or(Path::new("")).into(), source })?;
    let path = path.unwrap_or(Path::new("of the command"));
    let first = opened.as_ref().map_or(0, |(_, (_, size))| *size);
    // Between archives there may be zeros.
    let second = if more.is_empty() { first } else { first.next_multiple_of(cpio::ALIGNMENT as u64) };
    let size = second + more.len() as u64;
    let limit = low_memory_end(ram).min(kernel.initrd_max.saturating_add(1)) / PAGE * PAGE;
    let room = limit.saturating_sub(kernel.range.end.next_multiple_of(PAGE));
    let too_big = || Error::TooBig { path: path.into(), size, room, limit };
    if size > room {
        return Err(too_big());
    }
    let start = (limit - size) / PAGE * PAGE;
    if let Some((_, (file, _))) = &opened {
        load_file(ram, start, file, 0, first).map_err(|source| Error::Read { path: path.into(), source })?;
    }
    ram.write_slice(more, GuestAddress(start + second)).map_err(|_| too_big())?;
    Ok(start..start + size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::fixture::elf;
    use crate::memory::reserve;
    use std::error::Error as _;
    use std::io::Write;

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    /// 4 MiB with a kernel up to 0x20_1000.
    fn machine() -> (GuestRam, Kernel) {
        let ram = reserve(&[0..4 << 20]).unwrap();
        let kernel = kernel::load(&ram, file(&elf()).path()).unwrap();
        (ram, kernel)
    }

    #[test]
    fn it_is_as_high_as_memory_and_kernel_allow() {
        let (ram, mut kernel) = machine();
        let initrd = file(&[7; 5000]);
        assert_eq!(load(&ram, initrd.path(), &kernel).unwrap(), 0x3f_e000..0x3f_f388);
        assert_eq!(ram.read_obj::<u8>(GuestAddress(0x3f_f387)).unwrap(), 7);
        kernel.initrd_max = 0x2f_ffff;
        assert_eq!(load(&ram, initrd.path(), &kernel).unwrap(), 0x2f_e000..0x2f_f388);
    }

    #[test]
    fn another_archive_follows_it() {
        let (ram, kernel) = machine();
        let initrd = file(&[7; 4097]);
        let range = load_with(&ram, Some(initrd.path()), b"more", &kernel).unwrap();
        assert_eq!(range, 0x3f_e000..0x3f_f008);
        assert_eq!(ram.read_obj::<[u8; 7]>(GuestAddress(0x3f_f001)).unwrap(), *b"\0\0\0more");
        assert_eq!(load_with(&ram, None, b"alone", &kernel).unwrap(), 0x3f_f000..0x3f_f005);
    }

    #[test]
    fn it_may_fill_all_that_is_free_and_no_more() {
        let (ram, kernel) = machine();
        let initrd = file(&vec![7; 0x1f_f000]);
        assert_eq!(load(&ram, initrd.path(), &kernel).unwrap(), 0x20_1000..0x40_0000);
        let initrd = file(&vec![7; 0x1f_f001]);
        let error = load(&ram, initrd.path(), &kernel).unwrap_err().to_string();
        assert!(error.contains("is 2093057 bytes large and does not fit: 2093056 are free"), "{error}");
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let (ram, kernel) = machine();
        let directory = tempfile::tempdir().unwrap();
        let reason = |path: &Path| load(&ram, path, &kernel).unwrap_err().source().unwrap().to_string();
        assert_eq!(reason(directory.path()), "it is a directory");
        assert_eq!(reason(file(&[]).path()), "it is empty");
        assert!(reason(&directory.path().join("none")).contains("No such file"));
    }
}

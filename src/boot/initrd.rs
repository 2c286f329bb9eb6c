//! Loading an initrd: as high in low memory as the kernel takes it, out of the way of what the kernel unpacks.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress};

use super::kernel::{self, Kernel};
use super::{low_memory_end, mib};
use crate::memory::GuestRam;

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
        "initrd {path} is {} MiB large and does not fit: {} MiB are free between the kernel and {limit:#x}",
        mib(*.size), .room >> 20
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
    let (mut file, size) = kernel::open(path).map_err(|source| Error::Open { path: path.into(), source })?;
    let limit = low_memory_end(ram).min(kernel.initrd_max.saturating_add(1)) / PAGE * PAGE;
    let room = limit.saturating_sub(kernel.range.end.next_multiple_of(PAGE));
    let too_big = || Error::TooBig { path: path.into(), size, room, limit };
    if size > room {
        return Err(too_big());
    }
    let start = (limit - size) / PAGE * PAGE;
    read(ram, &mut file, start, size).map_err(|source| Error::Read { path: path.into(), source })?;
    Ok(start..start + size)
}

fn read(ram: &GuestRam, file: &mut File, start: u64, size: u64) -> io::Result<()> {
    let size = usize::try_from(size).map_err(io::Error::other)?;
    ram.read_exact_volatile_from(GuestAddress(start), file, size).map_err(super::image::into_io)
}

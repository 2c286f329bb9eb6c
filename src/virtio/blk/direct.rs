//! I/O past the host's page cache (`O_DIRECT`), of which a file system takes only what is aligned; the rest goes by the page
//! cache. The kernel keeps the two coherent as long as they are not under way at the same time.

use std::fs::File;
use std::io;

use rustix::fs::{AtFlags, FileType, OFlags, StatxFlags, fcntl_getfl, fcntl_setfl, fstat, ioctl_blksszget, statx};
use rustix::io::Errno;

use crate::virtio::iovec::Iovecs;

/// What every host is content with that does not say what it takes.
const UNTOLD: u32 = 4096;

/// How a file is open for direct I/O.
pub struct Direct {
    /// What addresses in memory, and what lengths and offsets in the file have to be multiples of: powers of two, in bytes.
    memory: usize,
    unit: u64,
    /// The file's flags with the page cache.
    flags: OFlags,
}

impl Direct {
    /// Has `file` go past the page cache from now on. `None` if its file system has no such thing.
    pub fn new(file: &File) -> io::Result<Option<Self>> {
        let told = |align: u32| if align.is_power_of_two() { align } else { UNTOLD };
        let is_device = FileType::from_raw_mode(fstat(file)?.st_mode) == FileType::BlockDevice;
        let (memory, unit) = match statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) {
            Ok(stat) if stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 => {
                // It says so of a file whose file system has it for others.
                if stat.stx_dio_offset_align == 0 {
                    return Ok(None);
                }
                (stat.stx_dio_mem_align, stat.stx_dio_offset_align)
            }
            // Before Linux 6.1.
            _ if is_device => [ioctl_blksszget(file)?; 2].into(),
            _ => [UNTOLD; 2].into(),
        };
        // Nothing here is ever waited for, and io_uring would not wait.
        let flags = fcntl_getfl(file)? - OFlags::NONBLOCK - OFlags::DIRECT;
        let direct = Self { memory: told(memory) as usize, unit: told(unit).into(), flags };
        match direct.set(file, true) {
            Ok(()) => Ok(Some(direct)),
            Err(Errno::INVAL) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// What lengths and offsets are multiples of, in bytes.
    pub fn unit(&self) -> u64 {
        self.unit
    }

    /// Whether the buffers can be filled from `offset` on, or written there.
    pub fn takes(&self, buffers: &Iovecs, offset: u64) -> bool {
        offset.is_multiple_of(self.unit) && buffers.are_multiples_of(self.memory, self.unit)
    }

    /// Makes a `call` that direct I/O cannot do; none else is under way.
    pub fn by_page_cache<T>(&self, file: &File, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        self.set(file, false)?;
        let result = call();
        self.set(file, true)?;
        result
    }

    fn set(&self, file: &File, direct: bool) -> rustix::io::Result<()> {
        fcntl_setfl(file, if direct { self.flags | OFlags::DIRECT } else { self.flags })
    }
}

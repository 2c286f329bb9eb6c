//! What a block device does by ioctl(2) only.

#![expect(unsafe_code, reason = "ioctl takes a pointer")]

use std::fs::File;

use rustix::io::Errno;
use std::os::fd::AsRawFd;

/// `_IO(0x12, 119)` of linux/fs.h.
const BLKDISCARD: libc::Ioctl = 0x1277;

/// Discards the blocks of a range in bytes.
pub fn discard_blocks(device: &File, offset: u64, len: u64) -> rustix::io::Result<()> {
    let range = [offset, len];
    // SAFETY: BLKDISCARD reads two u64, and writes no memory of ours.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BLKDISCARD, &range) };
    if result == 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}

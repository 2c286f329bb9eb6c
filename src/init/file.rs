//! Files and folders of the guest, by path.

use alloc::ffi::CString;
use alloc::vec::Vec;
use core::ffi::CStr;

use crate::sys;

/// A path of ours, which has no zero byte.
pub fn path(text: &str) -> CString {
    CString::new(text).unwrap_or_default()
}

/// What is in a file.
pub fn read(path: &CStr) -> sys::Result<Vec<u8>> {
    let fd = sys::open(path, sys::READ)?;
    let mut content = Vec::new();
    let mut buffer = [0; 4096];
    let result = loop {
        match sys::read(fd, &mut buffer) {
            Ok(0) => break Ok(content),
            Ok(count) => content.extend_from_slice(&buffer[..count]),
            Err(error) => break Err(error),
        }
    };
    sys::close(fd);
    result
}

/// Fills `buffer`; `None` at an end before.
pub fn read_exact(fd: sys::Fd, buffer: &mut [u8]) -> Option<()> {
    let mut have = 0;
    while have < buffer.len() {
        match sys::read(fd, &mut buffer[have..]) {
            Ok(count) if count > 0 => have += count,
            Err(sys::EINTR) => {}
            _ => return None,
        }
    }
    Some(())
}

/// Writes to a file that is there.
pub fn write(path: &CStr, bytes: &[u8]) -> sys::Result<()> {
    let fd = sys::open(path, sys::WRITE_ONLY)?;
    let written = sys::write(fd, bytes);
    sys::close(fd);
    written.map(drop)
}

/// Makes a folder; it may be there already.
pub fn make_folder(path: &CStr, mode: u32) -> sys::Result<()> {
    match sys::mkdir(path, mode) {
        Err(sys::EEXIST) => Ok(()),
        made => made,
    }
}

/// Makes a folder and those that it is in.
pub fn make_folders(path: &CStr) -> sys::Result<()> {
    let bytes = path.to_bytes();
    for (at, _) in bytes.iter().enumerate().skip(1).filter(|(_, byte)| **byte == b'/') {
        let parent = CString::new(&bytes[..at]).unwrap_or_default();
        // If it is missing, what is below it fails.
        let _ = sys::mkdir(&parent, 0o755);
    }
    make_folder(path, 0o755)
}

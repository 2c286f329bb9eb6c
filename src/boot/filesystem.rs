//! What file system is on a disk, by its superblock.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Type, offset and bytes that tell it.
const MAGIC: [(&str, u64, &[u8]); 6] = [
    ("squashfs", 0, b"hsqs"),
    ("xfs", 0, b"XFSB"),
    ("erofs", 0x400, &[0xe2, 0xe1, 0xf5, 0xe0]),
    // Also what is only ext2 or ext3: this driver reads them.
    ("ext4", 0x438, &[0x53, 0xef]),
    ("btrfs", 0x1_0040, b"_BHRfS_M"),
    ("iso9660", 0x8001, b"CD001"),
];

/// The type of the file system on `disk`, as `mount -t` has it; `None` if there is none that is known.
///
/// # Errors
/// When the host does not read the disk.
pub fn detect(disk: &File) -> io::Result<Option<&'static str>> {
    for (name, offset, magic) in MAGIC {
        let mut bytes = vec![0; magic.len()];
        match disk.read_exact_at(&mut bytes, offset) {
            Ok(()) if bytes == magic => return Ok(Some(name)),
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(error),
            _ => {}
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_told_by_its_magic_and_others_are_not() {
        for (name, offset, magic) in MAGIC {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(magic, offset).unwrap();
            assert_eq!(detect(&file).unwrap(), Some(name));
        }
        let file = tempfile::tempfile().unwrap();
        assert_eq!(detect(&file).unwrap(), None);
        file.set_len(1 << 20).unwrap();
        assert_eq!(detect(&file).unwrap(), None);
    }
}

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

/// Where each has its UUID, or what comes close to one, and how long that is.
const IDENTIFIER: [(&str, u64, usize); 6] = [
    // The numbers of inodes and bytes and the time that it was made, in a superblock that never changes.
    ("squashfs", 0, 96),
    ("xfs", 0x20, 16),
    ("erofs", 0x430, 16),
    ("ext4", 0x468, 16),
    ("btrfs", 0x1_0020, 16),
    // The volume's name and the time that it was made.
    ("iso9660", 0x8028, 0x316),
];

/// What tells the file system on `disk` from others: its type and its UUID; `None` if there is none that is known.
///
/// # Errors
/// When the host does not read the disk.
pub fn identity(disk: &File) -> io::Result<Option<String>> {
    let kind = detect(disk)?;
    let Some((kind, offset, length)) = IDENTIFIER.into_iter().find(|entry| Some(entry.0) == kind) else {
        return Ok(None);
    };
    let mut bytes = vec![0; length];
    disk.read_exact_at(&mut bytes, offset)?;
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Some(format!("{kind}:{digits}")))
}

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
            file.set_len(1 << 20).unwrap();
            let one = identity(&file).unwrap().unwrap();
            assert!(one.starts_with(&format!("{name}:")));
            let (_, offset, length) = IDENTIFIER.into_iter().find(|entry| entry.0 == name).unwrap();
            file.write_all_at(&[1], offset + length as u64 - 1).unwrap();
            assert_ne!(identity(&file).unwrap().unwrap(), one);
        }
        let file = tempfile::tempfile().unwrap();
        assert_eq!(detect(&file).unwrap(), None);
        assert_eq!(identity(&file).unwrap(), None);
        file.set_len(1 << 20).unwrap();
        assert_eq!(detect(&file).unwrap(), None);
    }
}

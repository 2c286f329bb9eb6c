//! Initramfs archives, in the format that Linux' Documentation/driver-api/early-userspace/buffer-format.rst describes.

/// An archive of one file that all may read and run.
pub fn archive(name: &str, content: &[u8]) -> Vec<u8> {
    let mut archive = vec![];
    entry(&mut archive, name, 0o100_755, content);
    entry(&mut archive, "TRAILER!!!", 0, &[]);
    archive
}

fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) {
    let (size, name_size) = (u32::try_from(content.len()).unwrap(), u32::try_from(name.len()).unwrap() + 1);
    archive.extend_from_slice(b"070701");
    // Inode, mode, owner, group, links, time, size, device and file's device by major and minor, name's size, checksum.
    for field in [0, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
        archive.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend_from_slice(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

//! Files of the host, read without trust in what they are.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

/// More than what is noted of an image, a kernel or a warm snapshot has, in bytes.
pub const RECORD_MAX: u64 = 16 << 20;

/// What tells a file from all others, whatever it is called: its device, and its inode.
pub type FileId = (u64, u64);

/// That of a file.
pub fn file_id(metadata: &Metadata) -> FileId {
    (metadata.dev(), metadata.ino())
}

/// Opens a regular file to read it. Nothing else is opened: a pipe would be waited for, and a device may do things.
pub fn open(path: &Path) -> io::Result<File> {
    let check = |metadata: Metadata| match metadata.file_type() {
        kind if kind.is_file() => Ok(()),
        kind if kind.is_dir() => Err(io::Error::from(io::ErrorKind::IsADirectory)),
        _ => Err(io::Error::other("it is not a regular file")),
    };
    check(fs::metadata(path)?)?;
    // What has that name may have become another meanwhile.
    let nonblocking = i32::from_ne_bytes(OFlags::NONBLOCK.bits().to_ne_bytes());
    let file = File::options().read(true).custom_flags(nonblocking).open(path)?;
    check(file.metadata()?)?;
    Ok(file)
}

/// All of a regular file that has no more than `max` bytes.
pub fn read(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    read_open(&open(path)?, max)
}

/// The rest of a file, if that is no more than `max` bytes.
pub fn read_open(file: &File, max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![];
    file.take(max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max {
        return Err(io::Error::other(format!("it has more than {} MiB", max >> 20)));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    #[test]
    fn only_regular_files_are_read_and_no_more_than_wanted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, [7; 100]).unwrap();
        assert_eq!(read(&path, 100).unwrap(), [7; 100]);
        assert_eq!(read(&path, 99).unwrap_err().to_string(), "it has more than 0 MiB");
        let pipe = folder.path().join("pipe");
        mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR, 0).unwrap();
        let link = folder.path().join("link");
        symlink(&pipe, &link).unwrap();
        for path in [&pipe, &link, Path::new("/dev/zero")] {
            assert_eq!(read(path, 100).unwrap_err().to_string(), "it is not a regular file");
        }
        assert_eq!(read(folder.path(), 100).unwrap_err().kind(), io::ErrorKind::IsADirectory);
        assert_eq!(read(&folder.path().join("none"), 100).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}

//! Archives that Linux unpacks as an initramfs: the `newc` format of
//! Documentation/driver-api/early-userspace/buffer-format.rst.

/// Every entry begins at a multiple of this.
pub const ALIGNMENT: usize = 4;

const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;

/// An archive in memory. Everything in it is root's.
///
/// ```
/// use bantam::boot::cpio::Archive;
/// let mut archive = Archive::default();
/// archive.folder("etc", 0o755);
/// archive.file("etc/motd", 0o644, b"hello\n");
/// assert!(archive.finish().starts_with(b"070701"));
/// ```
#[derive(Debug, Default)]
pub struct Archive(Vec<u8>);

impl Archive {
    /// Adds a folder. Those that it is in must have been added.
    pub fn folder(&mut self, name: &str, mode: u32) {
        self.entry(name, FOLDER | mode, 2, &[]);
    }

    /// Adds a file with `content`, which is less than 4 GiB.
    pub fn file(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entry(name, FILE | mode, 1, content);
    }

    /// The archive, whole.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, 1, &[]);
        self.0
    }

    fn entry(&mut self, name: &str, mode: u32, links: u32, content: &[u8]) {
        let size = u32::try_from(content.len()).expect("the caller adds small files");
        let name_size = u32::try_from(name.len() + 1).expect("names are short");
        self.0.extend_from_slice(b"070701");
        // Inode, mode, owner, group, links, time, size, device and file's device by major and minor, name's size, checksum.
        for field in [0, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0] {
            self.0.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.0.extend_from_slice(name.as_bytes());
        self.0.push(0);
        self.pad();
        self.0.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(ALIGNMENT), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    #[test]
    fn cpio_reads_it() {
        let mut archive = Archive::default();
        archive.folder("a", 0o700);
        archive.file("a/b", 0o755, b"hello");
        let mut cpio = Command::new("cpio")
            .args(["-itv", "--quiet", "--numeric-uid-gid"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        cpio.stdin.take().unwrap().write_all(&archive.finish()).unwrap();
        let text = String::from_utf8(cpio.wait_with_output().unwrap().stdout).unwrap();
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0][..5], ["drwx------", "2", "0", "0", "0"]);
        assert_eq!(lines[1][..5], ["-rwxr-xr-x", "1", "0", "0", "5"]);
        assert_eq!((lines[0].last(), lines[1].last()), (Some(&"a"), Some(&"a/b")));
    }
}

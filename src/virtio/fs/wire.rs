//! The FUSE protocol as it is on the wire: `linux/fuse.h`, protocol 7.31 and later, little-endian as the guest is.

/// Length in bytes of the header of a request.
pub const IN_HEADER: usize = 40;
/// Length in bytes of the header of a reply.
pub const OUT_HEADER: usize = 16;

/// The protocol's major version, and the minor one this server speaks.
pub const VERSION: (u32, u32) = (7, 31);

/// What a request is for: `FUSE_*` of `enum fuse_opcode`.
pub mod op {
    #![allow(missing_docs, reason = "the names are those of linux/fuse.h")]
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
}

/// Flags of INIT: what both sides can do.
pub mod init {
    #![allow(missing_docs, reason = "the names are those of linux/fuse.h")]
    pub const ASYNC_READ: u32 = 1 << 0;
    pub const ATOMIC_O_TRUNC: u32 = 1 << 3;
    pub const BIG_WRITES: u32 = 1 << 5;
    pub const DO_READDIRPLUS: u32 = 1 << 13;
    pub const READDIRPLUS_AUTO: u32 = 1 << 14;
    pub const PARALLEL_DIROPS: u32 = 1 << 18;
    pub const MAX_PAGES: u32 = 1 << 22;
    pub const HANDLE_KILLPRIV_V2: u32 = 1 << 28;
}

/// In a WRITE's flags: the file loses its set-user-id and set-group-id bits, `FUSE_WRITE_KILL_SUIDGID`.
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// The same in an OPEN's flags, where it truncates: `FUSE_OPEN_KILL_SUIDGID`.
pub const OPEN_KILL_SUIDGID: u32 = 1 << 0;

/// Which attributes SETATTR sets: `FATTR_*`.
pub mod fattr {
    #![allow(missing_docs, reason = "the names are those of linux/fuse.h")]
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
    pub const KILL_SUIDGID: u32 = 1 << 11;
}

/// `struct fuse_in_header`.
#[derive(Debug, Clone, Copy)]
pub struct InHeader {
    /// What is asked.
    pub opcode: u32,
    /// Identifies the request.
    pub unique: u64,
    /// The node it is about.
    pub node: u64,
    /// Who asks.
    pub uid: u32,
    /// And of which group.
    pub gid: u32,
}

/// The request ended early: the guest sent less than its operation has.
#[derive(Debug)]
pub struct TooShort;

/// Takes a request apart.
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// A reader of all of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], TooShort> {
        let (first, rest) = self.0.split_at_checked(count).ok_or(TooShort)?;
        self.0 = rest;
        Ok(first)
    }

    /// The next 32-bit number.
    pub fn u32(&mut self) -> Result<u32, TooShort> {
        self.take(4).map(|bytes| u32::from_le_bytes(bytes.try_into().expect("4 bytes")))
    }

    /// The next 64-bit number.
    pub fn u64(&mut self) -> Result<u64, TooShort> {
        self.take(8).map(|bytes| u64::from_le_bytes(bytes.try_into().expect("8 bytes")))
    }

    /// Leaves out `count` bytes.
    pub fn skip(&mut self, count: usize) -> Result<(), TooShort> {
        self.take(count).map(drop)
    }

    /// The next text, which ends with a NUL byte.
    pub fn text(&mut self) -> Result<&'a [u8], TooShort> {
        let length = self.0.iter().position(|byte| *byte == 0).ok_or(TooShort)?;
        let text = self.take(length + 1)?;
        Ok(&text[..length])
    }

    /// The next `count` bytes.
    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8], TooShort> {
        self.take(count)
    }

    /// The request's header.
    pub fn header(&mut self) -> Result<InHeader, TooShort> {
        self.skip(4)?;
        let header = InHeader {
            opcode: self.u32()?,
            unique: self.u64()?,
            node: self.u64()?,
            uid: self.u32()?,
            gid: self.u32()?,
        };
        self.skip(8)?;
        Ok(header)
    }
}

/// Puts the body of a reply together.
#[derive(Debug, Default)]
pub struct Reply(pub Vec<u8>);

impl Reply {
    /// Adds a 16-bit number.
    pub fn u16(&mut self, number: u16) -> &mut Self {
        self.0.extend_from_slice(&number.to_le_bytes());
        self
    }

    /// Adds a 32-bit number.
    pub fn u32(&mut self, number: u32) -> &mut Self {
        self.0.extend_from_slice(&number.to_le_bytes());
        self
    }

    /// Adds a 64-bit number.
    pub fn u64(&mut self, number: u64) -> &mut Self {
        self.0.extend_from_slice(&number.to_le_bytes());
        self
    }

    /// Adds bytes.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// `struct fuse_attr`.
    pub fn attr(&mut self, attr: &Attr) -> &mut Self {
        self.u64(attr.ino).u64(attr.size).u64(attr.blocks);
        for (seconds, _) in [attr.atime, attr.mtime, attr.ctime] {
            self.bytes(&seconds.to_le_bytes());
        }
        for (_, nanoseconds) in [attr.atime, attr.mtime, attr.ctime] {
            self.u32(nanoseconds);
        }
        self.u32(attr.mode).u32(attr.nlink).u32(attr.uid).u32(attr.gid).u32(attr.rdev).u32(attr.blksize).u32(0)
    }

    /// `struct fuse_attr_out`, good for `seconds`.
    pub fn attr_out(&mut self, seconds: u64, attr: &Attr) -> &mut Self {
        self.u64(seconds).u32(0).u32(0).attr(attr)
    }

    /// `struct fuse_entry_out`, good for `seconds`.
    pub fn entry(&mut self, seconds: u64, node: u64, attr: &Attr) -> &mut Self {
        self.u64(node).u64(0).u64(seconds).u64(seconds).u32(0).u32(0).attr(attr)
    }

    /// `struct fuse_open_out`.
    pub fn open(&mut self, handle: u64) -> &mut Self {
        self.u64(handle).u32(0).u32(0)
    }

    /// `struct fuse_dirent`, padded to 8 bytes.
    pub fn dirent(&mut self, ino: u64, next: u64, kind: u32, name: &[u8]) -> &mut Self {
        let length = u32::try_from(name.len()).expect("a name of a host file is short");
        self.u64(ino).u64(next).u32(length).u32(kind).bytes(name);
        self.bytes(&[0; 7][..name.len().next_multiple_of(8) - name.len()])
    }
}

/// What a file is: `struct fuse_attr`. Times are seconds and nanoseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "as in struct stat")]
pub struct Attr {
    pub ino: u64,
    pub size: u64,
    pub blocks: u64,
    pub atime: (i64, u32),
    pub mtime: (i64, u32),
    pub ctime: (i64, u32),
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    pub blksize: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_protocols_sizes() {
        let attr = Attr {
            ino: 1,
            size: 2,
            blocks: 3,
            atime: (-1, 5),
            mtime: (0, 0),
            ctime: (0, 0),
            mode: 0o100_644,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
        };
        assert_eq!(Reply::default().attr(&attr).0.len(), 88);
        assert_eq!(Reply::default().attr_out(1, &attr).0.len(), 104);
        assert_eq!(Reply::default().entry(1, 2, &attr).0.len(), 128);
        assert_eq!(Reply::default().open(1).0.len(), 16);
        for (name, length) in [("a", 32), ("abcdefgh", 32), ("abcdefghi", 40)] {
            assert_eq!(Reply::default().dirent(1, 2, 8, name.as_bytes()).0.len(), length);
        }
    }

    #[test]
    fn what_is_too_short_is_an_error() {
        assert!(Reader::new(&[0; IN_HEADER - 1]).header().is_err());
        assert!(Reader::new(b"no end").text().is_err());
        let mut reader = Reader::new(b"one\0two\0");
        assert_eq!((reader.text().unwrap(), reader.text().unwrap()), (&b"one"[..], &b"two"[..]));
        assert!(reader.u32().is_err());
    }
}

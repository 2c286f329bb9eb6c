//! A disk image on the host: a raw file or a block device, locked against other writers.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{
    FallocateFlags, FlockOperation, OFlags, SeekFrom, fallocate, fcntl_getfl, fcntl_setfl, fdatasync, flock, seek,
};
use rustix::io::{Errno, retry_on_intr};

use super::SECTOR;
use super::direct::Direct;
use super::ioctl::discard_blocks;
use super::uring::Uring;
use crate::virtio::iovec::Iovecs;

/// Why a disk image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is missing, or may not be opened.
    #[error("cannot open disk image {path}")]
    Open {
        /// The image.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Its thread would not see in time that it has to stop.
    #[error("cannot use disk image {path} with poll-us={poll_us}: it must be at most 10000")]
    Poll {
        /// The image.
        path: PathBuf,
        /// How long it was to be polled, in microseconds.
        poll_us: u16,
    },
    /// It would have more virtqueues than there can be, or none.
    #[error("cannot give disk image {path} queues={queues}: it must be 1 to {}", super::QUEUES_MAX)]
    Queues {
        /// The image.
        path: PathBuf,
        /// How many it would have.
        queues: u16,
    },
    /// Its rate cannot be limited.
    #[error("cannot make a timer for the disk's rate limit")]
    Timer(#[source] io::Error),
    /// It can be opened, but not for writing.
    #[error("cannot open disk image {path} for writing (readonly=on would read it)")]
    ReadOnly {
        /// The image.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// It is neither a file nor a block device.
    #[error("cannot use {path} as a disk image: it is a {kind}, not a file or block device")]
    Type {
        /// What was to be the image.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// It is not a number of sectors.
    #[error("cannot use disk image {path}: its size, {bytes} bytes, is not a multiple of {SECTOR}")]
    Size {
        /// The image.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// There is nothing in it.
    #[error("cannot use disk image {path}: it is empty")]
    Empty {
        /// The image.
        path: PathBuf,
    },
    /// Another process writes it.
    #[error("cannot lock disk image {path}: it is being written by another machine or program, or given twice")]
    Written {
        /// The image.
        path: PathBuf,
    },
    /// Others read it, and it was to be written.
    #[error(
        "cannot lock disk image {path} for writing: others are reading it, and readonly=on would read it with them"
    )]
    Read {
        /// The image.
        path: PathBuf,
    },
    /// The block device is part of the host's own system.
    #[error(
        "cannot write to {path}: the host uses it itself, as a mounted file system, swap or part of another device"
    )]
    Busy {
        /// The block device.
        path: PathBuf,
    },
    /// It cannot be examined.
    #[error("cannot {what} disk image {path}")]
    Examine {
        /// The image.
        path: PathBuf,
        /// What was attempted.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Its file system cannot do without the page cache.
    #[error(
        "cannot use disk image {path} with direct=on: its file system has no direct I/O (direct=off uses the page cache)"
    )]
    NoDirect {
        /// The image.
        path: PathBuf,
    },
    /// There is no io_uring for it.
    #[error("cannot set up io_uring for disk image {path} (engine=sync does without)")]
    Ring {
        /// The image.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The serial number is too long.
    #[error("cannot give disk image {path} the id {id:?}: it has more than 20 bytes")]
    Id {
        /// The image.
        path: PathBuf,
        /// The id asked for.
        id: String,
    },
}

/// An open disk image.
pub struct Image {
    file: Arc<Locked>,
    /// Keeps the host from mounting a block device that the guest writes.
    _claim: Option<File>,
    block_device: bool,
    sectors: u64,
    serial: String,
    /// Set if it is read and written past the host's page cache.
    direct: Option<Direct>,
    /// Data that was to be flushed is lost: the host reports that once, and then forgets it.
    flush_failed: bool,
}

/// An open file with a lock that ends here: a process that another thread starts at this time has the file open a moment longer.
struct Locked(File);

impl Drop for Locked {
    fn drop(&mut self) {
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

impl Image {
    /// Opens and locks the image at `path`.
    pub fn open(path: &Path, readonly: bool) -> Result<Self, Error> {
        Self::with_file(Arc::new(Locked(open(path, readonly)?)), path, readonly)
    }

    /// The descriptors that it is open as.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        [self.file()].into_iter().chain(&self._claim).map(AsRawFd::as_raw_fd)
    }

    /// The image at `path` in place of this one. If that is the same file, this one's lock is its own, and it has the size
    /// that the file has now.
    pub fn replace(&self, path: &Path, readonly: bool) -> Result<Self, Error> {
        let identity = |metadata: io::Result<fs::Metadata>| metadata.map(|it| (it.dev(), it.ino(), it.rdev()));
        let mut image = match (identity(self.file().metadata()), identity(fs::metadata(path))) {
            (Ok(this), Ok(other)) if this == other && !self.block_device => {
                let image = Self::with_file(self.file.clone(), path, readonly)?;
                Self { flush_failed: self.flush_failed, ..image }
            }
            _ => Self::open(path, readonly)?,
        };
        if self.direct.is_some() {
            image.pass_page_cache(path)?;
        }
        Ok(image)
    }

    /// Has the image at `path`, which this one is, be read and written past the host's page cache.
    pub fn pass_page_cache(&mut self, path: &Path) -> Result<(), Error> {
        let direct = Direct::new(self.file());
        let direct =
            direct.map_err(|source| Error::Examine { path: path.into(), what: "set up direct I/O of", source })?;
        self.direct = Some(direct.ok_or_else(|| Error::NoDirect { path: path.into() })?);
        Ok(())
    }

    fn with_file(file: Arc<Locked>, path: &Path, readonly: bool) -> Result<Self, Error> {
        let locked = file;
        let file = &locked.0;
        let examine = |what| move |source: io::Error| Error::Examine { path: path.into(), what, source };
        let metadata = file.metadata().map_err(examine("examine"))?;
        let kind = metadata.file_type();
        let block_device = kind.is_block_device();
        if !kind.is_file() && !block_device {
            let kind = match kind {
                _ if kind.is_dir() => "directory",
                _ if kind.is_fifo() => "pipe",
                _ if kind.is_char_device() => "character device",
                _ => "special file",
            };
            return Err(Error::Type { path: path.into(), kind });
        }
        if let Some(format) = foreign_format(file) {
            log::warn!(
                "disk image {} looks like {format}, and is used as a raw image: convert it first",
                path.display()
            );
        }
        // The size in a block device's metadata is zero.
        let bytes = if block_device {
            seek(file, SeekFrom::End(0)).map_err(|error| examine("find the size of")(error.into()))?
        } else {
            metadata.size()
        };
        if bytes == 0 {
            return Err(Error::Empty { path: path.into() });
        }
        if !bytes.is_multiple_of(SECTOR) {
            return Err(Error::Size { path: path.into(), bytes });
        }
        lock(file, path, readonly)?;
        let claim = if block_device && !readonly { Some(claim(path)?) } else { None };
        let serial = if block_device {
            format!("{:x}", metadata.rdev())
        } else {
            format!("{:x}-{:x}", metadata.dev(), metadata.ino())
        };
        let sectors = bytes / SECTOR;
        Ok(Self { file: locked, _claim: claim, block_device, sectors, serial, direct: None, flush_failed: false })
    }

    /// A ring for as many as `entries` requests on this image, which is at `path`.
    pub fn ring(&self, path: &Path, entries: u16) -> Result<Uring, Error> {
        self.wait_for_disk()
            .and_then(|()| Uring::new(self.file(), entries))
            .map_err(|source| Error::Ring { path: path.into(), source })
    }

    /// Has `ring` work on this image, which is at `path`, from now on.
    pub fn take_ring(&self, ring: &mut Uring, path: &Path) -> Result<(), Error> {
        self.wait_for_disk().and_then(|()| ring.set_file(self.file())).map_err(|source| Error::Examine {
            path: path.into(),
            what: "have io_uring work on",
            source,
        })
    }

    /// The kernel has io_uring wait for a disk only if the file says so.
    fn wait_for_disk(&self) -> io::Result<()> {
        let flags = fcntl_getfl(self.file())?;
        Ok(fcntl_setfl(self.file(), flags - OFlags::NONBLOCK)?)
    }

    fn file(&self) -> &File {
        &self.file.0
    }

    /// Its size in sectors.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// A name for it that no other file of this host has.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// What its offsets and lengths should be multiples of, in bytes, if the host has said so.
    pub fn unit(&self) -> Option<u64> {
        self.direct.as_ref().map(Direct::unit)
    }

    /// Fills `buffers` from byte `offset` on; those that remain were not filled.
    pub fn read(&self, buffers: &mut Iovecs, mut offset: u64) -> io::Result<()> {
        while !buffers.is_empty() {
            let is_direct = self.takes(buffers, offset);
            let count = self.by(is_direct, || buffers.preadv(self.file(), offset))?;
            if count == 0 {
                // The file was larger when it was opened.
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            buffers.advance(count);
            offset += count as u64;
        }
        Ok(())
    }

    /// Writes `buffers` to byte `offset` on.
    pub fn write(&self, buffers: &mut Iovecs, mut offset: u64) -> io::Result<()> {
        while !buffers.is_empty() {
            let is_direct = self.takes(buffers, offset);
            let count = self.by(is_direct, || buffers.pwritev(self.file(), offset))?;
            if count == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            buffers.advance(count);
            offset += count as u64;
        }
        Ok(())
    }

    /// Whether the buffers can be read or written as the image is open.
    pub fn takes(&self, buffers: &Iovecs, offset: u64) -> bool {
        self.direct.as_ref().is_none_or(|direct| direct.takes(buffers, offset))
    }

    /// Makes a `call` as the image is open, or by the page cache in any case.
    fn by<T>(&self, as_open: bool, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        match &self.direct {
            Some(direct) if !as_open => direct.by_page_cache(self.file(), call),
            _ => call(),
        }
    }

    /// Returns when all that was written is on the disk. After it failed once it always fails: the host drops what it
    /// could not write, and would report success the next time.
    pub fn flush(&mut self) -> io::Result<()> {
        self.check_flushed()?;
        let result = retry_on_intr(|| fdatasync(self.file()));
        self.flush_failed = result.is_err();
        Ok(result?)
    }

    /// Fails if a flush has.
    pub fn check_flushed(&self) -> io::Result<()> {
        match self.flush_failed {
            true => Err(io::Error::other("data was lost when a flush failed")),
            false => Ok(()),
        }
    }

    /// Whether a flush has failed.
    pub fn flush_has_failed(&self) -> bool {
        self.flush_failed
    }

    /// As if a flush had failed.
    pub fn fail_flushes(&mut self) {
        self.flush_failed = true;
    }

    /// Gives the blocks of the range back to the host, if it takes them; what is read there is undefined.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let result = if self.block_device {
            discard_blocks(self.file(), offset, len)
        } else {
            self.fallocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)
        };
        match result {
            // It is only a hint. A device refuses ranges that are not made of its own, larger blocks.
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(()),
            other => Ok(other?),
        }
    }

    /// Fills the range with zeros, giving its blocks back to the host if `unmap`.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let how = if unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        match self.fallocate(how | FallocateFlags::KEEP_SIZE, offset, len) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                self.by(false, || self.write_zeroes_by_hand(offset, len))
            }
            other => Ok(other?),
        }
    }

    fn write_zeroes_by_hand(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        let zeros = [0; 16 << 10];
        while len > 0 {
            let count = usize::try_from(len).map_or(zeros.len(), |len| len.min(zeros.len()));
            self.file().write_all_at(&zeros[..count], offset)?;
            offset += count as u64;
            len -= count as u64;
        }
        Ok(())
    }

    fn fallocate(&self, mode: FallocateFlags, offset: u64, len: u64) -> rustix::io::Result<()> {
        retry_on_intr(|| fallocate(self.file(), mode, offset, len))
    }
}

/// The format other than raw that the image's first bytes are a sign of.
fn foreign_format(image: &File) -> Option<&'static str> {
    const FORMATS: [(&[u8], &str); 6] = [
        (b"QFI\xfb", "qcow2"),
        (b"KDMV", "VMDK"),
        (b"vhdxfile", "VHDX"),
        (b"\x1f\x8b", "a file compressed with gzip"),
        (b"\xfd7zXZ\0", "a file compressed with xz"),
        (b"\x28\xb5\x2f\xfd", "a file compressed with zstd"),
    ];
    let mut start = [0; 8];
    let len = image.read_at(&mut start, 0).ok()?;
    FORMATS.iter().find(|(magic, _)| start[..len].starts_with(magic)).map(|(_, format)| *format)
}

fn open(path: &Path, readonly: bool) -> Result<File, Error> {
    // Opening a pipe would otherwise wait for its other end.
    let options = |write| OpenOptions::new().read(true).write(write).custom_flags(libc::O_NONBLOCK).clone();
    match options(!readonly).open(path) {
        Ok(file) => Ok(file),
        Err(source) if source.kind() == io::ErrorKind::IsADirectory => {
            Err(Error::Type { path: path.into(), kind: "directory" })
        }
        Err(source) if !readonly && options(false).open(path).is_ok() => {
            Err(Error::ReadOnly { path: path.into(), source })
        }
        Err(source) => Err(Error::Open { path: path.into(), source }),
    }
}

/// How often a lock is tried again that somebody has, and after how long.
const LOCK_TRIES: u32 = 15;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// One writer excludes all others; readers share. The lock ends with the open file.
fn lock(file: &File, path: &Path, readonly: bool) -> Result<(), Error> {
    let how = if readonly { FlockOperation::NonBlockingLockShared } else { FlockOperation::NonBlockingLockExclusive };
    let mut locked = flock(file, how);
    // Of a process that was killed the kernel closes an io_uring, and the file in it, a moment after it has gone.
    for _ in 0..LOCK_TRIES {
        if locked != Err(Errno::WOULDBLOCK) {
            break;
        }
        std::thread::sleep(LOCK_PAUSE);
        locked = flock(file, how);
    }
    match locked {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) if !readonly && flock(file, FlockOperation::NonBlockingLockShared).is_ok() => {
            Err(Error::Read { path: path.into() })
        }
        Err(Errno::WOULDBLOCK) => Err(Error::Written { path: path.into() }),
        // A file system without locks: there is nothing to be had.
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOLCK) => {
            log::warn!("cannot lock disk image {}: its file system has no locks", path.display());
            Ok(())
        }
        Err(error) => Err(Error::Examine { path: path.into(), what: "lock", source: error.into() }),
    }
}

/// Opens a block device so that nothing in the host's kernel can use it meanwhile.
fn claim(path: &Path) -> Result<File, Error> {
    OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(path).map_err(|source| match source.kind() {
        io::ErrorKind::ResourceBusy => Error::Busy { path: path.into() },
        _ => Error::Open { path: path.into(), source },
    })
}

#[cfg(test)]
mod tests {
    use tempfile::NamedTempFile;

    use super::*;

    fn image(bytes: u64) -> NamedTempFile {
        image_in(std::env::temp_dir(), bytes)
    }

    fn image_in(folder: impl AsRef<Path>, bytes: u64) -> NamedTempFile {
        let file = NamedTempFile::new_in(folder).unwrap();
        file.as_file().set_len(bytes).unwrap();
        file
    }

    fn error(path: &Path, readonly: bool) -> String {
        let Err(error) = Image::open(path, readonly) else { panic!("{} opened", path.display()) };
        error.to_string()
    }

    #[test]
    fn what_is_no_image_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        for readonly in [false, true] {
            assert_eq!(error(&path, readonly), format!("cannot open disk image {}", path.display()));
            assert!(error(folder.path(), readonly).contains("a directory"));
            assert!(error(Path::new("/dev/null"), readonly).contains("a character device"));
            assert!(error(image(0).path(), readonly).contains("empty"));
            assert!(error(image(1025).path(), readonly).contains("1025 bytes"));
        }
        let status = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
        assert!(status.success());
        assert!(error(&path, false).contains("a pipe"));
    }

    #[test]
    fn direct_io_is_had_or_refused() {
        // Attributes of sysfs say that they have 4096 bytes, and have no direct I/O.
        let path = Path::new("/sys/kernel/uevent_seqnum");
        let mut image = Image::open(path, true).unwrap();
        let error = image.pass_page_cache(path).unwrap_err().to_string();
        assert!(error.contains("uevent_seqnum with direct=on: its file system has no direct I/O"), "{error}");

        let file = image_in("/var/tmp", 8192);
        let mut image = Image::open(file.path(), false).unwrap();
        let flags = |image: &Image| rustix::fs::fcntl_getfl(image.file()).unwrap() & rustix::fs::OFlags::DIRECT;
        assert!(flags(&image).is_empty());
        if let Err(error) = image.pass_page_cache(file.path()) {
            return eprintln!("skipped: {error}");
        }
        assert!(!flags(&image).is_empty());
        image.by(false, || image.write_zeroes_by_hand(512, 512)).unwrap();
        assert!(!flags(&image).is_empty());
        let same = image.replace(file.path(), false).unwrap();
        let meanwhile = same.by(false, || Ok(flags(&same))).unwrap();
        assert!(meanwhile.is_empty() && !flags(&same).is_empty());
        // The same file, and another.
        for path in [file.path(), image_in("/var/tmp", 512).path()] {
            assert!(!flags(&image.replace(path, false).unwrap()).is_empty());
        }
    }

    #[test]
    fn other_formats_are_known_by_their_first_bytes() {
        let format = |start: &[u8]| {
            let file = image(512);
            file.as_file().write_all_at(start, 0).unwrap();
            foreign_format(file.as_file())
        };
        assert_eq!(format(b"QFI\xfb\0\0\0\x03"), Some("qcow2"));
        assert_eq!(format(b"\x1f\x8b\x08"), Some("a file compressed with gzip"));
        assert_eq!(format(b"QFI"), None);
        assert_eq!(foreign_format(image(0).as_file()), None);
    }

    #[test]
    fn what_can_only_be_read_is_said_so() {
        // Nobody, not even root, writes a program that runs.
        let program = std::env::current_exe().unwrap();
        assert!(error(&program, false).contains("readonly=on"));
    }

    #[test]
    fn one_writes_or_many_read() {
        let file = image(1024);
        let writer = Image::open(file.path(), false).unwrap();
        for readonly in [false, true] {
            let error = error(file.path(), readonly);
            assert!(error.contains("being written") && !error.contains("readonly=on"), "{error}");
        }
        drop(writer);
        let readers = [(); 2].map(|()| Image::open(file.path(), true).unwrap());
        assert!(error(file.path(), false).contains("readonly=on"));
        drop(readers);
        assert_eq!(Image::open(file.path(), false).unwrap().sectors(), 2);
    }

    #[test]
    fn zeros_are_written_where_the_host_has_no_call_for_it() {
        let file = image(128 << 10);
        file.as_file().write_all_at(&[7; 128 << 10], 0).unwrap();
        let image = Image::open(file.path(), false).unwrap();
        image.write_zeroes_by_hand(512, 100 << 10).unwrap();
        let data = std::fs::read(file.path()).unwrap();
        assert_eq!(data.len(), 128 << 10);
        let (zeros, rest) = ((100 << 10) + 512, 7);
        assert!(data[..512].iter().chain(&data[zeros..]).all(|byte| *byte == rest));
        assert!(data[512..zeros].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_flush_that_failed_never_succeeds() {
        let file = image(512);
        let mut image = Image::open(file.path(), false).unwrap();
        image.flush().unwrap();
        image.fail_flushes();
        assert!(image.flush().is_err());
    }
}

//! A disk image on the host: a raw file or a block device, locked against other writers.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::mem::{replace, swap};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{
    FallocateFlags, FlockOperation, OFlags, SeekFrom, fallocate, fcntl_getfl, fcntl_setfl, fdatasync, flock, seek,
};
use rustix::io::{DupFlags, Errno, dup3, retry_on_intr};

use super::SECTOR;
use super::direct::Direct;
use super::ioctl::discard_blocks;
use super::uring::Uring;
use crate::virtio::iovec::Iovecs;
use crate::virtio::{change, device};

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

/// A file or block device that is open, and is to be a disk's. Clones are the same one, which one disk takes.
#[derive(Debug, Clone)]
pub struct Opened {
    path: PathBuf,
    readonly: bool,
    file: Arc<Mutex<Option<(File, Metadata)>>>,
    /// It is a block device to be written that the host's kernel uses, or another machine, or this disk already.
    is_busy: bool,
}

impl Opened {
    /// Opens the file or block device at `path`. What it is, is looked at by the disk.
    ///
    /// # Errors
    /// When this process may not open it.
    pub fn open(path: &Path, readonly: bool) -> Result<Self, Error> {
        let (file, is_busy) = open(path, readonly)?;
        let examine = |source| Error::Examine { path: path.into(), what: "examine", source };
        let metadata = file.metadata().map_err(examine)?;
        Ok(Self { path: path.into(), readonly, file: Arc::new(Mutex::new(Some((file, metadata)))), is_busy })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is open, once.
    fn take(&self) -> Option<(File, Metadata)> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// An open disk image.
pub struct Image {
    file: Locked,
    readonly: bool,
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

impl Locked {
    /// Gives the number of this descriptor to the one of `other`, and has one that was free.
    fn give_number(&mut self, other: &mut Self) -> io::Result<()> {
        let moved = self.0.try_clone()?;
        let mut number = OwnedFd::from(replace(&mut self.0, moved));
        let given = dup3(&other.0, &mut number, DupFlags::CLOEXEC);
        let keeper = if given.is_ok() { other } else { self };
        keeper.0 = number.into();
        Ok(given?)
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

impl Image {
    /// Opens and locks the image at `path`.
    pub fn open(path: &Path, readonly: bool) -> Result<Self, Error> {
        let opened = Opened::open(path, readonly)?;
        let file = opened.take().expect("nobody else has it");
        Self::with_file(file, &opened, readonly)
    }

    /// The descriptor that it is open as, for as long as it is there.
    pub fn descriptor(&self) -> RawFd {
        self.file().as_raw_fd()
    }

    /// Has what is `opened` take the place of the image, also in its `ring`, if there is one. If that is the same file, the
    /// image has the size that the file has now. On an error it is what it was, unless the device [gave
    /// up](change::Error::Device).
    pub fn replace(&mut self, opened: &Opened, ring: Option<&mut Uring>) -> Result<(), change::Error> {
        let path = opened.path();
        let examine = |what| move |source: io::Error| Error::Examine { path: path.into(), what, source };
        let taken = || io::Error::other("another disk has it already");
        if opened.readonly != self.readonly {
            let other = if opened.readonly { "it was opened for reading only" } else { "it was opened to be written" };
            return Err(examine("use")(io::Error::other(other)).into());
        }
        let (file, metadata) = opened.take().ok_or_else(taken).map_err(examine("use"))?;
        let own = self.file().metadata().map_err(examine("examine"))?;
        let [this, that] = [&own, &metadata].map(|it| (it.dev(), it.ino(), it.rdev()));
        if this == that {
            self.sectors = sectors(self.file(), &metadata, path)?;
            return Ok(());
        }
        let mut other = Self::with_file((file, metadata), opened, self.readonly)?;
        if self.direct.is_some() {
            other.pass_page_cache(path)?;
        }
        // Other threads have filters that name it.
        self.file.give_number(&mut other.file).map_err(examine("take the place of the last one with"))?;
        if let Some(ring) = ring
            && let Err(error) = other.take_ring(ring, path)
        {
            let lost = |source| device::Error::Host { what: "cannot go back to the disk's last image".into(), source };
            other.file.give_number(&mut self.file).map_err(lost)?;
            // The kernel lets go of one file before it takes the next.
            self.take_ring(ring, path).map_err(|error| lost(io::Error::other(error)))?;
            return Err(error.into());
        }
        swap(self, &mut other);
        Ok(())
    }

    /// Has the image at `path`, which this one is, be read and written past the host's page cache.
    pub fn pass_page_cache(&mut self, path: &Path) -> Result<(), Error> {
        let direct = Direct::new(self.file());
        let direct =
            direct.map_err(|source| Error::Examine { path: path.into(), what: "set up direct I/O of", source })?;
        self.direct = Some(direct.ok_or_else(|| Error::NoDirect { path: path.into() })?);
        Ok(())
    }

    /// What was taken from `opened`, locked.
    fn with_file((file, metadata): (File, Metadata), opened: &Opened, readonly: bool) -> Result<Self, Error> {
        let path = opened.path();
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
        if let Some(format) = foreign_format(&file) {
            log::warn!(
                "disk image {} looks like {format}, and is used as a raw image: convert it first",
                path.display()
            );
        }
        let sectors = sectors(&file, &metadata, path)?;
        lock(&file, path, readonly)?;
        let file = Locked(file);
        if opened.is_busy {
            return Err(Error::Busy { path: path.into() });
        }
        let serial = if block_device {
            format!("{:x}", metadata.rdev())
        } else {
            format!("{:x}-{:x}", metadata.dev(), metadata.ino())
        };
        Ok(Self { file, readonly, block_device, sectors, serial, direct: None, flush_failed: false })
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

/// The size of the image.
fn sectors(file: &File, metadata: &Metadata, path: &Path) -> Result<u64, Error> {
    let end = || seek(file, SeekFrom::End(0));
    // That in a block device's metadata is zero.
    let bytes = if metadata.file_type().is_block_device() { end() } else { Ok(metadata.size()) };
    let what = "find the size of";
    match bytes.map_err(|error| Error::Examine { path: path.into(), what, source: error.into() })? {
        0 => Err(Error::Empty { path: path.into() }),
        bytes if !bytes.is_multiple_of(SECTOR) => Err(Error::Size { path: path.into(), bytes }),
        bytes => Ok(bytes / SECTOR),
    }
}

/// Opening a pipe would otherwise wait for its other end.
fn options(write: bool) -> OpenOptions {
    OpenOptions::new().read(true).write(write).custom_flags(libc::O_NONBLOCK).clone()
}

/// A file, or a block device that is claimed if it is to be written: nothing in the host's kernel can use it meanwhile, as a file
/// system. And whether it could not be, as it is in use.
fn open(path: &Path, readonly: bool) -> Result<(File, bool), Error> {
    // Other files do not know of claims.
    let claim = || options(true).custom_flags(libc::O_NONBLOCK | libc::O_EXCL).open(path);
    let is_busy =
        |opened: &io::Result<File>| opened.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy);
    let opened = if readonly { options(false).open(path) } else { until(claim, |opened| !is_busy(opened)) };
    let is_busy = is_busy(&opened);
    let opened = if is_busy { options(!readonly).open(path) } else { opened };
    match opened {
        Ok(file) => Ok((file, is_busy)),
        Err(source) if source.kind() == io::ErrorKind::IsADirectory => {
            Err(Error::Type { path: path.into(), kind: "directory" })
        }
        Err(source) if !readonly && options(false).open(path).is_ok() => {
            Err(Error::ReadOnly { path: path.into(), source })
        }
        Err(source) => Err(Error::Open { path: path.into(), source }),
    }
}

/// How often a lock or a claim is tried again that somebody has, and after how long.
const LOCK_TRIES: u32 = 15;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// Tries until it is `done`, for a while: of a process that was killed the kernel closes an io_uring, and the file in it, a moment
/// after it has gone.
fn until<T>(mut attempt: impl FnMut() -> T, done: impl Fn(&T) -> bool) -> T {
    let mut result = attempt();
    for _ in 0..LOCK_TRIES {
        if done(&result) {
            break;
        }
        std::thread::sleep(LOCK_PAUSE);
        result = attempt();
    }
    result
}

/// One writer excludes all others; readers share. The lock ends with the open file.
fn lock(file: &File, path: &Path, readonly: bool) -> Result<(), Error> {
    let how = if readonly { FlockOperation::NonBlockingLockShared } else { FlockOperation::NonBlockingLockExclusive };
    match until(|| flock(file, how), |locked| *locked != Err(Errno::WOULDBLOCK)) {
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
        let meanwhile = image.by(false, || Ok(flags(&image))).unwrap();
        assert!(meanwhile.is_empty() && !flags(&image).is_empty());
        // The same file, and another.
        for path in [file.path(), image_in("/var/tmp", 512).path()] {
            image.replace(&Opened::open(path, false).unwrap(), None).unwrap();
            assert!(!flags(&image).is_empty());
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
    fn another_image_has_the_number_of_the_first() {
        let [first, second] = [1024, 2048].map(image);
        let opened = |file: &NamedTempFile| Opened::open(file.path(), false).unwrap();
        let mut disk = Image::open(first.path(), false).unwrap();
        let number = disk.descriptor();
        let is_locked = |file: &NamedTempFile| Image::open(file.path(), false).is_err();

        disk.replace(&opened(&second), None).unwrap();
        assert_eq!((disk.descriptor(), disk.sectors()), (number, 4));
        assert_eq!([&first, &second].map(is_locked), [false, true]);
        let identity = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
        assert_eq!(identity(disk.file().metadata().unwrap()), identity(second.as_file().metadata().unwrap()));

        // One that somebody has, or that is none, changes nothing; nor does one that another disk has taken.
        let other = Image::open(first.path(), false).unwrap();
        let taken = opened(&first);
        assert!(matches!(disk.replace(&taken, None), Err(change::Error::Disk(Error::Written { .. }))));
        drop(other);
        assert!(disk.replace(&taken, None).unwrap_err().to_string().starts_with("cannot use disk image "));
        assert!(matches!(disk.replace(&opened(&image(0)), None), Err(change::Error::Disk(Error::Empty { .. }))));
        let unwritable = disk.replace(&Opened::open(first.path(), true).unwrap(), None).unwrap_err();
        assert_eq!(std::error::Error::source(&unwritable).unwrap().to_string(), "it was opened for reading only");
        assert_eq!((disk.descriptor(), disk.sectors()), (number, 4));
        assert_eq!([&first, &second].map(is_locked), [false, true]);

        // What was lost of one is not lost of another.
        disk.fail_flushes();
        second.as_file().set_len(4096).unwrap();
        disk.replace(&opened(&second), None).unwrap();
        assert_eq!((disk.sectors(), disk.flush_has_failed()), (8, true));
        disk.replace(&opened(&first), None).unwrap();
        assert_eq!((disk.descriptor(), disk.sectors(), disk.flush_has_failed()), (number, 2, false));
        assert_eq!([&first, &second].map(is_locked), [true, false]);
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

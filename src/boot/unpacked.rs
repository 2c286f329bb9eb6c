//! Kernels that were unpacked before: the ELF file in a bzImage is kept, and mapped by each machine that has the same.
//!
//! ```text
//! unpacked/HEX         the ELF file in the payload with this SHA-256 digest
//! unpacked/.HEX        one being unpacked: locked exclusively (flock) by the process that does it
//! unpacked/file-HEX    a symbolic link: what is in the bzImage with this stamp, beginning and end, so that it is not read
//! ```
//!
//! A kernel appears by a rename, when all of it is on the disk. It was last written to in 1970: whoever writes to it changes
//! that, and it is not used any more. The folder is the user's own, and nobody else may write to it. Where there is no such
//! folder, or anything else is wrong with it, each machine unpacks its kernel for itself.

use std::fs::{DirBuilder, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{
    AtFlags, Dir, FileType, FlockOperation, Mode, OFlags, Stat, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, fstat,
    fstatvfs, futimens, openat, readlinkat, renameat, statat, symlinkat, unlinkat,
};
use rustix::io::Errno;
use rustix::process::{Uid, geteuid};

use super::elf;
use super::payload::Payload;
use super::unpack::unpack;
use crate::image::cache::{Stamp, try_lock, user_folder};
use crate::image::digest::Digest;

/// The most bytes of kernels that are kept.
const KEPT_MAX: u64 = 2 << 30;
/// One that was used within so many seconds is not replaced by another. When more are used in turn than there is room for, each
/// would otherwise be gone when it is wanted again, and written anew.
const IN_USE: u64 = 24 * 3600;
/// The most files that are known to have one of them.
const FILES: u64 = 64;
/// More bytes than a kernel that is kept has; a distribution's has 60 MB.
const SIZE_MAX: u64 = 256 << 20;
/// How long another process may take to unpack the same kernel.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is asked whether it has.
const INTERVAL: Duration = Duration::from_millis(5);
/// Uses that come sooner after one another are not noted, in seconds.
const NOTED: i64 = 3600;
/// What is written at once; if it is zeros, it is not.
const BLOCK: usize = 64 << 10;

const FILE: &str = "file-";

/// Where unpacked kernels are kept.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Cache {
    /// Nowhere: each machine unpacks its own.
    #[default]
    Off,
    /// In the user's cache: `bantam/unpacked` in `XDG_CACHE_HOME`, or in `~/.cache`.
    User,
    /// In this folder, which is made when the first kernel is.
    Folder(PathBuf),
}

impl Cache {
    /// What is in `payload`, of a bzImage that begins with `head`. `None` if a machine has to unpack it for itself.
    pub(super) fn open(&self, payload: &Payload<'_>, head: &[u8]) -> Option<Unpacked> {
        let path = match self {
            Self::Off => return None,
            Self::User => user_folder().map(|folder| folder.join("unpacked")),
            Self::Folder(path) => Some(path.clone()),
        };
        let Some(path) = path else {
            log::debug!("unpacking the kernel for this machine alone: neither XDG_CACHE_HOME nor HOME is set");
            return None;
        };
        let open = || {
            let folder = Folder::open(&path)?;
            // One that is too new has no stamp.
            let stamp = Stamp::of(payload.file)?;
            let name = stamp.map(|stamp| file_name(&[stamp.bytes(), head.to_vec(), payload.end().to_vec()]));
            folder.find_or_unpack(payload, name)
        };
        match open() {
            Ok(unpacked) => Some(unpacked),
            Err(error) => {
                let path = path.display();
                log::debug!("unpacking the kernel for this machine alone: cannot keep it in {path}: {error}");
                None
            }
        }
    }
}

/// An unpacked kernel.
pub(super) struct Unpacked {
    /// If it was not there before. It goes before the lock on the file does.
    new: Option<New>,
    /// Where it was, and under which name.
    found: Option<(Folder, String)>,
    /// The ELF file.
    pub file: File,
    /// Its length.
    pub len: u64,
}

impl Unpacked {
    /// It cannot be loaded: the next machine unpacks the kernel again, whatever is wrong.
    pub fn remove(self) {
        if let Some((folder, name)) = &self.found
            && unlinkat(&folder.fd, name, AtFlags::empty()).is_ok()
        {
            log::warn!("the unpacked kernel {} may be damaged, and is removed", folder.path.join(name).display());
        }
    }

    /// It can be loaded: has others find it.
    pub fn keep(self) {
        if let Some(new) = self.new
            && let Err(error) = new.publish(&self.file)
        {
            log::debug!("cannot keep the unpacked kernel: {error}");
        }
    }
}

/// A kernel that only this process knows of. It goes with this.
struct New {
    folder: Folder,
    name: String,
    file_name: Option<String>,
}

impl New {
    fn publish(&self, file: &File) -> io::Result<()> {
        let folder = &self.folder;
        let times = Timestamps { last_access: at(UTIME_NOW), last_modification: at(0) };
        futimens(file, &times)?;
        file.sync_all()?;
        renameat(&folder.fd, being_unpacked(&self.name), &folder.fd, &self.name)?;
        log::debug!("the kernel is unpacked as {}", folder.path.join(&self.name).display());
        folder.name(self.file_name.as_deref(), &self.name)
    }
}

impl Drop for New {
    fn drop(&mut self) {
        // Unless it has another name by now.
        let _ = unlinkat(&self.folder.fd, being_unpacked(&self.name), AtFlags::empty());
    }
}

fn at(tv_nsec: i64) -> Timespec {
    Timespec { tv_sec: 0, tv_nsec }
}

fn being_unpacked(name: &str) -> String {
    format!(".{name}")
}

/// What a bzImage is known by without being read: its stamp, its beginning and its end. The ends tell files apart that have the
/// same stamp, as it is in images of file systems that were made with one time for all.
fn file_name(parts: &[Vec<u8>; 3]) -> String {
    format!("{FILE}{}", Digest::of(&parts.concat()).hex())
}

fn is_digest(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Whether this user has it, and no other may write to it.
fn is_own(stat: &Stat, user: Uid) -> bool {
    stat.st_uid == user.as_raw() && stat.st_mode & 0o022 == 0
}

fn is_same(one: &Stat, other: &Stat) -> bool {
    (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
}

/// The folder of unpacked kernels.
struct Folder {
    fd: OwnedFd,
    path: PathBuf,
    user: Uid,
}

impl Folder {
    fn open(path: &Path) -> io::Result<Self> {
        // Root may have been lent the home of a user, who may have put a link to any folder of root's there.
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = || rustix::fs::open(path, flags, Mode::empty());
        let fd = match open() {
            Err(Errno::NOENT) => {
                make(path)?;
                open()?
            }
            opened => opened?,
        };
        let user = geteuid();
        if !is_own(&fstat(&fd)?, user) {
            return Err(io::Error::other("it is another user's, or others may write to it"));
        }
        Ok(Self { fd, path: path.into(), user })
    }

    /// What is in `payload`, which the bzImage with this name has.
    fn find_or_unpack(self, payload: &Payload<'_>, file_name: Option<String>) -> io::Result<Unpacked> {
        let len = payload.unpacked_size();
        if len.max(payload.len()) > SIZE_MAX {
            return Err(io::Error::other(format!("it has more than {} MiB", SIZE_MAX >> 20)));
        }
        if let Some(file_name) = &file_name
            && let Ok(name) = readlinkat(&self.fd, file_name, vec![])
            && let Some(name) = name.to_str().ok().filter(|name| is_digest(name))
            && let Some(file) = self.find(name, len)?
        {
            let found = Some((self, name.to_owned()));
            return Ok(Unpacked { file, len, new: None, found });
        }
        // What is unpacked is what the digest is of, whoever writes to the file meanwhile.
        let packed = payload.read()?;
        let name = Digest::of(&packed).hex();
        let begin = Instant::now();
        loop {
            if let Some(file) = self.find(&name, len)? {
                // It serves without, and is read again.
                let _ = self.name(file_name.as_deref(), &name);
                return Ok(Unpacked { file, len, new: None, found: Some((self, name)) });
            }
            if !self.has_room(&name, len)? {
                let why = format!("kernels of {} MiB were used within a day", KEPT_MAX >> 20);
                return Err(io::Error::other(why));
            }
            if let Some(file) = self.begin(&name)? {
                let new = New { folder: self, name, file_name };
                // Another process may have been done with it just now.
                if let Some(file) = new.folder.find(&new.name, len)? {
                    return Ok(Unpacked { new: None, file, len, found: None });
                }
                let space = fstatvfs(&new.folder.fd)?;
                // What others write meanwhile should find some, too.
                if space.f_bavail.saturating_mul(space.f_frsize) < 2 * len {
                    return Err(Errno::NOSPC.into());
                }
                let compressed = usize::try_from(payload.packed_len()).map_err(io::Error::other)?;
                write(payload, &packed[..compressed], len, &file)?;
                return Ok(Unpacked { file, len, new: Some(new), found: None });
            }
            if begin.elapsed() > PATIENCE {
                return Err(io::Error::other("another process does not get done with it"));
            }
            thread::sleep(INTERVAL);
        }
    }

    /// The kernel of this name, if it is there and whole.
    fn find(&self, name: &str, len: u64) -> io::Result<Option<File>> {
        let flags = OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = match openat(&self.fd, name, flags, Mode::empty()) {
            Err(Errno::NOENT | Errno::LOOP) => return Ok(None),
            opened => opened?,
        };
        let stat = fstat(&file)?;
        let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        let is_whole = u64::try_from(stat.st_size) == Ok(len) && (stat.st_mtime, stat.st_mtime_nsec) == (0, 0);
        let path = || self.path.join(name);
        if !(is_file && is_own(&stat, self.user) && is_whole) {
            log::debug!("the unpacked kernel {} is damaged, and unpacked again", path().display());
            return Ok(None);
        }
        if stat.st_atime.saturating_add(NOTED) < now() {
            // On a read-only file system it is not noted.
            let times = Timestamps { last_access: at(UTIME_NOW), last_modification: at(UTIME_OMIT) };
            let _ = futimens(&file, &times);
        }
        log::debug!("mapping the unpacked kernel {}", path().display());
        Ok(Some(file.into()))
    }

    /// Whether there is room for the kernel of this name and length beside those that are in use.
    fn has_room(&self, own: &str, len: u64) -> io::Result<bool> {
        let mut room = KEPT_MAX.checked_sub(len);
        for entry in Dir::read_from(&self.fd)? {
            let entry = entry?;
            if let Ok(name) = entry.file_name().to_str()
                && is_digest(name)
                && name != own
                && let Ok(stat) = statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW)
                // Clocks have been wrong before.
                && stat.st_atime.abs_diff(now()) < IN_USE
            {
                room = room.and_then(|room| room.checked_sub(size(&stat)));
            }
        }
        Ok(room.is_some())
    }

    /// An empty file for the kernel of this name; `None` if another process has unpacked it, or does so.
    fn begin(&self, name: &str) -> io::Result<Option<File>> {
        let Some(file) = self.lock(&being_unpacked(name), OFlags::CREATE)? else { return Ok(None) };
        // A killed process may have left it.
        file.set_len(0)?;
        Ok(Some(file))
    }

    /// Locks a file that nobody has locked.
    fn lock(&self, name: &str, more: OFlags) -> io::Result<Option<File>> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK | more;
        let file = File::from(openat(&self.fd, name, flags, Mode::RUSR | Mode::WUSR)?);
        if !try_lock(&file, FlockOperation::NonBlockingLockExclusive)? {
            return Ok(None);
        }
        // It may have another name by now.
        let there = statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW);
        Ok(there.is_ok_and(|there| fstat(&file).is_ok_and(|open| is_same(&open, &there))).then_some(file))
    }

    /// Notes that the file of this name has the kernel `name` in it, and clears away what is too much.
    fn name(&self, file_name: Option<&str>, name: &str) -> io::Result<()> {
        if let Some(file_name) = file_name {
            let _ = unlinkat(&self.fd, file_name, AtFlags::empty());
            match symlinkat(name, &self.fd, file_name) {
                // Another process was as fast.
                Err(Errno::EXIST) => {}
                linked => linked?,
            }
        }
        self.sweep()
    }

    fn sweep(&self) -> io::Result<()> {
        let (mut kernels, mut files) = (vec![], vec![]);
        for entry in Dir::read_from(&self.fd)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().to_str() else { continue };
            let Ok(stat) = statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            if is_digest(name) {
                kernels.push((stat.st_atime, stat.st_atime_nsec, size(&stat), name.to_owned()));
            } else if name.strip_prefix(FILE).is_some_and(is_digest) {
                files.push((stat.st_mtime, stat.st_mtime_nsec, 1, name.to_owned()));
            } else if name.strip_prefix('.').is_some_and(is_digest)
                && let Ok(Some(_lock)) = self.lock(name, OFlags::empty())
            {
                let _ = unlinkat(&self.fd, name, AtFlags::empty());
            }
        }
        for (mut found, max) in [(kernels, KEPT_MAX), (files, FILES)] {
            found.sort_unstable_by(|one, other| other.cmp(one));
            let mut room = max;
            for (_, _, size, name) in found {
                match room.checked_sub(size) {
                    Some(left) => room = left,
                    None => drop(unlinkat(&self.fd, name, AtFlags::empty())),
                }
            }
        }
        Ok(())
    }
}

/// The time, in seconds since 1970.
fn now() -> i64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs().cast_signed()
}

fn size(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or_default()
}

/// Makes the folder. Root leaves nothing of its own in the home of a user whom it is only lent by.
fn make(path: &Path) -> io::Result<()> {
    let parent = path.ancestors().skip(1).find_map(|path| path.metadata().ok());
    let owner = parent.map_or(0, |parent| parent.uid());
    if owner != 0 && owner != geteuid().as_raw() {
        return Err(io::Error::other("it would be in another user's folder"));
    }
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Writes the ELF file in `packed` to an empty file, leaving out zeros.
fn write(payload: &Payload<'_>, packed: &[u8], len: u64, file: &File) -> io::Result<()> {
    let invalid = |why| io::Error::new(io::ErrorKind::InvalidData, why);
    let unpacked = unpack(payload.compression, packed).transpose()?;
    let mut unpacked = unpacked.ok_or_else(|| invalid("only the guest can unpack it"))?.take(len);
    let (mut block, mut done) = (Vec::with_capacity(BLOCK), 0);
    loop {
        block.clear();
        (&mut unpacked).take(BLOCK as u64).read_to_end(&mut block)?;
        if done == 0 && !block.starts_with(&elf::MAGIC) {
            return Err(invalid("it is not an ELF file"));
        }
        if block.is_empty() {
            break;
        }
        if block != [0; BLOCK][..block.len()] {
            file.write_all_at(&block, done)?;
        }
        done += block.len() as u64;
    }
    if done < len {
        return Err(invalid("it is shorter than it says"));
    }
    file.set_len(len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::bzimage::BzImage;
    use crate::boot::fixture::{DATA, DATA_END, PHDR, bzimage, elf, patch};
    use crate::boot::kernel::{Kernel, Reason, load_with};
    use crate::memory::{GuestRam, reserve};
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};
    use tempfile::{NamedTempFile, TempDir};
    use vm_memory::{Bytes, GuestAddress};

    /// An ELF kernel with this byte at the start of its data.
    fn kernel(byte: u8) -> Vec<u8> {
        let mut kernel = elf();
        patch(&mut kernel, DATA, [byte]);
        kernel
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut packed = vec![];
        flate2::read::GzEncoder::new(bytes, flate2::Compression::best()).read_to_end(&mut packed).unwrap();
        packed
    }

    fn image_of(kernel: &[u8]) -> NamedTempFile {
        let file = NamedTempFile::new().unwrap();
        fs::write(file.path(), bzimage(&gzip(kernel))).unwrap();
        file
    }

    /// Where what `kernel` unpacks from is kept.
    fn place(folder: &Path, kernel: &[u8]) -> PathBuf {
        folder.join(Digest::of(&gzip(kernel)).hex())
    }

    fn load(image: &NamedTempFile, folder: &Path) -> (GuestRam, Kernel) {
        let ram = reserve(&[0..64 << 20]).unwrap();
        let kernel = load_with(&ram, image.path(), &Cache::Folder(folder.into())).unwrap();
        (ram, kernel)
    }

    fn first_byte(ram: &GuestRam) -> u8 {
        ram.read_obj(GuestAddress(0x20_0000)).unwrap()
    }

    /// Replaces what is kept by what has another byte, without a trace.
    fn replace(place: &Path, kernel: &[u8]) {
        fs::write(place, kernel).unwrap();
        let times = Timestamps { last_access: at(UTIME_OMIT), last_modification: at(0) };
        futimens(File::open(place).unwrap(), &times).unwrap();
    }

    /// What is there, but for the names of files, which those that are not new have.
    fn names(folder: &Path) -> Vec<String> {
        let mut names = all_names(folder);
        names.retain(|name| !name.starts_with(FILE));
        names.sort_unstable();
        names
    }

    fn all_names(folder: &Path) -> Vec<String> {
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    fn folder() -> (TempDir, PathBuf) {
        let parent = TempDir::new().unwrap();
        let folder = parent.path().join("bantam/unpacked");
        (parent, folder)
    }

    #[test]
    fn a_kernel_is_unpacked_once() {
        let (_parent, folder) = folder();
        let image = image_of(&kernel(1));
        let (ram, first) = load(&image, &folder);
        let place = place(&folder, &kernel(1));
        assert_eq!(fs::read(&place).unwrap(), kernel(1));
        let [file, all] = [&place, &folder].map(|path| fs::metadata(path).unwrap());
        assert_eq!((file.mode() & 0o777, file.mtime(), all.mode() & 0o777), (0o600, 0, 0o700));
        let mut data = vec![0; DATA_END - DATA];
        ram.read_slice(&mut data, GuestAddress(0x20_0000)).unwrap();
        assert_eq!(data, kernel(1)[DATA..DATA_END]);

        replace(&place, &kernel(7));
        let (ram, second) = load(&image, &folder);
        assert_eq!((first_byte(&ram), format!("{first:?}")), (7, format!("{second:?}")));
        // The same payload in another file.
        assert_eq!(first_byte(&load(&image_of(&kernel(1)), &folder).0), 7);
        assert_eq!(first_byte(&load(&image_of(&kernel(2)), &folder).0), 2);
    }

    #[test]
    fn what_is_damaged_is_not_used() {
        let (_parent, folder) = folder();
        let image = image_of(&kernel(1));
        let place = place(&folder, &kernel(1));
        type Damage = (&'static str, fn(&Path));
        let damages: [Damage; 6] = [
            ("truncated", |path| File::options().write(true).open(path).unwrap().set_len(100).unwrap()),
            ("empty", |path| replace(path, b"")),
            ("longer", |path| replace(path, &[kernel(7), vec![0]].concat())),
            ("changed", |path| fs::write(path, kernel(7)).unwrap()),
            ("others may write to it", |path| {
                replace(path, &kernel(7));
                fs::set_permissions(path, Permissions::from_mode(0o620)).unwrap();
            }),
            ("a link", |path| {
                let other = path.with_file_name("other");
                fs::rename(path, &other).unwrap();
                replace(&other, &kernel(7));
                symlink(other, path).unwrap();
            }),
        ];
        load(&image, &folder);
        for (what, damage) in damages {
            damage(&place);
            assert_eq!(first_byte(&load(&image, &folder).0), 1, "{what}");
            // It is whole again.
            replace(&place, &kernel(6));
            assert_eq!(first_byte(&load(&image, &folder).0), 6, "{what}");
        }
        // What does not show is told by what comes of it, and unpacked again after that.
        let mut bad = kernel(7);
        patch(&mut bad, PHDR[0] + 24, 0x1000u64.to_le_bytes());
        replace(&place, &bad);
        let ram = reserve(&[0..64 << 20]).unwrap();
        let failed = load_with(&ram, image.path(), &Cache::Folder(folder.clone())).unwrap_err();
        assert!(matches!(failed.reason, Reason::Payload(_)) && !place.exists());
        assert_eq!(first_byte(&load(&image, &folder).0), 1, "bad contents");
        fs::remove_file(&place).unwrap();
        fs::create_dir(&place).unwrap();
        assert_eq!(first_byte(&load(&image, &folder).0), 1, "a folder");
    }

    #[test]
    fn a_folder_that_is_not_this_users_alone_is_not_used() {
        let (parent, folder) = folder();
        let image = image_of(&kernel(1));
        load(&image, &folder);
        replace(&place(&folder, &kernel(1)), &kernel(7));
        for mode in [0o770, 0o707] {
            fs::set_permissions(&folder, Permissions::from_mode(mode)).unwrap();
            assert_eq!(first_byte(&load(&image, &folder).0), 1);
        }
        fs::set_permissions(&folder, Permissions::from_mode(0o755)).unwrap();
        assert_eq!(first_byte(&load(&image, &folder).0), 7);
        let (file, link) = (parent.path().join("file"), parent.path().join("link"));
        fs::write(&file, "").unwrap();
        symlink(&folder, &link).unwrap();
        for nowhere in [&file, &link, &file.join("x"), Path::new("/proc/nowhere/x"), Path::new("")] {
            assert_eq!(first_byte(&load(&image, nowhere).0), 1, "{}", nowhere.display());
        }
        if geteuid().is_root() {
            let change = |path: &Path| std::os::unix::fs::chown(path, Some(1), None).unwrap();
            change(&folder);
            assert_eq!(first_byte(&load(&image, &folder).0), 1);
            change(parent.path());
            let inside = parent.path().join("more/unpacked");
            assert_eq!(first_byte(&load(&image, &inside).0), 1);
            assert!(!inside.parent().unwrap().exists(), "it is not root's to make");
        }
    }

    #[test]
    fn what_does_not_load_is_not_kept() {
        let (_parent, folder) = folder();
        let mut low = kernel(1);
        patch(&mut low, PHDR[0] + 24, 0x1000u64.to_le_bytes());
        let none = b"this is not an ELF file, but long enough".to_vec();
        let mut short = bzimage(&gzip(&kernel(1)));
        let end = 1024 + 0x10 + gzip(&kernel(1)).len();
        patch(&mut short, end - 4, 0x1000u32.to_le_bytes());
        for (bytes, told) in [
            (bzimage(&gzip(&low)), "overlaps the boot structures"),
            (bzimage(&gzip(&none)), "it is truncated: the ELF header"),
            (bzimage(&gzip(&[&none[..], &none].concat())), "it is not an ELF file"),
            (short, "cannot unpack its gzip payload"),
        ] {
            let file = NamedTempFile::new().unwrap();
            fs::write(file.path(), bytes).unwrap();
            let refusal =
                |cache| match load_with(&reserve(&[0..64 << 20]).unwrap(), file.path(), &cache).unwrap_err().reason {
                    Reason::Payload(error) => error.to_string(),
                    other => other.to_string(),
                };
            let with = refusal(Cache::Folder(folder.clone()));
            assert_eq!(with, refusal(Cache::Off), "a cache changes nothing about it");
            assert!(with.contains(told), "{with}");
            assert_eq!(names(&folder), [""; 0], "{told}");
        }
    }

    #[test]
    fn many_threads_unpack_one_kernel() {
        let (_parent, folder) = folder();
        let image = image_of(&kernel(1));
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| assert_eq!(first_byte(&load(&image, &folder).0), 1));
            }
        });
        assert_eq!(names(&folder), [Digest::of(&gzip(&kernel(1))).hex()]);
    }

    #[test]
    fn what_a_killed_process_left_is_cleared_and_what_is_too_much() {
        let (_parent, folder) = folder();
        let image = image_of(&kernel(1));
        let name = Digest::of(&gzip(&kernel(1))).hex();
        let hex = |number: usize| Digest::of(&number.to_le_bytes()).hex();
        DirBuilder::new().recursive(true).mode(0o700).create(&folder).unwrap();
        fs::write(folder.join(format!(".{name}")), vec![7; 1 << 20]).unwrap();
        fs::write(folder.join(format!(".{}", hex(0))), "half").unwrap();
        let locked = File::create(folder.join(format!(".{}", hex(1)))).unwrap();
        assert!(try_lock(&locked, FlockOperation::NonBlockingLockExclusive).unwrap());
        fs::write(folder.join("somebody's"), "").unwrap();
        for number in 0..LARGEST {
            fill(&folder.join(hex(number)), 1000 + i64::try_from(number).unwrap());
        }
        assert_eq!(first_byte(&load(&image, &folder).0), 1);
        let mut left: Vec<_> = (1..LARGEST).map(hex).collect();
        left.extend([name, "somebody's".into(), format!(".{}", hex(1))]);
        left.sort_unstable();
        assert_eq!(names(&folder), left);
    }

    /// As many of the largest kernels as there is room for.
    const LARGEST: usize = (KEPT_MAX / SIZE_MAX) as usize;

    /// Has the largest kernel there, which was used at that time.
    fn fill(place: &Path, used: i64) {
        let file = File::create(place).unwrap();
        file.set_len(SIZE_MAX).unwrap();
        let times = Timestamps { last_access: Timespec { tv_sec: used, tv_nsec: 0 }, last_modification: at(0) };
        futimens(&file, &times).unwrap();
    }

    #[test]
    fn a_kernel_in_use_is_not_replaced_by_another() {
        let (_parent, folder) = folder();
        let hex = |number: usize| Digest::of(&number.to_le_bytes()).hex();
        DirBuilder::new().recursive(true).mode(0o700).create(&folder).unwrap();
        (0..LARGEST).for_each(|number| fill(&folder.join(hex(number)), now() - 60));
        let mut full = names(&folder);
        let images = [1, 2].map(|byte| image_of(&kernel(byte)));
        // However often they come in turn.
        for _ in 0..3 {
            assert_eq!([&images[0], &images[1]].map(|image| first_byte(&load(image, &folder).0)), [1, 2]);
            assert_eq!(all_names(&folder).len(), LARGEST);
            assert_eq!(names(&folder), full);
        }
        // One that nobody has used for long makes room for both.
        fill(&folder.join(hex(3)), now() - IN_USE.cast_signed() - 60);
        images.iter().for_each(|image| drop(load(image, &folder)));
        full.retain(|name| *name != hex(3));
        full.extend([1, 2].map(|byte| Digest::of(&gzip(&kernel(byte))).hex()));
        full.sort_unstable();
        assert_eq!(names(&folder), full);
    }

    #[test]
    fn a_known_file_is_not_read() {
        let (_parent, folder) = folder();
        let name = |number: usize| format!("{FILE}{}", Digest::of(&number.to_le_bytes()).hex());
        let open = |image: &NamedTempFile, file_name: String| {
            let (file, bytes) = (File::open(image.path()).unwrap(), fs::read(image.path()).unwrap());
            let parsed = BzImage::parse(&bytes, bytes.len() as u64).unwrap();
            let payload = Payload::of(&file, &parsed).unwrap().unwrap();
            let unpacked = Folder::open(&folder).unwrap().find_or_unpack(&payload, Some(file_name)).unwrap();
            let mut byte = [0];
            unpacked.file.read_exact_at(&mut byte, DATA as u64).unwrap();
            unpacked.keep();
            byte[0]
        };
        let [one, two] = [1, 2].map(|byte| image_of(&kernel(byte)));
        assert_eq!([open(&one, name(0)), open(&two, name(0))], [1, 1]);
        assert_eq!(open(&two, name(1)), 2);
        assert_eq!(all_names(&folder).len(), 4);
        // What leads nowhere, or elsewhere, is set right.
        for target in ["../x", "", &Digest::of(b"x").hex()] {
            fs::remove_file(folder.join(name(0))).unwrap();
            if !target.is_empty() {
                symlink(target, folder.join(name(0))).unwrap();
            }
            assert_eq!([open(&two, name(0)), open(&one, name(0))], [2, 2], "{target}");
        }
        let most = usize::try_from(FILES).unwrap();
        for number in 2..most + 10 {
            open(&one, name(number));
        }
        assert_eq!(all_names(&folder).len(), 2 + most);
    }

    #[test]
    fn files_with_one_stamp_are_told_apart_by_their_ends() {
        let names = [[1, 2, 3], [1, 2, 4], [1, 4, 3], [4, 2, 3]].map(|parts| file_name(&parts.map(|part| vec![part])));
        assert!(names.iter().all(|name| name.strip_prefix(FILE).is_some_and(is_digest)));
        assert_eq!(std::collections::HashSet::from(names).len(), 4);
    }
}

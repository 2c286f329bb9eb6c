//! The cache of images: made once, by digest, safe for any number of processes and for kill -9 at any moment.
//!
//! ```text
//! images/sha256-HEX/root.erofs     a whole image
//! images/sha256-HEX/image.json     what is known of it; whoever uses the image has this locked shared (flock)
//! images/.building-HEX/            an image being made: locked exclusively by the process that makes it
//! images/.removed-HEX-PID/         an image being removed
//! images/names/HEX.json            what digest a name had when it was last looked up
//! ```
//!
//! An image appears by the rename of its folder, when all of it is on the disk. Locks end with the process that holds
//! them, so that what a killed process leaves is known by its name and its free lock, and is cleared away.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::{Errno, retry_on_intr};
use serde::{Deserialize, Serialize};

use super::config::Config;
use super::digest::Digest;
use super::{Error, Format, Image};
use crate::file::{self, RECORD_MAX};

const ROOT: &str = "root.erofs";
const ABOUT: &str = "image.json";
const BUILDING: &str = ".building-";
const REMOVED: &str = ".removed-";

/// Where images are kept.
#[derive(Debug, Clone)]
pub struct Cache {
    folder: PathBuf,
}

/// What is known of an image.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct About {
    source: String,
    config: Config,
}

/// What a name led to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Name {
    name: String,
    pub digest: Digest,
    /// What the file looked like that had the name.
    pub stamp: Option<Stamp>,
}

/// A file's identity and times: if they are the same, so is what is in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stamp([i64; 7]);

impl Stamp {
    /// All of it.
    pub fn bytes(&self) -> Vec<u8> {
        self.0.map(i64::to_le_bytes).concat()
    }

    /// Of a file that may be in use. `None` if it has changed so lately that a change more might not show.
    pub fn of(file: &File) -> io::Result<Option<Self>> {
        let metadata = file.metadata()?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let settled = u64::try_from(metadata.ctime()).is_ok_and(|changed| changed + 2 <= now.as_secs());
        Ok(settled.then(|| {
            Self([
                metadata.dev().cast_signed(),
                metadata.ino().cast_signed(),
                metadata.size().cast_signed(),
                metadata.mtime(),
                metadata.mtime_nsec(),
                metadata.ctime(),
                metadata.ctime_nsec(),
            ])
        }))
    }
}

/// An image in the cache, as `bantam image ls` lists it.
#[derive(Debug, Clone, Serialize)]
pub struct Listed {
    /// Its digest.
    pub digest: Digest,
    /// The names that led to it last.
    pub names: Vec<String>,
    /// What it was first made of.
    pub source: String,
    /// Bytes on the disk.
    pub size: u64,
    /// When it was used last, in seconds since 1970.
    pub used: u64,
    /// Whether a process uses it now.
    pub in_use: bool,
}

/// A folder in which an image is being made, locked.
pub(super) struct Building {
    path: PathBuf,
    /// Holds the lock.
    _lock: File,
    done: bool,
}

impl Building {
    /// Makes the empty file of the image.
    pub fn image(&self) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).create_new(true).mode(0o644).open(self.path.join(ROOT))
    }

    /// A file without a name.
    pub fn scratch(&self) -> io::Result<File> {
        scratch(&self.path)
    }
}

impl Drop for Building {
    fn drop(&mut self) {
        if !self.done {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

fn scratch(folder: &Path) -> io::Result<File> {
    let open = |flags: OFlags| {
        let bits = i32::try_from(flags.bits()).expect("flags are few bits");
        OpenOptions::new().read(true).write(true).custom_flags(bits).mode(0o600).open(folder)
    };
    match open(OFlags::TMPFILE) {
        // A file system without such files.
        Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::OPNOTSUPP | Errno::ISDIR)) => {
            let path = folder.join(format!("scratch-{}", std::process::id()));
            let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
            fs::remove_file(&path)?;
            Ok(file)
        }
        result => result,
    }
}

/// Takes a lock, without waiting; whether it was free.
pub(crate) fn try_lock(file: &File, operation: FlockOperation) -> io::Result<bool> {
    match retry_on_intr(|| flock(file, operation)) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whether `path` is still the file that is open.
pub(crate) fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let open = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(there) => Ok((open.dev(), open.ino()) == (there.dev(), there.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn open_folder(path: &Path) -> io::Result<File> {
    File::open(path)
}

/// The user's folder for what can be made again: `bantam` in `XDG_CACHE_HOME`, or in `~/.cache`. `None` without a home.
pub(crate) fn user_folder() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
    base.map(|base| base.join("bantam"))
}

impl Cache {
    /// The user's: `bantam/images` in `XDG_CACHE_HOME`, or in `~/.cache`.
    pub fn of_user() -> Result<Self, Error> {
        Ok(Self::new(user_folder().ok_or(Error::NoHome)?.join("images")))
    }

    /// A cache in `folder`, which is made when the first image is.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn error(&self, what: &'static str) -> impl FnOnce(io::Error) -> Error + use<> {
        let path = self.folder.clone();
        move |source| Error::Cache { what, path, source }
    }

    fn image_folder(&self, digest: &Digest) -> PathBuf {
        self.folder.join(format!("sha256-{}", digest.hex()))
    }

    fn create(&self) -> Result<(), Error> {
        fs::create_dir_all(self.folder.join("names")).map_err(self.error("make"))
    }

    /// A file without a name, on the cache's file system.
    pub(super) fn scratch(&self) -> Result<File, Error> {
        self.create()?;
        scratch(&self.folder).map_err(self.error("write to"))
    }

    /// The image with this digest, if it is there, locked against removal.
    pub(super) fn find(&self, digest: &Digest) -> Result<Option<Image>, Error> {
        self.try_find(digest).map_err(self.error("read"))
    }

    fn try_find(&self, digest: &Digest) -> io::Result<Option<Image>> {
        let folder = self.image_folder(digest);
        let path = folder.join(ROOT);
        let about = folder.join(ABOUT);
        loop {
            let file = match file::open(&about) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                result => result?,
            };
            retry_on_intr(|| flock(&file, FlockOperation::LockShared))?;
            // It may have been removed before the lock was held.
            if !is_at(&file, &about)? {
                continue;
            }
            let about: About = match serde_json::from_slice(&file::read_open(&file, RECORD_MAX)?) {
                Ok(about) => about,
                Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{ABOUT}: {error}"))),
            };
            // The folder's time is that of its last use.
            let now = rustix::fs::Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW };
            let times = rustix::fs::Timestamps { last_access: now, last_modification: now };
            let _ = open_folder(&folder).map(|folder| rustix::fs::futimens(folder, &times));
            return Ok(Some(Image {
                path,
                format: Format::Erofs,
                config: about.config,
                digest: Some(*digest),
                lock: Some(file),
            }));
        }
    }

    /// The image with this digest. If it is not there `build` makes it in an empty folder and says how it is run; of
    /// several processes one does so, and the others wait.
    pub(super) fn find_or_build(
        &self,
        digest: &Digest,
        source: &str,
        build: impl FnOnce(&Building) -> Result<Config, Error>,
    ) -> Result<Image, Error> {
        if let Some(image) = self.find(digest)? {
            return Ok(image);
        }
        self.create()?;
        let Some(mut building) = self.begin(digest).map_err(self.error("lock"))? else {
            return self.find(digest)?.ok_or(Error::Vanished(*digest));
        };
        self.sweep(digest);
        let config = build(&building)?;
        let about = About { source: source.to_owned(), config };
        self.publish(&mut building, digest, &about).map_err(self.error("write to"))?;
        self.find(digest)?.ok_or(Error::Vanished(*digest))
    }

    /// Waits for the right to make an image; `None` if another process has made it meanwhile.
    fn begin(&self, digest: &Digest) -> io::Result<Option<Building>> {
        let path = self.folder.join(format!("{BUILDING}{}", digest.hex()));
        loop {
            match fs::create_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
            let lock = match open_folder(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                result => result?,
            };
            retry_on_intr(|| flock(&lock, FlockOperation::LockExclusive))?;
            if self.image_folder(digest).join(ROOT).exists() {
                // Ours may be a new folder that nobody needs.
                if is_at(&lock, &path)? {
                    let _ = fs::remove_dir(&path);
                }
                return Ok(None);
            }
            if !is_at(&lock, &path)? {
                continue;
            }
            // What a killed process has left.
            for entry in fs::read_dir(&path)? {
                fs::remove_file(entry?.path())?;
            }
            return Ok(Some(Building { path, _lock: lock, done: false }));
        }
    }

    fn publish(&self, building: &mut Building, digest: &Digest, about: &About) -> io::Result<()> {
        let mut file = File::create_new(building.path.join(ABOUT))?;
        file.write_all(&serde_json::to_vec_pretty(about)?)?;
        file.sync_all()?;
        File::open(building.path.join(ROOT))?.sync_all()?;
        open_folder(&building.path)?.sync_all()?;
        fs::rename(&building.path, self.image_folder(digest))?;
        building.done = true;
        open_folder(&self.folder)?.sync_all()
    }

    /// Clears away what killed processes have left, but for the image being made.
    fn sweep(&self, except: &Digest) {
        let except = format!("{BUILDING}{}", except.hex());
        let Ok(entries) = fs::read_dir(&self.folder) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name != except && (name.starts_with(BUILDING) || name.starts_with(REMOVED)) {
                let _ = clear(&entry.path());
            }
        }
    }

    /// What a name led to when it was last looked up.
    pub(super) fn name(&self, name: &str) -> Option<Name> {
        let found: Name = serde_json::from_slice(&file::read(&self.name_path(name), RECORD_MAX).ok()?).ok()?;
        (found.name == name).then_some(found)
    }

    fn name_path(&self, name: &str) -> PathBuf {
        self.folder.join("names").join(format!("{}.json", Digest::of(name.as_bytes()).hex()))
    }

    /// Notes what a name leads to.
    pub(super) fn set_name(&self, name: &str, digest: Digest, stamp: Option<Stamp>) -> Result<(), Error> {
        let name = Name { name: name.to_owned(), digest, stamp };
        if self.name(&name.name).as_ref() == Some(&name) {
            return Ok(());
        }
        self.create()?;
        let write = || {
            let path = self.name_path(&name.name);
            let temporary = path.with_extension(std::process::id().to_string());
            fs::write(&temporary, serde_json::to_vec(&name)?)?;
            fs::rename(&temporary, &path)
        };
        write().map_err(self.error("write to"))
    }

    /// The names, and the files that have them.
    fn names(&self) -> Vec<(PathBuf, Option<Name>)> {
        let entries = fs::read_dir(self.folder.join("names")).into_iter().flatten().flatten();
        let parse = |path: &Path| serde_json::from_slice(&file::read(path, RECORD_MAX).ok()?).ok();
        entries.map(|entry| (entry.path(), parse(&entry.path()))).collect()
    }

    /// All images, the one used last first.
    pub fn list(&self) -> Result<Vec<Listed>, Error> {
        let names = self.names();
        let mut found = vec![];
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
            result => result.map_err(self.error("read"))?,
        };
        for entry in entries.flatten() {
            let folder = entry.path();
            let digest = entry.file_name().to_str().and_then(|name| name.replacen('-', ":", 1).parse::<Digest>().ok());
            let Some(digest) = digest else { continue };
            // Another process may be removing it.
            let (Ok(file), Ok(metadata)) = (file::open(&folder.join(ABOUT)), entry.metadata()) else { continue };
            let about = file::read_open(&file, RECORD_MAX).ok();
            let about = about.and_then(|bytes| serde_json::from_slice::<About>(&bytes).ok());
            let named = names.iter().filter_map(|(_, name)| name.as_ref().filter(|name| name.digest == digest));
            let mut names: Vec<_> = named.map(|name| name.name.clone()).collect();
            names.sort_unstable();
            found.push(Listed {
                digest,
                names,
                source: about.map(|about| about.source).unwrap_or_default(),
                size: fs::metadata(folder.join(ROOT)).map_or(0, |metadata| metadata.blocks() * 512),
                used: metadata.mtime().try_into().unwrap_or_default(),
                in_use: !try_lock(&file, FlockOperation::NonBlockingLockExclusive).map_err(self.error("lock"))?,
            });
        }
        found.sort_unstable_by_key(|listed| std::cmp::Reverse(listed.used));
        Ok(found)
    }

    /// Removes an image, by one of its names, by what it was made of, by its digest, or by the first digits of that. Gives
    /// back what it was.
    pub fn remove(&self, name: &str) -> Result<Listed, Error> {
        let all = self.list()?;
        let digits = name.strip_prefix("sha256:").unwrap_or(name);
        let by_digits = |listed: &&Listed| digits.len() >= 4 && listed.digest.hex().starts_with(digits);
        let by_name = |listed: &&Listed| listed.source == name || listed.names.iter().any(|other| other == name);
        let mut found: Vec<_> = all.iter().filter(by_name).collect();
        if found.is_empty() {
            found = all.iter().filter(by_digits).collect();
        }
        match found.as_slice() {
            [] => Err(Error::NoImage(name.to_owned())),
            [one] if self.discard(&one.digest)? => Ok((*one).clone()),
            [_] => Err(Error::InUse(name.to_owned())),
            _ => Err(Error::Ambiguous(name.to_owned())),
        }
    }

    /// Removes all images that no process uses and that have not been used since `before`, and what killed processes
    /// have left. Gives back what they were.
    pub fn prune(&self, before: SystemTime) -> Result<Vec<Listed>, Error> {
        let before = before.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut removed = vec![];
        for listed in self.list()? {
            if listed.used <= before && self.discard(&listed.digest)? {
                removed.push(listed);
            }
        }
        // No image is made with this digest.
        self.sweep(&Digest::of(b"no image"));
        for (path, name) in self.names() {
            if name.is_none_or(|name| !self.image_folder(&name.digest).exists()) {
                let _ = fs::remove_file(path);
            }
        }
        Ok(removed)
    }

    /// Removes an image, if no process uses it.
    fn discard(&self, digest: &Digest) -> Result<bool, Error> {
        let discard = || {
            let folder = self.image_folder(digest);
            let file = match File::open(folder.join(ABOUT)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
                result => result?,
            };
            if !try_lock(&file, FlockOperation::NonBlockingLockExclusive)? {
                return Ok(false);
            }
            let away = self.folder.join(format!("{REMOVED}{}-{}", digest.hex(), std::process::id()));
            fs::rename(&folder, &away)?;
            clear(&away)?;
            Ok(true)
        };
        discard().map_err(self.error("remove an image from"))
    }
}

/// Removes a folder that nobody has locked.
pub(crate) fn clear(path: &Path) -> io::Result<()> {
    let lock = open_folder(path)?;
    // Somebody may have cleared it away meanwhile, and somebody else made another one.
    if try_lock(&lock, FlockOperation::NonBlockingLockExclusive)? && is_at(&lock, path)? {
        fs::remove_dir_all(path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn build(cache: &Cache, digest: &Digest) -> Result<Image, Error> {
        cache.find_or_build(digest, "test", |building| {
            building.image().unwrap().write_all(b"image").unwrap();
            Ok(Config { user: "me".into(), ..Config::default() })
        })
    }

    fn files(cache: &Cache) -> usize {
        fs::read_dir(cache.folder()).unwrap().count()
    }

    #[test]
    fn an_image_is_made_once() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path().join("a/b"));
        let digest = Digest::of(b"1");
        assert!(cache.find(&digest).unwrap().is_none());
        let image = build(&cache, &digest).unwrap();
        assert_eq!(fs::read(image.path()).unwrap(), b"image");
        let again = cache.find_or_build(&digest, "test", |_| panic!("it is there")).unwrap();
        assert_eq!(again.config().user, "me");
    }

    #[test]
    fn what_is_no_record_is_not_read() {
        use rustix::fs::{CWD, FileType, Mode, mknodat};
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path());
        let digest = Digest::of(b"1");
        drop(build(&cache, &digest).unwrap());
        cache.set_name("name", digest, None).unwrap();
        for path in [cache.image_folder(&digest).join(ABOUT), cache.name_path("name")] {
            fs::remove_file(&path).unwrap();
            mknodat(CWD, &path, FileType::Fifo, Mode::RUSR, 0).unwrap();
        }
        assert!(cache.find(&digest).is_err() && cache.name("name").is_none());
        assert!(cache.list().unwrap().is_empty());
        for path in [cache.image_folder(&digest).join(ABOUT), cache.name_path("name")] {
            fs::remove_file(&path).unwrap();
            File::create(&path).unwrap().set_len(RECORD_MAX + 1).unwrap();
        }
        assert!(cache.find(&digest).is_err() && cache.name("name").is_none());
    }

    #[test]
    fn a_failure_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path());
        let failed = cache.find_or_build(&Digest::of(b"1"), "test", |building| {
            building.image().unwrap();
            Err(Error::NoHome)
        });
        assert!(failed.is_err());
        assert_eq!(files(&cache), 1, "only the folder of names");
    }

    #[test]
    fn what_a_killed_process_left_is_cleared() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path());
        let (digest, other) = (Digest::of(b"1"), Digest::of(b"2"));
        for digest in [digest, other] {
            let path = folder.path().join(format!("{BUILDING}{}", digest.hex()));
            fs::create_dir(&path).unwrap();
            fs::write(path.join(ROOT), "half").unwrap();
        }
        fs::create_dir(folder.path().join(".removed-1-2")).unwrap();
        build(&cache, &digest).unwrap();
        assert_eq!(files(&cache), 2);
    }

    #[test]
    fn an_image_in_use_stays() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path());
        let digest = Digest::of(b"1");
        let image = build(&cache, &digest).unwrap();
        cache.set_name("name", digest, None).unwrap();
        assert!(cache.list().unwrap()[0].in_use);
        assert_eq!(cache.list().unwrap()[0].names, ["name"]);
        assert!(cache.prune(SystemTime::now()).unwrap().is_empty());
        assert!(matches!(cache.remove("name"), Err(Error::InUse(_))));
        drop(image);
        assert!(cache.prune(SystemTime::UNIX_EPOCH).unwrap().is_empty(), "it has been used since");
        assert!(matches!(cache.remove("other"), Err(Error::NoImage(_))));
        assert_eq!(cache.remove(&digest.hex()[..8]).unwrap().digest, digest);
        assert!(cache.list().unwrap().is_empty());
        build(&cache, &digest).unwrap();
        assert_eq!(cache.prune(SystemTime::now()).unwrap().len(), 1);
        assert_eq!(files(&cache), 1);
    }

    #[test]
    fn many_threads_make_one_image() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path());
        let made = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let image = cache.find_or_build(&Digest::of(b"1"), "test", |building| {
                        made.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        building.image().unwrap().write_all(b"image").unwrap();
                        Ok(Config::default())
                    });
                    assert_eq!(fs::read(image.unwrap().path()).unwrap(), b"image");
                });
            }
        });
        assert_eq!((made.into_inner(), files(&cache)), (1, 2));
    }
}

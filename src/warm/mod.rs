//! Warm starts: a guest is saved when it is ready for its command, and later runs begin there, with any command.
//!
//! ```text
//! warm/KEY/about.json       what the snapshot is of
//! warm/KEY/snapshot/        the snapshot
//! warm/.making-KEY-PID/     one being made: locked (flock) by the process that makes it
//! ```
//!
//! A snapshot appears, or takes the place of another, by one rename, when all of it is on the disk. Machines that run from one
//! that goes have its memory all the same. What a killed process leaves is known by its name and its free lock, and is cleared
//! away by the next that makes one.

mod basis;

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, RenameFlags, renameat_with};
use rustix::io::Errno;
use serde_json::Value;

pub use basis::{Basis, Files, Unfit};

use crate::file;
use crate::image::cache::{clear, is_at, try_lock, user_folder};
use crate::kernels::is_name;
use crate::machine::{self, Destination, Snapshot};

const ABOUT: &str = "about.json";
const SNAPSHOT: &str = "snapshot";
const MEMORY: &str = "snapshot/memory";
const MAKING: &str = ".making-";

/// Why there are no warm snapshots.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A key that could be a path.
    #[error("`{0}` is no key for a warm snapshot: expected a letter or digit, and then letters, digits and . _ + -")]
    Key(String),
    /// There is nowhere to keep them.
    #[error("cannot find the warm snapshots: neither XDG_CACHE_HOME nor HOME is set")]
    NoHome,
    /// There is none with the key.
    #[error("there is no warm snapshot `{0}` (`bantam warm ls` shows those there are)")]
    Unknown(String),
    /// They cannot be used.
    #[error("cannot {what} the warm snapshots in {}", .path.display())]
    Cache {
        /// What was attempted.
        what: &'static str,
        /// Where they are.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
}

/// Why a machine is not started from a warm snapshot.
#[derive(Debug, thiserror::Error)]
pub enum Miss {
    /// There is none yet.
    #[error("there is no snapshot yet")]
    Nothing,
    /// It is of something else, or not whole.
    #[error("{0}")]
    Other(String),
    /// It cannot be read.
    #[error("cannot read {}", .0.display())]
    Read(PathBuf, #[source] io::Error),
    /// It is damaged.
    #[error(transparent)]
    Snapshot(#[from] machine::snapshot::Error),
}

/// A warm snapshot, as `bantam warm ls` lists it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Listed {
    /// Its key.
    pub key: String,
    /// Bytes on the disk.
    pub size: u64,
    /// When it was made, in seconds since 1970.
    pub made: i64,
    /// What its guest's root file system was made of.
    pub rootfs: String,
}

/// Where warm snapshots are kept.
#[derive(Debug, Clone)]
pub struct Store {
    folder: PathBuf,
}

impl Store {
    /// The user's: `bantam/warm` in `XDG_CACHE_HOME`, or in `~/.cache`.
    ///
    /// # Errors
    /// When there is no home.
    pub fn of_user() -> Result<Self, Error> {
        Ok(Self::new(user_folder().ok_or(Error::NoHome)?.join("warm")))
    }

    /// Those in `folder`, which is made when the first snapshot is.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// The place of this key.
    ///
    /// # Errors
    /// When it is none.
    pub fn at(&self, key: &str) -> Result<Place, Error> {
        let folder = self.folder.clone();
        if is_name(key) { Ok(Place { folder, key: key.into() }) } else { Err(Error::Key(key.into())) }
    }

    fn error(&self, what: &'static str) -> impl FnOnce(io::Error) -> Error + use<> {
        let path = self.folder.clone();
        move |source| Error::Cache { what, path, source }
    }

    /// All of them, by key.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn list(&self) -> Result<Vec<Listed>, Error> {
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(vec![]),
            entries => entries.map_err(self.error("read"))?,
        };
        let keys = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let mut list: Vec<_> = keys.filter(|key| is_name(key)).filter_map(|key| self.listed(key)).collect();
        list.sort_unstable_by(|one, other| one.key.cmp(&other.key));
        Ok(list)
    }

    fn listed(&self, key: String) -> Option<Listed> {
        let folder = self.folder.join(&key);
        let made = fs::metadata(folder.join(ABOUT)).ok()?.mtime();
        let about = read(&folder.join(ABOUT)).unwrap_or_default();
        let size = fs::metadata(folder.join(MEMORY)).map_or(0, |memory| memory.blocks() * 512);
        let rootfs =
            about["config"]["rootfs"].as_str().or(about["config"]["initrd"].as_str()).unwrap_or_default().into();
        Some(Listed { key, size, made, rootfs })
    }

    /// Removes the snapshot with this key. Machines that run from it go on.
    ///
    /// # Errors
    /// When there is none, or it cannot be removed.
    pub fn remove(&self, key: &str) -> Result<(), Error> {
        let place = self.at(key)?;
        let making = place.begin_in_any_case().map_err(self.error("write to"));
        match making.and_then(|making| making.remove().map_err(self.error("remove from"))) {
            Err(Error::Cache { source, .. }) if source.kind() == ErrorKind::NotFound => Err(Error::Unknown(key.into())),
            other => other,
        }
    }
}

/// Where the snapshot of a key is, if there is one.
#[derive(Debug, Clone)]
pub struct Place {
    folder: PathBuf,
    key: String,
}

impl Place {
    /// The key.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The snapshot, if it is of `basis` and whole. Its files are open: it may be replaced or removed from now on.
    ///
    /// # Errors
    /// When there is none, or it cannot be used.
    pub fn open(&self, basis: &Basis) -> Result<Snapshot, Miss> {
        let folder = self.folder.join(&self.key);
        let unreadable = |error| Miss::Read(folder.clone(), error);
        if !basis.is_whole() {
            // A machine without its files is not built either, and that tells why.
            return Err(Miss::Nothing);
        }
        loop {
            let open = match File::open(&folder) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Err(Miss::Nothing),
                open => open.map_err(unreadable)?,
            };
            let found = open_in(&folder, basis);
            // Else another one has taken its place meanwhile, and there may be parts of both.
            if is_at(&open, &folder).map_err(unreadable)? {
                return found;
            }
        }
    }

    /// Begins to make a snapshot. `None` if another process makes one for this key just now.
    ///
    /// # Errors
    /// When the host does not write it.
    pub fn begin(&self) -> io::Result<Option<Making>> {
        match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            entries => {
                let prefix = format!("{MAKING}{}-", self.key);
                for entry in entries?.flatten() {
                    let name = entry.file_name().to_string_lossy().into_owned();
                    if name.starts_with(MAKING) {
                        // One that cannot be cleared away is somebody's, or does no harm.
                        let _ = clear(&entry.path());
                        let pid =
                            name.strip_prefix(&prefix).filter(|pid| pid.bytes().all(|byte| byte.is_ascii_digit()));
                        if pid.is_some() && entry.path().exists() {
                            return Ok(None);
                        }
                    }
                }
            }
        }
        self.begin_in_any_case().map(Some)
    }

    fn begin_in_any_case(&self) -> io::Result<Making> {
        // Guest memory is nobody else's.
        DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
        let mut number = std::process::id();
        loop {
            let path = self.folder.join(format!("{MAKING}{}-{number}", self.key));
            match DirBuilder::new().mode(0o700).create(&path) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => number = number.wrapping_add(1),
                made => {
                    made?;
                    // It may be cleared away before the lock is held.
                    let lock = match File::open(&path) {
                        Err(error) if error.kind() == ErrorKind::NotFound => continue,
                        opened => opened?,
                    };
                    if try_lock(&lock, FlockOperation::NonBlockingLockExclusive)? && is_at(&lock, &path)? {
                        return Ok(Making { path, place: self.clone(), _lock: lock });
                    }
                }
            }
        }
    }
}

/// A snapshot that is being made.
#[derive(Debug)]
pub struct Making {
    path: PathBuf,
    place: Place,
    _lock: File,
}

impl Making {
    /// Where the machine is to be saved.
    pub fn destination(&self) -> Destination {
        Destination::Folder(self.path.join(SNAPSHOT))
    }

    /// The machine has been saved, which was built of `basis`, and booted with `modules`: puts the snapshot where it is found.
    ///
    /// # Errors
    /// When the host does not write it, or these files have changed meanwhile.
    pub fn finish(self, basis: &Basis, modules: &Files) -> io::Result<()> {
        if !basis.is_still_so() || modules.changed().is_some() {
            return Err(io::Error::other("what it is of has changed meanwhile"));
        }
        let mut about = basis.record();
        about["modules"] = modules.record();
        about["memory"] = basis::stamp(&self.path.join(MEMORY));
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(self.path.join(ABOUT))?;
        file.write_all(format!("{about:#}\n").as_bytes())?;
        file.sync_all()?;
        File::open(&self.path)?.sync_all()?;
        let (folder, target) = (&self.place.folder, self.place.folder.join(&self.place.key));
        let rename = |flags| renameat_with(CWD, &self.path, CWD, &target, flags);
        match rename(RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => rename(RenameFlags::EXCHANGE)?,
            renamed => renamed?,
        }
        File::open(folder)?.sync_all()
    }

    /// Removes what is there, in place of making another one.
    fn remove(self) -> io::Result<()> {
        fs::rename(self.place.folder.join(&self.place.key), self.path.join(SNAPSHOT))
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        // What is not finished, or what it has replaced.
        if let Err(error) = fs::remove_dir_all(&self.path)
            && error.kind() != ErrorKind::NotFound
        {
            log::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

fn read(path: &Path) -> Result<Value, Miss> {
    let bytes = file::read(path, file::RECORD_MAX).map_err(|error| Miss::Read(path.into(), error))?;
    serde_json::from_slice(&bytes).map_err(|error| Miss::Other(format!("{} is damaged: {error}", path.display())))
}

/// The snapshot in a folder, if it is of `basis`.
fn open_in(folder: &Path, basis: &Basis) -> Result<Snapshot, Miss> {
    let about = read(&folder.join(ABOUT))?;
    if let Some(difference) = basis.difference(&about) {
        return Err(Miss::Other(difference));
    }
    let modules = Files::recorded(&about["modules"]).unwrap_or_default();
    if let Some(path) = modules.changed() {
        return Err(Miss::Other(format!("{path} has changed since it was made")));
    }
    let snapshot = Snapshot::open(folder.join(SNAPSHOT))?;
    let memory = folder.join(MEMORY);
    if about["memory"] != basis::stamp(&memory) {
        return Err(Miss::Other(format!("{} is damaged: it has changed since it was made", memory.display())));
    }
    Ok(snapshot)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{FileType, Mode, mknodat};

    use crate::command;
    use crate::config::Config;

    fn basis() -> Basis {
        Basis::of(&Config::new().kernel("/proc/version").rootfs("/dev/null").command(command::Spec::new(["x"])))
            .unwrap()
    }

    /// Makes what could be a snapshot, but for its state.
    fn make(place: &Place, text: &str) {
        let making = place.begin().unwrap().unwrap();
        let Destination::Folder(folder) = making.destination() else { panic!() };
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("memory"), text).unwrap();
        making.finish(&basis(), &Files::default()).unwrap();
    }

    fn entries(store: &Store) -> usize {
        fs::read_dir(&store.folder).unwrap().count()
    }

    #[test]
    fn keys_make_no_paths() {
        let store = Store::new("/nowhere");
        assert!(store.at("ci-1.2_x").is_ok());
        for key in ["", ".", "..", ".making-a-1", "a/b", "-x", "a b", "ä"] {
            assert!(matches!(store.at(key), Err(Error::Key(_))), "{key}");
        }
        assert_eq!(store.list().unwrap(), []);
    }

    #[test]
    fn one_takes_the_place_of_another_and_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path().join("warm"));
        let place = store.at("key").unwrap();
        assert!(matches!(place.open(&basis()), Err(Miss::Nothing)));
        assert!(matches!(store.remove("key"), Err(Error::Unknown(_))));
        for text in ["one", "two"] {
            make(&place, text);
            assert_eq!(fs::read_to_string(store.folder.join("key").join(MEMORY)).unwrap(), text);
            assert_eq!(entries(&store), 1);
        }
        assert_eq!(fs::metadata(&store.folder).unwrap().mode() & 0o777, 0o700);
        assert_eq!(fs::metadata(store.folder.join("key")).unwrap().mode() & 0o777, 0o700);
        let listed = store.list().unwrap();
        assert_eq!((listed.len(), &*listed[0].key, &*listed[0].rootfs), (1, "key", "/dev/null"));
        // It has no state.
        assert!(matches!(place.open(&basis()), Err(Miss::Snapshot(_))));
        let other = Basis::of(
            &Config::new().kernel("/proc/version").initrd("/proc/version").command(command::Spec::new(["x"])),
        );
        assert!(matches!(place.open(&other.unwrap()), Err(Miss::Other(_))));
        let about = store.folder.join("key").join(ABOUT);
        fs::write(&about, "{").unwrap();
        assert!(matches!(place.open(&basis()), Err(Miss::Other(_))));
        // What is no file, or has too much, is not read.
        fs::remove_file(&about).unwrap();
        mknodat(CWD, &about, FileType::Fifo, Mode::RUSR, 0).unwrap();
        assert!(matches!(place.open(&basis()), Err(Miss::Read(..))) && store.list().unwrap()[0].rootfs.is_empty());
        fs::remove_file(&about).unwrap();
        File::create(&about).unwrap().set_len(file::RECORD_MAX + 1).unwrap();
        assert!(matches!(place.open(&basis()), Err(Miss::Read(..))));
        store.remove("key").unwrap();
        assert_eq!(entries(&store), 0);
    }

    #[test]
    fn of_two_that_would_make_one_at_once_one_does_and_what_was_left_is_cleared() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        let place = store.at("a").unwrap();
        let making = place.begin().unwrap().unwrap();
        assert!(place.begin().unwrap().is_none());
        let of_longer_key = store.at("a-1").unwrap().begin().unwrap();
        assert!(of_longer_key.is_some(), "another key is free");
        drop(making);
        assert_eq!(entries(&store), 1);
        fs::create_dir(folder.path().join(".making-a-1")).unwrap();
        fs::write(folder.path().join(".making-a-1/about.json"), "").unwrap();
        assert!(place.begin().unwrap().is_some());
        assert_eq!(entries(&store), 1);
        drop(of_longer_key);
        assert_eq!(entries(&store), 0);
    }

    #[test]
    fn what_is_cleared_away_before_it_is_locked_is_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let place = Store::new(folder.path()).at("key").unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for making in (0..500).filter_map(|_| place.begin().unwrap()) {
                        std::thread::yield_now();
                        assert!(is_at(&making._lock, &making.path).unwrap(), "it was cleared away while it was locked");
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
    }

    #[test]
    fn nothing_is_made_of_what_changed_meanwhile() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("root");
        fs::write(&file, "1").unwrap();
        let config = Config::new().kernel("/proc/version").rootfs(&file).command(command::Spec::new(["x"]));
        let basis = Basis::of(&config).unwrap();
        let store = Store::new(folder.path().join("warm"));
        let making = store.at("key").unwrap().begin().unwrap().unwrap();
        fs::write(&file, "22").unwrap();
        assert!(making.finish(&basis, &Files::default()).is_err());
        assert_eq!(entries(&store), 0);
    }

    #[test]
    fn modules_that_were_built_anew_count_as_others() {
        let folder = tempfile::tempdir().unwrap();
        let [module, nearer] = ["module.ko", "nearer"].map(|name| folder.path().join(name));
        fs::write(&module, "1").unwrap();
        let modules = Files::of(&[module.clone(), nearer.clone()]);
        let store = Store::new(folder.path().join("warm"));
        let place = store.at("key").unwrap();
        let make = |modules: &Files| {
            let making = place.begin().unwrap().unwrap();
            fs::create_dir(making.path.join(SNAPSHOT)).unwrap();
            making.finish(&basis(), modules)
        };
        make(&modules).unwrap();
        // It has no state.
        assert!(matches!(place.open(&basis()), Err(Miss::Snapshot(_))));
        let changed = |path: &Path| {
            let Err(Miss::Other(told)) = place.open(&basis()) else { panic!("it is taken") };
            assert_eq!(told, format!("{} has changed since it was made", path.display()));
        };
        fs::write(&module, "22").unwrap();
        changed(&module);
        assert!(make(&modules).is_err());
        make(&Files::of(&[module, nearer.clone()])).unwrap();
        fs::create_dir(&nearer).unwrap();
        changed(&nearer);
    }
}

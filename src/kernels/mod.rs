//! Kernels by name: imported once, with the modules that bantam loads, and kept in the user's cache.
//!
//! ```text
//! kernels/NAME/vmlinux                 the kernel, unpacked; bzImage if only the guest can unpack it
//! kernels/NAME/config-VERSION          its configuration, if it came with it
//! kernels/NAME/lib/modules/VERSION/    modules, unpacked
//! kernels/NAME/kernel.json             what is known of it; whoever is about to load it has this locked shared (flock)
//! kernels/.importing-NAME-N/           a kernel being imported: locked exclusively by the process that does it
//! kernels/.linux/                      where a kernel is compiled
//! ```
//!
//! A kernel appears, or takes the place of another, by one rename, when all of it is on the disk. Locks end with the process
//! that holds them, so that what a killed process leaves is known by its name and its free lock, and is cleared away.

mod build;
mod import;
mod package;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use rustix::io::{Errno, retry_on_intr};
use serde::{Deserialize, Serialize};

use crate::boot::{inspect, kernel, modules};
use crate::file;
use crate::image::cache::{clear, is_at, try_lock, user_folder};

const ABOUT: &str = "kernel.json";
const IMPORTING: &str = ".importing-";

/// The longest name, in bytes.
const NAME_MAX: usize = 100;

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot have this name.
    #[error(
        "cannot name a kernel `{0}`: expected a letter or digit, and then letters, digits and . _ + - \
         (at most {NAME_MAX})"
    )]
    Name(String),
    /// There is nowhere to keep kernels.
    #[error("cannot find the kernels: neither XDG_CACHE_HOME nor HOME is set")]
    NoHome,
    /// There is no kernel of this name.
    #[error(
        "cannot find the kernel `{name}`: {}",
        if .known.is_empty() { "none has been imported (bantam kernel import, build)".into() }
        else { format!("those that have been imported are {}", .known.join(", ")) }
    )]
    Unknown {
        /// The name.
        name: String,
        /// The names there are.
        known: Vec<String>,
    },
    /// Where kernels are kept cannot be used.
    #[error("cannot {what} {}", .path.display())]
    Cache {
        /// What was attempted.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// There is no kernel in what it is to be taken from.
    #[error(
        "cannot find a kernel in {}: it has no vmlinux, vmlinuz, bzImage, arch/x86/boot/bzImage nor boot/vmlinuz-*",
        .0.display()
    )]
    NoKernel(PathBuf),
    /// There are several.
    #[error("cannot tell which kernel of {} is meant: it has {}", .folder.display(), .found.join(", "))]
    Ambiguous {
        /// Where.
        folder: PathBuf,
        /// Their paths in it.
        found: Vec<String>,
    },
    /// A package is broken, or not one.
    #[error("cannot read the package {}", .path.display())]
    Package {
        /// The package.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: io::Error,
    },
    /// Modules were given for a kernel that does not tell which are its own.
    #[error("cannot take modules from {}: the kernel does not tell its version", .0.display())]
    NoVersion(PathBuf),
    /// It does not load.
    #[error(transparent)]
    Inspect(#[from] inspect::Error),
    /// It cannot be unpacked.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
    /// Its modules cannot be used.
    #[error(transparent)]
    Modules(#[from] modules::Error),
    /// What compiles kernels failed, and has said why.
    #[error("cannot build a kernel: its script ended with {0}")]
    Build(std::process::ExitStatus),
}

/// What is known of a kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct About {
    file: String,
    version: String,
    modules: Option<usize>,
    source: String,
}

/// A kernel in the cache, as `bantam kernel ls` lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// Its version, as `uname -r` has it; empty if it does not tell.
    pub version: String,
    /// How many modules it has; `None` if none were found for it.
    pub modules: Option<usize>,
    /// Bytes on the disk.
    pub size: u64,
    /// What it was made of.
    pub source: String,
    /// Its file.
    pub path: PathBuf,
}

/// A kernel that can be loaded, with its modules beside it. It stays as long as this exists.
#[derive(Debug)]
pub struct Kernel {
    path: PathBuf,
    /// Holds the lock.
    _lock: File,
}

impl Kernel {
    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Where kernels are kept.
#[derive(Debug, Clone)]
pub struct Kernels {
    folder: PathBuf,
}

/// A folder in which a kernel is being imported, locked. What is left of it goes with this.
struct Importing {
    path: PathBuf,
    _lock: File,
}

impl Drop for Importing {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

fn cache_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
    let path = path.to_owned();
    move |source| Error::Cache { what, path, source }
}

/// Whether a kernel can have this name: one that is no path, and of which none is hidden.
pub fn is_name(name: &str) -> bool {
    let others = |byte: u8| byte.is_ascii_alphanumeric() || b"._+-".contains(&byte);
    name.len() <= NAME_MAX
        && name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric())
        && name.bytes().all(others)
}

impl Kernels {
    /// The user's: `bantam/kernels` in `XDG_CACHE_HOME`, or in `~/.cache`.
    ///
    /// # Errors
    /// When there is no home.
    pub fn of_user() -> Result<Self, Error> {
        Ok(Self::new(user_folder().ok_or(Error::NoHome)?.join("kernels")))
    }

    /// Those in `folder`, which is made when the first kernel is imported.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// The kernel of this name, which has to be there.
    ///
    /// # Errors
    /// When there is none, or it cannot be read.
    pub fn open(&self, name: &str) -> Result<Kernel, Error> {
        if let Some(kernel) = self.find(name)? {
            return Ok(kernel);
        }
        let known = self.list()?.into_iter().map(|listed| listed.name).collect();
        Err(Error::Unknown { name: name.into(), known })
    }

    /// The kernel of this name, if there is one.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn find(&self, name: &str) -> Result<Option<Kernel>, Error> {
        let folder = self.folder.join(name);
        let opened = if is_name(name) { lock(&folder, FlockOperation::LockShared) } else { Ok(None) };
        let Some(lock) = opened.map_err(cache_error("read", &folder))? else { return Ok(None) };
        let about = read_about(&lock).map_err(cache_error("read", &folder.join(ABOUT)))?;
        Ok(Some(Kernel { path: folder.join(about.file), _lock: lock }))
    }

    /// All kernels, by name.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub fn list(&self) -> Result<Vec<Listed>, Error> {
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
            result => result.map_err(cache_error("read", &self.folder))?,
        };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        // Another process may be removing one.
        let mut found: Vec<_> = names.filter(|name| is_name(name)).filter_map(|name| self.listed(&name)).collect();
        found.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        Ok(found)
    }

    fn listed(&self, name: &str) -> Option<Listed> {
        let folder = self.folder.join(name);
        let About { file, version, modules, source } = read_about(&file::open(&folder.join(ABOUT)).ok()?).ok()?;
        Some(Listed { name: name.into(), version, modules, size: size(&folder), source, path: folder.join(file) })
    }

    /// Imports a kernel from `source`, which is a vmlinux or a bzImage, a folder with one, or a Debian package, in place of
    /// what has the name. Its modules are taken from `modules`, else from where they are found.
    ///
    /// # Errors
    /// When there is no kernel that could be booted, or not the modules that were given.
    pub fn import(&self, name: &str, source: &Path, modules: Option<&Path>) -> Result<Listed, Error> {
        self.import_from(name, source, modules, &source.display().to_string())
    }

    /// Imports a kernel from `source`, which the list is to call `told`.
    fn import_from(&self, name: &str, source: &Path, modules: Option<&Path>, told: &str) -> Result<Listed, Error> {
        if !is_name(name) {
            return Err(Error::Name(name.into()));
        }
        let importing = self.begin(name).map_err(cache_error("write to", &self.folder))?;
        self.sweep();
        let about = About { source: told.into(), ..import::import(source, modules, &importing.path)? };
        self.publish(&importing, name, &about).map_err(cache_error("write to", &self.folder))?;
        let unknown = || Error::Unknown { name: name.into(), known: vec![] };
        self.listed(name).ok_or_else(unknown)
    }

    /// Removes the kernel of this name. Machines that run do not need it any more.
    ///
    /// # Errors
    /// When there is none, or it cannot be removed.
    pub fn remove(&self, name: &str) -> Result<Listed, Error> {
        // Says what there is, if it is not.
        drop(self.open(name)?);
        let listed = self.listed(name);
        let remove = || {
            let away = self.begin(name)?;
            let folder = self.folder.join(name);
            let Some(_lock) = lock(&folder, FlockOperation::LockExclusive)? else { return Ok(()) };
            fs::rename(&folder, away.path.join("removed"))
        };
        remove().map_err(cache_error("remove a kernel from", &self.folder))?;
        listed.ok_or_else(|| Error::Unknown { name: name.into(), known: vec![] })
    }

    /// Makes a locked folder of this process' own.
    fn begin(&self, name: &str) -> io::Result<Importing> {
        fs::create_dir_all(&self.folder)?;
        let mut number = std::process::id();
        loop {
            let path = self.folder.join(format!("{IMPORTING}{name}-{number}"));
            match fs::create_dir(&path) {
                // Of another container's process, or one that was killed.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number = number.wrapping_add(1),
                created => {
                    created?;
                    // Another process may have taken it for one that was left.
                    if let Ok(lock) = File::open(&path)
                        && try_lock(&lock, FlockOperation::NonBlockingLockExclusive)?
                        && is_at(&lock, &path)?
                    {
                        return Ok(Importing { path, _lock: lock });
                    }
                }
            }
        }
    }

    /// Clears away what killed processes have left.
    fn sweep(&self) {
        let Ok(entries) = fs::read_dir(&self.folder) else { return };
        for entry in entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(IMPORTING)) {
            let _ = clear(&entry.path());
        }
    }

    /// Gives the kernel its name, in place of what has it.
    fn publish(&self, importing: &Importing, name: &str, about: &About) -> io::Result<()> {
        let new = importing.path.join("new");
        let mut file = File::create_new(new.join(ABOUT))?;
        file.write_all(&serde_json::to_vec_pretty(about)?)?;
        file.sync_all()?;
        File::open(&new)?.sync_all()?;
        let folder = self.folder.join(name);
        loop {
            match renameat_with(CWD, &new, CWD, &folder, RenameFlags::NOREPLACE) {
                Err(Errno::EXIST) => {}
                renamed => {
                    renamed?;
                    break;
                }
            }
            // Who is about to load the old one has the time to do so. What is no kernel goes as well.
            let _lock = lock(&folder, FlockOperation::LockExclusive)?;
            match renameat_with(CWD, &new, CWD, &folder, RenameFlags::EXCHANGE) {
                // Removed by now.
                Err(Errno::NOENT) => {}
                renamed => {
                    renamed?;
                    break;
                }
            }
        }
        File::open(&self.folder)?.sync_all()
    }
}

/// Locks a kernel; `None` if there is none in this folder.
fn lock(folder: &Path, operation: FlockOperation) -> io::Result<Option<File>> {
    let path = folder.join(ABOUT);
    loop {
        let file = match file::open(&path) {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            opened => opened?,
        };
        retry_on_intr(|| flock(&file, operation))?;
        // It may have been replaced before the lock was held.
        if is_at(&file, &path)? {
            return Ok(Some(file));
        }
    }
}

fn read_about(file: &File) -> io::Result<About> {
    Ok(serde_json::from_slice(&file::read_open(file, file::RECORD_MAX)?)?)
}

/// Bytes on the disk of all that is in `folder`.
fn size(folder: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => size(&entry.path()),
        metadata => metadata.map_or(0, |metadata| metadata.blocks() * 512),
    });
    sizes.sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{FileType, Mode, mknodat};

    #[test]
    fn names_are_no_paths() {
        for good in ["6.1", "debian", "a_b+c-1", "default"] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", ".", "..", ".linux", "a/b", "-x", "a b", "ä", "a\n", &"x".repeat(101)] {
            assert!(!is_name(bad), "{bad}");
        }
    }

    #[test]
    fn what_is_not_there_is_told_with_what_is() {
        let folder = tempfile::tempdir().unwrap();
        let kernels = Kernels::new(folder.path().join("kernels"));
        assert_eq!(kernels.list().unwrap(), []);
        let message = kernels.open("x").unwrap_err().to_string();
        assert_eq!(message, "cannot find the kernel `x`: none has been imported (bantam kernel import, build)");
        assert!(kernels.remove("..").is_err());
        assert!(!folder.path().join("kernels").exists(), "nothing is made");

        // What is no file, or has too much, is not read.
        let about = folder.path().join("kernels/x").join(ABOUT);
        fs::create_dir_all(about.parent().unwrap()).unwrap();
        mknodat(CWD, &about, FileType::Fifo, Mode::RUSR, 0).unwrap();
        assert!(matches!(kernels.find("x"), Err(Error::Cache { what: "read", .. })));
        assert_eq!(kernels.list().unwrap(), []);
        fs::remove_file(&about).unwrap();
        File::create(&about).unwrap().set_len(file::RECORD_MAX + 1).unwrap();
        assert!(matches!(kernels.find("x"), Err(Error::Cache { what: "read", .. })));
    }
}

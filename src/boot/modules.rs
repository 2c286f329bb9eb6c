//! Kernel modules on the host: found by name, with those that they depend on, and unpacked.
//!
//! What a module needs is in its own `.modinfo`, so that a folder will do that `depmod` has not been run on, as it is in
//! a package. `modules.dep`, if there is one, only saves looking through all folders.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::kernel::Compression;
use super::unpack::unpack;

/// More than any module has, in bytes.
const MODULE_MAX: u64 = 64 << 20;

/// The files that say which modules are built in, and which there are beside.
const LISTS: [&str; 2] = ["modules.builtin", "modules.dep"];

/// Modules could not be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There are none where they are said to be.
    #[error(
        "cannot find kernel modules in {}: it has no modules, nor lib/modules/{version} with some",
        .folder.display()
    )]
    None {
        /// Where they are said to be.
        folder: PathBuf,
        /// The kernel's version.
        version: String,
    },
    /// A module that is needed is not there.
    #[error(
        "cannot find the kernel module `{name}` in {}, and the kernel does not have it built in \
         (--modules DIR takes them from elsewhere)", .folder.display()
    )]
    Missing {
        /// The module.
        name: String,
        /// Where it was looked for.
        folder: PathBuf,
    },
    /// Something could not be written.
    #[error("cannot write {}", .path.display())]
    Write {
        /// What.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Something could not be read.
    #[error("cannot read {}", .path.display())]
    Read {
        /// What.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// A module, ready to be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// The ELF object.
    pub object: Vec<u8>,
    /// The file that has it, packed or not.
    path: PathBuf,
}

/// The modules of a kernel.
#[derive(Debug)]
pub struct Modules {
    folder: PathBuf,
    paths: HashMap<String, PathBuf>,
    built_in: HashSet<String>,
}

/// What modules for a kernel of this version are named by, as `uname -r` tells it: its first word. `None` if that cannot be
/// the name of a folder, where slashes and dots lead elsewhere, or not be shown: a terminal takes other characters for
/// orders.
pub fn release(version: &str) -> Option<&str> {
    let is_plain = |byte: u8| byte.is_ascii_graphic() && byte != b'/';
    version.split_whitespace().next().filter(|word| word.bytes().all(is_plain) && !word.starts_with('.'))
}

/// Where the modules for the kernel at `kernel` are looked for: beside it, above that, and where the host has its own.
pub fn places(kernel: &Path, version: &str) -> [PathBuf; 3] {
    let beside = kernel.parent().unwrap_or(Path::new(""));
    [beside, &beside.join(".."), Path::new("/")].map(|root| root.join("lib/modules").join(version))
}

impl Modules {
    /// The modules for a kernel of this version in `folder`: `lib/modules/VERSION`, or a root that has it.
    ///
    /// # Errors
    /// When there are none, or they cannot be listed.
    pub fn open(folder: &Path, version: &str) -> Result<Self, Error> {
        let within = ["lib/modules", "usr/lib/modules"].map(|path| folder.join(path).join(version));
        let found = within.into_iter().chain([folder.join(version), folder.into()]).find(|folder| has_modules(folder));
        let none = || Error::None { folder: folder.into(), version: version.into() };
        Self::list(found.ok_or_else(none)?)
    }

    /// The modules for the kernel at `kernel`, in the first of [`places`] that has some. `None` if there are none.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub fn find(kernel: &Path, version: &str) -> Result<Option<Self>, Error> {
        let found = places(kernel, version).into_iter().find(|folder| has_modules(folder));
        found.map(Self::list).transpose()
    }

    /// Where they are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The files that `loaded` are in, and those that say which modules there are, which need not be there.
    pub fn files(&self, loaded: &[Module]) -> impl Iterator<Item = PathBuf> {
        let lists = LISTS.map(|name| self.folder.join(name));
        lists.into_iter().chain(loaded.iter().map(|module| module.path.clone()))
    }

    fn list(folder: PathBuf) -> Result<Self, Error> {
        let read = |name| match fs::read_to_string(folder.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            read => read.map_err(|source| Error::Read { path: folder.join(name), source }),
        };
        let [built_in, index] = [read(LISTS[0])?, read(LISTS[1])?];
        let built_in = built_in.lines().filter_map(|line| name_of(Path::new(line))).collect();
        let indexed = index.lines().filter_map(|line| line.split_once(':')).map(|(path, _)| folder.join(path));
        let mut paths: HashMap<_, _> = indexed.filter_map(|path| Some((name_of(&path)?, path))).collect();
        if paths.is_empty() {
            walk(&folder, &mut paths).map_err(|source| Error::Read { path: folder.clone(), source })?;
        }
        Ok(Self { folder, paths, built_in })
    }

    /// Whether the kernel has a module built in.
    pub fn is_built_in(&self, name: &str) -> bool {
        self.built_in.contains(&normal(name))
    }

    /// Whether there is such a module, built in or not.
    pub fn has(&self, name: &str) -> bool {
        self.is_built_in(name) || self.paths.contains_key(&normal(name))
    }

    /// The modules called `names` and those that they need, in the order to load them.
    ///
    /// # Errors
    /// When one is not there, or cannot be read.
    pub fn load<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> Result<Vec<Module>, Error> {
        let (mut loaded, mut seen) = (vec![], HashSet::new());
        for name in names {
            self.load_one(&normal(name), &mut seen, &mut loaded)?;
        }
        Ok(loaded)
    }

    /// Copies those of `names` that there are, and what they need, to `folder`, which is made: unpacked, and with a list of
    /// what is built in. How many there are.
    ///
    /// # Errors
    /// When one cannot be read, or not be written.
    pub fn copy<'a>(&self, names: impl IntoIterator<Item = &'a str>, folder: &Path) -> Result<usize, Error> {
        let (mut loaded, mut seen) = (vec![], HashSet::new());
        for name in names.into_iter().filter(|name| self.has(name)) {
            match self.load_one(&normal(name), &mut seen, &mut loaded) {
                // It is of no use without the others.
                Err(Error::Missing { .. }) => {}
                result => result?,
            }
        }
        let write = |path: PathBuf, bytes: &[u8]| {
            let written = fs::write(&path, bytes).and_then(|()| File::open(&path)?.sync_all());
            written.map_err(|source| Error::Write { path, source })
        };
        fs::create_dir_all(folder).map_err(|source| Error::Write { path: folder.into(), source })?;
        let built_in: String = self.built_in.iter().map(|name| format!("{name}.ko\n")).collect();
        write(folder.join("modules.builtin"), built_in.as_bytes())?;
        for module in &loaded {
            write(folder.join(&module.name).with_extension("ko"), &module.object)?;
        }
        Ok(loaded.len())
    }

    fn load_one(&self, name: &str, seen: &mut HashSet<String>, loaded: &mut Vec<Module>) -> Result<(), Error> {
        if self.built_in.contains(name) || !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let missing = || Error::Missing { name: name.into(), folder: self.folder.clone() };
        let path = self.paths.get(name).ok_or_else(missing)?;
        let object = read_object(path).map_err(|source| Error::Read { path: path.clone(), source })?;
        for needed in depends(&object) {
            self.load_one(&normal(&needed), seen, loaded)?;
        }
        loaded.push(Module { name: name.into(), object, path: path.clone() });
        Ok(())
    }
}

fn has_modules(folder: &Path) -> bool {
    LISTS.iter().chain(&["kernel"]).any(|name| folder.join(name).exists())
}

/// A module's name as it is in `/proc/modules`: files may have dashes.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// The name of the module in a file, if it is one.
fn name_of(path: &Path) -> Option<String> {
    let (name, extension) = path.file_name()?.to_str()?.split_once(".ko")?;
    ["", ".xz", ".zst", ".gz"].contains(&extension).then(|| normal(name))
}

fn walk(folder: &Path, paths: &mut HashMap<String, PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        // No symbolic links: `build` leads to the kernel's source.
        if entry.file_type()?.is_dir() && entry.file_name() != OsStr::new("build") {
            walk(&entry.path(), paths)?;
        } else if let Some(name) = name_of(&entry.path()) {
            paths.insert(name, entry.path());
        }
    }
    Ok(())
}

/// A module's object, unpacked.
fn read_object(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = vec![];
    File::open(path)?.take(MODULE_MAX).read_to_end(&mut bytes)?;
    if let Some(compression) = Compression::detect(&bytes) {
        let unsupported = || io::Error::new(io::ErrorKind::Unsupported, format!("it is compressed by {compression}"));
        let mut object = vec![];
        unpack(compression, &bytes[..]).ok_or_else(unsupported)??.take(MODULE_MAX).read_to_end(&mut object)?;
        bytes = object;
    }
    if bytes.starts_with(b"\x7fELF") { Ok(bytes) } else { Err(io::Error::other("it is no kernel module")) }
}

/// The names of the modules that `object` needs: of its `.modinfo`, `depends=a,b`.
fn depends(object: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(at) = memchr::memmem::find(object, key) else { return vec![] };
    let value = object[at + key.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(value);
    names.split(',').filter(|name| !name.is_empty()).map(String::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const VERSION: &str = "6.1.0-test";

    fn object(depends: &str) -> Vec<u8> {
        format!("\x7fELF....license=GPL\0depends={depends}\0retpoline=Y\0").into_bytes()
    }

    #[test]
    fn a_release_is_no_path_and_no_order_to_a_terminal() {
        assert_eq!(release("6.1.0-42-cloud-amd64 (me@here) #1"), Some("6.1.0-42-cloud-amd64"));
        assert_eq!(release("6.12.57+deb13-amd64"), Some("6.12.57+deb13-amd64"));
        for bad in ["", " ", "..", ".", "../6.1", "6.1/../x", "/", "6.1\x1b]0;x\x07", "6.1\u{e9}", "6.1\u{fffd} x"] {
            assert_eq!(release(bad), None, "{bad:?}");
        }
    }

    fn folder() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("lib/modules").join(VERSION);
        fs::create_dir_all(folder.join("kernel/fs")).unwrap();
        fs::write(folder.join("modules.builtin"), "kernel/lib/crc16.ko\n").unwrap();
        let write = |name: &str, bytes: &[u8]| fs::write(folder.join("kernel").join(name), bytes).unwrap();
        write("fs/ext4.ko", &object("jbd2,crc16,mb-cache"));
        write("fs/jbd2.ko", &object(""));
        write("mb-cache.ko", &object(""));
        let mut gzip = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
        gzip.write_all(&object("ext4")).unwrap();
        write("packed.ko.gz", &gzip.finish().unwrap());
        write("broken.ko", b"text");
        root
    }

    fn names(modules: &[Module]) -> Vec<&str> {
        modules.iter().map(|module| module.name.as_str()).collect()
    }

    #[test]
    fn what_a_module_needs_comes_before_it_and_once() {
        let root = folder();
        for at in ["", "lib/modules", "lib/modules/6.1.0-test"] {
            let modules = Modules::open(&root.path().join(at), VERSION).unwrap();
            let loaded = modules.load(["packed", "crc16", "jbd2", "mb-cache"]).unwrap();
            assert_eq!(names(&loaded), ["jbd2", "mb_cache", "ext4", "packed"]);
            assert_eq!(loaded[3].object, object("ext4"));
            let files: Vec<_> = modules.files(&loaded[..1]).collect();
            let expected = ["modules.builtin", "modules.dep", "kernel/fs/jbd2.ko"];
            assert_eq!(files, expected.map(|name| modules.folder().join(name)));
            assert!(modules.is_built_in("crc16") && modules.has("mb-cache") && !modules.has("overlay"));
        }
    }

    #[test]
    fn the_index_is_taken_where_there_is_one() {
        let root = folder();
        let index = root.path().join("lib/modules").join(VERSION).join("modules.dep");
        fs::write(index, "kernel/fs/jbd2.ko:\nkernel/fs/ext4.ko: kernel/fs/jbd2.ko\n").unwrap();
        let modules = Modules::open(root.path(), VERSION).unwrap();
        assert!(modules.has("ext4") && !modules.has("packed"));
    }

    #[test]
    fn a_copy_has_what_is_needed_and_no_more() {
        let (root, to) = (folder(), tempfile::tempdir().unwrap());
        let modules = Modules::open(root.path(), VERSION).unwrap();
        let folder = to.path().join("lib/modules").join(VERSION);
        assert_eq!(modules.copy(["packed", "crc16", "xfs"], &folder).unwrap(), 4);
        let copy = Modules::find(&to.path().join("vmlinux"), VERSION).unwrap().unwrap();
        assert_eq!(names(&copy.load(["packed"]).unwrap()), ["jbd2", "mb_cache", "ext4", "packed"]);
        assert_eq!(fs::read(folder.join("packed.ko")).unwrap(), object("ext4"));
        assert!(copy.is_built_in("crc16") && !copy.has("broken"));
        assert!(matches!(modules.copy(["broken"], &folder), Err(Error::Read { .. })));
    }

    #[test]
    fn what_is_missing_or_broken_is_named() {
        let root = folder();
        let modules = Modules::open(root.path(), VERSION).unwrap();
        let missing = modules.load(["overlay"]).unwrap_err().to_string();
        assert!(missing.contains("module `overlay` in") && missing.contains("--modules DIR"), "{missing}");
        let broken = modules.load(["broken"]).unwrap_err().to_string();
        assert!(broken.starts_with("cannot read") && broken.ends_with("broken.ko"), "{broken}");
        let none = Modules::open(root.path(), "6.2").unwrap_err().to_string();
        assert!(none.contains("nor lib/modules/6.2 with some"), "{none}");
    }

    #[test]
    fn they_are_found_beside_the_kernel() {
        let root = folder();
        let found = |kernel: &str| Modules::find(&root.path().join(kernel), VERSION).unwrap();
        assert!(found("vmlinuz").is_some());
        fs::create_dir(root.path().join("boot")).unwrap();
        assert!(found("boot/vmlinuz").is_some());
        assert!(found("lib/modules/vmlinuz").is_none());
    }
}

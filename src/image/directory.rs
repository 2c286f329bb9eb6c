//! A directory of the host as a root file system: a copy, with the owners that the files have on the host.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs::{self, File, Metadata as HostMetadata, OpenOptions};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{lgetxattr, llistxattr, major, minor};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use super::archive::{Metadata, invalid};
use super::contents::Contents;
use super::digest::Digest;
use super::erofs;
use super::layer::Refused;
use super::tree::{Content, Id, Tree};

/// Goes through all files below `root`, each directory before what is in it, in the order of their names, and not into
/// other file systems, such as a mounted /proc. `visit` gets the path below the root.
fn walk(root: &Path, visit: &mut dyn FnMut(&Path, &HostMetadata) -> io::Result<()>) -> Result<(), Refused> {
    let device = fs::metadata(root)?.dev();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        let refused = |path: &Path| {
            let entry = path.as_os_str().as_bytes().to_vec();
            move |source| Refused { entry: Some(entry), source }
        };
        let names = fs::read_dir(&folder).and_then(|names| names.map(|entry| Ok(entry?.file_name())).collect());
        let mut names: Vec<_> = names.map_err(refused(&folder))?;
        names.sort_unstable();
        for name in names {
            let path = folder.join(name);
            let metadata = fs::symlink_metadata(&path).map_err(refused(&path))?;
            let below = path.strip_prefix(root).expect("it is below the root");
            visit(below, &metadata).map_err(refused(&path))?;
            if metadata.is_dir() && metadata.dev() == device {
                folders.push(path);
            }
        }
    }
    Ok(())
}

/// A digest that changes when a file below `root` does: of names, types, owners, sizes and times, not of what is in files.
pub(super) fn fingerprint(root: &Path) -> Result<Digest, Refused> {
    let mut hash = Sha256::new();
    let mut add = |path: &Path, metadata: &HostMetadata| {
        let numbers = [
            metadata.mode().into(),
            metadata.uid().into(),
            metadata.gid().into(),
            metadata.size(),
            metadata.ino(),
            metadata.dev(),
            metadata.mtime().cast_unsigned(),
            metadata.mtime_nsec().cast_unsigned(),
            metadata.ctime().cast_unsigned(),
            metadata.ctime_nsec().cast_unsigned(),
        ];
        numbers.iter().for_each(|number| hash.update(number.to_le_bytes()));
        hash.update(path.as_os_str().as_bytes());
        hash.update([0]);
        Ok(())
    };
    add(Path::new(""), &fs::metadata(root)?)?;
    walk(root, &mut add)?;
    let bytes: [u8; 32] = hash.finalize().into();
    // The digest of a digest, so that it is none of file contents.
    Ok(Digest::of(&[b"directory".as_slice(), &bytes].concat()))
}

/// Copies what is below `root` into the tree.
pub(super) fn unpack(root: &Path, tree: &mut Tree, contents: &mut Contents) -> Result<(), Refused> {
    tree.next_layer();
    tree.set_root(metadata(root, &fs::metadata(root)?)?);
    let mut linked: HashMap<(u64, u64), Id> = HashMap::new();
    walk(root, &mut |below, host| {
        let Some((parent, name)) = tree.parent(below.as_os_str().as_bytes())? else { return Ok(()) };
        if let Some(id) = linked.get(&(host.dev(), host.ino())) {
            return tree.link(parent, name, *id);
        }
        let path = root.join(below);
        let metadata = metadata(&path, host)?;
        erofs::check_xattrs(&metadata)?;
        let kind = host.file_type();
        let content = if kind.is_dir() {
            Content::Directory(BTreeMap::new())
        } else if kind.is_symlink() {
            Content::Symlink(fs::read_link(&path)?.into_os_string().into_vec())
        } else if kind.is_file() {
            Content::File(copy(&path, host, &metadata, contents)?)
        } else if kind.is_char_device() {
            Content::CharDevice(major(host.rdev()), minor(host.rdev()))
        } else if kind.is_block_device() {
            Content::BlockDevice(major(host.rdev()), minor(host.rdev()))
        } else if kind.is_fifo() {
            Content::Fifo
        } else {
            // A socket is nothing without the process that made it.
            return Ok(());
        };
        let id = tree.put(parent, name, metadata, content)?;
        if host.nlink() > 1 && !kind.is_dir() {
            linked.insert((host.dev(), host.ino()), id);
        }
        Ok(())
    })
}

fn copy(
    path: &Path,
    host: &HostMetadata,
    metadata: &Metadata,
    contents: &mut Contents,
) -> io::Result<super::contents::Data> {
    // A pipe put in its place would wait for ever.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let mut file: File = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    contents.add(host.size(), None, erofs::room(metadata), &mut file).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => invalid("it has become shorter while it was read"),
        _ => error,
    })
}

fn metadata(path: &Path, host: &HostMetadata) -> io::Result<Metadata> {
    Ok(Metadata {
        mode: u16::try_from(host.mode() & 0o7777).unwrap_or_default(),
        uid: host.uid(),
        gid: host.gid(),
        mtime: (host.mtime(), u32::try_from(host.mtime_nsec()).unwrap_or_default()),
        xattrs: xattrs(path)?,
    })
}

fn xattrs(path: &Path) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut names = vec![0; 64 << 10];
    let length = match llistxattr(path, &mut names) {
        Err(Errno::NOTSUP | Errno::PERM) => 0,
        result => result?,
    };
    let mut found = BTreeMap::new();
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 64 << 10];
        match lgetxattr(path, OsStr::from_bytes(name), &mut value) {
            Ok(length) => {
                value.truncate(length);
                found.insert(name.to_vec(), value);
            }
            // Only root may read trusted ones; the file may have lost it.
            Err(Errno::NODATA | Errno::PERM | Errno::NOTSUP) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(found)
}

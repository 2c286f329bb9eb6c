//! The folder of a snapshot: it appears under its name when it is whole, and its files are removed without touching any others.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, Mode, OFlags, RenameFlags, flock, renameat_with};

use crate::file::open;
use crate::snapshot;

/// Files in the folder of a snapshot.
pub const STATE: &str = "state";
pub const MEMORY: &str = "memory";
pub const CONFIG: &str = "config.json";
/// What memory a machine of it has used, and the same while it is written.
pub const WORKING_SET: &str = "working-set";
pub const NEW_WORKING_SET: &str = "working-set.new";
/// In a temporary folder, a state that is being replaced.
pub const OLD_STATE: &str = "state.old";
const FILES: [&str; 6] = [STATE, MEMORY, CONFIG, WORKING_SET, NEW_WORKING_SET, OLD_STATE];

/// Whether a folder may go: it has the files of a snapshot, or none.
pub fn may_go(folder: &Path) -> bool {
    let is_folder = fs::symlink_metadata(folder).is_ok_and(|metadata| metadata.is_dir());
    let Some(entries) = fs::read_dir(folder).ok().filter(|_| is_folder) else { return false };
    let mut empty = true;
    for entry in entries {
        empty = false;
        let known = |entry: fs::DirEntry| {
            FILES.iter().any(|name| *name == entry.file_name()) && entry.file_type().is_ok_and(|kind| kind.is_file())
        };
        if !entry.is_ok_and(known) {
            return false;
        }
    }
    empty || has_state(folder)
}

/// Whether a folder has the state of a snapshot.
pub fn has_state(folder: &Path) -> bool {
    let mut start = vec![];
    let state = open(&folder.join(STATE)).and_then(|file| file.take(snapshot::VERSION_BYTES).read_to_end(&mut start));
    state.is_ok() && snapshot::version(&start).is_ok()
}

/// Removes a folder with the files of a snapshot. With others in it they stay, and so does the folder.
pub fn remove(folder: &Path) -> io::Result<()> {
    if fs::symlink_metadata(folder)?.is_dir() {
        for name in FILES {
            match fs::remove_file(folder.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
    fs::remove_dir(folder)
}

/// Gives `folder` the name `target`. A snapshot of that name then has that of `folder`, if it may be replaced.
pub fn give_name(folder: &Path, target: &Path, may_replace: bool) -> io::Result<()> {
    let rename = |flags| renameat_with(CWD, folder, CWD, target, flags);
    match rename(RenameFlags::NOREPLACE) {
        Err(rustix::io::Errno::EXIST) if may_replace && may_go(target) => Ok(rename(RenameFlags::EXCHANGE)?),
        Err(rustix::io::Errno::EXIST) => Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "there is something of that name that is not to be replaced",
        )),
        other => Ok(other?),
    }
}

/// The folder that something of this path is in.
pub fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A new folder beside `target`, locked for as long as its descriptor is open. Those that killed processes left are
/// removed.
pub fn temporary(target: &Path) -> io::Result<(PathBuf, File)> {
    let name = target.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy().into_owned();
    let prefix = format!(".{name}.saving-");
    let parent = parent(target);
    for entry in
        fs::read_dir(parent)?.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
    {
        // By itself it is a folder, and no link to one.
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        if let Ok(folder) = rustix::fs::open(entry.path(), flags, Mode::empty())
            && flock(&folder, FlockOperation::NonBlockingLockExclusive).is_ok()
        {
            // What cannot be removed does no harm.
            let _ = remove(&entry.path());
        }
    }
    for number in 0u32.. {
        use std::os::unix::fs::DirBuilderExt;
        let folder = parent.join(format!("{prefix}{}-{number}", std::process::id()));
        match fs::DirBuilder::new().mode(0o700).create(&folder) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => {
                other?;
                let lock = File::open(&folder)?;
                flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
                return Ok((folder, lock));
            }
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn only_what_is_a_snapshot_may_go() {
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("folder");
        let put = |name: &str, bytes: &[u8]| fs::write(folder.join(name), bytes).unwrap();
        assert!(!may_go(&folder));
        fs::create_dir(&folder).unwrap();
        assert!(may_go(&folder));
        put(STATE, b"of Brandenburg");
        assert!(!may_go(&folder));
        put(STATE, &snapshot::encode(&1).unwrap());
        put(MEMORY, b"");
        put(CONFIG, b"{}");
        assert!(may_go(&folder));
        // One of another version is one, too.
        put(STATE, b"bantam-state 7000 ?\n");
        assert!(may_go(&folder));
        let link = outer.path().join("link");
        symlink(&folder, &link).unwrap();
        assert!(!may_go(&link));
        assert!(remove(&link).is_err() && folder.join(STATE).exists(), "what a link leads to is not removed");

        put("notes", b"mine");
        assert!(!may_go(&folder));
        assert!(remove(&folder).is_err());
        assert_eq!(fs::read(folder.join("notes")).unwrap(), b"mine");
        fs::remove_file(folder.join("notes")).unwrap();
        remove(&folder).unwrap();
        fs::create_dir_all(folder.join(MEMORY)).unwrap();
        assert!(!may_go(&folder) && remove(&folder).is_err() && folder.join(MEMORY).exists());
        assert!(!may_go(Path::new("/dev/null")) && !may_go(&outer.path().join("none")));
    }
}

//! Where a snapshot goes, and what must not be replaced by one.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::folder::{self, MEMORY};
use super::snapshot::Error;
use crate::config::Config;
use crate::devices::console;
use crate::file::{FileId, file_id};

/// Where a snapshot goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// A folder that appears when all of it is there, in place of one of that name.
    Folder(PathBuf),
    /// A new folder whose memory is only what is other than in the snapshot that the machine was restored from. That has to stay
    /// where it is.
    Diff(PathBuf),
    /// Two files, each of which appears when all of it is there.
    Files {
        /// The state, with the configuration.
        state: PathBuf,
        /// Guest memory.
        memory: PathBuf,
        /// Whether the file of memory has only the pages that are other than in the one that the machine was restored from, or,
        /// of one that was booted, those that were ever used; the others are holes. It is of use when it has been merged into an
        /// earlier one, as Firecracker's `snapshot-editor` does: the state does not say what it stands on. Where it would replace
        /// the file that the machine was restored from, or was last saved to whole, it has all pages.
        diff: bool,
    },
}

impl Destination {
    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Folder(path) | Self::Diff(path) | Self::Files { state: path, .. } => path,
        }
    }

    /// Where memory goes by itself.
    pub(super) fn memory(&self) -> Option<&Path> {
        match self {
            Self::Files { memory, .. } => Some(memory),
            Self::Folder(_) | Self::Diff(_) => None,
        }
    }

    /// The same, with links followed, if it may be written while a machine of this configuration runs in this process. A diff
    /// that would take the place of one of the `wholes`, which have all of its memory, is not only what has changed. What the
    /// snapshot stands on that the machine was restored from has the memory files `bases`.
    ///
    /// # Errors
    /// When something else would be lost.
    pub(super) fn check(
        self,
        config: &Config,
        wholes: impl Fn(&Metadata) -> bool,
        bases: &[FileId],
    ) -> Result<Self, Error> {
        let Self::Files { state, memory, diff } = self else {
            let memory = fs::metadata(self.path().join(MEMORY));
            if memory.is_ok_and(|memory| bases.contains(&file_id(&memory))) {
                return Err(refuse(self.path(), "what the machine was restored from stands on the snapshot there"));
            }
            return self.outside();
        };
        let (state, old_state) = resolve(&state)?;
        let (memory, old_memory) = resolve(&memory)?;
        let [state_id, memory_id] = [&old_state, &old_memory].map(|old| old.as_ref().map(file_id));
        if state == memory || state_id.is_some() && state_id == memory_id {
            return Err(refuse(&memory, "the state and the memory take a file each"));
        }
        let own = if old_state.is_some() || old_memory.is_some() { own_files(config) } else { vec![] };
        for (path, id) in [(&state, state_id), (&memory, memory_id)] {
            if id.is_some_and(|id| own.contains(&id)) {
                return Err(refuse(path, "that is a file of the machine, or one that its process writes"));
            }
        }
        let diff = diff && !old_memory.is_some_and(|old| wholes(&old));
        Ok(Self::Files { state, memory, diff })
    }

    /// The same, if it is not in the folder of another snapshot.
    ///
    /// # Errors
    /// When it is.
    pub(super) fn outside(self) -> Result<Self, Error> {
        match folder::has_state(folder::parent(self.path())) {
            true => Err(refuse(self.path(), "it is in another one, which could be neither replaced nor removed then")),
            false => Ok(self),
        }
    }
}

fn refuse(path: &Path, why: &'static str) -> Error {
    Error::Refused { path: path.to_owned(), why }
}

/// Where a file goes, by whatever links, and what is there.
fn resolve(path: &Path) -> Result<(PathBuf, Option<Metadata>), Error> {
    let failed = |source| Error::Write { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let name = path.file_name().ok_or_else(|| refuse(path, "that is no name of a file"))?;
            Ok((fs::canonicalize(folder::parent(path)).map_err(failed)?.join(name), None))
        }
        found => {
            found.map_err(failed)?;
            let path = fs::canonicalize(path).map_err(failed)?;
            let metadata = fs::metadata(&path).map_err(failed)?;
            match metadata.is_file() {
                true => Ok((path, Some(metadata))),
                false => Err(refuse(&path, "what is there is no regular file")),
            }
        }
    }
}

/// The files that a machine of this configuration is made of, and those that this process can write: disks, what it logs to.
fn own_files(config: &Config) -> Vec<FileId> {
    let boot = [&config.kernel, &config.initrd, &config.rootfs].into_iter().flatten();
    let console = match &config.serial {
        console::Spec::File(path) => Some(path),
        _ => None,
    };
    let named = boot.chain(config.disks.iter().map(|disk| &disk.path)).chain(console);
    let mut ids: Vec<_> = named.filter_map(|path| fs::metadata(path).ok()).map(|it| file_id(&it)).collect();
    let open = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    // The mode of the link says what the descriptor may do.
    let written = open.filter(|entry| entry.metadata().is_ok_and(|link| link.mode() & 0o200 != 0));
    ids.extend(written.filter_map(|entry| fs::metadata(entry.path()).ok()).map(|it| file_id(&it)));
    ids
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::blk;
    use std::fs::File;
    use std::os::unix::fs::symlink;

    #[test]
    fn no_folder_is_in_a_snapshot_or_replaces_what_the_machine_stands_on() {
        let folder = tempfile::tempdir().unwrap();
        let saved = folder.path().join("saved");
        fs::create_dir(&saved).unwrap();
        fs::write(saved.join("state"), "bantam-state 7000 ?\n").unwrap();
        fs::write(saved.join("memory"), "").unwrap();
        let id = file_id(&fs::metadata(saved.join("memory")).unwrap());
        for (path, bases, why) in [
            (saved.join("new"), &[][..], "it is in another one"),
            (saved.clone(), &[(0, 0), id], "stands on the snapshot there"),
        ] {
            for destination in [Destination::Folder(path.clone()), Destination::Diff(path)] {
                let error = destination.check(&Config::new(), |_| false, bases).unwrap_err().to_string();
                assert!(error.contains(why), "{error}");
            }
        }
        for path in [saved, folder.path().join("new")] {
            Destination::Folder(path).check(&Config::new(), |_| false, &[(0, 0)]).unwrap();
        }
    }

    #[test]
    fn what_would_be_lost_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let old = ["kernel", "initrd", "disk", "console", "log", "state", "memory"];
        old.iter().for_each(|name| fs::write(path(name), name).unwrap());
        let _log = File::options().append(true).open(path("log")).unwrap();
        let _only_read = File::open(path("memory")).unwrap();
        fs::create_dir(path("folder")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, path("pipe"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        symlink("disk", path("link")).unwrap();
        symlink("memory", path("memory-link")).unwrap();
        symlink("none", path("dangling")).unwrap();
        fs::hard_link(path("initrd"), path("hard")).unwrap();
        let mut config = Config::new().disk(blk::Spec { readonly: true, ..blk::Spec::new(path("disk")) });
        (config.kernel, config.initrd) = (Some(path("kernel")), Some(path("initrd")));
        config.serial = console::Spec::File(path("console"));
        let check = |state: &str, memory: &str| {
            let destination = Destination::Files { state: path(state), memory: path(memory), diff: true };
            destination.check(&config, |old| old.len() == 6, &[])
        };

        let mine = "is a file of the machine";
        for (name, why) in [
            ("kernel", mine),
            ("initrd", mine),
            ("hard", mine),
            ("disk", mine),
            ("link", mine),
            ("folder/../disk", mine),
            ("console", mine),
            ("log", mine),
            ("folder", "no regular file"),
            ("socket", "no regular file"),
            ("pipe", "no regular file"),
            ("dangling", "cannot write the snapshot"),
            ("none/state", "cannot write the snapshot"),
            ("new", "a file each"),
            ("folder/../new", "a file each"),
        ] {
            for (state, memory) in [(name, "new"), ("new", name)] {
                let error = check(state, memory).unwrap_err().to_string();
                assert!(error.contains(why), "{name}: {error}");
            }
        }
        assert!(check("memory-link", "memory").is_err());
        assert!(old.iter().all(|name| fs::read(path(name)).unwrap() == name.as_bytes()));

        let folder = fs::canonicalize(folder.path()).unwrap();
        for (memory, is, diff) in [("new", "new", true), ("memory-link", "memory", false), ("state", "state", true)] {
            let expected = Destination::Files { state: folder.join("s"), memory: folder.join(is), diff };
            assert_eq!(check("s", memory).unwrap(), expected);
        }
    }
}

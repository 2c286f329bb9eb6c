//! The files that a machine opens, makes or removes while it runs: all others are open before.

use std::path::{Path, PathBuf};

use super::{Config, Share};
use crate::devices::console;
use crate::sandbox::Access;
use crate::virtio::vsock;

impl Share {
    /// What of the host's files is opened while the machine runs.
    pub fn opened_later(&self) -> (PathBuf, Access) {
        (self.path.clone(), if self.readonly { Access::Read } else { Access::Change })
    }
}

/// A socket is removed at the end.
fn socket(path: &Path) -> (PathBuf, Access) {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    (folder.unwrap_or(Path::new(".")).to_owned(), Access::Remove)
}

impl vsock::Spec {
    /// What of the host's files is opened while the machine runs. Programs are connected to without it.
    pub fn opened_later(&self) -> (PathBuf, Access) {
        socket(&self.socket)
    }
}

impl console::Spec {
    /// What of the host's files is opened while the machine runs.
    pub fn opened_later(&self) -> Option<(PathBuf, Access)> {
        match self {
            Self::Socket(path) => Some(socket(path)),
            Self::Stdio | Self::None | Self::File(_) => None,
        }
    }
}

impl Config {
    /// The files, and folders with all that is below, that the machine opens, makes or removes while it runs, and what it
    /// does to them: rules for [Landlock](crate::sandbox::Ruleset). A disk's new path
    /// ([`Change::Disk`](crate::virtio::change::Change::Disk)) and where a snapshot goes are not known here.
    pub fn opened_later(&self) -> Vec<(PathBuf, Access)> {
        let vsock = self.vsock.iter().map(vsock::Spec::opened_later);
        self.folders().chain(vsock).chain(self.serial.opened_later()).collect()
    }

    /// Those of them in which devices open files: shared folders, and a root that is one.
    pub fn folders(&self) -> impl Iterator<Item = (PathBuf, Access)> {
        let root = self.root_folder().map(|path| (path.to_owned(), Access::Change));
        root.into_iter().chain(self.shares.iter().map(Share::opened_later))
    }

    /// Whether devices open files while the machine runs.
    pub fn has_folders(&self) -> bool {
        self.folders().next().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::blk;

    #[test]
    fn only_what_is_opened_while_it_runs_is_named() {
        let share = |text: &str| text.parse().unwrap();
        let vsock = vsock::Spec { cid: 3, socket: "sockets/vsock".into() };
        let config = Config::new().kernel("k").initrd("i").disk(blk::Spec::new("disk"));
        assert_eq!(config.opened_later(), []);
        let config = config.share(share("/src:/src")).share(share("/ro:/ro:ro")).vsock(vsock);
        let config = config.serial(console::Spec::Socket("console".into()));
        let expected =
            [("/src", Access::Change), ("/ro", Access::Read), ("sockets", Access::Remove), (".", Access::Remove)];
        assert_eq!(config.opened_later(), expected.map(|(path, access)| (path.into(), access)));
    }
}

//! A listening Unix socket at a path, which vanishes with it.

use std::io;
use std::ops::Deref;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};

use crate::file::{FileId, file_id};

/// A listening socket and its path.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
    /// What was made there.
    made: Option<FileId>,
}

impl Listener {
    /// Listens at `path`. A socket that a killed process left there makes way; anything else is an error
    /// ([`io::ErrorKind::AddrInUse`]).
    pub fn bind(path: &Path) -> io::Result<Self> {
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_stale(path) => {
                std::fs::remove_file(path)?;
                UnixListener::bind(path)?
            }
            bound => bound?,
        };
        Ok(Self::at(path, listener))
    }

    /// Listens at `path`, where nothing may be.
    pub fn create(path: &Path) -> io::Result<Self> {
        Ok(Self::at(path, UnixListener::bind(path)?))
    }

    fn at(path: &Path, listener: UnixListener) -> Self {
        Self { listener, path: path.to_owned(), made: identity(path) }
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn identity(path: &Path) -> Option<FileId> {
    std::fs::symlink_metadata(path).ok().map(|metadata| file_id(&metadata))
}

/// Whether `path` is a socket that nobody has open: its process was killed. One of another type finds out without
/// being taken for a client.
pub fn is_stale(path: &Path) -> bool {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    is_socket && UnixDatagram::unbound().and_then(|probe| probe.connect(path)).is_err_and(refused)
}

impl Deref for Listener {
    type Target = UnixListener;

    fn deref(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Another process may have made one of its own there since.
        if self.made.is_some() && identity(&self.path) == self.made {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_goes_with_its_listener_and_another_one_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        drop(Listener::bind(&path).unwrap());
        assert!(!path.exists());
        let first = Listener::bind(&path).unwrap();
        // Kept, so that the other one has another inode.
        std::fs::rename(&path, folder.path().join("moved")).unwrap();
        let second = Listener::bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
        assert!(!path.exists());
    }
}

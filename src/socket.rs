//! A listening Unix socket at a path, which vanishes with it.

use std::io;
use std::ops::Deref;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};

/// A listening socket and its path.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
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
        Ok(Self { listener, path: path.to_owned() })
    }

    /// Listens at `path`, where nothing may be.
    pub fn create(path: &Path) -> io::Result<Self> {
        Ok(Self { listener: UnixListener::bind(path)?, path: path.to_owned() })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
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
        let _ = std::fs::remove_file(&self.path);
    }
}

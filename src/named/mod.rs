//! Machines by name: a control socket for each that has one, and no daemon.
//!
//! The sockets are in `$XDG_RUNTIME_DIR/bantam`, or in `/tmp/bantam-UID` where that variable is not set, in a folder that
//! only this user may enter. A client writes a [`Request`] as one line of JSON, and is answered by one line: an object that
//! has `error` when it could not be done. The connection stays open for as long as the machine runs.

mod client;
mod console;
mod server;

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::process::geteuid;
use serde::{Deserialize, Serialize};

pub use client::{Client, list};
pub use console::Watchers;
pub use server::Server;

pub use crate::config::Name;

/// Why there is no machine of a name, or nothing could be asked of it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The folder of the sockets cannot be used.
    #[error("cannot use {} for the sockets of named machines", .0.display())]
    Folder(PathBuf, #[source] io::Error),
    /// Somebody else could have made it.
    #[error("cannot use {} for the sockets of named machines: others may enter it, or it is another user's", .0.display())]
    Strange(PathBuf),
    /// A machine has the name.
    #[error("cannot name the machine {0}: a machine of that name runs (`bantam ps` shows it)")]
    InUse(Name),
    /// The socket cannot be made.
    #[error("cannot name the machine {name}")]
    Bind {
        /// The name.
        name: Name,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// No machine has the name.
    #[error("no machine named {0} runs (`bantam ps` shows those that do)")]
    NoMachine(Name),
    /// It does not answer.
    #[error("cannot talk to the machine {name}")]
    Talk {
        /// The name.
        name: Name,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// No folder of this name can be asked for.
    #[error("cannot save the machine {name} to {}: the path is no UTF-8", .folder.display())]
    NoText {
        /// The machine's name.
        name: Name,
        /// Where it was to be saved.
        folder: PathBuf,
    },
    /// It would not.
    #[error("{0}")]
    Refused(String),
}

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// What machine it is, and how it is: an [`About`].
    About,
    /// Have it stand still.
    Pause,
    /// Have it go on.
    Resume,
    /// Ask the guest to end: its command by SIGTERM, or the guest by Ctrl-Alt-Del if it has no command but a keyboard.
    /// `{"asked": false}` if there is neither.
    Terminate,
    /// End the machine.
    End,
    /// Its counters, as Prometheus reads them: `{"text": ".."}`.
    Metrics,
    /// Save it to this folder, whose path is absolute.
    Snapshot(PathBuf),
    /// Save what has changed since the snapshot that it was restored from, to such a folder.
    Diff(PathBuf),
    /// From then on the connection is the serial console.
    Console,
}

/// A machine that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct About {
    /// Its name.
    pub name: Name,
    /// The process that runs it.
    pub pid: u32,
    /// Whether it stands still.
    pub paused: bool,
    /// Seconds since it was started.
    pub uptime_seconds: u64,
    /// Its vCPUs.
    pub cpus: u32,
    /// Its memory, in bytes.
    pub memory: u64,
    /// Its kernel's file.
    pub kernel: PathBuf,
}

/// The folder of the sockets.
fn folder() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| Path::new(folder).is_absolute()) {
        Some(folder) => Path::new(&folder).join("bantam"),
        None => PathBuf::from(format!("/tmp/bantam-{}", geteuid().as_raw())),
    }
}

/// The folder of the sockets, made if it is not there. Nobody else has made it.
fn make_folder() -> Result<PathBuf, Error> {
    let folder = folder();
    match DirBuilder::new().mode(0o700).create(&folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(Error::Folder(folder, error)),
        _ => {}
    }
    let metadata = fs::symlink_metadata(&folder).map_err(|error| Error::Folder(folder.clone(), error))?;
    let own = metadata.is_dir() && metadata.uid() == geteuid().as_raw() && metadata.mode() & 0o077 == 0;
    if own { Ok(folder) } else { Err(Error::Strange(folder)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_make_no_paths() {
        for name in ["vm", "a-b_c.9", "0", &"x".repeat(64)] {
            assert_eq!(name.parse::<Name>().unwrap().to_string(), name);
        }
        for name in ["", ".", "..", "-x", "a/b", "a b", "ä", "a\n", &"x".repeat(65)] {
            assert!(name.parse::<Name>().unwrap_err().to_string().contains("no name"), "{name}");
        }
    }
}

//! Snapshots: a machine to files, and from files.
//!
//! What is in the files is described in docs/snapshot-format.md.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::memory_file;
use crate::config::Config;
use crate::devices::console;
use crate::kvm::{Cpu, VcpuState, VmState};
use crate::memory::GuestRam;
use crate::snapshot;
use crate::virtio::net::MacAddr;

/// Files in the folder of a snapshot.
const STATE: &str = "state";
const MEMORY: &str = "memory";
const CONFIG: &str = "config.json";

/// Why there is no snapshot, or no machine from one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something of the machine is on the host only.
    #[error("cannot save a machine with {0}")]
    Unsaveable(&'static str),
    /// It cannot be written.
    #[error("cannot write the snapshot {}", .path.display())]
    Write {
        /// Where.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// It cannot be read.
    #[error("cannot read {} of a snapshot", .path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The state is damaged, or another version's.
    #[error("cannot use the snapshot's state {}", .path.display())]
    State {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: snapshot::Error,
    },
    /// The memory belongs to another machine, or is damaged.
    #[error("cannot use {} as memory of {expected} bytes: it has {found}", .path.display())]
    MemoryLength {
        /// Which file.
        path: PathBuf,
        /// Its length.
        found: u64,
        /// That of the machine's memory.
        expected: u64,
    },
    /// The machine to restore is another than the saved one.
    #[error("cannot restore the snapshot: it has {saved} {what}, and the machine is to have {asked}")]
    Other {
        /// Of what.
        what: &'static str,
        /// How many there were.
        saved: u64,
        /// How many there are to be.
        asked: u64,
    },
    /// A part of the state does not fit.
    #[error("cannot restore the snapshot")]
    Part(#[from] snapshot::Error),
}

/// Where a snapshot goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// A folder that appears when all of it is there, in place of one of that name.
    Folder(PathBuf),
    /// Two files, each of which appears when all of it is there.
    Files {
        /// The state, with the configuration.
        state: PathBuf,
        /// Guest memory.
        memory: PathBuf,
    },
}

/// All that makes a machine go on elsewhere, but for its memory.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    pub config: Config,
    pub cpu: Cpu,
    /// The length of the memory file.
    pub memory: u64,
    pub vm: VmState,
    pub vcpus: Vec<VcpuState>,
    /// By where they are.
    pub devices: BTreeMap<String, Value>,
}

/// A snapshot to restore a machine from.
#[derive(Debug)]
pub struct Snapshot {
    /// The machine that is built. Paths, addresses and limits may be changed, but not what devices there are.
    pub config: Config,
    /// Whether all memory is read before the guest goes on; else each page when it is first used.
    pub prefault: bool,
    pub(super) state: State,
    pub(super) memory: Arc<File>,
}

impl Snapshot {
    /// Opens the snapshot in a folder.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self, Error> {
        let folder = folder.as_ref();
        Self::open_files(folder.join(STATE), folder.join(MEMORY))
    }

    /// Opens a snapshot of two files.
    pub fn open_files(state: impl Into<PathBuf>, memory: impl Into<PathBuf>) -> Result<Self, Error> {
        let (path, memory_path) = (state.into(), memory.into());
        let read = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Read { path, source }
        };
        let bytes = fs::read(&path).map_err(read(&path))?;
        let state: State = snapshot::decode(&bytes).map_err(|source| Error::State { path, source })?;
        let memory = File::open(&memory_path).map_err(read(&memory_path))?;
        let found = memory.metadata().map_err(read(&memory_path))?.len();
        if found != state.memory {
            return Err(Error::MemoryLength { path: memory_path, found, expected: state.memory });
        }
        // Limits are those of one run.
        let config = Config { timeout: None, boot_timeout: None, ..state.config.clone() };
        Ok(Self { config, prefault: false, state, memory: Arc::new(memory) })
    }

    /// Whether the machine of the changed configuration is one that the state fits.
    pub(super) fn check(&self) -> Result<(), Error> {
        let saved = &self.state;
        for (what, saved, asked) in [
            ("vCPUs", saved.vcpus.len() as u64, u64::from(self.config.cpus)),
            ("bytes of memory", saved.memory, self.config.memory.get()),
        ] {
            if saved != asked {
                return Err(Error::Other { what, saved, asked });
            }
        }
        saveable(&self.config)
    }
}

/// Whether all of a machine can be saved.
pub(super) fn saveable(config: &Config) -> Result<(), Error> {
    if config.command.is_some() {
        // Its streams are those of this process.
        Err(Error::Unsaveable("a command, whose streams are on the host: run the guest's own init"))
    } else if !config.shares.is_empty() {
        // The guest knows files by numbers that stand for what is open here.
        Err(Error::Unsaveable("shared folders, of which the guest has files open on the host: use a disk"))
    } else {
        Ok(())
    }
}

/// The configuration with paths that mean the same from any folder, and without what is only of this process.
pub(super) fn portable(config: &Config) -> Result<Config, Error> {
    let absolute = |path: &mut PathBuf| -> Result<(), Error> {
        *path = std::path::absolute(&path).map_err(|source| Error::Write { path: path.clone(), source })?;
        Ok(())
    };
    let mut config = config.clone();
    let disks = config.disks.iter_mut().map(|disk| &mut disk.path);
    let vsock = config.vsock.iter_mut().map(|vsock| &mut vsock.socket);
    let boot = [&mut config.kernel, &mut config.initrd, &mut config.rootfs].into_iter().flatten();
    disks.chain(vsock).chain(boot).try_for_each(absolute)?;
    // A card's address does not depend on where it is put.
    for net in &mut config.nets {
        let tap = net.tap.as_deref().filter(|name| !name.contains('%')).map(MacAddr::from_name);
        net.mac = net.mac.or_else(|| net.user_mac()).or(tap);
    }
    if let console::Spec::File(path) | console::Spec::Socket(path) = &mut config.serial {
        absolute(path)?;
    }
    Ok(config)
}

/// A snapshot that is being written.
pub(super) struct Writing {
    destination: Destination,
    /// What is there until it is whole: a locked folder, and where its files go at the end.
    folder: PathBuf,
    lock: File,
    files: Vec<File>,
}

impl Writing {
    /// Writes state and memory, but does not wait until they are on the disk. The machine stands still.
    pub fn begin(destination: Destination, state: &State, ram: &GuestRam) -> Result<Self, Error> {
        let target = match &destination {
            Destination::Folder(folder) => folder.clone(),
            Destination::Files { state, .. } => state.clone(),
        };
        let write = |source| Error::Write { path: target.clone(), source };
        let (folder, lock) = temporary(&target).map_err(write)?;
        let mut writing = Writing { destination, folder, lock, files: vec![] };
        writing.fill(state, ram).map_err(|error| match error {
            Problem::Host(source) => write(source),
            Problem::State(error) => Error::Part(error),
        })?;
        Ok(writing)
    }

    fn fill(&mut self, state: &State, ram: &GuestRam) -> Result<(), Problem> {
        // Guest memory is nobody else's.
        let create = |name: &str| {
            use std::os::unix::fs::OpenOptionsExt;
            File::options().write(true).create_new(true).mode(0o600).open(self.folder.join(name))
        };
        let memory = create(MEMORY)?;
        memory_file::write(ram, &memory)?;
        let mut file = create(STATE)?;
        file.write_all(&snapshot::encode(state).map_err(Problem::State)?)?;
        self.files = vec![memory, file];
        if matches!(self.destination, Destination::Folder(_)) {
            let mut config = create(CONFIG)?;
            serde_json::to_writer_pretty(&mut config, &state.config).map_err(io::Error::other)?;
            config.write_all(b"\n")?;
            self.files.push(config);
        }
        Ok(())
    }

    /// Waits until all is on the disk, and puts it where it belongs.
    pub fn finish(self) -> Result<(), Error> {
        let path = match &self.destination {
            Destination::Folder(folder) => folder.clone(),
            Destination::Files { state, .. } => state.clone(),
        };
        self.place().map_err(|source| Error::Write { path, source })
    }

    fn place(&self) -> io::Result<()> {
        self.files.iter().try_for_each(File::sync_all)?;
        match &self.destination {
            Destination::Folder(target) => {
                self.lock.sync_all()?;
                replace(&self.folder, target)?;
                File::open(parent(target))?.sync_all()
            }
            Destination::Files { state, memory } => {
                // The state last: it says how long the memory is.
                for (name, target) in [(MEMORY, memory), (STATE, state)] {
                    let from = self.folder.join(name);
                    // A name on another file system is none to rename to.
                    match fs::rename(&from, target) {
                        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
                            fs::copy(&from, target)?;
                        }
                        other => other?,
                    }
                }
                File::open(parent(state))?.sync_all()
            }
        }
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        // What became of the folder that was replaced, or what was not finished.
        if let Err(error) = fs::remove_dir_all(&self.folder)
            && error.kind() != io::ErrorKind::NotFound
        {
            log::warn!("cannot remove {}: {error}", self.folder.display());
        }
    }
}

enum Problem {
    Host(io::Error),
    State(snapshot::Error),
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Self {
        Self::Host(error)
    }
}

/// Gives `folder` the name `target`. A folder of that name then has that of `folder`.
fn replace(folder: &Path, target: &Path) -> io::Result<()> {
    let rename = |flags| renameat_with(CWD, folder, CWD, target, flags);
    match rename(RenameFlags::NOREPLACE) {
        Err(rustix::io::Errno::EXIST) if is_snapshot(target) => Ok(rename(RenameFlags::EXCHANGE)?),
        Err(rustix::io::Errno::EXIST) => {
            Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is something else of that name, and no snapshot"))
        }
        other => Ok(other?),
    }
}

/// Whether a folder may go: it has a snapshot or nothing in it.
fn is_snapshot(folder: &Path) -> bool {
    let Ok(mut entries) = fs::read_dir(folder) else { return false };
    folder.join(STATE).is_file() || entries.next().is_none()
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A new folder beside `target`, locked for as long as its descriptor is open. Those that killed processes left are
/// removed.
fn temporary(target: &Path) -> io::Result<(PathBuf, File)> {
    let name = target.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy().into_owned();
    let prefix = format!(".{name}.saving-");
    let parent = parent(target);
    for entry in
        fs::read_dir(parent)?.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
    {
        if let Ok(folder) = File::open(entry.path())
            && flock(&folder, FlockOperation::NonBlockingLockExclusive).is_ok()
        {
            // What cannot be removed does no harm.
            let _ = fs::remove_dir_all(entry.path());
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

//! Snapshots: a machine to files, and from files.
//!
//! What is in the files is described in docs/snapshot-format.md.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::destination::Destination;
use super::folder::{MEMORY, STATE};
use super::memory_copy::{Pages, Source};
use super::memory_file;
use super::memory_handler::Handler;
use super::working_set::{self, Record};
use super::writing::Writing;
use crate::arch::x86_64::layout;
use crate::command;
use crate::config::Config;
use crate::devices::console;
use crate::file;
use crate::file::{FileId, file_id};
use crate::kvm::{Cpu, VcpuState, VmState};
use crate::memory::{self, GuestRam};
use crate::sandbox::Sandbox;
use crate::snapshot::{self, Hex};
use crate::virtio::net::MacAddr;

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
    /// Something else would be lost.
    #[error("cannot write the snapshot to {}: {why}: give another path", .path.display())]
    Refused {
        /// What is there.
        path: PathBuf,
        /// Why it stays.
        why: &'static str,
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
    /// What it stands on is another than it was.
    #[error("cannot use the snapshot: it has only what changed since {}, which is another one now", .path.display())]
    Base {
        /// Where the other one was.
        path: PathBuf,
    },
    /// There is nothing that what has changed could be other than.
    #[error("cannot save only what has changed: the machine was not restored from the folder of a snapshot")]
    NoBase,
    /// What it was restored from has been replaced.
    #[error(
        "cannot save only what has changed: what is at {} is not the snapshot that the machine was restored from any more: save all of it",
        .path.display()
    )]
    BaseReplaced {
        /// Where it was.
        path: PathBuf,
    },
    /// What has changed cannot be mapped.
    #[error("cannot map what has changed since an earlier snapshot")]
    Map(#[source] io::Error),
    /// The memory cannot be had at once.
    #[error("cannot read all of the snapshot's memory before the machine goes on")]
    Prefault(#[source] io::Error),
    /// There is nobody to give the memory.
    #[error("cannot have memory from a process that listens at {}", .path.display())]
    Reach {
        /// Where it was to listen.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// No other process can give memory.
    #[error(
        "cannot have memory from another process: userfaultfd for KVM's accesses takes the permission to read and write \
         /dev/userfaultfd, or CAP_SYS_PTRACE, or 1 in /proc/sys/vm/unprivileged_userfaultfd"
    )]
    Userfaultfd(#[source] io::Error),
    /// The process that gave memory has ended.
    #[error("cannot go on without the process that gave memory: it has ended")]
    HandlerEnded,
    /// It was still to give some when the machine ended.
    #[error("cannot save memory that another process gives: the machine ended before that had given all of it")]
    Unserved,
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
    /// Of a snapshot that has only what changed.
    pub base: Option<Base>,
}

/// What a snapshot that has only what changed stands on.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Base {
    /// The folder of that snapshot, or the file of its state.
    pub path: PathBuf,
    /// The SHA-256 of the file of its state.
    pub sha256: Hex,
    /// The pages that this snapshot has: the first of each run, and how many.
    pub changed: Vec<(u64, u64)>,
}

impl Base {
    /// Whether it is still there.
    pub fn check_there(&self) -> Result<(), Error> {
        let state = file::read(&self.path.join(STATE), snapshot::MAX);
        match state.is_ok_and(|state| snapshot::digest(&state) == self.sha256) {
            true => Ok(()),
            false => Err(Error::BaseReplaced { path: self.path.clone() }),
        }
    }

    /// Whether the pages that have changed are so many bytes of memory's, in order, each there once.
    fn check(&self, memory: u64) -> Result<(), snapshot::Error> {
        let mut next = 0;
        for (first, count) in &self.changed {
            let end = first.checked_add(*count).filter(|end| *end <= memory / PAGE);
            next = match end {
                Some(end) if *first >= next && *count > 0 => end,
                _ => {
                    let why = format_args!("{count} from page {first} on are not memory's, or not in order");
                    return Err(snapshot::Error::part("the pages that have changed", why));
                }
            };
        }
        Ok(())
    }
}

/// The memory of a snapshot: a file, and which of its pages count, if not all.
#[derive(Debug)]
pub(super) struct Layer {
    file: Arc<File>,
    id: FileId,
    changed: Option<Vec<(u64, u64)>>,
}

/// A snapshot to restore a machine from.
#[derive(Debug)]
pub struct Snapshot {
    /// The machine that is built. Paths, addresses and limits may be changed, but not what devices there are.
    pub config: Config,
    /// Whether all memory is read before the guest goes on; else each page when it is first used.
    pub prefault: bool,
    /// For how long the pages that the guest uses are recorded, in the folder of the snapshot. Without it those that were recorded
    /// before are read ahead.
    pub record: Option<Record>,
    pub(super) state: State,
    memory: Memory,
    /// What a snapshot of the restored machine can stand on.
    pub(super) origin: Option<Base>,
}

/// Where memory comes from.
#[derive(Debug)]
enum Memory {
    /// Files, the first of which has all pages.
    Files(Vec<Layer>),
    /// A process that listens at this path.
    Handler(PathBuf),
}

/// Memory changes by pages of so many bytes.
const PAGE: u64 = 4096;
/// How many snapshots may stand on one another.
const MAX_LAYERS: usize = 64;

impl Snapshot {
    /// Opens the snapshot in a folder, and those that it stands on.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self, Error> {
        let folder = folder.as_ref();
        let mut snapshot = Self::open_files(folder.join(STATE), folder.join(MEMORY))?;
        let origin = std::path::absolute(folder).ok().zip(snapshot.origin.take());
        snapshot.origin = origin.map(|(path, origin)| Base { path, ..origin });
        Ok(snapshot)
    }

    /// Opens the state of a snapshot, a file or in its folder, whose memory a process is to give that listens at `socket`. What is
    /// said there is Firecracker's protocol: regions of guest memory as JSON, and a userfaultfd.
    ///
    /// The memory of a snapshot that stands on others is all of it.
    pub fn open_served(path: impl Into<PathBuf>, socket: impl Into<PathBuf>) -> Result<Self, Error> {
        let path = path.into();
        let is_folder = path.is_dir();
        let (state, sha256) = read_state(&if is_folder { path.join(STATE) } else { path.clone() })?;
        let folder = std::path::absolute(&path).ok().filter(|_| is_folder).unwrap_or_default();
        Ok(Self::new(state, sha256, folder, Memory::Handler(socket.into())))
    }

    /// The version of the format of a snapshot, of which nothing else is looked at: the file of its state, or its folder.
    ///
    /// # Errors
    /// When there is none.
    pub fn version(path: impl Into<PathBuf>) -> Result<u32, Error> {
        let mut path = path.into();
        if path.is_dir() {
            path.push(STATE);
        }
        let mut start = vec![];
        let opened = file::open(&path).map_err(read(&path))?;
        opened.take(snapshot::VERSION_BYTES).read_to_end(&mut start).map_err(read(&path))?;
        snapshot::version(&start).map_err(|source| Error::State { path, source })
    }

    /// Reads a state, and says whether it is one.
    #[cfg(fuzzing)]
    pub fn try_state(file: &[u8]) -> bool {
        let Ok(state) = snapshot::decode::<State>(file) else { return false };
        let text = serde_json::to_string(&state).expect("a state is JSON");
        let again: State = serde_json::from_str(&text).expect("a state is read as it was written");
        assert_eq!(serde_json::to_string(&again).expect("a state is JSON"), text);
        let _ = (state.config.validate(), portable(&state.config), saveable(&state.config));
        state.base.is_none_or(|base| base.check(state.memory).is_ok())
    }

    /// Opens a snapshot of two files.
    pub fn open_files(state: impl Into<PathBuf>, memory: impl Into<PathBuf>) -> Result<Self, Error> {
        let (path, memory) = (state.into(), memory.into());
        let (state, sha256) = read_state(&path)?;
        let mut layers = vec![layer(&memory, &state)?];
        let mut base = state.base.clone();
        while let Some(Base { path, sha256, .. }) = base {
            let (below, found) = read_state(&path.join(STATE))?;
            if found != sha256 || below.memory != state.memory || layers.len() >= MAX_LAYERS {
                return Err(Error::Base { path });
            }
            layers.push(layer(&path.join(MEMORY), &below)?);
            base = below.base;
        }
        layers.reverse();
        Ok(Self::new(state, sha256, PathBuf::new(), Memory::Files(layers)))
    }

    fn new(state: State, sha256: Hex, path: PathBuf, memory: Memory) -> Self {
        // Limits are those of one run.
        let config = Config { timeout: None, boot_timeout: None, ..state.config.clone() };
        Self {
            config,
            prefault: false,
            record: None,
            state,
            memory,
            origin: Some(Base { path, sha256, changed: vec![] }),
        }
    }

    /// The memory of the saved machine, of which nothing has been read yet, unless all of it is to be; and who gives it.
    pub(super) fn map_memory(
        &self,
        ranges: &[Range<u64>],
        sandbox: &Sandbox,
    ) -> Result<(GuestRam, Option<Handler>), super::Error> {
        let layers = match &self.memory {
            Memory::Files(layers) => layers,
            Memory::Handler(socket) => {
                let ram = memory::reserve(ranges)?;
                let handler = Handler::connect(socket, &ram, sandbox)?;
                return Ok((ram, Some(handler)));
            }
        };
        let [first, others @ ..] = &layers[..] else { unreachable!("there is a first layer") };
        let ram = memory_file::map(&first.file, ranges)?;
        for layer in others {
            let changed = layer.changed.as_deref().unwrap_or_default();
            memory_file::map_changed(&ram, &layer.file, changed).map_err(Error::Map)?;
        }
        if self.prefault {
            memory::prefault(&ram).map_err(Error::Prefault)?;
        }
        Ok((ram, None))
    }

    /// The files that memory is mapped from.
    pub(super) fn memory_files(&self) -> Vec<FileId> {
        match &self.memory {
            Memory::Files(layers) => layers.iter().map(|layer| layer.id).collect(),
            Memory::Handler(_) => vec![],
        }
    }

    /// What is to be done about the machine's working set.
    pub(super) fn working_set(&self) -> working_set::Plan {
        match (&self.memory, &self.origin) {
            (Memory::Files(_), Some(Base { path, sha256, .. })) if !self.prefault && !path.as_os_str().is_empty() => {
                working_set::Plan::new(path, sha256, self.record)
            }
            _ => working_set::Plan::Nothing,
        }
    }

    /// Makes one snapshot, which stands on no other, of this one and those that it stands on.
    ///
    /// # Errors
    /// When the host does not read or write them.
    pub fn merge(mut self, folder: impl Into<PathBuf>) -> Result<(), super::Error> {
        let (ram, _handler) = self.map_memory(&layout::ram_ranges(self.state.memory), &Sandbox::default())?;
        self.state.base = None;
        let destination = Destination::Folder(folder.into()).outside()?;
        let writing = Writing::begin(destination, &Source::new(&ram, Pages::Used), false)?;
        Ok(writing.finish(&mut self.state)?)
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
        let commands = |config: &Config| u64::from(config.command.is_some());
        let (saved, asked) = (commands(&saved.config), commands(&self.config));
        if saved != asked {
            return Err(Error::Other { what: "commands", saved, asked });
        }
        // No machine that has any is saved; but a state may be somebody's own work.
        has_no_folders(&self.config)?;
        // What was saved waits for its command.
        saveable(&Config { command: None, ..self.config.clone() })
    }
}

fn read(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Read { path, source }
}

/// The state in a file, and its digest.
fn read_state(path: &Path) -> Result<(State, Hex), Error> {
    let bytes = file::read(path, snapshot::MAX).map_err(read(path))?;
    let state: State = snapshot::decode(&bytes).map_err(|source| Error::State { path: path.to_owned(), source })?;
    Ok((state, snapshot::digest(&bytes)))
}

fn layer(path: &Path, state: &State) -> Result<Layer, Error> {
    let file = file::open(path).map_err(read(path))?;
    let metadata = file.metadata().map_err(read(path))?;
    let found = metadata.len();
    if found != state.memory {
        return Err(Error::MemoryLength { path: path.to_owned(), found, expected: state.memory });
    }
    state.base.as_ref().map_or(Ok(()), |base| base.check(state.memory))?;
    let changed = state.base.as_ref().map(|base| base.changed.clone());
    Ok(Layer { file: Arc::new(file), id: file_id(&metadata), changed })
}

fn has_no_folders(config: &Config) -> Result<(), Error> {
    if config.has_folders() {
        // The guest knows files by numbers that stand for what is open here.
        return Err(Error::Unsaveable("shared folders, of which the guest has files open on the host: use a disk"));
    }
    Ok(())
}

/// Whether all of a machine can be saved.
pub(super) fn saveable(config: &Config) -> Result<(), Error> {
    if config.command.is_some() {
        // Its streams are those of this process.
        Err(Error::Unsaveable("a command, whose streams are on the host: run the guest's own init"))
    } else if config.hugepages {
        // A child that has the memory as it was would need as many again.
        Err(Error::Unsaveable("memory in huge pages, of which the host has no copy: run it without --hugepages"))
    } else {
        has_no_folders(config)
    }
}

/// The configuration with paths that mean the same from any folder, and without what is only of this process.
pub(crate) fn portable(config: &Config) -> Result<Config, Error> {
    let absolute = |path: &mut PathBuf| -> Result<(), Error> {
        *path = std::path::absolute(&path).map_err(|source| Error::Write { path: path.clone(), source })?;
        Ok(())
    };
    let mut config = config.clone();
    // It is given to a machine that waits for it.
    config.command = config.command.map(|_| command::Spec::default());
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::{env, fs};

    /// A state as this version of the format has it. Only its second line is of importance.
    fn golden() -> (PathBuf, String) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshot/golden/state");
        let body = fs::read_to_string(&path).unwrap().split_once('\n').unwrap().1.to_owned();
        (path, body)
    }

    #[test]
    fn the_format_is_as_it_was() {
        let (path, body) = golden();
        let state: State = serde_json::from_str(&body).expect("see docs/TESTING.md, The format of snapshots");
        let encoded = snapshot::encode(&state).unwrap();
        if env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&path, &encoded).unwrap();
        }
        let read: State = snapshot::decode(&encoded).unwrap();
        assert!(encoded == snapshot::encode(&read).unwrap());
        let file = fs::read(&path).unwrap();
        let is_so = encoded == file
            || snapshot::version(&file).unwrap() == snapshot::FORMAT && encoded.ends_with(body.as_bytes());
        assert!(is_so, "the format has changed: it takes another FORMAT (docs/TESTING.md, The format of snapshots)");
    }

    #[test]
    fn every_byte_of_a_state_counts() {
        let (_, body) = golden();
        let whole = snapshot::encode(&serde_json::from_str::<State>(&body).unwrap()).unwrap();
        for at in 0..whole.len() {
            assert!(snapshot::decode::<State>(&whole[..at]).is_err(), "cut at {at}");
            let mut damaged = whole.clone();
            damaged[at] ^= 1 << (at % 8);
            assert!(snapshot::decode::<State>(&damaged).is_err(), "changed at {at}");
        }
    }

    #[test]
    fn pages_that_have_changed_are_of_memory_and_in_order() {
        let check = |changed: &[(u64, u64)]| {
            Base { path: PathBuf::new(), sha256: Hex(vec![]), changed: changed.into() }.check(16 * PAGE)
        };
        for good in [&[][..], &[(0, 16)], &[(0, 1), (1, 1), (15, 1)]] {
            check(good).unwrap();
        }
        for bad in [
            &[(0, 17)][..],
            &[(16, 1)],
            &[(0, 0)],
            &[(1, u64::MAX)],
            &[(u64::MAX, 1)],
            &[(0, 2), (1, 1)],
            &[(1, 1), (0, 1)],
        ] {
            let error = check(bad).unwrap_err().to_string();
            assert!(error.starts_with("cannot restore the pages that have changed: "), "{error}");
        }
    }
}

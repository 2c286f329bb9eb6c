//! `--jail`: the machine in a process that sees nothing of the host but what was opened for it.
//!
//! ```text
//!  bantam run --jail                                    a PID namespace, and a user namespace unless root does it
//!   launcher: waits  -- fork -->  builds the machine (files, taps, sockets as ever)
//!     signals        -- pipe -->  enters: mount (an empty root), network, IPC, UTS and cgroup namespaces, a user of its own
//!     files written  <-- pipe --  runs the machine, in the sandbox
//!     exit status    <-- exit --
//! ```
//!
//! The launcher is the process that users know: it has the ID that they see, gets their signals, and exits as the other one
//! does. When one of them ends, so does the other.

mod launcher;
mod namespaces;

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use bantam::cgroup::{self, Group};
use bantam::config::Config;
use bantam::config::file::Jail;
use bantam::sandbox::{Access, drop_capabilities};
use bantam::virtio::blk::Engine;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{PidfdFlags, Signal, getegid, geteuid, pidfd_open, set_parent_process_death_signal};
use rustix::thread::{CapabilitySet, remove_capability_from_bounding_set, set_keep_capabilities, set_no_new_privs};

pub use launcher::Launcher;

use super::message::chain;

/// Users from here on belong to nobody (systemd's UIDs and GIDs).
const FIRST_UID: u32 = 0x7000_0000;

/// Why there is no jail.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "cannot make namespaces for a jail (--jail): that takes root, or user namespaces, which this host or container \
         keeps from this user (`bantam check` tells)"
    )]
    Namespaces(#[source] io::Error),
    #[error("cannot {what} for a jail (--jail)")]
    Failed {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cannot run as {0} {1} in a jail (--jail): only root can be another user there")]
    User(&'static str, u32),
    #[error("cannot run as root in a jail (--jail): give it a uid and a gid above 0, or neither")]
    Root,
    #[error("cannot have {0} in a jail (--jail): {1}")]
    Unfit(&'static str, &'static str),
    #[error(
        "cannot limit the memory of a jail (--jail=cgroup=on): that takes a control group of version 2 that this user may use"
    )]
    Limits(#[source] cgroup::Error),
}

fn failed<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |error| Error::Failed { what, source: error.into() }
}

/// What may be wanted of a machine and cannot be had in a jail: whether it is, what it is, and why not.
pub type Unfit = (bool, &'static str, &'static str);

/// Refuses what cannot be had in a jail: what opens files by path when the machine runs.
pub fn check(wanted: &[Unfit]) -> Result<(), Error> {
    let found = wanted.iter().find(|(is_wanted, ..)| *is_wanted);
    found.map_or(Ok(()), |(_, what, why)| Err(Error::Unfit(what, why)))
}

/// What becomes of the process that starts a jail.
pub enum Side {
    Launcher(Launcher),
    Inside(Inside),
}

/// The process of the machine.
#[derive(Debug)]
pub struct Inside {
    /// Who it becomes, if that is another user.
    user: Option<(u32, u32)>,
    /// Where the launcher tells of signals.
    signals: RefCell<Option<OwnedFd>>,
    /// Where it takes what is to be written to files.
    files: Arc<File>,
    /// The process that users know.
    pub launcher: u32,
    /// What limits it, or why nothing does; none if nothing is to.
    limits: Option<Result<String, String>>,
}

impl Inside {
    /// Where the launcher tells of signals, once: when it is closed the launcher knows that nobody listens any more.
    pub fn signals(&self) -> io::Result<OwnedFd> {
        self.signals.take().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Where it takes what is to be written to files.
    pub fn files(&self) -> Arc<File> {
        self.files.clone()
    }

    /// Leaves the host, for good and without privileges. The process has one thread, and all is open.
    /// Root's machine has of its capabilities those that are `kept`.
    pub fn enter(&self, kept: CapabilitySet) -> Result<(), Error> {
        only_thread()?;
        match &self.limits {
            Some(Ok(limits)) => log::info!("the jail is limited by {limits}"),
            Some(Err(why)) => {
                log::warn!(
                    "memory and processes of the jail have no limit (--jail=cgroup=off says nothing of it): {why}"
                );
            }
            None => {}
        }
        namespaces::leave()?;
        keep_no_capability_for_programs();
        // A user's folders are its own.
        let kept = if self.user.is_some() { kept } else { CapabilitySet::empty() };
        if let Some((uid, gid)) = self.user {
            set_keep_capabilities(!kept.is_empty()).map_err(failed("keep capabilities"))?;
            namespaces::become_user(uid, gid)?;
        }
        set_no_new_privs(true).map_err(failed("give up new privileges"))?;
        drop_capabilities(kept).map_err(failed("give up capabilities"))?;
        // With another user this is forgotten.
        set_parent_process_death_signal(Some(Signal::KILL)).map_err(failed("end with the launcher"))?;
        launcher::must_live(&self.files);
        Ok(())
    }
}

/// A control group for the process of the machine that `config` makes, if there is to be one.
fn limits(spec: &Jail, config: &Config, pid: u32) -> Result<Option<Result<Group, cgroup::Error>>, Error> {
    if spec.cgroup == Some(false) {
        return Ok(None);
    }
    let (memory, tasks) = (memory_max(config), tasks_max(config));
    match Group::with_limits(memory, tasks, config.cpu_quota.is_some(), pid) {
        Err(error) if spec.cgroup == Some(true) => Err(Error::Limits(error)),
        group => Ok(Some(group)),
    }
}

/// What a machine's process may have of memory, in bytes: the guest's, a 64th of that for page tables, what bantam, passt,
/// connections that nobody reads from and files of shared folders may come to, and what can be written in memory.
fn memory_max(config: &Config) -> u64 {
    const OTHER: u64 = 256 << 20;
    /// What the kernel has of as many files as shared folders may have open, half a million: some 2 KiB of each.
    const FILES: u64 = 1 << 30;
    let memory = config.memory.get();
    // What the device keeps of them, and the sockets.
    let connections = if config.vsock.is_some() { 2 * OTHER } else { 0 };
    let written = config.all_disks().filter(|disk| !disk.readonly).map(|disk| (in_memory(&disk.path), disk.path));
    let disks = written.map(|(is_so, path)| if is_so { path.metadata().map_or(0, |file| file.len()) } else { 0 });
    let overlay = config.overlay.iter().filter(|overlay| overlay.path.parent().is_some_and(in_memory));
    let disks = disks.chain(overlay.map(|overlay| overlay.size().get())).fold(0, u64::saturating_add);
    let folders = config.folders().map(|(path, access)| match rustix::fs::statfs(&path) {
        Ok(there) if access == Access::Change && there.f_type == TMPFS_MAGIC => {
            there.f_bavail.saturating_mul(u64::try_from(there.f_bsize).unwrap_or(0))
        }
        _ => 0,
    });
    let files = if config.has_folders() { FILES } else { 0 };
    let folders = folders.fold(files, u64::saturating_add);
    memory.saturating_add(memory / 64).saturating_add(OTHER + connections).saturating_add(disks).saturating_add(folders)
}

const TMPFS_MAGIC: i64 = 0x0102_1994;

/// Whether this is on a tmpfs, whose pages are the memory of who wrote them first.
fn in_memory(path: &Path) -> bool {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    rustix::fs::statfs(path).is_ok_and(|filesystem| filesystem.f_type == TMPFS_MAGIC)
}

/// How many processes and threads it may be: more than it ever is. Each io_uring has threads of the kernel.
fn tasks_max(config: &Config) -> u64 {
    const OTHER: u64 = 512;
    let rings = config.all_disks().filter(|disk| disk.engine == Engine::IoUring);
    rings.fold(OTHER + u64::from(config.cpus), |tasks, disk| tasks + OTHER * u64::from(disk.queues))
}

/// Splits into the process of the machine that `config` makes, and one that waits for it.
pub fn start(spec: &Jail, config: &Config) -> Result<Side, Error> {
    only_thread()?;
    let privileged = CapabilitySet::SYS_ADMIN | CapabilitySet::SETUID | CapabilitySet::SETGID;
    let has = rustix::thread::capabilities(None).map_err(failed("look at the privileges"))?.effective;
    let pid = std::process::id();
    let user = if has.contains(privileged) && geteuid().is_root() {
        let uid = spec.uid.unwrap_or(FIRST_UID | pid & 0x00ff_ffff);
        Some((uid, spec.gid.unwrap_or(uid)))
    } else {
        let other = [("user", spec.uid, geteuid().as_raw()), ("group", spec.gid, getegid().as_raw())];
        let other = other.into_iter().find(|(_, asked, own)| asked.is_some_and(|asked| asked != *own));
        if let Some((what, Some(asked), _)) = other {
            return Err(Error::User(what, asked));
        }
        None
    };
    if user.is_some_and(|(uid, gid)| uid == 0 || gid == 0) {
        return Err(Error::Root);
    }
    let (from_launcher, to_machine) =
        pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(failed("make a pipe"))?;
    let (from_machine, to_launcher) = pipe_with(PipeFlags::CLOEXEC).map_err(failed("make a pipe"))?;
    // First: a signal from now on is for the machine, and leaves no group.
    let signals = launcher::signals().map_err(failed("wait for signals"))?;
    let group = limits(spec, config, pid)?;
    namespaces::split(user.is_none())?;
    match crate::process::fork().map_err(failed("make a process"))? {
        Some(child) => {
            let child = pidfd_open(child, PidfdFlags::empty()).map_err(failed("watch the process"))?;
            let group = group.and_then(Result::ok);
            Ok(Side::Launcher(Launcher::new(child, signals, to_machine, from_machine, group)))
        }
        None => {
            set_parent_process_death_signal(Some(Signal::KILL)).map_err(failed("end with the launcher"))?;
            drop(to_machine);
            launcher::must_live(&from_launcher);
            // Before there is any memory of the machine: it counts where it was first used.
            let limits = match group {
                Some(Ok(group)) => Some(enter_group(group, spec, config)?),
                Some(Err(error)) => Some(Err(chain(&error))),
                None => None,
            };
            crate::process::end_when_aborted().map_err(failed("handle SIGABRT"))?;
            let stat = File::open("/proc/self/stat").map_err(failed("look at the process"))?;
            bantam::terminal::look_from_outside(stat);
            if config.has_folders() {
                // So that they can be detached from it, which takes the right to that.
                namespaces::own_mounts()?;
            }
            let files = Arc::new(File::from(to_launcher));
            let signals = RefCell::new(Some(from_launcher));
            Ok(Side::Inside(Inside { user, signals, files, launcher: pid, limits }))
        }
    }
}

/// Puts this process into its group. What limits it then, or why it does not.
fn enter_group(group: Group, spec: &Jail, config: &Config) -> Result<Result<String, String>, Error> {
    let (memory, tasks, path) = (memory_max(config), tasks_max(config), group.path().to_owned());
    match group.enter() {
        Ok(()) => Ok(Ok(format!("the control group {}: memory.max {memory}, pids.max {tasks}", path.display()))),
        Err(error) if spec.cgroup == Some(true) => Err(Error::Limits(error)),
        Err(error) => Ok(Err(chain(&error))),
    }
}

/// Empties the bounding set of this thread: a program that it might run has no capabilities, whatever its file or user. Who may
/// not do that has nothing to lose by it.
fn keep_no_capability_for_programs() {
    let sets = (0..u64::BITS).map(|number| CapabilitySet::from_bits_retain(1 << number));
    // The first number that the kernel does not know ends it.
    sets.map(remove_capability_from_bounding_set).take_while(Result::is_ok).for_each(drop);
}

/// Namespaces and users are those of a thread: there must be no other.
fn only_thread() -> Result<(), Error> {
    let tasks = std::fs::read_dir("/proc/self/task").map_err(failed("look at the process's threads"))?;
    match tasks.count() {
        1 => Ok(()),
        _ => Err(Error::Failed { what: "have no other thread", source: io::ErrorKind::ResourceBusy.into() }),
    }
}

#[cfg(test)]
mod tests {
    use bantam::config::{Overlay, Size};
    use bantam::virtio::blk;

    use super::*;

    #[test]
    fn disks_in_memory_are_memory_of_a_jail() {
        let (shm, here) = (tempfile::tempdir_in("/dev/shm").unwrap(), tempfile::tempdir_in(".").unwrap());
        let disk = |folder: &tempfile::TempDir| {
            let path = folder.path().join("disk");
            File::create(&path).unwrap().set_len(512 << 20).unwrap();
            blk::Spec::new(path)
        };
        let base = Config::default();
        let without = memory_max(&base);
        assert_eq!(memory_max(&base.clone().disk(disk(&here))), without);
        assert_eq!(memory_max(&base.clone().disk(disk(&shm))), without + (512 << 20));
        assert_eq!(memory_max(&base.clone().disk(blk::Spec { readonly: true, ..disk(&shm) })), without);
        let overlay = Overlay { size: Some(Size::gib(1)), ..Overlay::new(shm.path().join("overlay")) };
        assert_eq!(memory_max(&base.clone().overlay(overlay)), without + (1 << 30));
        let share = |folder: &Path, mode: &str| format!("{}:/mnt{mode}", folder.display()).parse().unwrap();
        assert_eq!(memory_max(&base.clone().share(share(here.path(), ""))), without + (1 << 30));
        assert_eq!(memory_max(&base.clone().share(share(shm.path(), ":ro"))), without + (1 << 30));
        assert!(memory_max(&base.share(share(shm.path(), ""))) > without + (1 << 30));
    }

    #[test]
    fn a_jail_may_be_given_a_user() {
        let read = |text| Jail::read(text).map(|spec| (spec.uid, spec.gid)).ok();
        assert_eq!(read(""), Some((None, None)));
        assert_eq!(read("uid=1000,gid=5"), Some((Some(1000), Some(5))));
        assert_eq!(read("1000"), Some((Some(1000), None)));
        assert_eq!(Jail::read("cgroup=off").map(|spec| spec.cgroup).ok(), Some(Some(false)));
        assert_eq!([read("uid=-1"), read("user=x")], [None; 2]);
    }
}

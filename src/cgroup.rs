//! A control group (version 2) of one machine, below that of this process, where that was delegated to the user.
//!
//! One for CPU time is a threaded group (Documentation/admin-guide/cgroup-v2.rst, "Threads"): threads can be put into it while
//! the rest of the process stays where it is, and the group above need not be empty. One for memory has a whole process, and
//! only the root group may have both processes and such groups below: elsewhere it is beside that of this process.
//!
//! A group is locked (flock) by the process that made it; what a killed process has left is empty and unlocked, and removed by
//! the next that makes one beside it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Access, FlockOperation, access, flock};

const PREFIX: &str = "bantam-";
/// The file of a group that is locked. Who has it open can get nowhere from there, as from a folder.
const LOCKED: &str = "cgroup.events";
/// What limits a whole process.
const CONTROLLERS: [&str; 2] = ["memory", "pids"];
/// How many new groups may be lost to others who lock them first.
const ATTEMPTS: u32 = 100;
/// How long threads that have just ended may still count, at most.
const LAST_THREAD: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Why there is no control group for a machine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no hierarchy of version 2, or this process is not in it.
    #[error("this process is in no control group of version 2 that is mounted")]
    None,
    /// Its own group cannot give what is wanted.
    #[error("the control group {} has no {controller} controller", .group.display())]
    NoController {
        /// This process' group.
        group: PathBuf,
        /// What is wanted of it.
        controller: &'static str,
    },
    /// It does not let this user.
    #[error("cannot {what} the control group {}", .path.display())]
    Refused {
        /// What was attempted.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Others lock, or remove, each new one before this process can lock it. Whoever may read its files can.
    #[error(
        "cannot make a control group in {}: each of {ATTEMPTS} new ones was locked or removed by another process first \
         (`fuser {}/{PREFIX}*/{LOCKED}` shows which)",
        .group.display(), .group.display()
    )]
    Taken {
        /// Where they were made.
        group: PathBuf,
    },
    /// It would be beside one with a limit, which its processes would not have any more.
    #[error("the control group {} has a limit ({limit}) that one beside it would leave", .group.display())]
    Limited {
        /// This process' group.
        group: PathBuf,
        /// The file of the limit.
        limit: &'static str,
    },
}

/// A control group. It goes when this is dropped.
#[derive(Debug)]
pub struct Group {
    path: PathBuf,
    /// Holds the lock.
    _lock: File,
    /// Another process removes it.
    is_others: bool,
    /// Where threads are put into it, and into the one above: open, as a process in a jail has no paths.
    threads: Option<[File; 2]>,
}

impl Group {
    /// Makes a group that may use the CPUs for `quota` microseconds of each `period`, named for the process `pid`.
    ///
    /// # Errors
    /// When this process may not make one.
    pub fn with_cpu_quota(quota: u64, period: u64, pid: u32) -> Result<Self, Error> {
        let own = own_group().ok_or(Error::None)?;
        require(&own, "cpu")?;
        sweep(&own);
        let mut group = make(&own, pid)?;
        group.write("cgroup.type", "threaded")?;
        enable(&own, "cpu", "give CPU quotas below")?;
        group.write("cpu.max", &format!("{quota} {period}"))?;
        let open = |folder: &Path| {
            let refused = |source| Error::Refused { what: "put threads into", path: folder.into(), source };
            File::options().write(true).open(folder.join("cgroup.threads")).map_err(refused)
        };
        group.threads = Some([open(&group.path)?, open(&own)?]);
        Ok(group)
    }

    /// Makes a group whose processes may have `memory` bytes, page cache included, and be `tasks` processes and threads, named
    /// for the process `pid`; with a `quota`, groups below it may limit CPU time. It is below this process' own if that can be,
    /// and otherwise beside it, if that has no limits.
    ///
    /// # Errors
    /// When this process may make one in neither place.
    pub fn with_limits(memory: u64, tasks: u64, quota: bool, pid: u32) -> Result<Self, Error> {
        let own = own_group().ok_or(Error::None)?;
        let made = Self::limited(&own, memory, tasks, quota, pid);
        let Some(above) = above(&own).filter(|_| made.is_err()) else { return made };
        match limit_of(&own) {
            Some(limit) => Err(Error::Limited { group: own, limit }),
            None => Self::limited(above, memory, tasks, quota, pid),
        }
    }

    /// Where [`Self::with_limits`] would make one. Nothing is changed.
    pub fn place_for_limits() -> Option<PathBuf> {
        let own = own_group()?;
        let read = |folder: &Path, file| fs::read_to_string(folder.join(file)).unwrap_or_default();
        let beside = above(&own).filter(|_| limit_of(&own).is_none());
        let places = [Some(own.as_path()), beside].into_iter().flatten();
        let mut places = places.filter(|place| {
            let names = read(place, "cgroup.subtree_control");
            let is_enabled = CONTROLLERS.iter().all(|name| has(&names, name));
            let controllers = read(place, "cgroup.controllers");
            // The root group has no type.
            let may_be = is_enabled || !place.join("cgroup.type").exists() || read(place, "cgroup.procs").is_empty();
            let files = ["", "cgroup.procs", "cgroup.subtree_control"];
            may_be
                && CONTROLLERS.iter().all(|name| has(&controllers, name))
                && files.iter().all(|file| access(place.join(file), Access::WRITE_OK).is_ok())
        });
        places.next().map(Path::to_owned)
    }

    fn limited(above: &Path, memory: u64, tasks: u64, quota: bool, pid: u32) -> Result<Self, Error> {
        for controller in CONTROLLERS {
            require(above, controller)?;
            enable(above, controller, "limit memory and processes below")?;
        }
        if quota {
            // Where it cannot be, the quota says so.
            let _ = enable(above, "cpu", "");
        }
        sweep(above);
        let group = make(above, pid)?;
        group.write("memory.max", &memory.to_string())?;
        group.write("pids.max", &tasks.to_string())?;
        // What is left of a machine is of no use. Older kernels than Linux 4.19 end one process.
        let _ = group.write("memory.oom.group", "1");
        Ok(group)
    }

    /// Puts this process, which has one thread, into the group. Another process removes it.
    ///
    /// # Errors
    /// When this process may not be put there.
    pub fn enter(mut self) -> Result<(), Error> {
        self.is_others = true;
        let refused = |source| Error::Refused { what: "enter", path: self.path.clone(), source };
        fs::write(self.path.join("cgroup.procs"), "0").map_err(refused)
    }

    /// How often the kernel has ended a process in it that wanted more memory.
    pub fn out_of_memory(&self) -> u64 {
        let events = fs::read_to_string(self.path.join("memory.events")).unwrap_or_default();
        let count = events.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok());
        count.unwrap_or(0)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `start` with this thread in the group: the threads that it starts are in it, and stay.
    ///
    /// # Errors
    /// When this thread cannot be put there, or not back; `start` has not run if it is not there.
    pub fn within<T>(&self, start: impl FnOnce() -> T) -> Result<T, Error> {
        let Some([threads, above]) = &self.threads else { return Ok(start()) };
        let refused = |what, path: &Path| {
            let path = path.to_owned();
            move |source| Error::Refused { what, path, source }
        };
        threads.write_all_at(b"0", 0).map_err(refused("put threads into", &self.path))?;
        let started = start();
        let own = self.path.parent().unwrap_or(&self.path);
        above.write_all_at(b"0", 0).map_err(refused("go back to", own)).map(|()| started)
    }

    fn write(&self, file: &str, text: &str) -> Result<(), Error> {
        let refused = |source| Error::Refused { what: "set up", path: self.path.clone(), source };
        fs::write(self.path.join(file), text).map_err(refused)
    }

    /// Waits until no thread is in it, and removes it.
    fn remove(&self) -> io::Result<()> {
        let events = match File::open(self.path.join("cgroup.events")) {
            // A process in a jail has no paths: its launcher removes it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            events => events?,
        };
        let is_populated = || fs::read_to_string(self.path.join("cgroup.events")).map(|it| it.contains("populated 1"));
        // A change is told by POLLPRI, once the file was read.
        let _ = io::read_to_string(&events)?;
        if is_populated()? {
            poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&LAST_THREAD))?;
        }
        sweep(&self.path);
        fs::remove_dir(&self.path)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if self.is_others {
            return;
        }
        if let Err(error) = self.remove() {
            log::info!("cannot remove the control group {}: {error}", self.path.display());
        }
    }
}

/// Makes an empty group, locked.
fn make(own: &Path, mut number: u32) -> Result<Group, Error> {
    let mut lost = 0;
    while lost < ATTEMPTS {
        let path = own.join(format!("{PREFIX}{number}"));
        let made = fs::create_dir(&path).and_then(|()| File::open(path.join(LOCKED)));
        match made {
            // Another machine of this process, or what a process of the same number has left.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                number = number.wrapping_add(1);
                continue;
            }
            // Another process took it for one that was left.
            Err(error) if error.kind() == io::ErrorKind::NotFound && own.exists() => {}
            made => {
                let lock = made.map_err(|source| Error::Refused { what: "make", path: path.clone(), source })?;
                if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() && path.exists() {
                    return Ok(Group { path, _lock: lock, is_others: false, threads: None });
                }
            }
        }
        lost += 1;
    }
    Err(Error::Taken { group: own.to_owned() })
}

/// Removes what processes have left beside this one that were killed, or could not remove it.
pub fn clear() {
    let own = own_group();
    own.iter().flat_map(|own| [Some(own.as_path()), above(own)]).flatten().for_each(sweep);
}

/// Removes what killed processes have left. A group with a thread in it cannot be removed.
fn sweep(own: &Path) {
    for entry in fs::read_dir(own).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        let is_ours = number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()));
        let path = entry.path();
        if let Some(lock) = File::open(path.join(LOCKED)).ok().filter(|_| is_ours)
            && flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok()
        {
            sweep(&path);
            let _ = fs::remove_dir(path);
        }
    }
}

/// Refuses a group that has no such controller to give.
fn require(group: &Path, controller: &'static str) -> Result<(), Error> {
    let controllers = fs::read_to_string(group.join("cgroup.controllers"));
    match controllers.is_ok_and(|names| has(&names, controller)) {
        true => Ok(()),
        false => Err(Error::NoController { group: group.to_owned(), controller }),
    }
}

/// Has the groups below this one have a controller. It stays: others may have come to need it.
fn enable(group: &Path, controller: &str, what: &'static str) -> Result<(), Error> {
    let below = group.join("cgroup.subtree_control");
    if has(&fs::read_to_string(&below).unwrap_or_default(), controller) {
        return Ok(());
    }
    let refused = |source| Error::Refused { what, path: group.to_owned(), source };
    fs::write(below, format!("+{controller}")).map_err(refused)
}

fn has(names: &str, name: &str) -> bool {
    names.split_whitespace().any(|it| it == name)
}

/// The file of what limits a group, and not those beside it. How many processes there are is limited anew.
fn limit_of(group: &Path) -> Option<&'static str> {
    let is_limit = |file: &&str| {
        let value = fs::read_to_string(group.join(file)).unwrap_or_default();
        !value.trim().is_empty() && !value.starts_with("max")
    };
    ["memory.max", "memory.high", "cpu.max", "cpuset.cpus", "io.max"].into_iter().find(is_limit)
}

/// The group that this one is in, if that is mounted.
fn above(group: &Path) -> Option<&Path> {
    group.parent().filter(|above| above.join("cgroup.controllers").exists())
}

/// The folder of this process' group.
fn own_group() -> Option<PathBuf> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    find_group(&groups, &mounts)
}

/// The folder of the group that `groups` names (cgroups(7), /proc/PID/cgroup), below where `mounts` says that it is
/// mounted (proc_pid_mountinfo(5)).
fn find_group(groups: &str, mounts: &str) -> Option<PathBuf> {
    let own = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    mounts.lines().find_map(|line| {
        let (fields, rest) = line.split_once(" - ")?;
        let mut fields = fields.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        let below = Path::new(own).strip_prefix(root).ok().filter(|_| rest.starts_with("cgroup2 "))?;
        Some(Path::new(point).join(below))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_with_limits_is_not_left() {
        let group = tempfile::tempdir().unwrap();
        let write = |file, value: &str| fs::write(group.path().join(file), value).unwrap();
        for (file, none) in
            [("memory.max", "max\n"), ("cpu.max", "max 100000\n"), ("io.max", ""), ("cpuset.cpus", "\n")]
        {
            write(file, none);
        }
        write("pids.max", "4915\n");
        assert_eq!(limit_of(group.path()), None);
        write("memory.high", "536870912\n");
        assert_eq!(limit_of(group.path()), Some("memory.high"));
        write("memory.high", "max\n");
        write("cpu.max", "50000 100000\n");
        assert_eq!(limit_of(group.path()), Some("cpu.max"));
    }

    #[test]
    fn groups_that_others_are_faster_with_are_given_up() {
        // In a folder that is no group there is never a file to lock, as when another process has removed the group.
        let folder = tempfile::tempdir().unwrap();
        let error = make(folder.path(), u32::MAX - 1).unwrap_err();
        assert!(matches!(&error, Error::Taken { group } if group == folder.path()), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), ATTEMPTS as usize);
    }

    #[test]
    fn the_own_group_is_below_the_mount_that_shows_it() {
        let mounts = "25 30 0:23 / /sys rw,nosuid - sysfs sysfs rw\n\
                      36 25 0:32 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
        let found = |groups: &str| find_group(groups, mounts);
        assert_eq!(found("0::/user.slice/a.scope\n"), Some("/sys/fs/cgroup/user.slice/a.scope".into()));
        assert_eq!(found("1:cpu:/x\n0::/\n"), Some("/sys/fs/cgroup/".into()));
        assert_eq!(found("1:cpu:/x\n"), None);
        assert_eq!(find_group("0::/a/b", &mounts.replace("0:32 / ", "0:32 /a ")), Some("/sys/fs/cgroup/b".into()));
        // Outside of what a container sees.
        assert_eq!(find_group("0::/c", &mounts.replace("0:32 / ", "0:32 /a ")), None);
        assert_eq!(find_group("0::/", "25 30 0:23 / /sys rw - sysfs sysfs rw\n"), None);
    }
}

//! What a guest that takes over a thread of its machine can still do: the system calls that the thread makes anyway
//! (seccomp), on files that the machine is about (Landlock).
//!
//! The threads that bantam makes for a machine take a filter each, if they are [asked](crate::machine::Builder::sandbox) to.
//! What is for a whole process, a program does by itself, as the `bantam` command does.

mod calls;
mod filter;
mod landlock;
mod names;
mod violation;

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::str::FromStr;
use std::sync::Arc;

use filter::List;
pub use landlock::{Access, Error, Ruleset, version as landlock_version};
use rustix::thread::{CapabilitySet, CapabilitySets};
pub use violation::name_violations;

/// Whether there is a sandbox: `on`, `log` or `off`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    /// None.
    #[default]
    Off,
    /// System calls that are not allowed are told, and made. Nothing else is restricted.
    Log,
    /// A system call that is not allowed ends the process.
    On,
}

/// Text that is no [`Mode`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot use `{0}` as a sandbox: expected on, log or off")]
pub struct BadMode(String);

const MODES: [(Mode, &str); 3] = [(Mode::Off, "off"), (Mode::Log, "log"), (Mode::On, "on")];

impl FromStr for Mode {
    type Err = BadMode;

    fn from_str(text: &str) -> Result<Self, BadMode> {
        let found = MODES.iter().find(|(_, name)| *name == text);
        found.map(|(mode, _)| *mode).ok_or_else(|| BadMode(text.to_owned()))
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = MODES.iter().find(|(mode, _)| mode == self).map_or("", |(_, name)| name);
        f.write_str(name)
    }
}

impl serde::Serialize for Mode {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// By itself, as `true` is what many write, and means either of two.
impl<'de> serde::Deserialize<'de> for Mode {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;

        impl serde::de::Visitor<'_> for Text {
            type Value = Mode;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"on\", \"log\" or \"off\"")
            }

            fn visit_bool<E: serde::de::Error>(self, switch: bool) -> Result<Mode, E> {
                let meant = if switch { "on" } else { "off" };
                Err(E::custom(format_args!("expected \"on\", \"log\" or \"off\", and not {switch}: write \"{meant}\"")))
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Mode, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_any(Text)
    }
}

#[cfg(test)]
impl schemars::JsonSchema for Mode {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Mode".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        // As other texts.
        schemars::json_schema!({"type": ["string", "integer"]})
    }
}

/// What a thread does for a machine, and so may do. One that is started by another has what both have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Runs the loop, saves the machine, and ends it.
    Main,
    /// Runs a vCPU, and starts devices.
    Vcpu,
    /// Does the I/O of a disk,
    Disk,
    /// of a network card,
    Network,
    /// of a shared folder,
    Share,
    /// of the sockets between host and guest,
    Vsock,
    /// or of another device.
    Device,
    /// Carries what is printed and typed.
    Stream,
    /// Watches the process that guest memory comes from.
    Memory,
    /// Answers who asks for the machine.
    Control,
}

impl Role {
    /// The lists of system calls in a machine whose devices do this with files.
    fn lists(self, files: Files) -> Vec<&'static List> {
        use calls::{BASE, EVENTS, FILES, MAIN, MEMORY, OTHER_DISKS, RING_FILES, RINGS};
        use calls::{SOCKETS, STORAGE, TAP, THREADS, VCPU};
        let mut lists: Vec<&List> = match self {
            Self::Main => vec![BASE, SOCKETS, EVENTS, STORAGE, TAP, MEMORY, THREADS, VCPU, MAIN, FILES],
            Self::Vcpu => vec![BASE, SOCKETS, EVENTS, STORAGE, TAP, THREADS, VCPU],
            Self::Disk => vec![BASE, EVENTS, STORAGE],
            Self::Network => vec![BASE, EVENTS, SOCKETS, TAP],
            Self::Share => vec![BASE, EVENTS, STORAGE, FILES],
            Self::Vsock => vec![BASE, EVENTS, SOCKETS],
            Self::Device => vec![BASE, EVENTS],
            Self::Stream => vec![BASE, SOCKETS],
            Self::Memory => vec![BASE, MEMORY],
            Self::Control => vec![BASE, SOCKETS, THREADS, FILES],
        };
        lists.extend((self == Self::Vcpu && files.folders).then_some(FILES));
        let has_disks = matches!(self, Self::Main | Self::Vcpu | Self::Disk | Self::Control);
        lists.extend((files.rings && has_disks).then_some(RINGS));
        if files.disks && matches!(self, Self::Main | Self::Control) {
            // Who asks gives a disk its file, makes a new limit with its timer, and starts the disk's thread again.
            lists.extend([OTHER_DISKS, STORAGE, EVENTS]);
            lists.extend(files.rings.then_some(RING_FILES));
        }
        lists
    }

    /// That of the thread of a device with this ID.
    fn of_device(device_type: u32) -> Self {
        use virtio_bindings::virtio_ids as ids;
        match device_type {
            ids::VIRTIO_ID_BLOCK => Self::Disk,
            ids::VIRTIO_ID_NET => Self::Network,
            ids::VIRTIO_ID_FS => Self::Share,
            ids::VIRTIO_ID_VSOCK => Self::Vsock,
            _ => Self::Device,
        }
    }
}

/// What devices do with files while the machine runs.
#[derive(Debug, Clone, Copy, Default)]
struct Files {
    /// Shared folders open them.
    folders: bool,
    /// Disks are given others.
    disks: bool,
    /// Disks have rings of io_uring.
    rings: bool,
}

/// The sandbox of a machine's threads. By default there is none.
#[derive(Debug, Clone, Default)]
pub struct Sandbox {
    rules: Option<Arc<Rules>>,
    files: Files,
}

#[derive(Debug)]
struct Rules {
    log: bool,
    kept: CapabilitySet,
    /// The process does without: each thread restricts itself.
    alone: Option<Option<Ruleset>>,
}

impl Sandbox {
    /// A sandbox in which system calls are filtered. What they are is up to the machine: its builder knows of its folders and
    /// rings.
    ///
    /// A violation is a SIGSYS, which kills the process unless somebody handles it ([`name_violations`]); with [`Mode::Log`]
    /// somebody has to.
    pub fn new(mode: Mode) -> Self {
        let rules = Rules { log: mode == Mode::Log, kept: CapabilitySet::empty(), alone: None };
        Self { rules: (mode != Mode::Off).then(|| Arc::new(rules)), files: Files::default() }
    }

    /// The same, of a machine whose disks may be given other files while it runs, or not.
    pub fn changing_disks(mut self, change: bool) -> Self {
        self.files.disks = change;
        self
    }

    /// The same, of a machine that may have shared `folders`, and disks with `rings` of io_uring.
    pub(crate) fn having(mut self, folders: bool, rings: bool) -> Self {
        (self.files.folders, self.files.rings) = (folders, rings);
        self
    }

    /// The sandbox of the thread of a device with this virtio device ID, which has nothing to do with the descriptors
    /// `others`.
    pub fn device(&self, device_type: u32, others: impl Iterator<Item = RawFd>) -> Device {
        // A disk that is given another file has the number that it had.
        let others = others.filter(|_| self.rules.is_some()).filter_map(|fd| fd.try_into().ok()).collect();
        Device { sandbox: self.clone(), role: Role::of_device(device_type), others }
    }

    /// The same, and of the capabilities no others are kept by threads that give them up.
    pub fn keeping(mut self, kept: CapabilitySet) -> Self {
        if let Some(rules) = self.rules.as_mut().and_then(Arc::get_mut) {
            rules.kept = kept;
        }
        self
    }

    /// The same, for a process that is not in a sandbox: each thread gives up capabilities, and vCPUs and devices can open
    /// only the files that `ruleset` allows.
    pub fn by_themselves(mut self, ruleset: Option<Ruleset>) -> Self {
        if let Some(rules) = self.rules.as_mut().and_then(Arc::get_mut) {
            rules.alone = Some(ruleset);
        }
        self
    }

    /// Restricts this thread, and those that it starts, for good. It gives up new privileges if it has not done so.
    ///
    /// # Errors
    /// When the kernel does not take the rules. One without seccomp is no error.
    pub fn enter(&self, role: Role) -> io::Result<()> {
        self.enter_without(role, &[])
    }

    fn enter_without(&self, role: Role, others: &[u32]) -> io::Result<()> {
        let Some(rules) = &self.rules else { return Ok(()) };
        if let Some(ruleset) = rules.alone.as_ref().filter(|_| !matches!(role, Role::Main | Role::Control)) {
            rules.give_up()?;
            ruleset.as_ref().map_or(Ok(()), Ruleset::restrict).map_err(io::Error::other)?;
        }
        let mut lists = role.lists(self.files);
        if rules.log {
            // These cannot be made from a handler.
            lists.push(calls::THREADS);
        }
        let program = filter::compile(&lists, others, rules.log.then(violation::passage_end));
        let installed = match filter::install(&program) {
            // It has not given up new privileges yet.
            Err(error) if error.raw_os_error() == Some(libc::EACCES) => {
                rustix::thread::set_no_new_privs(true)?;
                filter::install(&program)
            }
            installed => installed,
        };
        match installed {
            // EPERM is what a container's own filter says.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL | libc::EPERM)) => {
                log::info!("system calls are not filtered: this kernel or container has no seccomp for it ({error})");
            }
            installed => installed?,
        }
        #[cfg(debug_assertions)]
        violate(role, others);
        Ok(())
    }

    /// The same for a thread that is there before the process is restricted.
    ///
    /// # Errors
    /// As [`enter`](Self::enter).
    pub fn enter_first(&self, role: Role) -> io::Result<()> {
        self.rules.as_ref().filter(|rules| rules.alone.is_none()).map_or(Ok(()), |rules| rules.give_up())?;
        self.enter(role)
    }
}

/// The sandbox of a device's thread.
#[derive(Debug, Clone)]
pub struct Device {
    sandbox: Sandbox,
    role: Role,
    /// Descriptors that are not its own.
    others: Arc<[u32]>,
}

impl Device {
    /// Restricts this thread for good.
    ///
    /// # Errors
    /// As [`Sandbox::enter`].
    pub fn enter(&self) -> io::Result<()> {
        self.sandbox.enter_without(self.role, &self.others)
    }
}

impl Rules {
    /// Gives up privileges of this thread.
    fn give_up(&self) -> io::Result<()> {
        rustix::thread::set_no_new_privs(true)?;
        if !self.log {
            drop_capabilities(self.kept)?;
        }
        Ok(())
    }
}

/// Gives up this thread's capabilities, and those of threads that it starts, but for what it has of the `kept`.
///
/// # Errors
/// When the kernel does not take them.
pub fn drop_capabilities(mut kept: CapabilitySet) -> rustix::io::Result<()> {
    if !kept.is_empty() {
        kept &= rustix::thread::capabilities(None)?.permitted;
    }
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets)
}

/// Makes a system call that no thread may make, or one on a descriptor of the `others`, in a test.
#[cfg(debug_assertions)]
fn violate(role: Role, others: &[u32]) {
    let Ok(wanted) = std::env::var("BANTAM_TEST_VIOLATION") else { return };
    if wanted == format!("{role:?}").to_lowercase() {
        violation::violate();
    }
    if let (Role::Disk, "another-disk", [other, ..]) = (role, wanted.as_str(), others) {
        violation::read(*other);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_has_no_more_than_its_parent() {
        let may = |role: Role, folders, disks| {
            let lists = role.lists(Files { folders, disks, rings: disks }).into_iter().flatten();
            lists.map(|(number, _)| *number).collect::<std::collections::BTreeSet<_>>()
        };
        for (folders, disks) in [(false, false), (true, false), (false, true)] {
            // A share is there only with folders.
            let share = folders.then_some(Role::Share);
            for role in [Role::Disk, Role::Network, Role::Vsock, Role::Device].into_iter().chain(share) {
                assert!(may(role, folders, disks).is_subset(&may(Role::Vcpu, folders, disks)), "{role:?}");
            }
            for role in [Role::Vcpu, Role::Stream, Role::Control] {
                assert!(may(role, folders, disks).is_subset(&may(Role::Main, folders, disks)), "{role:?}");
            }
            let opens = |role: Role| may(role, folders, disks).contains(&libc::SYS_openat);
            assert_eq!([Role::Vcpu, Role::Disk, Role::Network, Role::Share].map(opens), [folders, false, false, true]);
            for call in [libc::SYS_dup3, libc::SYS_io_uring_register] {
                let replaces = |role: Role| may(role, folders, disks).contains(&call);
                assert_eq!(
                    [Role::Control, Role::Vcpu, Role::Disk, Role::Network].map(replaces),
                    [disks, false, false, false]
                );
            }
            // It starts the thread of a disk again.
            if disks {
                assert!(may(Role::Disk, folders, disks).is_subset(&may(Role::Control, folders, disks)));
            }
            assert!(!may(Role::Main, folders, disks).contains(&libc::SYS_execve));
            assert!(!may(Role::Disk, folders, disks).contains(&libc::SYS_sendto));
            let enters = |role: Role| may(role, folders, disks).contains(&libc::SYS_io_uring_enter);
            assert_eq!((enters(Role::Disk), enters(Role::Network), enters(Role::Stream)), (disks, false, false));
            assert!(!may(Role::Main, folders, disks).contains(&libc::SYS_io_uring_setup));
        }
    }

    #[test]
    fn modes_are_text() {
        for (mode, name) in MODES {
            assert_eq!((name.parse(), mode.to_string()), (Ok(mode), name.to_owned()));
        }
        assert!("yes".parse::<Mode>().is_err());
    }
}

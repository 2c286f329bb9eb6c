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
use std::str::FromStr;
use std::sync::Arc;

use filter::List;
pub use landlock::{Access, Error, Ruleset, version as landlock_version};
use rustix::thread::{CapabilitySet, CapabilitySets};
pub use violation::name_violations;

use crate::text::serde_as_text;

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

serde_as_text!(Mode);

/// What a thread does for a machine, and so may do. One that is started by another has what both have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Runs the loop, saves the machine, and ends it.
    Main,
    /// Runs a vCPU, and starts devices.
    Vcpu,
    /// Does the I/O of a device.
    Device,
    /// Carries what is printed and typed.
    Stream,
    /// Answers who asks for the machine.
    Control,
}

impl Role {
    /// The lists of system calls, with those of a machine whose devices open files, or without.
    fn lists(self, files: bool) -> Vec<&'static List> {
        use calls::{BASE, DEVICE, FILES, MAIN, SOCKETS, THREADS, VCPU};
        let mut lists: Vec<&List> = match self {
            Self::Main => vec![BASE, SOCKETS, DEVICE, THREADS, VCPU, MAIN, FILES],
            Self::Vcpu => vec![BASE, SOCKETS, DEVICE, THREADS, VCPU],
            Self::Device => vec![BASE, SOCKETS, DEVICE],
            Self::Stream => vec![BASE, SOCKETS],
            Self::Control => vec![BASE, SOCKETS, THREADS, FILES],
        };
        if files && matches!(self, Self::Vcpu | Self::Device) {
            lists.push(FILES);
        }
        lists
    }
}

/// The sandbox of a machine's threads. By default there is none.
#[derive(Debug, Clone, Default)]
pub struct Sandbox(Option<Arc<Rules>>);

#[derive(Debug)]
struct Rules {
    log: bool,
    files: bool,
    kept: CapabilitySet,
    /// The process does without: each thread restricts itself.
    alone: Option<Option<Ruleset>>,
}

impl Sandbox {
    /// A sandbox in which system calls are filtered. Of a machine with shared folders, or whose disks are changed while it
    /// runs, devices open `files`.
    ///
    /// A violation is a SIGSYS, which kills the process unless somebody handles it ([`name_violations`]); with [`Mode::Log`]
    /// somebody has to.
    pub fn new(mode: Mode, files: bool) -> Self {
        let rules = Rules { log: mode == Mode::Log, files, kept: CapabilitySet::empty(), alone: None };
        Self((mode != Mode::Off).then(|| Arc::new(rules)))
    }

    /// The same, and of the capabilities no others are kept by threads that give them up.
    pub fn keeping(mut self, kept: CapabilitySet) -> Self {
        if let Some(rules) = self.0.as_mut().and_then(Arc::get_mut) {
            rules.kept = kept;
        }
        self
    }

    /// The same, for a process that is not in a sandbox: each thread gives up capabilities, and vCPUs and devices can open
    /// only the files that `ruleset` allows.
    pub fn by_themselves(mut self, ruleset: Option<Ruleset>) -> Self {
        if let Some(rules) = self.0.as_mut().and_then(Arc::get_mut) {
            rules.alone = Some(ruleset);
        }
        self
    }

    /// Restricts this thread, and those that it starts, for good. It gives up new privileges if it has not done so.
    ///
    /// # Errors
    /// When the kernel does not take the rules. One without seccomp is no error.
    pub fn enter(&self, role: Role) -> io::Result<()> {
        let Some(rules) = &self.0 else { return Ok(()) };
        if let Some(ruleset) = rules.alone.as_ref().filter(|_| !matches!(role, Role::Main | Role::Control)) {
            rules.give_up()?;
            ruleset.as_ref().map_or(Ok(()), Ruleset::restrict).map_err(io::Error::other)?;
        }
        let mut lists = role.lists(rules.files);
        if rules.log {
            // These cannot be made from a handler.
            lists.push(calls::THREADS);
        }
        let program = filter::compile(&lists, rules.log.then(violation::passage_end));
        let installed = match filter::install(&program) {
            // It has not given up new privileges yet.
            Err(error) if error.raw_os_error() == Some(libc::EACCES) => {
                rustix::thread::set_no_new_privs(true)?;
                filter::install(&program)
            }
            installed => installed,
        };
        match installed {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL)) => {
                log::info!("this kernel has no filters of system calls (seccomp)");
            }
            installed => installed?,
        }
        #[cfg(debug_assertions)]
        violate(role);
        Ok(())
    }

    /// The same for a thread that is there before the process is restricted.
    ///
    /// # Errors
    /// As [`enter`](Self::enter).
    pub fn enter_first(&self, role: Role) -> io::Result<()> {
        self.0.as_ref().filter(|rules| rules.alone.is_none()).map_or(Ok(()), |rules| rules.give_up())?;
        self.enter(role)
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

/// Makes a system call that no thread may make, in a test.
#[cfg(debug_assertions)]
fn violate(role: Role) {
    let wanted = std::env::var("BANTAM_TEST_VIOLATION").is_ok_and(|name| name == format!("{role:?}").to_lowercase());
    if wanted {
        violation::violate();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_has_no_more_than_its_parent() {
        let may = |role: Role, files| {
            let lists = role.lists(files).into_iter().flatten();
            lists.map(|(number, _)| *number).collect::<std::collections::BTreeSet<_>>()
        };
        for files in [false, true] {
            assert!(may(Role::Device, files).is_subset(&may(Role::Vcpu, files)));
            for role in [Role::Vcpu, Role::Stream, Role::Control] {
                assert!(may(role, files).is_subset(&may(Role::Main, files)), "{role:?}");
            }
        }
        assert!(!may(Role::Device, false).contains(&libc::SYS_openat));
        assert!(!may(Role::Main, true).contains(&libc::SYS_execve));
    }

    #[test]
    fn modes_are_text() {
        for (mode, name) in MODES {
            assert_eq!((name.parse(), mode.to_string()), (Ok(mode), name.to_owned()));
        }
        assert!("yes".parse::<Mode>().is_err());
    }
}

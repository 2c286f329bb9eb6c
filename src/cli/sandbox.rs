//! `--sandbox`: what the process may still do when its machine runs.

use std::error::Error;
use std::os::fd::RawFd;
use std::path::PathBuf;

use super::descriptors;
use super::jail::{self, Inside};
use bantam::config::Config;
use bantam::machine::Machine;
use bantam::sandbox::{self, Access, Mode, Role, Ruleset, Sandbox};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::CapabilitySet;

/// What there is without `--sandbox`.
const DEFAULT: Mode = Mode::On;

/// The sandbox of a machine's process.
#[derive(Debug)]
pub struct Process {
    mode: Mode,
    /// Somebody may ask for things while the machine runs: it is told where a snapshot goes, and which file a disk has.
    pub asked: bool,
    /// Disks may be given other files.
    pub changes_disks: bool,
    /// Another machine is built after this one.
    pub builds_again: bool,
    /// What the command itself opens in the end.
    pub later: Vec<(PathBuf, Access)>,
    /// That which the process leaves the host for.
    pub jail: Option<Inside>,
}

/// The mode that is meant.
pub fn mode(given: Option<Mode>) -> Mode {
    #[cfg(debug_assertions)]
    if let Some(mode) = std::env::var("BANTAM_TEST_SANDBOX").ok().and_then(|text| text.parse().ok()) {
        return given.unwrap_or(mode);
    }
    given.unwrap_or(DEFAULT)
}

impl Process {
    pub fn new(mode: Mode) -> Self {
        Self { mode, asked: false, changes_disks: false, builds_again: false, later: vec![], jail: None }
    }

    /// Whether the process itself has to be able to do more than its machine's threads.
    fn is_free(&self) -> bool {
        self.asked || self.builds_again
    }

    /// What is kept of the privileges of root.
    fn kept(&self, config: &Config) -> CapabilitySet {
        let mut kept = CapabilitySet::empty();
        let is_outside = self.jail.is_none();
        // Folders may be another user's.
        let opens = self.asked || !self.later.is_empty() || !config.opened_later().is_empty();
        if is_outside && opens {
            kept |= CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH;
        }
        if config.has_folders() {
            // DAC_READ_SEARCH would open any file by its handle (open_by_handle_at(2)), whatever is mounted.
            kept |= CapabilitySet::DAC_OVERRIDE | CapabilitySet::CHOWN | CapabilitySet::FOWNER | CapabilitySet::FSETID;
        }
        // passt is another user then.
        if is_outside && config.nets.iter().any(|net| net.user) {
            kept |= CapabilitySet::KILL;
        }
        kept
    }

    fn rules(&self, allowed: &[(PathBuf, Access)]) -> Result<Option<Ruleset>, sandbox::Error> {
        match Ruleset::new(allowed) {
            Err(error @ (sandbox::Error::Unavailable | sandbox::Error::Old)) => {
                log::info!("the sandbox is without Landlock: {error}");
                Ok(None)
            }
            rules => rules.map(Some),
        }
    }

    /// The sandbox of the threads of a machine that is to be built.
    pub fn threads(&self, config: &Config) -> Result<Sandbox, Box<dyn Error>> {
        let mut threads = Sandbox::new(self.mode).changing_disks(self.changes_disks);
        if self.mode == Mode::On {
            threads = threads.keeping(self.kept(config));
            if self.is_free() {
                threads = threads.by_themselves(self.rules(&config.opened_later())?);
            }
        }
        Ok(threads)
    }

    /// Restricts the process, which is about to run `machine`, for good.
    pub fn enter(&self, machine: &Machine) -> Result<(), Box<dyn Error>> {
        // While the paths of the configuration are there.
        let (kept, most) = (self.kept(machine.config()), descriptors::most(machine.config()));
        if self.mode == Mode::Off {
            return Ok(self.leave_host(kept)?);
        }
        let failed = |what: &'static str| move |error| format!("cannot {what} (--sandbox): {error}");
        sandbox::name_violations(self.mode == Mode::Log).map_err(failed("handle SIGSYS"))?;
        if self.builds_again {
            return Ok(());
        }
        let failed = |what: &'static str| move |error: rustix::io::Errno| format!("cannot {what} (--sandbox): {error}");
        rustix::thread::set_no_new_privs(true).map_err(failed("give up new privileges"))?;
        if self.mode == Mode::On {
            let allowed = match self.jail {
                Some(_) => machine.config().folders().collect(),
                None => [machine.opened_later(), self.later.clone()].concat(),
            };
            // Of what is asked of a machine in a jail, nothing takes a path.
            let rules = if self.asked && self.jail.is_none() { None } else { self.rules(&allowed)? };
            self.leave_host(kept)?;
            sandbox::drop_capabilities(kept).map_err(failed("give up capabilities"))?;
            let limit = |most| Rlimit { current: Some(most), maximum: Some(most) };
            setrlimit(Resource::Core, limit(0)).map_err(failed("turn off core dumps"))?;
            // Saving a machine reads what only the owner of the process may, who has nothing of one without dumps.
            if !self.asked {
                if let Some(most) = most {
                    setrlimit(Resource::Nofile, limit(most)).map_err(failed("limit descriptors"))?;
                }
                let none = DumpableBehavior::NotDumpable;
                set_dumpable_behavior(none).map_err(failed("keep other processes out of this one"))?;
            }
            rules.map_or(Ok(()), |rules| rules.restrict())?;
        } else {
            self.leave_host(kept)?;
        }
        machine
            .sandbox()
            .enter(Role::Main)
            .map_err(|error| format!("cannot filter system calls (--sandbox): {error}"))?;
        log::debug!("the sandbox is {}", self.mode);
        Ok(())
    }

    /// Enters the jail, if there is to be one.
    fn leave_host(&self, kept: CapabilitySet) -> Result<(), jail::Error> {
        self.jail.as_ref().map_or(Ok(()), |jail| jail.enter(kept))
    }

    /// Closes the descriptors that the process was started with and that nobody names, in the arguments or in `config`.
    pub fn close_others(&self, config: &Config) {
        if self.mode == Mode::On {
            let text: Vec<_> = std::env::args_os().map(|argument| argument.to_string_lossy().into_owned()).collect();
            let mut named: Vec<_> = text.iter().flat_map(|argument| numbers(argument)).collect();
            if *config != Config::new() {
                named.extend(numbers(&serde_json::to_string(config).unwrap_or_default()));
                named.extend(config.nets.iter().filter_map(|net| net.fd));
            }
            crate::process::close_all_but(named);
        }
    }
}

/// The descriptors that a text names: `fd=5`, `/dev/fd/5`, `/proc/self/fd/5`.
fn numbers(text: &str) -> impl Iterator<Item = RawFd> {
    let after = text.match_indices("fd").map(|(at, fd)| &text[at + fd.len()..]);
    after.filter_map(|rest| {
        let digits = rest.strip_prefix(['=', '/'])?;
        let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
        digits[..end].parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_named_by_their_numbers() {
        let named = |text| numbers(text).collect::<Vec<_>>();
        assert_eq!(named("fd=5,mac=02:00:00:00:00:01"), [5]);
        assert_eq!(named("file=/dev/fd/63"), [63]);
        assert_eq!(named("/proc/self/fd/7:/proc/123/fd/8"), [7, 8]);
        assert!(named("fdisk=3 fd fd= fd=x").is_empty());
    }
}

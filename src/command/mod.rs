//! One command in a guest: what is run and how, the init in the guest that runs it, and its streams.
//!
//! ```text
//!  host                                    |  guest
//!  stdin, stdout, stderr                   |           pipes, or a terminal
//!     |  threads of the session            |                |
//!  socket pairs --- virtio-vsock device ---|--- vsock --- init --- command
//!     |                                    |
//!  control: signals, window size  -------->|
//!           started, ended  <--------------|
//! ```
//!
//! The init is a small static program that this one carries. It and what it has to do come as an
//! archive that is loaded as an initrd, so that nothing in the root file system is needed or changed.
//!
//! A guest that is to be saved for later starts is not told the command there. It says that it is ready for one, is saved,
//! and takes it from the control connection: in this machine, and in each that is restored from what was saved.

mod initramfs;
pub mod overlay;
mod protocol;
mod session;
mod tail;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

pub use initramfs::{Devices, Error, Initramfs, MODULES, Root, Share, WAIT, told};
pub use session::{Ended, Ends, PidsLimit, Report, Session, Streams, Told};
pub use tail::{Kept, Tail};

/// The parameter that has the kernel start the init.
pub const PARAMETER: &str = "rdinit=/.bantam/init";

/// The longest host name that Linux has, in bytes.
const HOST_NAME_MAX: usize = 64;

/// A command to be run in the guest.
///
/// ```
/// use bantam::command::Spec;
/// let command = Spec::new(["/bin/sh", "-c", "exit 7"]);
/// assert!(command.validate().is_ok());
/// assert!(Spec::new(Vec::<String>::new()).validate().is_err());
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Command"))]
pub struct Spec {
    /// The program, by path or to be found in `PATH`, and its arguments.
    pub arguments: Vec<String>,
    /// Its environment, `NAME=VALUE`. `PATH` and `HOME` are added if they are not there.
    pub env: Vec<String>,
    /// The folder it starts in; made if it is not there. Without one it is `/`.
    pub workdir: Option<String>,
    /// Who runs it: `USER` or `USER:GROUP`, numbers or names that the guest knows. Without one it is root.
    pub user: Option<String>,
    /// The guest's host name.
    pub hostname: Option<String>,
    /// How many processes and threads it may have together.
    pub pids: Option<u32>,
    /// Whether it gets a terminal, which is the one on the host's standard input.
    pub tty: bool,
    /// Whether the root, a disk or a folder, is written to. If not, what is written is in the guest's memory and gone at
    /// the end, or in a file that keeps it.
    pub rw: bool,
}

/// Why a [`Spec`] cannot be run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadSpec {
    /// There is no program.
    #[error("cannot run a command: its name is missing")]
    Empty,
    /// There is no program, but what is for one.
    #[error(
        "cannot use {0} without a command: name one behind `--` (bantam run ROOTFS -- COMMAND), or a root file system whose image \
         names one"
    )]
    Options(String),
    /// A text that ends before its end.
    #[error("cannot run a command with `{0}`: it has a NUL character")]
    Nul(String),
    /// A variable without a value.
    #[error("cannot put `{0}` into the command's environment: expected NAME=VALUE")]
    Variable(String),
    /// Not even the command itself.
    #[error("cannot run a command in 0 processes: it is one itself")]
    NoProcess,
    /// A name that Linux does not take.
    #[error("cannot name the guest `{0}`: a host name has 1 to {HOST_NAME_MAX} bytes")]
    HostName(String),
}

impl Spec {
    /// A command with these arguments, of which the first is the program.
    pub fn new(arguments: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { arguments: arguments.into_iter().map(Into::into).collect(), ..Self::default() }
    }

    /// The flags of what it has beside its arguments.
    fn options(&self) -> Vec<&'static str> {
        let options = [
            // A terminal brings a variable.
            (self.env.iter().any(|variable| !self.tty || !variable.starts_with("TERM=")), "--env"),
            (self.workdir.is_some(), "--workdir"),
            (self.user.is_some(), "--user"),
            (self.hostname.is_some(), "--hostname"),
            (self.pids.is_some(), "--pids"),
            (self.tty, "--tty"),
            (self.rw, "--rw"),
        ];
        options.into_iter().filter_map(|(is_given, flag)| is_given.then_some(flag)).collect()
    }

    /// Checks what can be checked without the guest.
    ///
    /// # Errors
    /// When there is no command, or a text that no process can have.
    pub fn validate(&self) -> Result<(), BadSpec> {
        let optional = [&self.workdir, &self.user, &self.hostname];
        let mut texts = self.arguments.iter().chain(&self.env).chain(optional.into_iter().flatten());
        if self.arguments.first().is_none_or(String::is_empty) {
            let options = self.options();
            return Err(if options.is_empty() { BadSpec::Empty } else { BadSpec::Options(options.join(", ")) });
        }
        if let Some(text) = texts.find(|text| text.contains('\0')) {
            return Err(BadSpec::Nul(text.clone()));
        }
        if let Some(variable) = self.env.iter().find(|variable| variable.find('=').is_none_or(|at| at == 0)) {
            return Err(BadSpec::Variable(variable.clone()));
        }
        if self.pids == Some(0) {
            return Err(BadSpec::NoProcess);
        }
        match &self.hostname {
            Some(name) if name.is_empty() || name.len() > HOST_NAME_MAX => Err(BadSpec::HostName(name.clone())),
            _ => Ok(()),
        }
    }
}

//! A machine: built from a [`Config`], run until it ends.

mod board_x86_64;
mod builder;
mod changed;
mod destination;
mod end;
mod events;
pub mod firecracker;
mod folder;
mod handle;
mod inbox;
mod initrd;
mod lines;
mod memory_copy;
mod memory_file;
mod memory_handler;
mod pause;
mod prometheus;
mod quota;
mod report;
mod run;
mod save;
pub mod snapshot;
mod watch;
mod working_set;
mod writing;

use std::collections::BTreeMap;
use std::io;
use std::io::Write;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use board_x86_64::{Attached, Keyboard, Port};
pub use builder::Builder;
pub use destination::Destination;
use events::Told;
pub use handle::Handle;
use inbox::{Inbox, Sender};
pub use lines::Lines;
pub use pause::Refusal;
use pause::{Pause, Save};
use quota::Quota;
pub use report::{Durations, Limits, Report};
pub use snapshot::Snapshot;
pub use working_set::Record;

use crate::command::Kept;
use crate::config::Config;
use crate::devices::console::Input;
use crate::devices::output::Output;
use crate::file::FileId;
use crate::kvm::IrqLine;
use crate::metrics::Metrics;
use crate::outcome::Outcome;
use crate::sandbox::{Access, Sandbox};
use crate::signal::SignalFd;
use crate::vcpu::{self, Buses};
use crate::virtio::balloon;
use crate::{arch, boot, bus, cgroup, command, config, devices, kvm, memory, virtio};

/// Why a machine could not be built or run. How the guest fared is no error but an [`Outcome`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration makes no machine.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// There is no kernel to boot.
    #[error("cannot boot: the configuration names no kernel")]
    NoKernel,
    /// The kernel, the initrd or the command line cannot be used.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// A disk cannot be used.
    #[error(transparent)]
    Disk(#[from] virtio::blk::Error),
    /// A network device cannot be used.
    #[error(transparent)]
    Net(#[from] virtio::net::Error),
    /// The balloon cannot be had.
    #[error(transparent)]
    Balloon(#[from] balloon::Error),
    /// The random number device cannot be limited.
    #[error("cannot make a timer for the random number device's rate limit")]
    Random(#[source] io::Error),
    /// A folder cannot be shared.
    #[error(transparent)]
    Share(#[from] virtio::fs::Error),
    /// A socket device cannot be used.
    #[error(transparent)]
    Vsock(#[from] virtio::vsock::Error),
    /// The console cannot be opened.
    #[error(transparent)]
    Console(#[from] devices::console::Error),
    /// Guest memory cannot be had.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The tables that tell the guest what machine it has cannot be written.
    #[error(transparent)]
    Tables(#[from] arch::x86_64::Error),
    /// The tables that a kernel is entered with cannot be written.
    #[error(transparent)]
    Registers(#[from] arch::x86_64::regs::Error),
    /// KVM refused something.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// Two devices want the same addresses.
    #[error(transparent)]
    Bus(#[from] bus::Overlap),
    /// More devices than there are interrupts for.
    #[error("cannot attach {asked} virtio devices: there are interrupts for {max}")]
    TooManyDevices {
        /// How many were asked for.
        asked: usize,
        /// How many there can be.
        max: usize,
    },
    /// The command cannot be prepared.
    #[error(transparent)]
    Command(#[from] command::Error),
    /// What the command changes cannot be kept.
    #[error(transparent)]
    Overlay(#[from] command::overlay::Error),
    /// Threads cannot be put into the control group that was made for them.
    #[error(transparent)]
    Quota(#[from] cgroup::Error),
    /// The command's streams cannot be used.
    #[error("cannot give the command its standard streams")]
    Streams(#[source] io::Error),
    /// The guest could not start the command.
    #[error("cannot run the command in the guest: {0}")]
    Guest(String),
    /// A restored machine has no ID of its own.
    #[error("cannot have random bytes for the generation ID")]
    GenerationId(#[source] io::Error),
    /// An eventfd could not be had.
    #[error("cannot create an eventfd for {what}")]
    EventFd {
        /// What for.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// A thread could not be restricted.
    #[error("cannot restrict the {what} thread (--sandbox)")]
    Sandbox {
        /// Which one.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// A thread could not be started.
    #[error("cannot start the {what} thread")]
    Thread {
        /// Whose thread.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The machine cannot be saved, or not be made from what was saved.
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
    /// A machine runs once.
    #[error("cannot run a machine a second time: build another one")]
    RanBefore,
}

/// A virtual machine. [`Machine::run`] runs it on the calling thread, and on threads of its own, until it ends.
pub struct Machine {
    config: Config,
    inbox: Inbox,
    sender: Sender,
    buses: Arc<Buses>,
    serial: Arc<Mutex<Port>>,
    keyboard: Option<Arc<Mutex<Keyboard>>>,
    output: Output,
    console_output: Option<Box<dyn Write + Send>>,
    input: Option<Box<dyn Input>>,
    signals: Option<SignalFd>,
    command: Option<command::Session>,
    kept: Option<Kept>,
    has_modules: bool,
    module_files: Vec<PathBuf>,
    quota: Option<Quota>,
    limits: Limits,
    /// Not yet running.
    vcpus: Vec<kvm::Vcpu>,
    /// Running.
    threads: Vec<vcpu::Thread>,
    /// Of those that ran.
    vcpu_metrics: Vec<(String, Arc<vcpu::Metrics>)>,
    /// Writes the console.
    writer: Option<JoinHandle<()>>,
    attached: Vec<Attached>,
    /// What other devices count.
    counts: Vec<(&'static str, Arc<dyn Metrics>)>,
    balloon: Option<Arc<balloon::Shared>>,
    told: Told,
    watch: watch::Watch,
    pause: Pause,
    /// Gives its memory, if that is not from a file.
    memory_handler: Option<memory_handler::Handler>,
    /// What is to be done about its working set, and what does it.
    working_set: working_set::Plan,
    helper: Option<working_set::Helper>,
    /// Write what was saved.
    savers: Vec<save::Saver>,
    /// Who waited for memory from another process to be saved when the machine ended.
    unserved: Vec<pause::Answer<()>>,
    /// Whether it stands still when it starts.
    start_paused: bool,
    sandbox: Sandbox,
    /// What passt processes say, until somebody listens.
    passts: Vec<virtio::net::passt::Messages>,
    /// The process that users know.
    pid: Option<u32>,
    /// Tells the guest that the machine is another than the one it was saved in; of a restored machine.
    generation: Option<IrqLine>,
    /// The snapshot that its memory is mapped from.
    origin: Option<snapshot::Base>,
    /// Files that have all of its memory but what has changed since: those that it is mapped from, and the last one that all of
    /// it was saved to.
    memory_files: Vec<FileId>,
    last_memory_file: Option<FileId>,
    /// Where it is saved when its guest is ready for the command.
    save: Option<Save>,
    /// The guest is given the command when the machine goes on.
    may_give: bool,
    started: Instant,
    times: Durations,
    upkeep: Option<fn()>,
    /// It is to be called as soon as nothing goes on.
    due_upkeep: Option<fn()>,
    /// Where the initrd is.
    initrd: Range<u64>,
    outcome: Option<Outcome>,
    /// Last: the memory slots go when every vCPU is gone.
    vm: kvm::Vm,
}

impl Machine {
    /// What it was built from.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The sandbox of its threads.
    pub fn sandbox(&self) -> &Sandbox {
        &self.sandbox
    }

    /// The files that it opens, makes or removes while it runs: those of the [configuration](Config::opened_later), of its
    /// control group, and of a record of what memory it uses.
    pub fn opened_later(&self) -> Vec<(PathBuf, Access)> {
        let group = self.quota.as_ref().and_then(Quota::folder).map(|folder| (folder.to_owned(), Access::Change));
        self.config.opened_later().into_iter().chain(group).chain(self.working_set.opened_later()).collect()
    }

    /// What reaches the machine from other threads.
    pub fn handle(&self) -> Handle {
        Handle::new(self.sender.clone(), &self.attached, self.balloon.clone(), self.pause.paused())
    }

    /// The last lines of the console.
    pub fn console_tail(&self) -> Vec<String> {
        self.output.tail()
    }

    /// The end of the command's output, if [`Builder::keep_output`] asked for it.
    pub fn kept_output(&self) -> Option<&Kept> {
        self.kept.as_ref()
    }

    /// What the guest's kernel last said of a process that it ended because memory ran out, if it did.
    pub fn out_of_memory(&self) -> Option<&str> {
        self.watch.out_of_memory.as_deref()
    }

    /// Whether modules were found for the kernel that runs a command; one with everything built in needs none.
    pub fn has_modules(&self) -> bool {
        self.has_modules
    }

    /// The files that the modules are of that its guest was booted with, and the places where others would count for more, if
    /// there were some.
    pub fn module_files(&self) -> &[PathBuf] {
        &self.module_files
    }

    /// How it went so far, in figures.
    pub fn report(&self) -> Report {
        Report {
            cause: self.outcome.as_ref().map(Outcome::to_string).unwrap_or_default(),
            outcome: self.outcome.clone(),
            out_of_memory: self.watch.out_of_memory.clone(),
            limits: self.limits.clone(),
            durations: self.times,
            statistics: self.statistics(),
        }
    }

    fn statistics(&self) -> BTreeMap<String, serde_json::Value> {
        let devices = self.attached.iter().map(|device| (device.name.clone(), device.metrics.to_json()));
        let ended = self.vcpu_metrics.iter().map(|(name, metrics)| (name.clone(), metrics.to_json()));
        let running = self.threads.iter().enumerate();
        let running = running.map(|(index, thread)| (format!("vcpu{index}"), thread.metrics.to_json()));
        let others = self.counts.iter().map(|(name, metrics)| ((*name).to_owned(), metrics.to_json()));
        devices.chain(ended).chain(running).chain(others).collect()
    }
}

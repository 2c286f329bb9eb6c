//! `bantam api`: Firecracker's command line, which is taken directly by a program of the name `firecracker`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ::log::LevelFilter;
use bantam::boot::kernel;
use bantam::config::firecracker::{Logger, Metrics, Settings, host};
use bantam::config::{Config, Name, file};
use bantam::control::{Api, Program, Server, Stop, VERSION};
use bantam::machine::firecracker::Counts;
use bantam::machine::{Builder, Handle, Machine, Snapshot};
use bantam::named;
use bantam::sandbox::{Mode, Role, Sandbox};
use bantam::signal::{self, SignalFd};
use clap::{Args, FromArgMatches};
use rustix::time::{ClockId, clock_gettime};

use super::sandbox::Process;
use super::{log, message, told};

pub const EXAMPLES: &str = "\
Examples:
  bantam api --api-sock vm.sock
  curl --unix-socket vm.sock -X PUT http://localhost/boot-source -d '{\"kernel_image_path\": \"vmlinux\"}'
  curl --unix-socket vm.sock -X PUT http://localhost/actions -d '{\"action_type\": \"InstanceStart\"}'

  A link by the name firecracker takes the same flags without `api`:
    ln -s $(which bantam) firecracker
    ./firecracker --no-api --config-file vm.json

docs/api.md tells what is there, and what is not.";

/// The longest name of a machine.
const ID_MAX: usize = 64;

#[derive(Debug, Args)]
pub struct Flags {
    /// The Unix socket to listen on, where nothing may be yet.
    #[arg(long, value_name = "PATH", default_value = "/run/firecracker.socket")]
    api_sock: PathBuf,
    /// The machine's name: letters, digits and dashes.
    #[arg(long, default_value = "anonymous-instance", value_parser = id)]
    id: String,
    /// Start the machine of this file.
    #[arg(long, value_name = "FILE")]
    config_file: Option<PathBuf>,
    /// Have no API, but the machine of --config-file.
    #[arg(long, requires = "config_file")]
    no_api: bool,
    /// Log to the end of this file or pipe, instead of to standard error.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    log_path: Option<String>,
    /// What is logged: Off, Error, Warning, Info, Debug or Trace [default: Warning; with --log-path Info].
    #[arg(long, value_parser = host::level, help_heading = "Output")]
    level: Option<LevelFilter>,
    /// Log the level of each line.
    #[arg(long, help_heading = "Output")]
    show_level: bool,
    /// Log where in the program each line comes from.
    #[arg(long, help_heading = "Output")]
    show_log_origin: bool,
    /// Log only what this module says: bantam::machine.
    #[arg(long, help_heading = "Output")]
    module: Option<String>,
    /// Write metrics to the end of this file or pipe.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    metrics_path: Option<String>,
    /// Let `bantam ps`, stop, pause, resume, snapshot, console and metrics reach the machine by this name.
    #[arg(long, value_name = "NAME", help_heading = "Output")]
    name: Option<Name>,
    /// Add a line of JSON to FILE, or a pipe, for each thing that happens, as bantam run does.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    events: Option<PathBuf>,
    /// Log how long the guest took to reach user space.
    #[arg(long, help_heading = "Output")]
    pub boot_timer: bool,
    /// The most bytes in the body of a request.
    #[arg(long, value_name = "BYTES", default_value_t = 51200, help_heading = "Limits")]
    http_api_max_payload_size: usize,
    /// What bantam may still do when the machine runs [default: on].
    ///
    /// on: the files and system calls that the machine takes; a system call beyond them ends it with a line that tells which.
    /// log: such a system call is told, and made. off: all that the user may do.
    #[arg(long, value_name = "on|log|off", help_heading = "Limits")]
    pub sandbox: Option<bantam::sandbox::Mode>,
    /// The most bytes that the metadata service may hold; there is none, and nothing holds them.
    #[arg(long, value_name = "BYTES", help_heading = "Taken and not used")]
    mmds_size_limit: Option<usize>,
    /// A file of data for the metadata service, which is refused.
    #[arg(long, value_name = "FILE", help_heading = "Taken and not used")]
    metadata: Option<PathBuf>,
    /// Filter no system calls, whatever --sandbox says.
    #[arg(long, conflicts_with = "seccomp_filter", help_heading = "Limits")]
    no_seccomp: bool,
    /// A file of filters for system calls, which is refused.
    #[arg(long, value_name = "FILE", help_heading = "Taken and not used")]
    seccomp_filter: Option<PathBuf>,
    /// Have devices on PCI, which is refused: they are on MMIO.
    #[arg(long, help_heading = "Taken and not used")]
    enable_pci: bool,
    /// When the process was started, in microseconds of the monotonic clock, for the metrics.
    #[arg(long, value_name = "MICROSECONDS", help_heading = "Output")]
    start_time_us: Option<u64>,
    /// The CPU time of the process when it was started, for the metrics.
    #[arg(long, value_name = "MICROSECONDS", help_heading = "Output")]
    start_time_cpu_us: Option<u64>,
    /// The CPU time of the process that started it, for the metrics.
    #[arg(long, value_name = "MICROSECONDS", help_heading = "Output")]
    parent_cpu_time_us: Option<u64>,
    /// Print the version of the format of snapshots.
    #[arg(long, help_heading = "Snapshots")]
    pub snapshot_version: bool,
    /// Print the version of the format of the snapshot that has its state in this file.
    #[arg(long, value_name = "FILE", help_heading = "Snapshots")]
    pub describe_snapshot: Option<PathBuf>,
}

/// Flags that cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot follow {flag}: {why}")]
    Refused { flag: &'static str, why: &'static str },
    #[error(transparent)]
    File(#[from] file::Error),
    #[error(transparent)]
    Log(#[from] log::Error),
    #[error("cannot start the machine of {}: {why}", .path.display())]
    Start { path: PathBuf, why: String },
    #[error("cannot do what the flags say: {0}")]
    Flags(String),
}

fn id(text: &str) -> Result<String, String> {
    match (1..=ID_MAX).contains(&text.len()) && text.chars().all(|c| c == '-' || c.is_ascii_alphanumeric()) {
        true => Ok(text.to_owned()),
        false => Err(format!("expected 1 to {ID_MAX} letters, digits and dashes")),
    }
}

/// Whether the program was started by the name of Firecracker.
pub fn is_firecracker(program: Option<OsString>) -> bool {
    let program = program.map(PathBuf::from);
    program.as_deref().and_then(Path::file_name).is_some_and(|name| name == "firecracker")
}

/// Firecracker's own command line.
pub fn parse() -> Result<Flags, clap::Error> {
    let version =
        format!("v{VERSION}\n\nThis is bantam {}, which has the API of that version.", env!("CARGO_PKG_VERSION"));
    let command =
        clap::Command::new("Firecracker").version(&*version.leak()).styles(super::STYLES).after_help(EXAMPLES);
    Flags::from_arg_matches(&Flags::augment_args(command).try_get_matches()?)
}

impl Flags {
    /// Refuses what there is not.
    pub fn check(&self) -> Result<(), Error> {
        let refused = [
            (self.seccomp_filter.is_some(), "--seccomp-filter", "bantam has filters of its own (--sandbox)"),
            (self.metadata.is_some(), "--metadata", bantam::config::firecracker::NO_MMDS),
            (self.enable_pci, "--enable-pci", "bantam has its devices on MMIO"),
        ];
        match refused.into_iter().find(|(given, ..)| *given) {
            Some((_, flag, why)) => Err(Error::Refused { flag, why }),
            None => Ok(()),
        }
    }

    /// What clients talk to, if there are any.
    pub fn api(&self) -> Api {
        Api::new(&self.id, Settings::default())
    }

    /// The server, unless there is to be none.
    pub fn server(&self) -> Result<Option<Server>, bantam::control::Error> {
        let bind = || Server::bind(&self.api_sock, self.api(), self.http_api_max_payload_size);
        (!self.no_api).then(bind).transpose()
    }

    /// How long the process has taken since it was `started`, or since when the flags say, in microseconds: by the clock,
    /// and of CPU time.
    pub fn startup(&self, started: Instant) -> [u64; 2] {
        let now = |clock| {
            let time = Duration::try_from(clock_gettime(clock)).unwrap_or_default();
            u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
        };
        let since = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
        let time = self.start_time_us.map_or(since, |start| now(ClockId::Monotonic).saturating_sub(start));
        let cpu_time = now(ClockId::ProcessCPUTime).saturating_sub(self.start_time_cpu_us.unwrap_or(0));
        [time, cpu_time.saturating_add(self.parent_cpu_time_us.unwrap_or(0))]
    }

    /// What is known of the machine from the start.
    pub fn settings(&self) -> Result<Option<(PathBuf, Settings)>, Error> {
        let Some(path) = &self.config_file else { return Ok(None) };
        let text = file::read_text(path)?;
        let settings = file::tree(path, &text).and_then(|node| Settings::read(&node));
        Ok(Some((path.clone(), settings.map_err(|what| file::wrong(path, &text, what))?)))
    }

    /// The log that the flags ask for.
    pub fn logger(&self) -> Option<Logger> {
        let info = self.log_path.as_ref().map(|_| LevelFilter::Info);
        let logger = Logger {
            log_path: self.log_path.clone(),
            level: self.level.or(info),
            show_level: Some(true).filter(|_| self.show_level),
            show_log_origin: Some(true).filter(|_| self.show_log_origin),
            module: self.module.clone(),
        };
        Some(logger).filter(|logger| *logger != Logger::default())
    }

    /// The metrics that they ask for.
    pub fn metrics(&self) -> Option<Metrics> {
        let path = self.metrics_path.clone()?;
        Some(Metrics { metrics_path: path, emit_id: false, properties: vec![] })
    }
}

/// Makes the machine that clients ask for.
pub struct Machines {
    log: log::Started,
    signals: SignalFd,
    started: Instant,
    /// What becomes of the process when the machine runs.
    pub process: Process,
    name: Option<Name>,
    events: Option<PathBuf>,
    /// Where the machine is reached by its name.
    named: Option<named::Server>,
    /// The one that was started, to be run.
    pub machine: Option<Machine>,
}

impl Machines {
    /// Logs as the flags say, and takes the signals that end the program.
    pub fn new(flags: &Flags, started: Instant) -> Result<Self, Error> {
        let log = log::start(0, None)?;
        flags.logger().map_or(Ok(()), |logger| log.change(&logger))?;
        let mut process = Process::new(if flags.no_seccomp { Mode::Off } else { super::sandbox::mode(flags.sandbox) });
        (process.asked, process.changes_disks) = (true, true);
        let (name, events) = (flags.name.clone(), flags.events.clone());
        Ok(Self { log, signals: signals()?, started, process, name, events, named: None, machine: None })
    }

    /// Counts what happens to the log.
    pub fn count(&self, counts: Arc<Counts>) {
        self.log.count(counts);
    }

    /// Starts the machine of a file.
    pub fn start_from(&mut self, path: &Path, settings: &Settings) -> Result<Handle, Error> {
        if let Some(logger) = &settings.logger {
            self.log.change(logger)?;
        }
        let failed = |why| Error::Start { path: path.to_owned(), why };
        if settings.boot_source.is_none() {
            return Err(failed("it has no `boot-source`".into()));
        }
        self.start(settings).map_err(failed)
    }
}

impl Machines {
    fn build(&mut self, builder: Builder, config: &Config) -> Result<Handle, String> {
        super::descriptors::allow(config);
        let threads = self.process.threads(config).map_err(|error| message::chain(&*error))?;
        let builder = builder.sandbox(threads).kernel_cache(kernel::Cache::User);
        let signals = signals().map_err(|error| message::chain(&error))?;
        let builder = builder.started(self.started).signals(signals).upkeep(crate::process::give_back);
        let builder = told::telling(builder, self.events.as_deref(), None)?;
        let bind = |name| named::Server::bind(name, config, self.started);
        let mut named = self.name.as_ref().map(bind).transpose().map_err(|error| message::chain(&error))?;
        let machine = told::named_console(builder, &named).build().map_err(|error| message::chain(&error))?;
        let handle = machine.handle();
        if let Some(named) = &mut named {
            named.serve(handle.clone(), machine.sandbox()).map_err(|error| message::chain(&error))?;
        }
        (self.machine, self.named) = (Some(machine), named);
        Ok(handle)
    }
}

fn signals() -> Result<SignalFd, Error> {
    // A terminal that a shell had while this process was stopped.
    let all = [&signal::ENDING[..], &[libc::SIGCONT]].concat();
    SignalFd::new(&all).map_err(|error| Error::Flags(format!("cannot wait for signals by a signalfd: {error}")))
}

impl Program for Machines {
    fn log(&mut self, logger: &Logger) -> Result<(), String> {
        self.log.change(logger).map_err(|error| message::chain(&error))
    }

    fn start(&mut self, settings: &Settings) -> Result<Handle, String> {
        let config = settings.config();
        self.build(Builder::new(config.clone()), &config)
    }

    fn restore(&mut self, snapshot: Snapshot, paused: bool) -> Result<Handle, String> {
        let config = snapshot.config.clone();
        self.build(Builder::restore(snapshot).paused(paused), &config)
    }

    fn signals(&self) -> Option<&SignalFd> {
        Some(&self.signals)
    }
}

/// A server on a thread of its own. Its socket is gone when it is dropped.
pub struct Serving {
    thread: Option<JoinHandle<()>>,
    stop: Stop,
}

impl Serving {
    /// Serves from now on.
    pub fn start(mut server: Server, sandbox: &Sandbox) -> Result<Self, Error> {
        let stop = server.stop();
        let sandbox = sandbox.clone();
        let serve = move || {
            if let Err(error) = sandbox.enter(Role::Control) {
                return ::log::error!("cannot restrict the thread of the API: {error}");
            }
            if let Err(error) = server.serve(None) {
                ::log::error!("{}", message::chain(&error));
            }
        };
        let thread = bantam::threads::named("bantam-api".into()).spawn(serve);
        let thread = thread.map_err(|error| Error::Flags(format!("cannot start the API's thread: {error}")))?;
        Ok(Self { thread: Some(thread), stop })
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.stop.stop();
        // A panic has been told by its hook.
        self.thread.take().into_iter().for_each(|thread| drop(thread.join()));
    }
}

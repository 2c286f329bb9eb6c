//! The command line: flags in, a [`Config`] out.

pub mod api;
pub mod attempts;
pub mod descriptors;
pub mod ending;
pub mod github;
pub mod image;
pub mod jail;
pub mod junit;
pub mod kernel;
pub mod log;
pub mod message;
pub mod named;
pub mod output_file;
pub mod outputs;
pub mod progress;
pub mod restore;
pub mod rootfs;
pub mod sandbox;
pub mod test;
pub mod told;
pub mod warm;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bantam::command;
use bantam::config::file::{self, Document};
use bantam::config::{Config, Overlay, Quota, Share, Size, duration, kv};
use bantam::devices::console;
use bantam::virtio::{balloon, blk, net, vsock};
use clap::builder::styling::{AnsiColor, Styles};
use clap::{Args, CommandFactory, Parser, Subcommand};
use rustix::fs::{Access, AtFlags, CWD};

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Yellow.on_default().bold())
    .usage(AnsiColor::Yellow.on_default().bold())
    .literal(AnsiColor::Green.on_default())
    .placeholder(AnsiColor::Cyan.on_default());

const RUN_EXAMPLES: &str = "\
Examples:
  A kernel and an initramfs, console on this terminal (Ctrl-A x quits):
    bantam run --kernel vmlinuz --initrd initrd.img

  A root disk, four CPUs and 2 GiB of memory:
    bantam run --kernel vmlinuz --cpus 4 --memory 2G rootfs.img

  A second disk that is only read, and a network card on an existing tap:
    bantam run --kernel vmlinuz --disk data.img,readonly=on --net tap=tap0 rootfs.img

  One command on a root disk, which is left as it is; bantam exits with its status:
    bantam run --kernel vmlinuz rootfs.img -- /bin/sh -c 'echo hello; exit 7'

  The same, and what it changes is there at the next run:
    bantam run --kernel vmlinuz --overlay changes.img rootfs.img -- apt-get update

  The same of a folder, an archive or an image, which is made into a disk and cached:
    bantam run --kernel vmlinuz ./rootfs -- ls -l /
    bantam run --kernel vmlinuz docker://127.0.0.1:5000/app:1

  In a script: no console input, a limit, and the outcome as JSON:
    bantam run --kernel vmlinuz --initrd test.img --timeout 60s --report out.json </dev/null

Exit status:
  0      the guest powered off, rebooted or halted, or was stopped
  N      the status of COMMAND, if there is one: 128+N if signal N killed it,
         127 if it was not found, 126 if it could not be run
  121    the guest kernel panicked
  122    the guest crashed
  123    the guest did not boot in time
  124    the guest ran for longer than it may
  125    bantam could not start, or failed, or the guest ended before COMMAND
  128+N  ended by signal N";

const CHECK_EXAMPLES: &str = "\
Examples:
  bantam check
  bantam check --kernel /boot/vmlinuz-6.1.0-42-cloud-amd64
  bantam check --json

Exit status: 0 if everything required is there, 1 if something is missing.";

/// A small virtual machine monitor for KVM.
#[derive(Debug, Parser)]
#[command(name = "bantam", version, styles = STYLES, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
// Only what is asked for is made.
#[command(defer = true)]
pub enum Command {
    /// Run a virtual machine until it ends.
    #[command(after_long_help = RUN_EXAMPLES)]
    Run(Box<Run>),
    /// Make one snapshot of one that has only what changed, and of those that it stands on.
    Merge(restore::Merge),
    /// Have a machine go on from a snapshot.
    #[command(after_long_help = restore::EXAMPLES)]
    Restore(Box<restore::Restore>),
    /// Run a virtual machine that Firecracker's clients describe, by its REST API on a Unix socket.
    #[command(after_long_help = api::EXAMPLES)]
    Api(Box<api::Flags>),
    /// Tell whether this host, and a kernel, have what bantam needs.
    #[command(after_long_help = CHECK_EXAMPLES)]
    Check(Check),
    /// List, fetch and remove the images in the cache.
    #[command(subcommand)]
    Image(image::Image),
    /// List and remove the snapshots of bantam run --warm.
    #[command(subcommand)]
    Warm(warm::Warm),
    /// List, import, build and remove the kernels in the cache.
    #[command(subcommand, after_long_help = kernel::EXAMPLES)]
    Kernel(kernel::Kernel),
    /// Run commands in many machines: kernels x root file systems x commands.
    #[command(after_long_help = test::EXAMPLES)]
    Test(test::Test),
    /// List the machines that run with a name.
    Ps(named::Ps),
    /// Ask a guest to end, and after a time end the machine.
    ///
    /// The machine's command gets SIGTERM. A machine without a command, but with a keyboard ("keyboard": true in its --config
    /// file), gets Ctrl-Alt-Del; one with neither is ended at once. A guest that is paused goes on for it.
    Stop(named::Stop),
    /// Have a machine stand still.
    Pause(named::Named),
    /// Have a machine that stands still go on.
    Resume(named::Named),
    /// Save a machine to a folder, for bantam restore.
    ///
    /// A machine that runs stands still for a moment, and goes on while it is written.
    Snapshot(named::Snapshot),
    /// Print the counters of a machine, as Prometheus reads them.
    Metrics(named::Named),
    /// Have this terminal be the serial console of a machine; Ctrl-A x leaves it.
    ///
    /// Several may watch a console. Where it is otherwise stays as it is.
    Console(named::Named),
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print a manual page in roff: bantam's own, or a command's.
    Man {
        /// The command whose page it is: `run`, `image ls`.
        command: Vec<String>,
    },
}

#[derive(Debug, Clone, Args)]
pub struct Run {
    /// Take the machine from FILE, JSON or TOML, or Firecracker's --config-file; - is standard input.
    ///
    /// Each flag has its key there. Flags beside it count more; of what may be there several times there is more:
    /// disks, network cards, shares, variables and ports are added to those of FILE.
    #[arg(long, value_name = "FILE", help_heading = "Machine")]
    config: Option<PathBuf>,

    /// The root file system: a raw disk image, or with a command also a directory, a tar archive, oci:PATH[:TAG] or
    /// docker://HOST/NAME:TAG.
    ///
    /// A disk image is the first disk, and without a command mounted by the kernel as its root. The others are made into
    /// a read-only disk in the cache (`bantam image`); images name a command themselves.
    #[arg(value_name = "ROOTFS")]
    rootfs: Option<PathBuf>,
    /// A command to run in the guest, instead of what the root file system would start, and its arguments.
    ///
    /// Its standard streams and its exit status are bantam's. The root file system is ROOTFS, below a layer of memory
    /// that takes what is written, or that of --initrd.
    #[arg(value_name = "COMMAND", last = true)]
    command: Vec<String>,

    /// Set a variable in the command's environment; without =VALUE it is as here.
    #[arg(short, long = "env", value_name = "NAME[=VALUE]", help_heading = "Command")]
    env: Vec<String>,
    /// Start the command in this folder, which is made if it is not there.
    #[arg(short, long, value_name = "DIR", help_heading = "Command")]
    workdir: Option<String>,
    /// Run the command as this user: numbers, or names that the guest knows.
    #[arg(short, long, value_name = "USER[:GROUP]", help_heading = "Command")]
    user: Option<String>,
    /// Name the guest.
    #[arg(long, value_name = "NAME", help_heading = "Command")]
    hostname: Option<String>,
    /// Give the command a terminal: the one on standard input. Ctrl-A x ends the machine.
    #[arg(short, long, help_heading = "Command")]
    tty: bool,
    /// Let the command write to ROOTFS, a disk image or a directory.
    #[arg(long, help_heading = "Command")]
    rw: bool,
    /// Keep what the command changes in FILE, for the next run; it is made if it is not there, 10G unless size says.
    #[arg(long, value_name = "[path=]FILE[,size=SIZE][,base=TEXT]", help_heading = "Command", conflicts_with = "rw")]
    #[arg(value_parser = kv::from_str::<Overlay>)]
    overlay: Option<Overlay>,
    /// Take the kernel's modules from here: lib/modules/VERSION, or a folder with that.
    ///
    /// Else they are taken from lib/modules/VERSION in the kernel's folder, beside that, or in /. A kernel that has
    /// built in what is needed (virtio-mmio, virtio-blk, virtio-vsock, overlayfs, the root's file system) needs none.
    #[arg(long, value_name = "DIR", help_heading = "Command")]
    modules: Option<PathBuf>,

    /// The kernel, an ELF vmlinux or a bzImage, or the name of one in the cache (`bantam kernel`) [default: the one named
    /// default, else /boot/vmlinuz-$(uname -r)].
    #[arg(long, value_name = "FILE|NAME", help_heading = "Boot")]
    pub kernel: Option<PathBuf>,
    /// Start COMMAND in a guest that was saved when it was ready for one, as the snapshot KEY in the cache. If there is none,
    /// or it is of another machine, the guest boots, and is saved.
    ///
    /// It may be another command, environment, user and folder each time. A snapshot is used for the same kernel, root file
    /// system, machine, CPU and bantam only; what is other is told. `bantam warm` lists and removes snapshots.
    #[arg(long, value_name = "KEY", help_heading = "Boot")]
    pub warm: Option<String>,
    /// The initial RAM disk.
    #[arg(long, value_name = "FILE", help_heading = "Boot")]
    initrd: Option<PathBuf>,
    /// Text to add to the default kernel command line.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, help_heading = "Boot")]
    cmdline: Option<String>,
    /// Make --cmdline the whole kernel command line.
    #[arg(long, help_heading = "Boot")]
    cmdline_only: bool,

    /// The number of virtual CPUs [default: 1].
    #[arg(long, value_name = "N", value_parser = cpus, allow_negative_numbers = true, help_heading = "Machine")]
    cpus: Option<u32>,
    /// The guest's memory: 512M, 4G, ... [default: 256M].
    #[arg(long, value_name = "SIZE", allow_negative_numbers = true, help_heading = "Machine")]
    memory: Option<Size>,
    /// Have it in huge pages of 2 MiB that the host has reserved (sysctl vm.nr_hugepages), all of it from the start.
    #[arg(long, help_heading = "Machine")]
    hugepages: bool,

    /// Add a disk: a raw image or a block device. The guest sees /dev/vda, vdb, ... in this order, after ROOTFS.
    #[arg(
        long = "disk",
        value_name = "[path=]FILE[,readonly=on|off][,id=NAME][,cache=writeback|unsafe][,direct=on|off][,engine=sync|io_uring][,queues=N][,poll-us=N][,errors=report|stop][,bw=SIZE][,iops=N]"
    )]
    #[arg(value_parser = kv::from_str::<blk::Spec>, help_heading = "Devices")]
    disks: Vec<blk::Spec>,
    /// Add a network card: in a network of this user's own connections (user), on a tap by name, or on an open tap's
    /// descriptor (fd=N).
    ///
    /// A user network needs no privilege, and the program passt. The guest reaches what this user does, but not the host's
    /// loopback interface; it has the address 10.0.2.15, the gateway 10.0.2.2 and the name server 10.0.2.3, with COMMAND
    /// from the start, else by DHCP. `none` is the same as no --net.
    #[arg(
        long = "net",
        value_name = "user|none|[tap=]NAME[,mac=ADDR][,mtu=N][,bw=SIZE][,pps=N][,vhost=on|off|auto][,queues=N]"
    )]
    #[arg(value_parser = net, help_heading = "Devices")]
    nets: Vec<Net>,
    /// Lead a port of the host, on all addresses or on ADDR, to one of the guest. It needs --net user.
    #[arg(short, long, value_name = "[ADDR:]HOSTPORT:GUESTPORT[/udp]", help_heading = "Devices")]
    publish: Vec<net::Publish>,

    /// Share a folder of the host with the guest.
    ///
    /// A guest mounts the first one with `mount -t virtiofs share0 GUEST`, the second one as share1, and so on.
    #[arg(long = "share", value_name = "HOST:GUEST[:ro]", help_heading = "Devices")]
    shares: Vec<Share>,

    /// Add a socket device: Unix sockets of the host to and from the guest's vsock ports.
    ///
    /// A host program connects to PATH and writes `CONNECT PORT` and a newline. What the guest connects to, port PORT of
    /// CID 2, is the Unix socket PATH_PORT.
    #[arg(long, value_name = "cid=N,socket=PATH")]
    #[arg(value_parser = kv::from_str::<vsock::Spec>, help_heading = "Devices")]
    vsock: Option<vsock::Spec>,
    /// Leave out the random number device.
    #[arg(long, help_heading = "Devices")]
    no_rng: bool,
    /// Add a memory balloon, which the guest is asked to put SIZE of its memory into, for the host to use.
    ///
    /// With deflate-on-oom the guest takes memory out before it ends a process for lack of it; with stats it tells of its
    /// memory every TIME; with free-page-reporting it gives back, unasked, what it does not use.
    #[arg(long, value_name = "[size=]SIZE[,deflate-on-oom=on][,stats=TIME][,free-page-reporting=on]")]
    #[arg(value_parser = kv::from_str::<balloon::Spec>, help_heading = "Devices")]
    balloon: Option<balloon::Spec>,

    /// Where the serial console is: stdio, none, file=PATH or socket=PATH [default: stdio, with COMMAND none].
    #[arg(long, value_name = "WHERE", help_heading = "Console")]
    serial: Option<console::Spec>,
    /// Write all that the kernel says to FILE: the same as --serial file=FILE.
    #[arg(long, value_name = "FILE", help_heading = "Console", conflicts_with = "serial")]
    console: Option<PathBuf>,

    /// Let the machine have this much CPU time: a percentage of one CPU, 50% or 150%.
    ///
    /// A control group does that if this user may make one; else vCPUs pause, and devices are not counted.
    #[arg(long, value_name = "PERCENT", help_heading = "Limits")]
    cpu_quota: Option<Quota>,
    /// What bantam may still do when the machine runs [default: on].
    ///
    /// on: the files and system calls that the machine takes; a system call beyond them ends it with a line that tells which.
    /// log: such a system call is told, and made. off: all that the user may do.
    #[arg(long, value_name = "on|log|off", help_heading = "Limits")]
    sandbox: Option<bantam::sandbox::Mode>,
    /// Run the machine in a process that sees nothing of the host but what was opened for it.
    ///
    /// It has namespaces of its own (mount with an empty root, PID, network, IPC, UTS, cgroup) and, if root starts it, a user
    /// and a group that nobody else has, or these. Without root that takes user namespaces. A control group (version 2) limits
    /// its memory and processes, if this user may make one: cgroup=on refuses to go on without, off makes none.
    #[arg(long, value_name = "uid=N,gid=N,cgroup=on|off", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    #[arg(value_parser = file::Jail::read, help_heading = "Limits")]
    pub jail: Option<file::Jail>,
    /// Let the command have at most N processes and threads.
    #[arg(long, value_name = "N", help_heading = "Limits")]
    pids: Option<u32>,
    /// End the machine if it has not reached user space after this time: 500ms, 60s, 2m.
    #[arg(long, value_name = "TIME", value_parser = duration::parse, help_heading = "Limits")]
    boot_timeout: Option<Duration>,
    /// End the machine after this time.
    #[arg(long, value_name = "TIME", value_parser = duration::parse, help_heading = "Limits")]
    timeout: Option<Duration>,

    /// Let `bantam ps`, stop, pause, resume, snapshot, console and metrics reach the machine by this name.
    #[arg(long, value_name = "NAME", help_heading = "Output")]
    pub name: Option<bantam::named::Name>,
    /// Write the outcome, durations and counters to FILE, as JSON; - is standard output.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub report: Option<PathBuf>,
    /// Write the outcome to FILE as JUnit XML, with one test case; - is standard output.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub junit: Option<PathBuf>,
    /// Print workflow commands of GitHub Actions: a group around the output, and an annotation if it failed.
    ///
    /// They are printed on standard output. Commands that the guest prints are not followed.
    #[arg(long, help_heading = "Output")]
    pub github: bool,
    /// Run it again after a failure, at most N times; the last attempt counts.
    ///
    /// Any failure of the guest or its command is one, but not a signal that ends the machine, and no mistake that keeps it
    /// from being built. Nothing is read from standard input, which could be read once only.
    #[arg(long, value_name = "N", conflicts_with = "tty", help_heading = "Limits")]
    retry: Option<u16>,
    /// End with the process that started this one, and take signals that it had blocked.
    #[arg(long, hide = true, value_name = "PID")]
    pub supervised: Option<u32>,
    /// Print the machine as JSON, and do not run it.
    #[arg(long, help_heading = "Output")]
    pub print_config: bool,
    /// Log more: -v what happens, -vv details, -vvv everything.
    #[arg(short, long, action = clap::ArgAction::Count, help_heading = "Output")]
    pub verbose: u8,
    /// Log to the end of FILE instead of to standard error.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub log_file: Option<PathBuf>,
    /// Add a line of JSON to FILE, or a pipe, for each thing that happens: started, booted, paused, panicked, ended, ...
    ///
    /// A reader that stalls is not waited for: it misses lines.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub events: Option<PathBuf>,
    /// Add a line of JSON with the counters to FILE, or a pipe, at the start, each minute and at the end, under Firecracker's
    /// names.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub metrics: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct Check {
    /// A kernel to look into as well, by its file or its name.
    #[arg(long, value_name = "FILE|NAME")]
    pub kernel: Option<PathBuf>,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// What the flags ask for and there is not.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot publish port {0}: that needs a user network (--net user)")]
    NoUserNetwork(net::Publish),
    #[error("cannot have both --net none and a network card")]
    NoneAndSome,
    #[error("cannot try again (--retry) with a command that has a terminal (--tty)")]
    RetryWithTerminal,
    #[error(
        "cannot stop the machine when the host fails disk {} (errors=stop): without a --name, nobody could have it go on",
        .0.display()
    )]
    StopsForNobody(PathBuf),
    #[error("cannot print a manual page: there is no command `{0}`")]
    NoCommand(String),
}

/// Checks that a machine that stops for one of its disks can be found.
fn can_go_on(disks: &[blk::Spec], name: Option<&bantam::named::Name>) -> Result<(), Error> {
    let stops = disks.iter().find(|disk| disk.errors == blk::Errors::Stop && name.is_none());
    stops.map_or(Ok(()), |disk| Err(Error::StopsForNobody(disk.path.clone())))
}

/// What --net says.
#[derive(Debug, Clone)]
enum Net {
    None,
    Card(Box<net::Spec>),
}

fn net(text: &str) -> Result<Net, kv::Error> {
    match text.split(',').next() {
        Some("none") if text == "none" => Ok(Net::None),
        // Elsewhere a first value without a key is a tap.
        Some("user") => {
            kv::from_str(&format!("user=on{}", &text["user".len()..])).map(|card| Net::Card(Box::new(card)))
        }
        _ => kv::from_str(text).map(|card| Net::Card(Box::new(card))),
    }
}

fn cpus(text: &str) -> Result<u32, &'static str> {
    text.parse().map_err(|_| "expected a whole number, such as 4")
}

impl Run {
    /// What is asked for: nobody who wants a jail wants less.
    pub fn sandbox(&self) -> Option<bantam::sandbox::Mode> {
        self.sandbox.or(self.jail.is_some().then_some(bantam::sandbox::Mode::On))
    }

    /// What the file says that --config names, with what the flags say in its place of how the run is told.
    pub fn document(&mut self) -> Result<Document, file::Error> {
        let document = self.config.as_deref().map(file::read).transpose()?.unwrap_or_default();
        let run = &document.run;
        self.kernel = self.kernel.take().or_else(|| document.config.kernel.clone());
        self.name = self.name.take().or_else(|| run.name.clone());
        self.report = self.report.take().or_else(|| run.report.clone());
        self.junit = self.junit.take().or_else(|| run.junit.clone());
        self.log_file = self.log_file.take().or_else(|| run.log_file.clone());
        self.events = self.events.take().or_else(|| run.events.clone());
        self.metrics = self.metrics.take().or_else(|| run.metrics.clone());
        self.warm = self.warm.take().or_else(|| run.warm.clone());
        self.sandbox = self.sandbox.or(run.sandbox);
        self.jail = self.jail.take().or_else(|| run.jail.clone());
        self.github |= run.github;
        self.retry.get_or_insert(run.retry);
        if self.verbose == 0 {
            self.verbose = run.verbose;
        }
        Ok(document)
    }

    /// How often it is run again.
    pub fn retries(&self) -> u16 {
        self.retry.unwrap_or(0)
    }

    /// The machine that the flags ask for above that of `document`, with this kernel.
    pub fn config(&self, document: Document, kernel: PathBuf) -> Result<Config, Error> {
        let Document { mut config, says_serial, .. } = document;
        let command = self.command(config.command.take());
        if self.retries() > 0 && command.as_ref().is_some_and(|command| command.tty) {
            return Err(Error::RetryWithTerminal);
        }
        let disks = [config.disks, self.disks.clone()].concat();
        can_go_on(&disks, self.name.as_ref())?;
        let default_serial = match &command {
            _ if says_serial => config.serial,
            Some(_) => console::Spec::None,
            None => console::Spec::default(),
        };
        let file = self.console.clone().map(console::Spec::File);
        Ok(Config {
            kernel: Some(kernel),
            initrd: self.initrd.clone().or(config.initrd),
            cmdline: self.cmdline.clone().unwrap_or(config.cmdline),
            cmdline_only: self.cmdline_only || config.cmdline_only,
            cpus: self.cpus.unwrap_or(config.cpus),
            memory: self.memory.unwrap_or(config.memory),
            hugepages: config.hugepages || self.hugepages,
            rootfs: self.rootfs.clone().or(config.rootfs),
            overlay: self.overlay.clone().or(config.overlay),
            disks,
            nets: self.nets(config.nets)?,
            shares: [config.shares, self.shares.clone()].concat(),
            vsock: self.vsock.clone().or(config.vsock),
            rng: config.rng && !self.no_rng,
            rng_bw: config.rng_bw,
            rng_iops: config.rng_iops,
            balloon: self.balloon.clone().or(config.balloon),
            keyboard: config.keyboard,
            command,
            modules: self.modules.clone().or(config.modules),
            cpu_template: config.cpu_template,
            cpu_quota: self.cpu_quota.or(config.cpu_quota),
            serial: self.serial.clone().or(file).unwrap_or(default_serial),
            serial_bw: config.serial_bw,
            boot_timeout: self.boot_timeout.or(config.boot_timeout),
            timeout: self.timeout.or(config.timeout),
        })
    }

    /// The machine as a file for --config, and how its run is told.
    pub fn print(&self, config: &Config) -> serde_json::Result<String> {
        let run = file::Run {
            name: self.name.clone(),
            report: self.report.clone(),
            junit: self.junit.clone(),
            warm: self.warm.clone(),
            github: self.github,
            retry: self.retries(),
            verbose: self.verbose,
            log_file: self.log_file.clone(),
            events: self.events.clone(),
            sandbox: self.sandbox,
            jail: self.jail.clone(),
            metrics: self.metrics.clone(),
        };
        let (config, run) = (serde_json::to_string_pretty(config)?, serde_json::to_string_pretty(&run)?);
        Ok(match (config.strip_suffix("\n}"), run.strip_prefix("{\n")) {
            (Some(config), Some(run)) => format!("{config},\n{run}\n"),
            // There is nothing to add.
            _ => config + "\n",
        })
    }

    /// The network cards: those of the file, unless there are to be none, and those of the flags.
    fn nets(&self, of_file: Vec<net::Spec>) -> Result<Vec<net::Spec>, Error> {
        let cards =
            self.nets.iter().filter_map(|net| if let Net::Card(card) = net { Some((**card).clone()) } else { None });
        let cards: Vec<_> = cards.collect();
        let none = cards.len() < self.nets.len();
        if !cards.is_empty() && none {
            return Err(Error::NoneAndSome);
        }
        let mut cards = if none { vec![] } else { [of_file, cards].concat() };
        match (self.publish.first(), cards.iter_mut().find(|card| card.user)) {
            (Some(port), None) => return Err(Error::NoUserNetwork(*port)),
            (_, Some(card)) => card.publish.extend(&self.publish),
            (None, None) => {}
        }
        Ok(cards)
    }

    /// The command, if there is one: that of the file, with what the flags say in its place.
    fn command(&self, of_file: Option<command::Spec>) -> Option<command::Spec> {
        let variable = |variable: &String| match variable.contains('=') {
            true => Some(variable.clone()),
            false => std::env::var(variable).ok().map(|value| format!("{variable}={value}")),
        };
        let file = of_file.unwrap_or_default();
        let tty = self.tty || file.tty;
        let mut env: Vec<_> = file.env.into_iter().chain(self.env.iter().filter_map(variable)).collect();
        if tty && !env.iter().any(|variable| variable.starts_with("TERM=")) {
            env.extend(std::env::var("TERM").map(|term| format!("TERM={term}")));
        }
        let command = command::Spec {
            arguments: if self.command.is_empty() { file.arguments } else { self.command.clone() },
            env,
            workdir: self.workdir.clone().or(file.workdir),
            user: self.user.clone().or(file.user),
            hostname: self.hostname.clone().or(file.hostname),
            pids: self.pids.or(file.pids),
            tty,
            rw: self.rw || file.rw,
        };
        // An image may name the program.
        Some(command).filter(|command| *command != command::Spec::default())
    }
}

/// Has bash complete names of machines that run.
const NAMES: &[u8] = b"
_bantam_named() {
    local word=${COMP_WORDS[COMP_CWORD]}
    case ${COMP_WORDS[1]} in
        stop|pause|resume|snapshot|metrics|console) ;;
        *) _bantam \"$@\"; return ;;
    esac
    if [[ $COMP_CWORD -eq 1 || $word == -* || ( ${COMP_WORDS[1]} != stop && $COMP_CWORD -ne 2 ) ]]; then
        _bantam \"$@\"
    else
        COMPREPLY=($(compgen -W \"$(bantam ps -q 2>/dev/null)\" -- \"$word\"))
    fi
}
complete -F _bantam_named -o bashdefault -o default bantam
";

/// The completion script of a shell.
pub fn completions(shell: clap_complete::Shell) -> Vec<u8> {
    let mut script = vec![];
    clap_complete::generate(shell, &mut Cli::command(), "bantam", &mut script);
    if shell == clap_complete::Shell::Bash {
        script.extend_from_slice(NAMES);
    }
    script
}

/// The manual page of bantam, or of one of its commands: `["image", "ls"]`.
pub fn man(names: &[String]) -> Result<Vec<u8>, Error> {
    let mut bantam = Cli::command();
    bantam.build();
    let mut command = &bantam;
    for name in names {
        command = command.find_subcommand(name).ok_or_else(|| Error::NoCommand(names.join(" ")))?;
    }
    let title = std::iter::once("bantam").chain(names.iter().map(String::as_str)).collect::<Vec<_>>().join("-");
    let mut page = vec![];
    let source = concat!("bantam ", env!("CARGO_PKG_VERSION"));
    let man = clap_mangen::Man::new(command.clone()).title(title.to_uppercase()).source(source);
    let rendered = man.render(&mut page);
    rendered.expect("writing to memory does not fail");
    Ok(page)
}

/// The folder that `path` is in.
fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Checks that a file could be created at `path`, and touches nothing.
fn may_create(path: &Path) -> io::Result<()> {
    let access = Access::WRITE_OK | Access::EXEC_OK;
    Ok(rustix::fs::accessat(CWD, folder(path), access, AtFlags::EACCESS)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(flags: &[&str]) -> Config {
        let flags = ["bantam", "run", "--kernel", "k"].iter().chain(flags);
        let Command::Run(mut run) = Cli::try_parse_from(flags).unwrap().command else { panic!("not a run") };
        let document = run.document().unwrap();
        run.config(document, run.kernel.clone().unwrap()).unwrap()
    }

    /// Flags that are no keys by the same name, and what they are in a file.
    const OTHER_NAMES: [(&str, &str); 13] = [
        ("console", "serial"),
        ("disk", "disks"),
        ("env", "command"),
        ("hostname", "command"),
        ("net", "nets"),
        ("no-rng", "rng"),
        ("pids", "command"),
        ("publish", "nets"),
        ("rw", "command"),
        ("share", "shares"),
        ("tty", "command"),
        ("user", "command"),
        ("workdir", "command"),
    ];

    #[test]
    fn every_flag_has_its_key() {
        // What says where to look, and what is not for people.
        let without = ["config", "print-config", "supervised", "help", "version"];
        let keys = file::keys();
        let mut seen = 0;
        let mut bantam = Cli::command();
        bantam.build();
        for flag in bantam.find_subcommand("run").unwrap().get_arguments() {
            let Some(name) = flag.get_long().filter(|name| !without.contains(name)) else { continue };
            let key = OTHER_NAMES.iter().find(|(flag, _)| *flag == name).map_or(name, |(_, key)| key);
            assert!(keys.contains(&key), "--{name} has no key in the file");
            seen += 1;
        }
        assert!(seen > 25);
    }

    #[test]
    fn flags_count_more_than_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = "cpus = 4\nmemory = '1G'\nrootfs = 'r'\nrng = false\ntimeout = 5\nretry = 2\nreport = 'r'\n[[disks]]\npath = 'a'\n\
                    [[nets]]\nuser = true\n[command]\narguments = ['ls']\nenv = ['A=1']\nworkdir = '/w'\n";
        std::fs::write(file.path(), text).unwrap();
        let flags = |flags: &str| {
            let path = file.path().to_str().unwrap();
            config(&["--config", path].into_iter().chain(flags.split_terminator(' ')).collect::<Vec<_>>())
        };
        let plain = flags("");
        assert_eq!((plain.cpus, plain.rng, plain.serial.clone()), (4, false, console::Spec::None));
        let other = flags("--cpus 2 --disk b -p 1:2 -e B=2 root.img -- make x");
        assert_eq!((other.cpus, other.memory), (2, Size::gib(1)));
        assert_eq!(other.rootfs, Some("root.img".into()));
        assert_eq!(other.disks, [blk::Spec::new("a"), blk::Spec::new("b")]);
        assert_eq!(other.nets[0].publish.len(), 1);
        let command = command::Spec {
            env: vec!["A=1".into(), "B=2".into()],
            workdir: Some("/w".into()),
            ..command::Spec::new(["make", "x"])
        };
        assert_eq!(other.command, Some(command));
        assert_eq!(flags("--net none").nets, []);
    }

    #[test]
    fn the_commands_are_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn no_flags_are_the_defaults() {
        assert_eq!(config(&[]), Config::new().kernel("k"));
    }

    #[test]
    fn a_root_disk_comes_first() {
        let config = config(&["--disk", "data", "--cmdline", "quiet", "root.img"]);
        assert_eq!(config.all_disks().collect::<Vec<_>>(), [blk::Spec::new("root.img"), blk::Spec::new("data")]);
    }

    #[test]
    fn a_command_and_its_flags_reach_the_config() {
        let flags = "--rw -w /src -u me -e A=1 -e NO_SUCH_VARIABLE --hostname box root.img -- make -C x";
        let command = command::Spec {
            env: vec!["A=1".into()],
            workdir: Some("/src".into()),
            user: Some("me".into()),
            hostname: Some("box".into()),
            rw: true,
            ..command::Spec::new(["make", "-C", "x"])
        };
        let expected = Config::new().kernel("k").rootfs("root.img").command(command);
        assert_eq!(config(&flags.split(' ').collect::<Vec<_>>()), expected);
        let console = config(&["--console", "log", "root.img", "--", "true"]).serial;
        assert_eq!(console, console::Spec::File("log".into()));
        let kept = config(&["--overlay", "changes,size=1G", "root.img", "--", "true"]);
        assert_eq!(kept.overlay, Some(Overlay { size: Some(Size::gib(1)), ..Overlay::new("changes") }));
        let error = config(&["--rw", "root.img"]).validate().unwrap_err().to_string();
        assert!(error.contains("cannot use --rw without a command"), "{error}");
    }

    #[test]
    fn networks_are_told_apart() {
        let cards = |flags: &str| config(&flags.split(' ').collect::<Vec<_>>()).nets;
        let ports = ["80:8080", "127.0.0.1:53:53/udp"].map(|port| port.parse().unwrap());
        let user = net::Spec { user: true, ..Default::default() };
        assert_eq!(cards("--net none"), []);
        assert_eq!(cards("--net user")[0], user);
        let published = net::Spec { publish: ports.to_vec(), ..user.clone() };
        assert_eq!(cards("--net user,publish=80:8080 -p 127.0.0.1:53:53/udp")[0], published);
        assert_eq!(cards("-p 80:8080 --publish 127.0.0.1:53:53/udp --net user,mtu=1500")[0].publish, ports);
        let tap = net::Spec { tap: Some("user".into()), ..Default::default() };
        assert_eq!(cards("--net tap=user --net user"), [tap, user]);
    }

    #[test]
    fn flags_reach_the_config() {
        let flags = "--initrd i --cpus 2 --memory 1G --no-rng --serial none --boot-timeout 5s --timeout 1m";
        let config = config(&flags.split(' ').collect::<Vec<_>>());
        let expected = Config::new()
            .kernel("k")
            .initrd("i")
            .cpus(2)
            .memory(Size::gib(1))
            .rng(false)
            .serial(console::Spec::None)
            .boot_timeout(Duration::from_secs(5))
            .timeout(Duration::from_secs(60));
        assert_eq!(config, expected);
    }
}

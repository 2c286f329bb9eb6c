//! Building a machine: everything that can be refused is refused here, before the guest runs.

use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Instant;

use super::board_x86_64::{Board, NamedDevice, virtio_windows};
use super::destination::Destination;
use super::events::Told;
use super::inbox::{Event, Inbox, Sender};
use super::pause::Pause;
use super::pause::Save;
use super::quota::Quota;
use super::snapshot::{self, Snapshot};
use super::{Durations, Error, Limits, Lines, Machine, firecracker};
use crate::arch::x86_64::regs::Entry;
use crate::arch::x86_64::{BootInfo, Platform, VirtioWindow, acpi, boot_params, layout, mptable, needs_x2apic, pvh};
use crate::boot::cmdline::{self, Cmdline};
use crate::boot::kernel::{self, Kernel};
use crate::boot::{self, initrd, inspect};
use crate::command::{self, Devices, Ends, Initramfs, Root, Session, Streams, overlay};
use crate::config::{Config, Size};
use crate::devices::console::{self, Console};
use crate::devices::output::Output;
use crate::kvm::{Vcpu, Vm};
use crate::memory::{self, GuestRam, HUGE_PAGE};
use crate::sandbox::Sandbox;
use crate::signal::SignalFd;
use crate::virtio::change::Rates;
use crate::virtio::{balloon, blk, fs, net, rng, vsock};

/// Builds a [`Machine`] from a [`Config`], and from what a configuration cannot say.
#[must_use]
pub struct Builder {
    config: Config,
    console: Option<Console>,
    signals: Option<SignalFd>,
    streams: Option<Streams>,
    keep: Option<usize>,
    upkeep: Option<fn()>,
    told: Told,
    tee: Option<Tee>,
    started: Instant,
    snapshot: Option<Snapshot>,
    save: Option<Save>,
    paused: bool,
    sandbox: Sandbox,
    pid: Option<u32>,
    kernel_cache: kernel::Cache,
    detach_folders: bool,
}

/// What a console's output goes through.
type Tee = Box<dyn FnOnce(Box<dyn Write + Send>) -> Box<dyn Write + Send> + Send>;

impl Builder {
    /// A builder for the machine that `config` describes.
    pub fn new(config: Config) -> Self {
        let started = Instant::now();
        let (console, signals, streams, keep, upkeep) = (None, None, None, None, None);
        let (told, tee, snapshot, save) = (Told::default(), None, None, None);
        Builder {
            config,
            console,
            signals,
            streams,
            keep,
            upkeep,
            told,
            tee,
            started,
            snapshot,
            save,
            paused: false,
            sandbox: Sandbox::default(),
            pid: None,
            kernel_cache: kernel::Cache::Off,
            detach_folders: false,
        }
    }

    /// A builder for the machine that `snapshot` has saved, with the configuration that it has now. It goes on where that
    /// one was when it [runs](Machine::run).
    pub fn restore(snapshot: Snapshot) -> Self {
        let mut builder = Self::new(snapshot.config.clone());
        builder.snapshot = Some(snapshot);
        builder
    }

    /// Has the machine saved to `destination` when its guest is ready for its command, which then begins; `answer` is told
    /// what came of it, or is dropped when the guest does not get there. What is saved has nothing of the command:
    /// [restored](Self::restore) with that or another command in its configuration, the guest begins with it at once.
    pub fn save_when_ready(mut self, destination: Destination, answer: SyncSender<Result<(), Error>>) -> Self {
        self.save = Some((destination, answer));
        self
    }

    /// Has the machine stand still when it starts, until [`Handle::resume`](super::Handle::resume).
    pub fn paused(mut self, paused: bool) -> Self {
        self.paused = paused;
        self
    }

    /// Has events tell this ID of a process, by which users know the machine, in place of this process' own.
    pub fn pid(mut self, pid: u32) -> Self {
        self.pid = Some(pid);
        self
    }

    /// Has what is in a bzImage be kept in `cache`, and be mapped from there as an ELF kernel is, in place of being unpacked for
    /// each machine.
    pub fn kernel_cache(mut self, cache: kernel::Cache) -> Self {
        self.kernel_cache = cache;
        self
    }

    /// Has shared folders be trees of mounts of their own: nothing is above them, for a process that is about to leave the file
    /// system that they are in, and what is mounted below them later is not seen. It takes `CAP_SYS_ADMIN` over this process'
    /// mounts, and Linux 5.2.
    pub fn detach_folders(mut self, detach: bool) -> Self {
        self.detach_folders = detach;
        self
    }

    /// Has the threads that are made for the machine be in `sandbox`. The thread that [runs](Machine::run) it is not, nor is
    /// the process: a caller that wants that restricts them before it runs the machine.
    ///
    /// What the threads may do follows from the configuration: which devices there are, and whether a disk has an io_uring.
    ///
    /// ```no_run
    /// use bantam::config::Config;
    /// use bantam::machine::Builder;
    /// use bantam::sandbox::{Mode, Sandbox};
    /// use bantam::virtio::blk::{Engine, Spec};
    ///
    /// let disk = Spec { engine: Engine::IoUring, ..Spec::new("disk.img") };
    /// let config = Config::new().kernel("vmlinux").disk(disk);
    /// let mut machine = Builder::new(config).sandbox(Sandbox::new(Mode::On)).build()?;
    /// println!("{}", machine.run()?);
    /// # Ok::<(), bantam::machine::Error>(())
    /// ```
    pub fn sandbox(mut self, sandbox: Sandbox) -> Self {
        self.sandbox = sandbox;
        self
    }

    /// Uses `console` instead of what the configuration's `serial` says.
    pub fn console(mut self, console: Console) -> Self {
        self.console = Some(console);
        self
    }

    /// Has the signals of `signals` end the machine, with [`Outcome::Signaled`](crate::outcome::Outcome::Signaled). A
    /// command that runs gets the first one. `SIGWINCH` tells it of its terminal's size, and `SIGCONT` makes the console's
    /// terminal raw once more, as often as they come; these end nothing.
    pub fn signals(mut self, signals: SignalFd) -> Self {
        self.signals = Some(signals);
        self
    }

    /// Uses `streams` for the command of the configuration, instead of this process' own.
    pub fn streams(mut self, streams: Streams) -> Self {
        self.streams = Some(streams);
        self
    }

    /// Keeps the last `bytes` of each of the command's output streams, beside passing them on, for
    /// [`Machine::kept_output`].
    pub fn keep_output(mut self, bytes: usize) -> Self {
        self.keep = Some(bytes);
        self
    }

    /// Has [`Machine::run`] call `then` when its vCPUs run, and after each look at whether they have halted (a second later,
    /// each time after twice as long, and at least every minute), as soon as nothing has happened for 20 ms. It can give back
    /// what is not used any more.
    pub fn upkeep(mut self, then: fn()) -> Self {
        self.upkeep = Some(then);
        self
    }

    /// Writes what happens to the machine to `lines`, as JSON, one event a line.
    pub fn events(mut self, lines: Lines) -> Self {
        self.told.events = Some(lines);
        self
    }

    /// Writes the machine's counters to `lines` each minute and at its end, as Firecracker does: in the form of `metrics`.
    pub fn metrics(mut self, lines: Lines, metrics: firecracker::Metrics) -> Self {
        self.told.metrics = Some((lines, metrics));
        self
    }

    /// Has what the console's output goes to be what `tee` makes of it, so that others see it, too.
    pub fn tee_console(
        mut self,
        tee: impl FnOnce(Box<dyn Write + Send>) -> Box<dyn Write + Send> + Send + 'static,
    ) -> Self {
        self.tee = Some(Box::new(tee));
        self
    }

    /// The moment that the report's durations count from; else that of [`Builder::new`].
    pub fn started(mut self, started: Instant) -> Self {
        self.started = started;
        self
    }

    /// Opens everything the machine needs, loads the kernel and creates the vCPUs. Nothing runs yet.
    pub fn build(self) -> Result<Machine, Error> {
        let Builder {
            config,
            console,
            signals,
            streams,
            keep,
            upkeep,
            told,
            tee,
            started,
            snapshot,
            save,
            paused,
            sandbox,
            pid,
            kernel_cache,
            detach_folders,
        } = self;
        config.validate()?;
        match &snapshot {
            Some(snapshot) => snapshot.check()?,
            None => drop(config.kernel.as_deref().ok_or(Error::NoKernel)?),
        }
        let (asked, max) = (count_devices(&config), layout::VIRTIO_GSIS.len());
        if asked > max {
            return Err(Error::TooManyDevices { asked, max });
        }
        // First, before a number that is not open becomes that of something opened here.
        let first_nets = first_nets(&config)?;
        let rings = config.all_disks().any(|disk| disk.engine == blk::Engine::IoUring);
        let sandbox = sandbox.having(config.has_folders(), rings);
        let disks = open_disks(&config)?;
        let shares = open_shares(&config, detach_folders)?;

        let ranges = layout::ram_ranges(config.memory.get());
        let (ram, memory_handler) = match &snapshot {
            Some(snapshot) => snapshot.map_memory(&ranges, &sandbox)?,
            None if config.hugepages => (memory::reserve_huge(&ranges)?, None),
            None => {
                let ram = memory::reserve(&ranges)?;
                // The host makes huge pages again of what is left of those that a balloon took a part of.
                if config.balloon.is_none() {
                    prefer_huge_pages(&ram, &ranges);
                }
                (ram, None)
            }
        };
        let mut vm = Vm::new(ram.clone(), config.cpus)?;
        config.cpu_template.as_ref().map_or(Ok(()), |template| vm.apply(template))?;
        let Loaded { vcpus, initrd, has_modules, module_files } = match &snapshot {
            // The modules that were needed are in it.
            Some(snapshot) => {
                Loaded { vcpus: restore(&vm, snapshot)?, initrd: 0..0, has_modules: true, module_files: vec![] }
            }
            None => boot(&config, &vm, save.is_some(), &kernel_cache)?,
        };
        let told_command = match (&snapshot, &save) {
            (Some(_), _) => command::Told::AtOnce,
            (None, Some(_)) => command::Told::WhenGiven,
            (None, None) => command::Told::AtBoot,
        };
        let kernel_loaded = snapshot.is_none().then(|| started.elapsed());
        let (mut session, ends) = open_session(&config, told_command, streams).map_err(Error::Streams)?.unzip();
        let kept = session.as_mut().zip(keep).map(|(session, bytes)| session.keep(bytes));

        let quota = config.cpu_quota.map(|quota| Quota::new(quota, pid.unwrap_or_else(std::process::id)));
        let limits = Limits { cpu_quota: quota.as_ref().map(Quota::to_string), pids: None };

        let (inbox, sender) = Inbox::new().map_err(|source| Error::EventFd { what: "the inbox", source })?;
        let output = Output::default();
        let mut board = Board::new(&vm);
        let serial = board.attach_legacy(output.clone(), &sender, &config)?;
        board.attach_ioapic()?;
        // The driver of one that was saved has interrupts.
        if snapshot.is_none() {
            board.gather_output(&serial);
        }
        let disks = disks.into_iter().map(|disk| stopping(disk, &sender));
        // What changes the host comes last, when nothing else can be refused: files, taps and sockets are created,
        let overlay = open_overlay(&config)?;
        let (nets, passts) = open_nets(&config, first_nets)?;
        let vsock = open_vsock(&config, ends)?;
        let (balloon, balloon_state) = open_balloon(&config)?.unzip();
        let last = vsock.into_iter().chain(rng(&config)?).chain(balloon);
        let devices = disks.chain(overlay).chain(nets).chain(shares).chain(last).collect();
        board.attach_virtio(&ram, devices, &sandbox)?;
        let generation = snapshot.as_ref().map(|_| board.attach_generation_id(&ram)).transpose()?;
        let Board { buses, attached, counts, keyboard, .. } = board;
        let (mut origin, mut working_set, mut memory_files) = (None, Default::default(), vec![]);
        if let Some(snapshot) = snapshot {
            working_set = snapshot.working_set();
            memory_files = snapshot.memory_files();
            origin = snapshot.origin.filter(|origin| !origin.path.as_os_str().is_empty());
            buses.restore(snapshot.state.devices).map_err(snapshot::Error::from)?;
        }
        if let Some(handler) = &memory_handler {
            handler.machine_is_built(&sender)?;
        }
        // a file is emptied, or the user's terminal switched to raw mode.
        let console = console.map_or_else(|| Console::open(&config.serial), Ok)?;
        Ok(Machine {
            config,
            inbox,
            sender,
            buses: Arc::new(buses),
            serial,
            keyboard,
            output,
            console_output: Some(match tee {
                Some(tee) => tee(console.output),
                None => console.output,
            }),
            input: console.input,
            signals,
            command: session,
            kept,
            quota,
            limits,
            has_modules,
            module_files,
            vcpus,
            threads: Vec::new(),
            vcpu_metrics: Vec::new(),
            writer: None,
            attached,
            counts,
            balloon: balloon_state,
            told,
            watch: Default::default(),
            pause: Pause::of_start(paused),
            memory_handler,
            working_set,
            helper: None,
            unserved: vec![],
            savers: vec![],
            started,
            times: Durations { kernel_loaded, ..Durations::default() },
            upkeep,
            due_upkeep: None,
            initrd,
            outcome: None,
            start_paused: paused,
            sandbox,
            passts,
            pid,
            generation,
            origin,
            memory_files,
            last_memory_file: None,
            save,
            may_give: false,
            vm,
        })
    }
}

/// What a guest starts from.
struct Loaded {
    vcpus: Vec<Vcpu>,
    /// Where an initrd is that was a file; empty without one.
    initrd: Range<u64>,
    /// Whether modules for the kernel were found, and in which files.
    has_modules: bool,
    module_files: Vec<PathBuf>,
}

/// Loads the kernel, and creates the vCPUs that enter it.
fn boot(config: &Config, vm: &Vm, waits: bool, cache: &kernel::Cache) -> Result<Loaded, Error> {
    let (path, ram) = (config.kernel.as_deref().ok_or(Error::NoKernel)?, vm.ram());
    let kernel = kernel::load_with(ram, path, cache).map_err(boot::Error::from)?;
    let told = |command| if waits { command::WAIT.to_vec() } else { command::told(command, Session::window()) };
    let make = |command| initramfs(config, command, &told(command), path, ram, &kernel);
    let command = config.command.as_ref().map(make).transpose()?;
    let (entry, acpi, initrd) = load_parameters(config, ram, &kernel, command.as_ref())?;
    let vcpus = (0..config.cpus).map(|index| vm.create_vcpu(index, config.cpus)).collect::<Result<Vec<_>, _>>()?;
    if let Some(template) = &config.cpu_template {
        vcpus.iter().try_for_each(|vcpu| vcpu.modify_msrs(&template.msr_modifiers))?;
    }
    vcpus[0].set_entry(entry)?;
    // Linux does not start in x2APIC mode without ACPI, which alone tells it of IDs that need the mode.
    if acpi && needs_x2apic(config.cpus) {
        vcpus.iter().try_for_each(Vcpu::enter_x2apic)?;
    }
    let modules = command.map(|command| (command.has_modules, command.module_files));
    let (has_modules, module_files) = modules.unwrap_or_default();
    Ok(Loaded { vcpus, initrd, has_modules, module_files })
}

/// Creates the vCPUs of a machine that was saved, and puts all that is in KVM where it was.
fn restore(vm: &Vm, snapshot: &Snapshot) -> Result<Vec<Vcpu>, Error> {
    let state = &snapshot.state;
    state.cpu.check_on(&vm.cpu()).map_err(snapshot::Error::from)?;
    let create = |(index, state)| vm.create_saved_vcpu(index, state);
    let vcpus = (0..).zip(&state.vcpus).map(create).collect::<Result<Vec<_>, _>>()?;
    let (elapsed, extent) = (state.vm.elapsed(), vm.extent(std::iter::empty())?);
    vcpus.iter().zip(&state.vcpus).try_for_each(|(vcpu, state)| vcpu.restore(state, elapsed, &extent))?;
    // After the local APICs, which what the interrupt controllers have pending goes to.
    vm.restore(&state.vm, elapsed)?;
    Ok(vcpus)
}

/// How many virtio devices the machine has. The guest finds disks, then network cards, shares, vsock, rng, balloon. A root that
/// is a folder comes first of the shares, an overlay last of the disks.
fn count_devices(config: &Config) -> usize {
    let vsock = config.vsock.is_some() || config.command.is_some();
    let disks = config.all_disks().count() + usize::from(config.overlay.is_some());
    let shares = config.shares.len() + usize::from(config.root_folder().is_some());
    disks
        + config.nets.len()
        + shares
        + usize::from(vsock)
        + usize::from(config.rng)
        + usize::from(config.balloon.is_some())
}

/// The network cards on descriptors, each at its place, and those whose network takes a while to start.
fn first_nets(config: &Config) -> Result<Vec<Option<net::Net>>, net::Error> {
    config.nets.iter().try_for_each(net::Spec::validate)?;
    let open = |spec: &net::Spec| spec.fd.map(|_| spec.open()).transpose();
    let mut cards = config.nets.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    for (spec, card) in config.nets.iter().zip(&mut cards).filter(|(spec, _)| spec.user) {
        *card = Some(spec.open()?);
    }
    Ok(cards)
}

/// Linux uses its memory a block of many pages after the other. In the first there is little but what tells it of the machine.
fn prefer_huge_pages(ram: &GuestRam, ranges: &[Range<u64>]) {
    for range in ranges {
        memory::prefer_huge_pages(ram, range.start.max(HUGE_PAGE)..range.end);
    }
}

fn open_disks(config: &Config) -> Result<Vec<(String, blk::Blk, blk::Errors)>, blk::Error> {
    let open = |(i, spec): (usize, blk::Spec)| Ok((format!("blk{i}"), blk::Blk::open(&spec)?, spec.errors));
    config.all_disks().enumerate().map(open).collect()
}

/// Has the machine stand still when the host fails the disk, if it is to.
fn stopping((name, disk, errors): (String, blk::Blk, blk::Errors), inbox: &Sender) -> NamedDevice {
    let (inbox, device) = (inbox.clone(), name.clone());
    let disk = match errors {
        blk::Errors::Report => disk,
        blk::Errors::Stop => disk.stop_at_errors(move |why| inbox.send(Event::DiskFailed(device.clone(), why))),
    };
    (name, Box::new(disk))
}

/// Makes the file that keeps what a command changes, if it is not there, and opens it as the last disk.
fn open_overlay(config: &Config) -> Result<Option<NamedDevice>, Error> {
    let (Some(overlay), Some(root)) = (&config.overlay, &config.rootfs) else { return Ok(None) };
    let base = overlay.base.clone().map_or_else(|| overlay::identity(root), Ok)?;
    overlay::prepare(&overlay.path, overlay.size().get(), overlay.size.map(Size::get), &base)?;
    let disk = blk::Blk::open(&blk::Spec::new(&overlay.path))?;
    Ok(Some((format!("blk{}", config.all_disks().count()), Box::new(disk) as _)))
}

/// Opens the other network cards; and what the passts of all say.
fn open_nets(
    config: &Config,
    first: Vec<Option<net::Net>>,
) -> Result<(Vec<NamedDevice>, Vec<net::passt::Messages>), net::Error> {
    let mut passts = vec![];
    let open = |(i, (spec, card)): (usize, (&net::Spec, Option<net::Net>))| {
        let mut card = card.map_or_else(|| spec.open(), Ok)?;
        passts.extend(card.wait_until_ready()?);
        Ok::<_, net::Error>((format!("net{i}"), Box::new(card) as _))
    };
    let cards = config.nets.iter().zip(first).enumerate().map(open).collect::<Result<_, _>>()?;
    Ok((cards, passts))
}

/// The tag by which the guest mounts a share.
fn share_tag(index: usize) -> String {
    format!("share{index}")
}

/// The tag of the root file system that is a folder.
const ROOT_TAG: &str = "root";

fn open_shares(config: &Config, detach: bool) -> Result<Vec<NamedDevice>, fs::Error> {
    let root = config.root_folder().map(|path| (ROOT_TAG.to_owned(), path, false));
    let shares = config.shares.iter().enumerate();
    let shares = shares.map(|(index, share)| (share_tag(index), share.path.as_path(), share.readonly));
    let open = |(tag, path, readonly): (String, &Path, bool)| {
        let spec = fs::Spec { path: path.into(), tag: tag.clone(), readonly };
        let share = if detach { spec.open_detached()? } else { spec.open()? };
        Ok((tag, Box::new(share) as _))
    };
    root.into_iter().chain(shares).map(open).collect()
}

/// The socket device, which is also what a command's session goes through.
fn open_vsock(config: &Config, ends: Option<Ends>) -> Result<Option<NamedDevice>, vsock::Error> {
    let vsock = match (&config.vsock, ends) {
        (Some(spec), ends) => spec.open_with(ends.unwrap_or_default())?,
        (None, Some(ends)) => vsock::Vsock::with_ends(ends),
        (None, None) => return Ok(None),
    };
    Ok(Some(("vsock".into(), Box::new(vsock) as _)))
}

/// What the guest boots into to run the command.
fn initramfs(
    config: &Config,
    command: &command::Spec,
    told: &[u8],
    path: &Path,
    ram: &GuestRam,
    kernel: &Kernel,
) -> Result<Initramfs, command::Error> {
    let tags: Vec<_> = (0..config.shares.len()).map(share_tag).collect();
    let shares = tags.iter().zip(&config.shares);
    let shares: Vec<_> =
        shares.map(|(tag, share)| command::Share { tag, path: &share.guest, readonly: share.readonly }).collect();
    let devices = Devices {
        shares: &shares,
        root: match config.root_folder() {
            Some(_) => Some(Root::Folder(ROOT_TAG)),
            None => config.rootfs.as_deref().map(Root::Disk),
        },
        overlay: config.overlay.as_ref().map(|_| config.all_disks().count()),
        disks: config.all_disks().next().is_some(),
        nets: !config.nets.is_empty(),
        user_net: config.nets.iter().find_map(net::Spec::user_mac),
        rng: config.rng,
    };
    let version = kernel.version.clone().or_else(|| inspect::version(ram, kernel.range.clone()));
    Initramfs::make(command, devices, path, version.as_deref(), config.modules.as_deref(), told)
}

fn open_session(config: &Config, told: command::Told, streams: Option<Streams>) -> io::Result<Option<(Session, Ends)>> {
    let Some(command) = &config.command else { return Ok(None) };
    let streams = streams.map_or_else(Streams::inherit, Ok)?;
    Session::new(command, told, streams).map(Some)
}

fn open_balloon(config: &Config) -> Result<Option<(NamedDevice, Arc<balloon::Shared>)>, balloon::Error> {
    let Some(spec) = &config.balloon else { return Ok(None) };
    let balloon = balloon::Balloon::new(spec, config.memory)?;
    let shared = balloon.shared();
    Ok(Some((("balloon".into(), Box::new(balloon) as _), shared)))
}

fn rng(config: &Config) -> Result<Option<NamedDevice>, Error> {
    let rates = Rates { bytes: config.rng_bw, operations: config.rng_iops };
    let rng = config.rng.then(|| rng::Rng::limited(rates)).transpose().map_err(Error::Random)?;
    Ok(rng.map(|rng| ("rng".into(), Box::new(rng) as _)))
}

/// Loads the initrd, with what runs the command if there is one, writes the command line and the tables; how the boot vCPU
/// enters the kernel, whether that will use ACPI, and where an initrd is that was a file.
fn load_parameters(
    config: &Config,
    ram: &GuestRam,
    kernel: &Kernel,
    command: Option<&Initramfs>,
) -> Result<(Entry, bool, Range<u64>), Error> {
    let windows: Vec<_> = virtio_windows().take(count_devices(config)).collect();
    let (cmdline, acpi) = command_line(config, kernel, &windows).map_err(boot::Error::from)?;
    cmdline.write(ram).map_err(boot::Error::from)?;
    let more = command.map_or(&[][..], |command| &command.archive);
    let initrd = match (&config.initrd, more) {
        (None, []) => None,
        (path, more) => Some(initrd::load_with(ram, path.as_deref(), more, kernel).map_err(boot::Error::from)?),
    };
    // Each kernel finds the virtio devices in one place only: without ACPI, on its command line.
    let virtio = if acpi { &windows[..] } else { &[] };
    let platform = Platform { cpus: config.cpus, virtio, com1: true, pvpanic: true, keyboard: config.keyboard };
    mptable::write(ram, &platform)?;
    let info = BootInfo { initrd: initrd.clone(), rsdp: Some(acpi::write(ram, &platform)?) };
    match kernel.entry {
        Entry::Pvh { .. } => pvh::write(ram, &info)?,
        Entry::Linux64 { .. } => boot_params::write(ram, kernel.setup_header, &info)?,
    }
    kernel.entry.write_tables(ram)?;
    // What is only for a command is in no file.
    let mapped = initrd.filter(|_| config.initrd.is_some()).unwrap_or_default();
    Ok((kernel.entry, acpi, mapped))
}

/// Tells Linux of a virtio device (Documentation/admin-guide/kernel-parameters.txt).
const DEVICE: &str = "virtio_mmio.device=";

fn push_devices(cmdline: &mut Cmdline, windows: &[VirtioWindow]) -> Result<(), cmdline::Error> {
    windows.iter().try_for_each(|VirtioWindow { base, gsi }| {
        cmdline.push(&format!("{DEVICE}{:#x}@{base:#x}:{gsi}", layout::VIRTIO_MMIO_SIZE)).map(drop)
    })
}

/// The kernel's command line, and whether the kernel will use ACPI.
fn command_line(config: &Config, kernel: &Kernel, windows: &[VirtioWindow]) -> Result<(Cmdline, bool), cmdline::Error> {
    let mut user = Cmdline::default();
    user.push(&config.cmdline)?;
    let acpi = kernel.acpi && !user.acpi_off();
    let mut cmdline = Cmdline::default();
    if config.cmdline_only {
        // Who names devices has named all.
        if !acpi && !config.cmdline.contains(DEVICE) {
            push_devices(&mut cmdline, windows)?;
        }
        if config.command.is_some() {
            cmdline.push(command::PARAMETER)?;
        }
        cmdline.push(&config.cmdline)?;
        return Ok((cmdline, acpi));
    }
    cmdline.push(cmdline::DEFAULT)?;
    if config.command.is_some() {
        cmdline.push(command::PARAMETER)?;
        // Each byte on the console takes time, and only the last lines are shown, when something goes wrong.
        if config.serial == console::Spec::None {
            cmdline.push("quiet")?;
        }
    } else if let Some(root) = config.all_disks().next().filter(|_| config.has_root_disk()) {
        cmdline.push(if root.readonly { "root=/dev/vda ro" } else { "root=/dev/vda rw" })?;
    }
    if !acpi {
        push_devices(&mut cmdline, windows)?;
    }
    // Last, because the user's word counts more, and `--` in it ends the kernel's part.
    cmdline.push(&config.cmdline)?;
    Ok((cmdline, acpi))
}

//! What machine to build: one struct that the command line, a file and an embedding program all fill in.

mod de;
pub mod file;
pub mod firecracker;
pub mod json;
pub mod kv;
mod later;
mod name;
pub mod nearest;
mod overlay;
mod quota;
mod share;
pub mod toml;
pub mod tree;

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use crate::duration;
pub use crate::limit::{BadLimit, Directions, Limit};
pub use crate::size::{BadSize, Size};
pub use name::{BadName, Name};
pub use overlay::Overlay;
pub use quota::{BadQuota, Quota};
pub use share::{BadShare, Share};

use crate::arch::x86_64::template::Template;
use crate::command::{self, BadSpec};
use crate::devices::console;
use crate::memory::HUGE_PAGE;
use crate::virtio::{balloon, blk, net, vsock};

/// The least guest memory that a Linux kernel boots in.
pub const MIN_MEMORY: Size = Size::mib(8);

/// Guest memory comes in pages of 4 KiB.
const PAGE: u64 = 4096;

/// Why a [`Config`] makes no machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No vCPU was asked for.
    #[error("cannot build a machine with 0 cpus: it needs at least 1")]
    NoCpus,
    /// Less memory than any kernel boots in.
    #[error(
        "cannot build a machine with {asked} of memory: no kernel boots in less than {}{}", MIN_MEMORY,
        if .asked.get() < 1 << 20 { " (without a unit it is in bytes)" } else { "" }
    )]
    LittleMemory {
        /// What was asked for.
        asked: Size,
    },
    /// More memory than the host has.
    #[error("cannot build a machine with {asked} of memory: the host has {} MiB", .host.get() >> 20)]
    MuchMemory {
        /// What was asked for.
        asked: Size,
        /// The host's physical memory.
        host: Size,
    },
    /// Memory that ends within a page.
    #[error("cannot build a machine with {asked} of memory: it is not a multiple of {PAGE} bytes")]
    PartOfPage {
        /// What was asked for.
        asked: Size,
    },
    /// Memory that ends within a huge page.
    #[error("cannot have {asked} of memory in huge pages: it is not a multiple of {} MiB", HUGE_PAGE >> 20)]
    PartOfHugePage {
        /// What was asked for.
        asked: Size,
    },
    /// Memory that is never given back, and a device for giving it back.
    #[error("cannot have a balloon with memory in huge pages: it gives back pages of {PAGE} bytes")]
    HugeBalloon,
    /// A balloon that cannot be.
    #[error(transparent)]
    Balloon(#[from] balloon::Error),
    /// A command that cannot be run.
    #[error(transparent)]
    Command(#[from] BadSpec),
    /// A command with nowhere to run.
    #[error("cannot run a command without a root file system: name a disk image, or an --initrd that has one")]
    NoRoot,
    /// Changes that are to be kept and to be written to the root itself.
    #[error(
        "cannot keep changes in a file and write them to the root file system: --overlay and --rw exclude each other"
    )]
    OverlayAndWritable,
    /// Changes of no command, or to no disk.
    #[error("cannot keep changes in {}: that takes a root file system and a command (bantam run ROOTFS -- COMMAND)", .0.display())]
    OverlayOfNothing(PathBuf),
    /// A size that no overlay can have.
    #[error(
        "cannot keep changes in {} with {size}: it takes at least {}, and a multiple of {PAGE} bytes", .path.display(),
        Overlay::MIN
    )]
    OverlaySize {
        /// The file.
        path: PathBuf,
        /// The size asked for.
        size: Size,
    },
    /// A command and a console that want the same standard input and output.
    #[error("cannot have the serial console on standard input and output: they are the command's (--console FILE)")]
    ConsoleInTheWay,
    /// Two network cards on one tap.
    #[error("cannot put two network cards on the tap `{0}`: it is given twice")]
    SameTap(String),
    /// Two network cards on one descriptor.
    #[error("cannot put two network cards on the descriptor fd={0}: it is given twice")]
    SameDescriptor(RawFd),
    /// Two network cards with the same addresses.
    #[error("cannot have two network cards in user networks: they would have the same addresses")]
    TwoUserNetworks,
}

/// A machine to be built. Paths are the host's.
///
/// ```
/// use bantam::config::{Config, Size};
/// let config = Config::new().kernel("vmlinux").cpus(2).memory(Size::mib(512));
/// config.validate()?;
/// # Ok::<(), bantam::config::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Config {
    /// The kernel: an ELF vmlinux or a bzImage.
    pub kernel: Option<PathBuf>,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// What is added to the default kernel command line.
    pub cmdline: String,
    /// Whether `cmdline` replaces the default instead.
    pub cmdline_only: bool,
    /// The number of vCPUs.
    pub cpus: u32,
    /// The guest's memory.
    pub memory: Size,
    /// Whether it is in huge pages that the host has reserved (hugetlbfs), of 2 MiB.
    pub hugepages: bool,
    /// The root file system: a raw image or a block device, which comes before the other disks; with a command that
    /// writes to it (`rw`) also a folder.
    pub rootfs: Option<PathBuf>,
    /// What keeps the changes that a command makes to it. It comes after the other disks.
    pub overlay: Option<Overlay>,
    /// The other disks.
    pub disks: Vec<blk::Spec>,
    /// The network cards.
    pub nets: Vec<net::Spec>,
    /// The folders that the guest sees.
    pub shares: Vec<Share>,
    /// The socket device.
    pub vsock: Option<vsock::Spec>,
    /// Whether there is a virtio-rng device.
    pub rng: bool,
    /// How many random bytes it gives.
    pub rng_bw: Option<Limit>,
    /// How many requests for them it does.
    pub rng_iops: Option<Limit>,
    /// The balloon, by which the guest gives memory back.
    pub balloon: Option<balloon::Spec>,
    /// Whether there is a keyboard, for [`Handle::ctrl_alt_del`](crate::machine::Handle::ctrl_alt_del) alone. Linux takes
    /// longer to start with one.
    pub keyboard: bool,
    /// The command to run in the guest; without one the guest's own init runs.
    pub command: Option<command::Spec>,
    /// Where the modules of the kernel are for that, if not beside the kernel or with the host's own.
    pub modules: Option<PathBuf>,
    /// What the guest's CPU has otherwise than KVM would give it, in the format of Firecracker's custom CPU templates.
    pub cpu_template: Option<Template>,
    /// The CPU time of vCPUs and devices together.
    pub cpu_quota: Option<Quota>,
    /// Where the serial console is.
    pub serial: console::Spec,
    /// How many bytes the guest may write to it; what is more is dropped.
    pub serial_bw: Option<Limit>,
    /// How long the guest may take to reach user space.
    #[serde(with = "duration")]
    #[cfg_attr(test, schemars(with = "Option<String>"))]
    pub boot_timeout: Option<Duration>,
    /// How long the guest may run.
    #[serde(with = "duration")]
    #[cfg_attr(test, schemars(with = "Option<String>"))]
    pub timeout: Option<Duration>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            kernel: None,
            initrd: None,
            cmdline: String::new(),
            cmdline_only: false,
            cpus: 1,
            memory: Size::mib(256),
            hugepages: false,
            rootfs: None,
            overlay: None,
            disks: vec![],
            nets: vec![],
            shares: vec![],
            vsock: None,
            rng: true,
            rng_bw: None,
            rng_iops: None,
            balloon: None,
            keyboard: false,
            command: None,
            modules: None,
            cpu_template: None,
            cpu_quota: None,
            serial: console::Spec::default(),
            serial_bw: None,
            boot_timeout: None,
            timeout: None,
        }
    }
}

impl Config {
    /// A machine with one vCPU, 256 MiB of memory, a console on standard input and output, and no kernel yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the kernel's path.
    pub fn kernel(mut self, path: impl Into<PathBuf>) -> Self {
        self.kernel = Some(path.into());
        self
    }

    /// Sets the initial RAM disk's path.
    pub fn initrd(mut self, path: impl Into<PathBuf>) -> Self {
        self.initrd = Some(path.into());
        self
    }

    /// Sets what is added to the default kernel command line.
    pub fn cmdline(mut self, text: impl Into<String>) -> Self {
        self.cmdline = text.into();
        self
    }

    /// Makes [`cmdline`](Self::cmdline) the whole kernel command line.
    pub fn cmdline_only(mut self, only: bool) -> Self {
        self.cmdline_only = only;
        self
    }

    /// Sets the number of vCPUs.
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Sets the size of the guest's memory.
    pub fn memory(mut self, memory: Size) -> Self {
        self.memory = memory;
        self
    }

    /// Sets whether the guest's memory is in huge pages of the host.
    pub fn hugepages(mut self, hugepages: bool) -> Self {
        self.hugepages = hugepages;
        self
    }

    /// Sets the disk with the root file system.
    pub fn rootfs(mut self, path: impl Into<PathBuf>) -> Self {
        self.rootfs = Some(path.into());
        self
    }

    /// Keeps the changes that the command makes.
    pub fn overlay(mut self, overlay: Overlay) -> Self {
        self.overlay = Some(overlay);
        self
    }

    /// The root file system if it is a folder that the command writes to.
    pub fn root_folder(&self) -> Option<&Path> {
        let writable = self.command.as_ref().is_some_and(|command| command.rw);
        self.rootfs.as_deref().filter(|root| writable && root.is_dir())
    }

    /// The disks but for the overlay, in the order of /dev/vda, vdb, ... A command's root is only read, unless it says
    /// otherwise.
    pub fn all_disks(&self) -> impl Iterator<Item = blk::Spec> {
        let readonly = self.command.as_ref().is_some_and(|command| !command.rw);
        let root = self
            .rootfs
            .iter()
            .filter(|_| self.root_folder().is_none())
            .map(move |path| blk::Spec { readonly, ..blk::Spec::new(path) });
        root.chain(self.disks.iter().cloned())
    }

    /// Whether the first disk is the kernel's root: it is said to be, or there is nothing else that could be.
    pub fn has_root_disk(&self) -> bool {
        self.rootfs.is_some() || (self.initrd.is_none() && !self.disks.is_empty())
    }

    /// Adds a disk, after those that are there.
    pub fn disk(mut self, disk: blk::Spec) -> Self {
        self.disks.push(disk);
        self
    }

    /// Adds a network card, after those that are there.
    pub fn net(mut self, net: net::Spec) -> Self {
        self.nets.push(net);
        self
    }

    /// Adds a shared folder, after those that are there.
    pub fn share(mut self, share: Share) -> Self {
        self.shares.push(share);
        self
    }

    /// Sets the socket device.
    pub fn vsock(mut self, vsock: vsock::Spec) -> Self {
        self.vsock = Some(vsock);
        self
    }

    /// Sets whether there is a virtio-rng device.
    pub fn rng(mut self, rng: bool) -> Self {
        self.rng = rng;
        self
    }

    /// Adds a balloon.
    pub fn balloon(mut self, balloon: balloon::Spec) -> Self {
        self.balloon = Some(balloon);
        self
    }

    /// Sets whether there is a keyboard.
    pub fn keyboard(mut self, keyboard: bool) -> Self {
        self.keyboard = keyboard;
        self
    }

    /// Sets the command to run in the guest. Its streams are this process' own or those of
    /// [`Builder::streams`](crate::machine::Builder::streams), and the serial console is not on them.
    pub fn command(mut self, command: command::Spec) -> Self {
        self.command = Some(command);
        if self.serial == console::Spec::Stdio {
            self.serial = console::Spec::None;
        }
        self
    }

    /// Sets where the kernel's modules are.
    pub fn modules(mut self, folder: impl Into<PathBuf>) -> Self {
        self.modules = Some(folder.into());
        self
    }

    /// Changes the guest's CPU.
    pub fn cpu_template(mut self, template: Template) -> Self {
        self.cpu_template = Some(template);
        self
    }

    /// Limits the CPU time.
    pub fn cpu_quota(mut self, quota: Quota) -> Self {
        self.cpu_quota = Some(quota);
        self
    }

    /// Sets where the serial console is.
    pub fn serial(mut self, serial: console::Spec) -> Self {
        self.serial = serial;
        self
    }

    /// Limits the time until user space.
    pub fn boot_timeout(mut self, limit: Duration) -> Self {
        self.boot_timeout = Some(limit);
        self
    }

    /// Limits the time the guest may run.
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.timeout = Some(limit);
        self
    }

    /// Checks the figures that can be judged without opening anything.
    pub fn validate(&self) -> Result<(), Error> {
        /// Every host has more than this, and is not asked.
        const SMALL: Size = Size::mib(512);
        if self.memory <= SMALL {
            return self.validate_on(SMALL);
        }
        let info = rustix::system::sysinfo();
        self.validate_on(Size::bytes(info.totalram.saturating_mul(info.mem_unit.into())))
    }

    fn validate_on(&self, host: Size) -> Result<(), Error> {
        let asked = self.memory;
        if self.cpus == 0 {
            Err(Error::NoCpus)
        } else if asked < MIN_MEMORY {
            Err(Error::LittleMemory { asked })
        } else if asked > host {
            Err(Error::MuchMemory { asked, host })
        } else if !asked.get().is_multiple_of(PAGE) {
            Err(Error::PartOfPage { asked })
        } else if self.hugepages && !asked.get().is_multiple_of(HUGE_PAGE) {
            Err(Error::PartOfHugePage { asked })
        } else if self.hugepages && self.balloon.is_some() {
            Err(Error::HugeBalloon)
        } else if let Some(tap) = given_twice(self.nets.iter().filter_map(|net| net.tap.as_deref())) {
            Err(Error::SameTap(tap.to_owned()))
        } else if let Some(fd) = given_twice(self.nets.iter().filter_map(|net| net.fd)) {
            Err(Error::SameDescriptor(fd))
        } else if self.nets.iter().filter(|net| net.user).count() > 1 {
            Err(Error::TwoUserNetworks)
        } else {
            self.balloon.as_ref().map_or(Ok(()), |balloon| balloon.validate(self.memory))?;
            self.overlay.as_ref().map_or(Ok(()), |overlay| self.validate_overlay(overlay))?;
            self.command.as_ref().map_or(Ok(()), |command| self.validate_command(command))
        }
    }

    fn validate_overlay(&self, overlay: &Overlay) -> Result<(), Error> {
        let (path, size) = (overlay.path.clone(), overlay.size());
        match &self.command {
            Some(command) if command.rw => Err(Error::OverlayAndWritable),
            Some(_) if self.rootfs.is_some() => match size < Overlay::MIN || !size.get().is_multiple_of(PAGE) {
                true => Err(Error::OverlaySize { path, size }),
                false => Ok(()),
            },
            _ => Err(Error::OverlayOfNothing(path)),
        }
    }

    fn validate_command(&self, command: &command::Spec) -> Result<(), Error> {
        command.validate()?;
        if self.rootfs.is_none() && self.initrd.is_none() {
            Err(Error::NoRoot)
        } else if self.serial == console::Spec::Stdio {
            Err(Error::ConsoleInTheWay)
        } else {
            Ok(())
        }
    }
}

fn given_twice<T: Ord + Copy>(all: impl Iterator<Item = T>) -> Option<T> {
    let mut all: Vec<T> = all.collect();
    all.sort_unstable();
    all.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_that_make_no_machine_are_refused() {
        let host = Size::gib(2);
        let refused = |config: Config| config.validate_on(host).unwrap_err().to_string();
        assert!(refused(Config::new().cpus(0)).contains("0 cpus"));
        assert!(
            refused(Config::new().memory(Size::mib(1))).contains("with 1M of memory: no kernel boots in less than 8M")
        );
        assert!(refused(Config::new().memory(Size::bytes(512))).contains("without a unit it is in bytes"));
        assert!(refused(Config::new().memory(Size::gib(4))).contains("with 4G of memory: the host has 2048 MiB"));
        assert_eq!(Config::new().memory(host).validate_on(host), Ok(()));
        assert!(refused(Config::new().memory(Size::bytes((64 << 20) + 1))).contains("not a multiple of 4096 bytes"));
        let huge = |memory| Config::new().hugepages(true).memory(memory);
        assert!(refused(huge(Size::mib(129))).contains("129M of memory in huge pages: it is not a multiple of 2 MiB"));
        assert!(
            refused(huge(Size::mib(128)).balloon(Default::default())).contains("a balloon with memory in huge pages")
        );
        assert_eq!(huge(Size::mib(128)).validate_on(host), Ok(()));
        let card = |tap: Option<&str>, fd| net::Spec { tap: tap.map(Into::into), fd, ..Default::default() };
        let cards = |one: net::Spec, other: net::Spec| Config::new().net(one).net(other);
        assert!(refused(cards(card(Some("t"), None), card(Some("t"), None))).contains("tap `t`"));
        assert!(refused(cards(card(None, Some(5)), card(None, Some(5)))).contains("fd=5"));
        assert_eq!(cards(card(None, Some(5)), card(None, Some(6))).validate_on(host), Ok(()));
        let user = net::Spec { user: true, ..Default::default() };
        assert!(refused(cards(user.clone(), user)).contains("the same addresses"));
    }

    #[test]
    fn a_command_needs_a_root_and_standard_input() {
        let host = Size::gib(2);
        let config = Config::new().command(command::Spec::new(["true"]));
        assert_eq!(config.validate_on(host), Err(Error::NoRoot));
        let config = config.rootfs("disk");
        assert_eq!(config.validate_on(host), Ok(()));
        assert!(config.all_disks().all(|disk| disk.readonly));
        assert_eq!(config.clone().serial(console::Spec::Stdio).validate_on(host), Err(Error::ConsoleInTheWay));
        let writable = config.command(command::Spec { rw: true, ..command::Spec::new(["true"]) });
        assert!(!writable.all_disks().any(|disk| disk.readonly));
        let file = || Overlay::new("changes");
        assert_eq!(writable.clone().overlay(file()).validate_on(host), Err(Error::OverlayAndWritable));
        let kept = writable.clone().command(command::Spec::new(["true"])).overlay(file());
        assert_eq!(kept.validate_on(host), Ok(()));
        for size in [Size::mib(63), Size::bytes((64 << 20) + 1)] {
            let small = kept.clone().overlay(Overlay { size: Some(size), ..file() });
            assert!(matches!(small.validate_on(host), Err(Error::OverlaySize { .. })));
        }
        let without = Config { rootfs: None, initrd: Some("initrd".into()), ..kept };
        assert!(matches!(without.validate_on(host), Err(Error::OverlayOfNothing(_))));
        assert!(matches!(
            Config::new().rootfs("disk").overlay(file()).validate_on(host),
            Err(Error::OverlayOfNothing(_))
        ));
        let empty = writable.command(command::Spec::default());
        assert_eq!(empty.validate_on(host), Err(Error::Command(BadSpec::Empty)));
    }

    #[test]
    fn json_round_trips_and_leaves_out_what_it_likes() {
        let config = Config::new().kernel("k").timeout(Duration::from_millis(1500)).serial(console::Spec::None);
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<Config>(&json).unwrap(), config);
        assert_eq!(serde_json::from_str::<Config>("{}").unwrap(), Config::new());
    }

    #[test]
    fn json_with_an_unknown_key_is_refused() {
        let error = serde_json::from_str::<Config>(r#"{"mem": "1G"}"#).unwrap_err().to_string();
        assert!(error.contains("unknown field `mem`"), "{error}");
    }
}

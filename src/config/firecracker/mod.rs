//! Firecracker's view of a machine: what its API and its configuration file say, and the [`Config`] that this makes.
//!
//! The names and rules are those of its OpenAPI document, version 1.17.

pub mod cpu;
pub mod devices;
pub mod host;
pub mod limiter;
pub mod machine;

use serde_json::{Map, Value as Json, json};

pub use devices::{Drive, NetworkInterface, Serial};
pub use host::{Balloon, Logger, Metrics};
pub use limiter::Limiter;
pub use machine::{BootSource, Machine};

use super::file::{Document, Run};
use super::tree::{Error, Node, Table, Value};
use super::{Config, Size};
use crate::arch::x86_64::template::Template;
use crate::virtio::vsock;

/// What Firecracker's file may have.
const FILE: &[&str] = &[
    "balloon",
    "boot-source",
    "cpu-config",
    "drives",
    "entropy",
    "logger",
    "machine-config",
    "memory-hotplug",
    "metrics",
    "mmds-config",
    "network-interfaces",
    "pmem",
    "serial",
    "vsock",
];

/// What tells such a file from others: keys that are Firecracker's alone.
const ITS_OWN: &[&str] =
    &["boot-source", "machine-config", "drives", "network-interfaces", "mmds-config", "cpu-config"];

/// What Linux is told by those who do not say otherwise.
const BOOT_ARGS: &str =
    "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce";

/// A machine as Firecracker's clients describe it, piece by piece.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Settings {
    /// What is booted.
    pub boot_source: Option<BootSource>,
    /// The vCPUs and the memory.
    pub machine: Machine,
    /// What the guest's CPU has otherwise.
    pub cpu_config: Option<Template>,
    /// The disks, in the order in which they were told.
    pub drives: Vec<Drive>,
    /// The network cards, in the order in which they were told.
    pub interfaces: Vec<NetworkInterface>,
    /// The socket device.
    pub vsock: Option<vsock::Spec>,
    /// The random number device, with its limits.
    pub entropy: Option<Option<Limiter>>,
    /// The balloon.
    pub balloon: Option<Balloon>,
    /// The serial console.
    pub serial: Option<Serial>,
    /// What is logged.
    pub logger: Option<Logger>,
    /// Where metrics are written.
    pub metrics: Option<Metrics>,
}

/// Whether a file is Firecracker's.
pub fn is_file(node: &Node) -> bool {
    ITS_OWN.iter().any(|key| node.has(key))
}

/// Reads Firecracker's configuration file.
///
/// # Errors
/// Where it is wrong, or asks for what bantam has not.
pub fn document(node: &Node) -> Result<Document, Error> {
    let settings = Settings::read(node)?;
    let logger = settings.logger.clone().unwrap_or_default();
    let verbose = logger.level.map_or(0, |level| (level as u8).saturating_sub(log::LevelFilter::Warn as u8));
    let metrics = settings.metrics.clone().map(|metrics| metrics.metrics_path.into());
    let run = Run { log_file: logger.log_path.map(Into::into), verbose, metrics, ..Run::default() };
    if settings.boot_source.is_none() {
        return Err(Error::new(node.at, "the key `boot-source` is missing"));
    }
    Ok(Document { config: settings.config(), run, says_serial: true })
}

impl Settings {
    /// Reads Firecracker's configuration file.
    ///
    /// # Errors
    /// Where it is wrong, or asks for what bantam has not.
    pub fn read(node: &Node) -> Result<Self, Error> {
        let table = node.table(FILE)?;
        for (key, why) in REFUSED {
            if table.get(key).is_some_and(|node| node.value != Value::List(vec![])) {
                return Err(table.wrong(key, why));
            }
        }
        let mut settings = Self {
            boot_source: table.read("boot-source", BootSource::read)?,
            cpu_config: table.read("cpu-config", cpu::read_in_file)?.flatten(),
            machine: table.read("machine-config", Machine::read)?.unwrap_or_default(),
            vsock: table.read("vsock", devices::read_vsock)?,
            entropy: table.read("entropy", devices::read_entropy)?,
            balloon: table.read("balloon", Balloon::read)?,
            serial: table.read("serial", Serial::read)?,
            logger: table.read("logger", Logger::read)?,
            metrics: table.read("metrics", Metrics::read)?,
            ..Self::default()
        };
        for_each(&table, "drives", |node| settings.put_drive(Drive::read(node)?, node.at))?;
        for_each(&table, "network-interfaces", |node| settings.put_interface(NetworkInterface::read(node)?, node.at))?;
        settings.check_balloon(settings.machine.mem_size_mib).map_err(|what| Error::new(node.at, what))?;
        Ok(settings)
    }

    /// The view of a machine that was described otherwise: disks by their serial numbers, `eth0`, `eth1`, ...
    pub fn of(config: &Config) -> Self {
        let boot_source = config.kernel.as_ref().map(|kernel| BootSource {
            kernel_image_path: kernel.to_string_lossy().into_owned(),
            initrd_path: config.initrd.as_ref().map(|path| path.to_string_lossy().into_owned()),
            boot_args: Some(config.cmdline.clone()),
        });
        Self {
            boot_source,
            machine: Machine::of(config.cpus, config.memory, config.hugepages),
            cpu_config: config.cpu_template.clone(),
            drives: config.all_disks().enumerate().map(|(index, disk)| Drive::of(index, &disk)).collect(),
            interfaces: config.nets.iter().enumerate().map(|(index, net)| NetworkInterface::of(index, net)).collect(),
            vsock: config.vsock.clone(),
            entropy: config.rng.then(|| Limiter::of(config.rng_bw, config.rng_iops)),
            balloon: config.balloon.as_ref().map(Balloon::of),
            ..Self::default()
        }
    }

    /// Adds a disk, or puts it in the place of the one of its name.
    ///
    /// # Errors
    /// When there is another root already.
    pub fn put_drive(&mut self, drive: Drive, at: usize) -> Result<(), Error> {
        let is_other = |other: &&Drive| other.drive_id != drive.drive_id;
        if drive.is_root_device && self.drives.iter().filter(is_other).any(|other| other.is_root_device) {
            return Err(Error::new(at, "A root block device already exists!"));
        }
        match self.drives.iter_mut().find(|other| other.drive_id == drive.drive_id) {
            Some(other) => *other = drive,
            None => self.drives.push(drive),
        }
        Ok(())
    }

    /// Adds a network card, or puts it in the place of the one of its name.
    ///
    /// # Errors
    /// When another has its tap or its address.
    pub fn put_interface(&mut self, card: NetworkInterface, at: usize) -> Result<(), Error> {
        let mut others = self.interfaces.iter().filter(|other| other.iface_id != card.iface_id);
        if card.guest_mac.is_some() && others.clone().any(|other| other.guest_mac == card.guest_mac) {
            return Err(Error::new(at, "The MAC address is already in use by another network interface."));
        }
        if others.any(|other| other.host_dev_name == card.host_dev_name) {
            return Err(Error::new(at, format!("The tap {} has a network interface already.", card.host_dev_name)));
        }
        match self.interfaces.iter_mut().find(|other| other.iface_id == card.iface_id) {
            Some(other) => *other = card,
            None => self.interfaces.push(card),
        }
        Ok(())
    }

    /// Whether the balloon fits into so much memory.
    ///
    /// # Errors
    /// Says that it does not.
    pub fn check_balloon(&self, mem_size_mib: u64) -> Result<(), &'static str> {
        match &self.balloon {
            Some(balloon) if u64::from(balloon.amount_mib) > mem_size_mib => {
                Err("The memory size (MiB) is smaller than the previously set balloon device target size.")
            }
            _ => Ok(()),
        }
    }

    /// The disks in the order in which the guest has them: its root first.
    pub fn drives_in_order(&self) -> impl Iterator<Item = &Drive> {
        let (roots, others): (Vec<_>, Vec<_>) = self.drives.iter().partition(|drive| drive.is_root_device);
        roots.into_iter().chain(others)
    }

    /// The machine that is to be built.
    pub fn config(&self) -> Config {
        let boot = self.boot_source.as_ref();
        let arguments = boot.and_then(|boot| boot.boot_args.as_deref()).unwrap_or(BOOT_ARGS).trim();
        let root = self.drives.iter().find(|drive| drive.is_root_device).map(Drive::root_parameter);
        let random = self.entropy.iter().flatten().map(Limiter::rates).next().unwrap_or_default();
        let serial = self.serial.clone().unwrap_or_default();
        Config {
            kernel: boot.map(|boot| boot.kernel_image_path.clone().into()),
            initrd: boot.and_then(|boot| boot.initrd_path.clone()).map(Into::into),
            cmdline: [Some(arguments), root.as_deref()].into_iter().flatten().collect::<Vec<_>>().join(" "),
            cmdline_only: true,
            cpus: self.machine.vcpu_count,
            memory: Size::mib(self.machine.mem_size_mib),
            hugepages: self.machine.hugepages(),
            cpu_template: self.cpu_config.clone(),
            disks: self.drives_in_order().map(Drive::spec).collect(),
            nets: self.interfaces.iter().map(NetworkInterface::spec).collect(),
            vsock: self.vsock.clone(),
            rng: self.entropy.is_some(),
            rng_bw: random.bytes,
            rng_iops: random.operations,
            balloon: self.balloon.as_ref().map(Balloon::spec),
            keyboard: true,
            serial: serial.spec(),
            serial_bw: serial.rate_limiter.and_then(|bucket| bucket.limit()),
            ..Config::default()
        }
    }

    /// All of it, as the file has it.
    pub fn to_json(&self) -> Json {
        let mut all = Map::new();
        let mut put = |key: &str, value: Option<Json>| value.map(|value| all.insert(key.to_owned(), value));
        put("balloon", self.balloon.as_ref().map(Balloon::to_json));
        put("boot-source", self.boot_source.as_ref().map(BootSource::to_json));
        put("cpu-config", self.cpu_config.as_ref().and_then(|template| serde_json::to_value(template).ok()));
        put("drives", Some(self.drives_in_order().map(Drive::to_json).collect()));
        put("machine-config", Some(self.machine.to_json()));
        put("network-interfaces", Some(self.interfaces.iter().map(NetworkInterface::to_json).collect()));
        put("vsock", self.vsock.as_ref().map(devices::vsock_to_json));
        put(
            "entropy",
            self.entropy.as_ref().map(|limiter| match limiter {
                Some(limiter) => json!({"rate_limiter": limiter.to_json()}),
                None => json!({}),
            }),
        );
        Json::Object(all)
    }
}

/// What bantam has not, and why.
const REFUSED: [(&str, &str); 3] = [("mmds-config", NO_MMDS), ("pmem", NO_PMEM), ("memory-hotplug", NO_HOTPLUG)];
/// Why there is no metadata service.
pub const NO_MMDS: &str = "bantam has no metadata service (MMDS): tell the guest by a disk, vsock or its command line";
/// Why there is no pmem device.
pub const NO_PMEM: &str = "bantam has no pmem devices: use a drive that is only read";
/// Why there is no memory to be plugged in.
pub const NO_HOTPLUG: &str =
    "bantam has no hotpluggable memory: give the machine all of it, and take some back by a balloon";

fn for_each(table: &Table<'_>, key: &str, mut each: impl FnMut(&Node) -> Result<(), Error>) -> Result<(), Error> {
    let mut items = table.list(key)?.iter().enumerate();
    let within = |(index, node): (usize, &Node)| {
        each(node).map_err(|error| error.within(&format!("[{index}]"), node.at).within(key, node.at))
    };
    items.try_for_each(within)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::json;

    const FILE: &str = r#"{
        "boot-source": {"kernel_image_path": "vmlinux", "boot_args": "console=ttyS0 panic=1", "initrd_path": null},
        "drives": [
            {"drive_id": "data", "is_root_device": false, "path_on_host": "b.img", "is_read_only": false},
            {"drive_id": "rootfs", "partuuid": null, "is_root_device": true, "cache_type": "Writeback", "is_read_only": true,
             "path_on_host": "a.img", "io_engine": "Async", "rate_limiter": {"ops": {"size": 100, "refill_time": 1000}},
             "socket": null}
        ],
        "machine-config": {"vcpu_count": 2, "mem_size_mib": 1024, "smt": false, "track_dirty_pages": false,
                           "huge_pages": "None"},
        "cpu-config": {"kvm_capabilities": ["!121"], "vcpu_features": []}, "balloon": null, "pmem": [],
        "network-interfaces": [{"iface_id": "up", "guest_mac": "06:00:AC:10:00:02", "host_dev_name": "tap0",
                                "rx_rate_limiter": {"ops": {"size": 7, "refill_time": 50}}}],
        "vsock": {"guest_cid": 3, "uds_path": "./v.sock"},
        "logger": {"log_path": "vm.log", "level": "Debug"},
        "metrics": {"metrics_path": "m"}, "mmds-config": null, "entropy": {"rate_limiter": {"bandwidth": {"size": 5, "refill_time": 1000}}},
        "serial": {"rate_limiter": {"size": 9, "one_time_burst": 8, "refill_time": 100}}
    }"#;

    fn read(text: &str) -> Result<Document, String> {
        document(&json::parse(text).unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn its_file_is_a_machine() {
        let node = json::parse(FILE).unwrap();
        assert!(is_file(&node));
        let Document { config, run, .. } = document(&node).unwrap();
        assert_eq!((config.cpus, config.memory, config.rng), (2, Size::gib(1), true));
        assert_eq!(config.cmdline, "console=ttyS0 panic=1 root=/dev/vda ro");
        assert!(!config.cpu_template.as_ref().unwrap().kvm_capabilities[0].needed);
        assert_eq!(config.disks[0].path.to_str(), Some("a.img"));
        assert_eq!((config.disks[0].readonly, config.disks[0].iops.unwrap().size.get()), (true, 100));
        assert_eq!(config.disks[1].cache, crate::virtio::blk::Cache::Unsafe);
        let engines = [0, 1].map(|disk: usize| config.disks[disk].engine);
        assert_eq!(engines, [crate::virtio::blk::Engine::IoUring, crate::virtio::blk::Engine::Sync]);
        assert_eq!(config.nets[0].tap.as_deref(), Some("tap0"));
        let limits = [config.rng_bw, config.serial_bw].map(|limit| limit.unwrap().to_string());
        assert_eq!(
            (limits, config.nets[0].pps.unwrap().to_string()),
            (["5", "9/100ms+8"].map(String::from), "7/50ms:".into())
        );
        assert_eq!(Settings::of(&config).entropy.unwrap().unwrap().rates().bytes, config.rng_bw);
        assert_eq!(NetworkInterface::of(0, &config.nets[0]).spec().pps, config.nets[0].pps);
        assert_eq!(config.vsock.as_ref().unwrap().cid, 3);
        assert_eq!((run.log_file, run.verbose, run.metrics), (Some("vm.log".into()), 2, Some("m".into())));
        // A snapshot has no other description of it.
        assert_eq!(Settings::of(&config).interfaces[0].iface_id, "up");
        assert!(!is_file(&json::parse(r#"{"kernel": "k", "vsock": null, "serial": "none"}"#).unwrap()));
        // What it prints is the same again.
        let settings = Settings::read(&node).unwrap();
        let again = Settings::read(&json::parse(&settings.to_json().to_string()).unwrap()).unwrap();
        // It does not print the console.
        let again = Settings { serial: settings.serial.clone(), ..again };
        assert_eq!(again.config(), settings.config());
    }

    #[test]
    fn what_it_has_wrong_is_told() {
        let boot = r#""boot-source": {"kernel_image_path": "k"}"#;
        for (text, what) in [
            (
                format!(r#"{{{boot}, "mmds-config": {{"network_interfaces": []}}}}"#),
                "`mmds-config`: bantam has no metadata",
            ),
            (
                format!(r#"{{{boot}, "drives": [{{"drive_id": "a"}}]}}"#),
                "`drives[0]`: the key `is_root_device` is missing",
            ),
            (format!(r#"{{{boot}, "drivs": []}}"#), "unknown key `drivs`: did you mean `drives`?"),
            (
                format!(r#"{{{boot}, "machine-config": {{"vcpu_count": 33, "mem_size_mib": 1}}}}"#),
                "`machine-config.vcpu_count`: expected a number from 1 to 32",
            ),
            (
                format!(r#"{{{boot}, "machine-config": {{"vcpu_count": 1, "mem_size_mib": 1, "smt": true}}}}"#),
                "`machine-config.smt`: bantam has no SMT",
            ),
            (
                format!(r#"{{{boot}, "machine-config": {{"vcpu_count": 1, "mem_size_mib": 1, "huge_pages": "1G"}}}}"#),
                "`machine-config.huge_pages`",
            ),
            (format!(r#"{{{boot}, "logger": {{"level": "loud"}}}}"#), "`logger.level`: unknown level `loud`"),
            (r#"{"drives": []}"#.to_owned(), "the key `boot-source` is missing"),
            (
                format!(r#"{{{boot}, "cpu-config": {{"msr_modifiers": [{{"addr": "0x10a", "bitmap": "x"}}]}}}}"#),
                "`cpu-config.msr_modifiers[0].bitmap`: `x` is no bitmap: write 0b and",
            ),
            (
                format!(r#"{{{boot}, "cpu-config": {{"cpuid_modifiers": [{{"leaf": "1"}}]}}}}"#),
                "`cpu-config.cpuid_modifiers[0]`: the key `subleaf` is missing",
            ),
            (
                format!(r#"{{{boot}, "cpu-config": {{"msr_modifirs": []}}}}"#),
                "`cpu-config`: unknown key `msr_modifirs`: did you mean `msr_modifiers`?",
            ),
            (
                format!(r#"{{{boot}, "cpu-config": {{"reg_modifiers": [{{}}]}}}}"#),
                "`cpu-config.reg_modifiers`: this is x86-64, and not aarch64",
            ),
            (
                format!(r#"{{{boot}, "cpu-config": "/no/template"}}"#),
                "`cpu-config`: cannot use the CPU template /no/template: No such file",
            ),
        ] {
            let error = read(&text).unwrap_err();
            assert!(error.contains(what), "{text}\n{error}");
        }
        let drive = |id: &str| format!(r#"{{"drive_id": "{id}", "is_root_device": true, "path_on_host": "p"}}"#);
        let two = format!(r#"{{{boot}, "drives": [{}, {}]}}"#, drive("a"), drive("b"));
        assert_eq!(read(&two).unwrap_err(), "`drives[1]`: A root block device already exists!");
    }
}

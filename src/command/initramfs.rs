//! What the guest boots into: the init, what it has to do, and the kernel modules for that.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::io::retry_on_intr;
use rustix::rand::{GetRandomFlags, getrandom};

use super::{Spec, overlay, protocol};
use crate::boot::cpio::Archive;
use crate::boot::filesystem;
use crate::boot::modules::{self, Module, Modules};
use crate::virtio::net::{MacAddr, passt};

/// The init, as build.rs made it.
const INIT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/init"));

/// The command cannot be prepared.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel's modules cannot be used.
    #[error(transparent)]
    Modules(#[from] modules::Error),
    /// Modules are to be taken for a kernel whose version is unknown.
    #[error("cannot take kernel modules from {}: the kernel does not tell its version", .0.display())]
    NoVersion(PathBuf),
    /// The root disk cannot be read.
    #[error("cannot read the root file system {}", .path.display())]
    Disk {
        /// The disk.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// There is no file system on it that is known.
    #[error(
        "cannot use {} as a root file system: it is no disk image with a file system that is known (ext4, EROFS, \
         SquashFS, XFS, Btrfs)", .0.display()
    )]
    NoFileSystem(PathBuf),
}

/// A folder of the host that the guest mounts.
#[derive(Debug, Clone, Copy)]
pub struct Share<'a> {
    /// The tag of its virtio-fs device.
    pub tag: &'a str,
    /// Where the guest mounts it.
    pub path: &'a Path,
    /// Whether it is only read.
    pub readonly: bool,
}

/// Where the root file system is.
#[derive(Debug, Clone, Copy)]
pub enum Root<'a> {
    /// On this disk, the first one.
    Disk(&'a Path),
    /// It is a folder of the host that is written to: the virtio-fs device with this tag.
    Folder(&'a str),
}

/// What the guest's devices need drivers for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Devices<'a> {
    /// The root file system. Without one the command runs in the user's initrd.
    pub root: Option<Root<'a>>,
    /// The index of the disk that keeps what is changed, if it is kept.
    pub overlay: Option<usize>,
    /// The shared folders.
    pub shares: &'a [Share<'a>],
    /// Whether there is any disk.
    pub disks: bool,
    /// Whether there are network cards.
    pub nets: bool,
    /// The address of the card that is in the user's network, if one is.
    pub user_net: Option<MacAddr>,
    /// Whether there is a virtio-rng device.
    pub rng: bool,
}

/// The archive to boot with.
#[derive(Debug)]
pub struct Initramfs {
    /// A cpio archive, to be loaded after the user's initrd if there is one.
    pub archive: Vec<u8>,
    /// Whether modules were found for the kernel. One that has everything built in needs none.
    pub has_modules: bool,
    /// The files that the modules are of, and where there could be others that would be taken instead.
    pub module_files: Vec<PathBuf>,
}

impl Initramfs {
    /// Makes the archive for `command`, of which the init is told `told`, and a kernel of this version, with modules from
    /// the folder that is given, or from where they usually are.
    ///
    /// # Errors
    /// When the root disk or the modules cannot be read, or one that is needed is missing.
    pub fn make(
        command: &Spec,
        devices: Devices<'_>,
        kernel: &Path,
        version: Option<&str>,
        folder: Option<&Path>,
        told: &[u8],
    ) -> Result<Self, Error> {
        let kind = match devices.root {
            Some(Root::Disk(disk)) => Some(file_system(disk)?),
            _ => None,
        };
        let version = version.and_then(modules::release);
        let modules = match (folder, version) {
            (Some(folder), Some(version)) => Some(Modules::open(folder, version)?),
            (Some(folder), None) => return Err(Error::NoVersion(folder.into())),
            (None, Some(version)) => Modules::find(kernel, version)?,
            (None, None) => None,
        };
        let loaded =
            modules.as_ref().map(|modules| modules.load(wanted(modules, command, devices, kind))).transpose()?;
        let loaded = loaded.unwrap_or_default();
        let places = match (folder, version) {
            (None, Some(version)) => &modules::places(kernel, version)[..],
            _ => &[],
        };
        let is_it = |place: &&PathBuf| modules.as_ref().is_some_and(|modules| modules.folder() == *place);
        let others = places.iter().take_while(|place| !is_it(place)).cloned();
        let module_files = others.chain(modules.iter().flat_map(|modules| modules.files(&loaded))).collect();
        let mut spec = told.to_vec();
        let mut say = |key: &str, value: &str| write(&mut spec, key, value);
        if let Some(kind) = kind {
            say(if command.rw { "writable" } else { "overlay" }, kind);
        }
        if let Some(Root::Folder(tag)) = devices.root {
            say("root-share", tag);
        }
        if let Some(disk) = devices.overlay {
            say("upper", &disk_name(disk));
        }
        loaded.iter().for_each(|module| say("module", &path_of(module)));
        for Share { tag, path, readonly } in devices.shares {
            let key = if *readonly { "share-ro" } else { "share" };
            say(key, &format!("{tag}:{}", path.display()));
        }
        if let Some(mac) = devices.user_net {
            say("network", &network(mac));
        }
        Ok(Self { archive: archive(&spec, &loaded), has_modules: modules.is_some(), module_files })
    }
}

/// What the init is told of `command`, which has a terminal of this size if it has one: rows << 16 | columns.
pub fn told(command: &Spec, window: u32) -> Vec<u8> {
    let mut spec = vec![];
    let mut say = |key: &str, value: &str| write(&mut spec, key, value);
    command.arguments.iter().for_each(|argument| say("argument", argument));
    effective(&command.env).for_each(|variable| say("environment", variable));
    for (key, value) in [("folder", &command.workdir), ("user", &command.user), ("hostname", &command.hostname)] {
        value.iter().for_each(|value| say(key, value));
    }
    if let Some(count) = command.pids {
        say("pids", &count.to_string());
    }
    if command.tty {
        say("terminal", &window.to_string());
    }
    spec
}

/// What the init is told in place of a command that it waits for.
pub const WAIT: &[u8] = b"wait=\0";

/// What the init is told so that the guest has random numbers of its own.
pub(super) fn seed() -> io::Result<Vec<u8>> {
    let mut seed = [0; SEED];
    // As few are had whole.
    retry_on_intr(|| getrandom(&mut seed, GetRandomFlags::empty()))?;
    let mut spec = vec![];
    write(&mut spec, "seed", &hex(&seed));
    Ok(spec)
}

/// Bytes of it.
const SEED: usize = 32;

/// Adds a key and its value to what the init is told.
fn write(spec: &mut Vec<u8>, key: &str, value: &str) {
    spec.extend_from_slice(format!("{key}={value}\0").as_bytes());
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What the init sets up the card with this address with: the addresses of both, the prefix' length, the gateway and the
/// name server, as hexadecimal bytes.
fn network(mac: MacAddr) -> String {
    let (guest, gateway, server) = (passt::GUEST.octets(), passt::GATEWAY.octets(), passt::NAME_SERVER.octets());
    hex(&[&mac.bytes()[..], &guest, &[passt::PREFIX_LENGTH], &gateway, &server].concat())
}

/// The variables without those that a later one replaces.
fn effective(env: &[String]) -> impl Iterator<Item = &str> {
    let name = |variable: &str| variable.split('=').next().map(str::to_owned);
    let replaced = move |at: usize| env[at + 1..].iter().any(|later| name(later) == name(&env[at]));
    env.iter().enumerate().filter(move |(at, _)| !replaced(*at)).map(|(_, variable)| variable.as_str())
}

/// The type of the file system on a disk.
fn file_system(disk: &Path) -> Result<&'static str, Error> {
    let kind = File::open(disk).and_then(|file| filesystem::detect(&file));
    let kind = kind.map_err(|source| Error::Disk { path: disk.into(), source })?;
    kind.ok_or_else(|| Error::NoFileSystem(disk.into()))
}

/// All modules that any command may want.
pub const MODULES: [&str; 14] = [
    "virtio_mmio",
    "vmw_vsock_virtio_transport",
    "virtio_blk",
    "virtiofs",
    "virtio_net",
    "virtio_rng",
    "crc32c_generic",
    "overlay",
    "erofs",
    "ext4",
    "squashfs",
    "xfs",
    "btrfs",
    "iso9660",
];

/// The modules that are wanted, in the order to load them: of [`MODULES`].
fn wanted(modules: &Modules, command: &Spec, devices: Devices<'_>, kind: Option<&'static str>) -> Vec<&'static str> {
    let mut wanted = vec!["virtio_mmio", "vmw_vsock_virtio_transport"];
    wanted.extend(devices.disks.then_some("virtio_blk"));
    let shares = !devices.shares.is_empty() || matches!(devices.root, Some(Root::Folder(_)));
    wanted.extend(shares.then_some("virtiofs"));
    wanted.extend(devices.nets.then_some("virtio_net"));
    // What is nice to have: a guest does without. Some file systems ask for a checksum by an alias.
    let optional = [("virtio_rng", devices.rng), ("crc32c_generic", kind.is_some())];
    wanted.extend(optional.into_iter().filter(|(name, used)| *used && modules.has(name)).map(|(name, _)| name));
    wanted.extend(kind);
    wanted.extend((kind.is_some() && !command.rw).then_some("overlay"));
    wanted.extend((devices.overlay.is_some() && kind != Some(overlay::KIND)).then_some(overlay::KIND));
    debug_assert!(wanted.iter().all(|name| MODULES.contains(name)), "{wanted:?}");
    wanted
}

/// A disk's name in the guest; there are far fewer than 26.
fn disk_name(index: usize) -> String {
    let letter = u8::try_from(index).map_or('?', |index| char::from(b'a' + index));
    format!("/dev/vd{letter}")
}

fn path_of(module: &Module) -> String {
    format!("{}/modules/{}.ko", protocol::FOLDER, module.name)
}

fn archive(spec: &[u8], modules: &[Module]) -> Vec<u8> {
    let name = |path: &str| path.trim_start_matches('/').to_owned();
    let folder = name(protocol::FOLDER);
    let mut archive = Archive::default();
    archive.folder(&folder, 0o700);
    archive.file(&format!("{folder}/init"), 0o700, INIT);
    archive.file(&format!("{folder}/spec"), 0o600, spec);
    archive.folder(&format!("{folder}/modules"), 0o700);
    for module in modules {
        archive.file(&name(&path_of(module)), 0o600, &module.object);
    }
    archive.finish()
}

//! What a warm snapshot is of: all that a guest has seen by the time it is ready for a command.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::config::Config;
use crate::devices::console;
use crate::machine::snapshot;
use crate::snapshot::BANTAM;
use crate::virtio::net;

/// What runs, and its init with it: another build of the same version counts as another one.
const PROGRAM: &str = "/proc/self/exe";

/// Why a machine cannot be started warm.
#[derive(Debug, thiserror::Error)]
pub enum Unfit {
    /// The guest's own init does not tell when it is ready.
    #[error(
        "cannot start warm without a command, for which a guest can be ready (bantam run --warm KEY ROOTFS -- COMMAND)"
    )]
    NoCommand,
    /// What is mounted in the snapshot would have changed when it is restored.
    #[error("cannot start warm with {0}: the snapshot has its file system mounted, which no other run may change")]
    Written(String),
    /// Files are open on the host.
    #[error("cannot start warm with shared folders, of which the guest has files open on the host")]
    Share,
    /// It cannot be saved.
    #[error("cannot start warm with memory in huge pages, which is not saved: run it without --hugepages")]
    HugePages,
    /// It can be used once.
    #[error(
        "cannot start warm with the network card fd={0}: the machine is built anew when its snapshot cannot be used"
    )]
    Descriptor(i32),
    /// Whichever tap it is, the guest would have the same address.
    #[error("cannot start warm with a network card on the first free tap `{0}`: each needs an address of its own")]
    AnyTap(String),
    /// It has no time of its last change.
    #[error("cannot start warm with the block device {0}: it does not tell whether it has changed")]
    BlockDevice(String),
    /// A path means nothing.
    #[error(transparent)]
    Path(#[from] snapshot::Error),
}

/// What a snapshot is of.
#[derive(Debug, Clone, PartialEq)]
pub struct Basis {
    /// The configuration, without what may be another one in each run.
    config: Value,
    /// The files that the guest has read, by their paths, with what they are told by; null for one that is not there.
    files: BTreeMap<String, Value>,
}

impl Basis {
    /// Of the machine that `config` makes.
    ///
    /// # Errors
    /// When no snapshot of it would do for another run.
    pub fn of(config: &Config) -> Result<Self, Unfit> {
        check(config)?;
        let mut config = snapshot::portable(config)?;
        let disks: Vec<_> = config.all_disks().map(|disk| disk.path).collect();
        let paths = [&config.kernel, &config.initrd].into_iter().flatten().chain(&disks);
        let mut files: BTreeMap<_, _> = paths.map(|path| (path.display().to_string(), stamp(path))).collect();
        files.insert(PROGRAM.into(), stamp(Path::new(PROGRAM)));
        (config.command, config.vsock, config.cpu_quota) = (None, None, None);
        (config.timeout, config.boot_timeout) = (None, None);
        // The kernel is told whether there is a console.
        if config.serial != console::Spec::None {
            config.serial = console::Spec::Stdio;
        }
        for net in &mut config.nets {
            *net = net::Spec { user: net.user, mac: net.mac, mtu: net.mtu, ..net::Spec::default() };
        }
        Ok(Self { config: serde_json::to_value(config).unwrap_or_default(), files })
    }

    /// Whether all files are there.
    pub fn is_whole(&self) -> bool {
        self.files.values().all(|stamp| !stamp.is_null())
    }

    /// Whether the files are still the same.
    pub fn is_still_so(&self) -> bool {
        self.is_whole() && self.files.iter().all(|(path, seen)| stamp(Path::new(path)) == *seen)
    }

    /// What is kept of it beside the snapshot.
    pub fn record(&self) -> Value {
        json!({"bantam": BANTAM, "config": self.config, "files": self.files})
    }

    /// What is other than in the record of a snapshot, in words, if anything is.
    pub fn difference(&self, record: &Value) -> Option<String> {
        if record["bantam"] != BANTAM {
            return Some(format!("it was made by bantam {}, and this is bantam {BANTAM}", text(&record["bantam"])));
        }
        let keys = self.config.as_object().into_iter().flatten();
        let mut changed =
            keys.map(|(key, now)| (key, &record["config"][key], now)).filter(|(_, then, now)| then != now);
        if let Some((key, then, now)) = changed.next() {
            return Some(format!("its machine has {key} {}, and this one {}", text(then), text(now)));
        }
        let mut changed = self.files.iter().filter(|(path, now)| record["files"][path] != **now);
        changed.next().map(|(path, _)| match path.as_str() {
            PROGRAM => "it was made by another build of bantam".into(),
            path => format!("{path} has changed since it was made"),
        })
    }
}

/// Files that the guest has of the host beside those that the configuration names: what they are told by, as of a [`Basis`].
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Files(Map<String, Value>);

impl Files {
    /// These, as they are now. Some may not be there.
    pub fn of(paths: &[PathBuf]) -> Self {
        let paths = paths.iter().filter_map(|path| std::path::absolute(path).ok());
        Self(paths.map(|path| (path.display().to_string(), stamp(&path))).collect())
    }

    /// What is kept of them beside the snapshot.
    pub fn record(&self) -> Value {
        Value::Object(self.0.clone())
    }

    /// Those of a record; `None` if it is none.
    pub fn recorded(record: &Value) -> Option<Self> {
        record.as_object().cloned().map(Self)
    }

    /// One that is another now, if there is one.
    pub fn changed(&self) -> Option<&str> {
        self.0.iter().find(|(path, seen)| stamp(Path::new(path)) != **seen).map(|(path, _)| &**path)
    }
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Whether a snapshot of this machine would do for other runs.
fn check(config: &Config) -> Result<(), Unfit> {
    let command = config.command.as_ref().ok_or(Unfit::NoCommand)?;
    if command.rw {
        return Err(Unfit::Written("--rw".into()));
    }
    if config.overlay.is_some() {
        return Err(Unfit::Written("--overlay".into()));
    }
    if !config.shares.is_empty() {
        return Err(Unfit::Share);
    }
    if config.hugepages {
        return Err(Unfit::HugePages);
    }
    for disk in config.all_disks() {
        let path = disk.path.display().to_string();
        if !disk.readonly {
            return Err(Unfit::Written(format!("the disk {path}, which is not readonly=on")));
        }
        if fs::metadata(&disk.path).is_ok_and(|metadata| metadata.file_type().is_block_device()) {
            return Err(Unfit::BlockDevice(path));
        }
    }
    for net in &config.nets {
        if let Some(fd) = net.fd {
            return Err(Unfit::Descriptor(fd));
        }
        if let Some(tap) = net.tap.as_ref().filter(|tap| tap.contains('%')) {
            return Err(Unfit::AnyTap(tap.clone()));
        }
    }
    Ok(())
}

/// What tells a file from what it was before: its inode, size and times. Null if there is none.
pub fn stamp(path: &Path) -> Value {
    fs::metadata(path).map_or(Value::Null, |it| {
        json!([it.ino(), it.size(), it.mtime(), it.mtime_nsec(), it.ctime(), it.ctime_nsec()])
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::command;
    use crate::config::{Overlay, Quota, Share, Size};
    use crate::virtio::{blk, vsock};

    fn config() -> Config {
        let command = command::Spec::new(["true"]);
        let tap = net::Spec {
            tap: Some("tap0".into()),
            mac: Some("02:00:00:00:00:01".parse().unwrap()),
            ..net::Spec::default()
        };
        Config::new().kernel("/proc/version").rootfs("/dev/null").command(command).net(tap)
    }

    fn readonly(path: &str) -> blk::Spec {
        blk::Spec { readonly: true, ..blk::Spec::new(path) }
    }

    #[test]
    fn what_each_run_has_of_its_own_is_no_difference() {
        let basis = Basis::of(&config()).unwrap();
        assert!(basis.is_whole() && basis.is_still_so());
        assert_eq!(basis.difference(&basis.record()), None);
        let mut other = config().timeout(Duration::from_secs(1)).boot_timeout(Duration::from_secs(1));
        other.command = Some(command::Spec { env: vec!["A=1".into()], tty: true, ..command::Spec::new(["sh"]) });
        other = other.vsock(vsock::Spec { cid: 7, socket: "s".into() }).cpu_quota("50%".parse::<Quota>().unwrap());
        (other.nets[0].tap, other.nets[0].bw) = (Some("tap1".into()), Some("1M".parse().unwrap()));
        assert_eq!(Basis::of(&other).unwrap(), basis);
        let console = |path: &str| Basis::of(&config().serial(console::Spec::File(path.into()))).unwrap();
        assert_eq!(console("a"), console("b"));
        assert!(console("a").difference(&basis.record()).unwrap().contains("serial"));
    }

    #[test]
    fn all_else_is_told() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let config = config().initrd(file.path());
        let record = Basis::of(&config).unwrap().record();
        let mut other_mac = config.clone();
        other_mac.nets[0].mac = None;
        for (other, told) in [
            (config.clone().memory(Size::gib(1)), "has memory 256M, and this one 1G"),
            (config.clone().cpus(2), "has cpus 1, and this one 2"),
            (config.clone().kernel("/proc/cmdline"), "has kernel /proc/version, and this one /proc/cmdline"),
            (config.clone().rootfs("/dev/zero"), "has rootfs /dev/null, and this one /dev/zero"),
            (config.clone().disk(readonly("/proc/version")), "has disks [], and this one ["),
            (config.clone().cmdline("x"), "has cmdline , and this one x"),
            (other_mac, "has nets ["),
        ] {
            let difference = Basis::of(&other).unwrap().difference(&record).unwrap();
            assert!(difference.contains(told), "{difference}");
        }
        let older = json!({"bantam": "0.0.1", "config": record["config"], "files": record["files"]});
        let basis = Basis::of(&config).unwrap();
        assert!(basis.difference(&older).unwrap().starts_with("it was made by bantam 0.0.1, and this is"));
        for nonsense in [Value::Null, json!([]), json!({"bantam": BANTAM}), json!({"bantam": BANTAM, "config": []})] {
            assert!(basis.difference(&nonsense).is_some(), "{nonsense}");
        }
        fs::write(file.path(), "new").unwrap();
        assert!(!basis.is_still_so());
        let difference = Basis::of(&config).unwrap().difference(&record).unwrap();
        assert_eq!(difference, format!("{} has changed since it was made", file.path().display()));
        file.close().unwrap();
        assert!(!Basis::of(&config).unwrap().is_whole());
    }

    #[test]
    fn what_no_other_run_could_use_is_refused() {
        let share = Share { path: "/".into(), guest: PathBuf::from("/x"), readonly: false };
        let mut rw = config();
        rw.command.iter_mut().for_each(|command| command.rw = true);
        let without = Config { command: None, ..config() };
        let on = |net| Config { nets: vec![net], ..config() };
        for (config, why) in [
            (without, "without a command"),
            (rw, "with --rw"),
            (config().overlay(Overlay::new("x")), "with --overlay"),
            (config().share(share), "shared folders"),
            (config().hugepages(true), "huge pages"),
            (config().disk(blk::Spec::new("/data")), "the disk /data, which is not readonly=on"),
            (on(net::Spec { fd: Some(3), ..Default::default() }), "fd=3"),
            (on(net::Spec { tap: Some("tap%d".into()), ..Default::default() }), "first free tap `tap%d`"),
        ] {
            let error = Basis::of(&config).unwrap_err().to_string();
            assert!(error.contains("cannot start warm") && error.contains(why), "{error}");
        }
    }
}

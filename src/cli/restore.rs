//! `bantam restore`: a machine goes on where it was when it was saved.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use bantam::config::file::Jail;
use bantam::config::{Config, duration, kv};
use bantam::devices::console;
use bantam::machine::{self, Record, Snapshot};
use bantam::virtio::{net, vsock};
use clap::Args;

use super::jail::Unfit;

pub const EXAMPLES: &str = "\
Examples:
  The machine as it was:
    bantam restore saved

  A second one of the same snapshot, beside the first:
    bantam restore saved --net tap1 --disk vda=copy.img --vsock cid=4,socket=second.vsock

Exit status: as that of bantam run.";

#[derive(Debug, Args)]
pub struct Restore {
    /// The folder of the snapshot.
    #[arg(value_name = "DIR")]
    folder: PathBuf,

    /// Put a disk's data elsewhere: that of the disk with this id=, or that the guest sees as NAME (vda, vdb, ...).
    #[arg(long = "disk", value_name = "NAME=FILE", help_heading = "Devices")]
    disks: Vec<Disk>,
    /// Put a network card elsewhere: the first --net is for the guest's first card, and so on. What is not given is as it was.
    ///
    /// A guest's driver goes on with the address that it has; it sees another one when it is bound anew.
    #[arg(
        long = "net",
        value_name = "user|[tap=]NAME|fd=N[,mac=ADDR][,bw=SIZE][,pps=N][,vhost=on|off|auto]",
        help_heading = "Devices"
    )]
    #[arg(value_parser = kv::from_str::<net::Spec>)]
    nets: Vec<net::Spec>,
    /// Put the socket device elsewhere. The guest's connections have ended in any case.
    #[arg(long, value_name = "cid=N,socket=PATH", value_parser = kv::from_str::<vsock::Spec>, help_heading = "Devices")]
    vsock: Option<vsock::Spec>,

    /// Where the serial console is: stdio, none, file=PATH or socket=PATH.
    #[arg(long, value_name = "WHERE", help_heading = "Console")]
    serial: Option<console::Spec>,

    /// Read all memory before the guest goes on, in place of each page when it is first used.
    #[arg(long, help_heading = "Memory")]
    prefault: bool,

    /// Record which memory the guest uses until the machine ends, or for TIME, and have later machines of the snapshot read
    /// that ahead.
    #[arg(long, value_name = "TIME", num_args = 0..=1, require_equals = true, default_missing_value = "end")]
    #[arg(value_parser = record, conflicts_with_all = ["prefault", "uffd"], help_heading = "Memory")]
    record: Option<Record>,
    /// Have the process that listens at SOCKET give each page when it is first used, by userfaultfd, as Firecracker does.
    ///
    /// The memory file of the snapshot is not opened. Takes access to /dev/userfaultfd, or CAP_SYS_PTRACE.
    #[arg(long, value_name = "SOCKET", conflicts_with = "prefault", help_heading = "Memory")]
    uffd: Option<PathBuf>,

    /// End the machine after this time.
    #[arg(long, value_name = "TIME", value_parser = duration::parse, help_heading = "Limits")]
    timeout: Option<Duration>,
    /// What bantam may still do when the machine runs [default: on].
    ///
    /// on: the files and system calls that the machine takes; a system call beyond them ends it with a line that tells which.
    /// log: such a system call is told, and made. off: all that the user may do.
    #[arg(long, value_name = "on|log|off", help_heading = "Limits")]
    sandbox: Option<bantam::sandbox::Mode>,
    /// Run the machine in a process that sees nothing of the host but what was opened for it, as bantam run does.
    #[arg(long, value_name = "uid=N,gid=N,cgroup=on|off", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    #[arg(value_parser = Jail::read, help_heading = "Limits")]
    pub jail: Option<Jail>,

    /// Let `bantam ps`, stop, pause, resume, snapshot, console and metrics reach the machine by this name.
    #[arg(long, value_name = "NAME", help_heading = "Output")]
    pub name: Option<bantam::named::Name>,
    /// Write the outcome, durations and counters to FILE, as JSON; - is standard output.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub report: Option<PathBuf>,
    /// Log more: -v what happens, -vv details, -vvv everything.
    #[arg(short, long, action = clap::ArgAction::Count, help_heading = "Output")]
    pub verbose: u8,
    /// Log to the end of FILE instead of to standard error.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub log_file: Option<PathBuf>,
    /// Add a line of JSON to FILE, or a pipe, for each thing that happens, as bantam run does.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub events: Option<PathBuf>,
    /// Add a line of JSON with the counters to FILE, or a pipe, as bantam run does.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub metrics: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct Merge {
    /// The folder of the snapshot.
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// The folder of the new one; a snapshot that is there is replaced when the new one is whole.
    #[arg(value_name = "INTO")]
    into: PathBuf,
}

impl Merge {
    /// Makes the snapshot.
    pub fn run(&self) -> Result<(), machine::Error> {
        Snapshot::open(&self.folder)?.merge(&self.into)
    }
}

/// Where the data of a disk is.
#[derive(Debug, Clone)]
struct Disk {
    name: String,
    path: PathBuf,
}

impl FromStr for Disk {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('=') {
            Some((name, path)) if !name.is_empty() && !path.is_empty() => {
                Ok(Self { name: name.into(), path: path.into() })
            }
            _ => Err("expected NAME=FILE, as vda=disk.img"),
        }
    }
}

fn record(text: &str) -> Result<Record, String> {
    match text {
        "end" => Ok(Record::ToTheEnd),
        time => duration::parse(time).map(Record::For).map_err(|error| error.to_string()),
    }
}

/// What the flags ask for and the machine does not have.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot put the disk `{name}` elsewhere: the machine has {there}")]
    Disk { name: String, there: String },
    #[error("cannot put {asked} network cards elsewhere: the machine has {there}")]
    Cards { asked: usize, there: usize },
    #[error("cannot put the socket device elsewhere: the machine has none")]
    Vsock,
}

impl Restore {
    /// What is asked for: nobody who wants a jail wants less.
    pub fn sandbox(&self) -> Option<bantam::sandbox::Mode> {
        self.sandbox.or(self.jail.is_some().then_some(bantam::sandbox::Mode::On))
    }

    /// What is asked for and cannot be had in a jail.
    pub fn unfit_for_jail(&self) -> [Unfit; 2] {
        [
            (
                self.uffd.is_some(),
                "memory from a process (--uffd)",
                "a thread watches that process before the jail begins",
            ),
            (
                self.record.is_some(),
                "a record of memory (--record)",
                "it is written to the snapshot's folder in the end",
            ),
        ]
    }

    /// The snapshot, with the machine that the flags make of it.
    pub fn snapshot(&self) -> Result<Snapshot, Box<dyn std::error::Error>> {
        let mut snapshot = match &self.uffd {
            Some(socket) => Snapshot::open_served(&self.folder, socket)?,
            None => Snapshot::open(&self.folder)?,
        };
        self.change(&mut snapshot.config)?;
        super::can_go_on(&snapshot.config.disks, self.name.as_ref())?;
        snapshot.prefault = self.prefault;
        snapshot.record = self.record;
        Ok(snapshot)
    }

    fn change(&self, config: &mut Config) -> Result<(), Error> {
        for disk in &self.disks {
            let there = disks(config);
            let path = disk_path(config, &disk.name).ok_or_else(|| Error::Disk { name: disk.name.clone(), there })?;
            path.clone_from(&disk.path);
        }
        if self.nets.len() > config.nets.len() {
            return Err(Error::Cards { asked: self.nets.len(), there: config.nets.len() });
        }
        for (card, asked) in config.nets.iter_mut().zip(&self.nets) {
            *card = net::Spec {
                mac: asked.mac.or(card.mac),
                mtu: asked.mtu.or(card.mtu),
                bw: asked.bw.or(card.bw),
                pps: asked.pps.or(card.pps),
                vhost: asked.vhost.or(card.vhost),
                queues: asked.queues.or(card.queues),
                ..asked.clone()
            };
        }
        if let Some(vsock) = &self.vsock {
            *config.vsock.as_mut().ok_or(Error::Vsock)? = vsock.clone();
        }
        config.serial = self.serial.clone().unwrap_or_else(|| config.serial.clone());
        config.timeout = self.timeout;
        Ok(())
    }
}

/// The path of the disk with the id `name`, or that the guest sees under that name.
fn disk_path<'a>(config: &'a mut Config, name: &str) -> Option<&'a mut PathBuf> {
    let first = usize::from(config.rootfs.is_some());
    if let Some(disk) = config.disks.iter().position(|disk| disk.id.as_deref() == Some(name)) {
        return Some(&mut config.disks[disk].path);
    }
    let index = (0..=first + config.disks.len()).find(|index| guest_name(*index) == name)?;
    match index.checked_sub(first) {
        Some(index) => Some(&mut config.disks.get_mut(index)?.path),
        None => config.rootfs.as_mut(),
    }
}

/// What Linux calls a virtio disk.
fn guest_name(index: usize) -> String {
    let letter = |digit: usize| char::from(b"abcdefghijklmnopqrstuvwxyz"[digit % 26]);
    match index / 26 {
        0 => format!("vd{}", letter(index)),
        tens => format!("vd{}{}", letter(tens - 1), letter(index)),
    }
}

fn disks(config: &Config) -> String {
    let names: Vec<_> =
        config.all_disks().enumerate().map(|(index, disk)| disk.id.unwrap_or(guest_name(index))).collect();
    if names.is_empty() { "none".into() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bantam::virtio::blk;
    use clap::Parser;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        restore: Restore,
    }

    fn change(config: &Config, flags: &[&str]) -> Result<Config, Error> {
        let flags = Flags::try_parse_from([&["restore", "dir"], flags].concat()).unwrap();
        let mut config = config.clone();
        flags.restore.change(&mut config)?;
        Ok(config)
    }

    #[test]
    fn what_is_not_given_is_as_it_was() {
        let net = || serde_json::from_str(r#"{"tap": "tap0", "mac": "02:00:00:00:00:01", "mtu": 9000}"#).unwrap();
        let disk = blk::Spec { id: Some("data".into()), ..blk::Spec::new("/old") };
        let config = Config::new().rootfs("/root").disk(disk).disk(blk::Spec::new("/third")).net(net());
        assert_eq!(change(&config, &[]).unwrap(), config);
        let changed =
            change(&config, &["--disk=data=new", "--disk", "vda=other", "--disk=vdc=c=d", "--net=tap1"]).unwrap();
        assert_eq!(changed.rootfs, Some("other".into()));
        assert_eq!(changed.disks[0].path, PathBuf::from("new"));
        assert_eq!((&changed.disks[0].id, &changed.disks[1].path), (&config.disks[0].id, &PathBuf::from("c=d")));
        assert_eq!(changed.nets[0], net::Spec { tap: Some("tap1".into()), ..net() });
        for flags in [["--disk", "vdd=x"], ["--disk", "no=x"], ["--vsock", "cid=4,socket=s"]] {
            assert!(change(&config, &flags).is_err(), "{flags:?}");
        }
        assert!(matches!(change(&config, &["--net=a", "--net=b"]), Err(Error::Cards { asked: 2, there: 1 })));
    }

    #[test]
    fn disks_have_the_names_of_linux() {
        assert_eq!([0, 25, 26, 27, 701].map(guest_name), ["vda", "vdz", "vdaa", "vdab", "vdzz"]);
    }
}

//! What requests about snapshots say.

use super::api::chain;
use crate::config::firecracker::Settings;
use crate::config::tree::{Error, Node, Table};
use crate::machine::Snapshot;

/// A snapshot to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Create {
    /// Where the guest's memory goes.
    pub mem_file_path: String,
    /// Where its state goes.
    pub snapshot_path: String,
    /// Whether only what has changed since the last one is wanted.
    pub diff: bool,
}

impl Create {
    /// Reads it.
    pub fn read(node: &Node) -> Result<Self, Error> {
        const TYPES: &[&str] = &["Full", "Diff"];
        let table = node.table(&["mem_file_path", "snapshot_path", "snapshot_type"])?;
        Ok(Self {
            mem_file_path: required(&table, "mem_file_path")?,
            snapshot_path: required(&table, "snapshot_path")?,
            diff: table.choice("snapshot_type", TYPES)? == Some(1),
        })
    }
}

/// A snapshot to be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Load {
    /// Where the guest's state is.
    pub snapshot_path: String,
    /// Where its memory is: a file, or the socket of a process that has it.
    pub memory: String,
    /// Whether that is a socket.
    pub is_socket: bool,
    /// Whether it goes on at once.
    pub resume: bool,
    /// Other taps, by the names of network interfaces.
    pub taps: Vec<(String, String)>,
    /// Another path of the socket device.
    pub vsock: Option<String>,
}

impl Load {
    /// Reads it.
    pub fn read(node: &Node) -> Result<Self, Error> {
        const BACKENDS: &[&str] = &["File", "Uffd"];
        const HUGE_PAGES: &[&str] = &["Snapshot", "None", "Transparent", "2M"];
        let table = node.table(&[
            "enable_diff_snapshots",
            "track_dirty_pages",
            "mem_file_path",
            "mem_backend",
            "snapshot_path",
            "resume_vm",
            "network_overrides",
            "vsock_override",
            "clock_realtime",
            "huge_pages",
        ])?;
        for key in ["enable_diff_snapshots", "track_dirty_pages", "clock_realtime"] {
            table.boolean(key)?;
        }
        if table.choice("huge_pages", HUGE_PAGES)? == Some(3) {
            return Err(table.wrong("huge_pages", "the memory of a snapshot is mapped from its file, in small pages"));
        }
        let backend = table.read("mem_backend", |node| {
            let table = node.table(&["backend_type", "backend_path"])?;
            let kind = table.choice("backend_type", BACKENDS)?.ok_or_else(|| table.missing("backend_type"))?;
            Ok((required(&table, "backend_path")?, kind == 1))
        })?;
        let file = table.text("mem_file_path")?.map(|path| (path.to_owned(), false));
        let (memory, is_socket) = match (file, backend) {
            (Some(one), None) | (None, Some(one)) => one,
            (Some(_), Some(_)) => return Err(table.wrong("mem_file_path", "`mem_backend` is given, too")),
            (None, None) => return Err(table.missing("mem_backend")),
        };
        let tap = |node: &Node| {
            let table = node.table(&["iface_id", "host_dev_name"])?;
            Ok((required(&table, "iface_id")?, required(&table, "host_dev_name")?))
        };
        Ok(Self {
            snapshot_path: required(&table, "snapshot_path")?,
            memory,
            is_socket,
            resume: table.boolean("resume_vm")?.unwrap_or(false),
            taps: table.list("network_overrides")?.iter().map(tap).collect::<Result<_, Error>>()?,
            vsock: table.read("vsock_override", |node| required(&node.table(&["uds_path"])?, "uds_path"))?,
        })
    }

    /// Opens the files, and takes over what is to be otherwise.
    ///
    /// # Errors
    /// Why that cannot be.
    pub fn open(&self) -> Result<Snapshot, String> {
        let opened = match self.is_socket {
            true => Snapshot::open_served(&self.snapshot_path, &self.memory),
            false => Snapshot::open_files(&self.snapshot_path, &self.memory),
        };
        let mut snapshot = opened.map_err(|error| chain(&error))?;
        let config = &mut snapshot.config;
        for (id, tap) in &self.taps {
            let index = Settings::of(config).interfaces.iter().position(|card| card.iface_id == *id);
            let card = index.and_then(|index| config.nets.get_mut(index));
            let card = card.ok_or_else(|| format!("There is no network interface `{id}` in the snapshot."))?;
            (card.tap, card.fd) = (Some(tap.clone()), None);
        }
        if let Some(path) = &self.vsock {
            let vsock = config.vsock.as_mut().ok_or("There is no vsock device in the snapshot.")?;
            vsock.socket = path.into();
        }
        Ok(snapshot)
    }
}

fn required(table: &Table<'_>, key: &str) -> Result<String, Error> {
    table.text(key)?.map(str::to_owned).ok_or_else(|| table.missing(key))
}

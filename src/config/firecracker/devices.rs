//! `drives`, `network-interfaces`, `vsock`, `entropy` and `serial`.

use serde_json::{Value, json};

use super::limiter::{Bucket, Limiter};
use crate::config::tree::{Error, Node, Table};
use crate::config::{Directions, Limit};
use crate::devices::console;
use crate::virtio::net::MacAddr;
use crate::virtio::{blk, net, vsock};

fn required<'a>(table: &Table<'a>, key: &str) -> Result<&'a str, Error> {
    table.text(key)?.ok_or_else(|| table.missing(key))
}

/// The name of a drive or a network interface: letters, digits and underscores.
fn id(table: &Table<'_>, key: &str) -> Result<String, Error> {
    let id = required(table, key)?;
    match !id.is_empty() && id.chars().all(|c| c == '_' || c.is_alphanumeric()) {
        true => Ok(id.to_owned()),
        false => Err(table.wrong(key, "expected letters, digits and underscores")),
    }
}

/// Adds `key` if there is a value.
fn put(json: &mut Value, key: &str, value: Option<Value>) {
    if let Some(value) = value {
        json[key] = value;
    }
}

const CACHES: &[&str] = &["Unsafe", "Writeback"];
const ENGINES: &[&str] = &["Sync", "Async"];

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drive {
    /// Its name.
    pub drive_id: String,
    /// Whether the kernel mounts it as its root.
    pub is_root_device: bool,
    /// The partition that it mounts.
    pub partuuid: Option<String>,
    /// The host's file.
    pub path_on_host: String,
    /// Whether the guest must not write it.
    pub is_read_only: bool,
    /// Its limits.
    pub rate_limiter: Option<Limiter>,
    cache: usize,
    engine: usize,
}

impl Drive {
    /// Reads one.
    pub fn read(node: &Node) -> Result<Self, Error> {
        let table = node.table(&[
            "drive_id",
            "is_root_device",
            "partuuid",
            "cache_type",
            "is_read_only",
            "path_on_host",
            "rate_limiter",
            "io_engine",
            "socket",
        ])?;
        if table.get("socket").is_some() {
            return Err(Error::new(node.at, "bantam has no vhost-user drives: give `path_on_host`"));
        }
        Ok(Self {
            drive_id: id(&table, "drive_id")?,
            is_root_device: table.boolean("is_root_device")?.ok_or_else(|| table.missing("is_root_device"))?,
            partuuid: table.text("partuuid")?.map(str::to_owned),
            path_on_host: required(&table, "path_on_host")?.to_owned(),
            is_read_only: table.boolean("is_read_only")?.unwrap_or(false),
            rate_limiter: table.read("rate_limiter", Limiter::read)?,
            cache: table.choice("cache_type", CACHES)?.unwrap_or(0),
            engine: table.choice("io_engine", ENGINES)?.unwrap_or(0),
        })
    }

    /// The view of one that was described otherwise, by its serial number.
    pub fn of(index: usize, spec: &blk::Spec) -> Self {
        Self {
            drive_id: spec.id.clone().unwrap_or_else(|| format!("drive{index}")),
            is_root_device: false,
            partuuid: None,
            path_on_host: spec.path.to_string_lossy().into_owned(),
            is_read_only: spec.readonly,
            rate_limiter: Limiter::of(spec.bw, spec.iops),
            cache: usize::from(spec.cache == blk::Cache::Writeback),
            engine: usize::from(spec.engine == blk::Engine::IoUring),
        }
    }

    /// The disk of a [`Config`](crate::config::Config).
    pub fn spec(&self) -> blk::Spec {
        let rates = self.rate_limiter.as_ref().map(Limiter::rates).unwrap_or_default();
        blk::Spec {
            // A snapshot has it by this name, too.
            id: Some(self.drive_id.clone()).filter(|id| id.len() <= blk::ID_BYTES),
            readonly: self.is_read_only,
            cache: if self.cache == 0 { blk::Cache::Unsafe } else { blk::Cache::Writeback },
            engine: if self.engine == 0 { blk::Engine::Sync } else { blk::Engine::IoUring },
            bw: rates.bytes,
            iops: rates.operations,
            ..blk::Spec::new(&self.path_on_host)
        }
    }

    /// What the kernel is told, if it mounts this one.
    pub fn root_parameter(&self) -> String {
        let mode = if self.is_read_only { "ro" } else { "rw" };
        match &self.partuuid {
            Some(partuuid) => format!("root=PARTUUID={partuuid} {mode}"),
            None => format!("root=/dev/vda {mode}"),
        }
    }

    /// As it is read.
    pub fn to_json(&self) -> Value {
        let mut json = json!({
            "drive_id": self.drive_id,
            "is_root_device": self.is_root_device,
            "cache_type": CACHES[self.cache],
            "is_read_only": self.is_read_only,
            "path_on_host": self.path_on_host,
            "io_engine": ENGINES[self.engine],
        });
        put(&mut json, "partuuid", self.partuuid.clone().map(Value::from));
        put(&mut json, "rate_limiter", self.rate_limiter.as_ref().map(Limiter::to_json));
        json
    }
}

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkInterface {
    /// Its name.
    pub iface_id: String,
    /// The tap's name.
    pub host_dev_name: String,
    /// The guest's address.
    pub guest_mac: Option<MacAddr>,
    /// The most bytes in a frame.
    pub mtu: Option<u16>,
    /// The limits to the guest.
    pub rx_rate_limiter: Option<Limiter>,
    /// The limits from it.
    pub tx_rate_limiter: Option<Limiter>,
}

impl NetworkInterface {
    /// Reads one.
    pub fn read(node: &Node) -> Result<Self, Error> {
        let table =
            node.table(&["iface_id", "host_dev_name", "guest_mac", "mtu", "rx_rate_limiter", "tx_rate_limiter"])?;
        let mac = table.text("guest_mac")?.map(str::parse::<MacAddr>).transpose();
        let mac = mac.map_err(|error| table.wrong("guest_mac", &error.to_string()))?;
        let card = Self {
            iface_id: id(&table, "iface_id")?,
            host_dev_name: required(&table, "host_dev_name")?.to_owned(),
            guest_mac: mac,
            mtu: table.number("mtu", 68, 65535)?.and_then(|mtu| u16::try_from(mtu).ok()),
            rx_rate_limiter: table.read("rx_rate_limiter", Limiter::read)?,
            tx_rate_limiter: table.read("tx_rate_limiter", Limiter::read)?,
        };
        card.spec().validate().map_err(|error| Error::new(node.at, error.to_string()))?;
        Ok(card)
    }

    /// The view of one that was described otherwise.
    pub fn of(index: usize, spec: &net::Spec) -> Self {
        let limiter = |of: fn(Directions) -> Option<Limit>| Limiter::of(spec.bw.and_then(of), spec.pps.and_then(of));
        Self {
            iface_id: spec.id.clone().unwrap_or_else(|| format!("eth{index}")),
            host_dev_name: spec.tap.clone().unwrap_or_default(),
            guest_mac: spec.mac,
            mtu: spec.mtu,
            rx_rate_limiter: limiter(|limits| limits.rx),
            tx_rate_limiter: limiter(|limits| limits.tx),
        }
    }

    /// The network card of a [`Config`](crate::config::Config).
    pub fn spec(&self) -> net::Spec {
        let rates = |limiter: &Option<Limiter>| limiter.as_ref().map(Limiter::rates).unwrap_or_default();
        let (rx, tx) = (rates(&self.rx_rate_limiter), rates(&self.tx_rate_limiter));
        net::Spec {
            id: Some(self.iface_id.clone()),
            tap: Some(self.host_dev_name.clone()),
            mac: self.guest_mac,
            mtu: self.mtu,
            bw: Directions::new(rx.bytes, tx.bytes),
            pps: Directions::new(rx.operations, tx.operations),
            ..net::Spec::default()
        }
    }

    /// As it is read.
    pub fn to_json(&self) -> Value {
        let mut json = json!({"iface_id": self.iface_id, "host_dev_name": self.host_dev_name});
        put(&mut json, "guest_mac", self.guest_mac.map(|mac| mac.to_string().into()));
        put(&mut json, "mtu", self.mtu.map(Value::from));
        put(&mut json, "rx_rate_limiter", self.rx_rate_limiter.as_ref().map(Limiter::to_json));
        put(&mut json, "tx_rate_limiter", self.tx_rate_limiter.as_ref().map(Limiter::to_json));
        json
    }
}

/// Reads a socket device.
pub fn read_vsock(node: &Node) -> Result<vsock::Spec, Error> {
    let table = node.table(&["guest_cid", "uds_path", "vsock_id"])?;
    table.text("vsock_id")?;
    let cid = table.number("guest_cid", 3, u64::from(u32::MAX) - 1)?.ok_or_else(|| table.missing("guest_cid"))?;
    let spec =
        vsock::Spec { cid: u32::try_from(cid).unwrap_or(u32::MAX), socket: required(&table, "uds_path")?.into() };
    spec.validate().map_err(|error| Error::new(node.at, error.to_string()))?;
    Ok(spec)
}

/// A socket device as it is read.
pub fn vsock_to_json(spec: &vsock::Spec) -> Value {
    json!({"guest_cid": spec.cid, "uds_path": spec.socket.to_string_lossy()})
}

/// Reads a random number device: its limits.
pub fn read_entropy(node: &Node) -> Result<Option<Limiter>, Error> {
    node.table(&["rate_limiter"])?.read("rate_limiter", Limiter::read)
}

/// Where the serial console is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Serial {
    /// The file that the guest's output goes to; else it is standard output.
    pub serial_out_path: Option<String>,
    /// How much of it there may be.
    pub rate_limiter: Option<Bucket>,
}

impl Serial {
    /// Reads it.
    pub fn read(node: &Node) -> Result<Self, Error> {
        let table = node.table(&["serial_out_path", "rate_limiter"])?;
        let rate_limiter = table.read("rate_limiter", Bucket::read)?;
        Ok(Self { serial_out_path: table.text("serial_out_path")?.map(str::to_owned), rate_limiter })
    }

    /// The console of a [`Config`](crate::config::Config).
    pub fn spec(&self) -> console::Spec {
        self.serial_out_path.as_ref().map_or(console::Spec::Stdio, |path| console::Spec::File(path.into()))
    }
}

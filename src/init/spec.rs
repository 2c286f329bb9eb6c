//! What bantam asks of the init: `KEY=VALUE` texts, each ended by a zero byte, in a file of the initramfs.

use alloc::ffi::CString;
use alloc::vec::Vec;

/// Where the command's root file system is.
#[derive(Debug, PartialEq, Eq)]
pub enum Root {
    /// The initramfs itself.
    Initramfs,
    /// The first disk, with a file system of this type, below a writable layer: of memory, or on the disk
    /// [`Spec::upper`].
    Overlay(CString),
    /// The first disk, with a file system of this type, written to.
    Writable(CString),
    /// The folder of the host with this tag, written to.
    Share(CString),
}

/// A folder of the host.
#[derive(Debug, PartialEq, Eq)]
pub struct Share {
    pub tag: CString,
    pub path: CString,
    pub readonly: bool,
}

/// The card in the user's network, and its surroundings.
#[derive(Debug, PartialEq, Eq)]
pub struct Network {
    /// The card's own address.
    pub card: [u8; 6],
    pub address: [u8; 4],
    pub prefix_length: u8,
    pub gateway: [u8; 4],
    pub name_server: [u8; 4],
}

impl Network {
    /// All of it as hexadecimal bytes.
    fn parse(text: &[u8]) -> Option<Self> {
        let mut bytes = bytes(text);
        let mut next = || bytes.next()?;
        Some(Self {
            card: [next()?, next()?, next()?, next()?, next()?, next()?],
            address: [next()?, next()?, next()?, next()?],
            prefix_length: next()?,
            gateway: [next()?, next()?, next()?, next()?],
            name_server: [next()?, next()?, next()?, next()?],
        })
    }
}

/// Bytes that are written as hexadecimal digits.
fn bytes(text: &[u8]) -> impl Iterator<Item = Option<u8>> {
    text.chunks(2).map(|digits| u8::from_str_radix(core::str::from_utf8(digits).ok()?, 16).ok())
}

/// What to do.
#[derive(Debug)]
pub struct Spec {
    pub root: Root,
    /// The disk that keeps what is changed.
    pub upper: Option<CString>,
    /// Kernel modules, in the order to load them.
    pub modules: Vec<CString>,
    pub shares: Vec<Share>,
    pub arguments: Vec<CString>,
    pub environment: Vec<CString>,
    pub folder: Option<CString>,
    /// `USER` or `USER:GROUP`, by name or number.
    pub user: Option<Vec<u8>>,
    pub host_name: Option<Vec<u8>>,
    pub network: Option<Network>,
    /// How many processes and threads the command may have.
    pub pids: Option<u32>,
    /// The command gets a terminal of this size: rows << 16 | columns.
    pub terminal: Option<u32>,
    /// The command is told when the guest is ready for it.
    pub waits: bool,
    /// For the guest to have random numbers of its own.
    pub seed: Vec<u8>,
}

impl Spec {
    /// Reads what bantam wrote; `None` if it cannot have.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let mut spec = Self {
            root: Root::Initramfs,
            upper: None,
            modules: Vec::new(),
            shares: Vec::new(),
            arguments: Vec::new(),
            environment: Vec::new(),
            folder: None,
            user: None,
            host_name: None,
            network: None,
            pids: None,
            terminal: None,
            waits: false,
            seed: Vec::new(),
        };
        spec.add(text)?;
        if spec.arguments.is_empty() && !spec.waits { None } else { Some(spec) }
    }

    /// Adds what bantam wrote; `None` if it cannot have.
    pub fn add(&mut self, text: &[u8]) -> Option<()> {
        let spec = self;
        for entry in text.split_inclusive(|byte| *byte == 0) {
            let entry = entry.strip_suffix(&[0])?;
            let equals = entry.iter().position(|byte| *byte == b'=')?;
            let (key, value) = (&entry[..equals], &entry[equals + 1..]);
            let string = CString::new(value).ok()?;
            match key {
                b"overlay" => spec.root = Root::Overlay(string),
                b"writable" => spec.root = Root::Writable(string),
                b"root-share" => spec.root = Root::Share(string),
                b"upper" => spec.upper = Some(string),
                b"module" => spec.modules.push(string),
                b"share" | b"share-ro" => {
                    let colon = value.iter().position(|byte| *byte == b':')?;
                    spec.shares.push(Share {
                        tag: CString::new(&value[..colon]).ok()?,
                        path: CString::new(&value[colon + 1..]).ok()?,
                        readonly: key == b"share-ro",
                    });
                }
                b"argument" => spec.arguments.push(string),
                b"environment" => spec.environment.push(string),
                b"folder" => spec.folder = Some(string),
                b"user" => spec.user = Some(value.into()),
                b"hostname" => spec.host_name = Some(value.into()),
                b"network" => spec.network = Some(Network::parse(value)?),
                b"pids" => spec.pids = Some(core::str::from_utf8(value).ok()?.parse().ok()?),
                b"terminal" => spec.terminal = core::str::from_utf8(value).ok()?.parse().ok(),
                b"wait" => spec.waits = true,
                b"seed" => spec.seed = bytes(value).collect::<Option<_>>()?,
                _ => return None,
            }
        }
        Some(())
    }

    /// The value of a variable in the command's environment.
    pub fn variable(&self, name: &str) -> Option<&[u8]> {
        let value = |variable: &'_ CString| -> Option<usize> {
            let rest = variable.to_bytes().strip_prefix(name.as_bytes())?;
            rest.first().is_some_and(|byte| *byte == b'=').then_some(name.len() + 1)
        };
        self.environment.iter().rev().find_map(|variable| Some(&variable.to_bytes()[value(variable)?..]))
    }
}

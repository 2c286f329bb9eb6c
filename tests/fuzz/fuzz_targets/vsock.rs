//! The socket device: its packets, and what happens at the host's ends.
#![no_main]

use std::cell::RefCell;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use bantam::virtio::device::VirtioDevice;
use bantam::virtio::mmio::Mmio;
use bantam::virtio::vsock::Spec;
use bantam_fuzz::device::{Device, run};
use bantam_fuzz::folder;
use bantam_fuzz::input::{self, Result, Unstructured};
use bantam_fuzz::memory::Memory;

const CID: u32 = 7;
/// Where something listens on the host.
const PORT: u32 = 5;

struct Socket {
    path: PathBuf,
    /// The host's ends.
    ends: Vec<UnixStream>,
    /// Some ports that were seen.
    ports: RefCell<Vec<u32>>,
}

thread_local! {
    /// What listens beside each of the device's sockets: those of two devices, one of which follows the other.
    static LISTENERS: [UnixListener; 2] = NAMES.map(|name| {
        let listener = UnixListener::bind(folder().join(format!("{name}_{PORT}"))).expect("a socket");
        listener.set_nonblocking(true).expect("a socket");
        listener
    });
}

const NAMES: [&str; 2] = ["one", "other"];

impl Socket {
    fn open(&self) -> Box<dyn VirtioDevice> {
        Box::new(Spec { cid: CID, socket: self.path.clone() }.open().expect("a socket"))
    }

    /// Takes the guest's connections.
    fn accept(&mut self) {
        let accept = |listeners: &[UnixListener; 2]| listeners.iter().find_map(|listener| listener.accept().ok());
        while let Some((stream, _)) = LISTENERS.with(accept) {
            stream.set_nonblocking(true).expect("a socket");
            self.ends.push(stream);
        }
    }
}

impl Device for Socket {
    fn new(_: &mut Unstructured) -> Result<(Self, Box<dyn VirtioDevice>)> {
        let mut socket = Self { path: folder().join(NAMES[0]), ends: vec![], ports: RefCell::default() };
        // Of an input before.
        socket.accept();
        socket.ends.clear();
        let device = socket.open();
        Ok((socket, device))
    }

    fn again(&mut self) -> Option<Box<dyn VirtioDevice>> {
        self.accept();
        self.ends.clear();
        let is_first = self.path.ends_with(NAMES[0]);
        self.path.set_file_name(NAMES[usize::from(is_first)]);
        Some(self.open())
    }

    fn request(&self, queue: u16, u: &mut Unstructured) -> Result<Vec<u8>> {
        if queue != 1 {
            return Ok(vec![]);
        }
        let data = if u.ratio(1, 2)? { input::bytes(u, 64)? } else { vec![0x76; u.int_in_range(0..=0x2000)?] };
        let guest = u.int_in_range(0..=3)?;
        let ports = self.ports.borrow();
        let host = match u.int_in_range(0..=3)? {
            0 if !ports.is_empty() => *u.choose(&ports)?,
            0 | 1 => 1 << 30 | u.int_in_range(0..=3)?,
            2 => PORT,
            _ => input::number(u)? as u32,
        };
        let cid = if u.ratio(15, 16)? { u64::from(CID) } else { u.arbitrary()? };
        let to = if u.ratio(15, 16)? { 2 } else { u.arbitrary()? };
        let len = if u.ratio(7, 8)? { data.len() as u32 } else { u.arbitrary()? };
        let kind: u16 = if u.ratio(15, 16)? { 1 } else { u.arbitrary()? };
        let op: u16 = u.int_in_range(0..=8)?;
        let flags: u32 = u.int_in_range(0..=4)?;
        let credit = if u.ratio(1, 2)? { 1 << 18 } else { input::number(u)? as u32 };
        let forwarded = input::number(u)? as u32;
        let mut packet = [cid.to_le_bytes(), u64::to_le_bytes(to)].concat();
        packet.extend([guest, host, len].map(u32::to_le_bytes).concat());
        packet.extend([kind, op].map(u16::to_le_bytes).concat());
        packet.extend([flags, credit, forwarded].map(u32::to_le_bytes).concat());
        packet.extend(data);
        Ok(packet)
    }

    fn host(&mut self, _: &mut Mmio, u: &mut Unstructured) -> Result<()> {
        self.accept();
        let kind = u.int_in_range(0..=6)?;
        if kind == 0 || self.ends.is_empty() {
            if self.ends.len() < 32
                && let Ok(mut stream) = UnixStream::connect(&self.path)
            {
                stream.set_nonblocking(true).expect("a socket");
                let line = match u.int_in_range(0..=3)? {
                    0 => input::bytes(u, 24)?,
                    port => format!("CONNECT {port}\n").into_bytes(),
                };
                let _ = stream.write(&line);
                self.ends.push(stream);
            }
            return Ok(());
        }
        let index = u.choose_index(self.ends.len())?;
        let end = &mut self.ends[index];
        match kind {
            1 | 2 => drop(end.write(&input::bytes(u, 64)?)),
            3 => drop(end.write(&vec![0x68; u.int_in_range(0..=0x8000)?])),
            4 => {
                let mut data = vec![0; 0x1_0000];
                let read = end.read(&mut data).unwrap_or(0);
                // The host's port is what a client is told at first.
                let text = String::from_utf8_lossy(&data[..read.min(20)]).into_owned();
                let port: Option<u32> = text.strip_prefix("OK ").and_then(|rest| rest.split('\n').next()?.parse().ok());
                self.ports.borrow_mut().extend(port);
            }
            5 => drop(end.shutdown(*u.choose(&[Shutdown::Read, Shutdown::Write, Shutdown::Both])?)),
            _ => drop(self.ends.swap_remove(index)),
        }
        Ok(())
    }

    /// To a port where nobody listens, of which nothing comes without a buffer.
    fn probe(&self) -> (u16, Vec<u8>, u32) {
        let mut packet = [u64::from(CID).to_le_bytes(), 2u64.to_le_bytes()].concat();
        packet.extend([1, 2, 0].map(u32::to_le_bytes).concat());
        packet.extend([1, 1].map(u16::to_le_bytes).concat());
        packet.extend([0; 12]);
        (1, packet, 0)
    }

    fn end(&mut self, _: &mut Mmio, _: &Memory) {
        self.accept();
        self.ends.clear();
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| run::<Socket>(data));

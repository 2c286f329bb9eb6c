//! The network device, on a socket in place of a tap or of passt.
#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::Arc;

use bantam::virtio::change::{Change, Rates};
use bantam::virtio::device::VirtioDevice;
use bantam::virtio::mmio::Mmio;
use bantam::virtio::net::{MacAddr, Net, Statistics, Tap};
use bantam_fuzz::device::{Device, run};
use bantam_fuzz::input::{self, Result, Unstructured};
use bantam_fuzz::memory::Memory;

/// The longest packet that there is, with its header.
const MAX_PACKET: usize = 12 + 18 + 65535;

enum Host {
    /// An end for each pair of queues.
    Tap(Vec<UnixDatagram>),
    Passt(UnixStream),
}

struct Card {
    host: Host,
    limited: bool,
    statistics: Arc<Statistics>,
    /// Packets that were dropped by the last look.
    drops: u64,
}

fn mac() -> MacAddr {
    "52:54:00:12:34:56".parse().expect("an address")
}

impl Card {
    /// A card on so many queues of a tap, or on passt if there are none.
    fn new(queues: usize) -> (Self, Net) {
        let (host, net) = if queues == 0 {
            let (net, host) = Net::on_stream(mac(), Some(1500));
            host.set_nonblocking(true).expect("a socket");
            (Host::Passt(host), net)
        } else {
            let pair = |_| {
                let (host, tap) = UnixDatagram::pair().expect("sockets");
                host.set_nonblocking(true).expect("a socket");
                tap.set_nonblocking(true).expect("a socket");
                (host, Tap::of_socket(tap))
            };
            let (hosts, taps) = (0..queues).map(pair).unzip();
            (Host::Tap(hosts), Net::on_taps(taps, mac()))
        };
        let statistics = net.statistics().clone();
        (Self { host, limited: false, statistics, drops: 0 }, net)
    }

    /// How many pairs of queues it has, where the driver says how many of them it uses.
    fn pairs(&self) -> Option<u16> {
        match &self.host {
            Host::Tap(hosts) if hosts.len() > 1 => Some(hosts.len() as u16),
            _ => None,
        }
    }

    fn limit(&mut self, mmio: &mut Mmio, limited: bool) {
        self.limited = limited;
        let operations = limited.then(|| "1/1h+3".parse().expect("a limit"));
        let rates = Some(Rates { bytes: None, operations });
        let changed = mmio.change(Change::NetRates { rx: rates, tx: rates });
        changed.recv().expect("an answer").expect("a timer");
    }

    /// Takes what the guest has sent.
    fn drain(&mut self) {
        let mut packet = vec![0; MAX_PACKET + 1];
        match &mut self.host {
            Host::Tap(hosts) => {
                for host in hosts {
                    while let Ok(len) = host.recv(&mut packet) {
                        assert!((12..=MAX_PACKET).contains(&len), "a packet of {len} bytes was sent");
                    }
                }
            }
            Host::Passt(host) => while host.read(&mut packet).is_ok_and(|len| len > 0) {},
        }
    }
}

impl Device for Card {
    fn new(u: &mut Unstructured) -> Result<(Self, Box<dyn VirtioDevice>)> {
        let kind: u8 = u.arbitrary()?;
        let (card, net) = Self::new(if kind & 1 == 1 { 0 } else { 1 + usize::from(kind >> 1 & 3) });
        Ok((card, Box::new(net)))
    }

    fn again(&mut self) -> Option<Box<dyn VirtioDevice>> {
        let (card, net) = Self::new(if let Host::Tap(hosts) = &self.host { hosts.len() } else { 0 });
        *self = card;
        Some(Box::new(net))
    }

    fn request(&self, queue: u16, u: &mut Unstructured) -> Result<Vec<u8>> {
        if let Some(pairs) = self.pairs().filter(|pairs| queue == 2 * pairs) {
            let pairs = if u.ratio(7, 8)? { u.int_in_range(1..=pairs)? } else { u.arbitrary()? };
            let mut command = [[4, 0], pairs.to_le_bytes()].concat();
            if u.ratio(1, 8)? {
                command = input::bytes(u, 8)?;
            }
            return Ok(command);
        }
        if queue % 2 == 0 {
            return Ok(vec![]);
        }
        let mut packet = if u.ratio(7, 8)? { vec![0; 12] } else { input::bytes(u, 12)? };
        packet.extend(input::bytes(u, 48)?);
        let long = if u.ratio(1, 8)? { u.int_in_range(0..=0x8000)? } else { u.int_in_range(0..=64)? };
        packet.resize(packet.len() + long, 0xee);
        Ok(packet)
    }

    fn answer(&self, request: &[u8], _: &mut Unstructured) -> Result<Option<Vec<u32>>> {
        // Packets are longer than commands.
        Ok((request.len() == 4).then(|| vec![1]))
    }

    fn host(&mut self, mmio: &mut Mmio, u: &mut Unstructured) -> Result<()> {
        let kind = u.int_in_range(0..=7)?;
        let len = *u.choose(&[0, 1, 11, 12, 13, 14, 60, 300, 1526, 9000, 65535, MAX_PACKET])?;
        let mut data = input::bytes(u, 32)?;
        match (kind, &mut self.host) {
            (0, _) => self.limit(mmio, u.arbitrary()?),
            (1, _) => self.drain(),
            (2, Host::Passt(host)) => drop(host.shutdown(std::net::Shutdown::Write)),
            (3, Host::Passt(host)) => drop(host.write(&data)),
            (_, Host::Tap(hosts)) => {
                data.resize(len, 0xaa);
                let _ = u.choose(hosts)?.send(&data);
            }
            (_, Host::Passt(host)) => {
                data.resize(len, 0xaa);
                let mut frame = (len as u32).to_be_bytes().to_vec();
                frame.extend(data);
                let _ = host.write(&frame);
            }
        }
        Ok(())
    }

    fn underestimates(&mut self) -> bool {
        let before = std::mem::replace(&mut self.drops, self.statistics.rx_drops.get());
        self.drops > before
    }

    fn probe(&self) -> (u16, Vec<u8>, u32) {
        (1, vec![0; 12 + 60], 0)
    }

    fn end(&mut self, mmio: &mut Mmio, _: &Memory) {
        self.limit(mmio, false);
        self.drain();
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| run::<Card>(data));

//! The network device: virtio 1.2, section 5.1, on a [`Tap`] or on [`passt`].
//!
//! Packets of a tap are read and written in the guest's own buffers, without a copy; checksums and segmentation are left
//! to whoever ends up needing them, as the header in front of each packet says (`IFF_VNET_HDR`). When one side is slow
//! the other is held up rather than packets dropped: with no receive buffers, packets stay with the host; when that takes
//! no more, they stay in the transmit ring.

mod host;
mod mac;
pub mod passt;
mod publish;
mod rx;
mod stream;
pub mod tap;
#[cfg(test)]
mod tests;
mod tx;
pub mod vhost;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use rustix::event::epoll::EventFlags;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::*;

pub use mac::{BadMac, MacAddr};
pub use publish::{BadPublish, Publish};
pub use tap::Tap;

use self::host::Backend;
use self::passt::Passt;
use self::rx::Rx;
use self::tap::offload;
use self::tx::Tx;
use self::vhost::Vhost;
use super::change::{self, Change, Rates};
use super::device::{self, Io, VirtioDevice};
use super::iovec::{self, Iovecs};
use super::queue::{Chain, INTERRUPT_USED_RING};
use super::rate_limiter::RateLimiter;
use crate::limit::{Directions, Limit};
use crate::metrics::{Counter, Metrics};

/// Index of the queue of receive buffers.
const RX: usize = 0;
/// Index of the queue of packets to transmit.
const TX: usize = 1;
/// Descriptors of each queue.
const QUEUE_SIZE: u16 = 256;
/// Length in bytes of the header before each packet: with VERSION_1 always that with `num_buffers` (5.1.6).
const HEADER: usize = 12;
/// Length in bytes of the longest packet, with its header: an Ethernet frame with a VLAN tag and 65535 bytes in it.
const MAX_PACKET: usize = HEADER + 18 + 65535;
/// The most packets moved in one go, so that both directions have their turn and the device can be stopped.
const BATCH: u32 = 64;
/// What the host's end is watched as.
const HOST: u32 = 0;
/// What the timers of the queues' rate limits are watched as.
const LIMITS: [u32; 2] = [1, 2];
/// What vhost is watched as: interrupts for the driver, and rings that are broken.
const VHOST: [u32; 2] = [3, 4];
/// Where the status is in the configuration, and the link's bit of it.
const CONFIG_STATUS: usize = 6;
const LINK_UP: u8 = 1;

/// A network interface to be made. Exactly one of `tap`, `fd` and `user` is given.
///
/// ```
/// use bantam::virtio::net::Spec;
/// let spec: Spec = serde_json::from_str(r#"{"tap": "tap0", "mac": "52:54:00:12:34:56"}"#)?;
/// assert_eq!(spec.tap.as_deref(), Some("tap0"));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "NetworkCard"))]
pub struct Spec {
    /// The name of a tap. If there is none it is created, when that is permitted, and set up; it vanishes with the
    /// device. `ip tuntap add dev NAME mode tap user $USER` makes one that stays, for a user without privileges.
    pub tap: Option<String>,
    /// The number of an open descriptor of a tap, which the device takes over.
    pub fd: Option<RawFd>,
    /// Whether the guest's network is made of connections of this user, by [`passt`].
    pub user: bool,
    /// Ports of the host that lead to the guest; only with `user`.
    pub publish: Vec<Publish>,
    /// The guest's address. Without it, one that is always the same for the tap's name: choose it for guests of
    /// several hosts on one Ethernet.
    pub mac: Option<MacAddr>,
    /// The most bytes in a frame that the guest is told to send, and that a tap created here takes: 68 to 65521, with
    /// `user` 65520 at most, which it also is without a wish.
    pub mtu: Option<u16>,
    /// How many bytes of frames may go in each direction.
    pub bw: Option<Directions>,
    /// How many frames may go in each direction.
    pub pps: Option<Directions>,
    /// Whether the host's kernel moves the packets (vhost-net); without a wish, it does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vhost: Option<vhost::Mode>,
    /// Its name in Firecracker's API; `eth0`, `eth1`, ... without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}

/// Why there is no network device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither a tap's name nor a descriptor nor the user's network, or more than one.
    #[error("cannot choose what the network device is on: give either tap=NAME, fd=N or user")]
    OneHost,
    /// An MTU that there cannot be.
    #[error("mtu={mtu} cannot be used: it must be 68 to {max} bytes")]
    Mtu {
        /// What was asked for.
        mtu: u16,
        /// The largest.
        max: u16,
    },
    /// Ports with a network that has its own addresses.
    #[error("cannot publish port {0}: only a user network has published ports")]
    Publish(Publish),
    /// vhost-net with what passes it by.
    #[error("cannot use vhost-net with {0}: say vhost=off, or leave vhost=on away")]
    Vhost(&'static str),
    /// There is no vhost-net.
    #[error(
        "cannot open /dev/vhost-net, for vhost=on{}",
        if .0.kind() == io::ErrorKind::NotFound { " (`sudo modprobe vhost_net` makes it)" } else { "" }
    )]
    NoVhost(#[source] io::Error),
    /// The rate cannot be limited.
    #[error("cannot make a timer for the network device's rate limit")]
    Timer(#[source] io::Error),
    /// passt does not run.
    #[error(transparent)]
    Passt(#[from] passt::Error),
    /// There is no tap to work with.
    #[error(transparent)]
    Tap(#[from] tap::Error),
}

impl Spec {
    /// Checks what can be checked without opening anything.
    pub fn validate(&self) -> Result<(), Error> {
        let max = if self.user { passt::MTU } else { 65521 };
        let hosts = [self.tap.is_some(), self.fd.is_some(), self.user];
        match (self.mtu, self.publish.first()) {
            _ if hosts.iter().filter(|given| **given).count() != 1 => Err(Error::OneHost),
            (Some(mtu), _) if !(68..=max).contains(&mtu) => Err(Error::Mtu { mtu, max }),
            (_, Some(port)) if !self.user => Err(Error::Publish(*port)),
            _ if self.vhost() != vhost::Mode::On => Ok(()),
            _ if self.user => Err(Error::Vhost("a user network")),
            _ if self.is_limited() => Err(Error::Vhost("limits of its rates (bw, pps)")),
            _ => Ok(()),
        }
    }

    fn vhost(&self) -> vhost::Mode {
        self.vhost.unwrap_or_default()
    }

    fn is_limited(&self) -> bool {
        self.bw.is_some() || self.pps.is_some()
    }

    /// The guest's address in a user network.
    pub fn user_mac(&self) -> Option<MacAddr> {
        self.user.then(|| self.mac.unwrap_or_else(|| MacAddr::from_name("user")))
    }

    /// Opens the tap, or starts passt, and makes the device. Whether passt has its ports is known when the device
    /// [is ready](Net::wait_until_ready).
    pub fn open(&self) -> Result<Net, Error> {
        self.validate()?;
        let limit = |of: fn(Directions) -> Option<Limit>| {
            let rates = Rates { bytes: self.bw.and_then(of), operations: self.pps.and_then(of) };
            RateLimiter::new(rates).map_err(Error::Timer)
        };
        let limits = [limit(|limits| limits.rx)?, limit(|limits| limits.tx)?];
        Ok(Net { limits, ..self.open_unlimited()? })
    }

    fn open_unlimited(&self) -> Result<Net, Error> {
        let tap = match (&self.tap, self.fd, self.user_mac()) {
            (Some(name), ..) => Tap::open(name)?,
            (_, Some(fd), _) => Tap::from_fd(fd)?,
            (_, _, Some(mac)) => {
                let mtu = self.mtu.unwrap_or(passt::MTU);
                let passt = Passt::start(&self.publish, mac, mtu)?;
                return Ok(Net::with(Backend::User(passt), mac, Some(mtu)));
            }
            _ => return Err(Error::OneHost),
        };
        if let Some(mtu) = self.mtu
            && tap.created()
        {
            tap.set_mtu(mtu)?;
        }
        // Behind the tap, whose descriptor may be told by a number that is free.
        let needs_vhost = self.vhost() == vhost::Mode::On;
        let vhost = match self.vhost() {
            vhost::Mode::On => Some(Vhost::open().map_err(Error::NoVhost)?),
            vhost::Mode::Auto if !self.is_limited() => {
                Vhost::open().inspect_err(|error| log::debug!("no vhost-net for a network card: {error}")).ok()
            }
            _ => None,
        };
        let mac = self.mac.unwrap_or_else(|| MacAddr::from_name(tap.name()));
        Ok(Net { vhost, needs_vhost, ..Net::new(tap, mac, self.mtu) })
    }
}

/// What a network device did.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Statistics {
    /// Packets given to the guest.
    pub rx_packets: Counter,
    /// Their bytes, without headers.
    pub rx_bytes: Counter,
    /// Packets that were longer than any buffer the driver gave, or came when the device was stopped.
    pub rx_drops: Counter,
    /// Failed reads from the host.
    pub rx_errors: Counter,
    /// How often receiving stopped because the driver had given no buffers.
    pub rx_stops: Counter,
    /// How often receiving waited for the rate limit.
    pub rx_throttled: Counter,
    /// Packets taken from the guest.
    pub tx_packets: Counter,
    /// Their bytes, without headers.
    pub tx_bytes: Counter,
    /// Packets that the host refused.
    pub tx_drops: Counter,
    /// Requests that were no packet.
    pub tx_errors: Counter,
    /// How often transmitting stopped because the host took no more.
    pub tx_stops: Counter,
    /// How often transmitting waited for the rate limit.
    pub tx_throttled: Counter,
}

/// A network device.
pub struct Net {
    host: Backend,
    features: u64,
    config: [u8; 12],
    /// The offloads that a tap's packets may have.
    offloads: u32,
    /// Moves the packets, if it is there.
    vhost: Option<Vhost>,
    /// Whether nothing else may.
    needs_vhost: bool,
    /// What the driver negotiated.
    negotiated: u64,
    /// Of each queue, by its index.
    limits: [Option<RateLimiter>; 2],
    statistics: Arc<Statistics>,
    running: Option<Running>,
}

/// What there is only between start and stop.
struct Running {
    rx: Rx,
    rx_wait: Wait,
    tx: Tx,
    tx_wait: Wait,
    watched: EventFlags,
}

/// Whose turn it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wait {
    /// The host has to become readable or writable.
    Host,
    /// The driver has to make something available.
    Driver,
    /// The rate limit has to allow more.
    Limit,
}

/// The feature bit of each offload, of packets to the guest (`GUEST_`) and from it (`HOST_`, CSUM).
const OFFLOADS: [(u32, u32, u32); 5] = [
    (offload::CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_CSUM),
    (offload::TSO4, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_HOST_TSO4),
    (offload::TSO6, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_TSO6),
    (offload::ECN, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_HOST_ECN),
    (offload::UFO, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_HOST_UFO),
];

/// The bits that have to be there for others to be used (5.1.3.1), as far as the tap insists.
fn guest_offloads(features: u64) -> u32 {
    let mut offloads = OFFLOADS
        .iter()
        .filter(|(_, guest, _)| features & (1 << guest) != 0)
        .fold(0, |offloads, (offload, ..)| offloads | offload);
    if offloads & offload::CSUM == 0 {
        offloads = 0;
    }
    if offloads & (offload::TSO4 | offload::TSO6) == 0 {
        offloads &= !offload::ECN;
    }
    offloads
}

impl Net {
    /// A network device on `tap`, whose guest has the address `mac` and is told of the `mtu`, if there is one.
    pub fn new(tap: Tap, mac: MacAddr, mtu: Option<u16>) -> Self {
        Self::with(Backend::Tap(tap), mac, mtu)
    }

    /// A network device on passt, of which the caller has the end.
    #[cfg(fuzzing)]
    pub fn on_stream(mac: MacAddr, mtu: Option<u16>) -> (Self, std::os::unix::net::UnixStream) {
        let (passt, theirs) = Passt::in_test();
        (Self::with(Backend::User(passt), mac, mtu), theirs)
    }

    fn with(host: Backend, mac: MacAddr, mtu: Option<u16>) -> Self {
        let known = if let Backend::Tap(tap) = &host { tap.offloads() } else { 0 };
        let mut features = 1 << VIRTIO_NET_F_MRG_RXBUF | 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS;
        for (offload, guest, host) in OFFLOADS {
            if known & offload != 0 {
                features |= 1 << guest | 1 << host;
            }
        }
        // struct virtio_net_config (5.1.4): mac, status, max_virtqueue_pairs, mtu.
        let mut config = [0; 12];
        config[..6].copy_from_slice(&mac.bytes());
        config[CONFIG_STATUS] = LINK_UP;
        config[8] = 1;
        if let Some(mtu) = mtu {
            features |= 1 << VIRTIO_NET_F_MTU;
            config[10..].copy_from_slice(&mtu.to_le_bytes());
        }
        Self {
            host,
            features,
            config,
            offloads: 0,
            vhost: None,
            needs_vhost: false,
            negotiated: 0,
            limits: [None, None],
            statistics: Arc::default(),
            running: None,
        }
    }

    /// Waits until what it is on is ready; a tap is at once. What passt says from then on is to be
    /// [passed on](passt::Messages::pass_on).
    ///
    /// # Errors
    /// When passt could not do what it was started for.
    pub fn wait_until_ready(&mut self) -> Result<Option<passt::Messages>, Error> {
        match &mut self.host {
            Backend::Tap(_) => Ok(None),
            Backend::User(passt) => Ok(passt.wait_until_ready()?),
        }
    }

    /// What it did so far.
    pub fn statistics(&self) -> &Arc<Statistics> {
        &self.statistics
    }

    fn set_rates(&mut self, rates: [Option<Rates>; 2], io: Option<&mut Io>) -> io::Result<()> {
        let [rx, tx] = rates.map(|rates| rates.map(RateLimiter::new).transpose());
        let mut limits = [rx?, tx?];
        if let Some(io) = io {
            for (limit, token) in limits.iter().zip(LIMITS) {
                limit.iter().flatten().try_for_each(|limit| io.watch(token, limit, EventFlags::IN))?;
            }
            for index in [RX, TX].into_iter().filter(|index| limits[*index].is_some()) {
                if let Some(before) = &self.limits[index] {
                    io.unwatch(before)?;
                }
                // What waited for the last limit has another look.
                let running = self.running.as_mut();
                let wait = running.map(|running| if index == RX { &mut running.rx_wait } else { &mut running.tx_wait });
                if let (Some(wait), Some((_, queue))) = (wait.filter(|wait| **wait == Wait::Limit), io.queue(index)) {
                    *wait = Wait::Driver;
                    queue.kick_again();
                }
            }
        }
        for (limit, new) in self.limits.iter_mut().zip(&mut limits) {
            new.take().into_iter().for_each(|new| *limit = new);
        }
        Ok(())
    }

    fn receive(&mut self, io: &mut Io) -> Result<(), device::Error> {
        if let (Some(running), Some((ram, queue))) = (&mut self.running, io.queue(RX)) {
            running.rx_wait = running.rx.run(&mut self.host, ram, queue, &mut self.limits[RX], &self.statistics)?;
        }
        self.watch(io)
    }

    fn transmit(&mut self, io: &mut Io) -> Result<(), device::Error> {
        if let (Some(running), Some((ram, queue))) = (&mut self.running, io.queue(TX)) {
            running.tx_wait = running.tx.run(&mut self.host, ram, queue, &mut self.limits[TX], &self.statistics)?;
        }
        self.watch(io)
    }

    /// Has the host's kernel move the packets, or moves them itself.
    fn run(&mut self, io: &mut Io) -> Result<(), device::Error> {
        let (Backend::Tap(tap), Some(vhost)) = (&self.host, &mut self.vhost) else { return self.run_here(io) };
        match vhost.attach(tap, self.negotiated, VHOST, io) {
            Ok(()) => Ok(()),
            Err(error) if self.needs_vhost => {
                Err(device::Error::Host { what: format!("cannot start vhost-net on {}", self.host), source: error })
            }
            Err(error) => {
                log::warn!("cannot start vhost-net on {}, which is slower without: {error}", self.host);
                self.do_without_vhost(io)
            }
        }
    }

    /// Moves the packets itself from now on.
    fn do_without_vhost(&mut self, io: &mut Io) -> Result<(), device::Error> {
        let Some(mut vhost) = self.vhost.take() else { return Ok(()) };
        vhost.detach(io)?;
        self.run_here(io)?;
        let what = || format!("cannot watch the queues of {}", self.host);
        Vhost::give_kicks_back(io).map_err(|source| device::Error::Host { what: what(), source })?;
        // One that vhost was about to make may be lost.
        io.interrupt.raise(INTERRUPT_USED_RING);
        Ok(())
    }

    fn run_here(&mut self, io: &mut Io) -> Result<(), device::Error> {
        let rx_wait = if io.queue(RX).is_some() { Wait::Host } else { Wait::Driver };
        self.running = Some(Running {
            rx: Rx::new(&io.ram, self.negotiated & (1 << VIRTIO_NET_F_MRG_RXBUF) != 0),
            rx_wait,
            tx: Tx::new(&io.ram),
            tx_wait: Wait::Driver,
            watched: EventFlags::empty(),
        });
        for (limit, token) in self.limits.iter().zip(LIMITS) {
            limit.as_ref().map_or(Ok(()), |limit| limit.watch(token, io))?;
        }
        self.watch(io)
    }

    /// Watches the host for what is waited for.
    fn watch(&mut self, io: &mut Io) -> Result<(), device::Error> {
        let gone = self.host.is_gone();
        if gone && self.config[CONFIG_STATUS] & LINK_UP != 0 {
            log::warn!("passt has ended: the guest's user network is gone, and its card has no link");
            self.config[CONFIG_STATUS] &= !LINK_UP;
            io.interrupt.change_config(&self.config);
            // What waits to be sent is dropped as all that follows is, not kept for ever.
            if let (Some(running), Some((_, queue))) = (&mut self.running, io.queue(TX))
                && running.tx_wait == Wait::Host
            {
                running.tx_wait = Wait::Driver;
                queue.kick_again();
            }
        }
        let Some(running) = &mut self.running else { return Ok(()) };
        let mut wanted = EventFlags::empty();
        wanted.set(EventFlags::IN, running.rx_wait == Wait::Host && !gone);
        wanted.set(EventFlags::OUT, running.tx_wait == Wait::Host && !gone);
        if wanted == running.watched {
            return Ok(());
        }
        // Watched for nothing, it would still report errors, over and over.
        let result = if wanted.is_empty() { io.unwatch(&self.host) } else { io.watch(HOST, &self.host, wanted) };
        result.map_err(|source| device::Error::Host { what: format!("cannot watch {}", self.host), source })?;
        running.watched = wanted;
        Ok(())
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn metrics(&self) -> Arc<dyn Metrics> {
        self.statistics.clone()
    }

    fn start(&mut self, features: u64, io: &mut Io) -> Result<(), device::Error> {
        let offloads = guest_offloads(features);
        if let Backend::Tap(tap) = &self.host {
            tap.set_offloads(offloads).map_err(|error| device::Error::Host {
                what: format!("cannot start the network device on {}", self.host),
                source: io::Error::other(error),
            })?;
            if self.offloads & !offloads != 0 {
                // Packets that came for the last driver may be such as this one does not take (5.1.6.4.1).
                self.statistics.rx_drops.add(tap.discard());
            }
        }
        self.offloads = offloads;
        self.negotiated = features;
        self.run(io)
    }

    fn queue_ready(&mut self, index: usize, io: &mut Io) -> Result<(), device::Error> {
        if self.vhost.as_ref().is_some_and(|vhost| !vhost.is_attached()) {
            // The device goes on after a pause.
            return self.run(io);
        }
        // While the host is waited for, there is nothing to do for the driver.
        match (&self.running, index) {
            (Some(Running { rx_wait: Wait::Driver, .. }), RX) => self.receive(io),
            (Some(Running { tx_wait: Wait::Driver, .. }), TX) => self.transmit(io),
            _ => Ok(()),
        }
    }

    fn change(&mut self, change: &Change, io: Option<&mut Io>) -> Result<(), change::Error> {
        match change {
            Change::NetRates { rx, tx } => {
                let rates = [*rx, *tx];
                let mut io = io;
                if self.vhost.is_some() && rates.iter().flatten().any(|rates| *rates != Rates::default()) {
                    if self.needs_vhost {
                        return Err(change::Error::Vhost);
                    }
                    match &mut io {
                        Some(io) => self.do_without_vhost(io).map_err(change::Error::Device)?,
                        None => self.vhost = None,
                    }
                }
                self.set_rates(rates, io).map_err(change::Error::Timer)
            }
            other => Err(other.unsupported()),
        }
    }

    fn host_ready(&mut self, token: u32, io: &mut Io) -> Result<(), device::Error> {
        match VHOST.iter().position(|vhost| *vhost == token) {
            Some(0) => {
                io.interrupt.raise(INTERRUPT_USED_RING);
                return Ok(());
            }
            Some(_) => {
                // Until a reset nobody is to work on the queues.
                if let Some(Err(error)) = self.vhost.as_mut().map(|vhost| vhost.detach(io)) {
                    log::debug!("{}: {error}", self.host);
                }
                let source = io::Error::other("its driver broke a virtqueue");
                return Err(device::Error::Host { what: "vhost-net has stopped".into(), source });
            }
            None => {}
        }
        let limited = LIMITS.iter().position(|limit| *limit == token);
        if let Some(limit) = limited.and_then(|index| self.limits[index].as_mut()) {
            limit.woken();
        }
        let wait = if limited.is_some() { Wait::Limit } else { Wait::Host };
        let turn = |index| limited.is_none_or(|limited| limited == index);
        if turn(RX) && self.running.as_ref().is_some_and(|running| running.rx_wait == wait) {
            self.receive(io)?;
        }
        if turn(TX) && self.running.as_ref().is_some_and(|running| running.tx_wait == wait) {
            self.transmit(io)?;
        }
        Ok(())
    }

    fn pause(&mut self, io: &mut Io) -> Result<(), device::Error> {
        if let Some(vhost) = self.vhost.as_mut().filter(|vhost| vhost.is_attached()) {
            vhost.detach(io)?;
            // One that vhost was about to make may be lost.
            io.interrupt.raise(INTERRUPT_USED_RING);
        }
        Ok(())
    }

    fn settle(&mut self, io: &mut Io) {
        if let (Some(running), Some((_, queue))) = (&mut self.running, io.queue(RX)) {
            running.rx.stop(queue, &self.statistics);
        }
    }

    fn stop(&mut self, io: &mut Io) {
        if let Some(vhost) = &mut self.vhost
            && let Err(error) = vhost.detach(io)
        {
            log::debug!("{}: {error}", self.host);
        }
        let Some(mut running) = self.running.take() else { return };
        self.limits.iter().flatten().for_each(|limit| limit.unwatch(io));
        if !running.watched.is_empty()
            && let Err(error) = io.unwatch(&self.host)
        {
            log::error!("cannot stop watching {}: {error}", self.host);
        }
        if let Some((_, queue)) = io.queue(RX) {
            running.rx.stop(queue, &self.statistics);
        }
    }
}

/// Why a chain cannot be used.
enum Reject {
    /// The list of buffers is full.
    Full,
    /// The driver broke a rule: of 2.7.5, or of the queue's direction.
    Malformed,
}

/// Adds the buffers of `chain` to `iovecs`; their length together. All must be `writable`, or none.
fn push_chain(iovecs: &mut Iovecs, chain: Chain<'_>, writable: bool, queue_size: u16) -> Result<usize, Reject> {
    let before = iovecs.bytes();
    // A chain that is cut short (a loop, a table outside memory) ends with a descriptor that has a next one.
    let mut whole = false;
    for (count, descriptor) in chain.enumerate() {
        if count >= usize::from(queue_size) || descriptor.is_write_only() != writable {
            return Err(Reject::Malformed);
        }
        iovecs.push(descriptor.addr(), descriptor.len()).map_err(|error| match error {
            iovec::Error::Full => Reject::Full,
            iovec::Error::Address { .. } => Reject::Malformed,
        })?;
        whole = !descriptor.has_next();
    }
    if whole { Ok(iovecs.bytes() - before) } else { Err(Reject::Malformed) }
}

/// Whether the tap itself is no more.
fn gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBADFD | libc::ENODEV))
}

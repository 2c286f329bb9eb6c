//! The network device: virtio 1.2, section 5.1, on a [`Tap`] or on [`passt`].
//!
//! Packets of a tap are read and written in the guest's own buffers, without a copy; checksums and segmentation are left
//! to whoever ends up needing them, as the header in front of each packet says (`IFF_VNET_HDR`). When one side is slow
//! the other is held up rather than packets dropped: with no receive buffers, packets stay with the host; when that takes
//! no more, they stay in the transmit ring.
//!
//! A card may have several pairs of queues, of which the driver says by the control queue how many it uses (5.1.6.5.6). Each
//! has a queue of the tap for itself.

mod host;
mod mac;
mod pair;
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
use vm_memory::Bytes;

pub use mac::{BadMac, MacAddr};
pub use publish::{BadPublish, Publish};
pub use tap::Tap;

use self::host::Backend;
use self::pair::{Common, Pair, RX, TX};
use self::passt::Passt;
use self::tap::offload;
use self::vhost::Vhost;
use super::change::{self, Change, Rates};
use super::device::{self, Io, VirtioDevice};
use super::iovec::{self, Iovecs};
use super::layout::Layout;
use super::queue::Chain;
use super::rate_limiter::RateLimiter;
use crate::limit::{Directions, Limit};
use crate::memory::GuestRam;
use crate::metrics::{Counter, Metrics};

/// The most pairs of queues that a card has.
pub const QUEUES_MAX: u16 = 16;
/// Descriptors of each queue.
const QUEUE_SIZE: u16 = 256;
/// Descriptors of the control queue.
const CONTROL_SIZE: u16 = 64;
/// Length in bytes of the header before each packet: with VERSION_1 always that with `num_buffers` (5.1.6).
const HEADER: usize = 12;
/// Length in bytes of the longest packet, with its header: an Ethernet frame with a VLAN tag and 65535 bytes in it.
const MAX_PACKET: usize = HEADER + 18 + 65535;
/// The most packets moved in one go, so that both directions have their turn and the device can be stopped.
const BATCH: u32 = 64;
/// What the timers of the rate limits are watched as, beside what [pairs](Pair) have.
const LIMITS: [u32; 2] = [u32::MAX - 1, u32::MAX];
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
    /// How many pairs of queues it has, 1 to [`QUEUES_MAX`], each with a queue of the tap's; without a wish, one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(range(min = 1, max = QUEUES_MAX)))]
    pub queues: Option<u16>,
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
    /// More queues than there can be, or none.
    #[error("queues={0} cannot be used: it must be 1 to {QUEUES_MAX}")]
    Queues(u16),
    /// Several queues with what has one.
    #[error("cannot use queues={queues} with {on}, which has one: say queues=1, or leave it away")]
    OneQueue {
        /// What was asked for.
        queues: u16,
        /// What the network device is on.
        on: &'static str,
    },
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
            _ if !(1..=QUEUES_MAX).contains(&self.queues()) => Err(Error::Queues(self.queues())),
            _ if self.queues() > 1 && self.tap.is_none() => {
                let on = if self.user { "a user network" } else { "a tap that is given by its descriptor" };
                Err(Error::OneQueue { queues: self.queues(), on })
            }
            _ if self.vhost() != vhost::Mode::On => Ok(()),
            _ if self.user => Err(Error::Vhost("a user network")),
            _ if self.is_limited() => Err(Error::Vhost("limits of its rates (bw, pps)")),
            _ => Ok(()),
        }
    }

    fn vhost(&self) -> vhost::Mode {
        self.vhost.unwrap_or_default()
    }

    fn queues(&self) -> u16 {
        self.queues.unwrap_or(1)
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
        let mut net = self.open_unlimited()?;
        net.common.limits = limits;
        Ok(net)
    }

    fn open_unlimited(&self) -> Result<Net, Error> {
        let taps = match (&self.tap, self.fd, self.user_mac()) {
            (Some(name), ..) => Tap::open(name, self.queues())?,
            (_, Some(fd), _) => vec![Tap::from_fd(fd)?],
            (_, _, Some(mac)) => {
                let mtu = self.mtu.unwrap_or(passt::MTU);
                let passt = Passt::start(&self.publish, mac, mtu)?;
                return Ok(Net::with(vec![Backend::User(passt)], mac, Some(mtu)));
            }
            _ => return Err(Error::OneHost),
        };
        let tap = &taps[0];
        if let Some(mtu) = self.mtu
            && tap.created()
        {
            tap.set_mtu(mtu)?;
        }
        let mac = self.mac.unwrap_or_else(|| MacAddr::from_name(tap.name()));
        let mut net = Net::with(taps.into_iter().map(Backend::Tap).collect(), mac, self.mtu);
        net.common.needs_vhost = self.vhost() == vhost::Mode::On;
        // Behind the tap, whose descriptor may be told by a number that is free.
        for pair in &mut net.pairs {
            pair.vhost = match self.vhost() {
                vhost::Mode::On => Some(Vhost::open().map_err(Error::NoVhost)?),
                vhost::Mode::Auto if !self.is_limited() => {
                    Vhost::open().inspect_err(|error| log::debug!("no vhost-net for a network card: {error}")).ok()
                }
                _ => None,
            };
        }
        Ok(net)
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
    pairs: Vec<Pair>,
    /// How many of them the driver uses, from the first one on.
    in_use: usize,
    /// Which of them is the first when a limit allows more, for each direction.
    turns: [usize; 2],
    common: Common,
    features: u64,
    config: [u8; 12],
    queue_sizes: Box<[u16]>,
    /// The offloads that a tap's packets may have.
    offloads: u32,
    /// The command of the driver that is being done.
    layout: Layout,
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
        Self::with(vec![Backend::Tap(tap)], mac, mtu)
    }

    /// A network device with a pair of queues for each of these.
    #[cfg(fuzzing)]
    pub fn on_taps(taps: Vec<Tap>, mac: MacAddr) -> Self {
        Self::with(taps.into_iter().map(Backend::Tap).collect(), mac, None)
    }

    /// A network device on passt, of which the caller has the end.
    #[cfg(fuzzing)]
    pub fn on_stream(mac: MacAddr, mtu: Option<u16>) -> (Self, std::os::unix::net::UnixStream) {
        let (passt, theirs) = Passt::in_test();
        (Self::with(vec![Backend::User(passt)], mac, mtu), theirs)
    }

    fn with(hosts: Vec<Backend>, mac: MacAddr, mtu: Option<u16>) -> Self {
        let known = if let Backend::Tap(tap) = &hosts[0] { tap.offloads() } else { 0 };
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
        config[8..10].copy_from_slice(&u16::try_from(hosts.len()).expect("no more than QUEUES_MAX").to_le_bytes());
        if let Some(mtu) = mtu {
            features |= 1 << VIRTIO_NET_F_MTU;
            config[10..].copy_from_slice(&mtu.to_le_bytes());
        }
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * hosts.len()];
        if hosts.len() > 1 {
            features |= 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;
            queue_sizes.push(CONTROL_SIZE);
        }
        let pairs = hosts.into_iter().enumerate().map(|(index, host)| Pair::new(index, host, None)).collect();
        Self {
            pairs,
            in_use: 1,
            turns: [0; 2],
            common: Common::default(),
            features,
            config,
            queue_sizes: queue_sizes.into(),
            offloads: 0,
            layout: Layout::default(),
        }
    }

    /// Waits until what it is on is ready; a tap is at once. What passt says from then on is to be
    /// [passed on](passt::Messages::pass_on).
    ///
    /// # Errors
    /// When passt could not do what it was started for.
    pub fn wait_until_ready(&mut self) -> Result<Option<passt::Messages>, Error> {
        match &mut self.pairs[0].host {
            Backend::Tap(_) => Ok(None),
            Backend::User(passt) => Ok(passt.wait_until_ready()?),
        }
    }

    /// What it did so far.
    pub fn statistics(&self) -> &Arc<Statistics> {
        &self.common.statistics
    }

    fn set_rates(&mut self, rates: [Option<Rates>; 2], io: Option<&mut Io>) -> io::Result<()> {
        let [rx, tx] = rates.map(|rates| rates.map(RateLimiter::new).transpose());
        let mut limits = [rx?, tx?];
        if let Some(io) = io {
            for (limit, token) in limits.iter().zip(LIMITS) {
                limit.iter().flatten().try_for_each(|limit| io.watch(token, limit, EventFlags::IN))?;
            }
            for direction in [RX, TX].into_iter().filter(|direction| limits[*direction].is_some()) {
                if let Some(before) = &self.common.limits[direction] {
                    io.unwatch(before)?;
                }
                // What waited for the last limit.
                self.pairs.iter_mut().for_each(|pair| pair.look_again(direction, Wait::Limit, io));
            }
        }
        for (limit, new) in self.common.limits.iter_mut().zip(&mut limits) {
            new.take().into_iter().for_each(|new| *limit = new);
        }
        Ok(())
    }

    /// Has the host's kernel move packets no more.
    fn do_without_vhost(&mut self, mut io: Option<&mut Io>) -> Result<(), device::Error> {
        for (index, pair) in self.pairs.iter_mut().enumerate() {
            match &mut io {
                Some(io) => {
                    if pair.leave_vhost(io)? && index < self.in_use {
                        pair.run(&self.common, io)?;
                    }
                }
                None => pair.vhost = None,
            }
        }
        Ok(())
    }

    fn negotiated(&self, feature: u32) -> bool {
        self.common.negotiated & 1 << feature != 0
    }

    /// Which queue is the control queue (5.1.2), if there is one.
    fn control_queue(&self) -> Option<usize> {
        let pairs = if self.negotiated(VIRTIO_NET_F_MQ) { self.pairs.len() } else { 1 };
        self.negotiated(VIRTIO_NET_F_CTRL_VQ).then_some(2 * pairs)
    }

    /// Does one command of the driver. What comes after it waits for its turn, as a command takes the host some time.
    fn control(&mut self, index: usize, io: &mut Io) -> Result<(), device::Error> {
        let Some((ram, queue)) = io.queue(index) else { return Ok(()) };
        let Some(chain) = queue.pop(ram)? else {
            if queue.enable_kicks(ram)? {
                queue.kick_again();
            }
            return Ok(());
        };
        let head = chain.head_index();
        let proper = self.layout.load(chain, QUEUE_SIZE.into());
        let acknowledge_at = proper.then(|| self.layout.writable.first(ram)).flatten();
        let mut result = Ok(());
        if let Some(at) = acknowledge_at {
            let pairs = self.pairs_asked_for(ram);
            if let Some(pairs) = pairs {
                result = self.use_pairs(pairs, io);
            }
            let acknowledge = if pairs.is_some() && result.is_ok() { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
            let acknowledge = u8::try_from(acknowledge).expect("a byte");
            io.ram.write_obj(acknowledge, at).expect("it was found in guest memory");
        }
        if let Some((ram, queue)) = io.queue(index) {
            queue.add_used(ram, head, acknowledge_at.is_some().into())?;
            queue.notify(ram)?;
            queue.kick_again();
        }
        // Linux waits for an answer, whatever has become of the device.
        result
    }

    /// How many pairs the command in `layout` asks for, if it asks for some (5.1.6.5.6).
    fn pairs_asked_for(&mut self, ram: &GuestRam) -> Option<usize> {
        let mut command = [0; 4];
        if !self.layout.readable.take(ram, &mut command) || self.layout.readable.len() != 0 {
            return None;
        }
        let [class, command, pairs @ ..] = command;
        let pairs = usize::from(u16::from_le_bytes(pairs));
        let is_known = u32::from(class) == VIRTIO_NET_CTRL_MQ && u32::from(command) == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET;
        let may = is_known && self.negotiated(VIRTIO_NET_F_MQ) && (1..=self.pairs.len()).contains(&pairs);
        may.then_some(pairs)
    }

    /// Moves packets by so many pairs from now on. Those that the tap has for others are lost.
    fn use_pairs(&mut self, count: usize, io: &mut Io) -> Result<(), device::Error> {
        while self.in_use > count {
            self.in_use -= 1;
            self.pairs[self.in_use].leave(&self.common, io)?;
        }
        while self.in_use < count {
            let pair = &mut self.pairs[self.in_use];
            pair.attach(true)?;
            self.in_use += 1;
            pair.start(&self.common, io)?;
            // What the driver has there already.
            if let Some((_, queue)) = io.queue(pair.queue(TX)) {
                queue.kick_again();
            }
        }
        Ok(())
    }

    /// Tells the driver if nothing will come from the host any more.
    fn look_at_link(&mut self, io: &mut Io) {
        // Only passt ends, and of that there is one.
        let pair = &mut self.pairs[0];
        if pair.host.is_gone() && self.config[CONFIG_STATUS] & LINK_UP != 0 {
            log::warn!("passt has ended: the guest's user network is gone, and its card has no link");
            self.config[CONFIG_STATUS] &= !LINK_UP;
            io.interrupt.change_config(&self.config);
            // What waits to be sent is dropped as all that follows is, not kept for ever.
            pair.look_again(TX, Wait::Host, io);
        }
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
        &self.queue_sizes
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn metrics(&self) -> Arc<dyn Metrics> {
        self.common.statistics.clone()
    }

    fn queue_pairs(&self) -> u16 {
        u16::try_from(self.in_use).expect("no more than QUEUES_MAX")
    }

    fn restore_queue_pairs(&mut self, pairs: u16) -> bool {
        let may = (1..=self.pairs.len()).contains(&pairs.into());
        if may {
            self.in_use = pairs.into();
        }
        may
    }

    fn start(&mut self, features: u64, io: &mut Io) -> Result<(), device::Error> {
        let offloads = guest_offloads(features);
        let first = &self.pairs[0].host;
        if let Backend::Tap(tap) = first {
            tap.set_offloads(offloads).map_err(|error| device::Error::Host {
                what: format!("cannot start the network device on {first}"),
                source: io::Error::other(error),
            })?;
            if self.offloads & !offloads != 0 {
                // Packets that came for the last driver may be such as this one does not take (5.1.6.4.1).
                self.common.statistics.rx_drops.add(tap.discard());
            }
        }
        self.offloads = offloads;
        self.common.negotiated = features;
        for (limit, token) in self.common.limits.iter().zip(LIMITS) {
            limit.as_ref().map_or(Ok(()), |limit| limit.watch(token, io))?;
        }
        // More than one if the driver goes on with this device in place of another.
        let before = std::mem::replace(&mut self.in_use, 1);
        let pairs = if self.negotiated(VIRTIO_NET_F_MQ) { before } else { 1 };
        self.pairs[0].start(&self.common, io)?;
        self.use_pairs(pairs, io)
    }

    fn queue_ready(&mut self, index: usize, io: &mut Io) -> Result<(), device::Error> {
        if self.control_queue() == Some(index) {
            return self.control(index, io);
        }
        let is_used = index / 2 < self.in_use;
        match self.pairs.get_mut(index / 2) {
            Some(pair) if is_used => pair.queue_ready(index % 2, &mut self.common, io)?,
            Some(pair) if index % 2 == TX => pair.drop_sent(&self.common, io)?,
            _ => {}
        }
        self.look_at_link(io);
        Ok(())
    }

    fn change(&mut self, change: &Change, mut io: Option<&mut Io>) -> Result<(), change::Error> {
        match change {
            Change::NetRates { rx, tx } => {
                let rates = [*rx, *tx];
                let has_vhost = self.pairs.iter().any(|pair| pair.vhost.is_some());
                if has_vhost && rates.iter().flatten().any(|rates| *rates != Rates::default()) {
                    if self.common.needs_vhost {
                        return Err(change::Error::Vhost);
                    }
                    self.do_without_vhost(io.as_deref_mut()).map_err(change::Error::Device)?;
                }
                self.set_rates(rates, io).map_err(change::Error::Timer)
            }
            other => Err(other.unsupported()),
        }
    }

    fn host_ready(&mut self, token: u32, io: &mut Io) -> Result<(), device::Error> {
        if let Some(direction) = LIMITS.iter().position(|limit| *limit == token) {
            self.common.limits[direction].iter_mut().for_each(RateLimiter::woken);
            let start = self.turns[direction];
            let mut first = None;
            for index in (start..self.pairs.len()).chain(0..start) {
                if self.pairs[index].go_on(direction, Wait::Limit, &mut self.common, io)? {
                    first.get_or_insert(index);
                }
            }
            self.turns[direction] = first.map_or(start, |first| (first + 1) % self.pairs.len());
        } else {
            let (index, token) = Pair::of_token(token);
            self.pairs[index].host_ready(token, &mut self.common, io).inspect_err(|_| {
                // Until a reset nobody is to work on the queues.
                self.pairs.iter_mut().for_each(|pair| pair.stop_vhost(io));
            })?;
        }
        self.look_at_link(io);
        Ok(())
    }

    fn pause(&mut self, io: &mut Io) -> Result<(), device::Error> {
        // All of them, also when one fails: nobody is to work on the queues.
        self.pairs.iter_mut().map(|pair| pair.pause(io)).fold(Ok(()), Result::and)
    }

    fn settle(&mut self, io: &mut Io) {
        self.pairs.iter_mut().for_each(|pair| pair.settle(&self.common, io));
    }

    fn stop(&mut self, io: &mut Io) {
        for pair in self.pairs[1..self.in_use].iter_mut().rev() {
            pair.stop(&self.common, io);
            if let Err(error) = pair.attach(false) {
                // The tap may be gone.
                log::debug!("{error}");
            }
        }
        self.in_use = 1;
        self.pairs[0].stop(&self.common, io);
        self.common.limits.iter().flatten().for_each(|limit| limit.unwatch(io));
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

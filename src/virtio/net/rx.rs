//! From the host to the guest: packets are read straight into the buffers that the driver made available.
//!
//! Virtio 1.2, 5.1.6.4 (processing of incoming packets).

use std::collections::VecDeque;
use std::io;
use std::time::Instant;

use super::host::Host;
use super::{BATCH, HEADER, MAX_PACKET, Reject, Statistics, Wait, gone, push_chain};
use crate::memory::GuestRam;
use crate::virtio::device::Error;
use crate::virtio::iovec::Iovecs;
use crate::virtio::queue::{self, Queue};
use crate::virtio::rate_limiter::RateLimiter;

/// Where `num_buffers` is in the header (5.1.6).
const NUM_BUFFERS: usize = 10;

/// A chain that was taken from the ring and not used yet.
struct Buffer {
    head: u16,
    iovecs: usize,
    bytes: usize,
}

/// The receiving half of a started device.
pub struct Rx {
    /// VIRTIO_NET_F_MRG_RXBUF: a packet may span several buffers.
    mergeable: bool,
    /// The buffers that the next packets go to, in the ring's order.
    held: VecDeque<Buffer>,
    /// The memory of `held`.
    iovecs: Iovecs,
    /// Where the end of a packet goes that is longer than all of `held`.
    spill: Box<[u8]>,
    /// The packet that waits for more buffers.
    parked: Option<Packet>,
}

/// A packet that was read.
#[derive(Clone, Copy)]
struct Packet {
    /// Its length in bytes, with the header.
    length: usize,
    /// How much of it is in `held`; the rest is in `spill`.
    placed: usize,
}

impl Rx {
    pub fn new(ram: &GuestRam, mergeable: bool) -> Self {
        Self {
            mergeable,
            held: VecDeque::with_capacity(usize::from(super::QUEUE_SIZE)),
            iovecs: Iovecs::new(ram),
            spill: vec![0; MAX_PACKET].into_boxed_slice(),
            parked: None,
        }
    }

    /// Moves packets until the host has none or the ring is empty, at most [`BATCH`] of them; what it then waits for.
    pub fn run(
        &mut self,
        host: &mut impl Host,
        ram: &GuestRam,
        queue: &mut Queue,
        limit: &mut Option<RateLimiter>,
        statistics: &Statistics,
    ) -> Result<Wait, Error> {
        queue.disable_kicks(ram)?;
        let mut wait = None;
        for _ in 0..BATCH {
            let packet = match self.parked.take() {
                Some(packet) => packet,
                None => {
                    if limit.as_mut().is_some_and(|limit| !limit.allows(Instant::now())) {
                        statistics.rx_throttled.inc();
                        wait = Some(Wait::Limit);
                        break;
                    }
                    // Room for the longest packet saves copying its end.
                    self.gather(ram, queue, if self.mergeable { MAX_PACKET } else { 1 })?;
                    if self.held.is_empty() {
                        if queue.enable_kicks(ram)? {
                            continue;
                        }
                        wait = Some(Wait::Driver);
                        break;
                    }
                    match host.receive(&mut self.iovecs, &mut self.spill) {
                        Ok(length) => Packet { length, placed: length.min(self.iovecs.bytes()) },
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            wait = Some(Wait::Host);
                            break;
                        }
                        Err(error) if gone(&error) => {
                            return Err(Error::Host { what: "cannot read from the tap".into(), source: error });
                        }
                        Err(_) => {
                            statistics.rx_errors.inc();
                            wait = Some(Wait::Host);
                            break;
                        }
                    }
                }
            };
            match self.fit(packet, ram, queue)? {
                Fit::Yes => {
                    self.deliver(packet, ram, queue)?;
                    statistics.rx_packets.inc();
                    let bytes = (packet.length - HEADER) as u64;
                    statistics.rx_bytes.add(bytes);
                    if let Some(limit) = limit {
                        limit.take(bytes, Instant::now());
                    }
                }
                Fit::Never => statistics.rx_drops.inc(),
                Fit::Later => {
                    self.parked = Some(packet);
                    wait = Some(Wait::Driver);
                    break;
                }
            }
        }
        if wait == Some(Wait::Driver) {
            statistics.rx_stops.inc();
        }
        queue.notify(ram)?;
        if wait.is_none() && host.has_more() {
            // The descriptor may have nothing more to say.
            queue.kick_again();
            return Ok(Wait::Driver);
        }
        Ok(wait.unwrap_or(Wait::Host))
    }

    /// Gives back what was taken and not used. A packet that was waiting for buffers is lost.
    pub fn stop(&mut self, queue: &mut Queue, statistics: &Statistics) {
        for _ in self.held.drain(..) {
            queue.undo_pop();
        }
        self.iovecs.clear();
        if self.parked.take().is_some() {
            statistics.rx_drops.inc();
        }
    }

    /// Takes buffers from the ring until they have room for `bytes`. False if a system call takes no more of them.
    fn gather(&mut self, ram: &GuestRam, queue: &mut Queue, bytes: usize) -> Result<bool, Error> {
        while self.iovecs.bytes() < bytes {
            let Some(chain) = queue.pop(ram)? else { break };
            let (head, first) = (chain.head_index(), self.iovecs.len());
            match push_chain(&mut self.iovecs, chain, true, queue.size()) {
                Ok(bytes) if bytes >= HEADER => {
                    self.held.push_back(Buffer { head, iovecs: self.iovecs.len() - first, bytes });
                }
                Err(Reject::Full) if first > 0 => {
                    self.iovecs.truncate(first);
                    queue.undo_pop();
                    return Ok(false);
                }
                _ => {
                    self.iovecs.truncate(first);
                    queue.undo_pop();
                    return Err(queue::Error::Ring {
                        index: queue.index(),
                        what: "cannot receive into a buffer that is malformed or shorter than the header",
                        source: virtio_queue::Error::InvalidChain,
                    }
                    .into());
                }
            }
        }
        Ok(true)
    }

    /// Sees to it that the held buffers have room for a packet that was read.
    fn fit(&mut self, packet: Packet, ram: &GuestRam, queue: &mut Queue) -> Result<Fit, Error> {
        if packet.length < HEADER {
            return Ok(Fit::Never);
        }
        if self.iovecs.bytes() >= packet.length {
            return Ok(Fit::Yes);
        }
        if !self.mergeable || !self.gather(ram, queue, packet.length)? {
            return Ok(Fit::Never);
        }
        if self.iovecs.bytes() >= packet.length {
            return Ok(Fit::Yes);
        }
        if self.iovecs.len() >= usize::from(queue.size()) {
            // The driver has no descriptor left to add.
            return Ok(Fit::Never);
        }
        if queue.enable_kicks(ram)? {
            queue.kick_again();
        }
        Ok(Fit::Later)
    }

    /// Hands a packet, which fits, to the driver.
    fn deliver(&mut self, packet: Packet, ram: &GuestRam, queue: &mut Queue) -> Result<(), Error> {
        self.iovecs.write(packet.placed, &self.spill[..packet.length - packet.placed]);
        let (mut buffers, mut iovecs, mut room) = (0u16, 0, 0);
        for buffer in &self.held {
            buffers += 1;
            iovecs += buffer.iovecs;
            room += buffer.bytes;
            if room >= packet.length {
                break;
            }
        }
        self.iovecs.write(NUM_BUFFERS, &buffers.to_le_bytes());
        self.iovecs.remove_first(iovecs);
        let mut left = packet.length;
        let used = self.held.drain(..usize::from(buffers)).map(|buffer| {
            let written = left.min(buffer.bytes);
            left -= written;
            (buffer.head, u32::try_from(written).expect("a packet is shorter than 2^32 bytes"))
        });
        // The driver takes num_buffers of them at once: it must not find only the first.
        Ok(queue.add_used_together(ram, used)?)
    }
}

/// Whether there is room for a packet.
enum Fit {
    Yes,
    Never,
    Later,
}

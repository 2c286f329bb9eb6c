//! From the guest to the host: packets are written straight from the driver's buffers.
//!
//! Virtio 1.2, 5.1.6.2 (packet transmission).

use std::io;
use std::time::Instant;

use super::host::Host;
use super::{BATCH, HEADER, MAX_PACKET, Statistics, Wait, gone, push_chain};
use crate::memory::GuestRam;
use crate::virtio::device::Error;
use crate::virtio::iovec::Iovecs;
use crate::virtio::queue::Queue;
use crate::virtio::rate_limiter::RateLimiter;

/// The transmitting half of a started device.
pub struct Tx {
    iovecs: Iovecs,
}

impl Tx {
    pub fn new(ram: &GuestRam) -> Self {
        Self { iovecs: Iovecs::new(ram) }
    }

    /// Moves packets until the ring is empty or the host takes no more, at most [`BATCH`] of them; what it then waits for.
    pub fn run(
        &mut self,
        host: &mut impl Host,
        ram: &GuestRam,
        queue: &mut Queue,
        limit: &mut Option<RateLimiter>,
        statistics: &Statistics,
    ) -> Result<Wait, Error> {
        queue.disable_kicks(ram)?;
        let mut moved = 0;
        let mut wait = loop {
            if moved == BATCH {
                queue.kick_again();
                break Wait::Driver;
            }
            moved += 1;
            let Some(chain) = queue.pop(ram)? else {
                if queue.enable_kicks(ram)? {
                    continue;
                }
                break Wait::Driver;
            };
            let head = chain.head_index();
            if limit.as_mut().is_some_and(|limit| !limit.allows(Instant::now())) {
                queue.undo_pop();
                statistics.tx_throttled.inc();
                break Wait::Limit;
            }
            self.iovecs.clear();
            match push_chain(&mut self.iovecs, chain, false, queue.size()) {
                Ok(length @ HEADER..=MAX_PACKET) => match host.send(&mut self.iovecs) {
                    Ok(()) => {
                        statistics.tx_packets.inc();
                        let bytes = (length - HEADER) as u64;
                        statistics.tx_bytes.add(bytes);
                        if let Some(limit) = limit {
                            limit.take(bytes, Instant::now());
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        queue.undo_pop();
                        statistics.tx_stops.inc();
                        break Wait::Host;
                    }
                    Err(error) if gone(&error) => {
                        queue.undo_pop();
                        return Err(Error::Host { what: "cannot write to the tap".into(), source: error });
                    }
                    // A header that makes no sense (EINVAL), an interface that is down (EIO), an address that is not
                    // for the guest, no memory: as on a wire, the packet is lost.
                    Err(_) => statistics.tx_drops.inc(),
                },
                _ => statistics.tx_errors.inc(),
            }
            queue.add_used(ram, head, 0)?;
        };
        queue.notify(ram)?;
        if host.flush().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
            wait = Wait::Host;
        }
        Ok(wait)
    }
}

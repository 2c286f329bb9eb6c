//! A receive and a transmit queue, and the host's end of them: what a card has one of for each pair.

use std::io;
use std::sync::Arc;

use rustix::event::epoll::EventFlags;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::host::Backend;
use super::rx::Rx;
use super::tx::Tx;
use super::vhost::Vhost;
use super::{Statistics, Wait};
use crate::virtio::device::{Error, Io};
use crate::virtio::queue::{Chain, INTERRUPT_USED_RING};
use crate::virtio::rate_limiter::RateLimiter;

/// The direction to the guest: the first queue of a pair, and the first of two limits.
pub const RX: usize = 0;
/// The direction from the guest: the second.
pub const TX: usize = 1;

/// What the descriptors of the first pair are watched as: the host's end,
const HOST: u32 = 0;
/// and vhost's interrupts for the driver, and rings that are broken.
const VHOST: [u32; 2] = [1, 2];
/// Those of the next pair are so much higher.
const TOKENS: u32 = 4;

/// What all pairs of a card have in common.
#[derive(Default)]
pub struct Common {
    /// Of each direction.
    pub limits: [Option<RateLimiter>; 2],
    pub statistics: Arc<Statistics>,
    /// What the driver negotiated.
    pub negotiated: u64,
    /// Whether nothing but vhost may move packets.
    pub needs_vhost: bool,
}

/// A pair of queues.
pub struct Pair {
    index: usize,
    pub host: Backend,
    /// Moves the packets, if it is there.
    pub vhost: Option<Vhost>,
    running: Option<Running>,
}

/// What there is only between start and stop.
struct Running {
    rx: Rx,
    tx: Tx,
    /// Of each direction.
    waits: [Wait; 2],
    watched: EventFlags,
}

impl Pair {
    pub fn new(index: usize, host: Backend, vhost: Option<Vhost>) -> Self {
        Self { index, host, vhost, running: None }
    }

    /// The index of its queue of a direction.
    pub fn queue(&self, direction: usize) -> usize {
        2 * self.index + direction
    }

    /// Which pair has this token, and which of its own it is.
    pub fn of_token(token: u32) -> (usize, u32) {
        ((token / TOKENS) as usize, token % TOKENS)
    }

    fn token(&self, first: u32) -> u32 {
        first + TOKENS * u32::try_from(self.index).expect("a few")
    }

    /// Has the host's kernel move the packets, or moves them itself.
    pub fn start(&mut self, common: &Common, io: &mut Io) -> Result<(), Error> {
        let (queue, tokens) = (self.queue(RX), VHOST.map(|first| self.token(first)));
        let (Backend::Tap(tap), Some(vhost)) = (&self.host, &mut self.vhost) else { return self.run(common, io) };
        match vhost.attach(tap, common.negotiated, tokens, queue, io) {
            Ok(()) => Ok(()),
            Err(error) if common.needs_vhost => {
                Err(Error::Host { what: format!("cannot start vhost-net on {}", self.host), source: error })
            }
            Err(error) => {
                log::warn!("cannot start vhost-net on {}, which is slower without: {error}", self.host);
                self.leave_vhost(io)?;
                self.run(common, io)
            }
        }
    }

    /// Takes the queues back from vhost for good; whether there was one.
    pub fn leave_vhost(&mut self, io: &mut Io) -> Result<bool, Error> {
        let Some(mut vhost) = self.vhost.take() else { return Ok(false) };
        vhost.detach(io)?;
        self.give_kicks_back(io)?;
        // One that vhost was about to make may be lost.
        io.interrupt.raise(INTERRUPT_USED_RING);
        Ok(true)
    }

    fn give_kicks_back(&self, io: &Io) -> Result<(), Error> {
        let what = || format!("cannot watch the queues of {}", self.host);
        Vhost::give_kicks_back(self.queue(RX), io).map_err(|source| Error::Host { what: what(), source })
    }

    /// Is not used any more by a driver that goes on.
    pub fn leave(&mut self, common: &Common, io: &mut Io) -> Result<(), Error> {
        let paused = self.pause(io);
        self.stop(common, io);
        paused?;
        if self.vhost.is_some() {
            self.give_kicks_back(io)?;
        }
        self.attach(false)?;
        // What the driver has there still.
        if let Some((_, queue)) = io.queue(self.queue(TX)) {
            queue.kick_again();
        }
        Ok(())
    }

    /// Drops what the driver sends although the pair is not used: Linux does that while it stops using it.
    pub fn drop_sent(&self, common: &Common, io: &mut Io) -> Result<(), Error> {
        let Some((ram, queue)) = io.queue(self.queue(TX)) else { return Ok(()) };
        let dropped = |_: Chain<'_>| {
            common.statistics.tx_drops.inc();
            0
        };
        Ok(queue.serve(ram, dropped)?)
    }

    /// Has the tap give packets to its queue, and take them from there, or not.
    pub fn attach(&self, is_attached: bool) -> Result<(), Error> {
        let Backend::Tap(tap) = &self.host else { return Ok(()) };
        tap.attach(is_attached).map_err(|error| Error::Host {
            what: format!("cannot set how many queues of {} are used", self.host),
            source: io::Error::other(error),
        })
    }

    /// Moves the packets itself from now on.
    pub fn run(&mut self, common: &Common, io: &mut Io) -> Result<(), Error> {
        let rx_wait = if io.queue(self.queue(RX)).is_some() { Wait::Host } else { Wait::Driver };
        self.running = Some(Running {
            rx: Rx::new(&io.ram, common.negotiated & (1 << VIRTIO_NET_F_MRG_RXBUF) != 0),
            tx: Tx::new(&io.ram),
            waits: [rx_wait, Wait::Driver],
            watched: EventFlags::empty(),
        });
        self.watch(io)
    }

    /// The driver notified its queue of a direction.
    pub fn queue_ready(&mut self, direction: usize, common: &mut Common, io: &mut Io) -> Result<(), Error> {
        if self.vhost.as_ref().is_some_and(|vhost| !vhost.is_attached()) {
            // The device goes on after a pause.
            return self.start(common, io);
        }
        // While the host is waited for, there is nothing to do for the driver.
        self.go_on(direction, Wait::Driver, common, io).map(drop)
    }

    /// One of its descriptors has something to say.
    pub fn host_ready(&mut self, token: u32, common: &mut Common, io: &mut Io) -> Result<(), Error> {
        match VHOST.iter().position(|vhost| *vhost == token) {
            Some(0) => {
                io.interrupt.raise(INTERRUPT_USED_RING);
                return Ok(());
            }
            Some(_) if self.vhost.as_ref().is_some_and(Vhost::is_attached) => {
                let source = io::Error::other("its driver broke a virtqueue");
                return Err(Error::Host { what: "vhost-net has stopped".into(), source });
            }
            Some(_) => return Ok(()),
            None => {}
        }
        self.go_on(RX, Wait::Host, common, io)?;
        self.go_on(TX, Wait::Host, common, io)?;
        Ok(())
    }

    /// Moves packets in a direction, if that is what it waits for; whether it did.
    pub fn go_on(&mut self, direction: usize, wait: Wait, common: &mut Common, io: &mut Io) -> Result<bool, Error> {
        let index = self.queue(direction);
        let Some(running) = self.running.as_mut().filter(|running| running.waits[direction] == wait) else {
            return Ok(false);
        };
        if let Some((ram, queue)) = io.queue(index) {
            let (limit, statistics) = (&mut common.limits[direction], &common.statistics);
            running.waits[direction] = match direction {
                RX => running.rx.run(&mut self.host, ram, queue, limit, statistics)?,
                _ => running.tx.run(&mut self.host, ram, queue, limit, statistics)?,
            };
        }
        self.watch(io)?;
        Ok(true)
    }

    /// Has what waits for this have another look.
    pub fn look_again(&mut self, direction: usize, wait: Wait, io: &mut Io) {
        let queue = self.queue(direction);
        let waits = self.running.as_mut().map(|running| &mut running.waits[direction]);
        if let (Some(waits), Some((_, queue))) = (waits.filter(|waits| **waits == wait), io.queue(queue)) {
            *waits = Wait::Driver;
            queue.kick_again();
        }
    }

    /// Watches the host for what is waited for.
    fn watch(&mut self, io: &mut Io) -> Result<(), Error> {
        let (gone, token) = (self.host.is_gone(), self.token(HOST));
        let Some(running) = &mut self.running else { return Ok(()) };
        let mut wanted = EventFlags::empty();
        wanted.set(EventFlags::IN, running.waits[RX] == Wait::Host && !gone);
        wanted.set(EventFlags::OUT, running.waits[TX] == Wait::Host && !gone);
        if wanted == running.watched {
            return Ok(());
        }
        // Watched for nothing, it would still report errors, over and over.
        let result = if wanted.is_empty() { io.unwatch(&self.host) } else { io.watch(token, &self.host, wanted) };
        result.map_err(|source| Error::Host { what: format!("cannot watch {}", self.host), source })?;
        running.watched = wanted;
        Ok(())
    }

    /// Takes the queues back from vhost, if it has them.
    pub fn pause(&mut self, io: &mut Io) -> Result<(), Error> {
        if let Some(vhost) = self.vhost.as_mut().filter(|vhost| vhost.is_attached()) {
            vhost.detach(io)?;
            // One that vhost was about to make may be lost.
            io.interrupt.raise(INTERRUPT_USED_RING);
        }
        Ok(())
    }

    /// Gives the driver back what was taken and not used.
    pub fn settle(&mut self, common: &Common, io: &mut Io) {
        let index = self.queue(RX);
        if let (Some(running), Some((_, queue))) = (&mut self.running, io.queue(index)) {
            running.rx.stop(queue, &common.statistics);
        }
    }

    /// Has vhost move no packets any more, for a driver that starts over.
    pub fn stop_vhost(&mut self, io: &mut Io) {
        if let Some(Err(error)) = self.vhost.as_mut().map(|vhost| vhost.detach(io)) {
            log::debug!("{}: {error}", self.host);
        }
    }

    /// Moves no packets any more.
    pub fn stop(&mut self, common: &Common, io: &mut Io) {
        self.stop_vhost(io);
        self.settle(common, io);
        let Some(running) = self.running.take() else { return };
        if !running.watched.is_empty()
            && let Err(error) = io.unwatch(&self.host)
        {
            log::error!("cannot stop watching {}: {error}", self.host);
        }
    }
}

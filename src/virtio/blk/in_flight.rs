//! The device with [a ring](super::uring): several requests are under way, and each is given back when it is done.
//!
//! Flushes wait for one another: of a file's lost data the kernel tells only one of those that ask at the same time. What comes while
//! one is under way is done by the next one. What changes the file otherwise, or cannot pass the page cache, is done while nothing else is.

use std::io;
use std::time::Instant;

use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;

use super::uring::{Job, Kind, Request, Uring};
use super::{Answer, Blk, DATA_MAX, Failure, Progress, QUEUE_SIZE};
use crate::memory::GuestRam;
use crate::virtio::device::{self, Io};
use crate::virtio::iovec::Iovecs;
use crate::virtio::queue::{self, NOTIFY_AFTER, Queue, SERVE_FOR};

/// How much data is given to the kernel at once: in the page cache it is copied before the driver hears of anything.
const BATCH: u64 = 4 << 20;

/// Requests that are under way.
pub struct InFlight {
    /// Those of each queue.
    shares: Vec<Share>,
    /// Those that the flush under way is for, each with the bytes that it has written,
    flushing: Vec<(Request, u64)>,
    /// and the next one.
    to_flush: Vec<(Request, u64)>,
    /// Data that the kernel has not been told of.
    queued: u64,
}

/// What one queue has under way. Each may have as much, so that none waits for another.
#[derive(Clone, Default)]
struct Share {
    /// How many requests,
    count: usize,
    /// and how much data the kernel has of them.
    bytes: u64,
    /// Those that the host failed, and that are to be done again.
    failed: Vec<u16>,
    /// Whether it was left with requests that there was no room for.
    was_full: bool,
}

impl InFlight {
    /// Nothing, of so many queues.
    pub fn new(queues: u16) -> Self {
        let shares = vec![Share::default(); queues.into()];
        Self { shares, flushing: vec![], to_flush: vec![], queued: 0 }
    }

    pub fn is_empty(&self) -> bool {
        self.shares.iter().all(|share| share.count == 0)
    }
}

impl Blk {
    /// Begins a request for data, if there is a ring that can do it.
    pub(super) fn begin(
        &mut self,
        ram: &GuestRam,
        kind: Kind,
        (offset, len): (u64, u64),
        iovecs: &mut Iovecs,
    ) -> Result<Progress, Failure> {
        let Some(uring) = &mut self.uring else { return Ok(Progress::Done) };
        if iovecs.is_empty() {
            return Ok(Progress::Done);
        }
        if !self.image.takes(iovecs, offset) {
            return self.check_alone().map(|()| Progress::Done);
        }
        let mut buffers = uring.spare(ram);
        std::mem::swap(&mut buffers, iovecs);
        uring.begin(Job { kind, request: self.current, buffers, offset, len, done: 0 });
        self.in_flight.queued += len;
        self.in_flight.shares[self.current.queue].bytes += len;
        Ok(Progress::Begun)
    }

    /// Begins a flush, if there is a ring.
    pub(super) fn begin_flush(&mut self) -> Progress {
        if self.uring.is_none() || !self.flushes() {
            return Progress::Done;
        }
        self.in_flight.to_flush.push((self.current, 0));
        Progress::Begun
    }

    /// What does not go by the ring has to be the only one.
    pub(super) fn check_alone(&self) -> Result<(), Failure> {
        if self.in_flight.is_empty() { Ok(()) } else { Err(Failure::Alone) }
    }

    /// Whether another request of queue `index` may be begun.
    fn has_room(&self, index: usize) -> bool {
        let shares = &self.in_flight.shares;
        let all: u64 = shares.iter().map(|share| share.bytes).sum();
        let share = &shares[index];
        share.count < usize::from(QUEUE_SIZE)
            && share.bytes < DATA_MAX / u64::from(self.queues())
            // One request may be far more than the share that was left.
            && all < DATA_MAX
    }

    /// Has the device called for queues that were left for want of room, and have some again.
    pub(super) fn call_again(&mut self, io: &Io) {
        for (index, queue) in io.queues.iter().enumerate() {
            if self.in_flight.shares[index].was_full && self.has_room(index) {
                self.in_flight.shares[index].was_full = false;
                queue.iter().for_each(Queue::kick_again);
            }
        }
    }

    /// Gives the driver back what is done, and begins what it made available in queue `index`.
    pub(super) fn serve_ring(&mut self, io: &mut Io, index: usize, iovecs: &mut Iovecs) -> Result<(), device::Error> {
        let start = Instant::now();
        let mut notified = start;
        self.give_back(io)?;
        self.in_flight.shares[index].was_full = false;
        let (ram, queue) = of(io, index);
        let mut budget = queue.size();
        queue.disable_kicks(ram)?;
        loop {
            while !self.stopped
                && !self.is_waiting()
                && self.has_room(index)
                && self.in_flight.queued < BATCH
                && budget > 0
            {
                let (ram, queue) = of(io, index);
                let Some(chain) = queue.pop(ram)? else { break };
                let head = chain.head_index();
                budget -= 1;
                match self.limited_request(ram, index, chain, iovecs) {
                    Answer::Used(written) => queue.add_used(ram, head, written)?,
                    Answer::Begun => self.in_flight.shares[index].count += 1,
                    Answer::Again => queue.undo_pop(),
                    Answer::Alone => {
                        queue.undo_pop();
                        self.drain(io)?;
                    }
                }
            }
            self.give_back(io)?;
            if self.stopped {
                return self.stand_still(io);
            }
            // What is done, or the timer, calls again.
            let is_full = !self.has_room(index);
            if is_full || self.is_waiting() {
                self.in_flight.shares[index].was_full = is_full;
                return Ok(io.notify()?);
            }
            let now = Instant::now();
            if now - notified >= NOTIFY_AFTER {
                io.notify()?;
                notified = now;
            }
            let (ram, queue) = of(io, index);
            if budget == 0 || now - start >= SERVE_FOR {
                queue.enable_kicks(ram)?;
                queue.kick_again();
                return Ok(io.notify()?);
            }
            if !queue.rest(ram)? {
                return Ok(io.notify()?);
            }
            queue.disable_kicks(ram)?;
        }
    }

    /// Tells the kernel what was begun, and the driver what is done, as long as there is something.
    fn give_back(&mut self, io: &mut Io) -> Result<(), device::Error> {
        loop {
            self.flush_next(io)?;
            let Some(uring) = &mut self.uring else { return Ok(()) };
            uring.submit().map_err(failed)?;
            self.in_flight.queued = 0;
            let mut any = false;
            while let Some((job, result)) = self.uring.as_mut().and_then(Uring::reap) {
                any = true;
                self.done(io, job, result)?;
            }
            let has_more = self.uring.as_ref().is_some_and(Uring::is_queued);
            if !any && !has_more {
                return Ok(());
            }
        }
    }

    /// Begins the next flush.
    fn flush_next(&mut self, io: &mut Io) -> Result<(), queue::Error> {
        let InFlight { flushing, to_flush, .. } = &mut self.in_flight;
        if !flushing.is_empty() || to_flush.is_empty() {
            return Ok(());
        }
        std::mem::swap(flushing, to_flush);
        let request = flushing[0].0;
        if self.image.flush_has_failed() {
            return self.flushed(io);
        }
        if let Some(uring) = &mut self.uring {
            let buffers = uring.spare(&io.ram);
            uring.begin(Job { kind: Kind::Flush, request, buffers, offset: 0, len: 0, done: 0 });
        }
        Ok(())
    }

    /// Gives the driver back what waited for a flush.
    fn flushed(&mut self, io: &mut Io) -> Result<(), queue::Error> {
        let mut flushed = std::mem::take(&mut self.in_flight.flushing);
        for (request, written) in flushed.drain(..) {
            let result = self.image.check_flushed().map_err(|error| Failure::Host("flush", error));
            self.give(io, request, written, result)?;
        }
        self.in_flight.flushing = flushed;
        Ok(())
    }

    fn done(&mut self, io: &mut Io, job: Job, result: io::Result<()>) -> Result<(), queue::Error> {
        let Job { kind, request, buffers, len, done, .. } = job;
        self.in_flight.shares[request.queue].bytes -= len;
        if let Some(uring) = &mut self.uring {
            uring.put_back(buffers);
        }
        match kind {
            Kind::Read => {
                self.counts.read_bytes.add(done);
                self.give(io, request, done, result.map_err(|error| Failure::Host("read", error)))
            }
            Kind::Write => {
                self.counts.written_bytes.add(done);
                // A driver that does not flush takes it for safe.
                if result.is_ok() && !self.negotiated(VIRTIO_BLK_F_FLUSH) && self.flushes() {
                    self.in_flight.to_flush.push((request, 0));
                    return Ok(());
                }
                self.give(io, request, 0, result.map_err(|error| Failure::Host("write", error)))
            }
            Kind::Flush => {
                if let Err(error) = result {
                    self.flush_error(&error);
                }
                self.flushed(io)
            }
        }
    }

    fn flush_error(&mut self, error: &io::Error) {
        log::warn!("virtio-blk: cannot flush disk image {}: {error}", self.path.display());
        self.image.fail_flushes();
    }

    /// Gives one request back, if it is not to be done again.
    fn give(
        &mut self,
        io: &mut Io,
        request: Request,
        written: u64,
        result: Result<(), Failure>,
    ) -> Result<(), queue::Error> {
        let (ram, queue) = of(io, request.queue);
        let written = self.answer(ram, request, written, result);
        let share = &mut self.in_flight.shares[request.queue];
        share.count -= 1;
        match written {
            Some(written) => queue.add_used(ram, request.head, written),
            None => {
                share.failed.push(request.head);
                Ok(())
            }
        }
    }

    /// Waits until nothing is under way.
    fn drain(&mut self, io: &mut Io) -> Result<(), device::Error> {
        self.give_back(io)?;
        while !self.in_flight.is_empty() {
            let uring = self.uring.as_mut().filter(|uring| uring.len() > 0);
            let uring = uring.ok_or_else(|| failed(io::Error::other("some were lost")))?;
            uring.wait().map_err(failed)?;
            self.give_back(io)?;
        }
        Ok(())
    }

    /// Waits until nothing is under way, at any price: what cannot be given back to the driver is forgotten.
    pub(super) fn come_to_rest(&mut self, io: &mut Io) -> Result<(), device::Error> {
        let result = self.stand_still(io);
        if result.is_err() {
            self.forget();
        }
        result
    }

    /// Waits until nothing is under way, and has what the host failed be the next requests of their queues.
    pub(super) fn stand_still(&mut self, io: &mut Io) -> Result<(), device::Error> {
        self.drain(io)?;
        for (queue, share) in io.queues.iter_mut().zip(&mut self.in_flight.shares) {
            queue.iter_mut().try_for_each(|queue| queue.put_back(&io.ram, &share.failed))?;
            share.failed.clear();
        }
        Ok(io.notify()?)
    }

    /// Waits until the kernel is done with guest memory; the driver hears of nothing any more.
    pub(super) fn forget(&mut self) {
        while let Some(uring) = self.uring.as_mut().filter(|uring| uring.len() > 0) {
            if let Err(error) = uring.wait() {
                log::error!("cannot wait for requests to disk image {}: {error}", self.path.display());
                // It waits once more, or leaves to the kernel what that has.
                self.uring = None;
                // What came of a flush is not known.
                self.image.fail_flushes();
                break;
            }
            while let Some((job, result)) = self.uring.as_mut().and_then(Uring::reap) {
                if let (Kind::Flush, Err(error)) = (job.kind, result) {
                    self.flush_error(&error);
                }
            }
        }
        self.in_flight = InFlight::new(self.queues());
    }
}

/// A queue that requests come by.
fn of(io: &mut Io, index: usize) -> (&GuestRam, &mut Queue) {
    io.queue(index).expect("its driver has set it up")
}

fn failed(source: io::Error) -> device::Error {
    device::Error::Host { what: "cannot have io_uring do requests".into(), source }
}

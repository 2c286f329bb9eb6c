//! The device with [a ring](super::uring): several requests are under way, and each is given back when it is done.
//!
//! Flushes wait for one another: of a file's lost data the kernel tells only one of those that ask at the same time. What comes while
//! one is under way is done by the next one. What changes the file otherwise, or cannot pass the page cache, is done while nothing else is.

use std::io;
use std::time::Instant;

use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;

use super::uring::{Job, Kind, Request, Uring};
use super::{Answer, Blk, DATA_MAX, Failure, Progress, QUEUE_SIZES};
use crate::memory::GuestRam;
use crate::virtio::device;
use crate::virtio::iovec::Iovecs;
use crate::virtio::queue::{self, NOTIFY_AFTER, Queue, SERVE_FOR};
use crate::virtio::rate_limiter::RateLimiter;

/// How much data is given to the kernel at once: in the page cache it is copied before the driver hears of anything.
const BATCH: u64 = 4 << 20;

/// Requests that are under way.
#[derive(Default)]
pub struct InFlight {
    /// How many.
    count: usize,
    /// Those that the flush under way is for, each with the bytes that it has written,
    flushing: Vec<(Request, u64)>,
    /// and the next one.
    to_flush: Vec<(Request, u64)>,
    /// Those that the host failed, and that are to be done again.
    failed: Vec<u16>,
    /// Data that the kernel has not been told of.
    queued: u64,
}

impl InFlight {
    pub fn is_empty(&self) -> bool {
        self.count == 0
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
            return if self.in_flight.count > 0 { Err(Failure::Alone) } else { Ok(Progress::Done) };
        }
        let mut buffers = uring.spare(ram);
        std::mem::swap(&mut buffers, iovecs);
        uring.begin(Job { kind, request: self.current, buffers, offset, len, done: 0 });
        self.in_flight.queued += len;
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
        if self.in_flight.count > 0 { Err(Failure::Alone) } else { Ok(()) }
    }

    fn has_room(&self) -> bool {
        let bytes = self.uring.as_ref().map_or(0, Uring::bytes);
        self.in_flight.count < usize::from(QUEUE_SIZES[0]) && bytes < DATA_MAX
    }

    fn is_waiting(&self) -> bool {
        self.limit.as_ref().is_some_and(RateLimiter::is_waiting)
    }

    /// Gives the driver back what is done, and begins what it made available.
    pub(super) fn serve_ring(
        &mut self,
        ram: &GuestRam,
        queue: &mut Queue,
        iovecs: &mut Iovecs,
    ) -> Result<(), device::Error> {
        let mut budget = queue.size();
        let start = Instant::now();
        let mut notified = start;
        self.give_back(ram, queue)?;
        queue.disable_kicks(ram)?;
        loop {
            while !self.stopped && !self.is_waiting() && self.has_room() && self.in_flight.queued < BATCH && budget > 0
            {
                let Some(chain) = queue.pop(ram)? else { break };
                let head = chain.head_index();
                budget -= 1;
                match self.limited_request(ram, chain, iovecs) {
                    Answer::Used(written) => queue.add_used(ram, head, written)?,
                    Answer::Begun => self.in_flight.count += 1,
                    Answer::Again => queue.undo_pop(),
                    Answer::Alone => {
                        queue.undo_pop();
                        self.drain(ram, queue)?;
                    }
                }
            }
            self.give_back(ram, queue)?;
            if self.stopped {
                return self.stand_still(ram, queue);
            }
            // What is done, or the timer, calls again.
            if self.is_waiting() || !self.has_room() {
                return Ok(queue.notify(ram)?);
            }
            let now = Instant::now();
            if now - notified >= NOTIFY_AFTER {
                queue.notify(ram)?;
                notified = now;
            }
            if budget == 0 || now - start >= SERVE_FOR {
                queue.notify(ram)?;
                queue.enable_kicks(ram)?;
                queue.kick_again();
                return Ok(());
            }
            if !queue.rest(ram)? {
                return Ok(queue.notify(ram)?);
            }
            queue.disable_kicks(ram)?;
        }
    }

    /// Tells the kernel what was begun, and the driver what is done, as long as there is something.
    fn give_back(&mut self, ram: &GuestRam, queue: &mut Queue) -> Result<(), device::Error> {
        loop {
            self.flush_next(ram, queue)?;
            let Some(uring) = &mut self.uring else { return Ok(()) };
            uring.submit().map_err(failed)?;
            self.in_flight.queued = 0;
            let mut any = false;
            while let Some((job, result)) = self.uring.as_mut().and_then(Uring::reap) {
                any = true;
                self.done(ram, queue, job, result)?;
            }
            let has_more = self.uring.as_ref().is_some_and(Uring::is_queued);
            if !any && !has_more {
                return Ok(());
            }
        }
    }

    /// Begins the next flush.
    fn flush_next(&mut self, ram: &GuestRam, queue: &mut Queue) -> Result<(), queue::Error> {
        let InFlight { flushing, to_flush, .. } = &mut self.in_flight;
        if !flushing.is_empty() || to_flush.is_empty() {
            return Ok(());
        }
        std::mem::swap(flushing, to_flush);
        let request = flushing[0].0;
        if self.image.flush_has_failed() {
            return self.flushed(ram, queue);
        }
        if let Some(uring) = &mut self.uring {
            let buffers = uring.spare(ram);
            uring.begin(Job { kind: Kind::Flush, request, buffers, offset: 0, len: 0, done: 0 });
        }
        Ok(())
    }

    /// Gives the driver back what waited for a flush.
    fn flushed(&mut self, ram: &GuestRam, queue: &mut Queue) -> Result<(), queue::Error> {
        let mut flushed = std::mem::take(&mut self.in_flight.flushing);
        for (request, written) in flushed.drain(..) {
            let result = self.image.check_flushed().map_err(|error| Failure::Host("flush", error));
            self.give(ram, queue, request, written, result)?;
        }
        self.in_flight.flushing = flushed;
        Ok(())
    }

    fn done(
        &mut self,
        ram: &GuestRam,
        queue: &mut Queue,
        job: Job,
        result: io::Result<()>,
    ) -> Result<(), queue::Error> {
        let Job { kind, request, buffers, done, .. } = job;
        if let Some(uring) = &mut self.uring {
            uring.put_back(buffers);
        }
        match kind {
            Kind::Read => {
                self.counts.read_bytes.add(done);
                self.give(ram, queue, request, done, result.map_err(|error| Failure::Host("read", error)))
            }
            Kind::Write => {
                self.counts.written_bytes.add(done);
                // A driver that does not flush takes it for safe.
                if result.is_ok() && !self.negotiated(VIRTIO_BLK_F_FLUSH) && self.flushes() {
                    self.in_flight.to_flush.push((request, 0));
                    return Ok(());
                }
                self.give(ram, queue, request, 0, result.map_err(|error| Failure::Host("write", error)))
            }
            Kind::Flush => {
                if let Err(error) = result {
                    self.flush_error(&error);
                }
                self.flushed(ram, queue)
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
        ram: &GuestRam,
        queue: &mut Queue,
        request: Request,
        written: u64,
        result: Result<(), Failure>,
    ) -> Result<(), queue::Error> {
        self.in_flight.count -= 1;
        match self.answer(ram, request, written, result) {
            Some(written) => queue.add_used(ram, request.head, written),
            None => {
                self.in_flight.failed.push(request.head);
                Ok(())
            }
        }
    }

    /// Waits until nothing is under way.
    fn drain(&mut self, ram: &GuestRam, queue: &mut Queue) -> Result<(), device::Error> {
        self.give_back(ram, queue)?;
        while self.in_flight.count > 0 {
            let uring = self.uring.as_mut().filter(|uring| uring.len() > 0);
            let uring = uring.ok_or_else(|| failed(io::Error::other("some were lost")))?;
            uring.wait().map_err(failed)?;
            self.give_back(ram, queue)?;
        }
        Ok(())
    }

    /// Waits until nothing is under way, at any price: what cannot be given back to the driver is forgotten.
    pub(super) fn come_to_rest(&mut self, ram: &GuestRam, queue: &mut Queue) -> Result<(), device::Error> {
        let result = self.stand_still(ram, queue);
        if result.is_err() {
            self.forget();
        }
        result
    }

    /// Waits until nothing is under way, and has what the host failed be the driver's next requests.
    pub(super) fn stand_still(&mut self, ram: &GuestRam, queue: &mut Queue) -> Result<(), device::Error> {
        self.drain(ram, queue)?;
        queue.put_back(ram, &self.in_flight.failed)?;
        self.in_flight.failed.clear();
        Ok(queue.notify(ram)?)
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
        self.in_flight = InFlight::default();
    }
}

fn failed(source: io::Error) -> device::Error {
    device::Error::Host { what: "cannot have io_uring do requests".into(), source }
}

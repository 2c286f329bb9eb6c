//! A started virtqueue: the device's end of a split ring, with its notifications in both directions.
//!
//! Virtio 1.2, section 2.7 (split virtqueues).

use std::fmt::Display;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

pub use super::chain::Chain;
use crate::interrupt::Interrupt;
use crate::memory::{self, GuestRam};
use crate::metrics::Counter;

/// The driver broke the ring. The device cannot go on until the driver resets it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The rings say something impossible, or lie outside guest memory.
    #[error("virtqueue {index}: {what}")]
    Ring {
        /// Which queue.
        index: usize,
        /// What the device tried.
        what: &'static str,
        /// What stood in the way.
        #[source]
        source: virtio_queue::Error,
    },
}

/// How long a used buffer may wait for those after it before [`Queue::serve`] interrupts: longer than a whole batch of
/// requests that need no I/O takes, as an interrupt costs the guest more than such a request; shorter than a seek.
pub(super) const NOTIFY_AFTER: Duration = Duration::from_millis(1);
/// How long [`Queue::serve`] goes on while there are requests, so that its thread sees in time that it has to stop.
pub(super) const SERVE_FOR: Duration = Duration::from_millis(10);

/// Failures of one device that are logged as errors; a guest that goes on breaking it fills no disk with logs.
const LOGGED_FAILURES: u32 = 5;

/// `InterruptStatus` bit: the device used a buffer (virtio 1.2, 4.2.2).
pub const INTERRUPT_USED_RING: u32 = 1;
/// `InterruptStatus` bit: the configuration, or the device status, changed.
pub const INTERRUPT_CONFIG_CHANGE: u32 = 2;

/// What a device and its transport share while the device runs: the interrupt, and whether the device gave up.
pub struct InterruptState {
    line: Arc<dyn Interrupt>,
    status: AtomicU32,
    needs_reset: AtomicBool,
    failures: AtomicU32,
    /// How often the device changed its configuration, and what that is now.
    config: Mutex<(u32, Box<[u8]>)>,
    /// Interrupts so far.
    pub raised: Counter,
}

impl InterruptState {
    /// Nothing pending on `line`.
    pub fn new(line: Arc<dyn Interrupt>) -> Self {
        let (status, failures) = (AtomicU32::new(0), AtomicU32::new(0));
        let (needs_reset, config) = (AtomicBool::new(false), Mutex::default());
        Self { line, status, needs_reset, failures, config, raised: Counter::default() }
    }

    /// Sets `bits` in `InterruptStatus` and interrupts the guest.
    pub fn raise(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::SeqCst);
        self.raised.inc();
        if let Err(error) = self.line.trigger() {
            log::error!("cannot interrupt the guest: {error}");
        }
    }

    /// `InterruptStatus` as the driver reads it.
    pub fn pending(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// The driver wrote `InterruptACK`.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// The device `name` cannot go on, and the log hears `why`, if it is not the guest's habit: DEVICE_NEEDS_RESET
    /// (2.1.2) and a configuration change interrupt.
    pub fn fail(&self, name: &str, why: impl Display) {
        let often = self.failures.fetch_add(1, Ordering::Relaxed) >= LOGGED_FAILURES;
        log::log!(if often { log::Level::Debug } else { log::Level::Error }, "{name} needs a reset: {why}");
        self.needs_reset.store(true, Ordering::SeqCst);
        self.raise(INTERRUPT_CONFIG_CHANGE);
    }

    /// Whether the device gave up since the last reset.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// The device's configuration is another from now on, also after a reset: a configuration change interrupt.
    pub fn change_config(&self, config: &[u8]) {
        self.set_config(config, true);
    }

    /// As [`change_config`](Self::change_config), with an interrupt only if the driver `is_told`.
    pub fn set_config(&self, config: &[u8], is_told: bool) {
        let mut changed = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        *changed = (changed.0.wrapping_add(1), config.into());
        drop(changed);
        if is_told {
            self.raise(INTERRUPT_CONFIG_CHANGE);
        }
    }

    /// How often the configuration has changed, and what it is since.
    pub fn changed_config(&self) -> Option<(u32, Box<[u8]>)> {
        let changed = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        (changed.0 > 0).then(|| changed.clone())
    }

    /// Interrupts once more for what is pending, in case the first time was lost on the way to another host.
    pub fn raise_again(&self) {
        if self.pending() != 0
            && let Err(error) = self.line.trigger()
        {
            log::error!("cannot interrupt the guest: {error}");
        }
    }

    /// Takes over what was pending, and whether the device gave up.
    pub fn restore(&self, pending: u32, needs_reset: bool) {
        self.status.store(pending, Ordering::SeqCst);
        self.needs_reset.store(needs_reset, Ordering::SeqCst);
    }

    /// The configuration had changed `generation` times, and now is this one: a configuration change interrupt.
    pub fn restore_config(&self, generation: u32, config: &[u8]) {
        let mut changed = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        *changed = (generation.wrapping_add(1).max(1), config.into());
        drop(changed);
        self.status.fetch_or(INTERRUPT_CONFIG_CHANGE, Ordering::SeqCst);
    }

    /// The driver reset the device.
    pub fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
    }
}

/// A virtqueue of a started device.
pub struct Queue {
    index: usize,
    ring: virtio_queue::Queue,
    /// The used index when the driver was last considered for an interrupt.
    notified: u16,
    kick: Arc<EventFd>,
    interrupt: Arc<InterruptState>,
    polling: Polling,
}

/// Whether the device's thread looks for requests by itself.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Polling {
    /// No: the driver notifies.
    Off,
    /// Not at the moment,
    On,
    /// or it does: the driver was not asked to notify, and nothing was there.
    Now,
}

impl Queue {
    /// The queue of number `index`, as the driver set it up in `ring`; `kick` is its ioeventfd.
    pub fn new(index: usize, ring: virtio_queue::Queue, kick: Arc<EventFd>, interrupt: Arc<InterruptState>) -> Self {
        Self { index, notified: ring.next_used(), ring, kick, interrupt, polling: Polling::Off }
    }

    /// Its number.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Gives the ring back to the transport.
    pub fn into_ring(self) -> virtio_queue::Queue {
        self.ring
    }

    /// The ring as the driver set it up, and the device's position in it.
    pub fn ring(&self) -> &virtio_queue::Queue {
        &self.ring
    }

    /// The next available and the next used index.
    pub fn position(&self) -> (u16, u16) {
        (self.ring.next_avail(), self.ring.next_used())
    }

    /// Goes on after somebody else, who took what was available up to `next_available` and has used all of it.
    pub(super) fn go_on_after(&mut self, ram: &GuestRam, next_available: u16) -> Result<(), Error> {
        let used = self.ring.used_idx(ram, Ordering::Acquire);
        let used = used.map_err(|source| self.error("cannot read the used ring", source))?;
        self.ring.set_next_avail(next_available);
        self.ring.set_next_used(used.0);
        self.notified = used.0;
        Ok(())
    }

    /// The eventfd that the driver's notifications arrive on.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Number of descriptors the driver gave it.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// Takes the next available request, if there is one.
    pub fn pop<'a>(&mut self, ram: &'a GuestRam) -> Result<Option<Chain<'a>>, Error> {
        let error = |source| self.error("cannot read the available ring", source);
        let memory = |source| error(virtio_queue::Error::GuestMemory(source));
        let (ring, size, next) = (self.ring.avail_ring(), self.ring.size(), self.ring.next_avail());
        let available = ram.load(GuestAddress(ring + 2), Ordering::Acquire).map(u16::from_le).map_err(memory)?;
        if available == next {
            return Ok(None);
        }
        if available.wrapping_sub(next) > size {
            return Err(error(virtio_queue::Error::InvalidAvailRingIndex));
        }
        let slot = GuestAddress(ring + 4 + 2 * u64::from(next % size));
        let head = ram.load(slot, Ordering::Relaxed).map(u16::from_le).map_err(memory)?;
        // A head that is no descriptor could never be given back.
        if head >= size {
            return Err(error(virtio_queue::Error::InvalidDescriptorIndex));
        }
        self.ring.set_next_avail(next.wrapping_add(1));
        Ok(Some(Chain::new(ram, self.ring.desc_table(), size, head)))
    }

    /// Puts back the request popped last, if its head has not been added to the used ring.
    pub fn undo_pop(&mut self) {
        self.ring.set_next_avail(self.ring.next_avail().wrapping_sub(1));
    }

    /// Puts requests back that were popped, when all others that were have been given back: they are the next ones.
    ///
    /// For that they take the last places of the available ring that were read. No driver reads its own ring, and it writes
    /// to these places only when the requests have been given back.
    pub fn put_back(&mut self, ram: &GuestRam, heads: &[u16]) -> Result<(), Error> {
        let mut next = self.ring.next_avail();
        for head in heads.iter().rev() {
            next = next.wrapping_sub(1);
            let slot = GuestAddress(self.ring.avail_ring() + 4 + 2 * u64::from(next % self.ring.size()));
            ram.write_obj(head.to_le(), slot).map_err(|source| {
                self.error("cannot write the available ring", virtio_queue::Error::GuestMemory(source))
            })?;
        }
        self.ring.set_next_avail(next);
        Ok(())
    }

    /// Gives the request `head` back to the driver, `written` bytes of it written by the device. The driver is not
    /// told: see [`Queue::notify`].
    pub fn add_used(&mut self, ram: &GuestRam, head: u16, written: u32) -> Result<(), Error> {
        self.add_used_together(ram, std::iter::once((head, written)))
    }

    /// Gives several requests back at once, each with the bytes written: the driver sees all of them or none yet.
    pub fn add_used_together(&mut self, ram: &GuestRam, used: impl Iterator<Item = (u16, u32)>) -> Result<(), Error> {
        let error = |source| self.error("cannot write the used ring", virtio_queue::Error::GuestMemory(source));
        let ring = self.ring.used_ring();
        let mut next = self.ring.next_used();
        for (head, written) in used {
            let slot = GuestAddress(ring + 4 + 8 * u64::from(next % self.ring.size()));
            memory::write_obj(ram, [u32::from(head).to_le(), written.to_le()], slot).map_err(error)?;
            next = next.wrapping_add(1);
        }
        ram.store(next.to_le(), GuestAddress(ring + 2), Ordering::Release).map_err(error)?;
        self.ring.set_next_used(next);
        Ok(())
    }

    /// Interrupts the driver, if anything was used since the last call and the driver asked to hear of it.
    pub fn notify(&mut self, ram: &GuestRam) -> Result<(), Error> {
        if self.is_to_be_told(ram)? {
            self.interrupt.raise(INTERRUPT_USED_RING);
        }
        Ok(())
    }

    /// Whether anything was used since the last call, of which the driver asked to hear.
    pub(super) fn is_to_be_told(&mut self, ram: &GuestRam) -> Result<bool, Error> {
        let (old, new) = (self.notified, self.ring.next_used());
        if new == old {
            return Ok(false);
        }
        self.notified = new;
        // What was used must be visible before looking whether the driver wants to know.
        fence(Ordering::SeqCst);
        let avail = self.ring.avail_ring();
        let load = |offset: u64| {
            let value: Result<u16, _> = ram.load(GuestAddress(avail + offset), Ordering::Relaxed);
            value.map(u16::from_le).map_err(|source| {
                self.error("cannot read the available ring", virtio_queue::Error::GuestMemory(source))
            })
        };
        // virtio_queue neither looks at the flag (2.7.7) nor knows of what was used together.
        if self.ring.event_idx_enabled() {
            let event = load(4 + 2 * u64::from(self.ring.size()))?;
            Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
        } else {
            Ok(u32::from(load(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0)
        }
    }

    /// Asks the driver not to notify, as the device is looking at the ring anyway.
    pub fn disable_kicks(&mut self, ram: &GuestRam) -> Result<(), Error> {
        let result = self.ring.disable_notification(ram);
        result.map_err(|source| self.error("cannot write the used ring's flags", source))
    }

    /// Asks the driver to notify again. True when requests became available meanwhile: look again before waiting.
    pub fn enable_kicks(&mut self, ram: &GuestRam) -> Result<bool, Error> {
        let result = self.ring.enable_notification(ram);
        result.map_err(|source| self.error("cannot write avail_event", source))
    }

    /// Has [`rest`](Self::rest) leave it to the device's thread to look for requests.
    pub(super) fn poll(&mut self) {
        self.polling = Polling::On;
    }

    /// The device has done all there was: asks the driver to notify again, or has the device's thread look first. True when
    /// requests became available meanwhile: look again before waiting.
    pub fn rest(&mut self, ram: &GuestRam) -> Result<bool, Error> {
        if self.polling == Polling::Off {
            return self.enable_kicks(ram);
        }
        self.polling = Polling::Now;
        self.has_more(ram)
    }

    /// Whether the device's thread is to look for requests.
    pub(super) fn is_looked_at(&self) -> bool {
        self.polling == Polling::Now
    }

    /// Whether it has to look no more: there is something, or the device is to find what is wrong.
    pub(super) fn is_found(&self, ram: &GuestRam) -> bool {
        self.is_looked_at() && self.has_more(ram).unwrap_or(true)
    }

    /// The device is called for what was found. Whether it was looked at.
    pub(super) fn stop_looking(&mut self) -> bool {
        let is_looked_at = self.is_looked_at();
        if is_looked_at {
            self.polling = Polling::On;
        }
        is_looked_at
    }

    /// Nothing was found: asks the driver to notify again.
    pub(super) fn wait(&mut self, ram: &GuestRam) -> Result<(), Error> {
        if self.stop_looking() && self.enable_kicks(ram)? {
            self.kick_again();
        }
        Ok(())
    }

    fn has_more(&self, ram: &GuestRam) -> Result<bool, Error> {
        let available = self.ring.avail_idx(ram, Ordering::Acquire);
        let available = available.map_err(|source| self.error("cannot read the available ring", source))?;
        Ok(available.0 != self.ring.next_avail())
    }

    /// Does what the driver made available: `request` handles one chain and returns how many bytes of it it wrote.
    ///
    /// The driver is interrupted once, at the end, for all requests that it finds; in between only when they take long.
    /// After as many requests as the ring has descriptors, or 10 ms, it returns even if there are more, having
    /// kicked itself: a driver that never stops adding cannot keep the device from being stopped.
    pub fn serve(&mut self, ram: &GuestRam, mut request: impl FnMut(Chain<'_>) -> u32) -> Result<(), Error> {
        self.serve_some(ram, |chain| Some(request(chain)))
    }

    /// As [`serve`](Self::serve), to the first chain that `request` does not handle now: that one stays available, and
    /// the driver need not notify.
    pub fn serve_some(
        &mut self,
        ram: &GuestRam,
        mut request: impl FnMut(Chain<'_>) -> Option<u32>,
    ) -> Result<(), Error> {
        let mut budget = self.size();
        let start = Instant::now();
        let mut notified = start;
        self.disable_kicks(ram)?;
        loop {
            while let Some(chain) = self.pop(ram)? {
                let head = chain.head_index();
                let Some(written) = request(chain) else {
                    self.undo_pop();
                    return self.notify(ram);
                };
                self.add_used(ram, head, written)?;
                let now = Instant::now();
                if now - notified >= NOTIFY_AFTER {
                    self.notify(ram)?;
                    notified = now;
                }
                budget -= 1;
                if budget == 0 || now - start >= SERVE_FOR {
                    self.notify(ram)?;
                    self.enable_kicks(ram)?;
                    self.kick_again();
                    return Ok(());
                }
            }
            if !self.rest(ram)? {
                return self.notify(ram);
            }
            self.disable_kicks(ram)?;
        }
    }

    /// Has the device called for this queue once more, as if the driver had notified.
    pub fn kick_again(&self) {
        // It fails only when the counter is full, after 2^64 - 2 kicks.
        let _ = self.kick.write(1);
    }

    fn error(&self, what: &'static str, source: virtio_queue::Error) -> Error {
        Error::Ring { index: self.index, what, source }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::super::testing::{BUFFERS, END, Ring};
    use super::*;

    #[derive(Default)]
    struct Line(AtomicU32);

    impl Interrupt for Line {
        fn trigger(&self) -> io::Result<()> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }

    /// A queue of 4, both ends of it.
    fn queue(event_idx: bool) -> (GuestRam, Ring, Queue, Arc<Line>) {
        let ram = crate::memory::reserve(&[0..END]).unwrap();
        let driver = Ring::new(&ram, 0, 4);
        let mut ring = virtio_queue::Queue::new(4).unwrap();
        ring.try_set_desc_table_address(GuestAddress(driver.descriptors())).unwrap();
        ring.try_set_avail_ring_address(GuestAddress(driver.driver())).unwrap();
        ring.try_set_used_ring_address(GuestAddress(driver.device())).unwrap();
        ring.set_event_idx(event_idx);
        ring.set_ready(true);
        let line = Arc::new(Line::default());
        let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        (ram, driver, Queue::new(0, ring, kick, Arc::new(InterruptState::new(line.clone()))), line)
    }

    #[test]
    fn a_driver_that_never_stops_adding_does_not_keep_the_thread() {
        for event_idx in [false, true] {
            let (ram, mut driver, mut queue, line) = queue(event_idx);
            driver.add(&[(BUFFERS, 1, false)]);
            let mut served = 0;
            let again = |_: Chain<'_>| {
                served += 1;
                driver.add(&[(BUFFERS, 1, false)]);
                7
            };
            queue.serve(&ram, again).unwrap();
            // One round of the ring, or less on a slow machine.
            assert!((1..=4).contains(&served), "{served}");
            assert_eq!(queue.kick().read().unwrap(), 1);
            assert!(line.0.load(Ordering::SeqCst) > 0);
            assert_eq!(driver.used(), (0..served).map(|number| (number, 7)).collect::<Vec<_>>());
            // The last one is there for the next call.
            queue.serve(&ram, |_| 0).unwrap();
            assert_eq!(driver.used().len(), 1);
            assert!(queue.kick().read().is_err());
        }
    }

    #[test]
    fn slow_requests_are_announced_one_by_one() {
        let (ram, mut driver, mut queue, line) = queue(false);
        for _ in 0..3 {
            driver.add(&[(BUFFERS, 1, false)]);
        }
        let mut served = 0;
        let mut slow = |_: Chain<'_>| {
            let start = Instant::now();
            while start.elapsed() < NOTIFY_AFTER {}
            served += 1;
            0
        };
        // On a busy machine one of them takes longer than may be served at once.
        for _ in 0..3 {
            queue.serve(&ram, &mut slow).unwrap();
        }
        assert_eq!(served, 3);
        assert_eq!(line.0.load(Ordering::SeqCst), 3);
    }

    #[test]
    fn requests_that_are_there_together_are_announced_once() {
        // One quiet moment of the host among so many tries is enough.
        let announced = (0..1000).map(|_| {
            let (ram, mut driver, mut queue, line) = queue(false);
            for _ in 0..4 {
                driver.add(&[(BUFFERS, 1, false)]);
            }
            queue.serve(&ram, |_| 0).unwrap();
            line.0.load(Ordering::SeqCst)
        });
        assert_eq!(announced.min(), Some(1));
        let (ram, mut driver, mut queue, line) = queue(false);
        driver.add(&[(BUFFERS, 1, false)]);
        queue.serve(&ram, |_| 0).unwrap();
        assert_eq!((line.0.load(Ordering::SeqCst), queue.interrupt.raised.get()), (1, 1));
    }

    #[test]
    fn a_driver_that_does_not_want_to_hear_is_not_interrupted() {
        for event_idx in [false, true] {
            let (ram, mut driver, mut queue, line) = queue(event_idx);
            // Nothing was used: there is nothing to tell.
            queue.serve(&ram, |_| 0).unwrap();
            queue.notify(&ram).unwrap();
            assert_eq!(line.0.load(Ordering::SeqCst), 0);
            driver.add(&[(BUFFERS, 1, false)]);
            let (flag, event) = (driver.driver(), driver.driver() + 4 + 2 * 4);
            // Only one of the two counts (2.7.7.1).
            ram.write_obj(u16::from(!event_idx), GuestAddress(flag)).unwrap();
            ram.write_obj(if event_idx { 1u16 } else { 0 }, GuestAddress(event)).unwrap();
            queue.serve(&ram, |_| 0).unwrap();
            assert_eq!(line.0.load(Ordering::SeqCst), 0);
            ram.write_obj(0u16, GuestAddress(flag)).unwrap();
            driver.add(&[(BUFFERS, 1, false)]);
            ram.write_obj(1u16, GuestAddress(event)).unwrap();
            queue.serve(&ram, |_| 0).unwrap();
            assert_eq!(line.0.load(Ordering::SeqCst), 1);
        }
    }

    #[test]
    fn what_is_not_handled_now_stays_available() {
        for event_idx in [false, true] {
            let (ram, mut driver, mut queue, line) = queue(event_idx);
            for _ in 0..3 {
                driver.add(&[(BUFFERS, 1, false)]);
            }
            let mut left = 2;
            let two = |_: Chain<'_>| {
                left -= 1;
                (left >= 0).then_some(5)
            };
            queue.serve_some(&ram, two).unwrap();
            assert_eq!(driver.used(), [(0, 5), (1, 5)]);
            assert!(line.0.load(Ordering::SeqCst) > 0, "the driver hears of the two");
            queue.serve(&ram, |_| 6).unwrap();
            assert_eq!(driver.used(), [(2, 6)]);
        }
    }

    #[test]
    fn a_driver_is_not_to_notify_while_its_queue_is_looked_at() {
        for event_idx in [false, true] {
            let (ram, mut driver, mut queue, _) = queue(event_idx);
            queue.poll();
            // Whether the driver is to notify of the next request (2.7.7.2, 2.7.10).
            let device = driver.device();
            let is_wanted = |available: u16| {
                let (flags, event): (u16, u16) = (
                    ram.read_obj(GuestAddress(device)).unwrap(),
                    ram.read_obj(GuestAddress(device + 4 + 8 * 4)).unwrap(),
                );
                if event_idx { event == available } else { flags == 0 }
            };
            for round in 0..8 {
                driver.add(&[(BUFFERS, 1, false)]);
                queue.serve(&ram, |_| 1).unwrap();
                assert!(!queue.is_found(&ram) && !is_wanted(driver.available), "round {round}");
                driver.add(&[(BUFFERS, 1, false)]);
                assert!(queue.is_found(&ram));
                queue.serve(&ram, |_| 1).unwrap();
                queue.wait(&ram).unwrap();
                assert!(is_wanted(driver.available) && queue.kick().read().is_err());
            }
            // It comes at the last moment.
            driver.add(&[(BUFFERS, 1, false)]);
            assert!(!queue.is_found(&ram), "it was notified of");
            queue.serve(&ram, |_| 1).unwrap();
            driver.add(&[(BUFFERS, 1, false)]);
            queue.wait(&ram).unwrap();
            assert_eq!(queue.kick().read().unwrap(), 1);
        }
    }

    #[test]
    fn a_head_that_is_no_descriptor_breaks_the_ring() {
        let (ram, mut driver, mut queue, _) = queue(true);
        driver.publish(4);
        assert!(queue.serve(&ram, |_| panic!("there is no request")).is_err());
    }
}

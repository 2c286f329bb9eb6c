//! The memory balloon: the guest puts pages that it can do without into it, and the host has them meanwhile. Virtio 1.2,
//! section 5.5.
//!
//! Nothing of what the guest says about its pages is kept: a page that it names is given back to the host at once, and is
//! there again, empty, when the guest uses it. So a guest that lies about its balloon harms nobody but itself.

mod statistics;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

pub use self::statistics::{GuestStatistics, Statistics};
use super::change::{self, Change};
use super::device::{self, DriverField, Io, VirtioDevice};
use super::queue::Chain;
use crate::memory::{self, GuestRam};
use crate::metrics::{Counter, Metrics};
use crate::size::Size;

/// The balloon's unit (5.5.6), whatever the guest's own pages are.
pub const PAGE: u64 = PAGE_BYTES as u64;
const PAGE_BYTES: usize = 4096;

const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_PAGE_REPORTING: u64 = 1 << 5;

const QUEUE_SIZE: u16 = 128;
/// Offset of `actual` in the configuration, which the driver writes.
const ACTUAL: u32 = 4;
/// Pages that one request may name: Linux names 256. No request takes long.
const REQUEST_PAGES: usize = 16 << 10;
/// Page numbers that are read at once.
const BATCH: usize = 256;
/// What the statistics' timer is watched as.
const TIMER: u32 = 0;
/// Host errors of one device that are logged as such.
const LOGGED_ERRORS: u64 = 5;

/// A balloon to be made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Balloon"))]
pub struct Spec {
    /// How much memory the guest is asked to put into it from the start, a multiple of 4 KiB; nothing if it is not said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<Size>,
    /// Whether the guest takes memory out by itself before it ends a process for lack of it.
    pub deflate_on_oom: bool,
    /// How often the guest is asked for its statistics; never if it is not said.
    #[serde(with = "crate::duration")]
    #[cfg_attr(test, schemars(with = "Option<String>"))]
    pub stats: Option<Duration>,
    /// Whether the guest tells of pages that it does not use, without being asked.
    pub free_page_reporting: bool,
}

/// A balloon that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It would take more than there is.
    #[error("cannot have a balloon of {asked} in a machine with {memory} of memory: it must not be larger than that")]
    TooLarge {
        /// The size asked for.
        asked: Size,
        /// The guest's memory.
        memory: Size,
    },
    /// It ends within a page.
    #[error("cannot have a balloon of {asked}: it is not a multiple of {PAGE} bytes")]
    PartOfPage {
        /// The size asked for.
        asked: Size,
    },
    /// The guest was not told of statistics when it started.
    #[error("cannot ask for the balloon's statistics: it was made without (stats=TIME)")]
    NoStatistics,
    /// The machine has no balloon.
    #[error("cannot ask for the balloon's statistics: the machine has no balloon")]
    NoBalloon,
}

impl Spec {
    /// Checks the figures for a guest with so much `memory`.
    pub fn validate(&self, memory: Size) -> Result<(), Error> {
        self.size.map_or(Ok(()), |size| pages(size, memory).map(drop))
    }
}

/// A balloon's size in pages.
fn pages(asked: Size, memory: Size) -> Result<u32, Error> {
    if asked > memory {
        return Err(Error::TooLarge { asked, memory });
    }
    if !asked.get().is_multiple_of(PAGE) {
        return Err(Error::PartOfPage { asked });
    }
    u32::try_from(asked.get() / PAGE).map_err(|_| Error::TooLarge { asked, memory })
}

/// What is known of a balloon; readable wherever the device is.
#[derive(Debug, Default)]
pub struct Shared {
    /// How much the guest has put in, in pages, as it says.
    actual: Arc<DriverField>,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    target: u32,
    /// What the guest said last, if it is asked for statistics.
    guest: Option<GuestStatistics>,
}

impl Shared {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How large the balloon is and is to be, and what the guest last said of its memory.
    pub fn statistics(&self) -> Statistics {
        let known = self.known();
        let size = |pages: u32| Size::bytes(u64::from(pages) * PAGE);
        let actual = self.actual.value.load(Ordering::Relaxed);
        Statistics { target: size(known.target), actual: size(actual), guest: known.guest.clone() }
    }
}

/// What the device has done.
#[derive(Default, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Counts {
    /// Pages that were put in.
    inflated: Counter,
    /// Pages that were taken out.
    deflated: Counter,
    /// Bytes that the guest said it does not use.
    reported_bytes: Counter,
    /// Statistics that came.
    statistics: Counter,
    /// Pages that there are not, and requests that were none.
    errors: Counter,
}

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

/// A balloon.
pub struct Balloon {
    memory: Size,
    features: u64,
    config: [u8; 8],
    shared: Arc<Shared>,
    counts: Arc<Counts>,
    interval: Option<Duration>,
    /// Of each queue, by its index.
    roles: Vec<Role>,
    running: Option<Running>,
    host_errors: u64,
}

/// What there is only between start and stop.
struct Running {
    timer: Option<OwnedFd>,
    /// The buffer that the driver waits to have back before it says more.
    held: Option<u16>,
}

impl Balloon {
    /// A balloon for a guest with so much `memory`.
    pub fn new(spec: &Spec, memory: Size) -> Result<Self, Error> {
        let target = pages(spec.size.unwrap_or(Size::bytes(0)), memory)?;
        let mut features = 0;
        for (wanted, feature) in [
            (spec.stats.is_some(), F_STATS_VQ),
            (spec.deflate_on_oom, F_DEFLATE_ON_OOM),
            (spec.free_page_reporting, F_PAGE_REPORTING),
        ] {
            features |= if wanted { feature } else { 0 };
        }
        let actual = Arc::new(DriverField { offset: ACTUAL, ..Default::default() });
        let shared = Arc::new(Shared { actual, known: Mutex::default() });
        let mut balloon = Self {
            memory,
            features,
            config: [0; 8],
            shared,
            counts: Arc::default(),
            interval: spec.stats,
            roles: Vec::new(),
            running: None,
            host_errors: 0,
        };
        balloon.set_target(target);
        Ok(balloon)
    }

    /// What tells of it wherever it is.
    pub fn shared(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    fn set_target(&mut self, pages: u32) {
        // struct virtio_balloon_config (5.5.4): num_pages, actual.
        self.config[..4].copy_from_slice(&pages.to_le_bytes());
        self.shared.known().target = pages;
    }

    /// Sets the timer of the statistics.
    fn set_timer(&self) -> io::Result<()> {
        let timer = self.running.as_ref().and_then(|running| running.timer.as_ref());
        let (Some(timer), Some(interval)) = (timer, self.interval) else { return Ok(()) };
        let time = Timespec::try_from(interval).map_err(io::Error::other)?;
        let spec = Itimerspec { it_interval: time, it_value: time };
        timerfd_settime(timer, TimerfdTimerFlags::empty(), &spec)?;
        Ok(())
    }

    /// Takes the pages of one request out of the host's hands, or back.
    fn take_pages(&mut self, ram: &GuestRam, chain: Chain<'_>, inflate: bool) {
        let mut left = REQUEST_PAGES;
        let mut run: Range<u64> = 0..0;
        for buffer in chain.readable() {
            if buffer.len() % 4 != 0 || buffer.len() as usize / 4 > left {
                self.counts.errors.inc();
                break;
            }
            let mut at = buffer.addr().0;
            let mut count = buffer.len() as usize / 4;
            left -= count;
            while count > 0 {
                let mut numbers = [0u8; 4 * BATCH];
                let bytes = &mut numbers[..4 * count.min(BATCH)];
                if ram.read_slice(bytes, GuestAddress(at)).is_err() {
                    self.counts.errors.inc();
                    break;
                }
                for number in bytes.as_chunks::<4>().0 {
                    let start = u64::from(u32::from_le_bytes(*number)) * PAGE;
                    self.take_page(ram, start, &mut run, inflate);
                }
                // It does not wrap: this much was read there.
                at += bytes.len() as u64;
                count -= bytes.len() / 4;
            }
        }
        self.discard(ram, run);
    }

    /// Counts the page at `start`, and gathers those that follow one another, in either direction, in `run`.
    fn take_page(&mut self, ram: &GuestRam, start: u64, run: &mut Range<u64>, inflate: bool) {
        if !ram.check_range(GuestAddress(start), PAGE_BYTES) {
            return self.counts.errors.inc();
        }
        if !inflate {
            return self.counts.deflated.inc();
        }
        self.counts.inflated.inc();
        if start == run.end && !run.is_empty() {
            run.end += PAGE;
        } else if start + PAGE == run.start {
            run.start = start;
        } else {
            let before = std::mem::replace(run, start..start + PAGE);
            self.discard(ram, before);
        }
    }

    fn discard(&mut self, ram: &GuestRam, range: Range<u64>) {
        if let Err(error) = memory::discard(ram, range) {
            self.counts.errors.inc();
            self.host_errors += 1;
            let level = if self.host_errors > LOGGED_ERRORS { log::Level::Debug } else { log::Level::Warn };
            log::log!(level, "virtio-balloon: cannot give the guest's memory back to the host: {error}");
        }
    }

    /// Takes the pages of which the driver says that it does not use them, the buffers of a request (5.5.6.7).
    fn take_report(&mut self, ram: &GuestRam, chain: Chain<'_>) {
        for buffer in chain.writable() {
            let (start, len) = (buffer.addr().0, u64::from(buffer.len()));
            let end = start.saturating_add(len) / PAGE * PAGE;
            let start = start.div_ceil(PAGE).saturating_mul(PAGE);
            if start >= end || !ram.check_range(GuestAddress(start), usize::try_from(end - start).unwrap_or(usize::MAX))
            {
                self.counts.errors.inc();
                continue;
            }
            self.counts.reported_bytes.add(end - start);
            self.discard(ram, start..end);
        }
    }

    /// Reads what the driver says, and keeps its buffer until the next time that it is asked (5.5.6.3).
    fn take_statistics(&mut self, index: usize, io: &mut Io) -> Result<(), device::Error> {
        let Some(running) = &mut self.running else { return Ok(()) };
        let Some((ram, queue)) = io.queue(index) else { return Ok(()) };
        let mut used = 0;
        while let Some(chain) = queue.pop(ram)? {
            let head = chain.head_index();
            match GuestStatistics::read(ram, chain) {
                Some(read) => {
                    self.counts.statistics.inc();
                    self.shared.known().guest = Some(read);
                }
                None => self.counts.errors.inc(),
            }
            // Of a driver that gives more than one the last counts.
            if let Some(before) = running.held.replace(head) {
                queue.add_used(ram, before, 0)?;
            }
            used += 1;
            if used == QUEUE_SIZE {
                queue.kick_again();
                break;
            }
        }
        queue.notify(ram)?;
        if queue.enable_kicks(ram)? {
            queue.kick_again();
        }
        Ok(())
    }

    /// Gives the buffer back: the driver fills it anew.
    fn ask_statistics(&mut self, io: &mut Io) -> Result<(), device::Error> {
        let Some(index) = self.roles.iter().position(|role| *role == Role::Statistics) else { return Ok(()) };
        let held = self.running.as_mut().and_then(|running| running.held.take());
        let (Some(head), Some((ram, queue))) = (held, io.queue(index)) else { return Ok(()) };
        queue.add_used(ram, head, 0)?;
        Ok(queue.notify(ram)?)
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        let count = 2 + (self.features & (F_STATS_VQ | F_PAGE_REPORTING)).count_ones() as usize;
        &[QUEUE_SIZE; 4][..count]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn driver_field(&self) -> Option<Arc<DriverField>> {
        Some(self.shared.actual.clone())
    }

    fn metrics(&self) -> Arc<dyn Metrics> {
        self.counts.clone()
    }

    fn start(&mut self, features: u64, io: &mut Io) -> Result<(), device::Error> {
        // Drivers leave out the queue of a feature that was not negotiated, and number the others without a gap.
        self.roles.clear();
        self.roles.extend([Role::Inflate, Role::Deflate]);
        self.roles.extend((features & F_STATS_VQ != 0).then_some(Role::Statistics));
        self.roles.extend((features & F_PAGE_REPORTING != 0).then_some(Role::Reporting));
        let timer = self.roles.contains(&Role::Statistics).then(|| {
            let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
            io.watch(TIMER, &timer, EventFlags::IN)?;
            io::Result::Ok(timer)
        });
        let host = |source| device::Error::Host { what: "cannot make a timer for the statistics".into(), source };
        self.running = Some(Running { timer: timer.transpose().map_err(host)?, held: None });
        self.set_timer().map_err(host)
    }

    fn queue_ready(&mut self, index: usize, io: &mut Io) -> Result<(), device::Error> {
        let Some(role) = self.roles.get(index).copied() else { return Ok(()) };
        if role == Role::Statistics {
            return self.take_statistics(index, io);
        }
        let Some((ram, queue)) = io.queue(index) else { return Ok(()) };
        queue.serve(ram, |chain| {
            match role {
                Role::Inflate | Role::Deflate => self.take_pages(ram, chain, role == Role::Inflate),
                Role::Statistics | Role::Reporting => self.take_report(ram, chain),
            }
            0
        })?;
        Ok(())
    }

    fn host_ready(&mut self, _token: u32, io: &mut Io) -> Result<(), device::Error> {
        if let Some(timer) = self.running.as_ref().and_then(|running| running.timer.as_ref()) {
            // It says how often the timer ran out.
            let _ = rustix::io::read(timer, &mut [0; 8]);
        }
        self.ask_statistics(io)
    }

    fn change(&mut self, change: &Change, _io: Option<&mut Io>) -> Result<(), change::Error> {
        match change {
            Change::Balloon(size) => {
                let target = pages(*size, self.memory)?;
                self.set_target(target);
                Ok(())
            }
            Change::StatisticsInterval(_) if self.features & F_STATS_VQ == 0 => Err(Error::NoStatistics.into()),
            Change::StatisticsInterval(interval) => {
                let before = self.interval.replace(*interval);
                self.set_timer().map_err(|error| {
                    self.interval = before;
                    change::Error::Timer(error)
                })
            }
            other => Err(other.unsupported()),
        }
    }

    fn settle(&mut self, io: &mut Io) {
        // The driver owns it again in any case, and fills it anew if it goes on with the device.
        if let Some(index) = self.roles.iter().position(|role| *role == Role::Statistics)
            && let Some(head) = self.running.as_mut().and_then(|running| running.held.take())
            && let Some((ram, queue)) = io.queue(index)
        {
            let _ = queue.add_used(ram, head, 0).and_then(|()| queue.notify(ram));
        }
    }

    fn stop(&mut self, io: &mut Io) {
        self.settle(io);
        if let Some(Err(error)) = self.running.take().and_then(|running| running.timer).map(|timer| io.unwatch(timer)) {
            log::error!("cannot stop watching a timer: {error}");
        }
    }
}

//! What a virtio device is, and what it works with while it runs.
//!
//! A device has one owner at a time. Until the driver sets DRIVER_OK the transport owns it; then it moves, with its
//! queues, to a thread of its own; a reset ends the thread and hands both back. So a device needs no lock, no vCPU waits
//! for its I/O, and reset, pause and save are the same path.
//!
//! ```text
//!           FEATURES_OK, DRIVER_OK                    kick, host fd
//!  [idle: transport] ----start----> [running: own thread] ----> queue_ready, host_ready
//!         ^                               |      |
//!         +---------stop (reset)----------+      +--Err--> DEVICE_NEEDS_RESET, waits for stop
//! ```

use std::io;
use std::os::fd::{AsFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use rustix::event::epoll::{self, EventFlags};

use super::change::{self, Change};
use super::queue::{self, INTERRUPT_USED_RING, InterruptState, Queue};
use crate::memory::GuestRam;
use crate::metrics::Metrics;

/// Why a running device gave up: the driver broke a ring, or the host failed it. The driver sees DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The driver broke a virtqueue.
    #[error(transparent)]
    Queue(#[from] queue::Error),
    /// The host failed the device.
    #[error("{what}")]
    Host {
        /// What was attempted, on what.
        what: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// A virtio device, whatever the transport.
pub trait VirtioDevice: Send {
    /// The device ID of virtio 1.2, section 5: `VIRTIO_ID_BLOCK`, ...
    fn device_type(&self) -> u32;

    /// The device's own feature bits. The transport adds those of the ring and of the transport itself:
    /// VERSION_1, EVENT_IDX, INDIRECT_DESC.
    fn features(&self) -> u64;

    /// The largest size of each of its queues: powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// The device configuration space as the driver reads it, little-endian.
    fn config(&self) -> &[u8];

    /// The open files of the host that are this device's alone, whatever other device's thread is taken over: a disk's.
    fn own_files(&self) -> Vec<RawFd> {
        vec![]
    }

    /// The field of the configuration that the driver may write, if there is one.
    fn driver_field(&self) -> Option<Arc<DriverField>> {
        None
    }

    /// The device's counters, for reports; they stay readable wherever the device is.
    fn metrics(&self) -> Arc<dyn Metrics>;

    /// The driver is ready: `features` are what was negotiated, `io` what the device works with until [`stop`].
    /// Called once on the device's thread before any other callback.
    ///
    /// [`stop`]: VirtioDevice::stop
    fn start(&mut self, features: u64, io: &mut Io) -> Result<(), Error> {
        let _ = (features, io);
        Ok(())
    }

    /// The driver notified queue `index`, or [`Queue::kick_again`] did. Each queue has one such call after [`start`],
    /// for what the driver added before. There may be nothing to do.
    ///
    /// [`start`]: VirtioDevice::start
    fn queue_ready(&mut self, index: usize, io: &mut Io) -> Result<(), Error>;

    /// How long its thread may look for requests at this time, when there are none, before it waits to be notified.
    fn poll(&self) -> Duration {
        Duration::ZERO
    }

    /// A host descriptor given to [`Io::watch`] with this `token` has one of the watched events.
    fn host_ready(&mut self, token: u32, io: &mut Io) -> Result<(), Error> {
        let _ = (token, io);
        Ok(())
    }

    /// Somebody outside the guest changes the device, which runs with `io`, or is idle. A change of what
    /// [`config`](Self::config) gives is told to the driver by whoever calls. On an error nothing has changed, unless the
    /// device [gave up](change::Error::Device).
    fn change(&mut self, change: &Change, io: Option<&mut Io>) -> Result<(), change::Error> {
        let _ = io;
        Err(change.unsupported())
    }

    /// The device is being paused: finishes what the host has in hand. The last call on this thread.
    fn pause(&mut self, io: &mut Io) -> Result<(), Error> {
        let _ = io;
        Ok(())
    }

    /// The device goes on after a pause. Each of its queues is called next.
    fn resume(&mut self) {}

    /// The device is paused, and its queues are about to be saved: gives back requests that it took and has not done. It may
    /// go on afterwards, and is called for each queue then.
    fn settle(&mut self, io: &mut Io) {
        let _ = io;
    }

    /// The driver goes on with this device in place of one that was saved elsewhere: what that one had from the host is
    /// gone. Called before [`start`], which is as the first time.
    ///
    /// [`start`]: VirtioDevice::start
    fn replace(&mut self) {}

    /// Whether the host has lost what the driver wrote, and the driver is told so whenever it asks: a saved machine must not
    /// forget it.
    fn has_lost_data(&self) -> bool {
        false
    }

    /// The host had lost some in the machine that was saved.
    fn restore_lost_data(&mut self) {}

    /// How many pairs of queues the driver has said that it uses, of a network card; else 1.
    fn queue_pairs(&self) -> u16 {
        1
    }

    /// It was so many in the machine that was saved, as far as it [starts](Self::start) next. False if there are not as many.
    fn restore_queue_pairs(&mut self, pairs: u16) -> bool {
        pairs == 1
    }

    /// The device is being stopped, also after a failure: finish what is in flight, or leave it unused. The last
    /// callback; the device may be started again.
    fn stop(&mut self, io: &mut Io) {
        let _ = io;
    }
}

/// A field of 32 bits in the configuration that the driver writes, and both sides read.
#[derive(Debug, Default)]
pub struct DriverField {
    /// Where it is, in bytes.
    pub offset: u32,
    /// What is in it.
    pub value: AtomicU32,
}

/// What a running device works with.
pub struct Io {
    /// Guest memory.
    pub ram: GuestRam,
    /// The device's queues by index. One that the driver did not set up is `None`.
    pub queues: Vec<Option<Queue>>,
    /// To interrupt the driver outside of a queue.
    pub interrupt: Arc<InterruptState>,
    /// What the device's thread waits on.
    pub(super) events: rustix::fd::OwnedFd,
}

/// Set in the epoll data of host descriptors, whose token is in the low half; clear for queues.
pub(super) const HOST_TOKEN: u64 = 1 << 32;

impl Io {
    /// Guest memory and queue `index` together; `None` if the driver did not set the queue up.
    pub fn queue(&mut self, index: usize) -> Option<(&GuestRam, &mut Queue)> {
        let queue = self.queues.get_mut(index)?.as_mut()?;
        Some((&self.ram, queue))
    }

    /// Interrupts the driver once for all queues that have something to tell, as [`Queue::notify`] does for one.
    pub fn notify(&mut self) -> Result<(), queue::Error> {
        let mut is_to_be_told = false;
        for queue in self.queues.iter_mut().flatten() {
            is_to_be_told |= queue.is_to_be_told(&self.ram)?;
        }
        if is_to_be_told {
            self.interrupt.raise(INTERRUPT_USED_RING);
        }
        Ok(())
    }

    /// Has the device called for each queue once more, as if the driver had notified.
    pub fn kick_all(&self) {
        self.queues.iter().flatten().for_each(Queue::kick_again);
    }

    /// Calls the device's `host_ready(token)` for as long as `fd` has one of `events` (level-triggered). Watching an
    /// fd again replaces what it is watched for. The device unwatches `fd` before it closes it.
    pub fn watch(&self, token: u32, fd: impl AsFd, events: EventFlags) -> io::Result<()> {
        let data = epoll::EventData::new_u64(HOST_TOKEN | u64::from(token));
        match epoll::add(&self.events, &fd, data, events) {
            Err(rustix::io::Errno::EXIST) => Ok(epoll::modify(&self.events, &fd, data, events)?),
            other => Ok(other?),
        }
    }

    /// Calls the device's `queue_ready(index)` for each event of `kick`, as from the start.
    pub(super) fn watch_kick(&self, index: usize, kick: impl AsFd) -> io::Result<()> {
        let data = epoll::EventData::new_u64(index as u64);
        match epoll::add(&self.events, kick, data, EventFlags::IN | EventFlags::ET) {
            Err(rustix::io::Errno::EXIST) => Ok(()),
            other => Ok(other?),
        }
    }

    /// Stops watching `fd`.
    pub fn unwatch(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.events, fd)?)
    }
}

//! The thread a started device runs on: it owns the device and its queues, and gives them back when it is stopped.

#![expect(unsafe_code, reason = "blocks signals, and lends descriptors of eventfds to epoll")]

use std::error::Error as _;
use std::fmt::Write as _;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use rustix::io::{read, retry_on_intr, write};
use vmm_sys_util::eventfd::EventFd;

use super::device::{Error, HOST_TOKEN, Io, VirtioDevice};
use super::queue::{InterruptState, Queue};
use crate::memory::GuestRam;

/// What moves to the thread and back: a device, and its queues by index (`None` if not set up).
pub type Parts = (Box<dyn VirtioDevice>, Vec<Option<virtio_queue::Queue>>);

/// Epoll data of the eventfd that ends the thread.
const END: u64 = u64::MAX;
/// What is written to it: the device is stopped, also if it was to be paused before,
const STOP: u64 = 2;
/// or only paused.
const PAUSE: u64 = 1;

/// A running device.
pub struct Worker {
    name: String,
    stop: Arc<OwnedFd>,
    /// `None` once joined.
    thread: Option<JoinHandle<Option<Left>>>,
}

/// A device that is running, but for its thread: what it was watching and had under way is kept.
pub struct Paused(Box<Loop>);

/// What a thread leaves when it ends.
enum Left {
    Stopped(Parts),
    Paused(Box<Loop>),
}

impl Worker {
    /// Starts a thread `bantam-NAME` (the host shows 15 bytes of it) for the device and its queues; `kicks` are their
    /// ioeventfds, by index.
    ///
    /// # Errors
    /// When the host has no descriptor or thread left: the device and its queues come back with what it said.
    pub fn start(
        name: &str,
        (device, rings): Parts,
        features: u64,
        ram: &GuestRam,
        kicks: &[Arc<EventFd>],
        interrupt: &Arc<InterruptState>,
    ) -> Result<Self, (io::Error, Parts)> {
        // The thread comes first and is handed the device when nothing can fail any more.
        let (give, take) = mpsc::sync_channel::<Loop>(1);
        match Self::prepare(name, kicks, &rings, take) {
            Ok((events, worker)) => {
                let queues = (rings.into_iter().zip(kicks).enumerate())
                    .map(|(i, (ring, kick))| Some(Queue::new(i, ring?, kick.clone(), interrupt.clone())))
                    .collect();
                let io = Io { ram: ram.clone(), queues, interrupt: interrupt.clone(), events };
                let stop = worker.stop.clone();
                give.send(Loop { name: name.into(), device, io, features, stop, state: State::New })
                    .expect("the thread takes one device before it does anything else");
                Ok(worker)
            }
            Err(error) => Err((error, (device, rings))),
        }
    }

    fn prepare(
        name: &str,
        kicks: &[Arc<EventFd>],
        rings: &[Option<virtio_queue::Queue>],
        take: mpsc::Receiver<Loop>,
    ) -> io::Result<(OwnedFd, Self)> {
        let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        epoll::add(&events, &stop, EventData::new_u64(END), EventFlags::IN)?;
        for (index, (_, kick)) in (0..).zip(rings.iter().zip(kicks)).filter(|(_, (ring, _))| ring.is_some()) {
            // SAFETY: `kick` is borrowed, and so open, for the call.
            let fd = unsafe { BorrowedFd::borrow_raw(kick.as_raw_fd()) };
            // Edge-triggered: each kick is an event although nobody reads the counter, which saves a system call.
            epoll::add(&events, fd, EventData::new_u64(index), EventFlags::IN | EventFlags::ET)?;
        }
        Ok((events, Self::spawn(name, stop, take)?))
    }

    fn spawn(name: &str, stop: Arc<OwnedFd>, take: mpsc::Receiver<Loop>) -> io::Result<Self> {
        let _blocked = BlockedSignals::new();
        let thread =
            thread::Builder::new().name(format!("bantam-{name}")).spawn(move || Some(take.recv().ok()?.run()))?;
        Ok(Self { name: name.into(), stop, thread: Some(thread) })
    }

    /// Ends the thread after what the device is doing now, and takes the device and its rings back. `None` if the
    /// thread panicked, and the device with it.
    pub fn stop(mut self) -> Option<Parts> {
        match self.join(STOP)? {
            Left::Stopped(parts) => Some(parts),
            Left::Paused(paused) => Some(Paused(paused).stop()),
        }
    }

    /// Ends the thread after what the device is doing now. What the device and its driver have begun goes on when it is
    /// [resumed](Paused::resume). `None` if the thread panicked, and the device with it.
    pub fn pause(mut self) -> Option<Paused> {
        match self.join(PAUSE)? {
            Left::Paused(paused) => Some(Paused(paused)),
            Left::Stopped(_) => None,
        }
    }

    fn join(&mut self, how: u64) -> Option<Left> {
        let thread = self.thread.take()?;
        if let Err(error) = write(&self.stop, &how.to_ne_bytes()) {
            log::error!("{}: cannot stop the device's thread: {error}", self.name);
            return None;
        }
        thread.join().unwrap_or_else(|_| {
            log::error!("{}: the device's thread panicked: there is no such device any more", self.name);
            None
        })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.join(STOP);
    }
}

impl Paused {
    /// Starts a thread for the device again.
    ///
    /// # Errors
    /// When the host has no thread left: the device stays paused.
    pub fn resume(self) -> Result<Worker, (io::Error, Self)> {
        let (give, take) = mpsc::sync_channel::<Loop>(1);
        match Worker::spawn(&self.0.name, Arc::clone(&self.0.stop), take) {
            Ok(worker) => {
                give.send(*self.0).expect("the thread takes one device before it does anything else");
                Ok(worker)
            }
            Err(error) => Err((error, self)),
        }
    }

    /// Stops the device for good: it, and its rings.
    pub fn stop(self) -> Parts {
        self.0.into_parts()
    }
}

/// What the thread works with.
struct Loop {
    name: String,
    device: Box<dyn VirtioDevice>,
    io: Io,
    features: u64,
    stop: Arc<OwnedFd>,
    state: State,
}

/// How far a device has come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// It was not started yet.
    New,
    Started,
    /// It needs a reset.
    Failed,
}

impl Loop {
    fn run(mut self) -> Left {
        let _guard = FailOnPanic(self.name.clone(), self.io.interrupt.clone());
        if self.state != State::Failed
            && let Err(error) = self.serve()
        {
            let mut text = error.to_string();
            let mut cause = error.source();
            while let Some(source) = cause {
                let _ = write!(text, ": {source}");
                cause = source.source();
            }
            self.io.interrupt.fail(&self.name, text);
            self.state = State::Failed;
        }
        let mut how = [0; 8];
        // The eventfd blocks until `stop` or `pause` writes it.
        let _ = retry_on_intr(|| read(&self.stop, &mut how));
        if u64::from_ne_bytes(how) == PAUSE { Left::Paused(Box::new(self)) } else { Left::Stopped(self.into_parts()) }
    }

    fn into_parts(mut self) -> Parts {
        self.device.stop(&mut self.io);
        (self.device, self.io.queues.into_iter().map(|queue| Some(queue?.into_ring())).collect())
    }

    /// Calls the device until it is stopped or paused, or fails.
    fn serve(&mut self) -> Result<(), Error> {
        let Self { device, io, .. } = self;
        if self.state == State::New {
            device.start(self.features, io)?;
            self.state = State::Started;
        }
        // The driver may have added buffers before it was ready, and notifications from then may be lost.
        for index in 0..io.queues.len() {
            if io.queues[index].is_some() {
                device.queue_ready(index, io)?;
            }
        }
        let mut events = [epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; 16];
        loop {
            let count = retry_on_intr(|| epoll::wait(&io.events, &mut events, None))
                .map_err(|error| Error::Host { what: "cannot wait for events".into(), source: error.into() })?;
            let ready = &events[..count];
            // Copied out of the packed struct that the kernel fills.
            let tokens = || ready.iter().map(|event| event.data.u64());
            let end = tokens().any(|token| token == END);
            // What came with the end is not told again: one who pauses needs it done.
            for token in tokens().filter(|token| *token != END) {
                let low = u32::try_from(token & 0xffff_ffff).expect("32 bits");
                if token & HOST_TOKEN != 0 {
                    device.host_ready(low, io)?;
                } else {
                    device.queue_ready(low as usize, io)?;
                }
            }
            if end {
                return Ok(());
            }
        }
    }
}

/// Sets DEVICE_NEEDS_RESET if the device's code panics: the driver learns it, and the machine goes on.
struct FailOnPanic(String, Arc<InterruptState>);

impl Drop for FailOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            self.1.fail(&self.0, "its thread panicked");
        }
    }
}

/// Blocks all signals of this thread while it lives. A thread started meanwhile has them blocked for good: the
/// process's signals go to others.
struct BlockedSignals(libc::sigset_t);

impl BlockedSignals {
    fn new() -> Self {
        let mut all = MaybeUninit::uninit();
        // SAFETY: sigfillset initializes the set it is given.
        unsafe { libc::sigfillset(all.as_mut_ptr()) };
        let mut before = MaybeUninit::uninit();
        // SAFETY: `all` is initialized, and `before` has room for a set.
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), before.as_mut_ptr()) };
        // SAFETY: pthread_sigmask fails only for an unknown operation: it wrote the set.
        Self(unsafe { before.assume_init() })
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        // SAFETY: the set is one that pthread_sigmask gave.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, std::ptr::null_mut()) };
    }
}

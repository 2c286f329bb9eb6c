//! The thread a started device runs on: it owns the device and its queues, and gives them back when it is stopped.

#![expect(unsafe_code, reason = "blocks signals, and lends descriptors of eventfds to epoll")]

#[cfg(fuzzing)]
mod fuzzing;
#[cfg(test)]
mod handover;

use std::error::Error as _;
use std::fmt::Write as _;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::fd::OwnedFd;
use rustix::io::{read, retry_on_intr, write};
use vmm_sys_util::eventfd::EventFd;

use super::change::{self, Change};
use super::device::{Error, HOST_TOKEN, Io, VirtioDevice};
use super::polling::Polling;
use super::queue::{InterruptState, Queue, SERVE_FOR};
use crate::memory::GuestRam;
use crate::sandbox;

/// What moves to the thread and back: a device, and its queues by index (`None` if not set up).
pub type Parts = (Box<dyn VirtioDevice>, Vec<Option<virtio_queue::Queue>>);

/// Epoll data of the eventfd that tells of messages.
const WAKE: u64 = u64::MAX;

/// What the thread is told.
enum Message {
    /// Have this device; the first message.
    Take(Box<Loop>),
    Change(Box<Request>),
    End(End),
    /// End as paused, and let go of this then.
    Rest(mpsc::Sender<()>),
}

/// How a thread ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// The device is stopped,
    Stop,
    /// or only paused.
    Pause,
}

/// A change of the device, and where the answer goes.
pub struct Request {
    /// What to change.
    pub change: Change,
    /// Who hears what became of it.
    pub answer: mpsc::Sender<Result<(), change::Error>>,
}

impl Request {
    /// Changes `device`, which runs with `io` unless it is idle. `interrupt` has the configuration if that is another
    /// then, and interrupts a driver that `is_there`.
    pub fn apply(
        &self,
        device: &mut dyn VirtioDevice,
        io: Option<&mut Io>,
        interrupt: &InterruptState,
        is_there: bool,
    ) -> Result<(), change::Error> {
        let before: Box<[u8]> = device.config().into();
        let result = device.change(&self.change, io);
        if *before != *device.config() {
            interrupt.set_config(device.config(), is_there);
        }
        result
    }

    /// Tells who asked what became of it.
    pub fn answer(self, result: Result<(), change::Error>) {
        // Whoever asked may have gone.
        let _ = self.answer.send(result);
    }
}

/// A running device.
pub struct Worker {
    name: String,
    messages: mpsc::Sender<Message>,
    wake: Arc<OwnedFd>,
    /// `None` once joined.
    thread: Option<JoinHandle<Option<Left>>>,
    rests: bool,
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
        sandbox: &sandbox::Device,
    ) -> Result<Self, (io::Error, Parts)> {
        // The thread comes first and is handed the device when nothing can fail any more.
        let prepare = || {
            let (events, wake) = events(kicks, &rings)?;
            Ok((events, Self::spawn(name, wake, sandbox.clone())?))
        };
        match prepare() {
            Ok((events, worker)) => {
                let io = io(rings, ram, kicks, interrupt, events);
                worker.give(Loop::new(name, device, io, features, worker.wake.clone(), sandbox.clone()));
                Ok(worker)
            }
            Err(error) => Err((error, (device, rings))),
        }
    }

    fn spawn(name: &str, wake: Arc<OwnedFd>, sandbox: sandbox::Device) -> io::Result<Self> {
        let _blocked = BlockedSignals::new();
        let (messages, inbox) = mpsc::channel();
        let thread = crate::threads::named(format!("bantam-{name}")).spawn(move || {
            let entered = sandbox.enter();
            match inbox.recv() {
                Ok(Message::Take(device)) => Some(device.run(&inbox, entered)),
                _ => None,
            }
        })?;
        Ok(Self { name: name.into(), messages, wake, thread: Some(thread), rests: false })
    }

    fn give(&self, device: Box<Loop>) {
        let given = self.messages.send(Message::Take(device));
        assert!(given.is_ok(), "the thread takes one device before it does anything else");
    }

    /// Has the thread change the device after what it is doing now. A request that it has not come to when it is stopped is
    /// dropped: who waits for the answer learns that there is none.
    pub fn change(&self, request: Request) {
        match self.messages.send(Message::Change(Box::new(request))) {
            Ok(()) => {
                if let Err(error) = write(&self.wake, &1u64.to_ne_bytes()) {
                    log::error!("{}: cannot wake the device's thread: {error}", self.name);
                }
            }
            // A thread that panicked has dropped the other end.
            Err(mpsc::SendError(Message::Change(request))) => request.answer(Err(change::Error::Gone)),
            Err(_) => {}
        }
    }

    /// Has the thread end after what the device is doing now, so that [`pause`](Self::pause), which is to follow, need not wait
    /// for it. Nothing ever comes to the receiver, but its other end is gone when that is so.
    pub fn rest(&mut self) -> mpsc::Receiver<()> {
        let (resting, rested) = mpsc::channel();
        self.rests = true;
        if self.messages.send(Message::Rest(resting)).is_ok()
            && let Err(error) = write(&self.wake, &1u64.to_ne_bytes())
        {
            log::error!("{}: cannot wake the device's thread: {error}", self.name);
        }
        rested
    }

    /// Whether the thread was told to end.
    pub fn rests(&self) -> bool {
        self.rests
    }

    /// Ends the thread after what the device is doing now, and takes the device and its rings back. `None` if the
    /// thread panicked, and the device with it.
    pub fn stop(mut self) -> Option<Parts> {
        match self.join(End::Stop)? {
            Left::Stopped(parts) => Some(parts),
            Left::Paused(paused) => Some(Paused(paused).stop()),
        }
    }

    /// Ends the thread after what the device is doing now. What the device and its driver have begun goes on when it is
    /// [resumed](Paused::resume). `None` if the thread panicked, and the device with it.
    pub fn pause(mut self) -> Option<Paused> {
        match self.join(End::Pause)? {
            Left::Paused(paused) => Some(Paused(paused)),
            Left::Stopped(_) => None,
        }
    }

    fn join(&mut self, how: End) -> Option<Left> {
        let thread = self.thread.take()?;
        let _ = self.messages.send(Message::End(how));
        if let Err(error) = write(&self.wake, &1u64.to_ne_bytes()) {
            log::error!("{}: cannot stop the device's thread: {error}", self.name);
            return None;
        }
        thread.join().unwrap_or_else(|_| {
            log::error!("{}: the device's thread panicked: there is no such device any more", self.name);
            None
        })
    }
}

/// What a device's thread waits on, and what wakes it.
fn events(kicks: &[Arc<EventFd>], rings: &[Option<virtio_queue::Queue>]) -> io::Result<(OwnedFd, Arc<OwnedFd>)> {
    let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
    epoll::add(&events, &wake, EventData::new_u64(WAKE), EventFlags::IN)?;
    for (index, (_, kick)) in (0..).zip(rings.iter().zip(kicks)).filter(|(_, (ring, _))| ring.is_some()) {
        // SAFETY: `kick` is borrowed, and so open, for the call.
        let fd = unsafe { BorrowedFd::borrow_raw(kick.as_raw_fd()) };
        // Edge-triggered: each kick is an event although nobody reads the counter, which saves a system call.
        epoll::add(&events, fd, EventData::new_u64(index), EventFlags::IN | EventFlags::ET)?;
    }
    Ok((events, wake))
}

/// What a device works with.
fn io(
    rings: Vec<Option<virtio_queue::Queue>>,
    ram: &GuestRam,
    kicks: &[Arc<EventFd>],
    interrupt: &Arc<InterruptState>,
    events: OwnedFd,
) -> Io {
    let queues = (rings.into_iter().zip(kicks).enumerate())
        .map(|(i, (ring, kick))| Some(Queue::new(i, ring?, kick.clone(), interrupt.clone())))
        .collect();
    Io { ram: ram.clone(), queues, interrupt: interrupt.clone(), events }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.join(End::Stop);
    }
}

impl Paused {
    /// The device's queues by index, without what it took from them and has not done: the next available and the next
    /// used index of each, none if it is not set up.
    pub fn positions(&mut self) -> Vec<Option<(u16, u16)>> {
        // Without threads nobody has.
        #[cfg(fuzzing)]
        self.0.pause();
        let Loop { device, io, .. } = &mut *self.0;
        device.settle(io);
        io.queues.iter().map(|queue| queue.as_ref().map(Queue::position)).collect()
    }

    /// Whether the host has lost what its driver wrote.
    pub fn has_lost_data(&self) -> bool {
        self.0.device.has_lost_data()
    }

    /// How many pairs of queues the driver uses.
    pub fn queue_pairs(&self) -> u16 {
        self.0.device.queue_pairs()
    }

    /// Starts a thread for the device again.
    ///
    /// # Errors
    /// When the host has no thread left: the device stays paused.
    pub fn resume(self) -> Result<Worker, (io::Error, Self)> {
        match Worker::spawn(&self.0.name, Arc::clone(&self.0.wake), self.0.sandbox.clone()) {
            Ok(worker) => {
                worker.give(self.0);
                Ok(worker)
            }
            Err(error) => Err((error, self)),
        }
    }

    /// Changes the device, unless there may still be something under way.
    pub fn change(&mut self, request: Request) {
        if self.0.is_restless {
            request.answer(Err(change::Error::Gone));
        } else {
            self.0.change(request);
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
    wake: Arc<OwnedFd>,
    sandbox: sandbox::Device,
    state: State,
    polling: Polling,
    /// It did not come to rest when it was paused.
    is_restless: bool,
    /// Who waits for that.
    resting: Option<mpsc::Sender<()>>,
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

/// What came of waiting once.
struct Turn {
    #[cfg_attr(not(fuzzing), expect(dead_code, reason = "a thread waits until there are some"))]
    events: usize,
    woken: bool,
}

impl Loop {
    fn new(
        name: &str,
        device: Box<dyn VirtioDevice>,
        io: Io,
        features: u64,
        wake: Arc<OwnedFd>,
        sandbox: sandbox::Device,
    ) -> Box<Self> {
        let (name, state, polling) = (name.into(), State::New, Polling::default());
        let (is_restless, resting) = (false, None);
        Box::new(Self { name, device, io, features, wake, sandbox, state, polling, is_restless, resting })
    }

    fn run(mut self: Box<Self>, messages: &mpsc::Receiver<Message>, entered: io::Result<()>) -> Left {
        let _guard = FailOnPanic(self.name.clone(), self.io.interrupt.clone());
        let mut end = None;
        if let Err(error) = entered {
            self.io.interrupt.fail(&self.name, format_args!("cannot restrict its thread: {error}"));
            self.state = State::Failed;
        }
        if self.state != State::Failed {
            match self.serve(messages) {
                Ok(how) => end = how,
                Err(error) => self.fail(&error),
            }
        }
        while end.is_none() {
            end = self.take(messages.recv());
        }
        if end == Some(End::Pause) {
            self.pause();
        }
        self.resting = None;
        if end == Some(End::Pause) { Left::Paused(self) } else { Left::Stopped(self.into_parts()) }
    }

    /// The device gave up.
    fn fail(&mut self, error: &Error) {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(source) = cause {
            let _ = write!(text, ": {source}");
            cause = source.source();
        }
        self.io.interrupt.fail(&self.name, text);
        self.state = State::Failed;
    }

    /// Has the device finish what it has in hand.
    fn pause(&mut self) {
        if self.state != State::New
            && let Err(error) = self.device.pause(&mut self.io)
        {
            self.is_restless = true;
            if self.state == State::Started {
                self.fail(&error);
            }
        }
    }

    /// Does what the thread was told; how it is to end, if it is.
    fn take(&mut self, message: Result<Message, mpsc::RecvError>) -> Option<End> {
        match message {
            Ok(Message::Change(request)) => self.change(*request),
            Ok(Message::Take(_)) => {}
            Ok(Message::End(end)) => return Some(end),
            Ok(Message::Rest(resting)) => {
                self.resting = Some(resting);
                return Some(End::Pause);
            }
            Err(mpsc::RecvError) => return Some(End::Stop),
        }
        None
    }

    fn change(&mut self, request: Request) {
        let interrupt = self.io.interrupt.clone();
        let result = request.apply(&mut *self.device, Some(&mut self.io), &interrupt, true);
        if let Err(change::Error::Device(error)) = &result {
            self.fail(error);
        }
        request.answer(result);
    }

    fn into_parts(mut self) -> Parts {
        self.device.stop(&mut self.io);
        (self.device, self.io.queues.into_iter().map(|queue| Some(queue?.into_ring())).collect())
    }

    /// Calls the device until it is stopped or paused, or fails; how it ends if that is by a message.
    fn serve(&mut self, messages: &mpsc::Receiver<Message>) -> Result<Option<End>, Error> {
        self.begin()?;
        while self.state == State::Started {
            if self.turn(None)?.woken {
                let _ = retry_on_intr(|| read(&self.wake, &mut [0; 8]));
                while let Ok(message) = messages.try_recv() {
                    if let Some(end) = self.take(Ok(message)) {
                        return Ok(Some(end));
                    }
                }
            }
        }
        Ok(None)
    }

    /// Starts the device, if it is not, and has it look at all queues.
    fn begin(&mut self) -> Result<(), Error> {
        if self.state == State::New {
            if !self.device.poll().is_zero() {
                self.io.queues.iter_mut().flatten().for_each(Queue::poll);
            }
            self.device.start(self.features, &mut self.io)?;
            self.state = State::Started;
        } else {
            self.device.resume();
        }
        // The driver may have added buffers before it was ready, and notifications from then may be lost.
        for index in 0..self.io.queues.len() {
            if self.io.queues[index].is_some() {
                self.device.queue_ready(index, &mut self.io)?;
            }
        }
        Ok(())
    }

    /// Looks at the queues for as long as pays, and calls the device for what is there.
    fn look(&mut self) -> Result<(), Error> {
        let start = Instant::now();
        // Then others have their turn.
        while self.io.queues.iter().flatten().any(Queue::is_looked_at) && start.elapsed() < SERVE_FOR {
            let Io { ram, queues, .. } = &self.io;
            let is_found = |queue: &Option<Queue>| queue.as_ref().is_some_and(|queue| queue.is_found(ram));
            let Some(index) = self.polling.look(self.device.poll(), || queues.iter().position(is_found)) else { break };
            self.io.queues[index].as_mut().map(Queue::stop_looking);
            self.device.queue_ready(index, &mut self.io)?;
        }
        let Io { ram, queues, .. } = &mut self.io;
        queues.iter_mut().flatten().try_for_each(|queue| Ok(queue.wait(ram)?))
    }

    /// Waits for events and calls the device for each.
    fn turn(&mut self, limit: Option<&Timespec>) -> Result<Turn, Error> {
        self.look()?;
        let mut events = [epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; 16];
        let count = retry_on_intr(|| epoll::wait(&self.io.events, &mut events, limit))
            .map_err(|error| Error::Host { what: "cannot wait for events".into(), source: error.into() })?;
        let ready = &events[..count];
        // Copied out of the packed struct that the kernel fills.
        let tokens = || ready.iter().map(|event| event.data.u64());
        // What came with the end is not told again: one who pauses needs it done.
        for token in tokens().filter(|token| *token != WAKE) {
            let low = u32::try_from(token & 0xffff_ffff).expect("32 bits");
            if token & HOST_TOKEN != 0 {
                self.device.host_ready(low, &mut self.io)?;
            } else {
                self.device.queue_ready(low as usize, &mut self.io)?;
            }
        }
        Ok(Turn { events: count, woken: tokens().any(|token| token == WAKE) })
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

/// Blocks all signals of this thread, but those that it causes, while it lives. A thread started meanwhile has them blocked for good: the
/// process's signals go to others.
struct BlockedSignals(libc::sigset_t);

impl BlockedSignals {
    fn new() -> Self {
        let mut all = MaybeUninit::uninit();
        // SAFETY: sigfillset initializes the set it is given.
        unsafe { libc::sigfillset(all.as_mut_ptr()) };
        // A violation of the sandbox is told by its handler.
        // SAFETY: the set is initialized.
        unsafe { libc::sigdelset(all.as_mut_ptr(), libc::SIGSYS) };
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

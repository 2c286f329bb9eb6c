//! The one inbox of a machine: all that can happen to it arrives here, and one thread reads it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};

use rustix::event::{EventfdFlags, eventfd};

use super::pause::Answer;
use super::{Destination, Lines, firecracker};
use crate::devices::transcript::Sight;
use crate::file::FileId;
use crate::virtio::change::Change;
use crate::{command, vcpu};

/// Something that happened to the machine, or that somebody wants of it.
#[derive(Debug)]
pub enum Event {
    /// A vCPU's thread reports.
    Vcpu(u32, vcpu::Report),
    /// The guest asked for a reset.
    Reset,
    /// The guest powered off.
    PowerOff,
    /// The guest said by pvpanic that it panicked.
    Pvpanic,
    /// The console showed something.
    Sight(Sight),
    /// The serial port can take input again.
    InputRoom,
    /// The guest has written something to its console, which nobody takes from there yet.
    Output,
    /// All that the guest wrote has been written.
    OutputEnd,
    /// Input for the guest.
    Input(Vec<u8>),
    /// The command's session reports.
    Command(command::Report),
    /// Somebody holding a handle ends the machine.
    Stop,
    /// Somebody presses Ctrl-Alt-Del.
    CtrlAltDel,
    /// Somebody has it pause.
    Pause(Answer<()>),
    /// The device of this name was changed.
    Changed(String, Change),
    /// Somebody has it go on.
    Resume(Answer<()>),
    /// Somebody has it saved.
    Snapshot(Destination, Answer<()>),
    /// Its state and memory have been taken.
    Saved,
    /// All of its memory is in this file.
    Written(FileId),
    /// Somebody has the guest end by itself; the answer is whether it could be asked.
    Terminate(Answer<bool>),
    /// Somebody wants to know how it goes.
    Report(Answer<super::Report>),
    /// Somebody wants its counters to be written, in this form.
    Metrics(Box<(Lines, firecracker::Metrics)>),
    /// Somebody wants them to be written now; the answer is whether they can be.
    FlushMetrics(Answer<bool>),
    /// The process that gives its memory has ended.
    MemoryLost,
    /// No device does anything until it goes on.
    DevicesPaused,
    /// The host failed the disk of this name, for this reason, and it is not to be told to the guest.
    DiskFailed(String, String),
}

/// Puts events into the inbox, from any thread.
#[derive(Debug, Clone)]
pub struct Sender {
    events: mpsc::Sender<Event>,
    wake: Arc<OwnedFd>,
}

impl Sender {
    /// Puts `event` into the inbox. Without effect once the machine is gone.
    pub fn send(&self, event: Event) {
        if self.events.send(event).is_ok() {
            // Fails only when the counter is full, and then the inbox is readable.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }
}

/// The inbox.
#[derive(Debug)]
pub struct Inbox {
    /// `None` once closed.
    events: Option<Receiver<Event>>,
    wake: Arc<OwnedFd>,
}

impl Inbox {
    /// An empty inbox and its first sender.
    pub fn new() -> io::Result<(Self, Sender)> {
        let (sender, events) = mpsc::channel();
        let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
        let sender = Sender { events: sender, wake: wake.clone() };
        Ok((Inbox { events: Some(events), wake }, sender))
    }

    /// Readable when there may be events.
    pub fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// It was seen to be readable, and is not until there is another event.
    pub fn woken(&self, readable: bool) {
        if readable {
            // Events that arrive after this make it readable again.
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        }
    }

    /// The next event, if there is one.
    pub fn take(&self) -> Option<Event> {
        self.events.as_ref()?.try_recv().ok()
    }

    /// Throws away what is in it, and what is sent from now on: who waits for an answer learns that there is none.
    pub fn close(&mut self) {
        self.events = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    fn is_awake(inbox: &Inbox) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(inbox.wake(), PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
    }

    #[test]
    fn the_inbox_is_readable_when_there_may_be_events() {
        let (inbox, sender) = Inbox::new().unwrap();
        assert!(!is_awake(&inbox));
        sender.send(Event::Reset);
        sender.clone().send(Event::Stop);
        inbox.woken(false);
        assert!(is_awake(&inbox));
        inbox.woken(true);
        assert!(!is_awake(&inbox));
        assert!(matches!(inbox.take(), Some(Event::Reset)));
        assert!(matches!(inbox.take(), Some(Event::Stop)));
        assert!(inbox.take().is_none());
        sender.send(Event::Stop);
        assert!(is_awake(&inbox));
    }
}

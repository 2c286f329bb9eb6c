//! Pausing a machine, and having it go on.
//!
//! ```text
//!            ask                  every vCPU          every device
//!  [running] ---> [leaving guest] ----------> [..] ----------------> [paused]
//!      ^                                                                 |
//!      +---------------------------- resume -----------------------------+
//! ```
//!
//! A vCPU leaves the guest after the access that it is at, a device's thread ends after the requests that it has in hand.
//! The latter are waited for by a thread, as a disk may be slow: signals and limits end a machine meanwhile as ever.

use std::collections::VecDeque;
use std::fs::Metadata;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use super::inbox::{Event, Sender};
use super::snapshot::saveable;
use super::{Destination, Error, Handle, Machine};
use crate::file::file_id;
use crate::{command, vcpu};

/// Why nothing could be asked of a machine through its [`Handle`].
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// It is no more.
    #[error("cannot {0} the machine: it has ended")]
    Ended(&'static str),
    /// It could not be done.
    #[error("cannot {what} the machine")]
    Failed {
        /// What was asked.
        what: &'static str,
        /// What stood in the way.
        #[source]
        source: Box<Error>,
    },
}

/// Where the answer to a question goes.
pub type Answer<T> = mpsc::SyncSender<Result<T, Error>>;

/// Where a machine is saved, and who is told what came of it.
pub type Save = (Destination, Answer<()>);

/// Asks the machine something, and waits for the answer.
pub(super) fn ask<T>(
    inbox: &Sender,
    what: &'static str,
    question: impl FnOnce(Answer<T>) -> Event,
) -> Result<T, Refusal> {
    let (sender, answer) = mpsc::sync_channel(1);
    inbox.send(question(sender));
    let answer = answer.recv().map_err(|_| Refusal::Ended(what))?;
    answer.map_err(|source| Refusal::Failed { what, source: Box::new(source) })
}

impl Handle {
    /// Pauses the machine, and returns when it stands still: no vCPU is in the guest, and no device works. Without effect
    /// on one that is paused. Before [`Machine::run`] it waits for the machine to run.
    ///
    /// # Errors
    /// When the machine has ended, or ends before it is paused.
    pub fn pause(&self) -> Result<(), Refusal> {
        ask(&self.sender, "pause", Event::Pause)
    }

    /// Has a machine that is paused go on, and returns when it does. Without effect on one that runs.
    ///
    /// # Errors
    /// When the machine has ended.
    pub fn resume(&self) -> Result<(), Refusal> {
        ask(&self.sender, "resume", Event::Resume)
    }

    /// Whether the machine stands still until somebody has it go on.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::SeqCst)
    }
}

/// How far a machine is from standing still, and what for.
#[derive(Debug, Default)]
pub(super) struct Pause {
    phase: Phase,
    /// When it was last asked not to run.
    since: Option<Instant>,
    /// It does not go on until somebody says so.
    held: bool,
    /// The same, for others, once it stands still.
    paused: Arc<AtomicBool>,
    /// Who waits for it to stand still, and then for it to go on.
    pausing: Vec<Answer<()>>,
    resuming: Vec<Answer<()>>,
    /// Where it is to be saved, before it goes on.
    saves: VecDeque<Save>,
    /// It is being saved.
    is_saving: bool,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Phase {
    #[default]
    Running,
    /// So many vCPUs have not left the guest yet.
    Vcpus(usize),
    /// Devices have something in hand.
    Devices,
    Paused,
}

impl Pause {
    /// Whether the guest runs, and nobody has asked it not to.
    pub fn is_running(&self) -> bool {
        self.phase == Phase::Running
    }

    /// Of a machine that may be `paused` when it starts.
    pub fn of_start(paused: bool) -> Self {
        Self { paused: Arc::new(AtomicBool::new(paused)), ..Self::default() }
    }

    /// Whether it stands still until somebody has it go on, for others.
    pub fn paused(&self) -> Arc<AtomicBool> {
        self.paused.clone()
    }
}

impl Machine {
    pub(super) fn pause(&mut self, answer: Answer<()>) {
        self.hold();
        match self.pause.phase {
            Phase::Paused => tell(answer),
            _ => self.pause.pausing.push(answer),
        }
    }

    /// The machine stands still until somebody has it go on: then the disk does what it could not do once more.
    pub(super) fn disk_failed(&mut self, device: &str, why: &str) {
        log::error!("{device}: {why}: the machine is paused, and asks for it again when it is resumed");
        self.tell("disk-error", serde_json::json!({"device": device, "message": why}));
        self.hold();
    }

    fn hold(&mut self) {
        self.pause.held = true;
        if self.pause.phase == Phase::Paused {
            self.pause.paused.store(true, Ordering::SeqCst);
        } else {
            self.stand_still();
        }
    }

    pub(super) fn snapshot(&mut self, destination: Destination, answer: Answer<()>) {
        // Memory that another process gives may be that of any file.
        let is_served = |old: &Metadata| self.memory_handler.is_some() && old.len() == self.config.memory.get();
        let is_whole = |old: &Metadata| {
            let id = file_id(old);
            self.memory_files.contains(&id) || self.last_memory_file == Some(id) || is_served(old)
        };
        // The last is that of the snapshot that it was restored from.
        let bases = self.memory_files.split_last().map_or(&[][..], |(_, bases)| bases);
        let checked = saveable(&self.config).and_then(|()| destination.check(&self.config, is_whole, bases));
        match checked {
            Ok(destination) => {
                self.pause.saves.push_back((destination, answer));
                self.stand_still();
            }
            Err(error) => {
                let _ = answer.send(Err(error.into()));
            }
        }
    }

    /// The guest waits for the command. It is given when the machine has been saved, if that is wanted.
    pub(super) fn ready_for_command(&mut self) {
        match self.save.take() {
            Some(save) => {
                self.may_give = true;
                self.pause.saves.push_back(save);
                self.stand_still();
            }
            None => self.command.iter_mut().for_each(command::Session::give),
        }
    }

    fn stand_still(&mut self) {
        match self.pause.phase {
            Phase::Running => {
                self.pause.since = Some(Instant::now());
                self.pause.phase = Phase::Vcpus(self.threads.len());
                self.threads.iter().for_each(vcpu::Thread::pause);
            }
            Phase::Vcpus(_) | Phase::Devices => {}
            Phase::Paused => self.stands_still(),
        }
    }

    /// The machine starts, and its threads with it, but it is to stand still.
    pub(super) fn stand_still_from_start(&mut self) {
        (self.pause.since, self.pause.held) = (Some(Instant::now()), true);
        self.pause.phase = Phase::Vcpus(self.vcpus.len());
    }

    /// A vCPU has left the guest.
    pub(super) fn vcpu_paused(&mut self) -> Result<(), Error> {
        let Phase::Vcpus(left @ 1..) = self.pause.phase else { return Ok(()) };
        self.pause.phase = Phase::Vcpus(left - 1);
        if left > 1 {
            return Ok(());
        }
        self.pause.phase = Phase::Devices;
        let (buses, sender) = (Arc::clone(&self.buses), self.sender.clone());
        let pause = move || {
            buses.pause();
            sender.send(Event::DevicesPaused);
        };
        let spawned = crate::threads::named("bantam-pause".into()).spawn(pause);
        spawned.map(drop).map_err(|source| Error::Thread { what: "pausing", source })
    }

    /// No device does anything any more.
    pub(super) fn devices_paused(&mut self) {
        self.pause.phase = Phase::Paused;
        self.pause.paused.store(self.pause.held, Ordering::SeqCst);
        self.tell("paused", serde_json::Value::Null);
        self.pause.pausing.drain(..).for_each(tell);
        self.stands_still();
    }

    pub(super) fn resume(&mut self, answer: Answer<()>) {
        self.pause.held = false;
        self.pause.paused.store(false, Ordering::SeqCst);
        self.pause.resuming.push(answer);
        match self.pause.phase {
            Phase::Running => self.pause.resuming.drain(..).for_each(tell),
            Phase::Vcpus(_) | Phase::Devices => {}
            Phase::Paused => self.stands_still(),
        }
    }

    /// The machine need not stand still any more to be saved.
    pub(super) fn saved(&mut self) {
        self.pause.is_saving = false;
        self.stands_still();
    }

    /// Does what the machine stands still for, or goes on.
    fn stands_still(&mut self) {
        while !self.pause.is_saving
            && let Some((destination, answer)) = self.pause.saves.pop_front()
        {
            self.pause.is_saving = self.save(destination, !self.pause.held, answer);
        }
        if !self.pause.is_saving && !self.pause.held {
            self.go_on();
        }
    }

    fn go_on(&mut self) {
        self.buses.resume();
        if std::mem::take(&mut self.may_give) {
            self.command.iter_mut().for_each(command::Session::give);
        }
        self.threads.iter().for_each(vcpu::Thread::resume);
        self.pause.phase = Phase::Running;
        let stood = self.pause.since.take().map_or(Duration::ZERO, |since| since.elapsed());
        self.watch.stood_still(stood);
        self.tell("resumed", serde_json::Value::Null);
        self.pause.resuming.drain(..).for_each(tell);
    }
}

/// Tells who waits that it is so. One who does not any more misses nothing.
fn tell(answer: Answer<()>) {
    let _ = answer.send(Ok(()));
}

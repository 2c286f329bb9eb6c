//! Saving a machine: it stands still while its state is read, and goes on while a child process writes its memory as it was.

use std::thread::JoinHandle;

use super::destination::Destination;
use super::inbox::Event;
use super::memory_copy::{Pages, Source};
use super::pause::{Answer, Refusal, ask};
use super::snapshot::{self, State, portable};
use super::writing::Writing;
use super::{Error, Handle, Machine};
use crate::{signal, vcpu};

/// A thread that writes what was saved.
#[derive(Debug)]
pub(super) struct Saver {
    pub thread: JoinHandle<()>,
    /// Who waits for it, if another process gives the memory that is saved.
    pub served: Option<Answer<()>>,
}

impl Handle {
    /// Saves the machine to `destination`, and returns when all of it is on the disk. A machine that runs is paused for
    /// it, and goes on as soon as a child process has its memory, copy-on-write. One that is paused stays so, and is written
    /// by this process.
    ///
    /// # Errors
    /// When the machine has ended, has something that cannot be saved, or the host does not write it. What was at the
    /// destination is still there then.
    pub fn snapshot(&self, destination: Destination) -> Result<(), Refusal> {
        ask(&self.sender, "save", |answer| Event::Snapshot(destination, answer))
    }
}

impl Machine {
    /// Begins to save the machine, which stands still, for who asked for it. Whether it goes on before all is written. False
    /// if it cannot be saved; they are told why.
    pub(super) fn save(&mut self, destination: Destination, goes_on: bool, answer: Answer<()>) -> bool {
        let is_diff = matches!(destination, Destination::Diff(_));
        let mut state = match self.state(is_diff) {
            Ok(state) => state,
            Err(error) => {
                let _ = answer.send(Err(error));
                return false;
            }
        };
        let (ram, sender) = (self.vm.ram().clone(), self.sender.clone());
        let (asker, is_served) = (answer.clone(), self.memory_handler.is_some());
        let served = is_served.then(|| answer.clone());
        let pages = match &destination {
            Destination::Diff(_) => Pages::Changed,
            // It was restored.
            Destination::Files { diff: true, .. } if self.generation.is_some() => Pages::Changed,
            Destination::Files { diff: true, .. } => Pages::Touched,
            Destination::Folder(_) | Destination::Files { .. } => Pages::Used,
        };
        let write = move || {
            signal::block_all();
            let memory = Source::new(&ram, pages);
            let memory = if is_served { memory.served() } else { memory };
            let writing = Writing::begin(destination, &memory, goes_on);
            drop((memory, ram));
            sender.send(Event::Saved);
            let written = writing.and_then(|writing| {
                let id = writing.memory_id().filter(|_| pages == Pages::Used);
                writing.finish(&mut state)?;
                id.into_iter().for_each(|id| sender.send(Event::Written(id)));
                Ok(())
            });
            let _ = answer.send(written.map_err(Error::from));
        };
        match crate::threads::named("bantam-save".into()).spawn(write) {
            Ok(thread) => {
                self.savers.retain(|saver| !saver.thread.is_finished());
                self.savers.push(Saver { thread, served });
                true
            }
            Err(source) => {
                let _ = asker.send(Err(Error::Thread { what: "saving", source }));
                false
            }
        }
    }

    /// The machine has ended: a thread that saves memory may wait for a page of it for ever, and who waits for that is told.
    pub(super) fn give_up_served(&mut self) {
        for answer in self.unserved.drain(..) {
            // One that has been answered is of no interest any more.
            let _ = answer.try_send(Err(snapshot::Error::Unserved.into()));
        }
    }

    /// The state, of the whole machine or of one whose memory is told by what has `changed`.
    fn state(&self, changed: bool) -> Result<State, Error> {
        let base = if changed { Some(self.origin.clone().ok_or(snapshot::Error::NoBase)?) } else { None };
        base.as_ref().map_or(Ok(()), snapshot::Base::check_there)?;
        // Those that a template changes are not all in KVM's list.
        let template = self.config.cpu_template.iter().flat_map(|template| &template.msr_modifiers);
        let (extent, clock) = (self.vm.extent(template.map(|modifier| modifier.addr.0))?, self.vm.clock()?);
        let save = |thread: &vcpu::Thread| {
            let saved = thread.with_paused(|vcpu| vcpu.save(&extent));
            saved.expect("each vCPU has said that it is paused").map_err(Error::from)
        };
        // The vCPUs first: it lets what they have pending reach the interrupt controllers.
        let vcpus = self.threads.iter().map(save).collect::<Result<_, _>>()?;
        let state = State {
            config: portable(&self.config)?,
            cpu: self.vm.cpu(),
            memory: self.config.memory.get(),
            vcpus,
            devices: self.buses.save(),
            vm: self.vm.save(clock)?,
            base,
        };
        Ok(state)
    }
}

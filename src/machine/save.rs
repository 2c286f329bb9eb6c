//! Saving a machine: it stands still while its state and memory are written, and goes on while they get to the disk.

use std::thread;

use super::inbox::Event;
use super::pause::{Answer, Refusal, ask};
use super::snapshot::{self, Destination, State, Writing, portable};
use super::{Error, Handle, Machine};
use crate::kvm::Vm;
use crate::vcpu;

impl Handle {
    /// Saves the machine to `destination`, and returns when all of it is on the disk. A machine that runs is paused for
    /// it, and goes on as soon as everything is written.
    ///
    /// # Errors
    /// When the machine has ended, has something that cannot be saved, or the host does not write it. What was at the
    /// destination is still there then.
    pub fn snapshot(&self, destination: Destination) -> Result<(), Refusal> {
        ask(&self.sender, "save", |answer| Event::Snapshot(destination, answer))
    }
}

impl Machine {
    /// Begins to save the machine, which stands still, for who asked for it. False if that cannot be; they are told why.
    pub(super) fn save(&mut self, destination: Destination, answer: Answer<()>) -> bool {
        let mut state = match self.state(matches!(destination, Destination::Diff(_))) {
            Ok(state) => state,
            Err(error) => {
                let _ = answer.send(Err(error));
                return false;
            }
        };
        let (ram, sender) = (self.vm.ram().clone(), self.sender.clone());
        let asker = answer.clone();
        let write = move || {
            let writing = Writing::begin(destination, &mut state, &ram);
            drop(ram);
            sender.send(Event::Saved);
            let _ = answer.send(writing.and_then(Writing::finish).map_err(Error::from));
        };
        if let Err(source) = thread::Builder::new().name("bantam-save".into()).spawn(write) {
            let _ = asker.send(Err(Error::Thread { what: "saving", source }));
            return false;
        }
        true
    }

    /// The state, of the whole machine or of one whose memory is told by what has `changed`.
    fn state(&self, changed: bool) -> Result<State, Error> {
        let base = if changed { Some(self.origin.clone().ok_or(snapshot::Error::NoBase)?) } else { None };
        let mut msrs = Vm::msrs()?;
        // Those that a template changes are not all in KVM's list.
        let template = self.config.cpu_template.iter().flat_map(|template| &template.msr_modifiers);
        msrs.extend(template.map(|modifier| modifier.addr.0));
        let save = |thread: &vcpu::Thread| {
            let saved = thread.with_paused(|vcpu| vcpu.save(&msrs));
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
            vm: self.vm.save()?,
            base,
        };
        Ok(state)
    }
}

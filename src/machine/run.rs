//! The run loop: one thread, one inbox, and what becomes of the machine.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::sync::{Arc, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::end::crash;
use super::inbox::Event;
use super::quota::Quota;
use super::watch::HaltWatch;
use super::{Error, Machine, changed, initrd, snapshot};
use crate::command::{self, Ended};
use crate::devices::console::Incoming;
use crate::devices::transcript::Sight;
use crate::interrupt::Interrupt;
use crate::kvm;
use crate::outcome::{Outcome, Panic};
use crate::terminal;
use crate::vcpu::{self, Budget};

/// Input that waits for the guest; more is left in the pipe.
const INPUT_BYTES: usize = 4096;
/// How long the console must be silent after the end of a panic before it is believed: a kernel that is dead says
/// nothing more, a user's program that prints such a line does.
const SILENCE_AFTER_PANIC: Duration = Duration::from_secs(1);
/// Until the next try to send input, when a vCPU has the serial port: it may be waiting for the console's reader.
const INPUT_RETRY: Duration = Duration::from_millis(5);
/// When nothing has happened for so long, the machine's threads are at rest.
const CALM: Duration = Duration::from_millis(20);
/// How the loop goes on.
type Step = Option<Result<Outcome, Error>>;

impl Machine {
    /// Runs the machine until it ends, by itself or by a [`Handle`](super::Handle), a limit or a signal. It can be run
    /// once.
    ///
    /// A device that is in slow host I/O then is waited for if the guest ended by itself, until a signal or the time limit;
    /// else for a second. It keeps its files open, and an image locked, until that I/O is done.
    pub fn run(&mut self) -> Result<Outcome, Error> {
        if self.vcpus.is_empty() {
            return Err(Error::RanBefore);
        }
        let ended = self.start().and_then(|()| self.serve());
        let ended = self.finish(ended);
        self.times.end = Some(self.started.elapsed());
        self.outcome = ended.as_ref().ok().cloned();
        self.tell_end(&ended);
        // The terminal is the user's again by now. The signals do what they usually do: what is still to be said may have
        // to wait for a reader.
        self.signals = None;
        // Who still waits for an answer learns that there is none.
        self.inbox.close();
        self.pause = Default::default();
        self.give_up_served();
        ended
    }

    fn start(&mut self) -> Result<(), Error> {
        let output = self.console_output.take().ok_or(Error::RanBefore)?;
        let [first, sights, end] = [(); 3].map(|()| self.sender.clone());
        self.output.prepare(
            output,
            &self.sandbox,
            move || first.send(Event::Output),
            move |sight| sights.send(Event::Sight(sight)),
            move || end.send(Event::OutputEnd),
        );
        for messages in self.passts.drain(..) {
            messages.pass_on(&self.sandbox).map_err(|source| Error::Thread { what: "passt", source })?;
        }
        if let Some(session) = &mut self.command {
            let sender = self.sender.clone();
            let report = move |report| sender.send(Event::Command(report));
            session.start(&self.sandbox, report).map_err(|source| Error::Thread { what: "command", source })?;
        }
        if let Some(generation) = &self.generation {
            // It had booted before. One that waits for a command has still to show that it lives.
            self.watch.user_space = self.command.is_none();
            if let Err(error) = generation.trigger() {
                log::error!("cannot tell the guest of its new generation ID: {error}");
            }
        }
        if self.start_paused {
            self.stand_still_from_start();
        } else if self.generation.is_some() {
            self.buses.resume();
        }
        let idle = std::mem::take(&mut self.vcpus);
        let quota = self.quota.take();
        let started = match &quota {
            Some(Quota::Group(group)) => group.within(|| self.start_vcpus(idle, None))?,
            Some(Quota::Budget(budget)) => self.start_vcpus(idle, Some(budget)),
            None => self.start_vcpus(idle, None),
        };
        self.quota = quota;
        // The guest does not wait for it.
        self.helper = std::mem::take(&mut self.working_set).start(self.vm.ram());
        started.map_err(|source| Error::Thread { what: "vCPU", source })
    }

    /// Starts the console's thread.
    pub(super) fn start_console(&mut self) -> Result<(), Error> {
        let begun = self.output.begin().map_err(|source| Error::Thread { what: "console", source })?;
        self.writer = begun.or(self.writer.take());
        Ok(())
    }

    fn start_vcpus(&mut self, idle: Vec<kvm::Vcpu>, budget: Option<&Arc<Budget>>) -> io::Result<()> {
        for (index, vcpu) in (0u32..).zip(idle) {
            let sender = self.sender.clone();
            let report = move |report| sender.send(Event::Vcpu(index, report));
            let (buses, sandbox) = (self.buses.clone(), self.sandbox.clone());
            let thread = vcpu::Thread::spawn(vcpu, index, buses, budget.cloned(), self.start_paused, sandbox, report)?;
            self.threads.push(thread);
        }
        Ok(())
    }

    fn serve(&mut self) -> Result<Outcome, Error> {
        let mut pending = VecDeque::new();
        let begin = Instant::now();
        let until = |limit: Duration| Some((begin.checked_add(limit)?, limit));
        self.watch.time_limit = self.config.timeout.and_then(until);
        self.watch.boot_limit = self.config.boot_timeout.and_then(until);
        self.watch.halt = Some(HaltWatch::from_start(begin));
        loop {
            while let Some(event) = self.inbox.take() {
                if let Event::Input(bytes) = &event {
                    pending.extend(bytes);
                }
                if let Some(ended) = self.take(event) {
                    return ended;
                }
            }
            let mut deadline = None;
            if self.pause.is_running() {
                let retry = self.send_input(&mut pending);
                if let Some(ended) = self.look(Instant::now()) {
                    return Ok(ended);
                }
                deadline = self.watch.deadline().into_iter().chain(retry).min();
            }
            if self.told.deadline().is_some_and(|due| due <= Instant::now()) {
                self.tell_metrics(Instant::now());
            }
            deadline = deadline.into_iter().chain(self.told.deadline()).min();
            let ready = self.wait(deadline, pending.len() < INPUT_BYTES);
            self.told.write();
            if let Some(signal) = ready.signal.then(|| self.take_signal()).flatten()
                && !self.command.as_mut().is_some_and(|session| session.signal(signal))
            {
                return Ok(Outcome::Signaled(signal));
            }
            if ready.input && self.take_input(&mut pending) {
                return Ok(Outcome::Stopped);
            }
        }
    }

    /// Looks at what is due; whether that is the end.
    fn look(&mut self, now: Instant) -> Option<Outcome> {
        let over = |limit: Option<(Instant, Duration)>| limit.filter(|(deadline, _)| *deadline <= now);
        if let Some((_, limit)) = over(self.watch.time_limit) {
            return Some(Outcome::TimedOut { limit });
        }
        if let Some((_, limit)) = over(self.watch.boot_limit.filter(|_| !self.watch.user_space)) {
            return Some(Outcome::BootTimedOut { limit, seen_console: self.watch.seen_console });
        }
        if self.watch.panic_end.is_some_and(|deadline| deadline <= now) {
            return Some(self.panicked());
        }
        self.look_for_halt(now);
        None
    }

    fn take(&mut self, event: Event) -> Step {
        match event {
            Event::Vcpu(_, vcpu::Report::Started) => {
                if self.times.first_kvm_run.is_none() {
                    self.times.first_kvm_run = Some(self.started.elapsed());
                    if self.told.events.is_some() {
                        let pid = self.pid.unwrap_or_else(std::process::id);
                        self.tell("started", serde_json::json!({"pid": pid}));
                    }
                    self.tell_metrics(Instant::now());
                    self.due_upkeep = self.upkeep;
                    let initrd = std::mem::take(&mut self.initrd);
                    self.helper = self.helper.take().or_else(|| initrd::own(self.vm.ram(), initrd));
                }
            }
            Event::Vcpu(vcpu, vcpu::Report::Ended { exit, rip, cpl }) => {
                return Some(Ok(Outcome::Crashed(crash(vcpu, exit, rip, cpl))));
            }
            Event::Vcpu(_, vcpu::Report::Failed(error)) => return Some(Err(Error::Kvm(error))),
            Event::Vcpu(_, vcpu::Report::Throttle(source)) => {
                return Some(Err(Error::Thread { what: "timer of the CPU quota for the vCPU", source }));
            }
            Event::Vcpu(_, vcpu::Report::Sandbox(source)) => {
                return Some(Err(Error::Sandbox { what: "vCPU", source }));
            }
            Event::Vcpu(vcpu, vcpu::Report::Stopped(stopped)) => {
                let Some(halt) = &mut self.watch.halt else { return None };
                halt.answered.insert(vcpu);
                halt.all_stopped &= stopped;
                if halt.answered.len() < self.threads.len() {
                    return None;
                }
                if halt.all_stopped {
                    if !self.watch.user_space {
                        log::warn!("no sign of user space was seen on the console before the guest halted");
                    }
                    return Some(Ok(Outcome::Halted));
                }
                self.due_upkeep = self.upkeep;
            }
            Event::Vcpu(_, vcpu::Report::Paused) => return self.vcpu_paused().err().map(Err),
            Event::Snapshot(destination, answer) => self.snapshot(destination, answer),
            Event::Saved => self.saved(),
            Event::Written(file) => self.last_memory_file = Some(file),
            Event::DevicesPaused => self.devices_paused(),
            Event::DiskFailed(device, why) => self.disk_failed(&device, &why),
            Event::CtrlAltDel => {
                let keyboard = self.keyboard.as_ref().map(|it| it.lock().unwrap_or_else(PoisonError::into_inner));
                keyboard.into_iter().for_each(|mut keyboard| keyboard.ctrl_alt_del());
            }
            Event::Changed(device, change) => changed::apply(&mut self.config, &device, change),
            Event::Pause(answer) => self.pause(answer),
            Event::Resume(answer) => self.resume(answer),
            Event::Terminate(answer) => {
                let asked = self.command.as_mut().is_some_and(|session| session.signal(libc::SIGTERM));
                drop(answer.send(Ok(asked)));
            }
            Event::Report(answer) => drop(answer.send(Ok(self.report()))),
            Event::Metrics(metrics) => self.told.metrics = Some(*metrics),
            Event::FlushMetrics(answer) => {
                self.tell_metrics(Instant::now());
                let is_open = self.told.metrics.as_ref().is_some_and(|(lines, _)| lines.is_open());
                drop(answer.send(Ok(is_open)));
            }
            Event::Reset => return Some(Ok(Outcome::Rebooted)),
            Event::PowerOff => return Some(Ok(Outcome::PoweredOff)),
            Event::Pvpanic => {
                self.watch.panic.get_or_insert_default();
                return Some(Ok(self.panicked()));
            }
            Event::Sight(sight) => self.see(sight),
            Event::Command(report) => return self.hear(report),
            Event::Stop => return Some(Ok(Outcome::Stopped)),
            Event::MemoryLost => return Some(Err(snapshot::Error::HandlerEnded.into())),
            Event::Output => return self.start_console().err().map(Err),
            Event::OutputEnd => self.watch.output_ended = true,
            Event::InputRoom | Event::Input(_) => {}
        }
        None
    }

    /// Takes what the command's session reports.
    fn hear(&mut self, report: command::Report) -> Step {
        match report {
            command::Report::Ready => {
                self.reached_user_space();
                self.ready_for_command();
                None
            }
            command::Report::Started(limit) => {
                if let Some(limit) = limit {
                    log::info!("the command's processes are limited by {limit}");
                    self.limits.pids = Some(limit.to_string());
                }
                self.reached_user_space();
                self.times.command = Some(self.started.elapsed());
                self.tell("command-started", serde_json::Value::Null);
                self.command.iter_mut().for_each(command::Session::started);
                None
            }
            command::Report::Ended(Ended::Exited(status)) => Some(Ok(Outcome::Exited(status))),
            command::Report::Ended(Ended::Killed(signal)) => Some(Ok(Outcome::Killed(signal))),
            command::Report::Failed(why) => Some(Err(Error::Guest(why))),
            command::Report::Quit => Some(Ok(Outcome::Stopped)),
        }
    }

    /// The signal that has come, if it does not just tell of the terminal: of its size, or that a shell had it meanwhile.
    pub(super) fn take_signal(&mut self) -> Option<i32> {
        let signal = self.signals.as_ref()?.take()?;
        match signal {
            libc::SIGCONT => terminal::resume(),
            libc::SIGWINCH => self.command.iter_mut().for_each(|session| session.resize()),
            _ => return Some(signal),
        }
        None
    }

    fn reached_user_space(&mut self) {
        self.watch.user_space = true;
        if self.times.user_space.is_none() {
            self.times.user_space = Some(self.started.elapsed());
            self.tell("booted", serde_json::Value::Null);
        }
    }

    pub(super) fn see(&mut self, sight: Sight) {
        let now = Instant::now();
        match sight {
            Sight::FirstByte => {
                self.watch.seen_console = true;
                self.times.first_console_byte = Some(self.started.elapsed());
            }
            Sight::UserSpace => {
                self.reached_user_space();
            }
            Sight::Panic(message) => self.watch.panic = Some(message),
            Sight::PanicEnd if self.watch.panic.is_some() => self.watch.panic_end = Some(now + SILENCE_AFTER_PANIC),
            Sight::PanicEnd => {}
            Sight::ShutDown => (self.watch.panic, self.watch.panic_end) = (None, None),
            Sight::Alive => self.watch.panic_end = None,
            Sight::OutOfMemory(line) => {
                self.tell("out-of-memory", serde_json::json!({"message": line}));
                self.watch.out_of_memory = Some(line);
            }
            Sight::Halted => {
                (self.watch.panic, self.watch.panic_end) = (None, None);
                self.watch.halt = Some(HaltWatch::announced(now));
            }
        }
    }

    fn look_for_halt(&mut self, now: Instant) {
        let Some(halt) = self.watch.halt.as_mut().filter(|halt| halt.next_look <= now) else { return };
        *halt = halt.looked(now);
        // Of a kernel that stands still before user space a limit says more. One that was restored is beyond that.
        let boots = self.config.boot_timeout.is_some() && !self.watch.user_space && self.generation.is_none();
        if halt.announced || !boots {
            self.threads.iter().for_each(vcpu::Thread::ask_stopped);
        }
    }

    fn panicked(&self) -> Outcome {
        let message = self.watch.panic.clone().unwrap_or_default();
        Outcome::Panicked(Panic { message, console_tail: Vec::new() })
    }

    /// Waits for an event, a signal, input if it is `wanted`, or the deadline.
    pub(super) fn wait(&mut self, deadline: Option<Instant>, wanted: bool) -> Ready {
        let left = |deadline: Instant| deadline.saturating_duration_since(Instant::now());
        let mut fds = vec![PollFd::from_borrowed_fd(self.inbox.wake(), PollFlags::IN)];
        let signals = self.signals.as_ref().map(|fd| fd.as_fd());
        let input = self.input.as_ref().filter(|input| wanted || input.is_terminal()).map(|input| input.fd());
        fds.extend(signals.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        fds.extend(input.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        fds.extend(self.told.wanting().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::OUT)));
        let may_be_calm = self.due_upkeep.is_some() && deadline.is_none_or(|deadline| left(deadline) > CALM);
        let is_calm = may_be_calm && poll(&mut fds, Some(&timespec(CALM))) == Ok(0);
        let timeout = deadline.map(|deadline| timespec(left(deadline)));
        // It is the last thing that is done, so that little of the program is used after it.
        if let Some(upkeep) = self.due_upkeep.take_if(|_| is_calm) {
            upkeep();
        }
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => self.inbox.woken(!fds[0].revents().is_empty()),
            Err(rustix::io::Errno::INTR) => return Ready::default(),
            Err(error) => log::error!("cannot wait for events: {error}"),
        }
        let is_ready = |index: Option<usize>| index.is_some_and(|index| !fds[index].revents().is_empty());
        Ready {
            signal: is_ready(signals.map(|_| 1)),
            input: is_ready(input.map(|_| 1 + usize::from(signals.is_some()))),
        }
    }

    /// Reads input that is there; true when the user ends the machine.
    pub(super) fn take_input(&mut self, pending: &mut VecDeque<u8>) -> bool {
        let Some(input) = &mut self.input else { return false };
        let mut buffer = [0; 1024];
        match input.read(&mut buffer) {
            // What a terminal's user types into a guest that does not read is lost beyond a limit.
            Ok(Incoming::Bytes(_)) if pending.len() >= INPUT_BYTES => {}
            Ok(Incoming::Bytes(count)) => pending.extend(&buffer[..count]),
            Ok(Incoming::Quit) => return true,
            Ok(Incoming::End) => self.input = None,
            Err(error) if [ErrorKind::Interrupted, ErrorKind::WouldBlock].contains(&error.kind()) => {}
            Err(error) => {
                log::info!("console: no more input: {error}");
                self.input = None;
            }
        }
        false
    }

    /// Sends the guest what it has room for. It does not wait for a vCPU that has the serial port, but says when to
    /// try again.
    fn send_input(&self, pending: &mut VecDeque<u8>) -> Option<Instant> {
        if pending.is_empty() {
            return None;
        }
        let mut serial = match self.serial.try_lock() {
            Ok(serial) => serial,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Some(Instant::now() + INPUT_RETRY),
        };
        while !pending.is_empty() && serial.room() > 0 {
            let sent = serial.send(pending.as_slices().0);
            if sent == 0 {
                break;
            }
            pending.drain(..sent);
        }
        None
    }
}

#[derive(Default)]
pub(super) struct Ready {
    pub(super) signal: bool,
    pub(super) input: bool,
}

fn timespec(time: Duration) -> Timespec {
    Timespec { tv_sec: time.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: time.subsec_nanos().into() }
}

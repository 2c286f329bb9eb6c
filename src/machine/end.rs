//! The end of a machine: what runs is stopped, the console is written, and it is said what it all was.

use std::collections::VecDeque;
use std::error::Error as _;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::inbox::Event;
use super::{Error, Machine};
use crate::kvm::{self, Exit};
use crate::outcome::{Crash, CrashKind, Outcome, Panic};
use crate::vcpu;

/// How long devices and the console's reader are waited for when the machine did not end by itself.
const DRAIN: Duration = Duration::from_secs(1);

/// Where a processor starts after a reset, in its code segment.
const RESET_VECTOR: u64 = 0xfff0;

impl Machine {
    /// Stops what runs, waits until the console has been written, and says what it all was.
    pub(super) fn finish(&mut self, ended: Result<Outcome, Error>) -> Result<Outcome, Error> {
        // A vCPU may be waiting for the console's reader.
        self.output.release();
        self.stop_threads();
        let ended = self.drain(ended);
        if let Some(mut session) = self.command.take() {
            session.finish(DRAIN);
        }
        self.input = None;
        let console_tail = self.output.tail();
        // The kernel's last words may have been read only just now.
        let panicked = match &ended {
            Ok(Outcome::Rebooted | Outcome::Halted | Outcome::Crashed(_) | Outcome::Panicked(_)) => true,
            Ok(Outcome::TimedOut { .. } | Outcome::BootTimedOut { .. }) => self.watch.panic_end.is_some(),
            _ => false,
        };
        match self.watch.panic.take().filter(|_| panicked) {
            Some(message) => Ok(Outcome::Panicked(Panic { message, console_tail })),
            None => ended,
        }
    }

    /// Stops the vCPUs, and then the devices. A thread of its own waits for them, as a device may be in slow host I/O, and for
    /// snapshots that are being written; the console is closed when all have ended.
    fn stop_threads(&mut self) {
        self.threads.iter().for_each(vcpu::Thread::stop);
        for (index, thread) in self.threads.iter().enumerate() {
            let metrics = Arc::clone(&thread.metrics);
            self.vcpu_metrics.push((format!("vcpu{index}"), metrics));
        }
        let (threads, buses) = (std::mem::take(&mut self.threads), std::mem::take(&mut self.buses));
        let (output, mut savers) = (self.output.clone(), std::mem::take(&mut self.savers));
        self.unserved = savers.iter_mut().filter_map(|saver| saver.served.take()).collect();
        let (memory, helper) = (self.memory_handler.take(), self.helper.take());
        let wait = move || {
            threads.into_iter().for_each(vcpu::Thread::join);
            // Others may have a device at hand still: it does nothing from now on.
            buses.pause();
            drop(buses);
            savers.into_iter().for_each(|saver| drop(saver.thread.join()));
            if let Some((stop, helper)) = helper {
                drop(stop);
                drop(helper.join());
            }
            // Whoever waits for a page until then must not find zeros in its place.
            drop(memory);
            output.close();
        };
        if let Err(error) = start_at_last(wait) {
            // What it was given has been dropped: the last vCPU's thread ends the devices.
            log::error!("cannot start the thread that waits for the others: {error}");
            self.output.close();
        }
    }

    /// Waits until all threads have ended and the console has been written. A guest that ended by itself is owed that; it
    /// takes a signal or the time limit to give it up. Otherwise the reader has a moment.
    fn drain(&mut self, mut ended: Result<Outcome, Error>) -> Result<Outcome, Error> {
        let patient = matches!(
            ended,
            Ok(Outcome::Exited(_)
                | Outcome::Killed(_)
                | Outcome::PoweredOff
                | Outcome::Rebooted
                | Outcome::Halted
                | Outcome::Panicked(_)
                | Outcome::Crashed(_))
        );
        let deadline = drain_deadline(patient, self.watch.time_limit.map(|limit| limit.0), Instant::now());
        // Input is of no use any more, except for the user's request to end.
        self.input = self.input.take().filter(|input| input.is_terminal());
        loop {
            while let Some(event) = self.inbox.take() {
                match event {
                    Event::Output => {
                        if let Err(error) = self.start_console() {
                            log::error!("{error}: {}", error.source().map(ToString::to_string).unwrap_or_default());
                        }
                    }
                    Event::OutputEnd => self.watch.output_ended = true,
                    Event::Sight(sight) => self.see(sight),
                    _ => {}
                }
            }
            if self.watch.output_ended {
                if self.writer.take().is_some_and(|writer| writer.join().is_err()) {
                    log::error!("the console's writer panicked");
                }
                return ended;
            }
            if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                return ended;
            }
            let ready = self.wait(deadline, false);
            if let Some(signal) = ready.signal.then(|| self.take_signal()).flatten() {
                if patient {
                    ended = Ok(Outcome::Signaled(signal));
                }
                return ended;
            }
            if ready.input && self.take_input(&mut VecDeque::new()) {
                return ended;
            }
        }
    }
}

/// Until when the console may be written after the end, if that is limited: it has the rest of the time, and a moment in
/// any case.
fn drain_deadline(patient: bool, time_limit: Option<Instant>, now: Instant) -> Option<Instant> {
    let moment = now + DRAIN;
    if patient { time_limit.map(|limit| limit.max(moment)) } else { Some(moment) }
}

/// What the vCPU's last exit says of the guest.
pub(super) fn crash(vcpu: u32, exit: Exit, rip: u64, cpl: u8) -> Crash {
    let mut crash =
        Crash { vcpu, kind: CrashKind::Unhandled, rip, cpl, instruction: Vec::new(), details: String::new() };
    match exit {
        Exit::Shutdown => {
            crash.kind = CrashKind::TripleFault;
            if rip == RESET_VECTOR {
                crash.details = "the vCPU was reset, and where it was is lost: KVM does so on AMD".into();
            }
        }
        Exit::FailEntry(reason) => {
            crash.kind = CrashKind::FailEntry;
            crash.details = format!("hardware entry failure reason {reason:#x}");
        }
        Exit::InternalError { suberror: kvm::INTERNAL_ERROR_EMULATION, instruction } => {
            crash.kind = CrashKind::EmulationFailure;
            crash.instruction = instruction;
        }
        Exit::InternalError { suberror, .. } => {
            crash.kind = CrashKind::InternalError;
            crash.details = format!("suberror {suberror}");
        }
        Exit::Unexpected(what) => crash.details = what,
        Exit::Served(_) | Exit::Interrupted => {}
    }
    crash
}

/// How often a thread is asked for that the end needs, and how long it takes until there may be one: the vCPUs' are ending.
const TRIES: u32 = 100;
const RETRY: Duration = Duration::from_millis(10);

/// Starts the thread that waits for the others, which may be one more than there can be until some of those have ended.
fn start_at_last(wait: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let wait = Arc::new(Mutex::new(Some(wait)));
    let mut tries = 0;
    loop {
        let wait = wait.clone();
        let work = move || {
            let wait = wait.lock().unwrap_or_else(PoisonError::into_inner).take();
            wait.into_iter().for_each(|wait| wait());
        };
        tries += 1;
        match crate::threads::named("bantam-end".into()).spawn(work) {
            Ok(_) => return Ok(()),
            Err(error) if tries == TRIES => return Err(error),
            Err(_) => thread::sleep(RETRY),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draining_the_console_has_the_rest_of_the_time_and_a_moment_in_any_case() {
        let now = Instant::now();
        let limit = now + Duration::from_secs(60);
        assert_eq!(drain_deadline(true, None, now), None);
        assert_eq!(drain_deadline(true, Some(limit), now), Some(limit));
        assert_eq!(drain_deadline(true, Some(now), now), Some(now + DRAIN));
        for limit in [None, Some(limit)] {
            assert_eq!(drain_deadline(false, limit, now), Some(now + DRAIN));
        }
    }
}

//! The thread of a vCPU: commands in, reports out.

mod throttle;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use serde::Serialize;
use serde_json::Value;
use vmm_sys_util::signal::{Killable, unblock_signal};

use crate::bus::{Bus, BusDevice};
use crate::kvm::{self, Access, Exit, Kicker, Vcpu};
use crate::metrics::Counter;
use crate::sandbox::{Role, Sandbox};
use crate::{signal, snapshot};
pub use throttle::Budget;
use throttle::Throttle;

/// What a vCPU's thread has to say.
#[derive(Debug)]
pub enum Report {
    /// It is about to enter the guest for the first time.
    Started,
    /// It cannot go on: the exit, the instruction pointer and the privilege level.
    Ended {
        /// Why.
        exit: Exit,
        /// Where: the instruction pointer.
        rip: u64,
        /// The privilege level there.
        cpl: u8,
    },
    /// KVM failed.
    Failed(kvm::Error),
    /// It cannot be kept within its CPU time.
    Throttle(io::Error),
    /// Its thread cannot be restricted.
    Sandbox(io::Error),
    /// The answer to [`Thread::ask_stopped`].
    Stopped(bool),
    /// The answer to [`Thread::pause`]: it is outside the guest, and stays there.
    Paused,
}

/// How often a vCPU left the guest, by what for.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Metrics {
    /// Exits to the VMM that a device served: all of them, and by what they were.
    device_accesses: Counter,
    port_reads: Counter,
    port_writes: Counter,
    mmio_reads: Counter,
    mmio_writes: Counter,
    /// Kicks and signals.
    interruptions: Counter,
    /// Exits that it could not go on from.
    failures: Counter,
    /// How often it had to wait for CPU time, of a quota without a control group.
    throttled: Counter,
}

impl Metrics {
    fn accessed(&self, access: Access) {
        self.device_accesses.inc_alone();
        let counter = match access {
            Access::PortRead => &self.port_reads,
            Access::PortWrite => &self.port_writes,
            Access::MmioRead => &self.mmio_reads,
            Access::MmioWrite => &self.mmio_writes,
        };
        counter.inc_alone();
    }
}

// Commands; of two that wait, the greater one counts.
const NONE: u8 = 0;
const ASK_STOPPED: u8 = 1;
const PAUSE: u8 = 2;
const STOP: u8 = 3;

/// A running vCPU.
pub struct Thread {
    thread: JoinHandle<()>,
    shared: Arc<Shared>,
    kicker: Kicker,
    signal: i32,
    /// What the vCPU counts.
    pub metrics: Arc<Metrics>,
}

/// What a vCPU's thread shares with who commands it.
struct Shared {
    command: AtomicU8,
    place: Mutex<Place>,
}

/// Who has the vCPU.
enum Place {
    /// Its thread.
    Thread,
    /// Nobody: it is paused.
    Paused(Vcpu),
    /// Its thread may take it.
    Resumed(Vcpu),
}

impl Shared {
    fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves the vCPU until it is resumed; `None` when its thread has to end.
    fn pause(&self, vcpu: Vcpu, report: &impl Fn(Report)) -> Option<Vcpu> {
        vcpu.tell_pause();
        *self.place() = Place::Paused(vcpu);
        report(Report::Paused);
        loop {
            thread::park();
            if self.command.load(Ordering::SeqCst) == STOP {
                return None;
            }
            let mut place = self.place();
            match std::mem::replace(&mut *place, Place::Thread) {
                Place::Resumed(vcpu) => return Some(vcpu),
                other => *place = other,
            }
        }
    }
}

impl Thread {
    /// Runs `vcpu`, number `index`, on a thread of its own that serves its accesses from the buses and tells `report`
    /// what happens. With a `budget` it takes no more CPU time than that has. One that is to be `paused` does not enter the
    /// guest before it is resumed. The thread is in the `sandbox`.
    pub fn spawn(
        vcpu: Vcpu,
        index: u32,
        buses: Arc<Buses>,
        budget: Option<Arc<Budget>>,
        paused: bool,
        sandbox: Sandbox,
        report: impl Fn(Report) + Send + 'static,
    ) -> io::Result<Self> {
        let signal = signal::kick_signal()?;
        let kicker = vcpu.kicker();
        let command = AtomicU8::new(if paused { PAUSE } else { NONE });
        if paused {
            kicker.kick();
        }
        let shared = Arc::new(Shared { command, place: Mutex::new(Place::Thread) });
        let metrics = Arc::new(Metrics::default());
        let thread = crate::threads::named(format!("bantam-vcpu{index}")).spawn({
            let (shared, metrics) = (Arc::clone(&shared), Arc::clone(&metrics));
            move || {
                // The thread that started this one may have blocked it, as programs do that take all signals in one.
                if let Err(error) = unblock_signal(signal) {
                    log::error!("vCPU {index}: cannot unblock the signal that kicks it: {error:?}");
                }
                if let Err(source) = sandbox.enter(Role::Vcpu) {
                    return report(Report::Sandbox(source));
                }
                match budget.map(|budget| Throttle::new(budget, signal)).transpose() {
                    Ok(throttle) => run(vcpu, &buses, &shared, &metrics, throttle, report),
                    Err(source) => report(Report::Throttle(source)),
                }
            }
        })?;
        Ok(Thread { thread, shared, kicker, signal, metrics })
    }

    /// Has the thread leave the guest and end.
    pub fn stop(&self) {
        self.tell(STOP);
    }

    /// Waits until the thread has ended.
    pub fn join(self) {
        if self.thread.join().is_err() {
            log::error!("a vCPU thread panicked");
        }
    }

    /// Asks whether the vCPU can still run without outside help; the answer is a [`Report::Stopped`].
    pub fn ask_stopped(&self) {
        self.tell(ASK_STOPPED);
    }

    /// Has the vCPU leave the guest and wait; the answer is a [`Report::Paused`].
    pub fn pause(&self) {
        self.tell(PAUSE);
    }

    /// Has a vCPU that is paused go on.
    pub fn resume(&self) {
        let mut place = self.shared.place();
        *place = match std::mem::replace(&mut *place, Place::Thread) {
            Place::Paused(vcpu) => Place::Resumed(vcpu),
            other => other,
        };
        drop(place);
        self.thread.thread().unpark();
    }

    /// What `ask` makes of the vCPU, if it is paused.
    pub fn with_paused<T>(&self, ask: impl FnOnce(&Vcpu) -> T) -> Option<T> {
        match &*self.shared.place() {
            Place::Paused(vcpu) => Some(ask(vcpu)),
            _ => None,
        }
    }

    fn tell(&self, command: u8) {
        self.shared.command.fetch_max(command, Ordering::SeqCst);
        self.kicker.kick();
        // Fails only for a thread that has ended, which needs no kick.
        let _ = self.thread.kill(self.signal);
        // It may be waiting for CPU time.
        self.thread.thread().unpark();
    }
}

/// What a vCPU's accesses go to.
#[derive(Default)]
pub struct Buses {
    /// Port I/O.
    pub pio: Bus,
    /// Memory-mapped I/O.
    pub mmio: Bus,
}

impl Buses {
    /// Pauses each device.
    pub fn pause(&self) {
        self.each(|_, device| device.pause());
    }

    /// Has each device go on.
    pub fn resume(&self) {
        self.each(|_, device| device.resume());
    }

    /// The state of each device that has one, by where it is. All are paused.
    pub fn save(&self) -> BTreeMap<String, Value> {
        let mut states = BTreeMap::new();
        self.each(|place, device| {
            let state = device.save();
            if !state.is_null() {
                states.insert(place, state);
            }
        });
        states
    }

    /// Gives each device the state that the one in its place had, and leaves it paused.
    ///
    /// # Errors
    /// When a state fits no device.
    pub fn restore(&self, mut states: BTreeMap<String, Value>) -> Result<(), snapshot::Error> {
        let mut result = Ok(());
        self.each(|place, device| {
            let state = states.remove(&place).unwrap_or_default();
            if result.is_ok() {
                let fail = |error| snapshot::Error::part(format!("the device at {place}"), error);
                result = device.restore(&state).map_err(fail);
            }
        });
        match states.first_key_value() {
            Some((place, _)) if result.is_ok() => {
                Err(snapshot::Error::part(format!("the device at {place}"), "this machine has none there"))
            }
            _ => result,
        }
    }

    fn each(&self, mut act: impl FnMut(String, &mut dyn BusDevice)) {
        for (name, bus) in [("port", &self.pio), ("memory", &self.mmio)] {
            let result: Result<(), Infallible> = bus.try_for_each(|base, device| {
                act(format!("{name} {base:#x}"), device);
                Ok(())
            });
            let Ok(()) = result;
        }
    }
}

fn run(
    mut vcpu: Vcpu,
    buses: &Buses,
    shared: &Shared,
    metrics: &Metrics,
    mut throttle: Option<Throttle>,
    report: impl Fn(Report),
) {
    report(Report::Started);
    // Takes its first slice.
    throttle.as_mut().map(Throttle::wait);
    loop {
        match vcpu.run(&buses.pio, &buses.mmio) {
            Ok(Exit::Served(access)) => metrics.accessed(access),
            Ok(Exit::Interrupted) => {
                metrics.interruptions.inc_alone();
                loop {
                    vcpu.clear_kick();
                    match shared.command.swap(NONE, Ordering::SeqCst) {
                        NONE => {}
                        ASK_STOPPED => report(Report::Stopped(vcpu.is_stopped())),
                        PAUSE => match shared.pause(vcpu, &report) {
                            Some(back) => vcpu = back,
                            None => return,
                        },
                        _ => return,
                    }
                    let Some(wait) = throttle.as_mut().and_then(Throttle::wait) else { break };
                    metrics.throttled.inc_alone();
                    thread::park_timeout(wait);
                }
            }
            Ok(exit) => {
                metrics.failures.inc_alone();
                let (rip, cpl) = vcpu.position();
                return report(Report::Ended { exit, rip, cpl });
            }
            Err(error) => return report(Report::Failed(error)),
        }
    }
}

//! `bantam run --warm` and `bantam warm`: starts from a snapshot of a guest that is ready for its command.

use std::error::Error;
use std::sync::mpsc::{self, Receiver};
use std::thread::JoinHandle;
use std::time::Duration;

use bantam::config::Config;
use bantam::kvm;
use bantam::machine::{self, Builder, Machine};
use bantam::outcome::Outcome;
use bantam::sandbox::Role;
use bantam::warm::{self, Basis, Files, Making, Miss, Place, Store, Unfit};
use clap::Subcommand;
use serde::Serialize;

use super::message::{chain, say};

/// Until the command of a guest that was restored has to begin. It takes milliseconds; one that hangs is followed by one that
/// boots.
const BEGIN_LIMIT: Duration = Duration::from_secs(30);

/// The warm snapshots.
#[derive(Debug, Subcommand)]
pub enum Warm {
    /// List the warm snapshots in the cache.
    Ls {
        /// Print JSON instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Remove warm snapshots. Machines that run from them go on.
    Rm {
        /// Their keys.
        #[arg(value_name = "KEY", required = true)]
        keys: Vec<String>,
    },
}

impl Warm {
    /// Does what is asked for, and adds to `told` what to print.
    pub fn run(&self, told: &mut String) -> Result<(), warm::Error> {
        let store = Store::of_user()?;
        match self {
            Self::Ls { json: true } => *told += &format!("{:#}\n", serde_json::json!(store.list()?)),
            Self::Ls { json: false } => {
                let list = store.list()?;
                let width = list.iter().map(|it| it.key.len()).max().unwrap_or(0).max(3);
                *told += &format!("{:width$}  SIZE      ROOTFS\n", "KEY");
                for it in list {
                    let size = format!("{}M", it.size.div_ceil(1 << 20));
                    *told += &format!("{:width$}  {size:<8}  {}\n", it.key, it.rootfs);
                }
            }
            Self::Rm { keys } => keys.iter().try_for_each(|key| store.remove(key))?,
        }
        Ok(())
    }
}

/// Why a run cannot be warm.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    #[error(transparent)]
    Store(#[from] warm::Error),
    #[error(transparent)]
    Unfit(#[from] Unfit),
}

/// How a machine was started, as the report has it.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Start {
    key: String,
    start: &'static str,
    /// Why it was booted.
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
}

/// The machines of a run that starts warm if it can.
pub struct Starts {
    place: Place,
    basis: Basis,
    /// Makes the snapshot of the last one.
    making: Option<JoinHandle<Result<(), Box<dyn Error + Send + Sync>>>>,
    /// How the last one was started.
    pub last: Option<Start>,
    /// What became of a machine of the snapshot that is there.
    broken: Option<String>,
}

impl Starts {
    /// Those of the machine that `config` makes, with the snapshot of this key.
    pub fn new(key: &str, config: &Config) -> Result<Self, Refused> {
        let place = Store::of_user()?.at(key)?;
        Ok(Self { place, basis: Basis::of(config)?, making: None, last: None, broken: None })
    }

    /// Builds a machine by `build`, from the snapshot if that can be used; else one that boots, of which one is made.
    pub fn build(
        &mut self,
        config: Config,
        build: impl Fn(Builder) -> Result<Machine, Box<dyn Error>>,
    ) -> Result<Machine, Box<dyn Error>> {
        // That of an earlier attempt is of use to this one.
        self.finish();
        let found = match self.broken.take() {
            Some(why) => Err(Miss::Other(why)),
            None => self.place.open(&self.basis),
        };
        let why = match found {
            Ok(mut snapshot) => {
                snapshot.config = config.clone();
                let limit = config.boot_timeout.map_or(BEGIN_LIMIT, |limit| limit.min(BEGIN_LIMIT));
                snapshot.config.boot_timeout = Some(limit);
                match build(Builder::restore(snapshot)) {
                    Err(error) if is_of_the_snapshot(&*error) => Err(chain(&*error)),
                    built => return self.started("warm", None, built?),
                }
            }
            Err(miss @ Miss::Nothing) => Ok(miss.to_string()),
            Err(miss) => Err(chain(&miss)),
        };
        let key = self.place.key();
        if let Err(why) = &why {
            say(&format!("cannot start from the warm snapshot `{key}`, so the guest boots: {why}"));
        }
        let mut builder = Builder::new(config);
        let making = self.place.begin().unwrap_or_else(|error| {
            say(&format!("cannot make the warm snapshot `{key}`: {}", chain(&error)));
            None
        });
        let making = making.map(|making| {
            let (answer, saved) = mpsc::sync_channel(1);
            builder = std::mem::replace(&mut builder, Builder::new(Config::new()))
                .save_when_ready(making.destination(), answer);
            (making, saved)
        });
        let machine = build(builder)?;
        if let Some((making, saved)) = making {
            let (basis, modules) = (self.basis.clone(), Files::of(machine.module_files()));
            let sandbox = machine.sandbox().clone();
            let make = move || {
                sandbox.enter_first(Role::Main)?;
                make(making, &basis, &modules, &saved)
            };
            self.making = Some(bantam::threads::named("bantam-warm".into()).spawn(make)?);
        }
        let (Ok(why) | Err(why)) = why;
        self.started("cold", Some(why), machine)
    }

    fn started(
        &mut self,
        start: &'static str,
        why: Option<String>,
        machine: Machine,
    ) -> Result<Machine, Box<dyn Error>> {
        if let Some(why) = &why {
            log::info!("the guest boots: {why}");
        }
        self.last = Some(Start { key: self.place.key().into(), start, why });
        Ok(machine)
    }

    /// Whether the last machine, which ended so, was of a snapshot that is no good: its guest did not get as far as its command,
    /// nor to read any input. The next one boots.
    pub fn is_lost(&mut self, machine: Option<&Machine>, ended: &Result<Outcome, Box<dyn Error>>) -> bool {
        use Outcome::{BootTimedOut, Crashed, Halted, Panicked, PoweredOff, Rebooted};
        let is_warm = self.last.as_ref().is_some_and(|last| last.why.is_none());
        let (Some(machine), Ok(outcome), true) = (machine, ended, is_warm) else { return false };
        let by_itself =
            matches!(outcome, Panicked(_) | Crashed(_) | PoweredOff | Rebooted | Halted | BootTimedOut { .. });
        let is_lost = by_itself && machine.report().durations.command.is_none();
        self.broken = is_lost.then(|| match outcome {
            BootTimedOut { limit, .. } => format!("its command had not begun after {limit:?}"),
            outcome => format!("its command had not begun when {outcome}"),
        });
        is_lost
    }

    /// Waits until the snapshot of the last machine, which has ended, is where it is found.
    pub fn finish(&mut self) {
        let Some(making) = self.making.take() else { return };
        if let Ok(Err(error)) = making.join() {
            say(&format!("cannot make the warm snapshot `{}`: {}", self.place.key(), chain(&*error)));
        }
    }
}

/// Waits until the machine has been saved, and has the snapshot be found.
fn make(
    making: Making,
    basis: &Basis,
    modules: &Files,
    saved: &Receiver<Result<(), machine::Error>>,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    match saved.recv() {
        Ok(saved) => saved?,
        // Its guest did not become ready, which is told elsewhere.
        Err(_) => return Ok(()),
    }
    Ok(making.finish(basis, modules)?)
}

/// Whether a machine that boots could be built where the one of a snapshot could not.
fn is_of_the_snapshot(error: &(dyn Error + 'static)) -> bool {
    match error.downcast_ref() {
        Some(machine::Error::Snapshot(_)) => true,
        Some(machine::Error::Kvm(error)) => !matches!(error, kvm::Error::Open(_)),
        _ => false,
    }
}

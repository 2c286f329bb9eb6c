//! What the API asks of a machine that runs.

use std::time::Duration;

use super::api::chain;
use super::http::Response;
use super::snapshot::Create;
use crate::config::firecracker::{Balloon, Drive, Limiter, NetworkInterface};
use crate::machine::{Destination, Handle, Lines, firecracker};
use crate::size::Size;
use crate::virtio::balloon::PAGE;
use crate::virtio::change::Change;

/// A machine that has started.
pub(super) struct Running {
    handle: Handle,
}

type Answer = Result<Response, String>;

fn done() -> Answer {
    Ok(Response::done())
}

impl Running {
    /// The machine of this handle.
    pub fn new(handle: Handle) -> Self {
        Self { handle }
    }

    pub fn is_paused(&self) -> bool {
        self.handle.is_paused()
    }

    pub fn set_paused(&mut self, paused: bool) -> Answer {
        let changed = if paused { self.handle.pause() } else { self.handle.resume() };
        changed.map_err(|error| chain(&error))?;
        done()
    }

    pub fn ctrl_alt_del(&mut self) -> Answer {
        self.handle.ctrl_alt_del();
        done()
    }

    fn change(&self, device: &str, change: Change) -> Result<(), String> {
        self.handle.change(device, change).map_err(|error| chain(&error))
    }

    fn change_disk(&self, device: &str, path: &str) -> Result<(), String> {
        self.handle.change_disk(device, path).map_err(|error| chain(&error))
    }

    /// Changes the disk of this index.
    pub fn change_drive(
        &mut self,
        index: usize,
        drive: &mut Drive,
        path: Option<&str>,
        limiter: Option<Limiter>,
    ) -> Answer {
        let device = format!("blk{index}");
        if let Some(path) = path {
            self.change_disk(&device, path)?;
            drive.path_on_host = path.to_owned();
        } else if limiter.is_none() {
            // The same file, which may have another size.
            self.change_disk(&device, &drive.path_on_host)?;
        }
        if let Some(limiter) = limiter {
            let mut next = drive.rate_limiter.clone().unwrap_or_default();
            next.update(limiter);
            self.change(&device, Change::Rates(next.rates()))?;
            drive.rate_limiter = Some(next);
        }
        done()
    }

    /// Changes the limits of the network card of this index, to the guest and from it.
    pub fn change_interface(
        &mut self,
        index: usize,
        card: &mut NetworkInterface,
        [rx, tx]: [Option<Limiter>; 2],
    ) -> Answer {
        let next = |limiter: &Option<Limiter>, update: Option<Limiter>| {
            let mut next = limiter.clone().unwrap_or_default();
            update.map(|update| {
                next.update(update);
                next
            })
        };
        let (rx, tx) = (next(&card.rx_rate_limiter, rx), next(&card.tx_rate_limiter, tx));
        let change = Change::NetRates { rx: rx.as_ref().map(Limiter::rates), tx: tx.as_ref().map(Limiter::rates) };
        self.change(&format!("net{index}"), change)?;
        card.rx_rate_limiter = rx.or(card.rx_rate_limiter.take());
        card.tx_rate_limiter = tx.or(card.tx_rate_limiter.take());
        done()
    }

    /// Changes the balloon's size, or the interval of its statistics; or tells those.
    pub fn balloon(&mut self, balloon: &mut Balloon, value: Option<u64>, is_size: bool) -> Answer {
        match value {
            Some(mib) if is_size => {
                self.handle.balloon(Size::mib(mib)).map_err(|error| chain(&error))?;
                balloon.amount_mib = u32::try_from(mib).unwrap_or(u32::MAX);
            }
            Some(seconds) => {
                if (balloon.stats_polling_interval_s == 0) != (seconds == 0) {
                    return Err("The balloon's statistics cannot be turned on or off after the start.".into());
                }
                if seconds > 0 {
                    self.change("balloon", Change::StatisticsInterval(Duration::from_secs(seconds)))?;
                }
                balloon.stats_polling_interval_s = u16::try_from(seconds).unwrap_or(u16::MAX);
            }
            None => return self.balloon_statistics(balloon),
        }
        done()
    }

    fn balloon_statistics(&self, balloon: &Balloon) -> Answer {
        if balloon.stats_polling_interval_s == 0 {
            return Err("The balloon's statistics were not turned on before the start.".into());
        }
        let statistics = self.handle.balloon_statistics().map_err(|error| chain(&error))?;
        let mut json = serde_json::to_value(statistics.guest.unwrap_or_default()).unwrap_or_default();
        for (name, size) in [("target", statistics.target), ("actual", statistics.actual)] {
            json[format!("{name}_pages")] = (size.get() / PAGE).into();
            json[format!("{name}_mib")] = (size.get() >> 20).into();
        }
        Ok(Response::found(&json))
    }

    pub fn snapshot(&mut self, create: Create) -> Answer {
        if !self.is_paused() {
            return Err("Cannot take a snapshot of a microVM that is not paused.".into());
        }
        let (state, memory, diff) = (create.snapshot_path.into(), create.mem_file_path.into(), create.diff);
        self.handle.snapshot(Destination::Files { state, memory, diff }).map_err(|error| chain(&error))?;
        done()
    }

    /// Has it write its metrics from the start.
    pub fn tell_metrics(&self, lines: Lines, metrics: firecracker::Metrics) {
        self.handle.metrics(lines, metrics);
    }

    pub fn flush_metrics(&self) -> Answer {
        match self.handle.flush_metrics().map_err(|error| chain(&error))? {
            true => done(),
            false => Err("The metrics cannot be written: the log says why.".into()),
        }
    }
}

//! What happens to a machine, and what it counts, told to whoever reads along. Nobody is waited for.

use std::os::fd::BorrowedFd;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::{Error, Lines, Machine, firecracker};
use crate::outcome::Outcome;

/// Where it is told.
#[derive(Debug, Default)]
pub(super) struct Told {
    pub events: Option<Lines>,
    pub metrics: Option<(Lines, firecracker::Metrics)>,
    /// When the next line of metrics is due.
    next: Option<Instant>,
}

impl Told {
    /// When the next line of metrics is due, if they are told.
    pub fn deadline(&self) -> Option<Instant> {
        self.metrics.as_ref().and(self.next)
    }

    /// Descriptors that there are lines for, once they have room.
    pub fn wanting(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let metrics = self.metrics.as_ref().map(|(lines, _)| lines);
        self.events.iter().chain(metrics).filter_map(Lines::wanting)
    }

    /// Writes what there is room for.
    pub fn write(&mut self) {
        let metrics = self.metrics.as_mut().map(|(lines, _)| lines);
        self.events.iter_mut().chain(metrics).for_each(Lines::write);
    }
}

impl Machine {
    /// Tells an event, with the fields of `more`.
    pub(super) fn tell(&mut self, event: &str, more: Value) {
        let Some(events) = &mut self.told.events else { return };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut line = json!({
            "event": event,
            "time-ms": u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
            "elapsed-ms": self.started.elapsed().as_secs_f64() * 1000.0,
        });
        if let (Some(line), Value::Object(more)) = (line.as_object_mut(), more) {
            line.extend(more);
        }
        events.add(&line);
    }

    /// Tells how it ended.
    pub(super) fn tell_end(&mut self, ended: &Result<Outcome, Error>) {
        if self.told.events.is_some() {
            if let Ok(Outcome::Panicked(panic)) = ended {
                self.tell("panicked", json!({"message": panic.message}));
            }
            let (mut more, cause) = match ended {
                Ok(outcome) => (serde_json::to_value(outcome).unwrap_or_default(), outcome.to_string()),
                Err(error) => (json!({"outcome": "failed"}), error.to_string()),
            };
            more["cause"] = cause.into();
            self.tell("ended", more);
        }
        self.tell_metrics(Instant::now());
    }

    /// Tells what it counted, if there is someone to tell.
    pub(super) fn tell_metrics(&mut self, now: Instant) {
        if self.told.metrics.is_none() {
            return;
        }
        let report = self.report();
        if let Some((lines, metrics)) = &mut self.told.metrics {
            self.told.next = now.checked_add(metrics.interval());
            let missed = lines.take_missed();
            lines.add(&metrics.line(&report, missed));
        }
    }
}

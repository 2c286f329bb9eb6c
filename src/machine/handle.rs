//! What reaches a machine that runs from other threads.

use std::fmt;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, PoisonError};

use super::board_x86_64::Attached;
use super::inbox::{Event, Sender};
use super::pause::ask;
use super::{Lines, Refusal, Report, firecracker};
use crate::size::Size;
use crate::virtio::balloon::{self, Statistics};
use crate::virtio::blk;
use crate::virtio::change::{Change, Error};

/// Reaches a machine from other threads. Clones reach the same machine.
#[derive(Clone)]
pub struct Handle {
    pub(super) sender: Sender,
    devices: Arc<[Attached]>,
    balloon: Option<Arc<balloon::Shared>>,
    pub(super) paused: Arc<AtomicBool>,
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").finish_non_exhaustive()
    }
}

impl Handle {
    pub(super) fn new(
        sender: Sender,
        devices: &[Attached],
        balloon: Option<Arc<balloon::Shared>>,
        paused: Arc<AtomicBool>,
    ) -> Self {
        Self { sender, devices: devices.into(), balloon, paused }
    }

    /// Ends the machine: [`Machine::run`](super::Machine::run) returns
    /// [`Outcome::Stopped`](crate::outcome::Outcome::Stopped). Without effect on one that has ended.
    pub fn stop(&self) {
        self.sender.send(Event::Stop);
    }

    /// Has the guest end by itself: its command gets SIGTERM. False if there is no command that could be told, or it was told
    /// of a signal before.
    ///
    /// # Errors
    /// When the machine has ended.
    pub fn terminate(&self) -> Result<bool, Refusal> {
        ask(&self.sender, "end", Event::Terminate)
    }

    /// Sends `bytes` to the guest's serial port. They wait for as long as the guest does not read them.
    pub fn input(&self, bytes: impl Into<Vec<u8>>) {
        self.sender.send(Event::Input(bytes.into()));
    }

    /// Presses Ctrl-Alt-Del on the guest's keyboard, if it has one.
    pub fn ctrl_alt_del(&self) {
        self.sender.send(Event::CtrlAltDel);
    }

    /// How it goes, in figures: the counters of devices and vCPUs, and when stages were reached.
    ///
    /// # Errors
    /// When the machine has ended.
    pub fn report(&self) -> Result<Report, Refusal> {
        ask(&self.sender, "read the counters of", Event::Report)
    }

    /// Writes the machine's counters as [`Builder::metrics`](super::Builder::metrics) does, if it does not run yet.
    pub fn metrics(&self, lines: Lines, metrics: firecracker::Metrics) {
        self.sender.send(Event::Metrics(Box::new((lines, metrics))));
    }

    /// Writes a line of counters now. False if that cannot be written, or nobody has said where to.
    ///
    /// # Errors
    /// When the machine has ended.
    pub fn flush_metrics(&self) -> Result<bool, Refusal> {
        ask(&self.sender, "write the metrics of", Event::FlushMetrics)
    }

    /// Changes the device of this name, which is that in the report: `blk0`, `net0`, `balloon`. Waits until that is done, after
    /// the request that the device is doing now: by its own thread, if it has one, but a disk's file by this.
    pub fn change(&self, device: &str, change: Change) -> Result<(), Error> {
        let found = self.device(device)?;
        loop {
            // No part of the machine is kept while waiting.
            let transport = || found.transport.upgrade().ok_or_else(|| Error::Ended { device: device.into() });
            if let Change::Disk(_) = change {
                let rested = transport()?.lock().unwrap_or_else(PoisonError::into_inner).rest();
                let _ = rested.map(|rested| rested.recv());
            }
            let answer = transport()?.lock().unwrap_or_else(PoisonError::into_inner).change(change.clone());
            if let Ok(result) = answer.recv() {
                if result.is_ok() {
                    self.sender.send(Event::Changed(device.into(), change));
                }
                return result;
            }
            // The device was stopped before its thread came to it.
        }
    }

    fn device(&self, name: &str) -> Result<&Attached, Error> {
        let no_device = || Error::NoDevice { device: name.into() };
        self.devices.iter().find(|attached| attached.name == name).ok_or_else(no_device)
    }

    /// Has the disk of this name be the file or block device at `path` from its next request on. If it is that already, it has
    /// the size that this has now. The file is opened here: the device's own thread may open none in a
    /// [sandbox](super::Builder::sandbox).
    pub fn change_disk(&self, device: &str, path: impl AsRef<Path>) -> Result<(), Error> {
        let readonly = self.device(device)?.readonly;
        self.change(device, Change::Disk(blk::Opened::open(path.as_ref(), readonly)?))
    }

    /// Asks the guest to put so much memory into its balloon, or to take out what is more. It does so when it can.
    pub fn balloon(&self, size: Size) -> Result<(), Error> {
        self.change("balloon", Change::Balloon(size))
    }

    /// How large the balloon is, and what the guest said last of its memory.
    pub fn balloon_statistics(&self) -> Result<Statistics, balloon::Error> {
        Ok(self.balloon.as_ref().ok_or(balloon::Error::NoBalloon)?.statistics())
    }
}

//! What can be changed of a device while its machine runs, whoever owns the device at the time.

use std::io;
use std::time::Duration;

use super::{balloon, blk, device};
use crate::limit::Limit;
use crate::size::Size;

/// A change of one device.
#[derive(Debug, Clone)]
pub enum Change {
    /// Another file or block device behind a disk, which is paused meanwhile. With what it has already, the size that this
    /// has now.
    Disk(blk::Opened),
    /// The rate limits of a disk, or of the random number device.
    Rates(Rates),
    /// The rate limits of a network card: of frames to the guest and from it. `None` leaves a direction as it is.
    NetRates {
        /// To the guest.
        rx: Option<Rates>,
        /// From the guest.
        tx: Option<Rates>,
    },
    /// How much memory the guest is asked to put into its balloon.
    Balloon(Size),
    /// How often the guest is asked for the balloon's statistics.
    StatisticsInterval(Duration),
}

/// How much may be done in a time; `None` is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rates {
    /// Bytes.
    pub bytes: Option<Limit>,
    /// Requests, or frames.
    pub operations: Option<Limit>,
}

/// Why a device stays as it is.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no device of that name.
    #[error("cannot change {device}: the machine has no such device")]
    NoDevice {
        /// The name asked for.
        device: String,
    },
    /// The machine has ended.
    #[error("cannot change {device}: the machine has ended")]
    Ended {
        /// The device's name.
        device: String,
    },
    /// The device's thread panicked, could not end what it was doing, or cannot be started again.
    #[error("cannot change a device that has failed")]
    Gone,
    /// A device of this type has no such thing.
    #[error("cannot change {what}: a device of this type has none")]
    Unsupported {
        /// What was to be changed.
        what: &'static str,
    },
    /// The disk image cannot be used.
    #[error(transparent)]
    Disk(#[from] blk::Error),
    /// The balloon cannot be so.
    #[error(transparent)]
    Balloon(#[from] balloon::Error),
    /// Packets are not counted that the host's kernel moves.
    #[error("cannot limit the rates of a network card that has vhost=on")]
    Vhost,
    /// The device gave up: until its driver resets it, it does nothing more.
    #[error(transparent)]
    Device(#[from] device::Error),
    /// The host has no timer for the rate limit.
    #[error("cannot make a timer for the rate limit")]
    Timer(#[source] io::Error),
}

impl Change {
    /// For a device that does not know this change.
    pub(super) fn unsupported(&self) -> Error {
        let what = match self {
            Change::Disk(_) => "the backing file",
            Change::Rates(_) => "rate limits of requests",
            Change::NetRates { .. } => "rate limits of frames",
            Change::Balloon(_) => "the size of the balloon",
            Change::StatisticsInterval(_) => "the interval of balloon statistics",
        };
        Error::Unsupported { what }
    }
}

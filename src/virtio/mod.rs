//! Virtio 1.2 devices.
//!
//! [`device`] is what a device is, [`queue`] how it talks to the driver, [`worker`] the thread it runs
//! on, the transport ([`mmio`]) is what the driver finds on the bus. One folder or file per device type follows.

pub mod balloon;
pub mod blk;
mod chain;
pub mod change;
pub mod device;
pub mod fs;
pub mod iovec;
mod layout;
pub mod mmio;
pub mod net;
mod polling;
pub mod queue;
mod rate_limiter;
pub mod rng;
#[cfg(test)]
pub(crate) mod testing;
pub mod vsock;
pub mod worker;

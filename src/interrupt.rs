//! What a device pulls to interrupt the guest.

use std::io;

/// An edge-triggered interrupt line: KVM's in a machine, a counter in a test.
pub trait Interrupt: Send + Sync {
    /// Raises the line once.
    fn trigger(&self) -> io::Result<()>;
}

//! What a device pulls to interrupt the guest.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// An edge-triggered interrupt line: an irqfd in a machine, a counter in a test.
pub trait Interrupt: Send + Sync {
    /// Raises the line once.
    fn trigger(&self) -> io::Result<()>;
}

/// An eventfd that KVM turns into an interrupt (`KVM_IRQFD`).
impl Interrupt for EventFd {
    fn trigger(&self) -> io::Result<()> {
        self.write(1)
    }
}

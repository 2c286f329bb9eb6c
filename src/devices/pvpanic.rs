//! pvpanic: the port through which a kernel says that it panicked (QEMU's docs/specs/pvpanic).

use crate::bus::BusDevice;

/// Bit 0: the guest panicked.
const PANICKED: u8 = 1;

/// The event port.
pub struct Pvpanic<F>(F);

impl<F: Fn() + Send> Pvpanic<F> {
    /// A port that calls `on_panic` when the guest says that it panicked.
    pub fn new(on_panic: F) -> Self {
        Self(on_panic)
    }
}

impl<F: Fn() + Send> BusDevice for Pvpanic<F> {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        data[0] = PANICKED;
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if data[0] & PANICKED != 0 {
            (self.0)();
        }
    }
}

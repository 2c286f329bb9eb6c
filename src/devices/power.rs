//! Power management as hardware-reduced ACPI has it: three registers, one byte each, at consecutive ports.
//!
//! ACPI 6.5, 4.8.3.7 (SLEEP_CONTROL_REG, SLEEP_STATUS_REG) and 4.8.3.6 (RESET_REG).

use crate::bus::BusDevice;

/// SLP_EN, bit 5 of SLEEP_CONTROL_REG: go to the sleep state of SLP_TYP.
const SLEEP_ENABLE: u8 = 1 << 5;

const SLEEP_CONTROL: u64 = 0;
const RESET: u64 = 2;

/// The sleep control, sleep status and reset registers.
pub struct Power<F, G> {
    s5: u8,
    reset_value: u8,
    on_power_off: F,
    on_reset: G,
}

impl<F: Fn() + Send, G: Fn() + Send> Power<F, G> {
    /// Registers that call `on_power_off` when the guest enters the sleep state of type `s5`, as the DSDT's `_S5` has
    /// it, and `on_reset` when it writes the FADT's `reset_value`.
    pub fn new(s5: u8, reset_value: u8, on_power_off: F, on_reset: G) -> Self {
        Self { s5, reset_value, on_power_off, on_reset }
    }
}

impl<F: Fn() + Send, G: Fn() + Send> BusDevice for Power<F, G> {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data[0]) {
            (SLEEP_CONTROL, value) if value & SLEEP_ENABLE != 0 && value >> 2 & 7 == self.s5 => {
                (self.on_power_off)();
            }
            (RESET, value) if value == self.reset_value => (self.on_reset)(),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn only_s5_with_sleep_enable_powers_off() {
        let (offs, resets) = (AtomicU32::new(0), AtomicU32::new(0));
        let count = |n: &AtomicU32| {
            n.fetch_add(1, Ordering::SeqCst);
        };
        let mut power = Power::new(5, 1, || count(&offs), || count(&resets));
        for value in [0, 5 << 2, SLEEP_ENABLE, SLEEP_ENABLE | 3 << 2] {
            power.write(SLEEP_CONTROL, &[value]);
        }
        assert_eq!(offs.load(Ordering::SeqCst), 0);
        power.write(SLEEP_CONTROL, &[SLEEP_ENABLE | 5 << 2]);
        power.write(RESET, &[1]);
        assert_eq!((offs.load(Ordering::SeqCst), resets.load(Ordering::SeqCst)), (1, 1));
    }
}

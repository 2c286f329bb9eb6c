//! The keyboard controller, of which machines without a keyboard keep two things: it answers a driver's probe, and
//! its command 0xFE resets the processor. Linux reboots this way with `reboot=k`.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::bus::BusDevice;
use crate::snapshot;

/// Reads the command byte.
const READ_COMMAND_BYTE: u8 = 0x20;
/// Writes the command byte, which follows on the data port.
const WRITE_COMMAND_BYTE: u8 = 0x60;
/// Self test; the answer 0x55 means passed.
const SELF_TEST: u8 = 0xaa;
/// Pulses the processor's reset line.
const PULSE_RESET: u8 = 0xfe;

/// Status register: the output buffer has a byte for the guest.
const OUTPUT_FULL: u8 = 1;
/// Offset of the data port (0x60) and of the status and command port (0x64).
const DATA: u64 = 0;
const STATUS: u64 = 4;

/// The controller at ports 0x60 to 0x64.
pub struct I8042<F> {
    on_reset: F,
    command_byte: u8,
    awaits_command_byte: bool,
    output: Option<u8>,
}

impl<F: Fn() + Send> I8042<F> {
    /// A controller that calls `on_reset` when the guest pulls the reset line.
    pub fn new(on_reset: F) -> Self {
        Self { on_reset, command_byte: 0, awaits_command_byte: false, output: None }
    }
}

impl<F: Fn() + Send> BusDevice for I8042<F> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            DATA => data[0] = self.output.take().unwrap_or(0),
            STATUS if self.output.is_some() => data[0] = OUTPUT_FULL,
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data[0]) {
            (STATUS, PULSE_RESET) => (self.on_reset)(),
            (STATUS, READ_COMMAND_BYTE) => self.output = Some(self.command_byte),
            (STATUS, SELF_TEST) => self.output = Some(0x55),
            (STATUS, command) => self.awaits_command_byte = command == WRITE_COMMAND_BYTE,
            (DATA, byte) if self.awaits_command_byte => {
                self.command_byte = byte;
                self.awaits_command_byte = false;
            }
            _ => {}
        }
    }

    fn save(&mut self) -> Value {
        json!([self.command_byte, self.awaits_command_byte, self.output])
    }

    fn restore(&mut self, state: &Value) -> Result<(), snapshot::Error> {
        let fail = |error: serde_json::Error| snapshot::Error::part("the keyboard controller", error);
        (self.command_byte, self.awaits_command_byte, self.output) = Deserialize::deserialize(state).map_err(fail)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn what_is_saved_is_read_elsewhere() {
        let mut i8042 = I8042::new(|| ());
        i8042.write(STATUS, &[WRITE_COMMAND_BYTE]);
        i8042.write(DATA, &[0x45]);
        i8042.write(STATUS, &[READ_COMMAND_BYTE]);
        let mut other = I8042::new(|| ());
        other.restore(&i8042.save()).unwrap();
        let mut byte = [0];
        other.read(DATA, &mut byte);
        assert_eq!(byte, [0x45]);
        assert!(other.restore(&json!([1, 2])).is_err());
    }

    #[test]
    fn command_fe_resets_and_the_command_byte_is_kept() {
        let resets = AtomicU32::new(0);
        let mut i8042 = I8042::new(|| {
            resets.fetch_add(1, Ordering::SeqCst);
        });
        let mut byte = [0xff];
        i8042.write(STATUS, &[WRITE_COMMAND_BYTE]);
        i8042.write(DATA, &[0x45]);
        i8042.write(STATUS, &[READ_COMMAND_BYTE]);
        i8042.read(STATUS, &mut byte);
        assert_eq!(byte, [OUTPUT_FULL]);
        i8042.read(DATA, &mut byte);
        assert_eq!(byte, [0x45]);
        i8042.read(STATUS, &mut byte);
        assert_eq!(byte, [0]);
        i8042.write(STATUS, &[PULSE_RESET]);
        assert_eq!(resets.load(Ordering::SeqCst), 1);
    }
}

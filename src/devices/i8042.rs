//! The keyboard controller. Machines without a keyboard have two things of it: it answers a driver's probe, and its
//! command 0xFE resets the processor. Linux reboots this way with `reboot=k`. With a keyboard Ctrl-Alt-Del can be pressed.

use std::collections::VecDeque;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::bus::BusDevice;
use crate::interrupt::Interrupt;
use crate::metrics::Counter;
use crate::snapshot;

/// Commands to the controller.
mod command {
    /// Reads the command byte.
    pub const READ_COMMAND_BYTE: u8 = 0x20;
    /// Writes the command byte, which follows on the data port.
    pub const WRITE_COMMAND_BYTE: u8 = 0x60;
    /// Tests the port of the mouse, which there is none of.
    pub const TEST_MOUSE: u8 = 0xa9;
    /// Self test; the answer 0x55 means passed.
    pub const SELF_TEST: u8 = 0xaa;
    /// Tests the keyboard's port; the answer 0 means passed.
    pub const TEST_KEYBOARD: u8 = 0xab;
    /// Disables and enables the keyboard.
    pub const DISABLE: u8 = 0xad;
    pub const ENABLE: u8 = 0xae;
    /// A byte for the controller's outputs follows, one that comes back as if from the keyboard or from the mouse, and one
    /// for the mouse.
    pub const WITH_BYTE: [u8; 4] = [0xd1, 0xd2, 0xd3, 0xd4];
    /// Pulses the processor's reset line.
    pub const PULSE_RESET: u8 = 0xfe;
}

/// Commands to the keyboard, and its answers.
mod keyboard {
    pub const SET_LEDS: u8 = 0xed;
    pub const ECHO: u8 = 0xee;
    pub const SCAN_CODE_SET: u8 = 0xf0;
    pub const IDENTIFY: u8 = 0xf2;
    pub const SET_RATE: u8 = 0xf3;
    pub const RESET: u8 = 0xff;

    pub const ACK: u8 = 0xfa;
    pub const PASSED: u8 = 0xaa;
    /// A keyboard with 101 or 102 keys, as the controller translates it.
    pub const ID: [u8; 2] = [0xab, 0x41];
    /// Control, Alt and Delete go down, and up again, in scan code set 1.
    pub const CTRL_ALT_DEL: [u8; 8] = [0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d];
}

/// Bits of the command byte: the keyboard interrupts, is disabled, and its scan codes are translated to set 1.
const INTERRUPTS: u8 = 1 << 0;
const DISABLED: u8 = 1 << 4;
const TRANSLATES: u8 = 1 << 6;

/// Status register: the output buffer has a byte for the guest.
const OUTPUT_FULL: u8 = 1;
/// Offset of the data port (0x60) and of the status and command port (0x64).
const DATA: u64 = 0;
const STATUS: u64 = 4;
/// Bytes that wait for the guest.
const OUTPUT_MAX: usize = 32;

/// What a byte on the data port is.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Next {
    /// A command to the keyboard.
    Command,
    /// What such a command is about.
    Argument,
    CommandByte,
    /// What goes nowhere.
    Nothing,
}

/// What the guest did with the controller.
#[derive(Debug, Default, Serialize)]
pub struct Counts {
    reads: Counter,
    writes: Counter,
    resets: Counter,
}

/// The controller at ports 0x60 to 0x64.
pub struct I8042<F> {
    on_reset: F,
    /// The keyboard's interrupt, if there is one.
    keyboard: Option<Arc<dyn Interrupt>>,
    command_byte: u8,
    next: Next,
    output: VecDeque<u8>,
    counts: Arc<Counts>,
}

impl<F: Fn() + Send> I8042<F> {
    /// A controller that calls `on_reset` when the guest pulls the reset line; with a keyboard if there is an interrupt
    /// for it.
    pub fn new(on_reset: F, keyboard: Option<Arc<dyn Interrupt>>) -> Self {
        let command_byte = if keyboard.is_some() { TRANSLATES } else { 0 };
        let (next, output, counts) = (Next::Command, VecDeque::new(), Arc::default());
        Self { on_reset, keyboard, command_byte, next, output, counts }
    }

    /// What it counts.
    pub fn counts(&self) -> Arc<Counts> {
        self.counts.clone()
    }

    /// Presses Ctrl, Alt and Delete, and lets them go. Without effect if there is no keyboard, or the guest has not read
    /// what was pressed before.
    pub fn ctrl_alt_del(&mut self) {
        if self.keyboard.is_some() && self.output.len() + keyboard::CTRL_ALT_DEL.len() <= OUTPUT_MAX {
            self.output.extend(keyboard::CTRL_ALT_DEL);
            self.interrupt();
        }
    }

    fn put(&mut self, bytes: &[u8]) {
        let room = OUTPUT_MAX - self.output.len().min(OUTPUT_MAX);
        self.output.extend(&bytes[..bytes.len().min(room)]);
        self.interrupt();
    }

    /// Tells the guest of a byte, if it wants to know.
    fn interrupt(&self) {
        let wanted = self.command_byte & (INTERRUPTS | DISABLED) == INTERRUPTS;
        if let Some(line) = self.keyboard.as_ref().filter(|_| wanted && !self.output.is_empty())
            && let Err(error) = line.trigger()
        {
            log::warn!("cannot interrupt the guest for its keyboard: {error}");
        }
    }

    fn control(&mut self, command: u8) {
        self.next = Next::Command;
        match command {
            command::PULSE_RESET => {
                self.counts.resets.inc();
                (self.on_reset)();
            }
            command::READ_COMMAND_BYTE => self.put(&[self.command_byte]),
            command::WRITE_COMMAND_BYTE => self.next = Next::CommandByte,
            command::SELF_TEST => self.put(&[0x55]),
            command::TEST_KEYBOARD if self.keyboard.is_some() => self.put(&[0]),
            // Its clock line is stuck: Linux does not wait for a mouse.
            command::TEST_MOUSE if self.keyboard.is_some() => self.put(&[1]),
            command::DISABLE => self.command_byte |= DISABLED,
            command::ENABLE => self.command_byte &= !DISABLED,
            // That of a loop comes back as if from the keyboard: that is no mouse, either.
            command if command::WITH_BYTE.contains(&command) => self.next = Next::Nothing,
            _ => {}
        }
    }

    /// A byte for the keyboard.
    fn key(&mut self, byte: u8) {
        match byte {
            keyboard::SET_LEDS | keyboard::SET_RATE | keyboard::SCAN_CODE_SET => {
                self.next = Next::Argument;
                self.put(&[keyboard::ACK]);
            }
            keyboard::ECHO => self.put(&[keyboard::ECHO]),
            keyboard::IDENTIFY => self.put(&[keyboard::ACK, keyboard::ID[0], keyboard::ID[1]]),
            keyboard::RESET => self.put(&[keyboard::ACK, keyboard::PASSED]),
            _ => self.put(&[keyboard::ACK]),
        }
    }
}

impl<F: Fn() + Send> BusDevice for I8042<F> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        self.counts.reads.inc();
        match offset {
            DATA => {
                data[0] = self.output.pop_front().unwrap_or(0);
                // One byte, one interrupt.
                self.interrupt();
            }
            STATUS if !self.output.is_empty() => data[0] = OUTPUT_FULL,
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.counts.writes.inc();
        match (offset, data[0]) {
            (STATUS, command) => self.control(command),
            (DATA, byte) => match std::mem::replace(&mut self.next, Next::Command) {
                Next::CommandByte => self.command_byte = byte,
                Next::Argument => self.put(&[keyboard::ACK]),
                Next::Nothing if self.keyboard.is_some() => self.put(&[byte]),
                Next::Command if self.keyboard.is_some() => self.key(byte),
                Next::Nothing | Next::Command => {}
            },
            _ => {}
        }
    }

    /// An interrupt may have been lost on the way to where it is now; one too many does no harm.
    fn resume(&mut self) {
        self.interrupt();
    }

    fn save(&mut self) -> Value {
        json!([self.command_byte, self.next, self.output])
    }

    fn restore(&mut self, state: &Value) -> Result<(), snapshot::Error> {
        let fail = |error: serde_json::Error| snapshot::Error::part("the keyboard controller", error);
        (self.command_byte, self.next, self.output) = Deserialize::deserialize(state).map_err(fail)?;
        self.output.truncate(OUTPUT_MAX);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[derive(Default)]
    struct Line(AtomicU32);

    impl Interrupt for Line {
        fn trigger(&self) -> io::Result<()> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }

    fn read<F: Fn() + Send>(i8042: &mut I8042<F>, offset: u64) -> u8 {
        let mut byte = [0xff];
        i8042.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn what_is_saved_is_read_elsewhere() {
        let mut i8042 = I8042::new(|| (), None);
        i8042.write(STATUS, &[command::WRITE_COMMAND_BYTE]);
        i8042.write(DATA, &[0x45]);
        i8042.write(STATUS, &[command::READ_COMMAND_BYTE]);
        let mut other = I8042::new(|| (), None);
        other.restore(&i8042.save()).unwrap();
        let mut byte = [0];
        other.read(DATA, &mut byte);
        assert_eq!(byte, [0x45]);
        assert!(other.restore(&json!([1, 2])).is_err());
    }

    #[test]
    fn command_fe_resets_and_the_command_byte_is_kept() {
        let resets = AtomicU32::new(0);
        let mut i8042 = I8042::new(
            || {
                resets.fetch_add(1, Ordering::SeqCst);
            },
            None,
        );
        i8042.write(STATUS, &[command::WRITE_COMMAND_BYTE]);
        i8042.write(DATA, &[0x45]);
        i8042.write(STATUS, &[command::READ_COMMAND_BYTE]);
        assert_eq!([STATUS, DATA, STATUS].map(|offset| read(&mut i8042, offset)), [OUTPUT_FULL, 0x45, 0]);
        // There is no keyboard.
        i8042.write(DATA, &[keyboard::IDENTIFY]);
        i8042.ctrl_alt_del();
        assert_eq!(read(&mut i8042, STATUS), 0);
        i8042.write(STATUS, &[command::PULSE_RESET]);
        assert_eq!(resets.load(Ordering::SeqCst), 1);
        assert_eq!(serde_json::to_value(&*i8042.counts()).unwrap(), json!({"reads": 4, "writes": 5, "resets": 1}));
    }

    #[test]
    fn a_keyboard_answers_and_is_pressed() {
        let line = Arc::new(Line::default());
        let mut i8042 = I8042::new(|| {}, Some(line.clone()));
        i8042.write(DATA, &[keyboard::IDENTIFY]);
        assert_eq!([DATA; 4].map(|offset| read(&mut i8042, offset)), [keyboard::ACK, 0xab, 0x41, 0]);
        i8042.write(DATA, &[keyboard::SET_LEDS]);
        i8042.write(DATA, &[7]);
        assert_eq!([DATA; 3].map(|offset| read(&mut i8042, offset)), [keyboard::ACK, keyboard::ACK, 0]);
        assert_eq!(line.0.load(Ordering::SeqCst), 0, "it is not wanted");
        i8042.write(STATUS, &[command::WRITE_COMMAND_BYTE]);
        i8042.write(DATA, &[INTERRUPTS | TRANSLATES]);
        i8042.ctrl_alt_del();
        assert_eq!(line.0.load(Ordering::SeqCst), 1);
        assert_eq!([DATA; 8].map(|offset| read(&mut i8042, offset)), keyboard::CTRL_ALT_DEL);
        assert_eq!(line.0.load(Ordering::SeqCst), 8, "one for each byte");
        // What is unread where it is restored interrupts there.
        i8042.ctrl_alt_del();
        let line = Arc::new(Line::default());
        let mut other = I8042::new(|| {}, Some(line.clone()));
        other.restore(&i8042.save()).unwrap();
        other.resume();
        assert_eq!(line.0.load(Ordering::SeqCst), 1);
        assert_eq!(read(&mut other, DATA), keyboard::CTRL_ALT_DEL[0]);
        // Pressed for ever, it takes no more room.
        (0..100).for_each(|_| i8042.ctrl_alt_del());
        (0..100).for_each(|_| i8042.write(DATA, &[keyboard::RESET]));
        assert!(i8042.output.len() <= OUTPUT_MAX);
    }
}

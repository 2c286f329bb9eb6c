//! The IOAPIC of machines with more CPUs than KVM's own can interrupt: an entry for each pin says which message goes to
//! which local APIC. It only translates: each message stands by for an edge on its pin.
//!
//! Intel 82093AA data sheet, section 3. A destination has 15 bits (Xen's and KVM's "extended destination ID"), the upper
//! seven where the data sheet reserves bits 49 to 55. There are no level-triggered interrupts in this machine.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::bus::BusDevice;
use crate::snapshot;

/// Pins, and so entries.
pub const PINS: usize = LAST_PIN as usize + 1;
const LAST_PIN: u32 = 23;
/// Length of its registers in bytes.
pub const SIZE: u64 = 0x20;

/// Offsets of the two registers: which one is meant, and its value.
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
/// What can be selected; the entries follow in two halves each.
const ID: u8 = 0;
const VERSION: u8 = 1;
const ARBITRATION: u8 = 2;
const FIRST_ENTRY: u8 = 0x10;

/// As KVM's: the version without an EOI register, and the number of the last pin.
const VERSION_VALUE: u32 = LAST_PIN << 16 | 0x11;
const MASKED: u64 = 1 << 16;
/// Delivery status and remote IRR.
const READ_ONLY: u64 = 1 << 12 | 1 << 14;

/// An interrupt message (Intel SDM volume 3, 11.11), with a 32-bit destination: its bits 8 to 31 are those of the
/// address's upper half.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Where to: the destination and how it is meant.
    pub address: u64,
    /// Vector and delivery mode.
    pub data: u32,
}

/// The IOAPIC. It calls `on_change` with all pins' messages, `None` where masked, when one of them is another.
pub struct Ioapic<F> {
    select: u8,
    id: u32,
    entries: [u64; PINS],
    on_change: F,
}

impl<F: Fn([Option<Message>; PINS]) + Send> Ioapic<F> {
    /// All pins masked.
    pub fn new(on_change: F) -> Self {
        Self { select: 0, id: 0, entries: [MASKED; PINS], on_change }
    }

    fn read_selected(&self) -> u32 {
        match self.select {
            ID | ARBITRATION => self.id,
            VERSION => VERSION_VALUE,
            _ => self.half().map_or(0, |(pin, shift)| (self.entries[pin] >> shift & 0xffff_ffff) as u32),
        }
    }

    fn write_selected(&mut self, value: u32) {
        if self.select == ID {
            self.id = value & 0x0f00_0000;
        } else if let Some((pin, shift)) = self.half() {
            let before = self.messages();
            let entry = &mut self.entries[pin];
            *entry = (*entry & !(0xffff_ffff << shift) | u64::from(value) << shift) & !READ_ONLY;
            let after = self.messages();
            if after != before {
                (self.on_change)(after);
            }
        }
    }

    /// The pin and the bits of its entry that are selected.
    fn half(&self) -> Option<(usize, u32)> {
        let index = self.select.checked_sub(FIRST_ENTRY)?;
        let pin = usize::from(index / 2);
        (pin < PINS).then_some((pin, u32::from(index % 2) * 32))
    }

    fn messages(&self) -> [Option<Message>; PINS] {
        self.entries.map(message)
    }
}

/// What an entry has the IOAPIC send.
fn message(entry: u64) -> Option<Message> {
    let destination = entry >> 56 | (entry >> 49 & 0x7f) << 8;
    let logical = entry >> 11 & 1;
    let address = 0xfee0_0000 | (destination & 0xff) << 12 | logical << 2 | (destination & !0xff) << 32;
    // Vector and delivery mode, edge-triggered.
    let data = (entry & 0x7ff) as u32;
    (entry & MASKED == 0).then_some(Message { address, data })
}

impl<F: Fn([Option<Message>; PINS]) + Send> BusDevice for Ioapic<F> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            SELECT => self.select.into(),
            WINDOW => self.read_selected(),
            _ => 0,
        };
        data.fill(0);
        let len = data.len().min(4);
        data[..len].copy_from_slice(&value.to_le_bytes()[..len]);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, <[u8; 4]>::try_from(data)) {
            (SELECT, _) => self.select = data[0],
            (WINDOW, Ok(value)) => self.write_selected(u32::from_le_bytes(value)),
            _ => {}
        }
    }

    fn save(&mut self) -> Value {
        json!([self.select, self.id, self.entries])
    }

    fn restore(&mut self, state: &Value) -> Result<(), snapshot::Error> {
        let fail = |error: serde_json::Error| snapshot::Error::part("the IOAPIC", error);
        (self.select, self.id, self.entries) = Deserialize::deserialize(state).map_err(fail)?;
        (self.on_change)(self.messages());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn set(ioapic: &mut impl BusDevice, register: u8, value: u32) {
        ioapic.write(SELECT, &u32::from(register).to_le_bytes());
        ioapic.write(WINDOW, &value.to_le_bytes());
    }

    fn get(ioapic: &mut impl BusDevice, register: u8) -> u32 {
        let mut value = [0xff; 4];
        ioapic.write(SELECT, &[register]);
        ioapic.read(WINDOW, &mut value);
        u32::from_le_bytes(value)
    }

    #[test]
    fn the_driver_finds_twenty_four_masked_pins() {
        let mut ioapic = Ioapic::new(|_| panic!("nothing changed"));
        assert_eq!(get(&mut ioapic, VERSION), 0x0017_0011);
        set(&mut ioapic, ID, 0xffff_ffff);
        assert_eq!((get(&mut ioapic, ID), get(&mut ioapic, ARBITRATION)), (0x0f00_0000, 0x0f00_0000));
        for pin in 0..24 {
            assert_eq!(get(&mut ioapic, 0x10 + 2 * pin), 1 << 16);
            assert_eq!(get(&mut ioapic, 0x11 + 2 * pin), 0);
        }
        // There is no more, and nothing but words.
        set(&mut ioapic, 0x40, 0);
        set(&mut ioapic, 0xff, 0);
        ioapic.write(SELECT, &[0x10]);
        ioapic.write(WINDOW, &[0]);
        ioapic.write(0x18, &[0; 4]);
        assert_eq!((get(&mut ioapic, 0x40), get(&mut ioapic, 0xff), get(&mut ioapic, 0x10)), (0, 0, 1 << 16));
    }

    #[test]
    fn what_is_not_masked_has_a_message() {
        let seen = Mutex::new(Vec::new());
        let mut ioapic = Ioapic::new(|messages: [Option<Message>; PINS]| seen.lock().unwrap().push(messages));
        // CPU 0x203, fixed, physical: nothing to tell while it is masked.
        set(&mut ioapic, 0x11 + 2 * 5, 0x03 << 24 | 0x02 << 17);
        assert!(seen.lock().unwrap().is_empty());
        set(&mut ioapic, 0x10 + 2 * 5, 0x31 | 1 << 12);
        assert_eq!(get(&mut ioapic, 0x10 + 2 * 5), 0x31, "the delivery status cannot be written");
        // Lowest priority, logical, CPU 1.
        set(&mut ioapic, 0x11 + 2 * 23, 1 << 24);
        set(&mut ioapic, 0x10 + 2 * 23, 0x42 | 1 << 8 | 1 << 11);
        set(&mut ioapic, 0x10 + 2 * 5, 0x31 | 1 << 16);
        let mut expected = [None; PINS];
        expected[5] = Some(Message { address: 0x0000_0200_fee0_3000, data: 0x31 });
        let first = expected;
        expected[23] = Some(Message { address: 0xfee0_1004, data: 0x142 });
        let second = expected;
        expected[5] = None;
        assert_eq!(*seen.lock().unwrap(), [first, second, expected]);
        let state = ioapic.save();
        let mut other = Ioapic::new(|messages: [Option<Message>; PINS]| seen.lock().unwrap().push(messages));
        other.restore(&state).unwrap();
        assert_eq!(seen.lock().unwrap().last(), Some(&expected));
        assert!(other.restore(&json!([0, 0, [1, 2]])).is_err());
    }
}

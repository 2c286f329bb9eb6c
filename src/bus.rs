//! The buses: address ranges of port I/O or MMIO and the devices behind them.

use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;

use crate::snapshot;

/// A device as a vCPU sees it. `offset` counts bytes from the start of the device's range; `data` is as long as the
/// access: 1, 2, 4 or 8 bytes, little-endian.
pub trait BusDevice: Send {
    /// Fills `data` with what the guest reads. `data` comes filled with ones, as from a bus where nothing answers.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes what the guest wrote.
    fn write(&mut self, offset: u64, data: &[u8]);
    /// Has it do nothing by itself, once it has finished what it has in hand. No vCPU runs until [`BusDevice::resume`].
    fn pause(&mut self) {}
    /// Has it go on.
    fn resume(&mut self) {}
    /// What it has to know to go on elsewhere, as JSON; nothing for one that remembers nothing. It is paused, and may be
    /// resumed afterwards.
    fn save(&mut self) -> Value {
        Value::Null
    }
    /// Takes over what one of its kind saved, before the guest or a driver has used it. It is paused then.
    ///
    /// # Errors
    /// When `state` is that of another device.
    fn restore(&mut self, state: &Value) -> Result<(), snapshot::Error> {
        if state.is_null() { Ok(()) } else { Err(snapshot::Error::part("a device", "it has no state")) }
    }
}

struct Slot {
    base: u64,
    len: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// Two devices want the same addresses.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot attach a device at {base:#x}, {len:#x} long: the range is empty, wraps or is taken")]
pub struct Overlap {
    /// First address asked for.
    pub base: u64,
    /// Length asked for, in bytes.
    pub len: u64,
}

/// An address space of devices. Built by the board, then only read: every vCPU walks it without a lock, and takes
/// only that of the device it found.
#[derive(Default)]
pub struct Bus {
    /// Sorted by base; ranges do not overlap.
    slots: Vec<Slot>,
}

impl Bus {
    /// Attaches `device` at `base..base + len`.
    pub fn attach(&mut self, base: u64, len: u64, device: Arc<Mutex<dyn BusDevice>>) -> Result<(), Overlap> {
        let overlap = Overlap { base, len };
        let end = base.checked_add(len).filter(|end| *end > base).ok_or(overlap)?;
        let at = self.slots.partition_point(|slot| slot.base < base);
        let before = at.checked_sub(1).map(|i| &self.slots[i]);
        if before.is_some_and(|slot| slot.base + slot.len > base)
            || self.slots.get(at).is_some_and(|slot| slot.base < end)
        {
            return Err(Overlap { base, len });
        }
        self.slots.insert(at, Slot { base, len, device });
        Ok(())
    }

    /// Reads from the device at `address`. Where there is none, or the access crosses the device's end, the guest
    /// reads ones, as from an empty bus.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((slot, offset)) = self.find(address, data.len()) {
            slot.device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
        }
    }

    /// Writes to the device at `address`; where there is none the write goes nowhere.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((slot, offset)) = self.find(address, data.len()) {
            slot.device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }

    /// Calls `act` with the address of each device and the device, in that order, until it fails.
    pub fn try_for_each<E>(&self, mut act: impl FnMut(u64, &mut dyn BusDevice) -> Result<(), E>) -> Result<(), E> {
        self.slots
            .iter()
            .try_for_each(|slot| act(slot.base, &mut *slot.device.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    fn find(&self, address: u64, len: usize) -> Option<(&Slot, u64)> {
        let slot = &self.slots[self.slots.partition_point(|slot| slot.base <= address).checked_sub(1)?];
        let offset = address - slot.base;
        (offset.checked_add(len as u64)? <= slot.len).then_some((slot, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Answers with its own number and the offset.
    struct Echo(u8, Vec<(u64, Vec<u8>)>);
    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data[0] = self.0;
            if let Some(byte) = data.get_mut(1) {
                *byte = offset.to_le_bytes()[0];
            }
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.1.push((offset, data.to_vec()));
        }
    }
    fn echo(id: u8) -> Arc<Mutex<Echo>> {
        Arc::new(Mutex::new(Echo(id, Vec::new())))
    }

    #[test]
    fn an_access_reaches_its_device_with_its_offset() {
        let (a, b) = (echo(1), echo(2));
        let mut bus = Bus::default();
        bus.attach(0x200, 0x10, b.clone()).unwrap();
        bus.attach(0x100, 0x100, a).unwrap();
        let mut data = [0; 2];
        bus.read(0x1f0, &mut data);
        assert_eq!(data, [1, 0xf0]);
        bus.write(0x20f, &[9]);
        assert_eq!(b.lock().unwrap().1, [(0xf, vec![9])]);
    }

    #[test]
    fn holes_and_accesses_across_the_end_read_ones() {
        let mut bus = Bus::default();
        bus.attach(0x100, 4, echo(1)).unwrap();
        for address in [0, 0xff, 0x103, 0x104, u64::MAX] {
            let mut data = [0; 2];
            bus.read(address, &mut data);
            assert_eq!(data, [0xff; 2], "{address:#x}");
        }
    }

    proptest! {
        #[test]
        fn overlaps_are_refused_and_nothing_else(base in 0u64..64, len in 0u64..64) {
            let mut bus = Bus::default();
            bus.attach(20, 10, echo(1)).unwrap();
            bus.attach(40, 10, echo(2)).unwrap();
            let free = len > 0 && (base + len <= 20 || (base >= 30 && base + len <= 40) || base >= 50);
            prop_assert_eq!(bus.attach(base, len, echo(3)).is_ok(), free);
        }
    }
}

//! The CMOS real-time clock (Motorola MC146818), as far as a kernel reads the time from it.
//!
//! ACPI tells a kernel that it is not there; one without ACPI looks for it all the same, and waits seconds for a port
//! that reads ones to become ready.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use serde_json::Value;

use crate::bus::BusDevice;
use crate::snapshot;

/// Offset of the index port (0x70); the data port (0x71) follows.
const INDEX: u64 = 0;
/// The top bit of the index port masks NMIs and is no part of the index.
const INDEX_MASK: u8 = 0x7f;

const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_D: u8 = 0x0d;
/// The century, where IBM's PC put it.
const CENTURY: u8 = 0x32;

/// Register A: divider for a 32.768 kHz crystal; no update in progress.
const DIVIDER_32_KHZ: u8 = 0x20;
/// Register B: 24-hour mode; the figures are BCD.
const HOURS_24: u8 = 0x02;
/// Register D: the battery is good.
const VALID: u8 = 0x80;

/// The clock at ports 0x70 and 0x71. It cannot be set, and does not interrupt.
#[derive(Debug, Default)]
pub struct Cmos {
    index: u8,
}

impl BusDevice for Cmos {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        data.fill(0);
        data[0] = if offset == INDEX { self.index } else { register(self.index, now) };
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == INDEX {
            self.index = data[0] & INDEX_MASK;
        }
    }

    fn save(&mut self) -> Value {
        self.index.into()
    }

    fn restore(&mut self, state: &Value) -> Result<(), snapshot::Error> {
        let fail = |error: serde_json::Error| snapshot::Error::part("the CMOS clock", error);
        self.index = Deserialize::deserialize(state).map_err(fail)?;
        Ok(())
    }
}

/// What register `index` reads `now`, in seconds since 1970.
fn register(index: u8, now: u64) -> u8 {
    let (days, second) = (now / 86400, now % 86400);
    let (year, month, day) = date(days);
    let figure = match index {
        0x00 => second % 60,
        0x02 => second / 60 % 60,
        0x04 => second / 3600,
        // 1 is Sunday, and 1970 began on a Thursday.
        0x06 => (days + 4) % 7 + 1,
        0x07 => day,
        0x08 => month,
        0x09 => year % 100,
        CENTURY => year / 100,
        REGISTER_A => return DIVIDER_32_KHZ,
        REGISTER_B => return HOURS_24,
        REGISTER_D => return VALID,
        _ => return 0,
    };
    bcd(figure)
}

/// A figure below 100 in binary-coded decimal.
fn bcd(figure: u64) -> u8 {
    (figure / 10 % 10 * 16 + figure % 10).to_le_bytes()[0]
}

/// The Gregorian date of a day counted from 1 January 1970. Years are taken to begin in March, so that the leap day is
/// the last of its year.
fn date(days: u64) -> (u64, u64, u64) {
    const DAYS_TO_1970_FROM_MARCH_0000: u64 = 719_468;
    const DAYS_OF_400_YEARS: u64 = 146_097;
    let days = days + DAYS_TO_1970_FROM_MARCH_0000;
    let (cycle, day) = (days / DAYS_OF_400_YEARS, days % DAYS_OF_400_YEARS);
    // Take the leap days out: one every 4 years, none every 100, one at the very end.
    let year = (day - day / 1460 + day / 36524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    // From March on, months of 31, 30, 31, 30, 31 days repeat.
    let month = (5 * day + 2) / 153;
    let day_of_month = day - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (400 * cycle + year + carry, month, day_of_month)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, expected) in [
            (0, (1970, 1, 1)),
            (951_782_400, (2000, 2, 29)),
            (951_868_800, (2000, 3, 1)),
            (1_704_067_199, (2023, 12, 31)),
            (4_107_542_400, (2100, 3, 1)),
        ] {
            assert_eq!(date(seconds / 86400), expected, "{seconds}");
        }
    }

    #[test]
    fn registers_are_binary_coded_decimal() {
        // 2023-12-31 23:59:58, a Sunday.
        let registers = [0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, CENTURY, REGISTER_D];
        let read = registers.map(|index| register(index, 1_704_067_198));
        assert_eq!(read, [0x58, 0x59, 0x23, 0x01, 0x31, 0x12, 0x23, 0x20, VALID]);
    }

    #[test]
    fn the_index_port_selects() {
        let mut cmos = Cmos::default();
        let mut byte = [0xff];
        cmos.write(INDEX, &[0x80 | REGISTER_B]);
        cmos.read(INDEX + 1, &mut byte);
        assert_eq!(byte, [HOURS_24]);
    }
}

//! Devices on the port bus and what stands behind them on the host. None of them knows KVM or the architecture.

pub mod cmos;
pub mod console;
pub mod i8042;
pub mod ioapic;
pub mod output;
pub mod power;
pub mod pvpanic;
pub mod serial;
pub mod transcript;

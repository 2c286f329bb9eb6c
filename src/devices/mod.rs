//! Devices on the port bus and what stands behind them on the host. None of them knows KVM or the architecture.

pub mod console;

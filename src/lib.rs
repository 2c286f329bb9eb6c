//! bantam: a small KVM virtual machine monitor.

pub mod arch;
pub mod boot;
pub mod bus;
pub mod check;
pub mod config;
pub mod devices;
pub mod interrupt;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod metrics;
pub mod outcome;
pub mod signal;
pub mod terminal;
pub mod vcpu;
pub mod virtio;

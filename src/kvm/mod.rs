//! The only caller of KVM's ioctls.

mod gathered;
mod state;
mod vcpu;
mod vm;

/// The suberror of an internal error: an instruction that KVM does not emulate.
pub const INTERNAL_ERROR_EMULATION: u32 = kvm_bindings::KVM_INTERNAL_ERROR_EMULATION;

pub use gathered::Gathered;
pub use state::{Clock, Cpu, Extent, VcpuState, VmState};
pub use vcpu::{Access, Exit, Kicker, Vcpu};
pub use vm::{Error, IrqLine, Routes, Vm};

//! x86-64: where things are, and the tables that tell the guest.

pub mod cpuid;
pub mod layout;
pub mod regs;

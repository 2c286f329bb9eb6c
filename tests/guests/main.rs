//! Real kernels as guests: what they find in the machine, and that it works.

#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../support/namespace.rs"]
mod namespace;
#[path = "../support/mod.rs"]
mod support;

mod blk;
mod boot;
mod cpus;
mod drivers;
mod memory;
mod net;
mod share;
mod vsock;

//! Real kernels as guests: what they find in the machine, and that it works.

#[path = "../support/mod.rs"]
mod support;

mod boot;

//! Machines that are changed while they run.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

#[path = "../support/mod.rs"]
mod support;

mod devices;

//! The API of Firecracker: its clients, its endpoints before and after the start, and what a client may do wrong.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

#[path = "../support/mod.rs"]
mod support;

mod client;
mod disks;
mod endpoints;
mod fctools;
mod sockets;

//! Firecracker's REST API on a Unix socket, so that its clients drive bantam.
//!
//! Before the machine starts, requests fill in [`Settings`](crate::config::firecracker::Settings), which make its
//! [`Config`](crate::config::Config). Afterwards they go through its [`Handle`](crate::machine::Handle). One thread serves
//! all clients, and waits for none of them.

mod api;
mod http;
mod running;
mod server;
mod snapshot;

pub use api::{Api, Program, VERSION};
#[cfg(fuzzing)]
pub use http::Connection;
pub use http::{Request, Response};
pub use server::{Error, Served, Server, Stop};

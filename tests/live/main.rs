//! Machines that are changed while they run.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

#[path = "../support/mod.rs"]
mod support;

mod devices;
mod named;
mod told;

use std::io;
use std::thread;
use std::time::{Duration, Instant};

/// Waits for what cannot be waited for but by looking.
#[track_caller]
fn eventually(so: impl Fn() -> bool) {
    let begin = Instant::now();
    while !so() {
        assert!(begin.elapsed() < Duration::from_secs(120), "it never happened");
        thread::sleep(Duration::from_millis(10));
    }
}

/// What is in a pipe now.
struct Nonblocking<T>(T);

impl<T: io::Read> io::Read for Nonblocking<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.0.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            read => read,
        }
    }
}

//! What becomes of a guest's data when bantam is killed, and of bantam when its host fails it.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

#[allow(dead_code, reason = "of which not all is used here")]
#[path = "../api/client.rs"]
mod client;
mod faults;
mod journal;
mod kills;
mod running;
mod saves;
mod starts;
mod stop;
#[path = "../support/mod.rs"]
mod support;

use std::thread;
use std::time::{Duration, Instant};

/// Waits for what cannot be waited for but by looking.
#[track_caller]
fn eventually(so: impl Fn() -> bool) {
    let begin = Instant::now();
    while !so() {
        assert!(begin.elapsed() < Duration::from_secs(300), "it never happened");
        thread::sleep(Duration::from_millis(10));
    }
}

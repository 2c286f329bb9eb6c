//! How machines end, and how their console works: what a guest does, what a user does, exit status and words.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

#[path = "../support/mod.rs"]
mod support;

mod console;
mod embedded;
mod guest;
mod jail;
mod killed;
mod sandbox;
mod stuck;
mod terminal;

use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use support::Guest;

/// Waits for what cannot be waited for but by looking.
#[track_caller]
fn eventually(so: impl Fn() -> bool) {
    let begin = Instant::now();
    while !so() {
        assert!(begin.elapsed() < Duration::from_secs(300), "it never happened");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Has `program` with these arguments start bantam, whose command it is given after them. What it prints is taken as
/// before, and it has no input.
fn started_by(mut guest: Guest, program: &str, arguments: &[&str]) -> Guest {
    let bantam = guest.command();
    let mut command = Command::new(program);
    command.args(arguments).arg(bantam.get_program()).args(bantam.get_args());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    *bantam = command;
    guest
}

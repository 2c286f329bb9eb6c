//! The command's standard streams.

use std::io::{Read, Write};
use std::process::Stdio;
use std::thread;

use crate::support::{noise, sha256};
use crate::{shell, tiny};

/// Enough to fill every buffer on the way several times.
const LARGE: usize = 4 << 20;

#[test]
fn output_and_errors_are_separate() {
    let ended = shell("echo out; echo err >&2; echo by name >/dev/stdout").run();
    assert_eq!((ended.status, &*ended.stdout, &*ended.stderr), (0, "out\nby name\n", "err\n"));
}

#[test]
fn every_byte_goes_both_ways() {
    let bytes = noise(LARGE);
    let mut running = shell("tee /tmp/in | sha256sum >&2; cat /tmp/in").spawn();
    let mut stdin = running.stdin().take().unwrap();
    let hash = sha256(&bytes);
    let writer = thread::spawn(move || stdin.write_all(&bytes).unwrap());
    let ended = running.wait();
    writer.join().unwrap();
    ended.require(ended.status == 0 && ended.stderr.starts_with(&hash), "standard input differs");
    assert_eq!(sha256(&ended.stdout_bytes), hash);
}

#[test]
fn what_it_does_not_read_is_left_alone() {
    let mut running = shell("head -c 3; exec 0<&-; echo; echo more").spawn();
    running.write("abcdef");
    // Standard input stays open.
    let ended = running.wait();
    assert_eq!((ended.status, &*ended.stdout), (0, "abc\nmore\n"));
}

#[test]
fn a_reader_that_goes_away_ends_the_writer() {
    let mut guest = tiny(&["yes"]);
    let (mut out, theirs) = std::io::pipe().unwrap();
    guest.command().stdout(Stdio::from(theirs));
    let running = guest.start();
    out.read_exact(&mut [0; 1000]).unwrap();
    drop(out);
    let ended = running.wait();
    // SIGPIPE.
    ended.require(ended.status == 128 + 13, "expected status 141");
}

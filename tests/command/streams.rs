//! The command's standard streams.

use std::fs;
use std::io::{Read, Write};
use std::process::Stdio;
use std::thread;

use crate::support::{Running, noise, sha256};
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

/// The most memory that the process had so far, in bytes.
fn peak_memory(running: &Running) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", running.pid().as_raw_pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// Sends `blocks` of a MiB, each other than the one before, through a guest that hashes and returns them.
fn pass_through(blocks: usize) {
    const MEMORY: u64 = 64 << 20;
    let block = noise(1 << 20);
    let mut guest = shell("mkfifo /hashed; sha256sum </hashed >&2 & tee /hashed; wait $!").memory("64M");
    guest = guest.limit(std::time::Duration::from_secs(1500));
    let (mut out, theirs) = std::io::pipe().unwrap();
    guest.command().stdout(Stdio::from(theirs));
    let mut running = guest.spawn();
    let mut stdin = running.stdin().take().unwrap();
    let numbered = |block: &[u8], number: usize| [&number.to_le_bytes(), &block[8..]].concat();
    let sent = block.clone();
    let writer = thread::spawn(move || {
        (0..blocks).for_each(|number| stdin.write_all(&numbered(&sent, number)).unwrap());
        stdin
    });
    let mut hash =
        std::process::Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut to_hash = hash.stdin.take().unwrap();
    let mut returned = vec![0; block.len()];
    for number in 0..blocks {
        out.read_exact(&mut returned).unwrap();
        assert!(returned == numbered(&block, number), "block {number} differs");
        to_hash.write_all(&returned).unwrap();
    }
    drop(to_hash);
    let peak = peak_memory(&running);
    drop(writer.join().unwrap());
    assert_eq!(out.read(&mut returned).unwrap(), 0);
    let ended = running.wait();
    let hash = String::from_utf8(hash.wait_with_output().unwrap().stdout).unwrap();
    ended.require(ended.status == 0 && ended.stderr.starts_with(&hash[..64]), "the guest's hash differs");
    println!("{blocks} MiB each way; the most memory: {} MiB, of the guest's {} and our own", peak >> 20, MEMORY >> 20);
    assert!(peak < MEMORY + (24 << 20), "{peak} bytes of memory");
}

#[test]
fn what_is_carried_takes_no_memory() {
    pass_through(64);
}

#[test]
#[ignore = "takes minutes in an emulated host"]
fn a_gibibyte_is_carried_each_way() {
    pass_through(1 << 10);
}

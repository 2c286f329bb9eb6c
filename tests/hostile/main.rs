//! A guest that does to every device what no driver would (resources/guest/hostile.c): bantam survives it, within its memory,
//! and the devices work afterwards.

#![allow(clippy::unwrap_used, reason = "tests")]

mod linux;
#[path = "../support/namespace.rs"]
#[expect(dead_code, reason = "no test here has both ends of a network")]
mod namespace;
#[path = "../support/mod.rs"]
mod support;

use std::fs;
use std::os::unix::net::UnixListener;

use namespace::Namespace;
use support::{Guest, file, noise};

/// The guest's memory, as hostile.c has it, and what bantam may have beside that, in KiB: a debug build's own pages among it.
const GUEST_KIB: u64 = 64 << 10;
const OWN_KIB: u64 = 32 << 10;

/// Runs one with all devices, a disk with this engine among them.
fn survives(seed: u64, rounds: u32, engine: &str) {
    let network = Namespace::new();
    network.ip(&["tuntap", "add", "dev", "tap0", "mode", "tap", "multi_queue"]);
    network.ip(&["link", "set", "tap0", "up"]);
    let guest = Guest::running(file("tools/hostile"), &[]);
    let path = |name: &str| guest.folder().join(name);
    let disk = noise(2 << 20);
    for name in ["disk.img", "kept.img", "other.img"] {
        fs::write(path(name), &disk).unwrap();
    }
    fs::create_dir_all(path("share/folder")).unwrap();
    fs::write(path("share/file"), "shared").unwrap();
    fs::write(path("beside"), "not shared").unwrap();
    let _listener = UnixListener::bind(path("vsock_1024")).unwrap();
    let (first, kept) = (path("disk.img"), path("kept.img"));
    let (share, vsock) = (path("share"), path("vsock"));

    let mut running = guest
        .memory("64M")
        .disk(format!("path={},engine={engine},queues=4", first.display()))
        .disk(format!("path={},readonly=on", kept.display()))
        .net("tap=tap0,queues=2")
        .option("--share", format!("{}:/mnt", share.display()))
        .option("--vsock", format!("cid=3,socket={}", vsock.display()))
        .option("--balloon", "stats=1s,free-page-reporting=on")
        .cmdline(&format!("seed={seed} rounds={rounds}"))
        .inside(network.name())
        .spawn();
    running.wait_for(&format!("survived seed {seed}\r\n"));
    let folder = running.folder().to_owned();
    let status = fs::read_to_string(format!("/proc/{}/status", running.pid().as_raw_nonzero())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak < GUEST_KIB + OWN_KIB, "{peak} KiB");
    for name in ["kept.img", "other.img"] {
        assert!(fs::read(folder.join(name)).unwrap() == disk, "{name} is another");
    }
    assert_eq!(fs::read_to_string(folder.join("beside")).unwrap(), "not shared");
    running.write("x");
    let ended = running.wait();
    ended.require(ended.status == 0 && ended.report["outcome"] == "rebooted", "expected a reboot");
    // Not everything was refused.
    for (device, counter) in [
        ("blk0", "reads"),
        ("blk0", "writes"),
        ("blk1", "errors"),
        ("share0", "requests"),
        ("vsock", "tx-packets"),
        ("rng", "requests"),
        ("net0", "tx-packets"),
        ("balloon", "inflated"),
    ] {
        assert!(ended.counted(device, counter) > 0, "no {device} {counter}");
    }
    // What it may have the host's log say is bounded.
    assert!(ended.stderr.len() < 64 << 10, "{} bytes of log", ended.stderr.len());
}

#[test]
fn devices_survive_a_guest_that_keeps_no_rule() {
    survives(1, 12, "sync");
}

#[test]
fn devices_survive_another() {
    survives(2, 12, "io_uring");
}

//! A host that takes away from a machine that runs what it had: its tap, and memory for more than it has.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, Signal, prlimit};
use tempfile::TempDir;

use crate::support::{Guest, Kernel, Running};

/// How much of a CPU the thread of this name takes within two seconds, in hundredths of a second; nothing if it has ended.
fn cpu_time(running: &Running, name: &str) -> u64 {
    let tasks = || fs::read_dir(format!("/proc/{}/task", running.pid().as_raw_pid())).unwrap();
    let ticks = || {
        let stats = tasks().filter_map(|task| fs::read_to_string(task.unwrap().path().join("stat")).ok());
        let own = stats.filter(|stat| stat.contains(&format!("({name})")));
        // utime and stime are the 14th and the 15th field (proc_pid_stat(5)), counted behind the name.
        let times = own.flat_map(|stat| {
            let fields = stat.rsplit_once(") ").map(|(_, rest)| rest.to_owned()).unwrap_or_default();
            fields.split(' ').skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).collect::<Vec<_>>()
        });
        times.sum::<u64>()
    };
    let before = ticks();
    thread::sleep(Duration::from_secs(2));
    ticks().saturating_sub(before)
}

#[test]
fn a_guest_lives_without_the_tap_that_is_removed() {
    let tap = "bantamgone0";
    let ip = |words: &str| Command::new("ip").args(words.split(' ')).status().unwrap().success();
    let script = "ip link set eth0 up; ip addr add 10.9.0.2/24 dev eth0; echo ready; read line
                  for i in 1 2 3; do ping -c 1 -W 1 10.9.0.1 || true; done; echo pings=done; read line; echo lives=$((40 + 2))";
    let mut running = Guest::new(Kernel::Tiny).net(format!("tap={tap}")).script(script).spawn();
    running.wait_for("ready");
    assert!(ip(&format!("link set {tap} up")));
    assert!(ip(&format!("link del {tap}")));
    running.write("go\n");
    running.wait_for("pings=done");
    let busy = cpu_time(&running, "bantam-net0");
    assert!(busy < 40, "the card's thread took {busy} hundredths of 2 seconds");
    running.write("go\n");
    let ended = running.wait().succeeded();
    assert_eq!(ended.number("lives"), 42);
    ended.require(ended.stderr.matches("cannot read from").count() == 1, "expected the reason once");
}

#[test]
fn memory_that_runs_out_later_is_survived_or_said() {
    let folder = TempDir::new().unwrap();
    let script = "echo ready; read line; dd if=/dev/zero of=/dev/vda bs=64k count=16 conv=fsync; echo done";
    let disk = folder.path().join("disk");
    fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let guest = || {
        let mut guest = Guest::new(Kernel::Tiny).disk(disk.display()).script(script).option("--name", "little");
        guest.command().env("XDG_RUNTIME_DIR", folder.path());
        let running = guest.spawn();
        running.wait_for("ready");
        let status = fs::read_to_string(format!("/proc/{}/status", running.pid().as_raw_pid())).unwrap();
        let size = status.lines().find_map(|line| line.strip_prefix("VmSize:")?.trim().strip_suffix(" kB")).unwrap();
        let size = Some(size.parse::<u64>().unwrap() << 10);
        // Not a page more.
        prlimit(Some(running.pid()), Resource::As, Rlimit { current: size, maximum: size }).unwrap();
        running
    };
    let mut running = guest();
    // Takes a thread, a process, or both: refused, or not.
    for words in
        [&["metrics", "little"][..], &["snapshot", "little", "saved"], &["pause", "little"], &["resume", "little"]]
    {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bantam"));
        let output = command.args(words).env("XDG_RUNTIME_DIR", folder.path()).current_dir(folder.path()).output();
        let status = output.unwrap().status.code();
        assert!(matches!(status, Some(0 | 125)), "{words:?}: {status:?}");
    }
    running.write("go\n");
    let ended = running.wait().succeeded();
    ended.require(!ended.stderr.contains("internal error"), "expected no panic");

    let running = guest();
    running.signal(Signal::TERM);
    let ended = running.wait();
    ended.require(ended.status == 128 + 15, "expected the end by the signal");
}

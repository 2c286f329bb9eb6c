//! Many runs: all statuses, and nothing that is left behind.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;

use tempfile::TempDir;

use crate::roots::tree;
use crate::shell;
use crate::support::{Guest, Kernel};

/// Each of `statuses` is what a command exits with, and what bantam exits with.
fn pass_on(statuses: impl IntoIterator<Item = i32>) {
    for status in statuses {
        let ended = shell(&format!("exit {status}")).run();
        ended.require(ended.status == status, &format!("expected status {status}"));
        assert_eq!((&ended.report["outcome"], &ended.report["status"]), (&"exited".into(), &status.into()));
    }
}

/// Each of `signals` kills a command, and is told.
fn pass_on_signals(signals: impl IntoIterator<Item = i32>) {
    for signal in signals {
        let ended = shell(&format!("kill -{signal} $$; sleep 1000")).run();
        ended.require(ended.status == 128 + signal, &format!("expected signal {signal}"));
        assert_eq!((&ended.report["outcome"], &ended.report["signal"]), (&"killed".into(), &signal.into()));
    }
}

/// Those that end a process by default: not CHLD, CONT, STOP, TSTP, TTIN, TTOU, URG and WINCH; nor QUIT, which busybox'
/// shell ignores, and `status` has.
fn deadly() -> impl Iterator<Item = i32> {
    (1..=64).filter(|signal| !(17..=23).contains(signal) && ![3, 28].contains(signal))
}

#[test]
fn some_statuses_and_signals_are_passed_on() {
    pass_on([1, 125, 128, 137]);
    pass_on_signals([11, 34, 64]);
}

#[test]
#[ignore = "starts 256 guests"]
fn every_status_is_passed_on() {
    pass_on(0..=255);
}

#[test]
#[ignore = "starts 55 guests"]
fn every_signal_is_passed_on() {
    assert_eq!(deadly().count(), 55);
    pass_on_signals(deadly());
}

/// What there is of the things that a run may leave.
#[derive(Debug, PartialEq, Eq)]
struct Left {
    processes: usize,
    files: BTreeSet<String>,
}

impl Left {
    fn of(folder: &Path) -> Self {
        let below = Command::new("find").arg(folder).output().unwrap().stdout;
        Self {
            processes: fs::read_dir("/proc").unwrap().filter(|entry| is_of(entry.as_ref().unwrap(), folder)).count(),
            files: String::from_utf8(below).unwrap().lines().map(String::from).collect(),
        }
    }
}

/// Whether it is a process whose environment names the folder.
fn is_of(process: &fs::DirEntry, folder: &Path) -> bool {
    let environment = fs::read(process.path().join("environ")).unwrap_or_default();
    let folder = folder.as_os_str().as_encoded_bytes();
    environment.windows(folder.len()).any(|part| part == folder)
}

/// KiB of memory in use after the machines at once, and after all.
type Used = (u64, u64);

/// KiB of memory that is nobody's file: what processes have, shared memory and the kernel's own.
fn used_memory() -> u64 {
    let info = fs::read_to_string("/proc/meminfo").unwrap();
    let value = |name: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    ["AnonPages", "Shmem", "SUnreclaim", "KernelStack", "PageTables"].into_iter().map(value).sum()
}

/// Runs `at_once` machines, and then `one_by_one` after one another, all on one directory that is in no cache before.
fn run_many(one_by_one: i32, at_once: i32) -> Used {
    let (tree, folder) = (tree(), TempDir::new().unwrap());
    let run = |number: i32| {
        let script = format!("cat /data/file; exit {number}");
        let mut guest = Guest::running(Kernel::Tiny.bzimage(), &["sh", "-c", &script]).root(tree.path()).memory("64M");
        guest.command().env("XDG_CACHE_HOME", folder.path());
        let ended = guest.run();
        ended.require(ended.status == number && ended.stdout == "from the image\n", "it runs");
    };
    // At once first: they have to agree on who makes the image.
    thread::scope(|scope| (0..at_once).for_each(|number| drop(scope.spawn(move || run(number)))));
    let (before, used_before) = (Left::of(folder.path()), used_memory());
    for number in 0..one_by_one {
        run(number);
    }
    let (after, used) = (Left::of(folder.path()), used_memory());
    assert_eq!(after, before);
    assert_eq!(after.processes, 0);
    // No lock is held: all goes.
    let mut prune = Command::new(env!("CARGO_BIN_EXE_bantam"));
    let pruned = prune.args(["image", "prune"]).env("XDG_CACHE_HOME", folder.path()).output().unwrap();
    assert!(pruned.status.success(), "{pruned:?}");
    let images = fs::read_dir(folder.path().join("bantam/images")).unwrap();
    let left: Vec<_> = images.map(|entry| entry.unwrap().file_name()).filter(|name| name != "names").collect();
    assert!(left.is_empty(), "{left:?}");
    (used_before, used)
}

#[test]
fn machines_after_one_another_and_at_once_leave_nothing() {
    run_many(12, 16);
}

#[test]
#[ignore = "starts 216 guests"]
fn two_hundred_machines_leave_nothing() {
    let (before, after) = run_many(200, 16);
    println!("{before} KiB of memory in use before 200 machines, {after} KiB after");
    assert!(after < before + (32 << 10));
}

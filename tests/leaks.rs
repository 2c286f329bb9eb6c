//! Nothing is left of what has been over and over: machines that were started and stopped, paused and resumed, devices
//! that were reset.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bantam::config::{Config, Share, Size};
use bantam::devices::console::Console;
use bantam::machine::{Builder, Machine};
use bantam::outcome::Outcome;
use bantam::virtio::{balloon, blk, vsock};
use support::screen::Screen;
use support::{Guest, Kernel, payload};
use tempfile::TempDir;

/// A machine that still runs then hangs.
const LIMIT: Duration = Duration::from_secs(120);
/// A guest's memory, in KiB, which is one mapping.
const GUEST_KIB: u64 = 64 << 10;
/// How much more memory may be in use, in KiB: the heap's holes.
const MORE_KIB: u64 = 1024;
/// Rounds before what this process has is looked at: what is made once is there.
const FIRST: u32 = 10;

/// Tests look at what the whole process has, one at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What this process has.
#[derive(Debug)]
struct Owned {
    /// Open files, by what they are: how many.
    descriptors: BTreeMap<String, usize>,
    threads: usize,
    mappings: usize,
}

impl Owned {
    fn now() -> Self {
        let mut descriptors = BTreeMap::new();
        for link in fs::read_dir("/proc/self/fd").unwrap().filter_map(|fd| fs::read_link(fd.unwrap().path()).ok()) {
            // Pipes and sockets have numbers.
            let kind = link.display().to_string().split_once(":[").map_or(link.display().to_string(), |it| it.0.into());
            *descriptors.entry(kind).or_default() += 1;
        }
        let threads = fs::read_dir("/proc/self/task").unwrap().count();
        let mappings = fs::read_to_string("/proc/self/maps").unwrap();
        // Stacks of threads that are no more are kept for those that come, and arenas grow.
        let mappings = mappings.lines().filter(|line| line.contains("/dev/kvm") || line.contains("anon_inode")).count();
        Owned { descriptors, threads, mappings }
    }

    /// Whether there is nothing that was not there `before`, when threads may have been about to end.
    fn is_no_more_than(&self, before: &Self) -> bool {
        let had = |(name, count): (&String, &usize)| before.descriptors.get(name).is_some_and(|had| count <= had);
        self.descriptors.iter().all(had) && self.threads <= before.threads && self.mappings <= before.mappings
    }
}

/// This process' resident memory, in KiB, without the guest's, which uses more and more of it for the first time.
fn resident() -> u64 {
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut is_own, mut resident) = (true, 0);
    for line in smaps.lines() {
        let value = |name: &str| line.strip_prefix(name)?.trim().trim_end_matches(" kB").parse::<u64>().ok();
        if let Some(size) = value("Size:") {
            is_own = size < GUEST_KIB;
        }
        resident += value("Anonymous:").filter(|_| is_own).unwrap_or(0);
    }
    resident
}

fn files(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Does it so many times, and checks that this process has nothing more afterwards.
fn over_and_over(what: &str, count: u32, folder: &Path, mut round: impl FnMut()) {
    (0..FIRST).for_each(|_| round());
    let (before, files_before, memory) = (Owned::now(), files(folder), resident());
    let begin = Instant::now();
    (0..count).for_each(|_| round());
    let took = begin.elapsed();
    // A thread that was joined may still be in the kernel's list.
    let settled = Instant::now() + LIMIT;
    while !Owned::now().is_no_more_than(&before) && Instant::now() < settled {
        thread::sleep(Duration::from_millis(10));
    }
    let after = Owned::now();
    assert!(after.is_no_more_than(&before), "{before:?} before, {after:?} after");
    assert_eq!(files(folder), files_before);
    let more = resident().saturating_sub(memory);
    eprintln!("{what}: {count} in {took:.1?}; {more} KiB more");
    assert!(more < MORE_KIB, "{what}: {more} KiB more after {count}");
}

struct Lab {
    folder: TempDir,
    config: Config,
}

impl Lab {
    /// A machine with a device of each kind that needs no privilege.
    fn new(code: &[u8]) -> Self {
        let folder = TempDir::new().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("kernel"), payload::elf(code)).unwrap();
        fs::write(path("disk"), [0; 4096]).unwrap();
        fs::create_dir(path("share")).unwrap();
        let config = Config::new().kernel(path("kernel")).memory(Size::bytes(GUEST_KIB << 10)).cpus(2).timeout(LIMIT);
        let config = config.disk(blk::Spec::new(path("disk"))).balloon(balloon::Spec::default());
        let config = config.vsock(vsock::Spec { cid: 3, socket: path("vsock") });
        let config = config.share(Share { path: path("share"), guest: "/mnt".into(), readonly: false });
        Lab { folder, config }
    }

    fn build(&self) -> Machine {
        Builder::new(self.config.clone()).console(Console::to(std::io::sink())).build().unwrap()
    }
}

fn starts(count: u32) {
    let _alone = alone();
    let lab = Lab::new(payload::REBOOT);
    over_and_over("starts and stops", count, lab.folder.path(), || {
        assert_eq!(lab.build().run().unwrap(), Outcome::Rebooted);
    });
}

fn pauses(count: u32) {
    let _alone = alone();
    let lab = Lab::new(payload::HANG);
    let mut machine = Builder::new(lab.config.clone().timeout(Duration::from_secs(3600)));
    machine = machine.console(Console::to(std::io::sink()));
    let mut machine = machine.build().unwrap();
    let handle = machine.handle();
    let running = thread::spawn(move || machine.run());
    over_and_over("pauses", count, lab.folder.path(), || {
        handle.pause().unwrap();
        handle.resume().unwrap();
    });
    handle.stop();
    assert_eq!(running.join().unwrap().unwrap(), Outcome::Stopped);
}

fn resets(count: u32) {
    let _alone = alone();
    // Each line that is typed has each device's driver unbound and bound again.
    let script = "
        echo ready
        while read line; do
            for device in /sys/bus/virtio/drivers/*/virtio*; do
                driver=${device%/*}
                echo ${device##*/} >$driver/unbind
                echo ${device##*/} >$driver/bind
            done
            echo typed=$line. devices=$(ls -d /sys/bus/virtio/drivers/*/virtio* | wc -l).
        done
    ";
    let guest = Guest::new(Kernel::Tiny).script(script);
    let mut lab = Lab::new(payload::HANG);
    lab.config = lab.config.kernel(Kernel::Tiny.vmlinux()).initrd(guest.folder().join("initramfs.cpio"));
    lab.config = lab.config.cmdline("quiet").memory(Size::mib(96)).cpus(1).timeout(Duration::from_secs(3600));
    let screen = Screen::default();
    let mut machine = Builder::new(lab.config.clone()).console(Console::to(screen.clone())).build().unwrap();
    let handle = machine.handle();
    let running = thread::spawn(move || machine.run());
    screen.wait_for("ready");
    let mut number = 0;
    over_and_over("resets of each device", count, lab.folder.path(), || {
        number += 1;
        handle.input(format!("{number}\n"));
        screen.wait_for(&format!("typed={number}. devices=4."));
    });
    handle.stop();
    assert_eq!(running.join().unwrap().unwrap(), Outcome::Stopped);
}

#[test]
fn nothing_is_left_of_machines() {
    starts(50);
}

#[test]
fn nothing_is_left_of_pauses() {
    pauses(100);
}

#[test]
fn nothing_is_left_of_resets() {
    resets(20);
}

#[test]
#[ignore = "takes minutes in an emulated host"]
fn nothing_is_left_of_a_thousand_machines() {
    starts(1000);
}

#[test]
#[ignore = "takes minutes in an emulated host"]
fn nothing_is_left_of_a_thousand_pauses() {
    pauses(1000);
}

#[test]
#[ignore = "takes minutes in an emulated host"]
fn nothing_is_left_of_a_thousand_resets() {
    resets(1000);
}

//! Machines that are saved, ended and restored.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod changed;
#[allow(dead_code, reason = "of which not all is used here")]
#[path = "../api/client.rs"]
mod client;
mod golden;
mod hostile;
mod lives;
#[path = "../support/namespace.rs"]
mod namespace;
mod refused;
#[path = "../support/mod.rs"]
mod support;

mod running;
mod uffd;

use std::error::Error;
use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bantam::config::{Config, Size};
use bantam::devices::console::Console;
use bantam::machine::{self, Builder, Destination, Handle, Machine, Snapshot};
use bantam::outcome::Outcome;
use bantam::snapshot;
use bantam::virtio::{blk, net};
use client::Api;
use namespace::Namespace;
use support::screen::Screen;
use support::{Guest, Kernel};
use tempfile::TempDir;

/// Counts without end, and writes each count to a disk that it has open. It keeps noise in memory, and tells its hash now
/// and then. What is typed is repeated.
const COUNTER: &str = r#"
dd if=/dev/urandom of=/noise bs=64k count=64 2>/dev/null
echo "noise=$(sha256sum </noise) end"
exec 8<&0
(while read line; do sync; echo "typed=$line end"; done) <&8 &
exec 9>/dev/vda
i=0
while :; do
    i=$((i + 1))
    printf '%08d' $i >&9
    echo "count=$i end"
    if [ $((i % 10)) = 0 ]; then echo "noise=$(sha256sum </noise) end"; fi
done
"#;

/// A machine that runs in this process.
struct Running {
    handle: Handle,
    thread: JoinHandle<Result<Outcome, machine::Error>>,
    screen: Screen,
}

impl Running {
    fn start(builder: Builder) -> Self {
        let screen = Screen::default();
        let mut machine: Machine = builder.console(Console::to(screen.clone())).build().unwrap();
        Running { handle: machine.handle(), thread: thread::spawn(move || machine.run()), screen }
    }

    fn restore(folder: &Path) -> Self {
        Self::start(Builder::restore(Snapshot::open(folder).unwrap()))
    }

    /// Ends it; what it had printed.
    fn stop(self) -> String {
        self.handle.stop();
        assert_eq!(self.thread.join().unwrap().unwrap(), Outcome::Stopped);
        self.screen.text()
    }
}

/// What was printed whole as `name=VALUE ... end`. The terminal repeats what is typed, which may come between that and the end
/// of its line.
fn values<'a>(text: &'a str, name: &str) -> Vec<&'a str> {
    let lines = text.lines().filter_map(|line| line.split_once(" end"));
    lines.filter_map(|(line, _)| line.split_once(name)?.1.strip_prefix('=')).collect()
}

/// The counts that were printed.
fn counts(text: &str) -> Vec<u64> {
    values(text, "count").iter().map(|count| count.parse().unwrap()).collect()
}

struct Lab {
    folder: TempDir,
    config: Config,
    _guest: Guest,
}

impl Lab {
    fn new(kernel: Kernel, script: &str) -> Self {
        Self::with(kernel, Guest::new(kernel).script(script))
    }

    fn with(kernel: Kernel, guest: Guest) -> Self {
        let folder = TempDir::new().unwrap();
        let initrd = guest.folder().join("initramfs.cpio");
        let config = Config::new().kernel(kernel.vmlinux()).initrd(initrd).cmdline("quiet").memory(Size::mib(128));
        Lab { folder, config, _guest: guest }
    }

    fn disk(&self, name: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::File::create(&path).unwrap().set_len(16 << 20).unwrap();
        path
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// What a guest says about itself when it is asked.
const ASK: &str = "echo fork=$(dmesg | grep -c 'virtual machine fork') now=$(date +%s) \
                   random=$(head -c 16 /dev/urandom | md5sum | cut -c -32) end\n";

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// The fields of the answer to [`ASK`] that was printed last.
fn answer(text: &str) -> Option<(u64, u64, String)> {
    let line = text.lines().rev().find(|line| line.starts_with("fork=") && line.trim().ends_with(" end"))?;
    let mut values = line.split(' ').filter_map(|word| Some(word.split_once('=')?.1));
    Some((values.next()?.parse().ok()?, values.next()?.parse().ok()?, values.next()?.to_owned()))
}

/// Binds the network card's driver anew, which then sees the address that the card has now.
const REBIND: &str = "cd /sys/bus/virtio/drivers/virtio_net; echo virtio1 >unbind; echo virtio1 >bind; cd /; \
                      echo mac=$(cat /sys/bus/virtio/devices/virtio1/net/*/address) end\n";

/// How much of the mappings of a file is in memory, and how much of that is shared with others, in KiB.
fn resident(file: &Path) -> (u64, u64) {
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut is_it, mut resident, mut shared) = (false, 0, 0);
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (first, second) = (words.next().unwrap(), words.next().unwrap_or_default());
        match first {
            "Rss:" if is_it => resident += second.parse::<u64>().unwrap(),
            "Shared_Clean:" | "Shared_Dirty:" if is_it => shared += second.parse::<u64>().unwrap(),
            // A mapping begins with its addresses.
            _ if !first.ends_with(':') => is_it = line.ends_with(file.to_str().unwrap()),
            _ => {}
        }
    }
    (resident, shared)
}

/// Clones of one snapshot run at once, on disks and network cards of their own.
fn clones(count: usize) {
    let network = Namespace::new();
    network.inside(|| clones_inside(count));
}

fn clones_inside(count: usize) {
    let mut lab = Lab::new(Kernel::Debian612, "cat /dev/vda | head -c 4; echo ready; sh");
    let disk = lab.disk("disk");
    fs::OpenOptions::new().write(true).open(&disk).unwrap().write_all(b"old\n").unwrap();
    lab.config = lab.config.memory(Size::mib(256)).disk(blk::Spec { id: Some("data".into()), ..blk::Spec::new(&disk) });
    lab.config = lab.config.net(net::Spec { tap: Some("tap0".into()), ..Default::default() });
    let saved = lab.path("saved");
    let machine = Running::start(Builder::new(lab.config.clone()));
    machine.screen.wait_for("ready");
    machine.handle.input(ASK);
    let first = machine.screen.wait_until(|seen| answer(seen).is_some());
    let first = answer(&first).unwrap();
    assert_eq!(first.0, 0);
    // An emulated host's clocks are not right to the second.
    let behind = now().saturating_sub(first.1);
    machine.handle.snapshot(Destination::Folder(saved.clone())).unwrap();
    machine.stop();
    // The guest's clock is seen to have stood still only if it would have gone on.
    thread::sleep(Duration::from_secs(4));

    let disks: Vec<_> = (0..count).map(|clone| lab.disk(&format!("disk{clone}"))).collect();
    let mac = |clone: usize| format!("02:00:00:00:01:{clone:02x}");
    let start = |(clone, disk): (usize, &PathBuf)| {
        let mut snapshot = Snapshot::open(&saved).unwrap();
        snapshot.config.disks[0].path = disk.clone();
        let (tap, mac) = (Some(format!("clone{clone}")), Some(mac(clone).parse().unwrap()));
        snapshot.config.nets[0] = net::Spec { tap, mac, ..Default::default() };
        Running::start(Builder::restore(snapshot))
    };
    let machines: Vec<_> = disks.iter().enumerate().map(start).collect();
    let mut randoms = vec![first.2];
    for (clone, machine) in machines.iter().enumerate() {
        let asked = now();
        machine.handle.input(format!("echo clone{clone} | dd of=/dev/vda conv=fsync 2>/dev/null\n{ASK}"));
        let seen = machine.screen.wait_until(|seen| answer(seen).is_some());
        let (fork, time, random) = answer(&seen).unwrap();
        assert_eq!(fork, 1, "the guest knows that it was restored: {seen}");
        assert!((asked - 2..=now() + 2).contains(&(time + behind)), "{asked} {time} {behind} {}", now());
        randoms.push(random);
        machine.handle.input(REBIND);
        machine.screen.wait_for(&format!("mac={} end", mac(clone)));
    }
    // What none of them has written is in memory once.
    let (resident, shared) = resident(&saved.join("memory"));
    eprintln!("{count} clones have {resident} KiB of memory, {shared} KiB of which are shared");
    assert!(shared > 1024 * count as u64, "{shared} of {resident} KiB are shared");
    machines.into_iter().for_each(|machine| drop(machine.stop()));
    for (clone, disk) in disks.iter().enumerate() {
        assert!(fs::read(disk).unwrap().starts_with(format!("clone{clone}\n").as_bytes()));
    }
    assert!(fs::read(&disk).unwrap().starts_with(b"old\n"));
    randoms.sort();
    randoms.dedup();
    assert_eq!(randoms.len(), count + 1, "no two have the same random numbers: {randoms:?}");

    the_command_restores(&saved, &disks[0]);
    what_does_not_fit_is_refused(&saved, &disks[0]);
}

fn the_command_restores(saved: &Path, disk: &Path) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bantam"));
    command.arg("restore").arg(saved).arg("--disk").arg(format!("data={}", disk.display()));
    command.args(["--timeout", "100s", "--report", "-", "--prefault"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.as_mut().unwrap().write_all(b"echo sum=$((40 + 2)); poweroff -f\n").unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.contains("sum=42") && text.contains("\"first-kvm-run\""), "{text}");
}

fn what_does_not_fit_is_refused(saved: &Path, disk: &Path) {
    let build = |change: &dyn Fn(&mut Config)| {
        let mut snapshot = Snapshot::open(saved)?;
        snapshot.config.disks[0].path = disk.into();
        change(&mut snapshot.config);
        Builder::restore(snapshot).console(Console::to(std::io::sink())).build().map(drop)
    };
    build(&|_| ()).unwrap();
    let refused = |change: &dyn Fn(&mut Config), why: &str| {
        let error = build(change).unwrap_err();
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(source) = cause {
            text += &format!(": {source}");
            cause = source.source();
        }
        assert!(text.contains(why), "{text}");
    };
    refused(&|config| config.cpus = 2, "it has 1 vCPUs, and the machine is to have 2");
    refused(&|config| config.memory = Size::mib(128), "bytes of memory");
    refused(&|config| config.rng = false, "this machine has none there");
    refused(&|config| config.disks[0].readonly = true, "its driver uses features that it does not have here");

    // Another CPU, all of it with a right checksum.
    let path = saved.join("state");
    let whole = fs::read(&path).unwrap();
    let mut state: serde_json::Value = snapshot::decode(&whole).unwrap();
    state["cpu"]["name"] = "Another CPU".into();
    fs::write(&path, snapshot::encode(&state).unwrap()).unwrap();
    refused(&|_| (), "they ran on Another CPU, and this host has ");
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    assert!(matches!(Snapshot::open(saved), Err(machine::snapshot::Error::State { .. })));
    fs::write(&path, &whole).unwrap();
    let memory = fs::OpenOptions::new().write(true).open(saved.join("memory")).unwrap();
    memory.set_len(4096).unwrap();
    assert!(matches!(Snapshot::open(saved), Err(machine::snapshot::Error::MemoryLength { found: 4096, .. })));
}

#[test]
fn what_changed_is_saved_on_top_of_what_was_saved_before() {
    let lab = Lab::new(Kernel::Tiny, COUNTER.replace("exec 9>/dev/vda", "exec 9>/count").as_str());
    let folders: Vec<_> = (0..3).map(|layer| lab.path(&format!("layer{layer}"))).collect();
    let machine = Running::start(Builder::new(lab.config.clone()));
    machine.screen.wait_until(|seen| !counts(seen).is_empty());
    machine.handle.pause().unwrap();
    // There is nothing yet that it could be other than.
    assert!(machine.handle.snapshot(Destination::Diff(folders[0].clone())).is_err());
    machine.handle.snapshot(Destination::Folder(folders[0].clone())).unwrap();
    let mut printed = machine.stop();
    for layer in 1..3 {
        let machine = Running::restore(&folders[layer - 1]);
        machine.screen.wait_until(|seen| counts(seen).len() > 12);
        machine.handle.pause().unwrap();
        assert!(machine.handle.snapshot(Destination::Diff(folders[0].clone())).is_err(), "it would replace its base");
        assert!(machine.handle.snapshot(Destination::Diff(folders[0].join("inside"))).is_err());
        machine.handle.snapshot(Destination::Diff(folders[layer].clone())).unwrap();
        if layer == 2 {
            assert!(machine.handle.snapshot(Destination::Folder(folders[0].clone())).is_err(), "its own stands on it");
        }
        printed += &machine.stop();
        let size = |folder: &Path| fs::metadata(folder.join("memory")).unwrap().blocks();
        assert!(size(&folders[layer]) < size(&folders[0]), "{} blocks", size(&folders[layer]));
    }
    let merged = lab.path("merged");
    Snapshot::open(&folders[2]).unwrap().merge(&merged).unwrap();
    for folder in [&folders[2], &merged] {
        let machine = Running::restore(folder);
        machine.screen.wait_until(|seen| values(seen, "noise").len() > 1);
        if folder == &merged {
            assert!(Snapshot::open(&folders[2]).unwrap().merge(merged.join("inside")).is_err());
            machine.handle.snapshot(Destination::Folder(merged.clone())).unwrap();
            // What that would stand on is gone.
            assert!(machine.handle.snapshot(Destination::Diff(lab.path("late"))).is_err());
        }
        let all = format!("{printed}{}", machine.stop());
        assert!(counts(&all).windows(2).all(|two| two[1] == two[0] + 1), "{all}");
        assert!(values(&all, "noise").windows(2).all(|two| two[1] == two[0]), "{all}");
    }
    // Whatever becomes of the one below is seen.
    let state = folders[1].join("state");
    let bytes = fs::read(&state).unwrap();
    let mut other: serde_json::Value = snapshot::decode(&bytes).unwrap();
    other["vm"]["time"] = 0.into();
    fs::write(&state, snapshot::encode(&other).unwrap()).unwrap();
    assert!(matches!(Snapshot::open(&folders[2]), Err(machine::snapshot::Error::Base { .. })));
}

#[test]
fn four_clones_run_at_once() {
    clones(4);
}

#[test]
#[ignore = "takes minutes in an emulated host"]
fn sixteen_clones_run_at_once() {
    clones(16);
}

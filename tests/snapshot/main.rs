//! Machines that are saved, ended and restored.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

#[path = "../support/mod.rs"]
mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use bantam::config::{Config, Size};
use bantam::devices::console::Console;
use bantam::machine::{self, Builder, Destination, Handle, Machine, Snapshot};
use bantam::outcome::Outcome;
use bantam::virtio::blk;
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

/// What was printed whole as `name=VALUE ... end`.
fn values<'a>(text: &'a str, name: &str) -> Vec<&'a str> {
    let lines = text.lines().filter_map(|line| line.trim().strip_suffix(" end"));
    lines.filter_map(|line| line.strip_prefix(name)?.strip_prefix('=')).collect()
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
        let folder = TempDir::new().unwrap();
        let guest = Guest::new(kernel).script(script);
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

/// Saves, ends and restores a guest that counts so many times; it loses nothing.
fn lives(rounds: usize, cpus: u32) {
    let mut lab = Lab::new(Kernel::Tiny, COUNTER);
    let disk = lab.disk("disk");
    lab.config = lab.config.cpus(cpus).disk(blk::Spec::new(&disk));
    let saved = lab.path("saved");
    let mut machine = Running::start(Builder::new(lab.config.clone()));
    let seen = machine.screen.wait_until(|seen| !counts(seen).is_empty());
    let noise = values(&seen, "noise")[0].to_owned();
    // One that runs goes on.
    machine.handle.snapshot(Destination::Folder(saved.clone())).unwrap();
    let mut printed = String::new();
    for round in 0..rounds {
        let more = machine.screen.text().len() + 200;
        machine.screen.wait_until(|seen| seen.len() > more);
        machine.handle.input(format!("round{round}\n"));
        // The guest has it, but not necessarily the program that reads it.
        machine.screen.wait_for(&format!("round{round}"));
        machine.handle.pause().unwrap();
        machine.handle.snapshot(Destination::Folder(saved.clone())).unwrap();
        printed += &machine.stop();
        machine = Running::restore(&saved);
    }
    machine.handle.input("last\n");
    machine.screen.wait_for("typed=last end");
    printed += &machine.stop();
    let typed: Vec<_> = (0..rounds).map(|round| format!("round{round}")).chain(["last".into()]).collect();
    assert_eq!(values(&printed, "typed"), typed, "{printed}");
    let all = counts(&printed);
    eprintln!("{cpus} CPUs: {} counts in {rounds} rounds", all.len());
    assert!(all[0] == 1 && all.windows(2).all(|two| two[1] == two[0] + 1), "{printed}");
    assert!(values(&printed, "noise").iter().all(|seen| *seen == noise), "{printed}");
    // What was counted before the last line was typed is on the disk.
    let disk = fs::read(&disk).unwrap();
    for count in counts(&printed[..printed.find("typed=last").unwrap()]) {
        let at = 8 * usize::try_from(count - 1).unwrap();
        assert_eq!(disk[at..at + 8], *format!("{count:08}").as_bytes());
    }
}

#[test]
fn a_guest_loses_nothing() {
    lives(4, 1);
}

#[test]
fn a_guest_of_four_cpus_loses_nothing() {
    lives(3, 4);
}

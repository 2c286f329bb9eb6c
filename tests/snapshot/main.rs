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
use support::{Guest, Kernel, Screen};
use tempfile::TempDir;

/// Counts without end. Each count goes to a file that stays open, on a disk. It keeps 8 MiB of noise in memory, whose hash it prints from time to
/// time.
const COUNTER: &str = r#"
mkdir -p /mnt
dd if=/dev/urandom of=/noise bs=64k count=128 2>/dev/null
echo "hash=$(sha256sum </noise)"
exec 9>/dev/vda
i=0
echo ready
while :; do
    i=$((i + 1))
    echo "count=$i end"
    printf '%08d' $i >&9
    if [ $((i % 200)) = 0 ]; then echo "hash=$(sha256sum </noise)"; sync; fi
    if read -t 0 line; then :; fi
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

    fn stop(self) {
        self.handle.stop();
        assert_eq!(self.thread.join().unwrap().unwrap(), Outcome::Stopped);
    }
}

/// The counts that were printed whole.
fn counts(text: &str) -> Vec<u64> {
    text.split_whitespace()
        .collect::<Vec<_>>()
        .windows(2)
        .filter(|words| words[1] == "end")
        .filter_map(|words| words[0].strip_prefix("count=")?.parse().ok())
        .collect()
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

#[test]
fn a_guest_loses_nothing_when_it_is_saved_ended_and_restored() {
    let mut lab = Lab::new(Kernel::Tiny, COUNTER);
    let disk = lab.disk("disk");
    lab.config = lab.config.cpus(1).disk(blk::Spec::new(disk));
    let saved = lab.path("saved");
    let mut machine = Running::start(Builder::new(lab.config.clone()));
    machine.screen.wait_for("ready");
    let mut last = 0;
    for round in 0..3 {
        let seen = machine.screen.wait_until(|seen| counts(seen).last() > Some(&(last + 5)));
        eprintln!("round {round}: {:?}", counts(&seen).last());
        machine.handle.snapshot(Destination::Folder(saved.clone())).unwrap();
        machine.stop();
        machine = Running::restore(&saved);
        let seen = machine.screen.wait_until(|seen| !counts(seen).is_empty());
        last = counts(&seen)[0];
        eprintln!("restored: {last}");
    }
    machine.stop();
}

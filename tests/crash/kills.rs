//! bantam killed at any moment: what the guest was told is on its disks is there.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bantam::config::{Config, Size};
use bantam::devices::console::Console;
use bantam::machine::{Builder, Destination};
use bantam::virtio::blk;
use rustix::process::Signal;
use tempfile::TempDir;

use crate::journal::{Journal, last, mix, values};
use crate::support::screen::Screen;
use crate::support::{Guest, Kernel, Running, file};

/// How long one that was restored may take.
const LIMIT: Duration = Duration::from_secs(300);
const MIB: u64 = 1 << 20;
/// The largest record.
const RECORD_MAX: u64 = 16 << 10;

/// Has its file system mounted, and waits to be told what to write.
const SCRIPT: &str = "
chmod +x /journal
mkdir /data
mount -t ext4 /dev/vdb /data
echo ready to write
read seed
/journal $seed /dev/vda & /journal $seed /data files & wait
";

/// A guest that was saved when it was about to write, and its disks as they were then.
struct Saved {
    folder: TempDir,
}

impl Saved {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let path = |name: &str| folder.path().join(name);
        for (disk, size) in [("records", 32 * MIB), ("files", 24 * MIB)] {
            File::create(path(disk)).unwrap().set_len(size).unwrap();
        }
        run("mke2fs", &["-q", "-t", "ext4", "-J", "size=4"], &path("files"));
        let journal = fs::read(file("tools/journal")).unwrap();
        let guest = Guest::new(Kernel::Tiny).file("journal", &journal).script(SCRIPT);
        let config = Config::new().kernel(Kernel::Tiny.vmlinux()).initrd(guest.folder().join("initramfs.cpio"));
        let config = config.cmdline("quiet").memory(Size::mib(96)).timeout(LIMIT);
        let records = blk::Spec { engine: blk::Engine::IoUring, ..blk::Spec::new(path("records")) };
        let config = config.disk(records).disk(blk::Spec::new(path("files")));
        let screen = Screen::default();
        let mut machine = Builder::new(config).console(Console::to(screen.clone())).build().unwrap();
        let handle = machine.handle();
        let running = thread::spawn(move || machine.run());
        screen.wait_for("ready to write");
        handle.pause().unwrap();
        handle.snapshot(Destination::Folder(path("saved"))).unwrap();
        handle.stop();
        running.join().unwrap().unwrap();
        Saved { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Has the guest write what the seed says, kills bantam at a moment that the seed says, too, and looks at the disks. How
    /// many records and files were safe then.
    fn kill(&self, seed: u64) -> (u64, u64) {
        let disks = TempDir::new().unwrap();
        let [records, files] = ["records", "files"].map(|name| disks.path().join(name));
        for copy in [&records, &files] {
            copy_sparse(&self.path(copy.file_name().unwrap().to_str().unwrap()), copy);
        }
        let mut command = Command::new(env!("CARGO_BIN_EXE_bantam"));
        command.arg("restore").arg(self.path("saved")).stdin(Stdio::piped()).stdout(Stdio::piped());
        for (name, disk) in [("vda", &records), ("vdb", &files)] {
            command.arg("--disk").arg(format!("{name}={}", disk.display()));
        }
        command.args(["--serial", "stdio"]).stderr(Stdio::piped());
        let mut running = Running::start(&mut command, TempDir::new().unwrap(), LIMIT);
        running.write(&format!("{seed}\n"));
        // The moment: some time after so many flushes.
        let (name, count) = [("record", mix(seed) % 60), ("file", mix(seed) % 24)][(mix(seed) >> 60) as usize % 2];
        running.wait_until(|text| last(text, name).is_some_and(|number| number >= count));
        thread::sleep(Duration::from_micros(mix(seed + 1) % 30_000));
        running.signal(Signal::KILL);
        let ended = running.wait();
        ended.require(ended.status == 128 + 9, "expected it to be killed");
        ended.require(values(&ended.stdout, "failed").next().is_none(), "the guest failed");

        let journal = Journal { seed };
        let (record, file) = (last(&ended.stdout, "record"), last(&ended.stdout, "file"));
        let whole = journal.check(&fs::read(&records).unwrap(), record);
        assert!(whole < 32 * MIB / RECORD_MAX, "the disk was full: {whole} records");
        check_files(journal, &files, &ended.stdout);
        (record.map_or(0, |record| record + 1), file.map_or(0, |file| file + 1))
    }
}

/// The file system is clean after its journal was replayed, and has the files that were flushed, each as it was then, or as it
/// became after that.
fn check_files(journal: Journal, disk: &Path, stdout: &str) {
    // What a mount does: the journal, and files that were being removed.
    run("e2fsck", &["-p"], disk);
    run("e2fsck", &["-f", "-n"], disk);
    let out = TempDir::new().unwrap();
    run("debugfs", &["-R", &format!("rdump / {}", out.path().display())], disk);
    let safe: BTreeMap<u64, u64> = values(stdout, "file")
        .map(|number| number.parse().unwrap())
        .map(|number: u64| (journal.slot(number), number))
        .collect();
    let first_unsafe = last(stdout, "file").map_or(0, |number| number + 1);
    for (slot, number) in safe {
        let found = fs::read(out.path().join(format!("file{slot}"))).unwrap();
        // Those whose numbers did not get through are few.
        let later = (first_unsafe..first_unsafe + 100).filter(|number| journal.slot(*number) == slot);
        let known = [number].into_iter().chain(later).any(|number| found == journal.data(number));
        assert!(known, "file{slot} is not file {number}, which was flushed, nor a later one: {} bytes", found.len());
    }
}

/// Runs a program on a disk; it has to succeed, as programs that check file systems count.
#[track_caller]
fn run(program: &str, arguments: &[&str], disk: &Path) {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap());
    let output = Command::new(program).args(arguments).arg(disk).env("PATH", path).output().unwrap();
    // 1: errors were corrected. With -n nothing is.
    let succeeded = output.status.success() || program == "e2fsck" && output.status.code() == Some(1);
    assert!(succeeded, "{program} {arguments:?}: {output:?}");
}

fn copy_sparse(from: &Path, to: &Path) {
    let (from, to) = (File::open(from).unwrap(), File::create(to).unwrap());
    let len = from.metadata().unwrap().len();
    to.set_len(len).unwrap();
    let mut block = vec![0; 64 << 10];
    for at in (0..len).step_by(block.len()) {
        let count = from.read_at(&mut block, at).unwrap();
        if block[..count].iter().any(|byte| *byte != 0) {
            to.write_all_at(&block[..count], at).unwrap();
        }
    }
}

fn kills(count: u64) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros();
    let first = std::env::var("SEED").map_or_else(|_| u64::try_from(now).unwrap(), |seed| seed.parse().unwrap());
    let saved = Saved::new();
    let (mut records, mut files) = (0, 0);
    for seed in first..first + count {
        eprintln!("SEED={seed}");
        let (more_records, more_files) = saved.kill(seed);
        (records, files) = (records + more_records, files + more_files);
    }
    eprintln!("{count} kills: {records} records and {files} files were flushed, and are there");
    assert!(records > count && files > count);
}

#[test]
fn what_was_flushed_is_there_whenever_bantam_is_killed() {
    kills(6);
}

#[test]
#[ignore = "takes many minutes in an emulated host"]
fn what_was_flushed_is_there_after_two_hundred_kills() {
    kills(std::env::var("KILLS").map_or(200, |count| count.parse().unwrap()));
}

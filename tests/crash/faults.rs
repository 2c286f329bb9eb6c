//! A host that does less than it is asked for, or fails: the guest loses nothing, or is told.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::journal::{Journal, last, values};
use crate::support::{Ended, Guest, Kernel, file, noise, sha256};

/// A guest with journal.c in its folder.
fn guest(script: &str) -> Guest {
    let journal = fs::read(file("tools/journal")).unwrap();
    Guest::new(Kernel::Tiny).file("journal", &journal).script(&format!("chmod +x /journal\n{script}"))
}

/// Runs bantam under strace with these arguments, which writes the calls that it is told of to `log`. What it makes of system calls no
/// sandbox lets through.
fn traced(guest: Guest, log: &Path, arguments: &[&str]) -> Guest {
    let mut guest = guest.option("--sandbox", "off");
    let bantam = guest.command();
    let mut command = Command::new("strace");
    command.args(["-f", "-y", "-qq", "-o"]).arg(log).args(arguments).arg(bantam.get_program()).args(bantam.get_args());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    *bantam = command;
    guest
}

/// What has bantam go by a library of this name, made in `folder`.
fn preload(name: &str, folder: &Path) -> String {
    let (library, source) =
        (folder.join(name).with_extension("so"), Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/crash"));
    let mut gcc = Command::new("gcc");
    gcc.args(["-O2", "-Wall", "-shared", "-fPIC", "-o"]).arg(&library).arg(source.join(name).with_extension("c"));
    assert!(gcc.status().unwrap().success());
    format!("LD_PRELOAD={}", library.display())
}

fn zeros(path: PathBuf) -> PathBuf {
    File::create(&path).unwrap().set_len(4 << 20).unwrap();
    path
}

/// What journal.c said that it could not do.
fn failures(ended: &Ended) -> Vec<&str> {
    values(&ended.stdout, "failed").collect()
}

#[test]
fn short_and_interrupted_calls_go_on_and_only_a_flush_is_fdatasync() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (log, read) = (path("log"), path("read"));
    let content = noise(1 << 20);
    fs::write(&read, &content).unwrap();
    let (kept, lost) = (zeros(path("kept")), zeros(path("unsafe")));
    let guest = guest(
        "echo hash=$(dd if=/dev/vda bs=64k iflag=direct | sha256sum | cut -c -64)
         /journal 7 /dev/vdb 40
         /journal 8 /dev/vdc 40",
    );
    let guest = guest.disk(read.display()).disk(kept.display()).disk(format!("path={},cache=unsafe", lost.display()));
    let preload = preload("short", folder.path());
    // Every other one.
    let inject = "inject=fdatasync:error=EINTR:when=1+2";
    let ended = traced(guest, &log, &["-E", &preload, "-e", "trace=fdatasync", "-e", inject]).run().succeeded();
    assert_eq!(ended.value("hash"), sha256(&content));
    assert!(fs::read(&read).unwrap() == content);
    for (seed, disk) in [(7, &kept), (8, &lost)] {
        assert!(Journal { seed }.check(&fs::read(disk).unwrap(), Some(39)) >= 40);
    }
    let calls = fs::read_to_string(log).unwrap();
    let calls = |disk: &Path| calls.matches(&format!("<{}>", disk.display())).count() as u64;
    let flushes = |device| ended.counted(device, "flushes");
    assert!(flushes("blk1") > 5 && flushes("blk2") > 5);
    assert_eq!((calls(&read), calls(&kept), calls(&lost)), (0, 2 * flushes("blk1"), 0));
    // What was read in pieces of no sector was one request.
    assert!(ended.counted("blk0", "reads") < 64, "{}", ended.counted("blk0", "reads"));
}

#[test]
fn a_host_without_io_uring_is_told() {
    let folder = TempDir::new().unwrap();
    let (disk, log) = (zeros(folder.path().join("disk")), folder.path().join("log"));
    let guest = guest("true").disk(format!("{},engine=io_uring", disk.display()));
    let ended = traced(guest, &log, &["-e", "inject=io_uring_setup:error=EPERM"]).run();
    assert_eq!(ended.status, 125, "{}", ended.stderr);
    for words in ["cannot set up io_uring for disk image", "engine=sync", "not permitted"] {
        assert!(ended.stderr.contains(words), "{}", ended.stderr);
    }
}

#[test]
fn what_the_host_fails_the_guest_is_told() {
    let folder = TempDir::new().unwrap();
    let disk = zeros(folder.path().join("disk"));
    let guest = guest(
        "echo errors=$(dmesg | grep -c 'I/O error.* dev vda')
         for round in 1 2 3; do /journal 1 /dev/vda 60 || true; done",
    );
    let log = folder.path().join("log");
    // The first read looks for partitions.
    let preload = preload("fail", folder.path());
    let arguments = ["-E", &preload, "-e", "trace=fdatasync", "-e", "inject=fdatasync:error=EIO:when=3"];
    let ended = traced(guest.disk(disk.display()), &log, &arguments).run().succeeded();
    assert!(ended.number("errors") >= 1);
    let failures = failures(&ended);
    // EIO; and a flush that failed once fails for good.
    assert!(failures[0] == "write 2 errno 5" && failures.len() == 3, "{failures:?}");
    assert!(
        failures[1..].iter().all(|flush| flush.starts_with("flush ") && flush.ends_with(" errno 5")),
        "{failures:?}"
    );
    // What was flushed in any of the rounds.
    let flushed = values(&ended.stdout, "record").map(|number| number.parse::<u64>().unwrap()).max();
    Journal { seed: 1 }.check(&fs::read(&disk).unwrap(), flushed);
    assert!(last(&ended.stdout, "record") < Some(59));
    for what in ["read", "write", "flush"] {
        assert!(ended.stderr.contains(&format!("cannot {what} disk image {}: ", disk.display())), "{}", ended.stderr);
    }
    assert!(ended.counted("blk0", "errors") >= 4);
}
